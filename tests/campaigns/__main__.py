"""Randomised campaigns against the program as users run it.

    python -m tests.campaigns all --seconds 60 --seed 1
    python -m tests.campaigns settings --seed 1 --only 17        repeat one try
    python -m tests.campaigns --table logs/campaigns.json        figures of a result as Markdown

Each try is drawn from (campaign, seed, number) alone. A line on standard error names every fault
and how to repeat it; files of a faulty try are kept. The last line is one JSON object. Status 1
means that there was a fault. See docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: processes are forked from this one

import torch

from scripts.common import Parser, run_command
from tests.campaigns.containers import artifacts, checkpoints
from tests.campaigns.damaged_data import shards, tokenizers
from tests.campaigns.damaged_text import logs, prompts
from tests.campaigns.inputs import Inputs
from tests.campaigns.interruptions import kills, ranks
from tests.campaigns.settings import settings, subsets
from tests.campaigns.table import read_table
from tests.campaigns.tries import Try
from tests.conftest import ROOT

CAMPAIGNS: dict[str, Callable[[Try], None]] = {
    "kills": kills,
    "settings": settings,
    "subsets": subsets,
    "artifacts": artifacts,
    "checkpoints": checkpoints,
    "shards": shards,
    "tokenizers": tokenizers,
    "logs": logs,
    "prompts": prompts,
    "ranks": ranks,  # last, since one try takes longest
}
MOST_TRIES = 10**9


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, names = parser.add_argument, ["all", *CAMPAIGNS]
    add("names", nargs="*", choices=[*names, []], metavar="NAME", help=", ".join(names))
    parser.real("--seconds", 60.0, "time, shared by the campaigns; each has a try", 0, 1e9)
    parser.whole("--seed", 1, "what tries are drawn from", low=0)
    parser.whole("--tries", MOST_TRIES, "most tries of each campaign")
    parser.whole("--only", None, "the number of the one try to repeat", low=0)
    keep = "folder for the files of faulty tries (default: out/campaigns)"
    add("--keep", type=Path, default=ROOT / "out" / "campaigns", metavar="DIR", help=keep)
    add("--table", type=Path, metavar="FILE", help="print the table of a result, run nothing")
    args = parser.parse_args(argv)
    if bool(args.names) == bool(args.table):
        parser.error("name a campaign, all, or --table FILE")
    if "all" in args.names:
        args.names = list(CAMPAIGNS)
    return args


def special_files(folder: str, names: list[str]) -> list[str]:
    """Name what cannot be copied: pipes, and links that lead nowhere."""
    return [
        name
        for name in names
        if not Path(folder, name).is_file() and not Path(folder, name).is_dir()
    ]


def run_campaign(
    name: str, seconds: float, args: argparse.Namespace, inputs: Inputs
) -> dict[str, Any]:
    """Run tries of one campaign for some seconds and return its figures."""
    found: dict[str, Any] = {"tried": 0, "faults": 0, "worst_seconds": 0.0, "worst_mib": 0.0}
    found |= {"seed": args.seed, "statuses": Counter()}
    until = time.monotonic() + seconds
    for number in numbers(args):
        if found["tried"] and time.monotonic() >= until:
            break
        t = Try(name, args.seed, number, inputs.folder.parent / f"{name}-{number}", inputs)
        t.folder.mkdir()
        try:
            CAMPAIGNS[name](t)
        except Exception as error:
            t.fault(f"the campaign itself failed: {type(error).__name__}: {str(error)[-500:]}")
            (t.folder / "campaign.txt").write_text(traceback.format_exc(), "utf-8")
            until = 0.0  # what follows would fail, too
        found["tried"] += 1
        found["faults"] += bool(t.faults)
        found["worst_seconds"] = max(found["worst_seconds"], round(t.seconds, 3))
        found["worst_mib"] = max(found["worst_mib"], round(t.mib, 1))
        found["statuses"] += t.statuses
        report(t, args.keep)
        shutil.rmtree(t.folder, ignore_errors=True)
    print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def numbers(args: argparse.Namespace) -> Iterable[int]:
    """Numbers of tries."""
    return range(args.tries) if args.only is None else [args.only]


def report(t: Try, keep: Path) -> None:
    """Name every fault of a try, and keep its files."""
    if not t.faults:
        return
    kept = keep / f"{t.campaign}-{t.seed}-{t.number}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(t.folder, kept, symlinks=True, ignore=special_files)
    repeat = f"python -m tests.campaigns {t.campaign} --seed {t.seed} --only {t.number}"
    for fault in t.faults:
        place = f"FAULT {t.campaign} seed={t.seed} try={t.number}"
        line = f"{place}: {fault}; changed: {'; '.join(t.notes)}; repeat: {repeat}; files: {kept}"
        print(line, file=sys.stderr, flush=True)


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Run the campaigns one after the other; time that one leaves goes to the next."""
    found, until = dict[str, Any](), time.monotonic() + args.seconds
    work = Path(tempfile.mkdtemp(prefix="campaigns-"))
    try:
        inputs = Inputs(work / "inputs")
        for place, name in enumerate(args.names):
            left = max(until - time.monotonic(), 0.0) / (len(args.names) - place)
            found[name] = run_campaign(name, left, args, inputs)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"campaigns": found}


def status(result: Mapping[str, Any]) -> int:
    return int(any(found["faults"] for found in result["campaigns"].values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run campaigns; return 1 if there was a fault."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    if args.table:
        print(read_table(args.table))
        return 0
    return run_command(lambda: run_all(args), status, "no result was printed")


if __name__ == "__main__":
    sys.exit(main())
