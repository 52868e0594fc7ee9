"""scripts/bench/flops.py: FLOPs of a step are those that a profiler counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg
from scripts.bench.flops import flops_per_token
from tests.conftest import CPU, make_run, random_rows, tiny


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 4, 16])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"diffusion_passes": 2},
        {"self_condition": "commit"},
        {"look_ahead": 0},
        {"diffusion_causal": True},
        {"diffusion_row_frac": 0.5},
        {"diffusion_row_frac": 0.01},
    ],
)
def test_flops_are_those_that_a_profiler_counts(size: int, overrides: dict[str, Any]) -> None:
    cfg = tiny(time_embed_dim=0, train_batch_tokens=128, **overrides)  # 4 rows a part
    objective = tg.Objective(cfg, make_run(cfg), tg.GPT(cfg))
    rows = random_rows(4, 17, 64)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        objective(rows, 0, size, tg.ScheduleState(0, 1.0, 1.0))[0].backward()  # type: ignore[no-untyped-call]
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "bmm" in str(op))
    # It counts every pair of query and key, and of those only the ones that a mask leaves are work.
    T, layer = 16, 12 * cfg.num_layers * cfg.model_dim
    carried = {1.0: 1, 0.5: 0.5, 0.01: 0.25}[cfg.diffusion_row_frac]
    passes = carried * (cfg.diffusion_passes + (cfg.self_condition != "none") / 3)
    mask = tg.window_mask(T, size or T, cfg.diffusion_causal, CPU)
    split = sum(part.numel() for part in tg.split_mask(mask, size)) if size else 0
    dense = layer * (T * T + passes * split)
    unmasked = mask.sum().item() if size else 0
    read = layer * (T * (T + 1) / 2 + passes * unmasked)
    assert attention == pytest.approx(4 * dense, rel=1e-6)
    expected = (counter.get_total_flops() - attention) / 4 + read
    assert flops_per_token(cfg, size) * T == pytest.approx(expected, rel=1e-6)
