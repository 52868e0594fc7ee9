"""Run logs: events in, groups of comparable runs out, and how their numbers are written.

Shared by the scripts that read logs. Runs that differ only in their seed are one group. A run
counts once it has written its `done` event. A log that was damaged, mixes two runs or holds a score
that cannot be is left out and named; the others are not affected.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import train_gpt as tg
from scripts.common import NONE, fail, warn

SWEEP_RESULTS = "sweep.jsonl"  # what sweep.py writes beside its runs' logs: no log
REFINE, LEFT_TO_RIGHT = "refine", "ar_cached"  # decoding modes, as logged
MAX_LINE = 1 << 24  # bytes of a line; one event takes less than 100,000
MAX_WHOLE = 2**63 - 1

# Scores by the names they have in the submission, whichever of the two a log uses.
SPELLINGS = {
    "final": {"bpb": "val_bpb", "loss": "val_loss"},
    "val": {"bpb": "val_bpb", "loss": "val_loss"},
    "nelbo": {"bpb": "nelbo_bpb"},
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

# What tells that two runs were not of the same program, data or tokenizer: where it is logged.
IDENTITY = {
    "program": ("header", "sha256"),
    "data": ("data", "data_sha256"),
    "tokenizer": ("data", "tokenizer_sha256"),
}
UNKNOWN = "unknown"  # of a log of an older program

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


# ==============================================================================
# 1  EVENTS -- what a line of a log may hold
# ==============================================================================


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_WHOLE


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value)


def is_text(value: Any) -> bool:
    """Tell whether a value is one line that can stand in a cell of a Markdown table."""
    if not isinstance(value, str) or not value.isprintable():
        return False
    return "|" not in value and "<!--" not in value


def is_settings(value: Any) -> bool:
    """Tell whether a value maps names of settings to values, some of which all runs have."""
    kinds = {"recipe": str, "preset": str, "seed": int, "data_path": str}
    return (
        isinstance(value, dict)
        and all(is_number(v) or isinstance(v, (str, bool)) for v in value.values())
        and all(isinstance(value.get(name), kind) for name, kind in kinds.items())
        and is_whole(value["seed"])
    )


def is_sources(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


class Rule(NamedTuple):
    """What a value of an event must be."""

    text: str
    holds: Callable[[Any], bool]


TEXT = Rule("a line of text", is_text)
COUNT = Rule("a whole number of 0 or more", lambda v: is_whole(v) and v >= 0)
SIZE = Rule("a whole number of 1 or more", lambda v: is_whole(v) and v >= 1)
AMOUNT = Rule("a number from 0 to 1e15", lambda v: is_number(v) and 0 <= v <= 1e15)
SCORE = Rule("a number above 0 and below 1e9", lambda v: is_number(v) and 0 < v < 1e9)
SHARE = Rule("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
SETTINGS = Rule("the values of all settings", is_settings)

# By name, in whatever event they are. A score that is not finite is logged as null.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("machine", "sha256", "time", "task", "mode", "torch"), TEXT),
    **dict.fromkeys(("data_sha256", "tokenizer_sha256"), TEXT),
    **dict.fromkeys(("step", "steps"), COUNT),
    **dict.fromkeys(("window", "span", "world_size"), SIZE),
    **dict.fromkeys(("total_bytes", "code_bytes", "model_bytes"), SIZE),
    **dict.fromkeys(("val_bpb", "val_loss", "nelbo_bpb"), SCORE),
    **dict.fromkeys(("token_acc", "exact_seq"), SHARE),
    **dict.fromkeys(("tok_per_sec", "standard_error", "peak_memory_mib", "train_ms"), AMOUNT),
    **dict.fromkeys(("train_seconds", "evaluation_seconds"), AMOUNT),
    "train_loss": Rule("a number within 1e15", lambda v: is_number(v) and abs(v) <= 1e15),
    "values": SETTINGS,
    "source": Rule("the source of each setting", is_sources),
    **dict.fromkeys(("reason", "artifact"), Rule("text", lambda v: isinstance(v, str))),
}
# Without these an event says nothing.
NEEDED: dict[str, tuple[str, ...]] = {
    "header": ("machine", "sha256", "time"),
    "config": ("values", "source"),
    "train": ("step",),
    "val": ("step",),
    "resume": ("step",),
    "size": ("total_bytes", "code_bytes", "model_bytes"),
    "final": ("val_bpb", "val_loss"),
    "nelbo": ("window", "nelbo_bpb"),
    "parallel_eval": ("task", "span", "steps", "mode"),
}
KNOWN = {*NEEDED, "data", "kernels", "timing", "done", "error"}
NULLABLE = {  # not measured, or not finite
    *("val_bpb", "val_loss", "nelbo_bpb", "token_acc", "exact_seq", "tok_per_sec", "train_loss"),
    *("standard_error", "peak_memory_mib", "train_ms", "train_seconds", "evaluation_seconds"),
}
ONCE = ("header", "config", "data", "size", "final", "done")  # of one start
FINISHED = ("header", "config", "size", "final", "done")  # what a run has that counts


def shown(value: Any) -> str:
    """Write a value, shortened, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_event(event: Mapping[str, Any]) -> None:
    """Raise ValueError if an event lacks a value or has one that cannot be."""
    kind = event["event"]
    if kind not in KNOWN:
        return
    for name in NEEDED.get(kind, ()):
        if name not in event:
            raise ValueError(f"no {name} in a {kind} event; another version wrote it")
    for name in event.keys() & RULES.keys():
        value, rule = event[name], RULES[name]
        if not (rule.holds(value) or (value is None and name in NULLABLE)):
            raise ValueError(f"{name} of a {kind} event is {shown(value)}, not {rule.text}")


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; ValueError: a name stands in it twice, as where two lines were joined."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def parse_object(line: bytes) -> dict[str, Any]:
    """Read one line as a JSON object; ValueError: it is none, or no text."""
    try:
        text = line.decode("utf-8")
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a character is no text
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON from character {error.pos + 1} on: {error.msg}") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def parse_event(line: bytes) -> dict[str, Any]:
    """Read one line of a log, with scores by our names; ValueError: it is no event."""
    event = parse_object(line)
    if not isinstance(event.get("event"), str):
        raise ValueError("it does not say which event it is")
    spellings = SPELLINGS.get(event["event"], {})
    event |= {ours: event[theirs] for theirs, ours in spellings.items() if theirs in event}
    check_event(event)
    return event


# ==============================================================================
# 2  LOGS -- the last start of a run, or why its log is left out
# ==============================================================================


class MixedRunsError(ValueError):
    """Lines of two runs are in one log, so that no line can be credited to either."""


@functools.cache
def training_names() -> frozenset[str]:
    """Return the names of settings that training depends on: a resumed run has the same ones."""
    return frozenset(tg.Config().training_settings())


@dataclass
class RunLog:
    """The last start of one log file: its events, the last of each kind."""

    name: str
    path: Path = Path()
    damage: str = ""  # why the log is left out, if it is
    mixed: bool = False  # it holds lines of two runs
    notes: list[str] = field(default_factory=list)  # of damage before the last start
    tail: str = ""  # of a last line that was cut off after the run was done
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Every train and val event; resumed: those kept, too.
    curve: list[dict[str, Any]] = field(default_factory=list)
    nelbo: dict[int, dict[str, Any]] = field(default_factory=dict)  # by window
    # By task, span, steps, mode.
    decode: dict[tuple[str, int, int, str], dict[str, Any]] = field(default_factory=dict)
    # The curve of the start before this one, and the training settings of the run.
    before: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)  # of the program, one a start
    data_label: str = ""  # of its data, where a name alone would not tell them apart

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event; a header begins the run anew, as after a crash and a restart.

        Raises:
            ValueError: the header is lost, or it cannot be of the run that began this log.
        """
        kind = event["event"]
        if kind == "header":
            self.begin()
            self.hashes.append(event["sha256"])
        elif not self.events:
            raise ValueError("no header before it: the first lines are lost")
        self.check_order(event)
        if kind == "resume":
            self.curve = [point for point in self.before if point["step"] <= event["step"]]
        elif kind in ("train", "val"):
            self.curve.append(event)
        if kind == "nelbo":
            self.nelbo[event["window"]] = event
        elif kind == "parallel_eval":
            self.decode[event["task"], event["span"], event["steps"], event["mode"]] = event
        else:
            self.events[kind] = event

    def begin(self) -> None:
        """Forget the start before this one, except for what a resumed run keeps."""
        self.events = {}
        self.nelbo = {}
        self.decode = {}
        self.before, self.curve = self.curve, []

    def check_order(self, event: Mapping[str, Any]) -> None:
        """Raise MixedRunsError if an event cannot follow those before it in one run."""
        kind = event["event"]
        if kind in ONCE and kind in self.events:
            raise MixedRunsError(f"a second {kind} event in one start: lines of two runs")
        if kind == "config":
            self.check_settings(event["values"])
        if kind in ("train", "val"):
            last = self.events.get(kind, {}).get("step", -1)
            if event["step"] <= last or "done" in self.events:
                step = f"step {event['step']} of a {kind} event"
                raise MixedRunsError(f"{step} after step {last} or the end: lines of two runs")

    def check_settings(self, values: Mapping[str, Any]) -> None:
        """Raise MixedRunsError if a start has other training settings than the one before it."""
        ours = {name: value for name, value in values.items() if name in training_names()}
        for name in sorted(ours.keys() & self.training.keys()):
            if ours[name] != self.training[name]:
                both = f"{name.upper()}={shown(ours[name])} after {shown(self.training[name])}"
                raise MixedRunsError(f"{both}: lines of two runs")
        self.training = ours

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
        if name not in values:
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
                f"log {self.name}: {key} of its {event} event is {shown(value)}, not a number; run "
                "it again or move it away"
            )
        return float(value)

    def identity(self, name: str) -> str:
        """Return the SHA-256 of its program, data or tokenizer; UNKNOWN: an older program's log."""
        event, key = IDENTITY[name]
        return str(self.events.get(event, {}).get(key, UNKNOWN))

    @property
    def complaint(self) -> str:
        """What is wrong with the file, with the line; empty if nothing is."""
        why = self.damage or self.tail
        return f"log {self.path}{',' if why.startswith('line ') else ':'} {why}" if why else ""

    @property
    def why_left_out(self) -> str:
        """Why the run cannot be averaged; empty if it can."""
        if self.damage:
            return self.damage
        if "done" not in self.events:
            reached = self.events.get("train", {}).get("step", 0)
            reason = " ".join(self.events.get("error", {}).get("reason", "").split())
            return reason or f"unfinished, last logged step {reached}"
        if missing := [kind for kind in FINISHED if kind not in self.events]:
            return f"no {missing[0]} event: lines are lost, or another version wrote it"
        scores = (self.events["final"][name] for name in ("val_bpb", "val_loss"))
        return "" if all(map(is_number, scores)) else "its score is not a finite number"


def split_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, by number; those too long are cut.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if line.strip():
                yield number, line


def read_log(path: Path) -> RunLog:
    """Read one log. What is wrong with it is its `damage`, and then it holds no event.

    Damage in a start before the last one, or a line cut off after `done`, matters to no number: it
    is only noted.
    """
    run = RunLog(as_cell(path.stem), path)
    try:
        for number, line in split_lines(path):
            read_line(run, number, line)
        if not run.events and not run.damage:
            run.damage = "it is empty"
    except OSError as error:
        run.damage = f"it cannot be read ({error.strerror})"
    return RunLog(run.name, path, run.damage) if run.damage else run


def read_line(run: RunLog, number: int, line: bytes) -> None:
    """Take in one line of a log, or note what is wrong with it."""
    starts, cut = len(run.hashes), not line.endswith(b"\n")
    try:
        run.add(parse_event(line))
    except ValueError as error:
        run.mixed = run.mixed or isinstance(error, MixedRunsError)
        why = f"line {number}: {'cut off: ' * cut}{error}"
        if cut and "done" in run.events and not (run.mixed or run.damage):
            run.tail = why
        else:
            run.damage = run.damage or why
    if len(run.hashes) > starts and run.damage and not run.mixed:
        run.notes.append(run.damage)
        run.damage = ""


def read_whole_log(path: Path) -> RunLog:
    """Read one log; UserError: it is damaged."""
    run = read_log(path)
    if run.damage:
        fail(f"{run.complaint}; copy it again, or train this run again")
    return run


def read_logs(folder: Path) -> list[RunLog]:
    """Read all logs of a folder, and name on standard error those that are damaged."""
    if not folder.is_dir():
        fail(f"--logs={folder} is not a folder; train first, or name the folder of the logs")
    paths = [path for path in sorted(folder.glob("*.jsonl")) if path.name != SWEEP_RESULTS]
    runs = [read_log(path) for path in paths]
    for run in runs:
        if run.damage:
            warn(f"{run.complaint}; it is left out: copy it again, or move it away")
        for note in run.notes:
            warn(f"log {run.path}, {note}; the run was started again after it, and counts")
        if run.tail:
            warn(f"{run.complaint}; the run was done before it, and counts")
    label_data(runs)
    return runs


def label_data(runs: Iterable[RunLog]) -> None:
    """Tell data of one name apart where logs say that they differ, so that none are compared."""
    named: dict[str, list[RunLog]] = {}
    for run in runs:
        if "config" in run.events:
            named.setdefault(data_name(run), []).append(run)
    for name, of_name in named.items():
        texts = [(run.identity("data"), run.identity("tokenizer")) for run in of_name]
        known = [set(column) - {UNKNOWN} for column in zip(*texts, strict=True)]
        if max(map(len, known)) > 1:
            for run, text in zip(of_name, texts, strict=True):
                run.data_label = f"{name} (data {text[0][:8]}, tokenizer {text[1][:8]})"


# ==============================================================================
# 3  GROUPS -- runs that may be averaged, and what all runs of a table share
# ==============================================================================


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


def as_cell(value: Any) -> str:
    """Write any value as one line for a cell of a table; other values give other lines."""

    def escaped(c: str) -> str:
        plain = c.isprintable() and c not in "|\\"
        return c if plain else "\\|" if c == "|" else c.encode("unicode_escape").decode()

    return "".join(map(escaped, str(value)))


def data_name(run: RunLog) -> str:
    return as_cell(Path(run.setting("data_path")).name)


def key_of(run: RunLog) -> Key:
    """Say which runs this one may be averaged with."""
    values = run.get("config", "values")
    source = run.get("config", "source")
    machine = run.get("header", "machine")
    changes = [
        f"{name.upper()}={as_cell(values[name])}"
        for name in values
        if source.get(name) == "env" and name not in NEUTRAL
    ]
    recipe, preset = as_cell(run.setting("recipe")), run.setting("preset")
    data = run.data_label or data_name(run)
    return Key(recipe, tuple(changes), data, machine, preset, num_ranks(run))


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
            other = seeds[seed]
            same = other.events["header"] == run.events["header"]
            how = "the same run as" if same else "repeated later by"
            notes.append(f"`{other.name}`: {how} `{run.name}`")
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


def mixed_identity(runs: Sequence[RunLog], what: str) -> dict[str, list[str]]:
    """Return the runs of each program, data or tokenizer; nothing if it is one."""
    held: dict[str, list[str]] = {}
    for run in runs:
        held.setdefault(run.identity(what)[:8], []).append(run.name)
    return held if len(held) > 1 else {}


def identity_notes(runs: Sequence[RunLog]) -> list[str]:
    """Say which runs are of which program, data and tokenizer, where these differ."""
    notes = []
    for what in IDENTITY:
        if held := mixed_identity(runs, what):
            of = "; ".join(f"{digest}: {', '.join(names)}" for digest, names in held.items())
            notes.append(f"the runs differ in {what} (SHA-256 {of})")
    return notes


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
# 4  SUBMISSION -- the challenge's submission.json
# ==============================================================================


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def num_ranks(run: RunLog) -> int:
    found = run.events.get("header", {}) | run.events.get("kernels", {})  # of older programs
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
