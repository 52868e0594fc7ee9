"""to_tensorboard.py: event files hold the numbers of the logs, each once."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from scripts.study import runlog, to_tensorboard
from tests.conftest import ROOT, facts, outcome
from tests.study.test_report import events

pytestmark = pytest.mark.slow  # tensorboardX is not among the requirements of the fast tests

START = 1767225600.0  # of the header's 2026-01-01
CURVE = [
    {"event": "train", "step": 1, "train_ms": 500.0, "train_loss": 6.0, "tok_per_sec": 10.0},
    {"event": "train", "step": 2, "train_ms": 1000.0, "train_loss": None, "denoise_loss": 5.0},
    {"event": "val", "step": 2, "train_ms": 1250.0, "loss": 4.0, "bpb": 2.5},
]


def write(folder: Path, name: str, lines: list[dict[str, Any]], end: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")
    return path


def finished(**about: Any) -> list[dict[str, Any]]:
    """A run with a curve."""
    lines = events(**about)
    return [*lines[:4], *CURVE, *lines[5:]]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    write(tmp_path / "logs", "one", finished(seed=1))
    return tmp_path / "logs"


def records(folder: Path) -> list[Any]:
    """Read the records of a run's one event file; the format is that of TFRecord."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def checksum(data: bytes) -> int:
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    (path,) = folder.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        sums = struct.unpack_from("<I", data, at + 8) + struct.unpack_from(
            "<I", data, at + 12 + length
        )
        assert sums == (checksum(data[at : at + 8]), checksum(body))
        found.append(Event.FromString(body))
        at += 16 + length
    return found


def scalars(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """Value and wall time of each point, by tag and step."""
    found = dict[tuple[str, int], tuple[float, float]]()
    for event in records(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                key = value.tag, event.step
                assert key not in found
                found[key] = value.simple_value, event.wall_time
    return found


def texts(folder: Path) -> dict[str, str]:
    return {
        value.tag: value.tensor.string_val[0].decode()
        for event in records(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "tensor"
    }


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    return outcome(to_tensorboard.main, [str(part) for part in argv], capsys)


def test_event_files_hold_the_numbers_of_the_log(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    result = facts(call(capsys, "--logs", logs, "--out", out))
    found = scalars(out / "one")
    assert result == {"out": str(out), "points": {"one": len(found)}, "left_out": {}}
    single = {key: value for key, value in found.items() if key[0].startswith(("train", "val"))}
    assert single == {
        ("train/train_loss", 1): (6.0, START + 0.5),
        ("train/tok_per_sec", 1): (10.0, START + 0.5),
        ("train/denoise_loss", 2): (5.0, START + 1.0),
        ("val/val_bpb", 2): (2.5, START + 1.25),
        ("val/val_loss", 2): (4.0, START + 1.25),
    }
    assert found["final/val_bpb", 2][0] == 2.0
    assert found["bound_window_16/nelbo_bpb", 2][0] == 2.5
    assert found["bound_window_16/standard_error", 2][0] == pytest.approx(0.0123)
    run = runlog.read_log(logs / "one.jsonl")
    assert run.decode
    for (task, span, steps, mode), event in run.decode.items():
        value = found[f"{task}_{span}_{mode}/token_acc", steps][0]
        assert value == pytest.approx(event["token_acc"])
    first = records(out / "one")[0]
    assert (first.file_version, first.wall_time) == ("brain.Event:2", START)


def test_settings_and_machine_are_texts(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(logs, "begun", finished(seed=2)[:6])
    facts(call(capsys, "--logs", logs, "--out", tmp_path / "out"))
    found = {name: texts(tmp_path / "out" / name) for name in ("one", "begun")}
    assert sorted(found["one"]) == ["machine/text_summary", "settings/text_summary"]
    assert "| MATRIX_LR | 0.04 |" in found["one"]["settings/text_summary"]
    assert "| machine | Some Processor, 2 cores |" in found["one"]["machine/text_summary"]
    assert found["begun"]["unfinished/text_summary"] == "unfinished, last logged step 2"


def test_a_resumed_run_has_each_step_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = finished()
    later = [dict(line, train_ms=9000.0) for line in CURVE[1:]]
    again = [*lines[:4], {"event": "resume", "step": 1}, *later, *lines[7:]]
    write(tmp_path / "logs", "one", [*lines[:6], *again])
    facts(call(capsys, "--logs", tmp_path / "logs", "--out", tmp_path / "out"))
    found = scalars(tmp_path / "out" / "one")
    assert found["train/train_loss", 1] == (6.0, START + 0.5)
    assert found["train/denoise_loss", 2] == (5.0, START + 9.0)


def test_a_damaged_log_is_named_and_left_out(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(logs, "broken", finished()[:5], '{"event": "train", "st')
    write(logs, "undated", finished(time="yesterday"))
    called = call(capsys, "--logs", logs, "--out", tmp_path / "out")
    found = facts(called)
    assert list(found["points"]) == ["one"]
    assert found["left_out"]["broken"].startswith("line 6: cut off: not JSON")
    assert "no ISO 8601 date" in found["left_out"]["undated"]
    assert "broken.jsonl, line 6: cut off" in called[2]
    assert "undated.jsonl: the time in its header" in called[2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one"]


def test_faults_of_the_user_are_named(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    write(tmp_path / "bad", "broken", [], "{")
    facts(call(capsys, "--logs", logs, "--out", out))
    before = records(out / "one")
    for argv, message in (
        (("--logs", empty, "--out", out), "holds no *.jsonl; train first"),
        (("--logs", tmp_path / "no", "--out", out), "is not a folder; train first"),
        (("--logs", tmp_path / "bad", "--out", out), "every log in it is damaged"),
        (("--logs", logs, "--out", out), "holds events of one: TensorBoard would show each"),
        (("--logs", logs, "--out", logs / "one.jsonl"), "Not a directory"),
        (("--logs", logs), "required: --out"),
    ):
        status, printed, complaint = call(capsys, *argv)
        assert (status, printed) == (2, "")
        assert message in complaint
        assert "error: " in complaint
    assert records(out / "one") == before


def test_the_committed_logs_are_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(call(capsys, "--logs", ROOT / "logs", "--out", tmp_path / "out"))
    assert found["left_out"] == {}
    run = runlog.read_log(ROOT / "logs" / "demo.jsonl")
    curve = {(e["event"], e["step"]): e for e in run.curve}
    stored = scalars(tmp_path / "out" / "demo")
    assert len(stored) == found["points"]["demo"] > 100
    for (kind, step), event in curve.items():
        name = "train_loss" if kind == "train" else "val_bpb"
        assert stored[f"{kind}/{name}", step][0] == pytest.approx(event[name], rel=1e-6)
