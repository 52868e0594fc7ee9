"""tests/campaigns: what they call a fault, and that processes stay within their limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.inputs import Inputs
from tests.campaigns.mutations import change_json, damage
from tests.campaigns.processes import Outcome
from tests.campaigns.table import read_table
from tests.campaigns.tries import Try, result
from tests.conftest import ROOT

NAMES = ["MATRIX_LR", "shard.bin"]
FINAL = {"event": "final", "name": "int8_zlib", "loss": 5.0, "bpb": 2.5}


def outcome(status: int = 0, err: str = "", out: str = "", ended: str = "") -> Outcome:
    return Outcome(status, 1.0, 100.0, out, err, ended)


@pytest.fixture
def a_try(tmp_path: Path) -> Try:
    return Try("settings", 1, 0, tmp_path, Inputs(tmp_path))


@pytest.mark.parametrize(
    "found",
    [
        outcome(),
        outcome(2, "error: MATRIX_LR=-1.0 must be in [0, 1000]\n"),
        outcome(2, "warning: x\nerror: data/shard.bin is truncated\n"),
        outcome(143, "error: ended by a signal\n", ended="slow"),
    ],
)
def test_right_ends_are_no_faults(a_try: Try, found: Outcome) -> None:
    a_try.judge(found, NAMES)
    assert a_try.faults == []


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (outcome(1, "Traceback (most recent call last):\nValueError: x\n"), "Traceback: ValueErr"),
        (outcome(0, "Exception ignored in: <x>\nBrokenPipeError: y\n"), "Exception ignored: Brok"),
        (outcome(1), "status 1"),
        (outcome(-11), "status -11"),
        (outcome(2, "usage: x\n"), "without an error line"),
        (outcome(2, "error: something is wrong\n"), "names none of MATRIX_LR, shard.bin"),
        (outcome(0, out="step:1/8 train_loss:nan train_time:1ms\n"), "train_loss:nan"),
        (outcome(0, out="val_loss None\n"), "val_loss None"),
        (outcome(-9, ended="time"), "over its time"),
        (outcome(-9, ended="memory"), "over its memory"),
        (outcome(-15, ended="slow"), "status -15 after SIGTERM"),
    ],
)
def test_wrong_ends_are_faults(a_try: Try, found: Outcome, fault: str) -> None:
    a_try.judge(found, NAMES)
    assert len(a_try.faults) == 1
    assert fault in a_try.faults[0]


def write_log(folder: Path, *events: dict[str, object]) -> None:
    path = folder / "out" / "logs" / "run.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(event)}\n" for event in events), "utf-8")


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([FINAL], ""),
        ([], "without a finite final score"),
        ([FINAL | {"bpb": 0.0}], "without a finite final score"),
        ([{"event": "train", "step": 1, "train_loss": None}, FINAL], "a number that is none"),
    ],
)
def test_a_run_without_finite_scores_is_a_fault(
    a_try: Try, events: list[dict[str, object]], fault: str
) -> None:
    write_log(a_try.folder, *events)
    a_try.judge_run(outcome(), NAMES)
    assert len(a_try.faults) == bool(fault)
    assert all(fault in found for found in a_try.faults)


def test_another_result_is_a_fault_and_other_times_are_none(a_try: Try, tmp_path: Path) -> None:
    step = {"event": "train", "step": 1, "train_loss": 3.0, "train_ms": 10.0}
    write_log(tmp_path, step, FINAL)
    expected = result(tmp_path)
    write_log(tmp_path, step | {"train_ms": 11.0}, FINAL)
    a_try.same(expected, "resumed")
    assert a_try.faults == []
    write_log(tmp_path, step | {"train_loss": 3.5}, FINAL)
    a_try.same(expected, "resumed")
    write_log(tmp_path, step, step | {"train_loss": 3.5}, FINAL)  # two values for one step
    a_try.same(expected, "resumed")
    assert [fault.split(" (")[0] for fault in a_try.faults] == ["resumed: another result"] * 2


def test_a_try_is_drawn_from_its_number_alone(tmp_path: Path) -> None:
    for number in range(50):
        draws = [Try("logs", 7, number, tmp_path, Inputs(tmp_path)).draw for _ in range(2)]
        assert damage(b"some bytes" * 9, draws[0]) == damage(b"some bytes" * 9, draws[1])
        changed = [change_json({"a": [1, {"b": 2}]}, draw) for draw in draws]
        assert repr(changed[0]) == repr(changed[1])


PROCESSES = """
import sys, time
from pathlib import Path
from tests.campaigns.processes import Limits, fork

def traceback():
    raise ValueError("x")

def wait():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        return 130

def grow():
    held = bytearray(400 << 20)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(60)

folder = Path(sys.argv[1])
bodies = {"0": lambda: 0, "3": lambda: sys.exit(3), "1": traceback, "time": wait, "slow": wait}
for name, body in (bodies | {"memory": grow}).items():
    limits = Limits(0.5 if body is wait else 50, 400, 0, name == "slow")
    found = fork(body, folder / name, {}, limits)
    assert (found.ended or str(found.status)) == name, (name, found)
    assert ("Traceback" in found.err) == (name == "1"), (name, found)
    assert found.mib > 10 and found.seconds < 40, (name, found)
print("as expected")
"""


@pytest.mark.slow
def test_processes_end_within_their_limits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESSES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "as expected\n"), done.stderr


def test_the_page_shows_the_figures_of_the_last_campaigns() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    figures = ROOT / "logs" / "campaigns.json"
    assert not figures.exists() or read_table(figures) in page
