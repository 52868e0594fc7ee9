"""How many floating-point operations training takes, and how many a device could do: what MFU in the logs is made of.

train_gpt.py runs this file, beside itself; bench_train.py reads it, too.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

# Dense bf16 operations a second with fp32 sums, from the makers' data sheets, by a part of the device's name.
PEAKS = {
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
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
        total += cfg.diffusion_row_frac * passes * (size + 1) / size * token
    return total


@functools.cache
def peak(device: str) -> float:
    """Say how many operations a second a device does at best: its data sheet's, or of one not listed what a matrix
    product of 512 rows and columns in fp32 reaches, the best of 9."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    for part, value in PEAKS.items():
        if part in name:
            return value
    a, best = torch.ones(512, 512, device=device), float("inf")
    for _ in range(9):
        torch.get_device_module(device).synchronize()
        began = time.perf_counter()
        torch.mm(a, a)
        torch.get_device_module(device).synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 512**3 / best
