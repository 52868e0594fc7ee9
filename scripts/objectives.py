"""Losses, noise and masks of windows that only recipes of the ladder use; train_gpt.py runs this file, beside itself.

A loss takes logits (..., V), the true tokens (...), the clean stream's logits (..., V) and the corrupted windows, and
returns nats of each token (...). LOSSES has the rows of train_gpt.LOSSES: that function, its weight by noise level t,
whether it is a mean by weight (or over all tokens), and whether tokens that were kept count where any may be wrong.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def score_entropy(logits: Tensor, x0: Tensor, *_: Any) -> Tensor:
    """Denoising score entropy of absorbing noise (SEDD, arXiv:2310.16834) times t, at masked tokens, nats. Logits are
    log scores up to log V. With scores exp(l_y) (1 - t) / t and true ratios [y = x0] (1 - t) / t, SEDD sums (sum_y
    exp(l_y) - l_x0 - 1) / t over t: least where exp(l) is the posterior, and then its cross-entropy over t."""
    log_score = logits - math.log(logits.shape[-1])  # zero logits are a normalised score, as the paper scales them
    return log_score.exp().sum(-1) - log_score.gather(-1, x0[..., None])[..., 0] - 1


def sedd_uniform(logits: Tensor, x0: Tensor, _: Tensor, noisy: Any) -> Tensor:
    """Denoising score entropy of uniform noise (SEDD, arXiv:2310.16834) times 1 - t, at every token, nats. p(y | x0) is
    (1 - t) [y = x0] + t / V (iid tokens), and sigma'(t) / V = 1 / ((1 - t) V) the rate of each change. Logits are those
    of x0 as everywhere, and score y by its p(y) / p(xt): the mean of p(y | x0) / p(xt | x0) over their softmax."""
    size, here, t = logits.shape[-1], noisy.xt[..., None], noisy.t[..., None, None]
    kept = 1 + (1 - t) * size / t  # how much likelier a token is to be kept than to come up by chance
    p = torch.stack((logits.softmax(-1), F.one_hot(x0, size).to(logits.dtype)))  # what is predicted, and what is true
    own = p.gather(-1, here.expand(2, *here.shape))
    score, true = (1 - own) + own / kept + p * (kept - 1)  # each term is at least 0; meaningless at y = xt
    entropy: Tensor = score - true + true * (true / score).log()
    return entropy.scatter(-1, here, 0.0).mean(-1)


def cross_entropy(logits: Tensor, x0: Tensor, *_: Any) -> Tensor:
    """Nats of each token, as train_gpt.token_nll: (..., V) and (...) to (...)."""
    return F.cross_entropy(logits.flatten(0, -2), x0.flatten(), reduction="none").view_as(x0)


def clean_divergence(logits: Tensor, x0: Tensor, clean_logits: Tensor, _: Any) -> Tensor:
    """KL divergence of a window from what the clean stream says of the same tokens, nats: (..., V) to (...)."""
    return F.kl_div(logits.log_softmax(-1), clean_logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)


LOSSES = {
    "middle": (cross_entropy, lambda t, _: (6 * t * (1 - t)).clamp_min(1e-3), True, False),  # middle levels count most
    "score_entropy": (score_entropy, lambda t, clip: (1 / t).clamp_max(clip), False, False),
    "sedd_uniform": (sedd_uniform, lambda t, clip: (1 / (1 - t)).clamp_max(clip), False, True),
    "consistency": (clean_divergence, lambda t, _: torch.ones_like(t), True, False),
}


def spans(u: Tensor, length: Tensor, i: Tensor, span: int) -> Tensor:
    """Mark runs at random places, as many as make up a length.

    Args:
        u: a draw in [0, 1) for each run, (B, W, n).
        length: tokens to mark, (B, W, 1); fewer where runs overlap or n is too small.
        i: places in the window, 0 .. S - 1.
        span: tokens of a run.
    """
    starts = (u * (len(i) - span + 1)).long()[..., None]
    wanted = torch.arange(u.shape[-1], device=u.device) * span < length
    return ((i >= starts) & (i < starts + span) & wanted[..., None]).any(dim=-2)


def gaussian(u: Tensor, size: int) -> Tensor:
    """Turn draws in [0, 1), (..., 2 * S * D), into standard normal numbers (..., S, D), after Box and Muller 1958."""
    u = u.view(*u.shape[:-1], size, -1, 2)
    return (-2 * torch.log1p(-u[..., 0])).sqrt() * torch.cos(2 * math.pi * u[..., 1])


def blur(emb: Tensor, ids: Tensor, noisy: Any, mask: int) -> tuple[Tensor, Tensor]:
    """Mix embeddings with Gaussian noise by the noise level of their window (arXiv:2205.14217).

    Args:
        emb: normalised embeddings of windows, the clean token before each included, (B, W, S + 1, D).
        ids: their tokens, (B, W, S + 1).
        noisy: train_gpt.Corruption (B, W, S), with noise.
        mask: the id of [MASK].

    Returns:
        The embeddings, blurred where corrupted, and the tokens, [MASK] there: a pair of tokens would tell them.
    """
    level, noise = noisy.t[..., None, None], F.pad(noisy.noise, (0, 0, 1, 0))
    mixed = (1 - level).sqrt() * emb + level.sqrt() * noise
    corrupted = F.pad(noisy.corrupted, (1, 0))
    blurred = torch.where(corrupted[..., None], F.rms_norm(mixed, mixed.shape[-1:]), emb)
    return blurred, ids.masked_fill(corrupted, mask)


def anneal(both: Tensor, share: float, seed: int, step: int, size: int) -> Tensor:
    """Open each pair of a query and a later key of its window with a chance that goes from 0 to 1 (arXiv:2410.17891).

    Args:
        both: which keys each query reads in the end, (queries, clean keys + queries) bool.
        share: the chance, in [0, 1).
        seed: of the run; the draw depends on it and on the next two.
        step: of the run.
        size: of the windows, tokens.
    """
    noisy, keys = (torch.arange(n) for n in both.shape)
    earlier = keys - (len(keys) - len(noisy)) <= noisy[:, None]
    own_seed = random.Random(f"anneal {seed} {step} {size}").randrange(1 << 31)
    generator = torch.Generator().manual_seed(own_seed)
    return both & (earlier | (torch.rand(both.shape, generator=generator) < share)).to(both.device)


def expected_embedding(model: Any, logits: Tensor) -> Tensor:
    """Mean normalised embedding under a prediction, (..., V) to (..., D): soft self-conditioning's input."""
    table = model.tok_emb
    return logits.softmax(-1).to(table.dtype) @ F.rms_norm(table, table.shape[-1:])


def unroll(
    objective: Any,
    window: Any,
    past: Any,
    keys: Tensor,
    uniform: Callable[[Tensor, int], Tensor],
    derive: Callable[..., Tensor],
) -> list[Tensor]:
    """Take passes over windows, each of which reads what the last one predicted: logits (B, W, S, V) of those that
    carry loss, DIFFUSION_PASSES. With self-conditioning (arXiv:2208.04202) one more comes first, without gradient.

    Args:
        objective: train_gpt.Objective.
        window: train_gpt.Window (B, W, S) that the first pass reads.
        past: clean keys and values.
        keys: of the windows' randomness, (B, W).
        uniform: train_gpt.uniform.
        derive: train_gpt.derive.
    """
    cfg, found = objective.cfg, []
    for i in range(0 if cfg.self_condition == "none" else -1, cfg.diffusion_passes):
        with torch.set_grad_enabled(i >= 0):
            logits = objective.window(window, past)
        found += [logits] * (i >= 0)
        if i + 1 < cfg.diffusion_passes:
            size = window.noisy.xt.shape[-1]
            u, v = (uniform(derive(keys, 8 + i, part), n) for part, n in ((1, 1), (2, size)))
            window = feed_back(objective.model, window, logits.detach(), u, v)
    return found


def feed_back(model: Any, window: Any, logits: Tensor, u: Tensor, v: Tensor) -> Any:
    """Give a pass's prediction to the next: expected embeddings (soft), or tokens for corrupted ones (commit).

    Args:
        model: train_gpt.GPT.
        window: train_gpt.Window (B, W, S) that the pass read.
        logits: what it predicted, (B, W, S, V), without gradient.
        u: draws in [0, 1), (B, W, 1), of which windows get it.
        v: draws in [0, 1), (B, W, S), of which corrupted tokens do (commit).
    """
    cfg, noisy = model.cfg, window.noisy
    chosen = u < (1.0 if cfg.self_condition == "none" else cfg.mercury_self_condition_prob)
    if cfg.self_condition == "soft":
        return window._replace(previous=expected_embedding(model, logits) * chosen[..., None])
    hit = chosen & (v < cfg.mercury_self_condition_fraction) & noisy.corrupted
    return window._replace(noisy=noisy._replace(xt=torch.where(hit, logits.argmax(-1), noisy.xt)))
