"""scripts/bench/train.py: rows are medians over turns, ratios are taken within a turn, and nothing
compiles late.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts.bench import train as bench
from scripts.bench.flops import flops_per_token
from tests.conftest import CPU, env_of, facts, outcome, settings


def found(clean: float, windows: float = 0.0, start: float = 0.5, **more: Any) -> dict[str, Any]:
    """What a process says of one case."""
    kinds = {"clean": [clean, clean, 9.0], "start": start} | (
        {"windows": [windows] * 3} if windows else {"start": 1.0}
    )
    usual = {
        "tokens": 100,
        "params": 7,
        "peak_mib": 5,
        "graphs": 0,
        "flops": 10.0,
        "peak": 1000.0,
    }
    return kinds | usual | more


def test_ratios_are_of_one_turn() -> None:
    cases = [
        {"size": "-", "settings": {}, "nproc": 1, "recipe": recipe, "program": ""}
        for recipe in ("ar", "direct")
    ]
    turns = [  # the machine halves its speed in the second turn
        [found(1.0), found(1.0, 2.0, peak_mib=8)],
        [found(2.0), found(2.0, 4.0)],
        [found(1.0), found(1.0, 2.2, graphs=1)],
    ]
    ar, direct = bench.summarise(cases, turns)
    assert (ar["clean_ms"], ar["windows_ms"], ar["run_ms"], ar["ratio"]) == (1000, None, 1000, 1)
    assert (direct["clean_ms"], direct["windows_ms"]) == (1000, 2200)
    assert direct["run_ms"] == pytest.approx(1600)
    assert direct["ratio"] == pytest.approx(1.5)
    assert direct["tok_per_sec"] == pytest.approx(100 / 1.6)
    assert direct["mfu"] == pytest.approx(100 / 1.6 * 10 / 1000)
    assert (direct["peak_mib"], direct["graphs"]) == (8, 1)


def test_another_program_is_compared_with_this_one() -> None:
    cases = [
        {"size": "-", "settings": {}, "nproc": 1, "recipe": "direct", "program": program}
        for program in ("", "old.py")
    ]
    ours, theirs = bench.summarise(cases, [[found(1.0), found(1.6)]])
    assert (ours["ratio"], theirs["ratio"]) == (None, 1.6)  # there is no `ar`


def test_a_rate_without_flops_or_a_peak_has_no_mfu() -> None:
    case = {"size": "-", "settings": {}, "nproc": 2, "recipe": "ar", "program": ""}
    (row,) = bench.summarise([case], [[found(1.0)]])
    assert row["mfu"] == pytest.approx(100 * 10 / 2 / 1000)
    for unknown in ({"flops": None}, {"peak": None}):
        (row,) = bench.summarise([case], [[found(1.0, **unknown)]])
        assert row["mfu"] is None


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("Some new device", None),
    ],
)
def test_a_gpu_counts_by_its_data_sheet(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert bench.peak_flops(CUDA) == peak


def test_a_cpu_counts_by_what_it_does() -> None:
    peak = bench.peak_flops(CPU)
    assert peak is not None
    assert 1e8 < peak < 1e15


OLD = """
class Moment(tuple):
    def __new__(cls, *values):
        return super().__new__(cls, values)

def beside(file, name):
    return {("flops.py", "per_token"): lambda cfg, size=0: 100.0 + size}[file, name]
"""


def test_versions_with_other_names_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(OLD, encoding="utf-8")
    old = bench.load_program(str(path))
    state: Any = SimpleNamespace(step=3)
    assert tuple(bench.Place(old, state, None, None, 0.5).now) == (3, 0.5, 1.0)
    assert bench.Place(tg, state, None, None, 0.5).now == tg.ScheduleState(3, 0.5, 1.0)
    cfg = tg.Config(**settings(diffusion_windows="4:1,8:3"))
    per_token = bench.flops_of(old)
    assert per_token is not None
    assert bench.mean_flops(per_token, cfg, 0.25) == pytest.approx(0.25 * 100 + 0.75 * 107)
    assert bench.flops_of(tg) is flops_per_token
    path.write_text("", encoding="utf-8")
    assert bench.flops_of(bench.load_program(str(path))) is None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a tiny model in the environment; what a sweep of processes sets is left out."""
    values = settings(train_batch_tokens=64, iterations=100)
    left_out = ("recipe", "vocab_size")
    for name, value in env_of({k: v for k, v in values.items() if k not in left_out}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VOCAB_SIZE", "64")
    monkeypatch.setenv("DIFFUSION_START_FRAC", "0.5")


@pytest.mark.slow
def test_a_real_turn_times_both_kinds_of_steps(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--recipes",
        "ar,direct",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--size",
        "MODEL_DIM=32 DIFFUSION_WINDOWS=4:1,8:1",
        "--profile",
        "--out",
    ]
    size = argv[-3]
    result = facts(outcome(bench.main, [*argv, str(tmp_path / "x.json")], capsys))
    rows, profiles = result["rows"], result["profiles"]
    assert [(row["recipe"], row["size"]) for row in rows] == [("ar", size), ("direct", size)]
    ar, direct = rows
    assert (ar["graphs"], direct["graphs"]) == (0, 0)
    assert ar["windows_ms"] is None
    assert min(direct["clean_ms"], direct["windows_ms"], ar["clean_ms"]) > 0
    assert min(direct["clean_ms"], direct["windows_ms"]) <= direct["run_ms"]
    assert (
        direct["params"]
        > ar["params"]
        == sum(p.numel() for p in tg.GPT(tg.Config(**shape("ar"))).parameters())
    )
    assert ar["ratio"] == 1
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows
    kinds = {(line["recipe"], line["step"]) for line in profiles}
    assert kinds == {("ar", "clean"), ("direct", "clean"), ("direct", "windows")}
    for kind in kinds:
        shares = [line["share"] for line in profiles if (line["recipe"], line["step"]) == kind]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1  # the rest goes to operators that are not named


def shape(recipe: str) -> dict[str, Any]:
    return settings(recipe, model_dim=32)


def test_faults_are_named_before_anything_runs(
    small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, named in (
        (["--recipes", "ar,drect"], "RECIPE='drect' is "),
        (["--size", "MODEL_DIM=33"], "MODEL_DIM=33 must be a multiple"),
        (["--size", "MODEL_DIM"], "MODEL_DIM='' must be a whole number"),
        (["--size", "MODEL_DIMS=32"], "--size 'MODEL_DIMS=32': MODEL_DIMS is no setting"),
    ):
        status, out, err = outcome(bench.main, argv, capsys)
        assert (status, out) == (2, "")
        assert named in err
    status, _, err = outcome(bench.main, ["--program", "nowhere.py"], capsys)
    assert status == 2
    assert "--program=nowhere.py is no file" in err
