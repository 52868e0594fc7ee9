"""scripts/bench/text.py: no benchmark scores a model on text of another tokenizer unsaid."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts.bench import context, decode, export, infill, likelihood
from scripts.bench.text import open_validation
from scripts.common import Artifact
from tests.bench import artifacts
from tests.conftest import CPU, make_run, outcome, randomise, tiny, write_shard

NO_REVISION = ["--revise-examples=0"]
Main = Callable[[list[str]], int]
BENCHES: dict[str, tuple[Main, list[str]]] = {
    "context": (context.main, ["ARTIFACT", "--decode-tokens=3"]),
    "decode": (decode.main, ["ARTIFACT", "--prefix=8", "--target=4", "--suffix=4"]),
    "infill": (
        infill.main,
        ["ARTIFACT", "--spans=2", "--passes=1", "--prefix=4", "--suffix=2", *NO_REVISION],
    ),
    "likelihood": (likelihood.main, ["--artifact=ARTIFACT"]),
    "export": (export.main, ["CHECKPOINT", "--window=8"]),
}


@pytest.fixture
def model(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The artifact of a tiny model, beside its checkpoint."""
    for name in ("DATA_PATH", "TOKENIZER_PATH", "NELBO_SEQUENCES", "NELBO_SAMPLES"):
        monkeypatch.delenv(name, raising=False)
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r")
    weights = randomise(tg.GPT(cfg))
    run = make_run(cfg)
    run.identity = {"tokenizer_sha256": tg.ByteCounter(cfg).sha256}
    tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"), weights).save()
    artifacts.save(path := tmp_path / "m.ptz", weights.state_dict(), cfg)
    return Artifact(path, *tg.load_artifact(path, CPU))


@pytest.mark.parametrize("name", BENCHES)
def test_shards_of_another_tokenizer_are_refused(
    name: str,
    model: Artifact,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = artifacts.write_manifest(data, tmp_path / "other", "0" * 64)
    monkeypatch.setenv("DATA_PATH", str(folder))
    main, options = BENCHES[name]
    files = {"ARTIFACT": str(model.path), "CHECKPOINT": str(model.model.cfg.checkpoints[0])}
    argv = [option.replace(key, path) for option in options for key, path in files.items()]
    argv = [option for option in dict.fromkeys(argv) if not {*files} & {option.split("=")[-1]}]
    status, out, err = outcome(main, argv, capsys)
    assert (status, out) == (2, "")
    assert (
        f"error: DATA_PATH='{folder}' was made with another tokenizer (SHA-256 000000000000" in err
    )
    assert model.tokenizer_sha256[:12] in err


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(
    model: Artifact,
    tokenizers: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOKENIZER_PATH", str(tokenizers.nmt_nfkc))
    path = model.model.cfg.checkpoints[0]
    status, out, err = outcome(export.main, [str(path), "--window=8"], capsys)
    assert (status, out) == (2, "")
    assert f"TOKENIZER_PATH='{tokenizers.nmt_nfkc}' (SHA-256 " in err
    assert f"is not the tokenizer of {path}" in err


def test_text_whose_tokenizer_cannot_be_told_is_a_warning(
    model: Artifact, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny(**data)
    open_validation(model, cfg)
    folder = artifacts.write_manifest(data, tmp_path / "right", model.tokenizer_sha256)
    open_validation(model, tiny(**data | {"data_path": str(folder), "tokenizer_path": "gone"}))
    assert capsys.readouterr().err == ""
    open_validation(model, tiny(**data | {"tokenizer_path": "gone"}))
    warned = "does not say which tokenizer it is of; set TOKENIZER_PATH to have it checked"
    assert warned in capsys.readouterr().err
    draw = random.Random(0)
    tokens = [draw.randrange(4, cfg.vocab_size) for _ in range(5000)]
    write_shard(tmp_path / "random" / "x_val_000000.bin", tokens)
    open_validation(model, tiny(**data | {"data_path": str(tmp_path / "random")}))
    assert "may be of another tokenizer than TOKENIZER_PATH=" in capsys.readouterr().err
