"""scripts/bench/evaluation.py: what is timed is what a run scores, and the whole is what it would
take.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts.bench import evaluation as bench
from tests.conftest import env_of, facts, outcome, settings


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a tiny model in the environment."""
    values = settings(
        nelbo_windows="1,T", nelbo_samples=2, parallel_eval_examples=2, parallel_eval_span_len="2"
    )
    for name, value in env_of(
        {k: v for k, v in values.items() if k not in ("vocab_size", "eval_stride")}
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VOCAB_SIZE", "64")
    monkeypatch.setenv("EVAL_STRIDE", "4")


def listed(tmp_path: Path, tokens: int, devices: int, **changes: Any) -> list[bench.Job]:
    cfg = tg.Config(
        **settings(eval_stride=4, nelbo_windows="1,T", **changes, out_dir=str(tmp_path))
    )
    cfg = dataclasses.replace(cfg, data_path=str(tmp_path / "data"))
    with tg.Run.start(cfg) as run:
        run.log.active = False
        return bench.jobs("-", cfg, run, 6, tokens, devices)


def test_the_counted_tokens_are_those_that_a_run_scores(tmp_path: Path) -> None:
    jobs = {job.name: job for job in listed(tmp_path, 1000, 1)}
    assert list(jobs) == ["exact", "sliding", "bound 1", "bound 16", "parallel_eval"]
    for name, job in jobs.items():
        if name != bench.PARALLEL:
            assert job.run()["tokens"] == job.tokens > 0


def test_the_whole_is_shared_by_devices_and_ends_at_nelbo_sequences(tmp_path: Path) -> None:
    one, four = (listed(tmp_path / str(n), 6000, n) for n in (1, 4))
    assert [job.whole for job in one if job.name != bench.PARALLEL] == [
        pytest.approx(4 * job.whole) for job in four if job.name != bench.PARALLEL
    ]
    exact = one[0]
    # Before export and of the artifact.
    assert exact.whole * exact.tokens == pytest.approx(2 * 6000)
    few = {job.name: job for job in listed(tmp_path / "few", 6000, 1, nelbo_sequences=3)}
    bound = few["bound 1"]
    assert bound.whole * bound.tokens == pytest.approx(3 * tg.Config(**settings()).train_seq_len)
    assert few["exact"].whole == exact.whole


@pytest.mark.slow
def test_a_real_turn(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--rounds",
        "1",
        "--rows",
        "4",
        "--size",
        "NELBO_SAMPLES=2",
        "--size",
        "RECIPE=ar",
        "--tokens",
        "640",
    ]
    found = facts(outcome(bench.main, [*argv, "--out", str(tmp_path / "x.json")], capsys))
    rows = found["rows"]
    assert {row["score"] for row in rows if row["size"] == "RECIPE=ar"} == {
        "exact",
        "sliding",
        "parallel_eval",
    }
    assert {row["score"] for row in rows} > {"bound 1"}
    assert min(row["seconds"] for row in rows) > 0
    for case, seconds in found["whole_seconds"].items():
        assert seconds == pytest.approx(
            sum(row["whole_seconds"] for row in rows if row["size"] == case)
        )
    assert json.loads((tmp_path / "x.json").read_text()) == found


def test_faults_are_named(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, named in (
        (["--size", "NELBO_SAMPLES=1"], "NELBO_SAMPLES=1 must be in [2"),
        (["--size", "NELBO=2"], "NELBO is no setting"),
        (["--rows", "0"], "argument --rows: 0 must be 1 or more"),
    ):
        status, out, err = outcome(bench.main, argv, capsys)
        assert (status, out) == (2, "")
        assert named in err


@pytest.mark.parametrize(("after", "whole"), [(16, 2), (7, 0)])
def test_what_was_timed_before_ctrl_c_is_kept(
    after: int,
    whole: int,
    small: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five jobs a turn, and the first turn does not count."""
    timed = list[bench.Job]()

    def time_job(job: bench.Job, run: tg.Run) -> None:
        if len(timed) == after:
            raise KeyboardInterrupt
        timed.append(job)
        job.seconds.append(100.0 if len(timed) <= 5 or len(timed) == after else 2.0)

    monkeypatch.setattr(bench, "time_job", time_job)
    status, out, err = outcome(bench.main, ["--rounds", "9", "--rows", "4"], capsys)
    if not whole:
        assert (status, out) == (2, "")
        assert "error: stopped before a turn that counts was over" in err
        return
    found = json.loads(out.splitlines()[-1])
    assert found["rounds"] == whole
    assert {row["seconds"] for row in found["rows"]} == {2.0}
    assert "--rounds=9, 2 of them whole" in err
