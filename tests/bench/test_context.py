"""scripts/bench/context.py: which tokens are scored where, against sums made one row at a time."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts.bench import context as bench
from tests.bench import artifacts
from tests.conftest import VOCAB, Tokenizers, outcome, random_rows, randomise, tiny

T = 16


@pytest.fixture
def artifact(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DATA_PATH", raising=False)
    monkeypatch.delenv("TOKENIZER_PATH", raising=False)
    weights = randomise(tg.GPT(cfg := tiny(**data))).state_dict()
    artifacts.save(tmp_path / "tiny.ptz", weights, cfg)
    return tmp_path / "tiny.ptz"


def asked(artifact: Path, **changes: Any) -> argparse.Namespace:
    args = bench.parse_args(
        [str(artifact), "--factors", "1,2,4", "--rows", "3", "--decode-tokens", "3"]
    )
    return argparse.Namespace(**vars(args) | changes)


def loaded(rope_scale: float = 1.0) -> bench.Loaded:
    model = randomise(tg.GPT(tiny(vocab_size=VOCAB, rope_scale=rope_scale)))
    return bench.Loaded(model, random_rows(5, 4 * T + 1, VOCAB), random_rows(5, 4 * T, 9, seed=1))


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 5 * T, 4096])
def test_every_token_is_scored_once_in_its_row(
    monkeypatch: pytest.MonkeyPatch, factor: int, at_once: int
) -> None:
    monkeypatch.setattr(bench, "TOKENS_AT_ONCE", at_once)
    at, length = loaded(), factor * T
    expected = torch.zeros(5, 4 * T, dtype=torch.float64)
    for i in range(5):
        for start in range(0, 4 * T, length):
            row = at.text[i : i + 1, start : start + length + 1]
            expected[i, start : start + length] = tg.token_nll_causal(at.model, row)[0]
    torch.testing.assert_close(bench.token_nats(at, at.model, length), expected)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [1.0, 1.5])
def test_scores_by_hand(trained: float) -> None:
    found = bench.measure(at := loaded(trained), [1, 2, 4], 3)
    settings = [(row["factor"], row["context"], row["rope_scale"]) for row in found["results"]]
    assert settings == [(1, T, trained), *((f, f * T, trained * s) for f in (2, 4) for s in (1, f))]
    base = bench.token_nats(at, at.model, T)
    for row in found["results"]:
        length = row["context"]
        model = tg.GPT(dataclasses.replace(at.model.cfg, rope_scale=row["rope_scale"]))
        model.load_state_dict(at.model.state_dict())
        nats = bench.token_nats(at, model.eval(), length)
        assert row["bpb"] == pytest.approx(
            tg.bits_per_byte(nats.sum().item(), at.bytes.sum().item())
        )
        far = [start + i for start in range(0, 4 * T, length) for i in range(T, length)]
        for key, of in (("bpb_beyond", nats), ("bpb_beyond_in_rows_of_t", base)):
            if not far:
                assert row[key] is None
            else:
                sums = of[:, far].sum().item(), at.bytes[:, far].sum().item()
                assert row[key] == pytest.approx(tg.bits_per_byte(*sums))
    assert found["bpb_in_rows_of_t"] == found["results"][0]["bpb"]
    assert len({row["bpb"] for row in found["results"]}) == 5  # the scale of positions matters


def test_text_is_spread_over_the_split_and_counted_as_validation_does(
    artifact: Path, data: dict[str, Any], tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg.ByteCounter, "count", lambda self, prev, target: VOCAB * prev + target)
    at, loader = bench.load(asked(artifact)), tg.TokenLoader(tiny(**data), "val")
    total = (loader.total - 1) // (4 * T)
    rows = torch.cat([loader.rows(i * total // 3 * 4 * T, 1, 4 * T) for i in range(3)])
    assert at.text.equal(rows)
    assert at.bytes.equal(VOCAB * rows[:, :-1] + rows[:, 1:])
    assert len(bench.load(asked(artifact, rows=10**6)).text) == total > 3
    assert bench.load(asked(artifact, factors=[2, 3])).text.shape == (3, 6 * T + 1)
    monkeypatch.setenv("TOKENIZER_PATH", str(tokenizers.nmt_nfkc))
    with pytest.raises(tg.UserError, match="is not the tokenizer"):
        bench.load(asked(artifact))


def test_the_command(artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    argv = [
        str(artifact),
        "--factors",
        "1,2",
        "--rows",
        "2",
        "--decode-tokens",
        "3",
        "--out",
        str(out),
    ]
    assert bench.main(argv) == 0
    *lines, line = capsys.readouterr().out.splitlines()
    table = [row for row in lines if row.startswith("|")]
    assert len(table) == 2 + 3
    assert json.loads(line) == json.loads(out.read_text(encoding="utf-8"))
    assert [row.split()[3] for row in table[2:]] == ["1", "1", "2"]


@pytest.mark.parametrize(
    ("options", "data_path", "message"),
    [
        ("--factors 0", "", "argument --factors: '0' must list whole numbers"),
        ("--rows 0", "", "argument --rows: 0 must be 1 or more"),
        ("--decode-tokens 16", "", "--decode-tokens=16 must be below TRAIN_SEQ_LEN=16"),
        (
            "--decode-tokens 3 --factors 1,5000",
            "",
            "--factors: rows of all of them need 80,000 tokens",
        ),
        ("", "nowhere", "DATA_PATH='nowhere' holds no"),
    ],
)
def test_mistakes_are_named(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    options: str,
    data_path: str,
    message: str,
) -> None:
    if data_path:
        monkeypatch.setenv("DATA_PATH", data_path)
    status, _, err = outcome(bench.main, [str(artifact), *options.split()], capsys)
    assert status == 2
    assert err.startswith(f"error: {message}")
