"""Logs and the ladder file, damaged at random: no traceback, and no other run's numbers change.

    pytest tests/study/test_damaged_logs.py

Mutations are those that a full disk, a crash, a bad copy or a stray edit make; all are seeded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts.study import compare, plot, report, runlog, sweep
from scripts.study.runlog import RunLog
from tests.conftest import ROOT

RUNS = ROOT / "logs" / "record_cpu" / "logs"
REAL, OTHER = (next(RUNS.glob(f"direct_{seed}_*.jsonl")) for seed in (1337, 42))
SPECIAL: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**70,
    1e300,
    5e-324,
    "",
    "NaN",
    "x|y\n",
    [],
    {},
    [[1]],
    {"a": []},
)
RAW = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[" * 5000,
    b'"\\ud800"',
    b"9" * 5000,
    b"\xff",
    b"\x00" * 99,
)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change bytes as a disk or a bad copy does."""
    at, length = draw.randrange(len(data)), draw.randrange(1, 200)
    end = at + length
    junk = draw.choice(
        (b"", bytes(length), draw.randbytes(length), b"\n" * length, data[at:end] * 2)
    )
    return draw.choice((data[:at], data[:at] + junk + data[end:], data[:at] + data[end:]))


def mutate_lines(data: bytes, draw: random.Random) -> bytes:
    """Drop, repeat, swap, join or cut lines, or take some of another run's."""
    lines, theirs = data.splitlines(keepends=True), OTHER.read_bytes().splitlines(keepends=True)
    at, to = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(("drop", "repeat", "swap", "join", "cut", "insert", "interleave"))
    if kind == "drop":
        del lines[at]
    elif kind == "repeat":
        lines.insert(to, lines[at])
    elif kind == "swap":
        lines[at], lines[to] = lines[to], lines[at]
    elif kind == "join":
        lines[at] = lines[at].rstrip(b"\n")
    elif kind == "cut":
        lines[at] = lines[at][: draw.randrange(len(lines[at]))] + draw.choice((b"", b"\n"))
    elif kind == "insert":
        lines[at:at] = theirs[draw.randrange(len(theirs)) :][: draw.randrange(1, 9)]
    else:
        lines = [line for pair in zip(lines, theirs, strict=False) for line in pair]
    return b"".join(lines)


def mutate_values(data: bytes, draw: random.Random) -> bytes:
    """Give one value of one event another value, or text that is none, or take it away."""
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    event = json.loads(lines[at])
    holder = draw.choice([event, *(value for value in event.values() if isinstance(value, dict))])
    key = draw.choice(list(holder))
    if draw.random() < 0.2:
        del holder[key]
    elif draw.random() < 0.6:
        holder[key] = draw.choice(SPECIAL)
    else:
        holder[key] = "HERE"
    text = json.dumps(event).encode().replace(b'"HERE"', draw.choice(RAW))
    lines[at] = text + b"\n"
    return b"".join(lines)


MUTATIONS = (mutate_bytes, mutate_lines, mutate_values)


def numbers_of(run: RunLog) -> dict[str, Any]:
    """What a table may show of a run."""
    return {"summary": runlog.seed_result(run), "nelbo": run.nelbo, "decode": run.decode}


def check_numbers(run: RunLog) -> None:
    """Require of a run that counts that its scores can be."""
    result = runlog.seed_result(run)
    assert 0 < result["val_bpb"] < 1e9
    assert 0 < result["val_loss"] < 1e9
    assert all(row["nelbo_bpb"] is None or row["nelbo_bpb"] > 0 for row in run.nelbo.values())
    shares = [row.get("token_acc") for row in run.decode.values()]
    assert all(share is None or 0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_mutated_log_is_left_out_or_its_numbers_are_its_own(
    tmp_path: Path, mutate: Callable[[bytes, random.Random], bytes]
) -> None:
    data, path = REAL.read_bytes(), tmp_path / "a.jsonl"
    left_out = 0
    for number in range(60):
        path.write_bytes(mutate(data, random.Random(f"{mutate.__name__} {number}")))
        run = runlog.read_log(path)
        if run.why_left_out:
            left_out += 1
            assert "\n" not in run.why_left_out
            assert not (run.damage and run.events)
            continue
        check_numbers(run)
        key = runlog.key_of(run)
        assert key.recipe.isprintable()
        assert key.data.isprintable()
    assert left_out > 10


def test_events_of_two_runs_in_one_log_are_never_a_result(tmp_path: Path) -> None:
    ours, theirs = (path.read_bytes().splitlines(keepends=True) for path in (REAL, OTHER))
    path = tmp_path / "a.jsonl"
    for number in range(60):
        draw = random.Random(number)
        queues, mixed = [list(ours), list(theirs)], list[bytes]()
        while all(queues):
            mixed += [queues[draw.random() < 0.5].pop(0) for _ in range(1)]
        path.write_bytes(b"".join([*mixed, *queues[0], *queues[1]]))
        run = runlog.read_log(path)
        assert "lines of two runs" in run.why_left_out


@pytest.mark.slow
def test_no_mutation_changes_what_is_said_of_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, data = tmp_path / "logs", REAL.read_bytes()
    logs.mkdir()
    (logs / "good.jsonl").write_bytes(OTHER.read_bytes())
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- /results -->\n", encoding="utf-8")
    paths = {"logs": logs, "readme": tmp_path / "README.md", "submission": tmp_path / "s.json"}
    argv = [f"--{name}={path}" for name, path in paths.items()]
    expected = numbers_of(runlog.read_log(OTHER))
    for number in range(12):
        draw = random.Random(number)
        (logs / "bad.jsonl").write_bytes(draw.choice(MUTATIONS)(data, draw))
        assert report.main([*argv, "--write"]) == 0
        assert report.main([*argv, "--check"]) in (0, 1)
        assert compare.main([f"--logs={logs}"]) == 0
        runs = {run.name: run for run in runlog.read_logs(logs)}
        assert numbers_of(runs["good"]) == expected
        results = json.loads((logs / "results.json").read_text(encoding="utf-8"))
        (group,) = [g for g in results["measured_here"]["english"] if "good" in g["logs"]]
        assert group["per_seed"]["42"]["val_bpb"] == expected["summary"]["val_bpb"]
        assert "Traceback" not in capsys.readouterr().err
        plot.curves_by_context(list(runs.values()))


def test_a_mutated_ladder_is_used_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = tg.LADDER_FILE.read_bytes(), tmp_path / "ladder.toml"
    values = (b"nan", b"[]", b"{}", b'"x|y"', b"1979-05-27", b"[" * 3000, b"'\xff'", b"true")
    monkeypatch.setattr(tg, "LADDER_FILE", path)
    used = 0
    for number in range(60):
        draw = random.Random(number)
        lines = data.splitlines(keepends=True)
        at = draw.choice([i for i, line in enumerate(lines) if b" = " in line])
        lines[at] = lines[at].split(b" = ")[0] + b" = " + draw.choice(values) + b"\n"
        path.write_bytes(draw.choice((b"".join(lines), mutate_bytes(data, draw))))
        known = sweep.known_ladder()
        assert known.fault == "" or known.fault.startswith(str(path))
        assert bool(known.fault) != bool(known.rows)
        used += bool(known.rows)
        for name in known.rows:
            sweep.published_cell(name)
        report.equal_rows("direct")
        compare.order({}, "phase1", ("1",), compare.Noise(None, None))
    assert 0 < used < 60
