"""Replay run logs into event files of TensorBoard.

    python scripts/study/to_tensorboard.py --logs logs --out out/tensorboard
    tensorboard --logdir out/tensorboard

Each log becomes a run: losses, scores and speeds by step, bounds by window size, decoding accuracy
and speed by number of passes, and the settings as text. A damaged log is named and left out. Wall
time is the run's start plus its training time. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from scripts.study.runlog import RunLog

from scripts.common import Parser, fail, markdown, need, run_command, warn

CURVES = {  # what of an event is drawn
    "train": ("train_loss", "denoise_loss", "tok_per_sec", "step_ms"),
    "val": ("val_bpb", "val_loss"),
}
DECODED = ("token_acc", "exact_seq", "tok_per_sec")
FILE_VERSION = "brain.Event:2"  # of event files


class Point(NamedTuple):
    """One number of a run."""

    tag: str
    step: int  # optimizer steps; of decoding: passes
    value: float
    seconds: float  # since the run began


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--logs", type=Path, metavar="FOLDER", default=Path("logs"), help="default: logs")
    out = "folder to write to, one folder in it for each run"
    add("--out", type=Path, metavar="FOLDER", required=True, help=out)
    return parser.parse_args(argv)


def points(run: RunLog) -> Iterator[Point]:
    """Yield the numbers of a run; what is null or missing in its log is left out."""
    last, seconds = 0, 0.0
    for event in run.curve:
        kind, last = event["event"], event["step"]
        seconds = (event.get("train_ms") or 0.0) / 1000
        for name in CURVES[kind]:
            yield from point(f"{kind}/{name}", last, event.get(name), seconds)
    for name in CURVES["val"]:
        yield from point(f"final/{name}", last, run.events.get("final", {}).get(name), seconds)
    for window, event in sorted(run.nelbo.items()):
        for name in ("nelbo_bpb", "standard_error"):
            tag = f"bound_window_{window}/{name}"
            yield from point(tag, last, event.get(name), seconds)
    for (task, span, steps, mode), event in run.decode.items():
        for name in DECODED:
            tag = f"{task}_{span}_{mode}/{name}"
            yield from point(tag, steps, event.get(name), seconds)


def point(tag: str, step: int, value: Any, seconds: float) -> Iterator[Point]:
    """Yield a point if there is a number."""
    from scripts.study.runlog import is_number

    if is_number(value):
        yield Point(tag, step, float(value), seconds)


def texts(run: RunLog) -> Iterator[tuple[str, str]]:
    """Yield names of texts and the texts, in Markdown: settings, machine, and why a run ended."""
    values = run.events.get("config", {}).get("values", {})
    if values:
        rows = [(name.upper(), str(value)) for name, value in values.items()]
        yield "settings", markdown(("setting", "value"), rows, 2)
    facts = [(k, str(v)) for k, v in run.events["header"].items() if k != "event"]
    yield "machine", markdown(("fact", "value"), facts, 2)
    if run.why_left_out:
        yield "unfinished", run.why_left_out


def began(run: RunLog) -> float:
    """Return when a run began, in seconds since 1970; ValueError: its log does not say."""
    found = datetime.datetime.fromisoformat(run.events["header"]["time"])
    return found.replace(tzinfo=found.tzinfo or datetime.UTC).timestamp()


def write_run(run: RunLog, start: float, folder: Path) -> int:
    """Write the event file of a run; return how many points it holds."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import scalar, text

    folder.mkdir(parents=True, exist_ok=True)
    # Not SummaryWriter: its thread would lose the error of a full disk, and wait forever.
    writer, found = RecordWriter(str(folder / f"events.out.tfevents.{start:.0f}")), [*points(run)]
    try:
        writer.write(Event(wall_time=start, file_version=FILE_VERSION).SerializeToString())
        for name, content in texts(run):
            summary = text(name, content)
            writer.write(Event(wall_time=start, step=0, summary=summary).SerializeToString())
        for tag, step, value, seconds in found:
            event = Event(wall_time=start + seconds, step=step, summary=scalar(tag, value))
            writer.write(event.SerializeToString())
    finally:
        writer.close()
    return len(found)


def run(args: argparse.Namespace) -> Mapping[str, Any]:
    """Write every readable log; UserError: there is none, or a run has event files already."""
    need("tensorboardX", "to_tensorboard.py", "requirements-eval.txt")
    from scripts.study.runlog import read_logs

    runs = read_logs(args.logs)
    if not runs:
        fail(f"--logs={args.logs} holds no *.jsonl; train first, or name the folder of the logs")
    written, left_out = dict[str, int](), {run.name: run.damage for run in runs if run.damage}
    if len(left_out) == len(runs):
        fail(f"--logs={args.logs}: every log in it is damaged; copy them again")
    for each in runs:
        if any((args.out / each.name).glob("events.out.tfevents.*")):
            both = "TensorBoard would show each point twice"
            fail(f"--out={args.out} holds events of {each.name}: {both}; name another folder")
    for each in runs:
        if each.damage:
            continue
        try:
            start = began(each)
        except ValueError as error:
            left_out[each.name] = f"the time in its header is no ISO 8601 date ({error})"
            warn(f"log {each.path}: {left_out[each.name]}; it is left out")
            continue
        written[each.name] = write_run(each, start, args.out / each.name)
    return {"out": str(args.out), "points": written, "left_out": left_out}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args), resume="remove the folder of --out and rerun the command")


if __name__ == "__main__":
    sys.exit(main())
