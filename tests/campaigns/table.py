"""Figures of campaigns as a Markdown table: `python -m tests.campaigns --table FILE`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.common import markdown

HEAD = ["campaign", "seed", "tried", "faults", "worst s", "worst MiB"]


def table(result: Mapping[str, Any]) -> str:
    """Lay out what a run of campaigns prints on its last line."""
    rows = []
    for name, found in result["campaigns"].items():
        worst = [f"{found['worst_seconds']:.1f}", f"{found['worst_mib']:,.0f}"]
        rows.append([f"`{name}`", str(found["seed"]), f"{found['tried']:,}", str(found["faults"])])
        rows[-1] += worst
    return markdown(HEAD, rows, num_texts=1)


def read_table(path: Path) -> str:
    """The same from a file that holds that line."""
    return table(json.loads(path.read_text("utf-8").splitlines()[-1]))
