"""Wrong likelihood estimators that others reported, on our model: how far below the bound is each?

`ESTIMATORS` maps a name to a function of a `Text` (model, byte counter, rows, keys, samples) that
returns an `Estimate`, which `summarise` turns into bits per byte. `right` is the bound of
train_gpt, over the same windows of S tokens. Numbers with # are pull requests of
github.com/openai/parameter-golf; "none known" marks a mistake that isolates one aspect.

A uniform predictor must score log2(V) / (bytes per token), called 1 below. What it scores here is
stated with each function: where that is 1, the check cannot expose the mistake.

B rows, T tokens per row, W windows per row, S tokens per window, K samples; nats are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import train_gpt as tg

GUESSED_BYTES_PER_TOKEN = 4.3  # found in two programs; the challenge's validation text has 2.4359
RECONSTRUCTION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of #1596


class Text(NamedTuple):
    """Rows of text, split into windows, and all that an estimator needs; made by `prepare`."""

    model: tg.GPT
    counter: tg.ByteCounter
    rows: Tensor  # (B, T + 1) int64
    keys: Tensor  # (B, W) int64, the randomness of each window
    samples: int  # K
    windows: Tensor  # (B, W, S + 1) int64, each after the clean token before it
    positions: Tensor  # (N,) int64, of the windows' tokens
    mask: Tensor  # (N, T + N) bool, N = W (S + 1)
    cache: tg.Cache
    bytes: Tensor  # (B,) float64, as the challenge counts them

    @property
    def x0(self) -> Tensor:
        """Clean tokens of the windows, (B, W, S)."""
        return self.windows[..., 1:]

    @property
    def size(self) -> int:
        return self.x0.shape[-1]


class Estimate(NamedTuple):
    """Sums over each row, so that batches of rows can be joined."""

    nats: Tensor  # (K, B)
    bytes: Tensor  # (B,), or (K, B) where it depends on the sample


@torch.no_grad()
def prepare(
    model: tg.GPT, counter: tg.ByteCounter, rows: Tensor, keys: Tensor, samples: int
) -> Text:
    """Split rows (B, T + 1) into the W windows that keys (B, W) are for."""
    seq_len = rows.shape[1] - 1
    size = seq_len // keys.shape[1]
    mask = tg.window_mask(seq_len, size, model.cfg.diffusion_causal, rows.device)
    windows, positions = tg.split_into_windows(rows, size)
    cache = model.forward_causal(rows[:, :-1])[1]
    here = rows.cpu()
    counted = counter.count(here[:, :-1], here[:, 1:]).sum(-1)
    num_bytes = counted.double().to(rows.device)
    return Text(model, counter, rows, keys, samples, windows, positions, mask, cache, num_bytes)


def summarise(parts: Sequence[Estimate]) -> tuple[float, float]:
    """Join batches; return bits per byte and their Monte Carlo standard error.

    The error is 0 where nothing is drawn. It takes samples as independent; they are stratified, so
    it is a little too large.
    """
    nats = torch.cat([part.nats for part in parts], dim=1).cpu()  # (K, N)
    num_bytes = torch.cat([part.bytes.expand_as(part.nats) for part in parts], dim=1).cpu()
    sum_nats, sum_bytes = nats.mean(0).sum().item(), num_bytes.mean(0).sum().item()
    residual = nats - sum_nats / sum_bytes * num_bytes  # first order of a ratio of sums
    spread = residual.var(dim=0).sum().item() / len(nats) if len(nats) > 1 else 0.0
    return tg.bits_per_byte(sum_nats, sum_bytes), tg.bits_per_byte(spread**0.5, sum_bytes)


# ==============================================================================
# 1  PARTS -- windows with given tokens masked, and how they are drawn
# ==============================================================================


def window_nats(text: Text, masked: Tensor, sample: int = 0) -> Tensor:
    """Nats of all tokens of all windows where `masked` ones are [MASK], both (B, W, S)."""
    x0, t = text.x0, masked.float().mean(-1).clamp_min(1e-6)
    keys = tg.split_key(text.keys, 3, sample)
    noisy = tg.apply_noise(x0, masked, t, keys, text.model.cfg, 1.0)
    window = tg.WindowInput(text.windows[..., :1], noisy, text.positions, text.mask)
    logits = text.model.forward_denoise(window, text.cache)
    return tg.token_nll(logits, x0).double()


class Draw(NamedTuple):
    """Tokens that one sample masks."""

    sample: int
    masked: Tensor  # (B, W, S) bool
    weight: Tensor  # (B, W, 1): 1 / (share that is masked)


def by_count(text: Text, most: int = 0) -> Iterator[Draw]:
    """Mask m of S tokens, m uniform in 1..S (or 1..most), as train_gpt.window_bounds draws them."""
    top = most or text.size
    start = tg.random_uniform(tg.split_key(text.keys, 1), 1)
    for k in range(text.samples):
        m = (((start + k / text.samples) % 1.0) * top).long().clamp(max=top - 1) + 1
        draws = tg.random_uniform(tg.split_key(text.keys, 2, k), text.size)
        order = draws.argsort(dim=-1).argsort(dim=-1)
        yield Draw(k, order < m, text.size / m)


def by_level(text: Text, low: float, high: float) -> Iterator[Draw]:
    """Draw t uniformly in (low, high], then mask each token with probability t; the weight is 1/t.

    Over (0, 1] this has the mean of `by_count` (arXiv:2406.07524): each number of masked tokens is
    then equally probable.
    """
    start = tg.random_uniform(tg.split_key(text.keys, 1), 1)
    for k in range(text.samples):
        t = high - (high - low) * ((start + k / text.samples) % 1.0)
        draws = tg.random_uniform(tg.split_key(text.keys, 2, k), text.size)
        yield Draw(k, draws < t, 1 / t)


def unweighted(drawn: Iterable[Draw]) -> Iterator[Draw]:
    """Give each masked token weight 1."""
    return (d._replace(weight=torch.ones_like(d.weight)) for d in drawn)


def weighted(text: Text, drawn: Iterable[Draw]) -> Tensor:
    """Weighted sum of the masked tokens' nats of a row, (K, B)."""
    sums = []
    for d in drawn:
        nats = window_nats(text, d.masked, d.sample)
        sums.append((nats * d.masked * d.weight).sum((-2, -1)))
    return torch.stack(sums)


# ==============================================================================
# 2  ESTIMATORS -- the right one, then the wrong ones by what is wrong
# ==============================================================================


def right(text: Text) -> Estimate:
    """Estimate the bound of train_gpt: all noise levels, full weight, real bytes. Uniform: 1."""
    nats = tg.window_bounds(text.model, text.rows, text.keys, text.size, text.samples, text.mask)
    return Estimate(nats.sum(-1), text.bytes)


def bytes_constant(text: Text) -> Estimate:
    """Divide by 4.3 bytes per token instead of counting them (#1106, #1241).

    Uniform: bytes per token / 4.3.
    """
    num_bytes = GUESSED_BYTES_PER_TOKEN * (text.rows.shape[1] - 1)
    return Estimate(right(text).nats, torch.full_like(text.bytes, num_bytes))


def bytes_space_twice(text: Text) -> Estimate:
    """Count a leading space in the piece and once more after it (issue #1719).

    In #1545, #1576, #1632, #1672 and #1734. Uniform: bytes / (bytes + pieces with a leading space).
    """
    extra = text.counter.opens[text.rows[:, 1:].cpu()].sum(-1)
    return Estimate(right(text).nats, text.bytes + extra.to(text.bytes))


def bytes_of_names(text: Text) -> Estimate:
    """Count a byte token as the 6 of its name `<0x0A>`, a control token as its name (#1053).

    Uniform: bytes / (bytes + the rest of these names).
    """
    sp = text.counter.tokenizer
    lengths = torch.zeros_like(text.counter.base_bytes)
    for i in range(sp.vocab_size()):
        if sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i):
            lengths[i] = len(sp.id_to_piece(i).encode())
    extra = (lengths - text.counter.base_bytes).clamp_min(0)[text.rows[:, 1:].cpu()].sum(-1)
    return Estimate(right(text).nats, text.bytes + extra.to(text.bytes))


def range_truncated(text: Text) -> Estimate:
    """Integrate over t in [0.05, 0.95] and omit the rest, with its hardest end (#1403, #1582).

    They use the trapezoid rule on a grid; here t is drawn. Uniform: 0.9.
    """
    return Estimate(0.9 * weighted(text, by_level(text, 0.05, 0.95)), text.bytes)


def range_clipped(text: Text) -> Estimate:
    """Average over t in [0.3, 0.8], a training range of BD3-LM (arXiv:2503.09573). Uniform: 1."""
    return Estimate(weighted(text, by_level(text, 0.3, 0.8)), text.bytes)


def range_low_noise(text: Text) -> Estimate:
    """Average over t up to 0.5: at most half of a window is masked (none known). Uniform: 1."""
    return Estimate(weighted(text, by_count(text, max(text.size // 2, 1))), text.bytes)


def weight_pooled(text: Text) -> Estimate:
    """Average over all masked tokens of a batch with mixed t, without 1/t.

    Windows with more of them count more: the training loss of masked language models. #2079 and
    #2096 print it, for one random t, as their score. It is too high. Uniform: 1.
    """
    drawn, per_token = list(by_count(text)), text.bytes.sum() / text.x0.numel()
    counts = torch.stack([d.masked.sum((-2, -1)) for d in drawn])
    return Estimate(weighted(text, unweighted(drawn)), counts * per_token)


def weight_none(text: Text) -> Estimate:
    """Sum the masked tokens' nats without 1/t, and divide by all bytes (none known).

    Uniform: (S + 1) / 2S.
    """
    return Estimate(weighted(text, unweighted(by_count(text))), text.bytes)


def weight_twice(text: Text) -> Estimate:
    """Weight the mean over masked tokens, which has its 1/t, by 1/t again, at five levels (#1596).

    It is too high. Uniform: the mean of 1/t, 3.575.
    """
    copies, total = max(text.samples // len(RECONSTRUCTION_LEVELS), 2), torch.zeros(())
    some = text._replace(samples=copies)
    for t in RECONSTRUCTION_LEVELS:
        total = total + weighted(some, by_level(some, t, t)) / t
    return Estimate(total / len(RECONSTRUCTION_LEVELS), text.bytes)


def boundaries_free(text: Text) -> Estimate:
    """Never mask tokens that stand for no text, such as the start of a document (#1241).

    They cost nothing then. Uniform: the share of tokens that stand for text.
    """
    silent = (text.counter.base_bytes == 0) & ~text.counter.opens
    x0 = text.x0
    scored = ~silent.to(x0.device)[x0]
    drawn = (d._replace(masked=d.masked & scored) for d in by_count(text))
    return Estimate(weighted(text, drawn), text.bytes)


def circular_two_pass(text: Text) -> Estimate:
    """Score even tokens given all before them, odd ones given the even ones around them (#1255).

    Each half reads the other as known, so no decoder can invert it. The even half here is denoised
    left to right, at S = 1, which alone would be exact. Uniform: 1.
    """
    seq_len, place = text.rows.shape[1] - 1, torch.arange(text.size, device=text.rows.device)
    shape = text.x0.shape
    odd = (place % 2 == 1).expand(shape)
    single = tg.window_mask(seq_len, 1, text.model.cfg.diffusion_causal, text.rows.device)
    keys = tg.split_key(text.keys[:, :1], 5, torch.arange(seq_len, device=text.rows.device))
    left = tg.window_bounds(text.model, text.rows, keys, 1, 1, single)[0].view(shape)
    return Estimate(torch.where(odd, window_nats(text, odd), left).sum((-2, -1))[None], text.bytes)


def late_mask(text: Text) -> Tensor:
    """Return the windows' mask with clean keys up to the end of the window, not its beginning."""
    window = torch.arange(len(text.mask), device=text.mask.device)[:, None] // (text.size + 1)
    key = torch.arange(text.mask.shape[1], device=text.mask.device)
    clean = key < text.rows.shape[1] - 1
    return text.mask | (clean & (key < (window + 1) * text.size))


def circular_late_keys(text: Text) -> Estimate:
    """Let a window read the clean keys of its own tokens, a mask off by one window (none known).

    Uniform: 1.
    """
    return right(text._replace(mask=late_mask(text)))


def circular_misaligned(text: Text) -> Estimate:
    """Score the token after each masked one, mostly visible: masks x_i, predicts x_{i+1}.

    #1119 pairs them so, and is exact because its attention is causal; windows read both ways.
    Uniform: 1.
    """
    sums = []
    for d in by_count(text):
        nats, after = window_nats(text, d.masked, d.sample), d.masked.roll(1, dims=-1)
        sums.append((nats * after * d.weight).sum((-2, -1)))
    return Estimate(torch.stack(sums), text.bytes)


def pseudo_half(text: Text) -> Estimate:
    """Take the mean at a mask rate of 50 %, with text on both sides (#1053). Uniform: 1."""
    return Estimate(weighted(text, by_level(text, 0.5, 0.5)), text.bytes)


def pseudo_bert(text: Text) -> Estimate:
    """Take BERT's training loss, at a mask rate of 15 % (arXiv:1810.04805). Uniform: 1."""
    return Estimate(weighted(text, by_level(text, 0.15, 0.15)), text.bytes)


def pseudo_one(text: Text) -> Estimate:
    """Score each token given all others, the pseudo-log-likelihood of arXiv:1910.14659.

    All S tokens are scored if K allows, otherwise K different ones of each window. Uniform: 1.
    """
    rank = tg.random_uniform(tg.split_key(text.keys, 6), text.size).argsort(-1).argsort(-1)
    num, sums = min(text.samples, text.size), []
    for k in range(num):
        nats = window_nats(text, rank == k, k) * (rank == k)
        sums.append(nats.sum((-2, -1)) * text.size)
    nats = torch.stack(sums)
    return Estimate(nats.mean(0, keepdim=True) if num == text.size else nats, text.bytes)


class Wrong(NamedTuple):
    """One mistake: how it is made, who made it, and its effect."""

    estimate: Callable[[Text], Estimate]
    source: str
    # Below the bound, for a model that predicts better the more it reads? None: it depends.
    flatters: bool | None
    exposed: bool  # a uniform predictor does not score log2(V) / (bytes per token)


# Two depend on how the loss rises with noise: if it is convex, a middle level is below the mean.
# A leak that was never trained on helps only a model that happens to read there.
# fmt: off
ESTIMATORS: dict[str, Wrong] = {
    # Where tokens are shorter than 4.3 bytes.
    "bytes_constant": Wrong(bytes_constant, "#1106, #1241", True, True),
    "bytes_space_twice": Wrong(bytes_space_twice, "#1545, #1576, #1632, #1672, #1734", True, True),
    "bytes_of_names": Wrong(bytes_of_names, "#1053", True, True),
    "range_truncated": Wrong(range_truncated, "#1403, #1582", True, True),
    "range_clipped": Wrong(range_clipped, "training range of arXiv:2503.09573", None, False),
    "range_low_noise": Wrong(range_low_noise, "none known", True, False),
    "weight_pooled": Wrong(weight_pooled, "#2079, #2096", False, False),
    "weight_none": Wrong(weight_none, "none known", True, True),
    "weight_twice": Wrong(weight_twice, "#1596", False, True),
    "boundaries_free": Wrong(boundaries_free, "#1241", True, True),
    "circular_two_pass": Wrong(circular_two_pass, "#1255", True, False),
    "circular_late_keys": Wrong(circular_late_keys, "none known", True, False),
    "circular_misaligned": Wrong(circular_misaligned, "pairing of #1119", None, False),
    "pseudo_half": Wrong(pseudo_half, "#1053", None, False),
    "pseudo_bert": Wrong(pseudo_bert, "loss of arXiv:1810.04805", True, False),
    "pseudo_one": Wrong(pseudo_one, "arXiv:1910.14659", True, False),
}
# fmt: on
