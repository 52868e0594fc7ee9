"""Turn run logs into the results table, submission.json, and a check that both still say what was measured.

    python scripts/report.py            print the tables
    python scripts/report.py --write    also put them into README.md and submission.json
    python scripts/report.py --check    exit 1 if either disagrees with the logs

Runs that differ only in their seed are one row. A run counts once it has written its `done` event.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->", "<!-- /results -->"  # README.md: what stands between them is ours
NONE = "-"  # a cell nothing was measured for
REFINE, LEFT_TO_RIGHT = "refine", "ar_cached"  # decoding modes, as logged

# Scores by the names they have in the submission, whichever of the two a log uses.
SPELLINGS = {"final": {"bpb": "val_bpb", "loss": "val_loss"}, "nelbo": {"bpb": "nelbo_bpb"}}

# Settings that change no number of the table but speed, or that a column shows already: they make no row of their own.
# fmt: off
NEUTRAL = frozenset((
    "seed", "run_id", "out_dir", "resume", "checkpoint_seconds", "device", "recipe", "preset", "data_path",
    "tokenizer_path", "warmup_steps", "train_log_every", "val_loss_every", "val_batch_size", "nelbo_windows",
    "nelbo_samples", "nelbo_sequences", "parallel_eval_examples", "parallel_eval_span_len", "parallel_eval_steps",
    "eval_seed",
))
# fmt: on

# What the challenge ranks: the `direct` recipe on FineWeb on eight devices.
RANKED_RECIPE, RANKED_DATA, RANKED_RANKS, RANKED_PRESET = "direct", "fineweb", 8, "8xh100"


class ReportError(Exception):
    """A fault in logs or files that the user can repair; printed without a traceback."""


@dataclass
class RunLog:
    """The last start of one log file: its events, the last of each kind."""

    name: str
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    nelbo: dict[int, dict[str, Any]] = field(default_factory=dict)  # by window
    decode: dict[tuple[str, int, int, str], dict[str, Any]] = field(default_factory=dict)  # by task, span, steps, mode

    def add(self, event: dict[str, Any]) -> None:
        """Take in one line; a header begins the run anew, as after a crash and a restart."""
        kind = event["event"]
        event |= {ours: event[theirs] for theirs, ours in SPELLINGS.get(kind, {}).items() if theirs in event}
        if kind == "header":
            self.events, self.nelbo, self.decode = {}, {}, {}
        if kind == "nelbo":
            self.nelbo[event["window"]] = event
        elif kind == "parallel_eval":
            self.decode[event["task"], event["span"], event["steps"], event["mode"]] = event
        else:
            self.events[kind] = event

    def get(self, event: str, key: str) -> Any:
        """Return a value that a finished run must have.

        Raises:
            ReportError: the log lacks it.
        """
        try:
            return self.events[event][key]
        except KeyError:
            raise ReportError(
                f"log {self.name}: no {key} in a {event} event; another version wrote it: run it again or move it away"
            ) from None

    @property
    def why_left_out(self) -> str:
        """Why the run cannot be averaged; empty if it can."""
        if "done" not in self.events:
            reached = self.events.get("train", {}).get("step", 0)
            return self.events.get("error", {}).get("reason") or f"unfinished, last logged step {reached}"
        return "" if isinstance(self.get("final", "val_bpb"), (int, float)) else "its score is not a finite number"


class Key(NamedTuple):
    """What runs must share to be averaged."""

    recipe: str
    changes: tuple[str, ...]  # NAME=value of settings given by hand
    data: str
    machine: str
    preset: str
    ranks: int


class Group(NamedTuple):
    """Finished runs that differ in their seed alone, in the order of it."""

    key: Key
    runs: list[RunLog]

    def values(self, event: str, key: str) -> list[float]:
        return [float(run.get(event, key)) for run in self.runs]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=ROOT / "logs", help="folder of *.jsonl run logs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help=f"file with {BEGIN} and {END}")
    parser.add_argument("--submission", type=Path, default=ROOT / "submission.json")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="exit 1 if README.md or submission.json disagree")
    action.add_argument("--write", action="store_true", help="bring README.md and submission.json up to date")
    return parser.parse_args(argv)


# ==============================================================================
# 1  LOGS -- events in, groups of comparable runs out
# ==============================================================================


def read_log(path: Path) -> RunLog:
    """Read one log; a last line that was cut off is passed over, any other fault is named.

    Raises:
        ReportError: unreadable, or a line is not an event.
    """
    run = RunLog(path.stem)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"log {path} cannot be read ({error}); copy it again or move it away") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            run.add(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline: the run was stopped while writing it
                continue
            raise ReportError(
                f"log {path}, line {number}: not an event ({type(error).__name__}: {error}); copy it again or move it "
                "away"
            ) from error
    return run


def read_logs(folder: Path) -> list[RunLog]:
    if not folder.is_dir():
        raise ReportError(f"--logs={folder} is not a folder; train first, or name the folder of the logs")
    return [read_log(path) for path in sorted(folder.glob("*.jsonl"))]


def key_of(run: RunLog) -> Key:
    """Say which runs this one may be averaged with."""
    values, source, machine = run.get("config", "values"), run.get("config", "source"), run.get("header", "machine")
    changes = [f"{name.upper()}={values[name]}" for name in values if source.get(name) == "env" and name not in NEUTRAL]
    ranks = (run.events["header"] | run.events.get("kernels", {})).get("world_size", 1)
    return Key(values["recipe"], tuple(changes), Path(values["data_path"]).name, machine, values["preset"], ranks)


def group_runs(runs: Iterable[RunLog]) -> tuple[list[Group], list[str]]:
    """Gather finished runs into groups, and say for every other run why it is left out.

    Of several finished runs of one group and seed the latest counts, so that no seed weighs twice.
    """
    groups: dict[Key, dict[int, RunLog]] = {}
    notes = []
    for run in sorted(runs, key=lambda run: str(run.events.get("header", {}).get("time"))):
        if reason := run.why_left_out:
            notes.append(f"`{run.name}`: {reason}")
            continue
        seeds, seed = groups.setdefault(key_of(run), {}), run.get("config", "values")["seed"]
        if seed in seeds:
            notes.append(f"`{seeds[seed].name}`: repeated later by `{run.name}`")
        seeds[seed] = run
    gathered = [Group(key, [seeds[seed] for seed in sorted(seeds)]) for key, seeds in groups.items()]
    gathered.sort(key=lambda g: (g.key.data, g.key.machine, statistics.mean(g.values("final", "val_bpb")), g.key))
    return gathered, sorted(notes)


# ==============================================================================
# 2  TABLES -- Markdown for README.md
# ==============================================================================


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation, or None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_cell(values: Sequence[float], digits: int = 4) -> str:
    """Format as mean, with the standard deviation over seeds where there are several."""
    if not values:
        return NONE
    deviation = spread(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if deviation is None else f"{mean} ± {deviation:.{digits}f}"


def numbers(values: Iterable[Any]) -> list[float]:
    """Keep the values only if every run has one."""
    listed = list(values)
    return [float(value) for value in listed] if all(isinstance(value, (int, float)) for value in listed) else []


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int) -> str:
    """Lay out a table; the columns after the first `num_texts` are numbers, to the right."""
    rule = ["---" if i < num_texts else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def shared_changes(groups: Sequence[Group]) -> list[str]:
    """List the settings given by hand that every row has in common: they are said once, below the table."""
    return [change for change in groups[0].key.changes if all(change in g.key.changes for g in groups)]


def name_cells(key: Key, shared: Sequence[str]) -> list[str]:
    ranks = f", {key.ranks} ranks" if key.ranks > 1 else ""
    own = [change for change in key.changes if change not in shared]
    return [", ".join(f"`{name}`" for name in [key.recipe, *own]), key.data, f"{key.machine}{ranks}"]


def score_table(groups: Sequence[Group]) -> str:
    """One row a group: exact bits per byte, diffusion bounds by window, size, speed, memory."""
    shared = shared_changes(groups)
    windows = sorted({window for g in groups for run in g.runs for window in run.nelbo})
    head = ["recipe", "data", "machine", "n", "val_bpb", *(f"bound, window {w}" for w in windows)]
    rows = []
    for g in groups:
        bounds = [mean_cell(numbers(run.nelbo.get(w, {}).get("nelbo_bpb") for run in g.runs)) for w in windows]
        speed = numbers(run.events.get("train", {}).get("tok_per_sec") for run in g.runs)
        rows.append(
            [
                *name_cells(g.key, shared),
                str(len(g.runs)),
                mean_cell(g.values("final", "val_bpb")),
                *bounds,
                f"{max(g.values('size', 'total_bytes')):,.0f}",
                f"{statistics.mean(speed):,.0f}" if speed else NONE,
                f"{max(g.values('done', 'peak_memory_mib')):,.0f}",
            ]
        )
    return markdown([*head, "bytes", "train tok/s", "peak MiB"], rows, 3)


def decode_table(groups: Sequence[Group]) -> str:
    """One row a group, task and span; one column a number of passes: token accuracy and decoded tokens a second."""
    shared = shared_changes(groups)
    ways = sorted({(key[3], key[2]) for g in groups for run in g.runs for key in run.decode if key[3] != LEFT_TO_RIGHT})
    rows = []
    for g in groups:
        for task, span in sorted({key[:2] for run in g.runs for key in run.decode}, key=lambda t: (t[0], -t[1])):
            wanted = [(task, span, steps, mode) for mode, steps in ways] + [(task, span, span, LEFT_TO_RIGHT)]
            rows.append([*name_cells(g.key, shared), task, str(span), *(decode_cell(g, key) for key in wanted)])
    heads = [f"{n} pass{'es' if n > 1 else ''}{'' if mode == REFINE else f', {mode}'}" for mode, n in ways]
    return markdown(["recipe", "data", "machine", "task", "span", *heads, "left to right"], rows, 4)


def decode_cell(g: Group, key: tuple[str, int, int, str]) -> str:
    rows = [run.decode.get(key, {}) for run in g.runs]
    accuracy, speed = numbers(r.get("token_acc") for r in rows), numbers(r.get("tok_per_sec") for r in rows)
    return f"{mean_cell(accuracy, 3)} ({statistics.mean(speed):,.0f}/s)" if accuracy and speed else NONE


def bound_note(groups: Sequence[Group]) -> str:
    """State the Monte Carlo error that bounds carry besides the spread over seeds."""
    rows = [row for g in groups for run in g.runs for row in run.nelbo.values()]
    errors = [float(row["standard_error"]) for row in rows if row.get("standard_error")]
    if not errors:
        return ""
    return f" Largest Monte Carlo standard error of one run's bound: {max(errors):.4f}."


def version_notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    for g in groups:
        name = ", ".join(name_cells(g.key, shared_changes(groups)))
        versions = {run.get("header", "sha256") for run in g.runs}
        if len(versions) > 1:
            notes.append(f"{name}: averages {len(versions)} versions of train_gpt.py")
    return notes


def results_block(groups: Sequence[Group], notes: Sequence[str]) -> str:
    """The text that README.md carries between its markers."""
    if not groups:
        parts = ["No finished run."]
    else:
        parts = [
            score_table(groups),
            "val_bpb is exact, over the whole validation split. A bound is the diffusion upper bound in bits per byte "
            "over the rows that NELBO_SEQUENCES names; at window 1 it is their exact value. Mean ± standard deviation "
            f"over n seeds; bytes and peak MiB are the largest.{bound_note(groups)}",
        ]
        if shared := shared_changes(groups):
            parts.append(f"In all rows: {', '.join(f'`{change}`' for change in shared)}.")
        if any(run.decode for g in groups for run in g.runs):
            parts += [
                decode_table(groups),
                "Share of tokens equal to the text, and decoded tokens a second, by number of refinement passes over "
                "the span; left to right reads no text after the span.",
            ]
    left_out = [*notes, *version_notes(groups)]
    if left_out:
        parts.append("Not averaged, or to be read with care:\n\n" + "\n".join(f"- {note}" for note in left_out))
    return "\n\n".join(parts)


# ==============================================================================
# 3  SUBMISSION -- what submission.json says
# ==============================================================================


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def measured(g: Group) -> dict[str, Any]:
    """Describe one group of `direct` runs for `measured_here`."""
    bpb, loss = g.values("final", "val_bpb"), g.values("final", "val_loss")
    return {
        "hardware": g.key.machine,
        "ranks": g.key.ranks,
        "preset": g.key.preset,
        "changed_settings": list(g.key.changes),
        "n": len(g.runs),
        "seeds": [run.get("config", "values")["seed"] for run in g.runs],
        "val_bpb_mean": rounded(statistics.mean(bpb)),
        "val_bpb_std": rounded(spread(bpb)),
        "val_loss_mean": rounded(statistics.mean(loss)),
        "val_loss_std": rounded(spread(loss)),
        "bytes_total": int(max(g.values("size", "total_bytes"))),
        "logs": [run.name for run in g.runs],
    }


def is_ranked(key: Key) -> bool:
    """Are these runs what the challenge ranks?"""
    same = (key.recipe, key.ranks, key.preset) == (RANKED_RECIPE, RANKED_RANKS, RANKED_PRESET)
    return same and key.data.startswith(RANKED_DATA)


def submission(groups: Sequence[Group]) -> dict[str, Any]:
    """Build submission.json: the challenge's fields from ranked runs, null without one; everything else apart."""
    candidates = [g for g in groups if is_ranked(g.key)]  # the one nearest to the defaults, then the most seeds
    ranked = min(candidates, key=lambda g: (len(g.key.changes), -len(g.runs)), default=None)
    here: dict[str, list[dict[str, Any]]] = {}
    for g in groups:
        if g.key.recipe == RANKED_RECIPE:
            here.setdefault(g.key.data, []).append(measured(g))

    def of_ranked(value: Callable[[Group], Any]) -> Any:
        return None if ranked is None else value(ranked)

    def mean(key: str) -> Any:
        return of_ranked(lambda g: rounded(statistics.mean(g.values("final", key))))

    def largest(key: str) -> Any:
        return of_ranked(lambda g: int(max(g.values("size", key))))

    return {
        "name": "Text diffusion, exactly autoregressive",
        "author": "The text-diffusion-golf authors",
        "github_id": None,
        "blurb": "One set of weights that scores text exactly, left to right, and fills it in by diffusion.",
        "val_bpb": mean("val_bpb"),
        "val_loss": mean("val_loss"),
        "bytes_total": largest("total_bytes"),
        "bytes_code": largest("code_bytes"),
        "bytes_model": largest("model_bytes"),
        "hardware": of_ranked(lambda g: f"{g.key.ranks} x {g.key.machine}"),
        "seeds": of_ranked(lambda g: {str(r.get("config", "values")["seed"]): seed_result(r) for r in g.runs}),
        "measured_here": here or None,
    }


def seed_result(run: RunLog) -> dict[str, Any]:
    scores = {key: rounded(run.get("final", key)) for key in ("val_bpb", "val_loss")}
    return {**scores, "bytes_total": run.get("size", "total_bytes"), "log": run.name}


# ==============================================================================
# 4  FILES -- compare or replace
# ==============================================================================


def split_readme(path: Path) -> tuple[str, str, str]:
    """Cut README.md into before, between and after the markers.

    Raises:
        ReportError: unreadable, or the markers are not there once each, in order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}); name it with --readme") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{path} needs the lines {BEGIN} and {END}, once each and in this order; add them")
    before, rest = text.split(BEGIN)
    between, after = rest.split(END)
    return before, between, after


def differences(args: argparse.Namespace, block: str, entry: dict[str, Any]) -> list[str]:
    """List how README.md and submission.json disagree with the logs."""
    found = []
    try:
        _, held, _ = split_readme(args.readme)
        ours, theirs = block.split("\n"), held.strip().split("\n")
        found += [f"{args.readme}: logs give {line!r}" for line in ours if line not in theirs]
        found += [f"{args.readme}: no log gives {line!r}" for line in theirs if line not in ours]
        if not found and ours != theirs:
            found.append(f"{args.readme}: lines of the results stand in another order")
    except ReportError as error:
        found.append(str(error))
    try:
        stored = json.loads(args.submission.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [*found, f"{args.submission} cannot be read ({error})"]
    if not isinstance(stored, dict):
        return [*found, f"{args.submission} is not a JSON object"]
    for key in dict.fromkeys([*entry, *stored]):
        if key not in entry or key not in stored or entry[key] != stored[key]:
            found.append(f"{args.submission}: {key} is {stored.get(key)!r}, logs give {entry.get(key)!r}")
    return found


def replace_file(path: Path, text: str) -> None:
    """Write a file as a whole, or leave the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ReportError(f"{path} was not written ({error.strerror}); the old one is intact: free space") from error


def write(args: argparse.Namespace, block: str, entry: dict[str, Any]) -> None:
    before, _, after = split_readme(args.readme)
    replace_file(args.readme, f"{before}{BEGIN}\n\n{block}\n\n{END}{after}")
    replace_file(args.submission, json.dumps(entry, indent=2, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if --check found a disagreement, 2 after an error the user can repair."""
    args = parse_args(argv)
    try:
        runs = read_logs(args.logs)
        groups, notes = group_runs(runs)
        block, entry = results_block(groups, notes), submission(groups)
        print(block)
        if args.write:
            write(args, block, entry)
        found = differences(args, block, entry) if args.check else []
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in found:
        print(f"differs: {line}", file=sys.stderr)
    if found:
        print("run python scripts/report.py --write, and read what changed", file=sys.stderr)
    counts = {"logs": len(runs), "averaged": sum(len(g.runs) for g in groups), "groups": len(groups)}
    print(json.dumps({**counts, "left_out": list(notes), "differences": found}, ensure_ascii=False))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
