"""Validation text of the benchmarks: it must be of the tokenizer that a model was trained with."""

from __future__ import annotations

from pathlib import Path

import train_gpt as tg
from scripts.common import Artifact, fail, open_tokenizer, warn
from train_gpt import Config, TokenLoader


def open_validation(artifact: Artifact, cfg: Config) -> TokenLoader:
    """Open the validation shards of DATA_PATH; UserError: they are missing, damaged or of another
    tokenizer than the artifact.

    The manifest of the shards tells; without one, whether a tokenizer that is at hand reproduces
    the text. What cannot be told is a warning.
    """
    loader = TokenLoader(cfg, "val")
    check_manifest(cfg, artifact.tokenizer_sha256, str(artifact.path))
    if tg.read_manifest(cfg).get("tokenizer"):
        return loader
    path = Path(cfg.tokenizer_path)
    if not path.is_file():
        data = f"DATA_PATH={cfg.data_path!r}"
        warn(f"{data} does not say which tokenizer it is of; set TOKENIZER_PATH to have it checked")
    else:
        for warning in tg.check_data(cfg, loader, loader, open_tokenizer(artifact, path))[1]:
            warn(warning)
    return loader


def check_manifest(cfg: Config, sha256: str, of: str) -> None:
    """Raise UserError if the manifest of the shards names another tokenizer than a model's."""
    theirs = tg.read_manifest(cfg).get("tokenizer")
    if theirs and theirs != sha256:
        hashes = f"SHA-256 {theirs[:12]}, not {sha256[:12]} of {of}"
        rule = "name shards of that tokenizer, or prepare them with --tokenizer"
        fail(f"DATA_PATH={cfg.data_path!r} was made with another tokenizer ({hashes}); {rule}")
