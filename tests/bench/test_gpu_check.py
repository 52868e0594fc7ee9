"""scripts/bench/gpu_check.py: a rehearsal on the CPU, what is wrong fails, and time is limited."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts.bench import gpu_check as bench
from tests.conftest import CPU, TINY, env_of, facts, outcome

CHECKS = 8  # the start, windows of three sizes, losses against the CPU, and two ways to decode


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], tmp_path: Path) -> list[str]:
    """Settings of a tiny model and tiny text in the environment; options of a rehearsal."""
    values = TINY | data | {"iterations": 2, "nelbo_windows": "1,4,16", "parallel_eval_examples": 0}
    for name, value in env_of(values).items():
        monkeypatch.setenv(name, value)
    return ["--device", "cpu", "--steps", "1", "--out", str(tmp_path / "out"), "--seconds", "300"]


def checks(found: dict[str, Any]) -> dict[str, bool]:
    return {check["name"]: check["holds"] for check in found["checks"]}


BASELINE = """
import os, time
for step in range(0, int(os.environ["ITERATIONS"]), int(os.environ["TRAIN_LOG_EVERY"])):
    print(f"step:{step}/1000 train_loss:6.9 train_time:{7 * step}ms step_avg:7.00ms", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_rehearsal_finds_every_part(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline.py"
    baseline.write_text(BASELINE)
    runs = ["--seeds", "1", "--seed-seconds", "30", "--baseline", str(baseline)]
    found = facts(outcome(bench.main, small + runs, capsys))
    assert found["passed"]
    assert found["left_out"] == []
    assert len(checks(found)) == CHECKS + 1  # and both runs
    tables = found["tables"]
    assert [row["recipe"] for row in tables["Steps"]] == list(bench.RECIPES)
    assert tables["Baseline"][0]["step_ms"] == 7
    assert [row["target"][:6] for row in tables["Targets"]] == ["ar, ag", "direct"]
    scores = ["exact", "sliding", "bound 1", "bound 4", "bound 16"]
    assert [row["score"] for row in tables["Scores"]] == scores
    modes = [(row["mode"], row["batch"]) for row in tables["Decoding"]]
    assert modes == [(m, b) for b in (1, 32) for m in ("ar", "speculative", "refine")]
    assert [row["recipe"] for row in tables["Runs"]] == ["ar", "record"]
    log = (tmp_path / "out" / "gpu_check.txt").read_text()
    for name in ("machine", "data_sha256", "command", "torch"):
        assert f"\n{name}: {found[name]}\n" in f"\n{log}"
    assert "| retrograde | cpu |" in log
    assert (tmp_path / "out" / "runs" / "logs" / "record_seed1337.txt").is_file()


def session(options: list[str], tmp_path: Path) -> bench.Session:
    (tmp_path / "text").mkdir()
    return bench.Session(bench.parse_args([*options, "--seeds", "0"]), CPU, tmp_path)


def test_wrong_attention_fails_a_check(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, right = session(small, tmp_path), bench.dense_mask
    monkeypatch.setattr(bench, "dense_mask", lambda *shape: right(*shape).roll(1, dims=1))
    bench.check_windows(at)
    assert [check.holds for check in at.checks] == [False, False, False]
    assert not at.result()["passed"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch warns that attention is not compiled
def test_windows_of_flex_attention_are_checked_too(
    small: list[str], tmp_path: Path, flex_on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_DIM", "32")
    at, right = session(small, tmp_path), tg.block_mask
    bench.check_windows(at, "flex")
    assert [check.holds for check in at.checks] == [True, True, True]
    assert all("in flex" in check.name for check in at.checks)
    assert len(flex_on_cpu) == 3 * 2  # sizes and layers; not of the reference
    monkeypatch.setattr(tg, "block_mask", lambda T, size, _, place: right(T, size, True, place))
    bench.check_windows(at, "flex")
    assert [check.holds for check in at.checks[3:]] == [False, False, False]


@pytest.mark.slow
def test_steps_of_flex_attention_are_timed_beside_those_of_groups(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    @contextlib.contextmanager
    def opened(at: bench.Session, recipe: str, **more: Any) -> Iterator[Any]:
        asked.append(more.pop("window_attention"))
        with right(at, recipe, **more) as place:
            yield place

    right = bench.opened
    monkeypatch.setattr(bench, "opened", opened)
    at = session(small, tmp_path)
    for kind in ("groups", "flex"):
        bench.time_recipe(at, "direct", None, kind)
    assert asked == ["groups", "flex"]
    assert [row["attention"] for row in at.tables["Steps"]] == ["cpu", "flex"]
    assert all(row["windows_ms"] > 0 for row in at.tables["Steps"])


def test_a_wrong_loss_at_the_start_fails_a_check(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, right = session(small, tmp_path), tg.token_nll_causal
    bench.check_start(at)
    monkeypatch.setattr(tg, "token_nll_causal", lambda *given: 1.1 * right(*given))
    bench.check_start(at)
    assert [check.holds for check in at.checks] == [True, False]


def test_decoding_that_is_not_greedy_fails_a_check(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, right = session(small, tmp_path), bench.decoding.infill

    def shifted(*given: Any) -> Any:
        found = right(*given)
        return found._replace(ids=found.ids.clone().fill_(3))

    monkeypatch.setattr(bench.decoding, "infill", shifted)
    bench.check_decoding(at)
    assert [check.holds for check in at.checks] == [False, False]


def test_a_part_that_raises_is_a_failed_check_and_the_next_one_follows(
    small: list[str], tmp_path: Path
) -> None:
    at, done = session(small, tmp_path), list[int]()
    at.part("first", lambda: torch.zeros(2) @ torch.zeros(3))
    at.part("second", lambda: done.append(1))
    assert [(check.name, check.holds) for check in at.checks] == [("first", False)]
    assert done == [1]
    assert "| first | NO | RuntimeError: " in (tmp_path / "out" / "gpu_check.txt").read_text()


@pytest.mark.slow
def test_time_is_limited(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "check_start", lambda at: time.sleep(60))
    began = time.monotonic()
    status, out, _ = outcome(bench.main, [*small, "--seconds", "1", "--seeds", "0"], capsys)
    assert time.monotonic() - began < 30
    assert status == 1  # nothing was checked
    assert '"left_out": ["start of the loss (stopped)", "windows against a dense mask"' in out


def test_what_the_user_got_wrong_is_said_at_once(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = outcome(bench.main, [*small, "--baseline", "none.py"], capsys)
    assert (status, "--baseline=none.py is no file" in err) == (2, True)
    monkeypatch.setenv("DATA_PATH", "nowhere")
    status, _, err = outcome(bench.main, small, capsys)
    assert (status, err.startswith("error: DATA_PATH='nowhere' holds no")) == (2, True)
    status, _, err = outcome(bench.main, ["--device", "cuda"], capsys)
    assert (status, "finds no CUDA device" in err) == (2, True)


@pytest.mark.parametrize("causal", [False, True])
def test_the_dense_mask_is_that_of_training(causal: bool) -> None:
    mask, size = bench.dense_mask(8, 4, causal, CPU), 4
    for q in range(10):
        window, place = divmod(q, size + 1)
        for key in range(18):
            other, other_place = divmod(key - 8, size + 1)
            own = key >= 8 and other == window and not (causal and other_place > place)
            assert bool(mask[q, key]) == (key < window * size or own)


def test_targets_name_what_is_slow(small: list[str], tmp_path: Path) -> None:
    at = session(small, tmp_path)
    for recipe, clean, windows in (("ar", 40.0, None), ("direct", 40.0, 60.0)):
        row = {"recipe": recipe, "attention": "cpu", "clean_ms": clean, "windows_ms": windows}
        at.add("Steps", row)
    at.add("Baseline", {"step_ms": 43.5})
    bench.targets(at)
    assert [row["met"] for row in at.tables["Targets"]] == ["yes", "NO"]
