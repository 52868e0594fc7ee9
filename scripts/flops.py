"""How many floating-point operations training takes, how many a device could do (what MFU in the logs is made of), and
what it is called.

train_gpt.py runs this file, beside itself; bench_train.py reads it, too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import Any

import torch

# Dense bf16 operations a second with fp32 sums, from the makers' data sheets, by a part of the device's name.
PEAKS = {
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
}


def per_token(cfg: Any, size: int = 0) -> float:
    """Count operations of one training step a token of the batch, forward and backward.

    A matrix takes 6 a weight and token, attention 12 a layer, channel and key that is read (arXiv:2204.02311, appendix
    B, but keys that a mask hides do not count). Windows ride on DIFFUSION_ROW_FRAC of the rows: S + 1 tokens each, once
    for every pass, a third of that where a pass has no gradient.

    Args:
        cfg: train_gpt.Config.
        size: tokens S of the windows; 0: the clean stream alone.
    """
    dim, kv, T = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.train_seq_len
    layer = 2 * dim * dim + 2 * dim * kv + 2 * cfg.mlp_mult * dim * dim
    weights, key = cfg.num_layers * layer + cfg.vocab_size * dim, 12 * cfg.num_layers * dim
    total: float = 6 * weights + key * (T + 1) / 2
    if size:
        own = (size + 2) / 2 if cfg.diffusion_causal else size + 1
        passes = cfg.diffusion_passes + (cfg.self_condition != "none") / 3
        ahead = dim * dim if cfg.look_ahead and not cfg.diffusion_causal else 0
        token = 6 * (weights + ahead) + key * ((T - size) / 2 + own)
        rows = cfg.train_batch_tokens // cfg.micro_batches // T  # of a part, some of which carry windows
        share = max(round(rows * cfg.diffusion_row_frac), 1) / rows
        total += share * passes * (size + 1) / size * token
    return total


def machine(device: str) -> str:
    """Name a GPU, or the processor with its number of cores: `AMD EPYC, 2 cores`."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = os.uname().machine
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    return f"{name}, {os.cpu_count()} cores"


@functools.cache
def peak(device: str) -> float:
    """Say how many operations a second a device does at best: a GPU by its data sheet (NaN if it is not listed), a CPU
    by what an fp32 matrix product of 512 rows and columns reaches here, the best of 9."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        return next((value for part, value in PEAKS.items() if part in name), float("nan"))
    a, best = torch.ones(512, 512), float("inf")
    for _ in range(9):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * 512**3 / best
