"""scripts/record.py: the plan is what a user would type; tests/smoke.sh rehearses it on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import record
from conftest import facts, outcome

import train_gpt as tg


def planned(argv: list[str], env: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    steps, settings = record.commands(record.parse_args(argv), env)
    return [" ".join(step).replace(f"{record.SCRIPTS}/", "") for step in steps], settings


def test_the_record_is_data_three_seeds_and_a_report() -> None:
    (data, sweep, report), settings = planned(["8xh100"], {})
    assert data.endswith("prepare_data.py --source fineweb --train-shards 80 --out data/fineweb")
    assert sweep.endswith("sweep.py direct --seeds 1337,42,2026 --seconds 600.0 --nproc 8 --out out/record_8xh100")
    assert "--submission out/record_8xh100/submission.json --write" in report
    tokenizer = "data/fineweb/tokenizer.model"
    assert settings == {"PRESET": "8xh100", "DATA_PATH": "data/fineweb", "TOKENIZER_PATH": tokenizer}


def test_one_device_takes_any_corpus() -> None:
    steps, settings = planned(["1xgpu", "--seconds", "600", "--seeds", "1", "--out", "x"], {"DATA_PATH": "mine"})
    assert len(steps) == 2  # nothing is downloaded
    assert "sweep.py ar retrograde direct --seeds 1 --seconds 600.0 --nproc 1 --out x" in steps[0]
    assert settings == {"PRESET": "1xgpu"}


def test_a_plan_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_PATH", raising=False)
    called = outcome(record.main, ["8xh100", "--plan"], capsys)
    expected = {"protocol": "8xh100", "out": "out/record_8xh100", "planned": True, "val_bpb": None}
    assert facts(called) == expected
    assert called[2].count("PRESET=8xh100") == 3
    assert not list(tmp_path.iterdir())


def test_a_machine_without_the_devices_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    status, out, err = outcome(record.main, ["8xh100"], capsys)
    assert (status, out) == (2, "")
    assert "PROTOCOL=8xh100 needs 8 CUDA devices, 2 found; run it there, or try the path with --rehearse" in err
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    argv = ["8xh100", "--rehearse", "--recipes", "direct", "--out", str(tmp_path / "out")]
    status, out, err = outcome(record.main, argv, capsys)
    assert (status, out) == (2, "")
    assert "sweep.py ended with status 2" in err
    assert not (tmp_path / "out" / "README.md").exists()  # the steps after it are not taken
    assert set(record.PROTOCOLS) == {"8xh100", "1xgpu"} <= set(tg.PRESETS)
