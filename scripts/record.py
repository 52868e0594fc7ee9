"""Make a record from nothing: data, seeds x recipes, tables and submission.json; the same command again goes on.

    python scripts/record.py 8xh100                         FineWeb, `direct`, three seeds x 600 s on eight devices
    DATA_PATH=data/mine TOKENIZER_PATH=data/mine/tokenizer.model python scripts/record.py 1xgpu --seconds 150
    python scripts/record.py cpu                            two recipes x three seeds x 300 s on a small corpus: an hour
    python scripts/record.py 8xh100 --plan                  only say what would be run
    python scripts/record.py 8xh100 --rehearse              four steps on CPU (two processes): does the whole path work?
    python scripts/record.py 8xh100 --variant sp8192        shards of another tokenizer; sets VOCAB_SIZE
    python scripts/record.py 8xh100 --package packages      then make the folder that is handed in (package.py)

Steps: prepare_data.py (FineWeb, or for cpu the Python library, unless DATA_PATH names what is there), sweep.py twice
(baselines as they are, then `direct` with the protocol's record settings, RECORD below; finished runs are skipped),
bench_export.py (where the bytes go and what rounding costs both scores), report.py. OUT holds runs, logs/ with
results.json, export.json, README.md with the tables and submission.json. Settings of train_gpt.py come from the
environment as always, over which record settings stand (in a rehearsal but for sizes). The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
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


CHECKPOINT = "CHECKPOINT"  # in a command: that of a run with record settings
RECIPE = "direct"  # of the record; others are baselines
SIZES = ("NUM_LAYERS", "MLP_MULT", "TRAIN_BATCH_TOKENS", "MICRO_BATCHES")  # a rehearsal takes the environment's

# Settings beyond the baseline's, by protocol. Those of GPUs are what others measured in the challenge (ten layers and a
# wide MLP, paid for by six bits; a table of token pairs, low rates, long warm-down, decay, average), not measured by
# this project; `cpu` is what was measured here (LOG.md).
SIX_BITS = {"EXPORT_SCHEME": "int6+lzma", "VALUE_RESIDUAL": "1"}
LOW_RATES = {"MATRIX_LR": "0.02", "TIED_EMBED_LR": "0.03", "MUON_WEIGHT_DECAY": "0.04"}
LONG_RUN = {"WARMDOWN_ITERS": "3000", "MUON_MOMENTUM": "0.99", "MUON_MOMENTUM_WARMUP_START": "0.92"}
LONG_RUN |= {"MUON_MOMENTUM_WARMUP_STEPS": "1500", "EMA_DECAY": "0.997", "NUM_LAYERS": "10", "MLP_MULT": "3"}
SMALL_BATCH = {"TRAIN_BATCH_TOKENS": "2048", "MICRO_BATCHES": "1"}
RECORD: dict[str, dict[str, str]] = {
    "8xh100": SIX_BITS | LOW_RATES | LONG_RUN | {"BIGRAM_VOCAB_SIZE": "2048"},
    "1xgpu": SIX_BITS | LOW_RATES | {"BIGRAM_VOCAB_SIZE": "8192"},
    "cpu": SMALL_BATCH | {"VALUE_RESIDUAL": "1", "MUON_MOMENTUM": "0.9", "COMPILE": "1", "BIGRAM_VOCAB_SIZE": "16384"},
}


class Protocol(NamedTuple):
    """What is run, on how much."""

    nproc: int
    preset: str
    seconds: float  # of each run
    baselines: str  # recipes without record settings, if any
    source: str  # of text, where none is named


PROTOCOLS = {
    "8xh100": Protocol(8, "8xh100", 600.0, "", "fineweb --train-shards 80"),
    "1xgpu": Protocol(1, "1xgpu", 150.0, "ar,retrograde,direct", "fineweb --train-shards 80"),
    "cpu": Protocol(1, "cpu", 300.0, "ar", "stdlib"),
}


class Step(NamedTuple):
    """A command, and settings of its environment."""

    command: list[str]
    settings: dict[str, str]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--seeds", default=SEEDS, help="list, with commas (default %(default)s)")
    parser.add_argument("--seconds", type=float, help="of each run (default: the protocol's)")
    parser.add_argument("--baselines", help="recipes without record settings (default: the protocol's; '': none)")
    parser.add_argument("--out", type=Path, help="folder of the record (default out/record_PROTOCOL)")
    parser.add_argument("--plan", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="four steps on two CPU processes")
    parser.add_argument("--source", help="of text, for prepare_data.py, with its arguments (default: the protocol's)")
    parser.add_argument("--variant", choices=("sp1024", "sp4096", "sp8192"), help="fineweb: which tokenizer")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="fineweb: dataset repository")
    parser.add_argument("--package", type=Path, metavar="DIR", help="make the folder that is handed in, in DIR")
    args = parser.parse_args(argv)
    args.out = args.out or Path("out", f"record_{args.protocol}{'_rehearsal' * args.rehearse}")
    return args


DATA_OPTIONS = ("source", "variant", "repo")  # of what is prepared


def source_of(args: argparse.Namespace, how: Protocol) -> list[str]:
    """Return arguments of prepare_data.py: the source of text, and for FineWeb which export of it."""
    source = shlex.split(args.source or how.source)
    if args.source == "fineweb":  # no number of shards is named: the record's
        source = PROTOCOLS["8xh100"].source.split()
    for name in ("variant", "repo"):
        if value := getattr(args, name):
            source += [f"--{name}", value]
    return source


def steps_of(args: argparse.Namespace, env: Mapping[str, str]) -> list[Step]:
    """List what is run, in order."""
    how, out, python = PROTOCOLS[args.protocol], args.out, sys.executable
    if args.rehearse:
        how = how._replace(nproc=min(how.nproc, 2), preset="cpu", source="stdlib")
    source = source_of(args, how)
    settings, steps = {"PRESET": how.preset} | ({"DEVICE": "cpu"} if how.preset == "cpu" else {}), list[Step]()

    def add(script: str, *arguments: str, **more: str) -> None:
        steps.append(Step([python, str(SCRIPTS / script), *arguments], settings | more))

    if "DATA_PATH" not in env:
        data = Path("data", "_".join([source[0], *([args.variant] if args.variant else [])]))
        settings |= {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}
        settings |= {"VOCAB_SIZE": args.variant.removeprefix("sp")} if args.variant else {}
        add("prepare_data.py", "--source", *source, "--out", str(data))
    elif given := [f"--{name}={getattr(args, name)}" for name in DATA_OPTIONS if getattr(args, name)]:
        raise tg.UserError(f"{' '.join(given)}: DATA_PATH={env['DATA_PATH']} names the data already; unset one of them")
    budget = ["--steps", "4"] if args.rehearse else ["--seconds", str(args.seconds or how.seconds)]
    runs = ["--seeds", args.seeds, *budget, "--nproc", str(how.nproc), "--out", str(out)]
    if baselines := how.baselines if args.baselines is None else args.baselines:
        add("sweep.py", *baselines.split(","), *runs)
    settings |= {k: v for k, v in RECORD[args.protocol].items() if not (args.rehearse and k in SIZES and k in env)}
    add("sweep.py", RECIPE, *runs)
    levels = tg.SCHEMES[settings.get("EXPORT_SCHEME", "int8+zlib")][0][:4]  # the artifact takes one of the first
    export = ["--levels", ",".join(map(str, levels)), "--out", str(out / "export.json")]
    device = ["--device", settings.get("DEVICE", "auto")]
    add("bench_export.py", CHECKPOINT, *export, *device, NELBO_SEQUENCES=env.get("NELBO_SEQUENCES", "4096"))
    files = {"--logs": "logs", "--readme": "README.md", "--submission": "submission.json"}
    add("report.py", *(part for option, name in files.items() for part in (option, str(out / name))), "--write")
    return steps


def checkpoint(args: argparse.Namespace, env: Mapping[str, str]) -> Path:
    """Find the last checkpoint of a finished run of the first seed with record settings; UserError: there is none."""
    time = {"ITERATIONS": "4", "MAX_WALLCLOCK_SECONDS": "0"}
    if not args.rehearse:
        time = {"MAX_WALLCLOCK_SECONDS": str(args.seconds or PROTOCOLS[args.protocol].seconds)}
    run = {"RECIPE": RECIPE, "SEED": args.seeds.split(",")[0], "RUN_ID": "", "OUT_DIR": str(args.out)}
    digest = tg.Config.from_env({**env, **time, **run})[0].path("", "").name[-8:]  # as sweep.py names folders
    for path in Path(args.out).glob(f"*_{digest}/checkpoints/*_{digest}.pt"):
        log = args.out / "logs" / f"{path.stem}.jsonl"
        if log.exists() and not report.read_log(log).why_left_out:
            return path
    raise tg.UserError(f"OUT={args.out} holds no checkpoint of a finished record run; name another --out")


def check(args: argparse.Namespace) -> None:
    """Raise UserError if this machine lacks the devices, or a compiler, before anything is downloaded."""
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if RECORD[args.protocol].get("COMPILE") == "1" and not any(map(shutil.which, compilers)):
        raise tg.UserError(
            f"PROTOCOL={args.protocol}: COMPILE=1 needs a C++ compiler ({' or '.join(compilers)}); install one"
        )
    wanted, found = PROTOCOLS[args.protocol].nproc, torch.cuda.device_count()
    if PROTOCOLS[args.protocol].preset != "cpu" and not args.rehearse and found < wanted:
        rule = f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}, {found} found"
        raise tg.UserError(f"PROTOCOL={args.protocol} {rule}; run it there, or try the path with --rehearse")


def make_package(args: argparse.Namespace) -> dict[str, Any]:
    """Make the folder that is handed in from the runs with record settings; UserError: it would be refused."""
    sys.path.insert(0, str(SCRIPTS / "study"))
    import package

    how, seconds = PROTOCOLS[args.protocol], args.seconds or PROTOCOLS[args.protocol].seconds
    ranked = args.protocol == "8xh100" and not args.rehearse and seconds <= package.TRAIN_SECONDS
    track = package.TEN_MINUTES if ranked else package.NON_RECORD
    seeds = tuple(map(int, args.seeds.split(",")))
    tiny = args.rehearse or how.preset == "cpu"
    wanted = package.Request(args.out / "logs", args.package, seeds, track=track, recipe=RECIPE, tiny=tiny)
    print(f"package {wanted.logs} -> {wanted.out}", file=sys.stderr, flush=True)
    return package.write_package(wanted)


def run(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Run every step; UserError: one failed, or the machine lacks devices."""
    steps = steps_of(args, env)
    if not args.plan:
        check(args)
    for step in steps:
        changes = [f"{name}={value}" for name, value in step.settings.items()]
        if args.plan:
            print(shlex.join(changes + step.command), file=sys.stderr)
            continue
        if step is steps[-1] and not (readme := args.out / "README.md").exists():  # the report goes between two lines
            between = "\n\n".join(report.RESULTS)
            readme.write_text(f"# Record: {args.protocol}\n\n{between}\n", encoding="utf-8")
        all_env = {**env, **step.settings}
        command = [str(checkpoint(args, all_env)) if part == CHECKPOINT else part for part in step.command]
        print(shlex.join(changes + command), file=sys.stderr, flush=True)
        done = subprocess.run(command, env=all_env, stdout=2, check=False)
        if done.returncode:
            again = "what is done is kept: the same command goes on"
            raise tg.UserError(f"{Path(command[1]).name} ended with status {done.returncode}, see above; {again}")
    entry = {} if args.plan else json.loads((args.out / "submission.json").read_text(encoding="utf-8"))
    made = {"package": make_package(args)} if args.package and not args.plan else {}
    about = {"protocol": args.protocol, "out": str(args.out), "planned": args.plan}
    return about | {"val_bpb": entry.get("val_bpb"), **made}


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
