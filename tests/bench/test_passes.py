"""scripts/bench/passes.py: exact scores of schedules, beside the causal one and the bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts import chain, common
from scripts.bench import passes
from tests.bench import artifacts
from tests.conftest import CPU, Called, facts, make_run, outcome, randomise, tiny


@pytest.fixture
def files(tmp_path: Path, data: dict[str, Any]) -> tuple[Path, Path]:
    """An artifact and its head, both of random weights."""
    cfg = tiny(**data, bigram_vocab_size=50)
    model = randomise(tg.GPT(cfg), std=0.2)
    artifact, head = tmp_path / "a.ptz", tmp_path / "head.ptz"
    artifacts.save(artifact, dict(model.named_parameters()), cfg)
    loaded = chain.Head(model, 2)
    torch.nn.init.normal_(loaded.proj.weight, std=0.3)
    about = {"artifact_sha256": common.sha256_of(artifact), "width": 2}
    chain.save_head(head, loaded, about)
    return artifact, head


def measure(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], *options: str) -> Called:
    argv = ["--artifact", str(files[0]), "--windows", "1,4,8", "--rows", "1000"]
    return outcome(passes.main, [*argv, *options], capsys)


def of(result: dict[str, Any], window: int, count: int) -> dict[str, Any]:
    (row,) = [r for r in result["scores"] if (r["window"], r["passes"]) == (window, count)]
    return dict(row)


@pytest.mark.parametrize("order", passes.ORDERS)
def test_schedules_are_scored_with_and_without_the_head(
    order: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(measure(files, capsys, "--head", str(files[1]), "--order", order))
    assert [(r["window"], r["passes"]) for r in found["scores"]] == [
        *((4, n) for n in (1, 2, 4)),
        *((8, n) for n in (1, 2, 4, 8)),
    ]
    for row in found["scores"]:
        one_token_a_pass = row["window"] == row["passes"]
        apart = order == "spread" and row["passes"] > 1  # no two neighbours in one pass
        same = row["chained_bpb"] == pytest.approx(row["factorised_bpb"], rel=1e-6)
        assert same == (one_token_a_pass or apart)
        assert (row["alone_bpb"] is not None) == (row["passes"] == 1)
    two = {kind: of(found, 8, 2)[kind] for kind in ("factorised_bpb", "chained_bpb")}
    if order == "parts":  # the second part of a window reads less of it than a window of its own
        assert two["chained_bpb"] != of(found, 4, 1)["chained_bpb"]


def test_scores_are_of_the_whole_split_in_bits_per_byte(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tg.load_artifact(files[0], CPU)[0]
    cfg = model.cfg
    val, counter = tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg)
    found = facts(measure(files, capsys))
    exact = tg.evaluate_exact(model, make_run(cfg), val, counter)
    assert found["causal_bpb"] == pytest.approx(exact["bpb"], rel=1e-6)
    assert (found["tokens"], found["bytes"]) == (exact["tokens"], exact["bytes"])
    mask, order = chain.window_groups(cfg, 8, CPU), torch.zeros(8, dtype=torch.long)
    rows = val.rows(0, exact["tokens"] // cfg.train_seq_len, cfg.train_seq_len)
    with torch.no_grad():
        nats = chain.parallel_nll(model, None, rows, order, mask)[0].double().sum().item()
    expected = tg.bits_per_byte(nats, exact["bytes"])
    assert of(found, 8, 1)["factorised_bpb"] == pytest.approx(expected, rel=1e-6)
    assert of(found, 8, 1)["chained_bpb"] is None


@pytest.mark.slow
def test_the_head_alone_needs_no_window(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its score is that of the clean stream's first token and of its own others."""
    found = facts(measure(files, capsys, "--head", str(files[1])))
    model = tg.load_artifact(files[0], CPU)[0]
    head = chain.load_head(files[1], model, files[0])
    T, val, nats = model.cfg.train_seq_len, tg.TokenLoader(model.cfg, "val"), 0.0
    for start in range(0, found["tokens"], T):
        (row,) = val.rows(start, 1, T)
        first = tg.token_nll_causal(model, row[None])[0]
        with torch.no_grad():
            for i in range(T):
                if i % 4 == 0:
                    nats += first[i].item()
                else:
                    pair = row[i // 4 * 4 : i + 1] if i % 4 == 1 else row[i - 1 : i + 1]
                    logits = head.prior + head(pair[None])[0, -1]
                    nats -= logits.log_softmax(-1)[row[i + 1]].item()
    expected = tg.bits_per_byte(nats, found["bytes"])
    assert of(found, 4, 1)["alone_bpb"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_result_and_a_picture_are_written(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, plot = tmp_path / "passes.json", tmp_path / "passes.png"
    options = ["--head", str(files[1]), "--out", str(out), "--plot", str(plot)]
    called = measure(files, capsys, *options)
    assert facts(called) == json.loads(out.read_text(encoding="utf-8"))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| 8 | 1 |" in called[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "3"], "--windows='3' must be sizes"),
        (["--windows", "1"], "--windows='1' must name windows of two or more tokens"),
        (["--order", "x"], "argument --order"),
        (["--head", "nowhere.ptz"], "head nowhere.ptz is missing, damaged or not ours"),
        (["--out", "nowhere/a.json"], "--out=nowhere/a.json must be a file"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    options: list[str],
    message: str,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = measure(files, capsys, *options)
    assert status == 2
    assert message in err
