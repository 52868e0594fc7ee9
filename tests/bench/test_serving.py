"""scripts/bench/serving.py: what it fits and counts, and a short run of all parts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts import chain, common
from scripts.bench import serving
from scripts.serving import hole
from tests.conftest import CPU, facts, outcome
from tests.serving.conftest import export


def test_the_correction_finds_what_a_length_adds() -> None:
    """Scores whose true length is the least after hidden offsets are taken off."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.tensor([0.0, -3.0, -11.0, -20.0, -45.0], dtype=torch.double)
    nats = torch.randn(400, 5, generator=generator, dtype=torch.double) * 6
    true = nats.argmin(1)
    correction = serving.fit_correction(nats - hidden, true)
    assert correction[2] == 0
    chosen = [hole.choose(hole.LENGTHS, row, correction) for row in (nats - hidden).tolist()]
    assert sum(a == b for a, b in zip(chosen, true.tolist(), strict=True)) > 380
    raw = [hole.choose(hole.LENGTHS, row, {}) for row in (nats - hidden).tolist()]
    assert sum(a == b for a, b in zip(raw, true.tolist(), strict=True)) < 200


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [serving.percentile(values, share) for share in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert serving.percentile([], 0.5) == 0


def test_the_packaged_correction_can_be_read() -> None:
    correction = hole.read_correction()
    assert correction.keys() == {*hole.LENGTHS}
    assert hole.correct(correction, 30) == correction[32]
    assert hole.candidates(20) == [2, 4, 8, 16]
    assert hole.candidates(1) == [1]


def test_text_is_measured_with_the_head_that_the_server_would_find(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_PATH", data["data_path"])
    artifact = export(data, tmp_path / "tiny.ptz")
    head = chain.Head(tg.load_artifact(artifact, CPU)[0], 2)
    about = {"artifact_sha256": common.sha256_of(artifact), "width": 2}
    chain.save_head(artifact.with_suffix(".head"), head, about)
    at, made = serving.open_bench(argparse.Namespace(artifact=artifact)), list[Any]()

    class Engine(serving.Engine):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self.passes.head)

    monkeypatch.setattr(serving, "Engine", Engine)
    serving.decode_rows(at, [], 1)
    assert made == [at.head]
    assert at.head is not None


@pytest.mark.slow
def test_all_parts_run(
    data: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "PREFIX", 16)
    monkeypatch.setattr(serving, "SUFFIX", 8)
    monkeypatch.setattr(serving, "DEADLINES_MS", (5000,))
    monkeypatch.setenv("DATA_PATH", data["data_path"])
    artifact, out, fitted = (export(data, tmp_path / "tiny.ptz"), tmp_path / "a", tmp_path / "b")
    argv = [str(artifact), "--clients", "1,3", "--seconds", "0.3", "--memory-seconds", "1"]
    argv += ["--spans", "3", "--out", str(out), "--correction", str(fitted)]
    called = outcome(serving.main, argv, capsys)
    found, said = facts(called), called[2].splitlines()
    assert said[:3] == ["lengths", "fallback", "load, 16 slots, 1 clients"]
    assert said[-3:] == ["context", "deadlines", "memory, 3 clients for 1 s"]
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert [(row["slots"], row["clients"]) for row in found["load"]] == [
        (16, 1),
        (16, 3),
        (1, 1),
        (1, 3),
    ]
    for row in found["load"]:
        assert row["requests"] > 0
        assert row["refused"] == 0
        assert 0 < row["p50_ms"] <= row["p95_ms"]
    assert {row["kept"] for row in found["deadlines"]} == {1}
    assert len(found["memory"]["resident_mb"]) == 6
    assert found["lengths"]["correction_nats"].keys() == {"2", "4", "8", "16", "32"}
    assert hole.read_correction(fitted).keys() == {*hole.LENGTHS}
