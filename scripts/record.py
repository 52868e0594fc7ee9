"""Make a record from nothing: data, seeds x recipes, tables and submission.json; the same command again goes on.

    python scripts/record.py 8xh100                         FineWeb, `direct`, three seeds x 600 s on eight devices
    DATA_PATH=data/mine TOKENIZER_PATH=data/mine/tokenizer.model python scripts/record.py 1xgpu --seconds 150
    python scripts/record.py 8xh100 --plan                  only say what would be run
    python scripts/record.py 8xh100 --rehearse              four steps on two CPU processes: does the whole path work?

Steps: prepare_data.py (FineWeb, unless DATA_PATH names what is there), sweep.py (one run after the other, finished ones
are skipped), report.py. OUT holds runs, logs/, README.md with the tables and submission.json. Settings of train_gpt.py
come from the environment as always. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train_gpt.py lies beside this folder

import train_gpt as tg

SCRIPTS = Path(__file__).resolve().parent
SEEDS = "1337,42,2026"


class Protocol(NamedTuple):
    """What is run, on how much."""

    nproc: int
    preset: str
    seconds: float  # of each run
    recipes: str


PROTOCOLS = {
    "8xh100": Protocol(8, "8xh100", 600.0, "direct"),
    "1xgpu": Protocol(1, "1xgpu", 150.0, "ar,retrograde,direct"),
}
REHEARSED = Protocol(2, "cpu", 0.0, "ar,direct")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--seeds", default=SEEDS, help="list, with commas (default %(default)s)")
    parser.add_argument("--seconds", type=float, help="of each run (default: the protocol's)")
    parser.add_argument("--recipes", help="list, with commas (default: the protocol's)")
    parser.add_argument("--out", type=Path, help="folder of the record (default out/record_PROTOCOL)")
    parser.add_argument("--plan", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="four steps on two CPU processes")
    args = parser.parse_args(argv)
    args.out = args.out or Path("out", f"record_{args.protocol}{'_rehearsal' * args.rehearse}")
    return args


def commands(args: argparse.Namespace, env: Mapping[str, str]) -> tuple[list[list[str]], dict[str, str]]:
    """List what is run, in order, and the settings that go with it."""
    how, out = REHEARSED if args.rehearse else PROTOCOLS[args.protocol], args.out
    settings, steps, python = {"PRESET": how.preset}, list[list[str]](), sys.executable
    if "DATA_PATH" not in env:
        source = ["stdlib"] if args.rehearse else ["fineweb", "--train-shards", "80"]
        data = Path("data", source[0])
        settings |= {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}
        steps.append([python, str(SCRIPTS / "prepare_data.py"), "--source", *source, "--out", str(data)])
    budget = ["--seconds", str(args.seconds or how.seconds)]
    if args.rehearse:
        budget, settings["DEVICE"] = ["--steps", "4"], "cpu"
    sweep = [python, str(SCRIPTS / "sweep.py"), *(args.recipes or how.recipes).split(","), "--seeds", args.seeds]
    steps.append([*sweep, *budget, "--nproc", str(how.nproc), "--out", str(out)])
    files = {"--logs": "logs", "--readme": "README.md", "--submission": "submission.json"}
    named = [part for option, name in files.items() for part in (option, str(out / name))]
    steps.append([python, str(SCRIPTS / "report.py"), *named, "--write"])
    return steps, settings


def check(args: argparse.Namespace) -> None:
    """Raise UserError if this machine lacks the devices, before anything is downloaded."""
    wanted, found = PROTOCOLS[args.protocol].nproc, torch.cuda.device_count()
    if not args.rehearse and found < wanted:
        rule = f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}, {found} found"
        raise tg.UserError(f"PROTOCOL={args.protocol} {rule}; run it there, or try the path with --rehearse")


def run(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Run every step; UserError: one failed, or the machine lacks devices."""
    steps, settings = commands(args, env)
    if not args.plan:
        check(args)
    for step in steps:
        shown = [f"{name}={value}" for name, value in settings.items()] + step
        print(shlex.join(shown), file=sys.stderr, flush=True)
        if args.plan:
            continue
        if step is steps[-1] and not (readme := args.out / "README.md").exists():  # the report goes between two lines
            between = "\n\n".join(report.RESULTS)
            readme.write_text(f"# Record: {args.protocol}\n\n{between}\n", encoding="utf-8")
        done = subprocess.run(step, env={**env, **settings}, stdout=2, check=False)
        if done.returncode:
            again = "what is done is kept: the same command goes on"
            raise tg.UserError(f"{Path(step[1]).name} ended with status {done.returncode}, see above; {again}")
    entry = {} if args.plan else json.loads((args.out / "submission.json").read_text(encoding="utf-8"))
    return {"protocol": args.protocol, "out": str(args.out), "planned": args.plan, "val_bpb": entry.get("val_bpb")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error the user can repair."""
    args = parse_args(argv)
    try:
        print(json.dumps(run(args, os.environ)))
    except (tg.UserError, report.ReportError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; what is done is kept: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
