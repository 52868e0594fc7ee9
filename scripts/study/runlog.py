"""Run logs: events in, groups of comparable runs out, and how their numbers are written.

Shared by the scripts that read logs. Runs that differ only in their seed are one group. A run
counts once it has written its `done` event.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common import NONE, fail

SWEEP_RESULTS = "sweep.jsonl"  # what sweep.py writes beside its runs' logs: no log
REFINE, LEFT_TO_RIGHT = "refine", "ar_cached"  # decoding modes, as logged

# Scores by the names they have in the submission, whichever of the two a log uses.
SPELLINGS = {
    "final": {"bpb": "val_bpb", "loss": "val_loss"},
    "val": {"bpb": "val_bpb", "loss": "val_loss"},
    "nelbo": {"bpb": "nelbo_bpb"},
}

# What is counted in an event, so that rows can be laid out by it.
COUNTS = {
    "nelbo": ("window",),
    "parallel_eval": ("span", "steps"),
    "train": ("step",),
    "val": ("step",),
}

# Settings that change no number of the table but speed, or that a column shows already: they make
# no row of their own.
# fmt: off
NEUTRAL = frozenset((
    "seed", "run_id", "out_dir", "resume", "checkpoint_seconds", "device", "recipe", "preset",
    "data_path", "tokenizer_path", "warmup_steps", "train_log_every", "val_loss_every",
    "val_batch_size", "nelbo_windows", "nelbo_samples", "nelbo_sequences",
    "parallel_eval_examples", "parallel_eval_span_len", "parallel_eval_steps", "eval_seed",
    "eval_stride",
))
# fmt: on

# The fields of the challenge's submission.json, and no other ones.
# fmt: off
SUBMISSION_FIELDS = (
    "author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "val_bpb_std",
    "seeds", "seed_results", "bytes_total", "bytes_code", "hardware", "pytorch_version",
)
# fmt: on
ABOUT: dict[str, Any] = {
    "author": "The text-diffusion-golf authors",
    "github_id": None,
    "name": "Text diffusion, exactly autoregressive",
    "blurb": "One set of weights that scores text exactly, left to right, and fills it in by "
    "diffusion.",
}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class RunLog:
    """The last start of one log file: its events, the last of each kind."""

    name: str
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Every train and val event; resumed: those kept, too.
    curve: list[dict[str, Any]] = field(default_factory=list)
    nelbo: dict[int, dict[str, Any]] = field(default_factory=dict)  # by window
    # By task, span, steps, mode.
    decode: dict[tuple[str, int, int, str], dict[str, Any]] = field(default_factory=dict)
    # The curve of the start before this one.
    before: list[dict[str, Any]] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> None:
        """Take in one line; a header begins the run anew, as after a crash and a restart."""
        kind = event["event"]
        event |= {
            ours: event[theirs]
            for theirs, ours in SPELLINGS.get(kind, {}).items()
            if theirs in event
        }
        for name in COUNTS.get(kind, ()):
            if not isinstance(event[name], int):
                raise ValueError(f"{name} of a {kind} event is {event[name]!r}, not a whole number")
        if kind == "header":
            self.events = {}
            self.nelbo = {}
            self.decode = {}
            self.before, self.curve = self.curve, []
        elif kind == "resume":
            self.curve = [point for point in self.before if point["step"] <= event["step"]]
        elif kind in ("train", "val"):
            self.curve.append(event)
        if kind == "nelbo":
            self.nelbo[event["window"]] = event
        elif kind == "parallel_eval":
            self.decode[event["task"], event["span"], event["steps"], event["mode"]] = event
        else:
            self.events[kind] = event

    def get(self, event: str, key: str) -> Any:
        """Return a value that a finished run must have.

        Raises:
            UserError: the log lacks it.
        """
        try:
            return self.events[event][key]
        except KeyError:
            fail(
                f"log {self.name}: no {key} in a {event} event; another version wrote it: "
                "run it again or move it away"
            )

    def setting(self, name: str) -> Any:
        """Return a setting that every run must have; UserError: the log lacks it."""
        values = self.get("config", "values")
        if not isinstance(values, dict) or name not in values:
            fail(
                f"log {self.name}: no {name} among the values of its config event; "
                "another version wrote it: run it again or move it away"
            )
        return values[name]

    def number(self, event: str, key: str) -> float:
        """Return a number that a finished run must have; UserError: the log lacks it."""
        value = self.get(event, key)
        if not is_number(value):
            fail(
                f"log {self.name}: {key} of its {event} event is {value!r}, not a number; run it "
                "again or move it away"
            )
        return float(value)

    @property
    def why_left_out(self) -> str:
        """Why the run cannot be averaged; empty if it can."""
        if "done" not in self.events:
            reached = self.events.get("train", {}).get("step", 0)
            return (
                self.events.get("error", {}).get("reason")
                or f"unfinished, last logged step {reached}"
            )
        return "" if is_number(self.get("final", "val_bpb")) else "its score is not a finite number"


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
        return [run.number(event, key) for run in self.runs]

    @property
    def seeds(self) -> list[int]:
        return [run.setting("seed") for run in self.runs]


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"log {path} cannot be read ({error}); copy it again or move it away")


def read_log(path: Path) -> RunLog:
    """Read one log; a last line that was cut off is passed over, any other fault is named.

    Raises:
        UserError: unreadable, or a line is not an event.
    """
    run, lines = RunLog(path.stem), read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            run.add(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline: the run was stopped while writing it
                continue
            fail(
                f"log {path}, line {number}: not an event ({type(error).__name__}: {error}); "
                "copy it again or move it away"
            )
    return run


def read_logs(folder: Path) -> list[RunLog]:
    if not folder.is_dir():
        fail(f"--logs={folder} is not a folder; train first, or name the folder of the logs")
    return [read_log(path) for path in sorted(folder.glob("*.jsonl")) if path.name != SWEEP_RESULTS]


def key_of(run: RunLog) -> Key:
    """Say which runs this one may be averaged with."""
    values = run.get("config", "values")
    source = run.get("config", "source")
    machine = run.get("header", "machine")
    data = Path(run.setting("data_path")).name
    changes = [
        f"{name.upper()}={values[name]}"
        for name in values
        if source.get(name) == "env" and name not in NEUTRAL
    ]
    ranks = (run.events["header"] | run.events.get("kernels", {})).get("world_size", 1)
    recipe, preset = run.setting("recipe"), run.setting("preset")
    return Key(recipe, tuple(changes), data, machine, preset, ranks)


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
        seeds, seed = groups.setdefault(key_of(run), {}), run.setting("seed")
        if seed in seeds:
            notes.append(f"`{seeds[seed].name}`: repeated later by `{run.name}`")
        seeds[seed] = run
    gathered = [
        Group(key, [seeds[seed] for seed in sorted(seeds)]) for key, seeds in groups.items()
    ]
    gathered.sort(
        key=lambda g: (
            g.key.data,
            g.key.machine,
            statistics.mean(g.values("final", "val_bpb")),
            g.key,
        )
    )
    return gathered, sorted(notes)


def missing_seeds(groups: Sequence[Group]) -> list[str]:
    """Say which groups lack a seed that another recipe has on equal data, machine and settings."""
    seeds: dict[Key, set[int]] = {}
    for g in groups:
        seeds.setdefault(g.key._replace(recipe=""), set()).update(g.seeds)
    lacking: dict[tuple[Key, tuple[int, ...]], list[str]] = {}
    for g in groups:
        there = g.key._replace(recipe="")
        if lost := tuple(sorted(seeds[there].difference(g.seeds))):
            lacking.setdefault((there, lost), []).append(f"`{g.key.recipe}`")
    found = []
    for key, names in lacking.items():
        there, lost = key
        where = ", ".join([there.data, *(f"`{change}`" for change in there.changes)])
        named = f"seed{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
        verb = "has" if len(names) == 1 else "have"
        found.append(
            f"{where}: {', '.join(names)} {verb} no finished run of {named}, which other recipes "
            "there have"
        )
    return found


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
    return [float(value) for value in listed] if all(is_number(value) for value in listed) else []


# ==============================================================================
# SUBMISSION -- the challenge's submission.json
# ==============================================================================


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def num_ranks(run: RunLog) -> int:
    found = run.events.get("header", {}) | run.events.get("kernels", {})
    return int(found.get("world_size", 1))


def hardware(run: RunLog) -> str:
    return f"{num_ranks(run)} x {run.get('header', 'machine')}"


def seed_result(run: RunLog) -> dict[str, Any]:
    """Summarise one finished run; null for what an older program did not log."""
    done = run.events.get("done", {})
    return {
        "val_loss": rounded(run.number("final", "val_loss")),
        "val_bpb": rounded(run.number("final", "val_bpb")),
        "artifact_bytes": int(run.number("size", "total_bytes")),  # code and model
        "steps": done.get("steps"),
        "train_seconds": rounded(done.get("train_seconds")),
        "eval_seconds": rounded(run.events.get("timing", {}).get("evaluation_seconds")),
    }


def submission_entry(about: Mapping[str, Any], runs: Sequence[RunLog]) -> dict[str, Any]:
    """Build submission.json from finished runs that differ only in their seed; null without one.

    Args:
        about: what no log knows, a subset of author, github_id, name, blurb, date and track.
        runs: in the order in which the seeds are listed.
    """
    entry = dict.fromkeys(SUBMISSION_FIELDS) | dict(about)
    if not runs:
        return entry
    results = {str(run.setting("seed")): seed_result(run) for run in runs}
    bpb = [run.number("final", "val_bpb") for run in runs]
    return entry | {
        "val_loss": rounded(statistics.mean(run.number("final", "val_loss") for run in runs)),
        "val_bpb": rounded(statistics.mean(bpb)),
        "val_bpb_std": rounded(spread(bpb)),
        "seeds": [run.setting("seed") for run in runs],
        "seed_results": results,
        "bytes_total": max(result["artifact_bytes"] for result in results.values()),
        "bytes_code": max(int(run.number("size", "code_bytes")) for run in runs),
        "hardware": hardware(runs[0]),
        "pytorch_version": runs[0].events.get("header", {}).get("torch"),
    }
