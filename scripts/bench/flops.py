"""Floating-point operations of training, by the settings of a run."""

from __future__ import annotations

from train_gpt import Config


def flops_per_token(cfg: Config, size: int = 0) -> float:
    """Count floating-point operations of one training step per token of the batch, both passes.

    A weight takes 6 per token; attention 12 per layer, channel and key that is read, masked keys
    not counted (arXiv:2204.02311, appendix B). Windows of `size` tokens (0: none) ride on a share
    of the rows: S + 1 tokens each, once per pass, a third of that where a pass has no gradient.
    """
    dim, T = cfg.model_dim, cfg.train_seq_len
    kv_dim = dim // cfg.num_heads * cfg.num_kv_heads
    layer = 2 * dim * dim + 2 * dim * kv_dim + 2 * cfg.mlp_mult * dim * dim
    weights = cfg.num_layers * layer + cfg.vocab_size * dim
    key = 12 * cfg.num_layers * dim
    total = 6 * weights + key * (T + 1) / 2
    if size:
        own = (size + 2) / 2 if cfg.diffusion_causal else size + 1
        passes = cfg.diffusion_passes + (cfg.self_condition != "none") / 3
        next_visible_weights = dim * dim if cfg.look_ahead and not cfg.diffusion_causal else 0
        token = 6 * (weights + next_visible_weights) + key * ((T - size) / 2 + own)
        rows = cfg.train_batch_tokens // cfg.micro_batches // T
        row_share = max(round(rows * cfg.diffusion_row_frac), 1) / rows
        total += row_share * passes * (size + 1) / size * token
    return total
