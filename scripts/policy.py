"""Decode in modes that have names; watch it, fall back where it is bad, and choose the mode that
meets a target.

    edit(model, ids, start, stop)                    low-probability tokens are remasked
    guard(model, ids, start, stop, MODES["block"])   rows outside the limits get those of mode ar
    choose(model, ids, start, stop, seconds=0.5)     the best mode within half a second a call
    choose(model, ids, start, stop, nats=3.0)        the fastest mode that reaches 3 nats a token

Likelihood alone cannot judge decoded text: it is highest where text repeats itself
(arXiv:1904.09751), and a row of one token may be the likeliest of all. `Limits.repeat` catches
loops, `entropy` and `distinct` what keeps to a few tokens without one; `repeat` and `entropy` each
refuse a row of one token. `choose` counts rows that one of the three refuses at log V nats a token,
those of a uniform guess, so that no mode wins by repeating.

Everything runs under the caller's autocast and on the device of `ids`.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from train_gpt import AR, GPT, Decoded, Decoding, UserError, decode, score


def look_up(x: Tensor, done: Tensor, count: int, n: int) -> tuple[Tensor, Tensor]:
    """Find where each row's last n tokens stood before, most recently: what followed (B, count),
    over and over at the end; whether there is such a place (B, 1). Source: Saxena 2023,
    github.com/apoorvumang/prompt-lookup-decoding.
    """
    last = x.gather(1, (done - n).clamp(min=0) + torch.arange(n, device=x.device))
    after = torch.arange(n, x.shape[1] + 1, device=x.device)  # the place after each run of n tokens
    same = (x.unfold(1, n, 1) == last[:, None]).all(-1) & (after < done) & (n > 0)
    source = (same * after).amax(1, keepdim=True)
    return x.gather(
        1, source + torch.arange(count, device=x.device) % (done - source).clamp(min=1)
    ), source > 0


MODES = {  # ways to decode, by name
    "ar": AR,
    "refine": Decoding(),
    "refine_cached": Decoding(reuse=True),
    "block": Decoding(window=8, steps=4),
    "threshold": Decoding(window=8, threshold=0.9),
    "remask": Decoding(window=8, steps=4, redo=0.02),
    "draft_refine": Decoding(draft="ar", redo=0.02),
    "speculative": Decoding(window=4, verify=True, propose=functools.partial(look_up, n=2)),
}

PASSES, THRESHOLDS = (1, 2, 4, 8, 12, 20, 30), (0.5, 0.7, 0.9)
TIMED = 3  # calls whose median counts, after one that does not
# Settings of Decoding that no mode changes.
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "end",
)


class Quality(NamedTuple):
    """What decoded rows are like, (B,) each; what follows a row's end does not count."""

    nats: (
        Tensor  # mean nats a token under the clean stream of the same weights: no independent judge
    )
    entropy: Tensor  # bits, of the row's own token frequencies
    distinct: Tensor  # share of different pairs among neighbouring pairs; 1 where there is no pair
    repeat: Tensor  # share of tokens inside the longest loop
    tokens: Tensor  # number of tokens


class Limits(NamedTuple):
    """What a good row keeps to. Of 1,000 true spans of 64 tokens 3 of English and 29 of Python do
    not, most by nats.
    """

    nats: float = 0.75  # most, as a share of log V: the nats of a uniform guess
    entropy: float = 0.5  # least, as a share of log2(min(tokens, V)), the most there can be
    distinct: float = 0.4  # least
    repeat: float = 0.5  # most


LIMITS = Limits()
Target = float | None


class Guarded(NamedTuple):
    decoded: Decoded  # a row that fell back counts the passes of both decodings
    fell_back: Tensor  # (B,) bool
    quality: Quality  # of what is returned; a row that fell back is not judged again


class Measured(NamedTuple):
    mode: str  # row of MODES that `how` comes from
    how: Decoding
    seconds: float  # a call
    nats: float  # a token; repetitive rows count as log V
    repetitive: float  # share of such rows

    def __str__(self) -> str:
        at = {
            "refine": f" in {self.how.steps} passes",
            "threshold": f" {self.how.threshold:g}",
        }.get(self.mode, "")
        return f"{self.mode}{at}: {self.seconds:.4g} s, {self.nats:.4f} nats a token"


class Choice(NamedTuple):
    how: Decoding
    mode: str
    seconds: float
    nats: float
    table: list[Measured]


def edit(
    model: GPT, ids: Tensor, start: int, stop: int, how: Decoding = MODES["draft_refine"]
) -> Decoded:
    """Revise tokens [start, stop) of rows (B, L): those less probable than `redo` are filled in
    from both sides.
    """
    return decode(model, ids, start, stop, how._replace(draft="given"))


def compiled(model: GPT) -> GPT:
    """Compile what a decoding pass computes, in place. Shapes are left open, since they differ from
    pass to pass: the first passes compile, which takes a minute, and later ones launch fewer
    kernels.
    """
    model.trunk = torch.compile(model.trunk, dynamic=True)  # type: ignore[method-assign]
    return model


def entropy(tokens: Sequence[int]) -> float:
    """Bits of the empirical distribution of tokens."""
    return sum(-n / len(tokens) * math.log2(n / len(tokens)) for n in Counter(tokens).values())


def distinct(tokens: Sequence[int]) -> float:
    """Share of different pairs among neighbouring pairs (distinct-2, arXiv:1510.03055)."""
    pairs = list(itertools.pairwise(tokens))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def repeat(tokens: Sequence[int]) -> float:
    """Share of tokens in the longest run that repeats a period of 1 to 8 tokens, twice in full at
    least.
    """
    longest = 0
    for period in range(1, 9):
        run = 0  # tokens in a row that equal the one a period before
        for before, token in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if token == before else 0
            longest = max(longest, run + period if run >= period else 0)
    return longest / max(len(tokens), 1)


def quality(model: GPT, ids: Tensor, start: int, stop: int, end: int = -1) -> Quality:
    """Describe tokens [start, stop) of rows (B, L), up to and with the first `end`."""
    nats, span = score(model, ids[:, :stop])[:, start - 1 :].double(), ids[:, start:stop]
    counts = (span == end).cumsum(1) - (span == end).long() == 0  # (B, n), up to the first end
    tokens = counts.sum(1)
    rows = [row[:n] for row, n in zip(span.tolist(), tokens.tolist(), strict=True)]
    bits, pairs, loops = (
        nats.new_tensor([of(row) for row in rows]) for of in (entropy, distinct, repeat)
    )
    return Quality((nats * counts).sum(1) / tokens.clamp(min=1), bits, pairs, loops, tokens)


def judge(found: Quality, vocab_size: int, limits: Limits = LIMITS) -> tuple[Tensor, Tensor]:
    """Which rows repeat themselves too much, and which are outside any limit, as NaN nats are: (B,)
    bool each.
    """
    least = limits.entropy * found.tokens.clamp(1, vocab_size).double().log2()
    repetitive = (
        (found.entropy < least)
        | (found.distinct < limits.distinct)
        | (found.repeat > limits.repeat)
    )
    return repetitive, repetitive | ~(found.nats <= limits.nats * math.log(vocab_size))


def with_sampling(how: Decoding, like: Decoding) -> Decoding:
    return how._replace(**{name: getattr(like, name) for name in SAMPLING})


def guard(
    model: GPT, ids: Tensor, start: int, stop: int, how: Decoding, limits: Limits = LIMITS
) -> Guarded:
    """Decode tokens [start, stop) of rows (B, L); rows outside the limits get mode ar's tokens.
    Noise depends on a row's place in the batch, so ar decodes the whole batch and rows are picked
    from that: each is bit for bit what ar gives it, whatever becomes of the others. Mode ar and
    what it verifies have nothing to fall back on.
    """
    decoded = decode(model, ids, start, stop, how)
    found = quality(model, decoded.ids, start, stop, how.end)
    bad = judge(found, model.cfg.vocab_size, limits)[1] & (not how.verify and how.window > 0)
    if bool(bad.any()):
        plain, rows = decode(model, ids, start, stop, with_sampling(AR, how)), bad[:, None]
        merged = torch.where(rows, plain.ids, decoded.ids)
        decoded = Decoded(merged, decoded.forwards + rows * plain.forwards)
        found = quality(model, merged, start, stop, how.end)
    return Guarded(decoded, bad, found)


def candidates(
    denoiser: bool, suffix: bool, span: int, like: Decoding = AR
) -> list[tuple[str, Decoding]]:
    """List settings to try: no windows without a denoiser; with text after the span, only what
    reads it.
    """
    rows = list[tuple[str, Decoding]]()
    if not suffix:
        speculative = MODES["speculative"]  # without a denoiser it proposes what it looks up
        rows += [
            ("ar", AR),
            ("speculative", speculative if denoiser else speculative._replace(window=0)),
        ]
    if denoiser:
        few = [steps for steps in PASSES if steps <= span]
        rows += [
            (mode, MODES[mode]._replace(steps=n))
            for mode in ("refine", "refine_cached")
            for n in few
        ]
        rows += [("threshold", MODES["threshold"]._replace(threshold=p)) for p in THRESHOLDS]
        rows += [(mode, MODES[mode]) for mode in ("block", "remask", "draft_refine")]
    return [(mode, with_sampling(how, like)) for mode, how in rows]


def measure(model: GPT, ids: Tensor, start: int, stop: int, mode: str, how: Decoding) -> Measured:
    seconds, out = list[float](), ids
    for _ in range(1 + TIMED):
        began = time.perf_counter()
        out = decode(model, ids, start, stop, how).ids
        int(out.sum())  # waits for the device
        seconds.append(time.perf_counter() - began)
    found, vocab_size = quality(model, out, start, stop, how.end), model.cfg.vocab_size
    bad = judge(found, vocab_size)[0]
    nats = found.nats.masked_fill(bad, math.log(vocab_size)).mean().item()
    return Measured(mode, how, statistics.median(seconds[1:]), nats, bad.double().mean().item())


def select(table: Sequence[Measured], seconds: Target = None, nats: Target = None) -> Measured:
    """Pick the likeliest candidate within `seconds` a call, or the fastest within `nats` a token;
    UserError: none.
    """
    most_of, least_of, most = (
        ("nats", "seconds", nats) if seconds is None else ("seconds", "nats", seconds)
    )
    fits = [row for row in table if getattr(row, most_of) <= most]
    if not fits:
        raise UserError(
            f"no mode keeps to {most_of}={most}; the closest is "
            f"{min(table, key=attrgetter(most_of))}"
        )
    return min(fits, key=attrgetter(least_of, most_of))


def choose(
    model: GPT,
    ids: Tensor,
    start: int,
    stop: int,
    *,
    seconds: Target = None,
    nats: Target = None,
    like: Decoding = AR,
) -> Choice:
    """Mode `auto`: try every candidate on rows (B, L), with the sampling settings of `like`, and
    `select`. UserError: not exactly one target, none meets it, nothing to decode, or no mode that
    can read the rows.
    """
    if (seconds is None) == (nats is None):
        raise UserError(f"seconds={seconds}, nats={nats}: give exactly one of the two targets")
    found = candidates(model.mask_emb is not None, stop < ids.shape[1], stop - start, like)
    if not found or not len(ids) or start >= stop:
        raise UserError(
            f"span {start}..{stop} of {len(ids)} rows is empty, or text after it needs a denoiser"
        )
    table = [measure(model, ids, start, stop, mode, how) for mode, how in found]
    best = select(table, seconds, nats)
    return Choice(best.how, best.mode, best.seconds, best.nats, table)
