"""Artifacts of tiny models for the tests of the benchmarks, and manifests of their text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

import train_gpt as tg
from tests.conftest import Recorder, make_run


def save(path: Path, weights: dict[str, Tensor], cfg: tg.Config, sha256: str = "") -> Recorder:
    """Write an artifact of a tokenizer, that of its settings if none is given; return its log."""
    run, log = make_run(cfg), Recorder()
    run.log = log
    run.identity = {"tokenizer_sha256": sha256 or tg.ByteCounter(cfg).sha256}
    tg.save_artifact(path, weights, run)
    return log


def write_manifest(data: dict[str, Any], folder: Path, sha256: str) -> Path:
    """Copy a folder of shards, with a manifest that says which tokenizer they are of."""
    folder.mkdir()
    for shard in Path(data["data_path"]).glob("*.bin"):
        (folder / shard.name).write_bytes(shard.read_bytes())
    files = {}
    for shard in folder.glob("*.bin"):
        files[shard.name] = {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    found = {"settings": {}, "tokenizer": {"sha256": sha256}, "splits": {"val": {"bytes": 1}}}
    found["files"] = files
    (folder / "manifest.json").write_text(json.dumps(found), encoding="utf-8")
    return folder
