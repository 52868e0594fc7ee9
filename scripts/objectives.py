"""Losses and masks of windows that only recipes of the ladder use; train_gpt.py runs this file, beside itself.

A loss takes logits (..., V), the true tokens (...), the clean stream's logits (..., V) and the corrupted windows, and
returns nats of each token (...). LOSSES has the rows of train_gpt.LOSSES: that function, its weight by noise level t,
whether it is a mean by weight (or over all tokens), and whether tokens that were kept count where any may be wrong.
"""

from __future__ import annotations

import math
import random
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


def clean_divergence(logits: Tensor, x0: Tensor, clean_logits: Tensor, _: Any) -> Tensor:
    """KL divergence of a window from what the clean stream says of the same tokens, nats: (..., V) to (...)."""
    return F.kl_div(logits.log_softmax(-1), clean_logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)


LOSSES = {
    "score_entropy": (score_entropy, lambda t, clip: (1 / t).clamp_max(clip), False, False),
    "sedd_uniform": (sedd_uniform, lambda t, clip: (1 / (1 - t)).clamp_max(clip), False, True),
    "consistency": (clean_divergence, lambda t, _: torch.ones_like(t), True, False),
}


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
