"""Measure what an artifact's bytes are, and what fewer of them cost: levels x compressors, and
scores after rounding.

    DATA_PATH=data/stdlib python scripts/bench/export.py checkpoints/RUN_ID.ckpt
    DATA_PATH=data/stdlib python scripts/bench/export.py checkpoints/RUN_ID.ckpt --levels 31,15,7

Reads a checkpoint, whose weights are not rounded (their average, if EMA_DECAY was set), and rounds
them as an artifact. Three tables: every largest integer of matrices with the bytes by each
compressor and what rounding adds to the exact bits per byte and to the bound (the same noise before
and after, so that the difference is no noise); where the bytes of every scheme of train_gpt.SCHEMES
go; and the error of every tensor. "entropy" is what an ideal coder of single integers would take,
"bits" ceil(log2(2 n + 1)) of them side by side.
Text comes from DATA_PATH and TOKENIZER_PATH, or from where the model was trained; NELBO_SEQUENCES
and NELBO_SAMPLES are the environment's, too. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import dataclasses
import lzma
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zstandard
from torch import Tensor
from tqdm import tqdm

import train_gpt as tg
from scripts.bench.text import check_manifest
from scripts.common import (
    Parser,
    cell,
    check_outputs,
    counts,
    fail,
    pick_device,
    run_command,
    table,
    write_result,
)

RANKS = {"8xh100": 8}  # processes that a preset's VAL_BATCH_SIZE is shared by, where not one
TABLES = ("tok_emb", "lm_head")  # what a scheme may round more finely than the other matrices


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, levels = parser.add_argument, "largest integers of matrices (default %(default)s)"
    add("checkpoint", type=Path, help="checkpoints/RUN_ID.ckpt of train_gpt.py")
    add("--levels", type=counts, default="127,63,31,15,7", help=levels)
    parser.whole("--window", 16, "window of the bound")
    kept = "tensors of up to this many numbers stay fp16; small models need less"
    parser.whole("--keep", tg.KEEP_FLOAT_NUMEL, kept, low=0)
    parser.device()
    parser.outputs()
    args = parser.parse_args(argv)
    if args.levels[-1] > 127:
        parser.error(f"--levels={args.levels[-1]} must be at most 127, the largest of int8")
    return args


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib-9": lambda data: zlib.compress(data, 9),
    "lzma-9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd-22": lambda data: zstandard.ZstdCompressor(22).compress(data),
}


class Checkpoint(NamedTuple):
    """Settings and unrounded weights of a checkpoint, and what made it."""

    cfg: tg.Config
    weights: dict[str, Tensor]  # the average, if there is one
    identity: dict[str, str]  # SHA-256 digests


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; UserError: it is missing, damaged or not ours."""
    try:
        about, saved = tg.unpack_tensors(path.read_bytes())
        cfg = tg.Config(**about["config"])
        model = tg.GPT(cfg)
        names = dict(model.named_parameters())
        weights = {name: saved.get(f"{name}:ema", saved[name]) for name in names}
        model.load_state_dict(weights)
        identity = {name: str(about[name]) for name in tg.IDENTITY if name in about}
    except Exception as error:  # json and torch raise many kinds on foreign files
        fail(
            f"checkpoint {path} is missing, damaged or not ours ({error}); name the file of a run "
            "in its folder checkpoints/"
        )
    return Checkpoint(with_environment(cfg), weights, identity)


def with_environment(cfg: tg.Config) -> tg.Config:
    """Take the text and how much of it is scored from the environment where it says so."""
    names = ("data_path", "tokenizer_path", "nelbo_sequences", "nelbo_samples")
    fixed = {
        k.upper(): str(int(v)) if isinstance(v, bool) else str(v)
        for k, v in vars(cfg).items()
        if k != "preset"
    }
    given = {name.upper(): os.environ[name.upper()] for name in names if name.upper() in os.environ}
    return tg.Config.from_env(fixed | {"PRESET": cfg.preset} | given)[0]


def check_text(found: Checkpoint, path: Path) -> None:
    """Raise UserError if tokenizer or shards are not of the tokenizer that a checkpoint names."""
    cfg, trained = found.cfg, found.identity.get("tokenizer_sha256", "")
    if trained and (here := tg.ByteCounter(cfg).sha256) != trained:
        hashes = f"SHA-256 {here[:12]}, not {trained[:12]}"
        name = f"TOKENIZER_PATH={cfg.tokenizer_path!r}"
        fail(f"{name} ({hashes}) is not the tokenizer of {path}; name that one")
    check_manifest(cfg, trained or tg.ByteCounter(cfg).sha256, str(path))


# ==============================================================================
# 1  ROUNDING -- as train_gpt.pack, tensor by tensor
# ==============================================================================


Stored = dict[str, tuple[Tensor, Tensor | None]]  # by name: integers and scales, or fp16 and None


def rounded(weights: Mapping[str, Tensor], matrices: int, tables: int, keep: int) -> Stored:
    """Return what is stored of every tensor."""
    stored: Stored = {}
    for name, w in weights.items():
        big = w.ndim == 2 and w.numel() > keep
        stored[name] = (
            tg.quantize_rows(w, tables if name in TABLES else matrices) if big else (w.half(), None)
        )
    return stored


def rounded_by(scheme: tg.Scheme, weights: Mapping[str, Tensor], keep: int) -> Stored:
    """Round as a scheme does at its first levels."""
    levels = scheme.levels[0]
    return rounded(weights, levels, scheme.embedding_levels or levels, keep)


def restored(stored: Stored) -> dict[str, Tensor]:
    found = dict[str, Tensor]()
    for name, kept in stored.items():
        q, scale = kept
        found[name] = q.float() if scale is None else q.float() * scale.float()[:, None]
    return found


def entropy(q: Tensor) -> float:
    """Bits per integer of an ideal coder that knows how often each occurs."""
    p = torch.bincount(q.flatten().int() + 128).double() / q.numel()
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


def raw_bytes(stored: Stored) -> dict[str, bytes]:
    """The bytes of integers, of their scales and of what stays fp16, each in one piece."""
    parts = {"integers": b"", "scales": b"", "fp16": b""}
    for q, scale in stored.values():
        parts["fp16" if scale is None else "integers"] += q.numpy().tobytes()
        parts["scales"] += b"" if scale is None else scale.numpy().tobytes()
    return parts


def sizes(stored: Stored) -> dict[str, float]:
    """Bytes of all integers of a rounding, by compressor, ideal and side by side."""
    integers = [q for q, scale in stored.values() if scale is not None]
    data = raw_bytes(stored)["integers"]
    found: dict[str, float] = {name: len(compress(data)) for name, compress in COMPRESSORS.items()}
    found["entropy"] = sum(entropy(q) * q.numel() for q in integers) / 8
    found["bits"] = (
        sum(math.ceil(math.log2(2 * int(q.abs().max()) + 1)) * q.numel() for q in integers) / 8
    )
    return found


# ==============================================================================
# 2  SCORES
# ==============================================================================


def scores(
    cfg: tg.Config, weights: Mapping[str, Tensor], window: int, device: torch.device
) -> dict[str, float | None]:
    """Exact bits per byte of the validation split, and the bound (None without a denoiser).

    One process scores as many rows at once as one rank of the run that the preset stands for.
    """
    rows = max(cfg.val_batch_size // RANKS.get(cfg.preset, 1), cfg.train_seq_len)
    cfg = dataclasses.replace(cfg, val_batch_size=rows)
    model = tg.GPT(cfg)
    model.load_state_dict(dict(weights))
    with tempfile.TemporaryDirectory() as nowhere:  # scores write no event
        run = tg.Run(
            cfg, 0, 1, device, tg.Log(dataclasses.replace(cfg, out_dir=nowhere), 0, continued=False)
        )
    data = (run, tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg))
    model = model.to(device).eval()
    found = {"val_bpb": tg.evaluate_exact(model, *data)["bpb"], "bound": None}
    if cfg.diffusion:
        found["bound"] = tg.evaluate_bound(model, *data, window)["bpb"]
    return found


def round_all(
    args: argparse.Namespace, cfg: tg.Config, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Score unrounded weights, then every rounding with its bytes."""
    device = pick_device(args.device)
    floats, rows = scores(cfg, weights, args.window, device), []
    # 0: as the matrices.
    tables = sorted({scheme.embedding_levels for scheme in tg.SCHEMES.values()})
    grid = dict.fromkeys((n, embedding or n) for n in args.levels for embedding in tables)
    for matrices, embedding in tqdm(list(grid), desc="roundings", disable=None):
        stored = rounded(weights, matrices, embedding, args.keep)
        after = scores(cfg, restored(stored), args.window, device)
        gaps = {f"{k}_gap": None if v is None else v - (floats[k] or 0.0) for k, v in after.items()}
        count = sum(q.numel() for q, scale in stored.values() if scale is not None)
        row = {"levels": matrices, "embedding": embedding, "integers": count}
        rows.append({**row, **gaps, **sizes(stored)})
    return {"floats": floats, "roundings": rows}


def measure(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Score unrounded weights and every rounding; gather bytes and errors."""
    cfg, weights, identity = checkpoint
    found, schemes = round_all(args, cfg, weights), []
    code = Path(tg.__file__).stat().st_size
    tg.KEEP_FLOAT_NUMEL = args.keep
    for name, scheme in tg.SCHEMES.items():
        stored = rounded_by(scheme, weights, args.keep)
        parts = {part: len(scheme.compress(data)) for part, data in raw_bytes(stored).items()}
        settings = dataclasses.asdict(dataclasses.replace(cfg, export_scheme=name))
        whole = len(tg.pack(weights, {"config": settings, **identity}, scheme, scheme.levels[0]))
        rest = whole - sum(parts.values())
        schemes.append({"scheme": name, "code": code, "model": whole, **parts, "rest": rest})
    return found | {"schemes": schemes, "tensors": errors(weights, args.keep)}


def errors(weights: Mapping[str, Tensor], keep: int) -> list[dict[str, Any]]:
    """Relative RMS error of every scheme, and bits per weight, tensor by tensor."""
    found = []
    for name, w in weights.items():
        line: dict[str, Any] = {"tensor": name, "shape": list(w.shape)}
        for kind, scheme in tg.SCHEMES.items():
            q, scale = rounded_by(scheme, {name: w}, keep)[name]
            error = restored({name: (q, scale)})[name] - w
            share = float(error.square().mean().sqrt() / w.square().mean().sqrt().clamp_min(1e-30))
            line[f"{kind} error"] = share
            line[f"{kind} bits"] = 16.0 if scale is None else entropy(q)
        found.append(line)
    return found


# ==============================================================================
# 3  TABLES
# ==============================================================================


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; UserError: the checkpoint cannot be measured."""
    check_outputs(args)
    checkpoint = load(args.checkpoint)
    cfg = checkpoint.cfg
    check_text(checkpoint, args.checkpoint)
    if cfg.diffusion and cfg.train_seq_len % args.window:
        rule = f"must divide the {cfg.train_seq_len} tokens of a row; choose another"
        fail(f"--window={args.window} {rule}")
    found = measure(args, checkpoint)
    write_result(args.out, found)
    exact, bound = (cell(found["floats"][name], 4) for name in ("val_bpb", "bound"))
    print(f"Unrounded: val_bpb {exact}, bound {bound}\n")
    for name, num_texts in (("roundings", 0), ("schemes", 1), ("tensors", 2)):
        print(table(found[name], num_texts, 4) + "\n")
    return {name: value for name, value in found.items() if name != "tensors"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
