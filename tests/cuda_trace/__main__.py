"""Trace the CUDA path on fake tensors, without a GPU, and print what it runs and what it costs.

    python -m tests.cuda_trace                          the tables of docs/gpu.md
    python -m tests.cuda_trace --fill after             write them there, in the place of this name
    python -m tests.cuda_trace steps:direct             only these cases
    python -m tests.cuda_trace --json 'steps:*'         one line of JSON each: what the tests read

A case is steps:RECIPE, sizes:RECIPE, scores:RECIPE, decoding:RECIPE, compiled:RECIPE or
flex:RECIPE; the recipe `*` stands for a few recipes that have all kinds of steps.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cuda_trace import guard

TABLE = ["steps:ar", "steps:direct", "steps:record", "steps:retrograde"]
TABLE += ["scores:direct", "decoding:direct"]
PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def trace(names: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Trace cases; the guard is loaded, and PyTorch after it."""
    guard.load(guard.build(folder))
    from tests.cuda_trace import cases

    for name in names:
        kind, _, recipe = name.partition(":")
        for each in cases.kinds(folder) if recipe == "*" else [recipe]:
            print(f"{kind}:{each}", file=sys.stderr, flush=True)
            yield from getattr(cases, kind)(each, folder)


def row(case: str, cost: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out a cost as a row of a table."""
    return {
        "traced": case,
        "eager kernels": cost["eager"],
        "kernels in graphs": cost["compiled"],
        "GB": cost["gigabytes"],
        "TFLOP": cost["teraflops"],
        "floor, ms": cost["floor_ms"],
    }


PARTS = {
    "graphs": "its compiled graphs",
    "eager": "noise, losses and the rest of it",
    "update": "its update",
}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Lay out all cases, and the parts of a step with windows."""
    from scripts import common

    rows = list[dict[str, Any]]()
    for case in found:
        rows.append(row(case["case"], case["cost"]))
        if case["case"] == "step direct with windows":
            rows += [row(PARTS[part], cost) for part, cost in case["parts"].items()]
    return common.table(rows, 1, 2)


def fill(page: Path, place: str, text: str) -> None:
    """Replace what stands between two comments of a page, which name the place."""
    command = ["git", "log", "-1", "--format=%h", "--", "train_gpt.py"]
    root = page.parents[1]
    commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    begin, end = f"<!-- trace {place} -->", f"<!-- end {place} -->"
    before = page.read_text("utf-8")
    of = f"train_gpt.py of commit {commit.stdout.strip()}"
    new = f"{begin}\n{place.capitalize()} ({of}):\n\n{text}\n\n{end}"
    after, count = re.subn(f"{begin}.*?{end}", lambda _: new, before, flags=re.DOTALL)
    assert count == 1, f"{page} has no place {place!r}"
    page.write_text(after, "utf-8")


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=TABLE)
    parser.add_argument("--json", action="store_true", help="a line a case, with all that is known")
    parser.add_argument("--fill", metavar="PLACE", help="write the table into docs/gpu.md")
    args, found = parser.parse_args(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        for case in trace(args.cases, Path(name)):
            found.append(case)
            if args.json:
                print(json.dumps(case), flush=True)
    if not args.json:
        print(table(found))
    if args.fill:
        fill(PAGE, args.fill, table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
