"""scripts/bench/export.py: what is counted are the artifact's own bytes, and what rounding costs is
measured on it.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts.bench import export as bench
from tests.bench import artifacts
from tests.conftest import Called, facts, make_run, outcome, randomise, tiny


@pytest.fixture
def checkpoint(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DATA_PATH", "TOKENIZER_PATH", "NELBO_SEQUENCES", "NELBO_SAMPLES"):
        monkeypatch.delenv(name, raising=False)
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r")
    run = make_run(cfg)
    run.identity = {"tokenizer_sha256": tg.ByteCounter(cfg).sha256}
    tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"), randomise(tg.GPT(cfg), std=0.05)).save()
    return cfg.checkpoints[0]


def call(path: Path, *argv: str, capsys: Any) -> Called:
    return outcome(
        bench.main, [str(path), "--window", "8", "--keep", "100", "--device", "cpu", *argv], capsys
    )


@pytest.mark.slow
def test_scores_and_bytes_are_those_of_the_artifact(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tg, "KEEP_FLOAT_NUMEL", 100)
    found = facts(call(checkpoint, "--levels", "127,31,3", capsys=capsys))
    cfg, weights, _ = bench.load(checkpoint)
    counter = tg.ByteCounter(cfg)
    split = (make_run(cfg), tg.TokenLoader(cfg, "val"), counter)
    model = tg.GPT(cfg)
    model.load_state_dict(weights)
    exact = tg.evaluate_exact(model, *split)["bpb"]
    bound = tg.evaluate_bound(model, *split, 8)["bpb"]
    assert found["floats"] == {"val_bpb": exact, "bound": bound}
    by_levels = {(row["levels"], row["embedding"]): row for row in found["roundings"]}
    assert by_levels.keys() == {(127, 127), (31, 31), (31, 127), (3, 3), (3, 127)}
    for scheme, levels in (("int8+zlib", 127), ("int6+lzma", 31)):
        cfg = dataclasses.replace(cfg, export_scheme=scheme)
        log = artifacts.save(path := tmp_path / scheme, weights, cfg)
        again, _ = tg.load_artifact(path, torch.device("cpu"))
        row = by_levels[levels, 127]
        gap = tg.evaluate_exact(again, *split)["bpb"] - exact
        assert row["val_bpb_gap"] == pytest.approx(gap, abs=1e-6)
        gap = tg.evaluate_bound(again, *split, 8)["bpb"] - bound
        assert row["bound_gap"] == pytest.approx(gap, abs=1e-6)
        (line,) = (line for line in found["schemes"] if line["scheme"] == scheme)
        assert line["model"] == log.of("size")[0]["model_bytes"]
        assert line["model"] == sum(line[part] for part in ("integers", "scales", "fp16", "rest"))
    rough, fine = by_levels[3, 3], by_levels[127, 127]
    assert abs(rough["val_bpb_gap"]) > 3 * abs(fine["val_bpb_gap"])
    assert (
        rough["entropy"]
        < rough["bits"]
        == 3 * rough["integers"] / 8
        < fine["bits"]
        == fine["integers"]
    )


def test_an_ideal_coder_takes_the_entropy() -> None:
    assert bench.entropy(
        torch.tensor([[1, 1, -1, -1], [5, 5, 7, 7]], dtype=torch.int8)
    ) == pytest.approx(2)
    assert bench.entropy(torch.full((3, 3), -127, dtype=torch.int8)) == 0
    assert bench.entropy(torch.tensor([0, 0, 0, 1], dtype=torch.int8)) == pytest.approx(
        2 - 0.75 * math.log2(3)
    )


def test_errors_are_of_every_tensor(checkpoint: Path) -> None:
    weights = bench.load(checkpoint)[1]
    lines = bench.errors(weights, keep=100)
    assert [line["tensor"] for line in lines] == list(weights)
    by_name = {line["tensor"]: line for line in lines}
    fine, rough = (
        by_name["blocks.0.fc.weight"][f"{scheme} error"] for scheme in ("int8+zlib", "int6+lzma")
    )
    assert 3 < rough / fine < 5  # 127 / 31
    assert by_name["tok_emb"]["int8+zlib error"] == by_name["tok_emb"]["int6+lzma error"]
    assert by_name["blocks.0.attn.q_gain"]["int6+lzma bits"] == 16


def test_an_average_is_what_is_exported(data: dict[str, Any], tmp_path: Path) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r", ema_decay=0.9)
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"))
    with torch.no_grad():
        state.ema["tok_emb:ema"].fill_(0.5)
    state.save()
    assert bench.load(cfg.checkpoints[0])[1]["tok_emb"].eq(0.5).all()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--levels", "128"], "--levels=128 must be at most 127"),
        (["--window", "7"], "--window=7 must divide the 16 tokens"),
    ],
)
def test_faults_are_named(
    checkpoint: Path, argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(checkpoint, *argv, capsys=capsys)
    assert (status, out) == (2, "")
    assert named in err


def test_a_file_that_is_no_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"hello")
    status, out, err = call(tmp_path / "x.ckpt", capsys=capsys)
    assert (status, out) == (2, "")
    assert "is missing, damaged or not ours" in err


def test_one_process_scores_no_more_rows_at_once_than_a_rank(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = list[int](), tg.token_nll_causal

    def token_nll_causal(model: tg.GPT, ids: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return plain(model, ids)

    monkeypatch.setattr(tg, "token_nll_causal", token_nll_causal)
    for preset, most in (("8xh100", 2), ("cpu", 16)):
        cfg = tiny(**data, preset=preset, val_batch_size=256, diffusion_loss_weight=0.0)
        bench.scores(cfg, tg.GPT(cfg).state_dict(), 8, torch.device("cpu"))
        assert max(seen) == most
        seen.clear()
