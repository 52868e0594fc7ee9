"""The runs of a ladder by row, and the table of what every row costs and gives."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import train_gpt as tg
from scripts.study import sweep
from scripts.study.runlog import (
    NONE,
    REFINE,
    Group,
    Key,
    RunLog,
    group_runs,
    markdown,
    mean_cell,
    missing_seeds,
    numbers,
)

INFILL_SPAN, INFILL_PASSES = 8, (1, 8)

Rows = dict[str, Group]  # of one data set, machine and settings, in the order of the ladder, by row


def by_context(runs: Iterable[RunLog]) -> tuple[dict[Key, Rows], list[str]]:
    """Gather finished runs by what rows must share to be compared (a key without recipe), and say
    what is left out.
    """
    groups, notes = group_runs(runs)
    order = {name: place for place, name in enumerate(sweep.rows())}
    contexts: dict[Key, Rows] = {}
    for g in sorted(groups, key=lambda g: (order.get(g.key.recipe, len(order)), g.key.recipe)):
        contexts.setdefault(g.key._replace(recipe=""), {})[g.key.recipe] = g
    return {key: contexts[key] for key in sorted(contexts)}, [
        *notes,
        *missing_seeds(groups),
        *version_note(groups),
    ]


def version_note(groups: Sequence[Group]) -> list[str]:
    versions = {run.get("header", "sha256") for g in groups for run in g.runs}
    return (
        [f"the runs were made by {len(versions)} versions of train_gpt.py"]
        if len(versions) > 1
        else []
    )


def equal_rows(name: str) -> list[str]:
    """List the rows with the settings of this one, itself included: a sweep makes their runs once."""
    recipes = tg.all_recipes()
    return [row for row in sweep.rows() if name in recipes and recipes[row] == recipes[name]]


def find(rows: Rows, name: str) -> Group | None:
    """Return a row's runs, or those of a row with equal settings."""
    return next((rows[other] for other in (name, *equal_rows(name)) if other in rows), None)


def shared_note(rows: Rows) -> str:
    """Name the rows that have no runs of their own, since another has the same settings."""
    others = {
        name: [f"`{other}`" for other in equal_rows(name) if other not in rows] for name in rows
    }
    said = [f"`{name}` is also {', '.join(names)}" for name, names in others.items() if names]
    return f"\n\nOf equal settings, so the same runs: {'; '.join(said)}." if said else ""


def context_name(key: Key) -> str:
    """Say what all rows of a table share."""
    ranks = f", {key.ranks} ranks" if key.ranks > 1 else ""
    return ", ".join(
        [key.data, f"{key.machine}{ranks}", *(f"`{change}`" for change in key.changes)]
    )


# ==============================================================================
# 2  TABLE -- what every row costs and gives
# ==============================================================================


def of_runs(g: Group, event: str, name: str) -> list[float]:
    return numbers(run.events.get(event, {}).get(name) for run in g.runs)


def bounds(g: Group, window: int) -> list[float]:
    return numbers(run.nelbo.get(window, {}).get("nelbo_bpb") for run in g.runs)


def windows_of(rows: Mapping[str, Group]) -> list[int]:
    return sorted({window for g in rows.values() for run in g.runs for window in run.nelbo})


def infill(g: Group, passes: int, name: str, span: int = INFILL_SPAN) -> list[float]:
    return numbers(run.decode.get(("infill", span, passes, REFINE), {}).get(name) for run in g.runs)


def whole(values: Sequence[float], of: Any = statistics.mean) -> str:
    return f"{of(values):,.0f}" if values else NONE


def cost_table(rows: Rows) -> str:
    """One line a row: steps, speed, memory, exact bits per byte, bounds, infill, size, and what was
    published.
    """
    windows = windows_of(rows)
    head = [
        "row",
        "n",
        "steps",
        "train tok/s",
        "peak MiB",
        "val_bpb",
        *(f"bound, window {w}" for w in windows),
    ]
    head += [f"infill {INFILL_SPAN}, {n} pass{'es' if n > 1 else ''}" for n in INFILL_PASSES]
    body = []
    for name, g in rows.items():
        body.append(
            [
                f"`{name}`",
                str(len(g.runs)),
                whole(of_runs(g, "done", "steps")),
                whole(of_runs(g, "train", "tok_per_sec")),
                whole(of_runs(g, "done", "peak_memory_mib"), max),
                mean_cell(g.values("final", "val_bpb")),
                *(mean_cell(bounds(g, w)) for w in windows),
                *(mean_cell(infill(g, n, "token_acc"), 3) for n in INFILL_PASSES),
                whole(of_runs(g, "size", "total_bytes"), max),
                sweep.published_cell(name) if name in sweep.rows() else NONE,
            ]
        )
    return markdown([*head, "bytes", "published (phase)"], body, 1)


def recipes_block(runs: Iterable[RunLog]) -> str:
    """The text that README.md carries between its markers for recipes."""
    contexts, notes = by_context(runs)
    tables = [
        f"{context_name(key)}:\n\n{cost_table(rows)}{shared_note(rows)}"
        for key, rows in contexts.items()
    ]
    parts = tables or ["No finished run."]
    if contexts:
        parts.append(
            "Means over n seeds, ± standard deviation; bytes and peak MiB are the largest. Infill: share of tokens of "
            f"{INFILL_SPAN}-token holes equal to the text. Published: val_bpb on FineWeb, one H100 for 180 s unless "
            "said."
        )
    if notes:
        parts.append(
            "Not averaged, or to be read with care:\n\n" + "\n".join(f"- {note}" for note in notes)
        )
    return "\n\n".join(parts)
