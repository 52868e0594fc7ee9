"""A try: one command or a few on one input, all of it drawn from (campaign, seed, number)."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import train_gpt as tg
from tests.campaigns.inputs import Inputs
from tests.campaigns.processes import Limits, Outcome, Watch, fork

ENDED_BY_SIGNAL = (130, 143)
SCORES = ("train", "val", "final", "nelbo", "val_bpb_sliding", "parallel_eval")
BAD_NUMBER = re.compile(r"\b\w*(?:loss|bpb|bound|acc)\w*[:= ](?:nan|-?inf|None)\b", re.IGNORECASE)
TIMES = re.compile(r"_ms$|per_sec|seconds$|memory|^event$|^step$")


class Try:
    """What a campaign works with; it collects faults."""

    def __init__(self, campaign: str, seed: int, number: int, folder: Path, inputs: Inputs) -> None:
        self.campaign, self.seed = campaign, seed
        self.number, self.folder = number, folder
        self.inputs = inputs
        self.draw = random.Random(f"{campaign} {seed} {number}")
        self.faults = list[str]()
        self.notes = list[str]()
        self.seconds, self.mib = 0.0, 0.0
        self.statuses = Counter[str]()  # of all commands

    def note(self, what: str) -> None:
        """Say what this try changes, for the line of a fault."""
        self.notes.append(what)

    def fault(self, what: str) -> None:
        self.faults.append(" | ".join(what.splitlines()))

    def count(self, outcome: Outcome) -> Outcome:
        """Take a process into the worst figures."""
        self.seconds = max(self.seconds, outcome.seconds)
        self.mib = max(self.mib, outcome.mib)
        self.statuses[outcome.ended or str(outcome.status)] += 1
        return outcome

    def train(
        self,
        env: Mapping[str, str],
        limits: Limits = Limits(),  # noqa: B008
        watch: Watch | None = None,
    ) -> Outcome:
        """Run train_gpt.py in the try's folder."""
        return self.call(tg.main, env, limits, watch)

    def call(
        self,
        body: Callable[[], int | None],
        env: Mapping[str, str] | None = None,
        limits: Limits = Limits(),  # noqa: B008
        watch: Watch | None = None,
        stdin: bytes = b"",
    ) -> Outcome:
        """Run a script's `main` in the try's folder."""
        return self.count(fork(body, self.folder, env or {}, limits, watch, stdin))

    def judge(
        self, outcome: Outcome, names: Iterable[str], allowed: Sequence[int] = (0, 2)
    ) -> None:
        """Collect what no command may do, whatever it is given.

        Args:
            outcome: how the command ended.
            names: of settings and files; an error must hold one of them.
            allowed: statuses that are right here.
        """
        shown = list(wrong_output(outcome))
        for what in shown or wrong_end(outcome, list(names), allowed):
            self.fault(what)

    def judge_run(
        self, outcome: Outcome, names: Iterable[str], allowed: Sequence[int] = (0, 2)
    ) -> None:
        """The same for a run of train_gpt.py: its log holds no number that is none."""
        self.judge(outcome, names, allowed)
        events = list(read_events(self.folder))
        for event in events:
            if event["event"] in SCORES and None in event.values():
                self.fault(f"the log holds a number that is none: {json.dumps(event)[:300]}")
                break
        finals = [event for event in events if event["event"] == "final"]
        if outcome.status == 0 and not any(is_score(event) for event in finals):
            self.fault("status 0 without a finite final score")

    def same(self, expected: Mapping[str, Any], what: str, but: str = " ") -> None:
        """Compare the result of the try's run with the undamaged run's.

        But for what begins so: the artifact of a run on other data differs in their fingerprint.
        """
        found = {k: v for k, v in result(self.folder).items() if not k.startswith(but)}
        expected = {k: v for k, v in expected.items() if not k.startswith(but)}
        differ = [key for key in expected | found if expected.get(key) != found.get(key)]
        if differ:
            key = min(differ, key=lambda key: key.startswith(("artifact", "weights")))
            values = f"{expected.get(key)} undisturbed, {found.get(key)} here"
            self.fault(f"{what}: another result ({len(differ)} differ; {key}: {values})")


def is_score(event: Mapping[str, Any]) -> bool:
    values = [event.get("loss"), event.get("bpb")]
    return all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values)


def wrong_output(outcome: Outcome) -> Iterator[str]:
    """Faults that a command shows."""
    for mark in ("Traceback (most recent call last)", "Exception ignored"):
        if mark in outcome.err:
            yield f"{mark.split(' (')[0]}: {last_line(outcome.err)}"
            break
    if not outcome.status and (found := BAD_NUMBER.search(outcome.out)):
        yield f"printed {found.group()!r}"


def last_line(printed: str) -> str:
    """The last line that is not empty, shortened."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return (lines or ["nothing"])[-1][:300]


def wrong_end(outcome: Outcome, names: Sequence[str], allowed: Sequence[int]) -> Iterator[str]:
    """Faults of a status, of time and of memory."""
    if outcome.ended in ("time", "memory"):
        yield f"over its {outcome.ended}: {outcome.seconds:.1f} s, {outcome.mib:.0f} MiB"
    elif outcome.ended == "slow":
        if outcome.status not in (0, 2, *ENDED_BY_SIGNAL):
            yield f"status {outcome.status} after SIGTERM: {last_line(outcome.err)}"
    elif outcome.status not in allowed:
        yield f"status {outcome.status}: {last_line(outcome.err)}"
    elif outcome.status == 2:
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        if not errors:
            yield f"status 2 without an error line: {last_line(outcome.err)}"
        elif not any(name.lower() in line.lower() for line in errors for name in names):
            yield f"the error names none of {', '.join(names)}: {errors[0][:300]}"


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Events of all logs below a folder, the oldest log first; lines that were cut are left out."""
    logs = [path for path in folder.rglob("*.jsonl") if path.is_file()]
    for path in sorted(logs, key=lambda path: path.stat().st_mtime_ns):
        for line in path.read_text("utf-8", "replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


def result(folder: Path) -> dict[str, Any]:
    """What a run computed: losses by step, every score, and the artifact; no times."""
    found = dict[str, Any]()
    for event in read_events(folder):
        name, values = event["event"], [(k, v) for k, v in event.items() if not TIMES.search(k)]
        if name not in SCORES:
            continue
        place = [name, *(str(event[k]) for k in ("step", *LABELS) if k in event)]
        if found.setdefault(" ".join(place), values) != values:
            found[f"{' '.join(place)}, again"] = values
    for path in sorted(folder.rglob("*.ptz")):
        data = path.read_bytes()
        found[f"artifact {path.name}"] = hashlib.sha256(data).hexdigest()
        tensors = tg.unpack_tensors(tg.decompress(data))[1]
        parts = [w.numpy().tobytes() for w in tensors.values()]
        found[f"weights {path.name}"] = hashlib.sha256(b"".join(parts)).hexdigest()
    return found


LABELS = ("window", "task", "steps", "span", "mode")
