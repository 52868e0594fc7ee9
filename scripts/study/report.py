"""Turn run logs into tables, submission.json and results.json, and check that these agree.

    python scripts/study/report.py            print the tables
    python scripts/study/report.py --write    also update the pages and both JSON files
    python scripts/study/report.py --check    exit 1 if one of them disagrees with the logs

Every table stands between two marks in the page that PAGES names, or all of them in --readme.
submission.json has the challenge's fields and no other, null until ranked runs (eight devices,
FineWeb) are there; logs/results.json has what was measured on any machine.
Runs that differ only in their seed are one row. A run counts once it has written its `done` event.
Runs of sweep.py's rows are in logs/ladder, which has a table of its own. Those of record.py are in
logs/record_cpu/logs: they stand in the table of results, and in that of the record.
See compare.py for tests of differences, plot.py for curves.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import train_gpt as tg
from scripts.common import NONE, ROOT, Parser, fail, markdown, run_command, warn
from scripts.study import sweep
from scripts.study.runlog import (
    ABOUT,
    LEFT_TO_RIGHT,
    REFINE,
    Group,
    Key,
    RunLog,
    as_cell,
    group_runs,
    identity_notes,
    is_number,
    is_text,
    mean_cell,
    missing_seeds,
    mixed_identity,
    numbers,
    parse_object,
    read_logs,
    rounded,
    seed_result,
    shown,
    split_lines,
    spread,
    submission_entry,
)

INFILL_SPAN, INFILL_PASSES = 8, (1, 8)
TEXTS = (("data", "fingerprints of data"), ("tokenizer", "tokenizers"))  # that runs are of

Benchmarks = Sequence[dict[str, Any]]
Rows = dict[str, Group]  # of one data set, machine and settings, in the order of the ladder, by row


class Block(NamedTuple):
    """What stands between two lines of a page is written here."""

    begin: str
    end: str


RECORD, RESULTS, RECIPES = (
    Block(f"<!-- {name} -->", f"<!-- /{name} -->") for name in ("record", "results", "recipes")
)
PAGES = {RECORD: "README.md", RESULTS: "docs/recipes.md", RECIPES: "docs/recipes.md"}

OUR_RECIPES = ("record", "direct")  # whose measurements results.json holds

# What the challenge ranks: our record on FineWeb on eight devices, for at most so many seconds.
RANKED_RECIPE = "record"
RANKED_DATA = "fineweb"
RANKED_RANKS = 8
RANKED_PRESET = "8xh100"
RANKED_SECONDS = 600.0
RANKED_TRACK = "10min_16mb"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, action = parser.add_argument, parser.add_mutually_exclusive_group()
    pages = ", ".join(dict.fromkeys(PAGES.values()))
    add("--logs", type=Path, default=ROOT / "logs", help="folder of *.jsonl run logs")
    add("--readme", type=Path, help=f"one page with all tables (default: {pages})")
    add("--ladder", type=Path, help="folder of logs of the ladder (default: ladder in --logs)")
    record = "folder of logs of record.py (default: record_cpu/logs in --logs)"
    add("--record", type=Path, help=record)
    add("--submission", type=Path, default=ROOT / "submission.json")
    add("--results", type=Path, help="all measurements (default: results.json in --logs)")
    action.add_argument("--check", action="store_true", help="exit 1 if a file disagrees with logs")
    action.add_argument("--write", action="store_true", help="update all files")
    args = parser.parse_args(argv)
    args.ladder = args.ladder or args.logs / "ladder"
    args.record = args.record or args.logs / "record_cpu" / "logs"
    args.results = args.results or args.logs / "results.json"
    return args


def log_folders() -> list[Path]:
    """List the folders of logs that this repository holds."""
    return [folder for folder in (ROOT / "logs", ROOT / "logs" / "ladder") if folder.is_dir()]


# ==============================================================================
# 1  TABLES -- Markdown of what runs scored
# ==============================================================================


def shared_changes(groups: Sequence[Group]) -> list[str]:
    """List the settings given by hand that every row has in common: they are said once, below the
    table.
    """
    return [
        change for change in groups[0].key.changes if all(change in g.key.changes for g in groups)
    ]


def name_cells(key: Key, shared: Sequence[str]) -> list[str]:
    ranks = f", {key.ranks} ranks" if key.ranks > 1 else ""
    own = [change for change in key.changes if change not in shared]
    return [
        ", ".join(f"`{name}`" for name in [key.recipe, *own]),
        key.data,
        f"{key.machine}{ranks}",
    ]


def score_table(groups: Sequence[Group]) -> str:
    """One row a group: exact bits per byte, diffusion bounds by window, size, speed, memory."""
    shared = shared_changes(groups)
    windows = sorted({window for g in groups for run in g.runs for window in run.nelbo})
    head = ["recipe", "data", "machine", "n", "val_bpb", *(f"bound, window {w}" for w in windows)]
    rows = []
    for g in groups:
        bounds = [
            mean_cell(numbers(run.nelbo.get(w, {}).get("nelbo_bpb") for run in g.runs))
            for w in windows
        ]
        speed = numbers(run.events.get("train", {}).get("tok_per_sec") for run in g.runs)
        rows.append(
            [
                *name_cells(g.key, shared),
                str(len(g.runs)),
                mean_cell(g.values("final", "val_bpb")),
                *bounds,
                f"{max(g.values('size', 'total_bytes')):,.0f}",
                whole(speed),
                whole(of_runs(g, "done", "peak_memory_mib"), max),
            ]
        )
    return markdown([*head, "bytes", "train tok/s", "peak MiB"], rows, 3)


def decode_table(groups: Sequence[Group]) -> str:
    """One row a group, task and span; one column a number of passes: token accuracy and decoded
    tokens per second.
    """
    shared = shared_changes(groups)
    ways = sorted(
        {
            (key[3], key[2])
            for g in groups
            for run in g.runs
            for key in run.decode
            if key[3] != LEFT_TO_RIGHT
        }
    )
    rows = []
    for g in groups:
        for task, span in sorted(
            {key[:2] for run in g.runs for key in run.decode}, key=lambda t: (t[0], -t[1])
        ):
            wanted = [(task, span, steps, mode) for mode, steps in ways] + [
                (task, span, span, LEFT_TO_RIGHT)
            ]
            rows.append(
                [
                    *name_cells(g.key, shared),
                    task,
                    str(span),
                    *(decode_cell(g, key) for key in wanted),
                ]
            )
    heads = [
        f"{n} pass{'es' if n > 1 else ''}{'' if mode == REFINE else f', {mode}'}"
        for mode, n in ways
    ]
    return markdown(["recipe", "data", "machine", "task", "span", *heads, "left to right"], rows, 4)


def decode_cell(g: Group, key: tuple[str, int, int, str]) -> str:
    rows = [run.decode.get(key, {}) for run in g.runs]
    accuracy = numbers(r.get("token_acc") for r in rows)
    speed = numbers(r.get("tok_per_sec") for r in rows)
    return (
        f"{mean_cell(accuracy, 3)} ({statistics.mean(speed):,.0f}/s)"
        if accuracy and speed
        else NONE
    )


def bound_note(groups: Sequence[Group]) -> str:
    """State the Monte Carlo error that bounds carry besides the spread over seeds."""
    rows = [row for g in groups for run in g.runs for row in run.nelbo.values()]
    errors = [float(row["standard_error"]) for row in rows if row.get("standard_error")]
    if not errors:
        return ""
    return f" Largest Monte Carlo standard error of one run's bound: {max(errors):.4f}."


def version_notes(groups: Sequence[Group]) -> list[str]:
    """Say which rows average runs of more than one program, or perhaps of more than one text."""
    notes = []
    for g in groups:
        name = ", ".join(name_cells(g.key, shared_changes(groups)))
        for what, shown_as in (("program", "versions of train_gpt.py"), *TEXTS):
            if held := mixed_identity(g.runs, what):
                digests = "" if what == "program" else f" ({', '.join(held)})"
                notes.append(f"{name}: averages {len(held)} {shown_as}{digests}")
    return notes


def results_block(groups: Sequence[Group], notes: Sequence[str]) -> str:
    """The text between the marks of results."""
    if not groups:
        parts = ["No finished run."]
    else:
        parts = [
            score_table(groups),
            "val_bpb is exact, over the whole validation split. A bound is the diffusion upper "
            "bound in bits per byte over the rows that NELBO_SEQUENCES names; at window 1 it is "
            "their exact value. Mean ± standard deviation "
            f"over n seeds; bytes and peak MiB are the largest.{bound_note(groups)}",
        ]
        if shared := shared_changes(groups):
            parts.append(f"In all rows: {', '.join(f'`{change}`' for change in shared)}.")
        if any(run.decode for g in groups for run in g.runs):
            parts += [
                decode_table(groups),
                "Share of tokens equal to the text, and decoded tokens per second, by number of "
                "refinement passes over "
                "the span; left to right reads no text after the span.",
            ]
    left_out = [*notes, *version_notes(groups)]
    if left_out:
        parts.append(
            "Not averaged, or to be read with care:\n\n"
            + "\n".join(f"- {note}" for note in left_out)
        )
    return "\n\n".join(parts)


# ==============================================================================
# 2  LADDER -- the runs of a ladder by row, and what every row costs and gives
# ==============================================================================


def by_context(runs: Iterable[RunLog]) -> tuple[dict[Key, Rows], list[str]]:
    """Gather finished runs by what rows must share to be compared (a key without recipe), and say
    what is left out.
    """
    groups, notes = group_runs(runs)
    order = {name: place for place, name in enumerate(sweep.known_ladder().rows)}
    contexts: dict[Key, Rows] = {}
    for g in sorted(groups, key=lambda g: (order.get(g.key.recipe, len(order)), g.key.recipe)):
        contexts.setdefault(g.key._replace(recipe=""), {})[g.key.recipe] = g
    return {key: contexts[key] for key in sorted(contexts)}, [
        *notes,
        *missing_seeds(groups),
        *version_note(groups),
    ]


def version_note(groups: Sequence[Group]) -> list[str]:
    """Say that not all runs of a folder are of one program, or perhaps not of one text."""
    notes, runs = [], [run for g in groups for run in g.runs]
    if held := mixed_identity(runs, "program"):
        notes.append(f"the runs were made by {len(held)} versions of train_gpt.py")
    for data in dict.fromkeys(g.key.data for g in groups):
        of_data = [run for g in groups for run in g.runs if g.key.data == data]
        for what, shown_as in TEXTS:
            if held := mixed_identity(of_data, what):
                notes.append(f"{data}: runs on {len(held)} {shown_as} ({', '.join(held)})")
    return notes


def warn_of_ladder() -> list[str]:
    """Name a damaged ladder file on standard error; its rows are not known then."""
    fault = sweep.known_ladder().fault
    if fault:
        warn(f"{fault}; until then, rows of it have no order and no published score here")
    return [fault] if fault else []


def equal_rows(name: str) -> list[str]:
    """List the rows with the settings of this one, itself included; a sweep runs them once."""
    recipes = sweep.known_ladder().recipes
    return [row for row in recipes if name in recipes and recipes[row] == recipes[name]]


def find_row(rows: Rows, name: str) -> Group | None:
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


def of_runs(g: Group, event: str, name: str) -> list[float]:
    return numbers(run.events.get(event, {}).get(name) for run in g.runs)


def bounds(g: Group, window: int) -> list[float]:
    return numbers(run.nelbo.get(window, {}).get("nelbo_bpb") for run in g.runs)


def windows_of(rows: Mapping[str, Group]) -> list[int]:
    return sorted({window for g in rows.values() for run in g.runs for window in run.nelbo})


def scored(
    g: Group, passes: int, name: str, span: int = INFILL_SPAN, task: str = "infill"
) -> list[float]:
    """What `passes` of refinement scored on a task of parallel_eval, over seeds."""
    return numbers(run.decode.get((task, span, passes, REFINE), {}).get(name) for run in g.runs)


def whole(values: Sequence[float], of: Any = statistics.mean) -> str:
    return f"{of(values):,.0f}" if values else NONE


def cost_table(rows: Rows) -> str:
    """One line per row: steps, speed, memory, exact bits per byte, bounds, infill, size, and the
    published score.
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
                *(mean_cell(scored(g, n, "token_acc"), 3) for n in INFILL_PASSES),
                whole(of_runs(g, "size", "total_bytes"), max),
                sweep.published_cell(name),
            ]
        )
    return markdown([*head, "bytes", "published (phase)"], body, 1)


def recipes_block(runs: Iterable[RunLog]) -> str:
    """The text between the marks of recipes."""
    contexts, notes = by_context(runs)
    tables = [
        f"{context_name(key)}:\n\n{cost_table(rows)}{shared_note(rows)}"
        for key, rows in contexts.items()
    ]
    parts = tables or ["No finished run."]
    if contexts:
        parts.append(
            "Means over n seeds, ± standard deviation; bytes and peak MiB are the largest. Infill: "
            f"share of tokens of {INFILL_SPAN}-token spans equal to the text. Published: val_bpb "
            "on FineWeb, one H100 for 180 s unless "
            "said."
        )
    if notes:
        parts.append(
            "Not averaged, or to be read with care:\n\n" + "\n".join(f"- {note}" for note in notes)
        )
    return "\n\n".join(parts)


# ==============================================================================
# 3  RECORD -- the record settings beside the naive baseline
# ==============================================================================
STRONG = {"direct": "record", "ar": "ar_record"}  # older logs name the recipe without the strength
NAIVE = "ar"
RECORD_ROWS = (NAIVE, "record", "ar_record")
SPEED = ("COMPILE=", "MICRO_BATCHES=")  # the same computation, faster: a row of its own
BUDGET = ("ITERATIONS=", "MAX_WALLCLOCK_SECONDS=")  # another one: a table of its own
RECORD_WINDOW, RECORD_PASSES = 16, (1, 4)
ONE_PASS_WINDOW, TEMPERATURES = 8, (0.0, 0.8)  # with a sequential head
ONE_PASS = f"one pass over {ONE_PASS_WINDOW} tokens, exact, with a head"
LOSSLESS = f"lossless speedup, greedy / temperature {TEMPERATURES[1]}"


def strong_name(g: Group) -> str:
    """Name a group by its recipe; with all settings of STRENGTHS, as the recipe that has them."""
    fields = tg.Config.__dataclass_fields__
    strength = tg.STRENGTHS.get(g.key.preset, {})
    wanted = {name: v for name, v in strength.items() if not fields[name].metadata["free"]}
    held = g.runs[0].get("config", "values")
    strong = bool(wanted) and all(held.get(name) == v for name, v in wanted.items())
    return STRONG.get(g.key.recipe, g.key.recipe) if strong else g.key.recipe


def speed_name(g: Group, shared: Sequence[str] = ()) -> str:
    """Name a group by its recipe and the settings of speed that are its own."""
    by_hand = [c for c in g.key.changes if c not in shared and c.startswith(SPEED)]
    return ", ".join([strong_name(g), *by_hand])


def most_frequent_token(folder: Path, span: int) -> float | None:
    """Return the share of the most frequent token in spans, from the log of bench/infill.py with
    the most examples; None if there is none.
    """
    found = dict[int, float]()
    for path in sorted(folder.glob("*infill*.txt")):
        with contextlib.suppress(OSError):
            for _, line in split_lines(path):
                found |= infill_chance(line, span)
    return found[max(found)] if found else None


def infill_chance(line: bytes, span: int) -> dict[int, float]:
    """Read from a line of bench/infill.py the share of the most frequent token, by examples."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, IndexError):
        result = parse_object(line)
        rows = [row for artifact in result["artifacts"] for row in artifact["infill"]]
        shares = [row["most_frequent_token"] for row in rows if span in length_of(row)]
        return {int(result["examples"]): numbers(shares)[0]}
    return {}


def length_of(row: Mapping[str, Any]) -> list[Any]:
    return [row.get(name) for name in ("span", "hole")]  # an older log has the second


class Beside(NamedTuple):
    """What the record table shows beside run logs."""

    chance: float | None  # accuracy of the most frequent token in infill
    decodes: Sequence[Mapping[str, Any]]  # results of bench/decode.py
    passes: Sequence[Mapping[str, Any]]  # results of bench/passes.py


def record_table(rows: Rows, beside: Beside) -> str:
    """One line per recipe: size, exact bits per byte, ratio to naive `ar`, bound, decoding."""
    chance = "" if beside.chance is None else f" (chance {beside.chance:.3f})"
    head = ["recipe", "n", "parameters", "val_bpb", "ratio to naive `ar`"]
    head += [f"bound, window {RECORD_WINDOW}"]
    head += [ONE_PASS] * bool(beside.passes)
    head += [
        f"infill {INFILL_SPAN}, {n} pass{'es' if n > 1 else ''}{chance}" for n in RECORD_PASSES
    ]
    head += [LOSSLESS] * bool(beside.decodes)
    naive, body = point_of(next(iter(rows.values()))), []
    for label, g in rows.items():
        name = ", ".join(f"`{part}`" for part in label.split(", "))
        body.append(
            [
                f"naive {name}" if strong_name(g) == NAIVE else name,
                str(len(g.runs)),
                whole(of_runs(g, "model", "model_params"), max),
                mean_cell(g.values("final", "val_bpb")),
                f"{point_of(g) / naive:.3f}",
                mean_cell(bounds(g, RECORD_WINDOW)),
                *[one_pass_cell(g, beside.passes)] * bool(beside.passes),
                *(mean_cell(scored(g, n, "token_acc"), 3) for n in RECORD_PASSES),
                *[lossless_cell(g, beside.decodes)] * bool(beside.decodes),
                whole(of_runs(g, "size", "total_bytes"), max),
            ]
        )
    return markdown([*head, "bytes"], body, 1)


def of_group(g: Group, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the results whose file is named after a run of a group, as record.py names them."""
    names = tuple(f"{run.name}_" for run in g.runs)
    return [found for found in results if found["log"].startswith(names)]


def one_pass_cell(g: Group, passes: Sequence[Mapping[str, Any]]) -> str:
    """Exact bits per byte of windows decided in one pass, and the ratio to the causal score of the
    same rows.
    """
    pairs = [
        (row["chained_bpb"], found["causal_bpb"])
        for found in of_group(g, passes)
        for row in found["scores"]
        if (row["window"], row["passes"]) == (ONE_PASS_WINDOW, 1) and row["chained_bpb"] is not None
    ]
    if not pairs:
        return NONE
    ratio = statistics.mean(chained / causal for chained, causal in pairs)
    return f"{mean_cell([chained for chained, _ in pairs])} ({ratio:.3f} x causal)"


def lossless_cell(g: Group, decodes: Sequence[Mapping[str, Any]]) -> str:
    """Speedup of speculative decoding with a head at batch 1, by temperature."""
    speeds: dict[float, list[float]] = {}
    for found in of_group(g, decodes):
        for row in found["rows"]:
            if (row["mode"], row["batch"]) == ("speculative + head", 1):
                speeds.setdefault(found["temperature"], []).append(row["times_cached_ar"])
    means = [f"{statistics.mean(speeds[at]):.2f}" for at in TEMPERATURES if at in speeds]
    return " / ".join(means) or NONE


def point_of(g: Group) -> float:
    return statistics.mean(g.values("final", "val_bpb"))


def record_rows(groups: Sequence[Group], shared: Sequence[str]) -> Rows:
    """Choose of each recipe, and of each setting of speed by hand, the runs with the most seeds;
    the baseline, as its preset runs it, comes first.
    """
    rows: Rows = {}
    for g in groups:
        label = speed_name(g, shared)
        if label not in rows or len(g.runs) > len(rows[label].runs):
            rows[label] = g
    order = {name: (RECORD_ROWS.index(strong_name(g)), name.count(",")) for name, g in rows.items()}
    return {name: rows[name] for name in sorted(rows, key=order.__getitem__)}


def record_block(runs: Iterable[RunLog], beside: Beside) -> str:
    """The text between the marks of the record: a table for each data set and machine."""
    contexts: dict[Key, list[Group]] = {}
    for g in group_runs(runs)[0]:
        if strong_name(g) in RECORD_ROWS:
            budget = tuple(change for change in g.key.changes if change.startswith(BUDGET))
            contexts.setdefault(g.key._replace(recipe="", changes=budget), []).append(g)
    tables = []
    for key, groups in contexts.items():
        shared = shared_changes(groups)
        rows = record_rows(groups, shared)
        if strong_name(next(iter(rows.values()))) == NAIVE:
            about = context_name(key._replace(changes=tuple(shared)))
            tables.append(f"{about}:\n\n{record_table(rows, beside)}")
    return "\n\n".join(tables) or "No finished run of the naive baseline."


# ==============================================================================
# 4  RESULTS -- what submission.json and results.json say
# ==============================================================================


def measured(g: Group) -> dict[str, Any]:
    """Describe one group of runs for `measured_here`."""
    bpb, loss = g.values("final", "val_bpb"), g.values("final", "val_loss")
    return {
        "recipe": g.key.recipe,
        "hardware": g.key.machine,
        "ranks": g.key.ranks,
        "preset": g.key.preset,
        "changed_settings": list(g.key.changes),
        "n": len(g.runs),
        "seeds": g.seeds,
        "val_bpb_mean": rounded(statistics.mean(bpb)),
        "val_bpb_std": rounded(spread(bpb)),
        "val_loss_mean": rounded(statistics.mean(loss)),
        "val_loss_std": rounded(spread(loss)),
        "bytes_total": int(max(g.values("size", "total_bytes"))),
        "bytes_code": int(max(g.values("size", "code_bytes"))),
        "bytes_model": int(max(g.values("size", "model_bytes"))),
        "per_seed": seed_results(g),
        "parallel_eval": decode_means(g),
        "logs": [run.name for run in g.runs],
    }


def seed_results(g: Group) -> dict[str, dict[str, Any]]:
    named = zip(g.seeds, g.runs, strict=True)
    return {str(seed): seed_result(run) | {"log": run.name} for seed, run in named}


def decode_means(g: Group) -> list[dict[str, Any]] | None:
    """Average what parallel decoding scored over the seeds; None if it was not measured in every
    run.
    """
    found = []
    for key in (key for key in g.runs[0].decode if all(key in run.decode for run in g.runs)):
        about = dict(zip(("task", "span", "steps", "mode"), key, strict=True))
        row: dict[str, Any] = {name: about[name] for name in ("task", "span", "mode", "steps")}
        for name in ("token_acc", "exact_seq", "tok_per_sec"):
            values = numbers(run.decode[key].get(name) for run in g.runs)
            row[name] = rounded(statistics.mean(values)) if values else None
        found.append(row)
    return found or None


def read_benchmarks(folder: Path, bench: Bench) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the results of a benchmark, *NAME*.txt and *NAME*.json; return them, and what is wrong
    with the files that are left out.
    """
    found, damaged = list[dict[str, Any]](), list[str]()
    for path in sorted([*folder.glob(f"*{bench.name}*.txt"), *folder.glob(f"*{bench.name}*.json")]):
        try:
            found += read_benchmark(path, bench)
        except OSError as error:
            damaged.append(f"log {path}: it cannot be read ({error.strerror})")
        except ValueError as error:
            damaged.append(f"log {path}, {error}")
    return found, damaged


def read_benchmark(path: Path, bench: Bench) -> list[dict[str, Any]]:
    """Read the JSON lines of one file; ValueError: which line is no result, and why."""
    found = []
    for number, line in split_lines(path):
        try:
            if line.startswith(b"{"):
                found.append(bench.read(parse_object(line), path.name))
        except (ValueError, TypeError, KeyError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"line {number}: not a result of {bench.program} ({why})") from error
    return found


BENCHMARK_SETTINGS = (
    *("recipe", "artifact", "judge", "device", "threads", "python"),
    *("examples", "prefix", "target", "temperature", "repeats"),
)
BENCHMARK_VALUES = (
    *("tokens_per_forward", "tokens_per_second", "times_cached_ar", "identical", "judge_nats"),
)


def benchmark_value(name: str, value: Any) -> float | None:
    """Return a measured value, of several the mean; ValueError: it cannot be."""
    number = value["mean"] if isinstance(value, dict) else value
    if number is None:
        return None
    if not is_number(number) or number < 0 or (name == "identical" and number > 1):
        raise ValueError(f"{name} is {shown(number)}")
    return rounded(number)


def benchmark(line: dict[str, Any], log: str) -> dict[str, Any]:
    """Keep of a result of bench/decode.py what a reader compares; ValueError: it cannot be one."""
    about = {name: line[name] for name in BENCHMARK_SETTINGS} | {"seed": line.get("seed")}
    rows = []
    for row in line["rows"]:
        kept = {name: row[name] for name in ("mode", "passes", "batch")}
        kept |= {name: benchmark_value(name, row[name]) for name in BENCHMARK_VALUES}
        rows.append(kept)
    return {"log": log, "data": data_of(line), **about, "rows": rows}


def data_of(line: Mapping[str, Any]) -> str:
    """Name the folder of the text of a result; ValueError: it has none."""
    if not is_text(data := Path(line["data_path"]).name):
        raise ValueError(f"data_path is {shown(data)}")
    return data


PASSES_SETTINGS = ("recipe", "seed", "artifact", "head", "rows", "tokens", "order")
PASSES_VALUES = ("factorised_bpb", "chained_bpb", "alone_bpb")


def parallel_bpb(line: dict[str, Any], log: str) -> dict[str, Any]:
    """Keep of a result of bench/passes.py what a reader compares; ValueError: it cannot be one."""
    about = {name: line[name] for name in PASSES_SETTINGS}
    about["causal_bpb"] = benchmark_value("causal_bpb", line["causal_bpb"])
    scores = []
    for row in line["scores"]:
        values = {name: benchmark_value(name, row[name]) for name in PASSES_VALUES}
        scores.append({"window": row["window"], "passes": row["passes"], **values})
    return {"log": log, "data": data_of(line), **about, "scores": scores}


class Bench(NamedTuple):
    """A benchmark whose results are reported."""

    name: str  # in the names of its logs
    program: str
    read: Callable[[dict[str, Any], str], dict[str, Any]]  # a result, and its file


DECODE = Bench("decode", "bench/decode.py", benchmark)
PARALLEL_BPB = Bench("parallel_bpb", "bench/passes.py", parallel_bpb)
BENCHES = (DECODE, PARALLEL_BPB)


def is_ranked(key: Key) -> bool:
    """Are these runs what the challenge ranks? Any settings will do but those of the time."""
    same = key.recipe == RANKED_RECIPE and (key.ranks, key.preset) == (RANKED_RANKS, RANKED_PRESET)
    given = dict(change.partition("=")[::2] for change in key.changes)
    seconds = str(given.get("MAX_WALLCLOCK_SECONDS", RANKED_SECONDS))
    in_time = 0 < float(seconds) <= RANKED_SECONDS
    return same and in_time and key.data.startswith(RANKED_DATA)


def ranked_group(groups: Sequence[Group]) -> Group | None:
    """Choose the runs that the challenge ranks, all of one program, data and tokenizer: with the
    most seeds, then the best score.
    """
    candidates = [g for g in groups if is_ranked(g.key) and not identity_notes(g.runs)]
    best = [(-len(g.runs), statistics.mean(g.values("final", "val_bpb"))) for g in candidates]
    return candidates[best.index(min(best))] if best else None


def by_data(found: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]] | None:
    """Gather values by data set; None if there are none."""
    gathered: dict[str, list[dict[str, Any]]] = {}
    for data, value in found:
        gathered.setdefault(data, []).append(value)
    return gathered or None


def submission(groups: Sequence[Group]) -> dict[str, Any]:
    """Build submission.json: the challenge's fields from ranked runs, null without one."""
    ranked = ranked_group(groups)
    if ranked is None:
        return submission_entry(ABOUT, [])
    date = max(str(run.get("header", "time")) for run in ranked.runs)[:10]
    return submission_entry({**ABOUT, "date": date, "track": RANKED_TRACK}, ranked.runs)


def results(groups: Sequence[Group], benchmarks: Mapping[Bench, Benchmarks]) -> dict[str, Any]:
    """Build results.json: what our recipes scored and how fast they decode, by data."""
    ours = [g for g in groups if g.key.recipe in OUR_RECIPES]
    return {
        "measured_here": by_data((g.key.data, measured(g)) for g in ours),
        **{
            f"{bench.name}_benchmark_here": by_data((one["data"], one) for one in found)
            for bench, found in benchmarks.items()
        },
    }


# ==============================================================================
# 5  FILES -- compare or replace
# ==============================================================================


def page_of(args: argparse.Namespace, block: Block) -> Path:
    """Return the page that holds a block: --readme if it is given, else the one of PAGES."""
    return args.readme or ROOT / PAGES[block]


def read_page(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}); name it with --readme")
    except ValueError as error:
        fail(f"{path} is no UTF-8 text ({error}); save it as such, or name another by --readme")


def split(text: str, block: Block, path: Path) -> tuple[str, str, str]:
    """Cut a page into before, between and after the lines of a block; UserError: not there once
    each, in order.
    """
    begin, end = block
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        fail(f"{path} needs the lines {begin} and {end}, once each and in this order; add them")
    before, rest = text.split(begin)
    between, after = rest.split(end)
    return before, between, after


def block_differences(args: argparse.Namespace, block: Block, text: str) -> list[str]:
    """List how one block of its page disagrees with the logs."""
    path = page_of(args, block)
    try:
        held = split(read_page(path), block, path)[1]
    except tg.UserError as error:
        return [str(error)]
    ours, theirs = text.split("\n"), held.strip().split("\n")
    found = [f"{path}: logs give {line!r}" for line in ours if line not in theirs]
    found += [f"{path}: no log gives {line!r}" for line in theirs if line not in ours]
    if not found and ours != theirs:
        found.append(f"{path}: lines between {block.begin} and {block.end} stand in another order")
    return found


def file_differences(path: Path, expected: dict[str, Any]) -> list[str]:
    """List how a JSON file disagrees with the logs."""
    try:
        stored = parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        return [f"{path} cannot be read ({error})"]
    found = []
    for key in dict.fromkeys([*expected, *stored]):
        if key not in expected or key not in stored or expected[key] != stored[key]:
            theirs, ours = stored.get(key), expected.get(key)
            found.append(f"{path}: {as_cell(key)} is {theirs!r}, logs give {ours!r}")
    return found


def differences(
    args: argparse.Namespace, blocks: dict[Block, str], files: dict[Path, dict[str, Any]]
) -> list[str]:
    """List how the pages, submission.json and results.json disagree with the logs."""
    found = []
    for block, text in blocks.items():
        found += block_differences(args, block, text)
    for path, expected in files.items():
        found += file_differences(path, expected)
    return found


def write(
    args: argparse.Namespace, blocks: dict[Block, str], files: dict[Path, dict[str, Any]]
) -> None:
    pages = dict[Path, str]()
    for block, text in blocks.items():
        path = page_of(args, block)
        around = split(pages.get(path) or read_page(path), block, path)
        pages[path] = f"{around[0]}{block.begin}\n\n{text}\n\n{block.end}{around[2]}"
    for path, page in pages.items():
        tg.atomic_write(path, page.encode(), "report")
    for path, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        tg.atomic_write(path, f"{text}\n".encode(), "report")


def has_place(args: argparse.Namespace, block: Block) -> bool:
    """Tell whether a page has a line of a block; one that cannot be read has none."""
    path = page_of(args, block)
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    return any(line in text for line in block)


def more_tables(
    args: argparse.Namespace, ladder: Sequence[RunLog], record: Sequence[RunLog]
) -> dict[Block, str]:
    """Write the tables of the ladder and of the record; without logs of one, no page needs a place
    for its table.
    """
    blocks = dict[Block, str]()
    if ladder or has_place(args, RECIPES):
        blocks[RECIPES] = recipes_block(ladder)
    if record or has_place(args, RECORD):
        found = (read_benchmarks(args.record, bench)[0] for bench in BENCHES)
        beside = Beside(most_frequent_token(args.logs, INFILL_SPAN), *found)
        blocks[RECORD] = record_block(record, beside)
    return blocks


def tell(kind: str, lines: Iterable[str]) -> None:
    for line in lines:
        print(f"{kind}: {line}", file=sys.stderr)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables, and write or check the files; UserError: a file cannot be written."""
    ladder, record = (
        read_logs(folder) if folder.exists() else [] for folder in (args.ladder, args.record)
    )
    runs = [*read_logs(args.logs), *record]
    groups, notes = group_runs(runs)
    benchmarks, damaged = dict[Bench, Benchmarks](), list[str]()
    for bench in BENCHES:
        each = [read_benchmarks(folder, bench) for folder in (args.logs, args.record)]
        benchmarks[bench] = [one for found, _ in each for one in found]
        damaged += [line for _, lines in each for line in lines]
    for line in damaged:
        warn(f"{line}; it is left out: repair it, or move it away")
    damaged += warn_of_ladder()
    damaged += [log.complaint for log in (*runs, *ladder) if log.complaint]
    blocks = {RESULTS: results_block(groups, notes), **more_tables(args, ladder, record)}
    files = {args.submission: submission(groups), args.results: results(groups, benchmarks)}
    print("\n\n".join(blocks.values()))
    if args.write:
        write(args, blocks, files)
    found = differences(args, blocks, files) if args.check else []
    missing = missing_seeds(groups)
    tell("note", missing)
    for g in groups:
        tell("note", (f"{g.key.recipe}, {g.key.data}: {note}" for note in identity_notes(g.runs)))
    tell("differs", found)
    if found:
        advice = "run python scripts/study/report.py --write, and read what changed"
        print(advice, file=sys.stderr)
    if args.check:
        tell("error", damaged)
    counts = {"logs": len(runs), "averaged": sum(len(g.runs) for g in groups)}
    counts |= {"groups": len(groups), "ladder_logs": len(ladder)}
    lists = {"left_out": notes, "missing_seeds": missing, "differences": found, "damaged": damaged}
    return {**counts, **lists, "checked": args.check}


def status_of(result: Mapping[str, Any]) -> int:
    """Return 1 if --check found a file that disagrees with the logs, or damage."""
    return int(result["checked"] and bool(result["differences"] or result["damaged"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, 1 if --check found a disagreement or damage."""
    args = parse_args(argv)
    return run_command(lambda: run(args), status_of)


if __name__ == "__main__":
    sys.exit(main())
