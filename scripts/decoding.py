"""Decode in named modes; fall back where output is poor; choose a mode that meets a target.

    decode(model, ids, start, stop, MODES["block"])        fill tokens [start, stop) of rows
    generate(model, prompt, 64, MODES["speculative"])      continue prompts
    infill(model, prefix, suffix, 64)                      fill the span between two texts
    edit(model, ids, start, stop)                          revise low-probability tokens
    guard(Task(model, ids, start, stop, MODES["block"]))   give poor rows the output of mode ar
    choose(model, ids, start, stop, Target(seconds=0.5))   highest likelihood within 0.5 s per call
    choose(model, ids, start, stop, Target(nats=3.0))      fastest within 3 nats per token

train_gpt.py has the two basic decoders; this file has what is faster or more elaborate. A window
is a run of tokens that the denoiser fills together (called a block in BD3-LM). All loops share
these steps: a pass over windows, which may be combined with a causal pass over clean tokens;
unmasking the most confident tokens; a causal pass that adds finished tokens to the cache.

Each row has its own random key and position, and the noise of sampling depends on the key and the
position of a token only. So a row's output does not depend on the other rows, and speculative
decoding gives the output of mode ar, for greedy decoding and for sampling.

All functions run under the caller's autocast and on the device of `ids`.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

import train_gpt as tg
from scripts.chain import Head, choose_along_chain

# Shapes: B rows, L tokens of a row, W windows of S tokens per row, V vocabulary, D width, n any.

# ==============================================================================
# 1  SETTINGS -- a mode is a row of a table
# ==============================================================================
WHOLE_SPAN = 1 << 30  # tokens: more than any span
NOISE_NUMBERS = 1 << 22  # of a decoding's noise, if it is drawn at once: 32 MiB

# Called after each pass with (B, n) positions, tokens, log-probabilities and what is still masked.
Watch = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Sampling(NamedTuple):
    """How a token is chosen from logits."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    end: int = -1  # a row stops at this token and repeats it to its end; -1: none


GREEDY = Sampling()


class Decoding(NamedTuple):
    """How to decode; a setting that the mode does not use has no effect."""

    mode: str  # key of LOOPS
    window: int = WHOLE_SPAN  # most tokens of a window
    steps: int = 8  # most denoising passes over a window
    threshold: float = math.inf  # tokens at least this probable are unmasked at once
    remask_threshold: float = 0.0  # tokens less probable than this (causal stream) are remasked
    lookup_ngram: int = 0  # speculative: tokens to look up in the text; 0: no prompt lookup
    longest_draft: int = 16  # speculative: most draft tokens per pass
    draft: str = "auto"  # speculative: row of DRAFTS
    head: Head | None = None  # of scripts/chain.py: tokens of one pass are decided left to right
    sampling: Sampling = GREEDY


MODES = {
    "ar": Decoding("ar"),
    "refine": Decoding("refine"),
    "refine_cached": Decoding("refine_cached"),
    "block": Decoding("block", window=8, steps=4),
    "threshold": Decoding("threshold", window=8, threshold=0.9),
    "remask": Decoding("remask", window=8, steps=4, remask_threshold=0.02),
    "draft_refine": Decoding("draft_refine", remask_threshold=0.02),
    "speculative": Decoding("speculative", window=4, lookup_ngram=2),
}
# Where speculative drafts come from, but for lookups: a window for each number of tokens that may
# be accepted, or the sequential head alone, which needs no window; auto: the head, if there is one.
DRAFTS = ("auto", "window", "head")
LOSSLESS = ("ar", "speculative")  # the output of mode ar; they read no text after the span


def needs_denoiser(decoding: Decoding) -> bool:
    return decoding.mode != "ar" and decoding.window > 0


def check_decoding(decoding: Decoding) -> None:
    """Raise UserError if the mode is unknown, or cannot use the window or the number of steps."""
    if decoding.mode not in LOOPS:
        raise tg.UserError(f"mode={decoding.mode!r} is unknown; name one of {', '.join(LOOPS)}")
    least = 0 if decoding.mode in LOSSLESS else 1
    if decoding.window < least:
        rule = f"must be at least {least} in mode {decoding.mode}"
        raise tg.UserError(f"window={decoding.window} {rule}")
    if decoding.draft not in DRAFTS:
        raise tg.UserError(f"draft={decoding.draft!r} must be one of: {', '.join(DRAFTS)}")
    if decoding.draft == "head" and decoding.head is None:
        raise tg.UserError("draft='head' needs a sequential head; fit one: scripts/chain.py")
    if decoding.draft == "head" and decoding.window == 0:
        raise tg.UserError("draft='head' drafts as many tokens as a window has; window=0 is none")
    if decoding.steps < 1:
        raise tg.UserError(f"steps={decoding.steps} must be at least 1")


def check_span(model: tg.GPT, ids: Tensor, start: int, stop: int, denoise: bool) -> None:
    """Raise UserError if tokens [start, stop) of rows (B, L) cannot be decoded by this model."""
    if not 1 <= start <= stop <= ids.shape[1]:
        rule = f"must lie in 1..{ids.shape[1]}: a token (BOS will do) comes before it"
        raise tg.UserError(f"span {start}..{stop} {rule}")
    if denoise and model.mask_emb is None:
        rule = "decode it with mode ar, which reads no text after the span"
        raise tg.UserError(f"this model has no trained denoiser (DIFFUSION_LOSS_WEIGHT=0); {rule}")


# ==============================================================================
# 2  STATE -- what a decoding needs, and how far each row is
# ==============================================================================
class Decoded(NamedTuple):
    """Rows with their spans filled."""

    ids: Tensor  # (B, L) int64
    forwards: Tensor  # (B, 1) int64 passes until each row was done, without the one over the prompt


class Task(NamedTuple):
    """Fill tokens [start, stop) of rows (B, L)."""

    model: tg.GPT
    ids: Tensor
    start: int
    stop: int
    decoding: Decoding
    watch: Watch | None = None


def sample_tokens(logits: Tensor, sampling: Sampling, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Choose tokens (B, n) from logits (B, n, V) with keys (B, n); also their log-probabilities."""
    return choose_tokens(logits, sampling, draw_noise(keys, logits.shape[-1], sampling))


def choose_tokens(
    logits: Tensor, sampling: Sampling, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Same as `sample_tokens` with noise (B, n, V) of `draw_noise`."""
    if noise is None:
        best = logits.max(dim=-1)
        return best.indices, (best.values - logits.logsumexp(-1)).double()
    log_p = logits.double().log_softmax(-1)
    tokens = (truncate(log_p / sampling.temperature, sampling) + noise).argmax(-1)
    return tokens, log_p.gather(-1, tokens[..., None])[..., 0]


def truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Exclude what is outside top-k or top-p, given log-probabilities up to a constant (..., V)."""
    if not sampling.top_k and sampling.top_p >= 1:
        return scores
    ranked, order = scores.sort(dim=-1, descending=True)
    p = ranked.softmax(-1)
    out = p.cumsum(-1) - p >= sampling.top_p  # a token stays if those before it leave room
    out |= torch.arange(p.shape[-1], device=p.device) >= (sampling.top_k or p.shape[-1])
    return scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -math.inf)


def draw_noise(keys: Tensor, count: int, sampling: Sampling) -> Tensor | None:
    """Draw Gumbel noise from keys, (...) to (..., count) float64; None where the choice is greedy.
    In fp32 it would cut off the tail of the distribution (arXiv:2409.02908).
    """
    if sampling.temperature <= 0:
        return None
    u = tg.random_uniform(keys, count, torch.float64).clamp(1e-300, 1 - 1e-16)
    return -torch.log(-torch.log(u))


def row_keys(ids: Tensor, seed: int) -> Tensor:
    """Randomness of each row, (B, 1): noise depends on row and position only."""
    return tg.split_key(torch.arange(len(ids), device=ids.device)[:, None], seed)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Choose tokens of x (B, N, ...) by index (B, n): (B, n, ...)."""
    return x.take_along_dim(index.view(*index.shape, *[1] * (x.ndim - 2)), dim=1)


class Run(NamedTuple):
    """What all passes of a decoding share."""

    model: tg.GPT
    decoding: Decoding
    cache: tg.Cache  # buffers: places are positions; the last ones are scratch for windows
    keys: Tensor  # (B, 1) random key of each row
    start: int = 0  # position after the prompt
    noise: Tensor | None = None  # (B, N, V) of the first N positions from there on; None: not drawn
    watch: Watch | None = None

    def sample(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Choose tokens at positions (B, n) from logits (B, n, V), and their log-probabilities."""
        return choose_tokens(logits, self.decoding.sampling, self.noise_at(positions))

    def noise_at(self, positions: Tensor) -> Tensor | None:
        """Return the noise of positions (B, n), (B, n, V); None where the choice is greedy."""
        sampling, V = self.decoding.sampling, self.model.cfg.vocab_size
        if sampling.temperature <= 0:
            return None
        if self.noise is None:
            return draw_noise(tg.split_key(self.keys, positions), V, sampling)
        return gather_tokens(self.noise, positions - self.start)

    def sample_along_chain(
        self, head: Head, logits: Tensor, tokens: Tensor, positions: Tensor, decided: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose the `decided` tokens (B, S) of windows (B, 1 + S) left to right, from logits
        (B, S, V) and what the head adds; tokens that are still masked are V. Returns the windows,
        and the log-probabilities of what was decided, (B, S), 0 elsewhere.
        """
        log_p = torch.zeros(decided.shape, dtype=torch.double, device=decided.device)

        def choose(scores: Tensor, i: int) -> Tensor:
            tokens, log_p[:, i : i + 1] = self.sample(scores[:, None], positions[:, i : i + 1])
            return tokens[:, 0]

        return choose_along_chain(head, logits, tokens, decided, choose), log_p


class Window(NamedTuple):
    """One window of each row, to be filled."""

    tokens: Tensor  # (B, 1 + S) the clean token before the window, then its own
    first: Tensor  # (B, 1) position of the token before
    suffix: Tensor  # (B, n) text after the span, for the last window; else n = 0
    is_last: bool

    def all_masked(self) -> Tensor:
        return torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)


@dataclass
class Rows:
    """Rows that are being decoded, each at its own position."""

    task: Task
    tokens: Tensor  # (B, stop + margin) prompt, decoded tokens, room after the span
    done: Tensor  # (B, 1) position of the next token to decode
    forwards: Tensor  # (B, 1) passes so far

    @classmethod
    def start(cls, task: Task, margin: int) -> Rows:
        tokens = F.pad(task.ids[:, : task.stop], (0, margin))
        done = torch.full_like(tokens[:, :1], task.start)
        return cls(task, tokens, done, torch.zeros_like(done))

    def active(self) -> Tensor:
        """Which rows are not finished, (B, 1) bool."""
        return self.done < self.task.stop

    def unfinished(self) -> bool:
        return bool(self.active().any())

    def next_window(self) -> Window:
        """Take the next window of each row; active rows are all at the same position."""
        task, first = self.task, self.done - 1
        left = task.stop - int(self.done.min())
        size = min(task.decoding.window, left)
        tokens = self.tokens.gather(1, first + torch.arange(size + 1, device=first.device))
        suffix = task.ids[:, task.stop :] if size == left else task.ids[:, :0]
        return Window(tokens, first, suffix, size == left)

    def finish_window(self, window: Window, passes: Tensor) -> None:
        self.accept(window.first, window.tokens, window.tokens.shape[1] - 1, passes)

    def accept(self, first: Tensor, tokens: Tensor, count: Tensor | int, passes: Tensor) -> None:
        """Store tokens (B, n) at positions from `first` (B, 1) on, and move each row on.

        Args:
            first: position of the first token.
            tokens: to store; those after `count` are overwritten later.
            count: how many tokens further each row is, (B, 1). An end token finishes its row.
            passes: (B, 1) passes that it took.
        """
        column = torch.arange(self.tokens.shape[1], device=first.device)
        self.tokens = self.tokens.scatter(1, first + column[: tokens.shape[1]], tokens)
        self.forwards = self.forwards + self.active() * passes
        self.done = self.done + count
        end = self.task.decoding.sampling.end
        if end >= 0:
            decoded = (column >= self.task.start) & (column < self.done)
            ended = ((self.tokens == end) & decoded).cumsum(1) > 0  # from the first end token on
            self.tokens = torch.where(ended, end, self.tokens)
            self.done = torch.where(ended.any(1, keepdim=True), self.task.stop, self.done)
        self.done = self.done.clamp(max=self.task.stop)

    def decoded(self) -> Decoded:
        stop = self.task.stop
        ids = torch.cat((self.tokens[:, :stop], self.task.ids[:, stop:]), dim=1)
        return Decoded(ids, self.forwards)


def start_run(task: Task, ahead: int, scratch: int = 0) -> Run:
    """Read the prompt into buffers with places for `ahead` positions after it and `scratch` more.

    The noise of these positions is drawn here if it is not too large: many small draws take longer.
    """
    model, sampling = task.model, task.decoding.sampling
    cache = tg.fill_cache(model, task.ids[:, : task.start], ahead + scratch)
    keys, noise = row_keys(task.ids, sampling.seed), None
    if len(keys) * ahead * model.cfg.vocab_size <= NOISE_NUMBERS:
        positions = task.start + torch.arange(ahead, device=keys.device)
        noise = draw_noise(tg.split_key(keys, positions), model.cfg.vocab_size, sampling)
    return Run(model, task.decoding, cache, keys, task.start, noise, task.watch)


def start_windows(task: Task) -> tuple[Run, Rows]:
    """Begin to decode window by window."""
    span, suffix = task.stop - task.start, task.ids.shape[1] - task.stop
    size = min(task.decoding.window, span) + 1  # with the clean token before it
    # Finished rows take part in the passes of the others, with windows after the span.
    return start_run(task, span + size + suffix), Rows.start(task, size)


# ==============================================================================
# 3  PASSES -- over windows, over some of their tokens, or over windows and clean tokens
# ==============================================================================
class MaskedWindows(NamedTuple):
    """Windows that one pass denoises, W per row."""

    tokens: Tensor  # (B, W, 1 + S) the clean token before each window, then its own
    masked: Tensor  # (B, W, S) bool
    first: Tensor  # (B, W) positions of the clean tokens before
    step: int = 0  # number of earlier passes over these windows
    previous: Tensor | None = None  # (B, W, S, D) expected embeddings of the last pass


def corrupt_windows(run: Run, tokens: Tensor, windows: MaskedWindows) -> tg.Corruption:
    """Corrupt the masked tokens among clean tokens, then windows: (B, N), N = n + W (1 + S).

    For the model they are one window, whose clean token before it is the first. Only the windows'
    own tokens are possibly corrupted.
    """
    num_clean = tokens.shape[1] - windows.tokens[0].numel()

    def lay_out(x: Tensor) -> Tensor:  # (B, W, S) bool to (B, 1, N - 1)
        return F.pad(F.pad(x, (1, 0)).flatten(1), (num_clean, 0))[:, None, 1:]

    own, masked = lay_out(torch.ones_like(windows.masked)), lay_out(windows.masked)
    t = (masked.sum(-1) / own.sum(-1)).clamp_min(1e-6)  # (B, 1); a row may have no masked token
    keys = tg.split_key(run.keys, windows.first[:, :1], windows.step)
    noisy = tg.apply_noise(tokens[:, None, 1:], masked, t, keys, run.model.cfg)
    return noisy._replace(possibly_corrupted=noisy.possibly_corrupted & own)


def build_inputs(
    run: Run, clean: Tensor, positions: Tensor, windows: MaskedWindows
) -> tg.WindowInput:
    """Put clean tokens (B, n) at `positions` (B, n) and windows into one input.

    A clean token reads the cache up to its own position, where it is stored. A window's token reads
    its own window and the cache before the window's clean token; the keys and values of windows go
    to the last places of the buffers.
    """
    size, length = windows.masked.shape[2], run.cache.tokens.shape[1]
    index = torch.arange(windows.tokens[0].numel(), device=clean.device)  # of the windows' tokens
    place, scratch = torch.arange(length, device=clean.device), length - len(index)
    causal = run.model.cfg.diffusion_causal
    rule = tg.attention_rule(lambda w: windows.first[:, w], size, scratch, causal)
    mask = torch.cat((place <= positions[..., None], rule(index[:, None], place)), dim=1)
    own_positions = windows.first.repeat_interleave(size + 1, dim=1) + index % (size + 1)
    tokens = torch.cat((clean, windows.tokens.flatten(1)), dim=1)
    return tg.WindowInput(
        before=tokens[:, None, :1],
        noisy=corrupt_windows(run, tokens, windows),
        positions=torch.cat((positions, own_positions), dim=1),
        mask=mask[:, None],
        previous=windows.previous,
        cache_positions=torch.cat((positions, (scratch + index).expand(len(clean), -1)), dim=1),
    )


def denoise(run: Run, windows: MaskedWindows) -> Tensor:
    """Take a pass over one window of each row (W = 1): logits (B, 1, S, V)."""
    none = windows.first[:, :0]
    return run.model.forward_denoise(build_inputs(run, none, none, windows), run.cache)


def denoise_tokens(run: Run, windows: MaskedWindows, queries: Tensor) -> Tensor:
    """Take a pass over some tokens of one window of each row: logits (B, 1, S, V).

    The other tokens keep the keys and values of an earlier pass and get zero logits.

    Args:
        run: the decoding.
        windows: W = 1.
        queries: (B, n) indices of tokens in their window, 0 for the clean token before it.
    """
    model, none = run.model, windows.first[:, :0]
    inputs = build_inputs(run, none, none, windows)
    emb, time = model.embed_windows(inputs, run.cache)
    assert inputs.cache_positions is not None
    assert isinstance(inputs.mask, Tensor)
    layout = tg.Layout(
        rotary=tg.rotary(gather_tokens(inputs.positions, queries), model.cfg),
        mask=gather_tokens(inputs.mask[:, 0], queries)[:, None],
        time=gather_tokens(time, queries),
        cache=run.cache,
        cache_positions=gather_tokens(inputs.cache_positions, queries),
    )
    logits = model.trunk(gather_tokens(emb, queries), layout)[0]
    zeros = logits.new_zeros(*emb.shape[:2], logits.shape[2])
    logits = zeros.scatter(1, queries[..., None].expand_as(logits), logits)
    return select_own(model, logits, windows)


def combined_pass(
    run: Run, clean: Tensor, positions: Tensor, windows: MaskedWindows
) -> tuple[Tensor, Tensor]:
    """Read clean tokens (B, n), which enter the cache, and denoise windows in the same pass.

    Returns:
        Logits of the tokens after the clean ones, (B, n, V), and of the windows' own tokens,
        (B, W, S, V).
    """
    model, inputs = run.model, build_inputs(run, clean, positions, windows)
    emb, time = model.embed_windows(inputs, run.cache)
    table = tg.rotary(inputs.positions, model.cfg)
    layout = tg.Layout(table, inputs.mask, time, run.cache, inputs.cache_positions)
    logits = model.trunk(emb, layout)[0]
    num_clean = clean.shape[1]
    return logits[:, :num_clean], select_own(model, logits[:, num_clean:], windows)


def select_own(model: tg.GPT, logits: Tensor, windows: MaskedWindows) -> Tensor:
    """From logits at windows (B, W (1 + S), V) take those of their own tokens, (B, W, S, V)."""
    logits = logits.view(*windows.tokens.shape, -1)
    return logits.narrow(2, int(not model.cfg.diffusion_shift), windows.masked.shape[2])


# ==============================================================================
# 4  STEPS -- fill a window, add it to the cache, revise it
# ==============================================================================
def unmask(run: Run, windows: MaskedWindows, logits: Tensor, total: Tensor) -> MaskedWindows:
    """Fill in predicted tokens; the least confident stay masked.

    Args:
        run: the decoding.
        windows: one of each row (W = 1), as the pass read it.
        logits: prediction of the pass, (B, 1, S, V).
        total: (B, 1) tokens that were masked before the first pass; `steps` passes take even
            shares of them.
    """
    decoding, step = run.decoding, windows.step + 1
    before, masked = windows.tokens[:, 0, :1], windows.masked[:, 0]
    positions = windows.first + torch.arange(1, masked.shape[1] + 1, device=masked.device)
    predicted, log_p = run.sample(logits[:, 0], positions)
    tokens, hidden = torch.where(masked, predicted, windows.tokens[:, 0, 1:]), masked
    remaining = tg.num_still_masked(total, step, decoding.steps)
    masked = tg.unmask_confident(masked, log_p, remaining) & (log_p.exp() < decoding.threshold)
    if decoding.head is not None:
        decided = hidden & ~masked
        known = tokens.masked_fill(hidden, run.model.cfg.vocab_size)
        known = torch.cat((before, known), dim=1)
        found = run.sample_along_chain(decoding.head, logits[:, 0], known, positions, decided)
        tokens = torch.where(decided, found[0][:, 1:], tokens)
        log_p = torch.where(decided, found[1], log_p)
    if run.watch is not None:
        run.watch(positions, tokens, log_p, masked)
    soft = run.model.cfg.self_condition == "soft"
    previous = tg.expected_embedding(run.model, logits) if soft else None
    tokens = torch.cat((before, tokens), dim=1)
    return MaskedWindows(tokens[:, None], masked[:, None], windows.first, step, previous)


def with_suffix(window: Window, masked: Tensor) -> MaskedWindows:
    """Make the input of the first pass over a window, with the text after it."""
    tokens = torch.cat((window.tokens, window.suffix), dim=1)
    masked = F.pad(masked, (0, window.suffix.shape[1]))
    return MaskedWindows(tokens[:, None], masked[:, None], window.first)


def fill_window(run: Run, window: Window, masked: Tensor) -> tuple[Window, Tensor]:
    """Fill the masked tokens (B, S) in at most `steps` passes, the most confident first.

    Returns the window and the passes that each row took, (B, 1).
    """
    windows, total = with_suffix(window, masked), masked.sum(1, keepdim=True)
    passes = torch.zeros_like(window.first)
    while bool(windows.masked.any()):
        passes = passes + windows.masked.any(-1)
        windows = unmask(run, windows, denoise(run, windows), total)
    return window._replace(tokens=windows.tokens[:, 0, : window.tokens.shape[1]]), passes


def fill_window_cached(run: Run, window: Window, masked: Tensor) -> tuple[Window, Tensor]:
    """Fill a window like `fill_window`, but compute only changed tokens: faster, approximate."""
    windows, total = with_suffix(window, masked), masked.sum(1, keepdim=True)
    passes = torch.zeros_like(window.first)
    every = torch.arange(windows.tokens.shape[2], device=passes.device)
    queries = every.expand(len(passes), -1)
    while bool(windows.masked.any()):
        passes = passes + windows.masked.any(-1)
        filled = unmask(run, windows, denoise_tokens(run, windows, queries), total)
        queries = changed_tokens(run.model, windows.masked[:, 0], filled.masked[:, 0])
        windows = filled
    return window._replace(tokens=windows.tokens[:, 0, : window.tokens.shape[1]]), passes


def changed_tokens(model: tg.GPT, before: Tensor, masked: Tensor) -> Tensor:
    """Find the tokens that the next pass must compute, (B, n) indices in windows of 1 + S tokens.

    These are the tokens that the last pass could fill in, with a bigram table the tokens after
    them, and the tokens before those that are still masked, which predict them.

    Args:
        model: has a bigram table or not.
        before: (B, S) bool, tokens that were masked in the last pass.
        masked: (B, S) bool, tokens that still are.
    """
    changed = F.pad(before, (1, 0)) | F.pad(masked, (0, 1))  # (B, 1 + S)
    if model.bigram_embedding is not None:
        changed = changed | F.pad(before, (2, 0))[:, :-1]
    indices = changed.int().argsort(dim=1, descending=True)
    return pad_by_repeating(indices, changed.sum(1, keepdim=True))


def pad_by_repeating(indices: Tensor, count: Tensor) -> Tensor:
    """Keep the first `count` (B, 1) indices of each row (B, n), repeated to equal lengths."""
    column = torch.arange(int(count.max()), device=indices.device)
    return indices.gather(1, column % count.clamp(min=1))


def read_window(run: Run, window: Window) -> Tensor:
    """Add a window to the cache; its tokens' probabilities under the causal stream, (B, S)."""
    positions = window.first + torch.arange(window.tokens.shape[1], device=window.first.device)
    logits, _ = run.model.forward_causal(window.tokens, run.cache, positions)
    return tg.token_nll(logits[:, :-1], window.tokens[:, 1:]).neg().exp()


def revise_window(run: Run, window: Window) -> tuple[Window, Tensor]:
    """Remask tokens below `remask_threshold`, fill them, and add the window to the cache.

    Returns the window and the passes that each row took, (B, 1). The last window is not added
    again, because no pass reads it.
    """
    low = read_window(run, window) < run.decoding.remask_threshold
    window, passes = fill_window(run, window, low)
    if not window.is_last:
        read_window(run, window)
    return window, passes + 1 + int(not window.is_last)


# ==============================================================================
# 5  DRAFTS -- tokens that the causal stream accepts or replaces
# ==============================================================================
def look_up(tokens: Tensor, done: Tensor, count: int, ngram: int) -> tuple[Tensor, Tensor]:
    """Draft what followed each row's last `ngram` tokens where they occurred most recently.

    Source: prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.

    Args:
        tokens: (B, L).
        done: (B, 1) number of known tokens of each row; later ones are not read.
        count: draft tokens. If fewer follow the occurrence, they are repeated.
        ngram: tokens to look up.

    Returns:
        Draft tokens (B, count), and which rows have an occurrence, (B, 1) bool.
    """
    column = torch.arange(max(count, ngram), device=tokens.device)
    last = tokens.gather(1, (done - ngram).clamp(min=0) + column[:ngram])
    after = torch.arange(ngram, tokens.shape[1] + 1, device=tokens.device)  # each n-gram's end
    same = (tokens.unfold(1, ngram, 1) == last[:, None]).all(-1) & (after < done)
    source = (same * after).amax(1, keepdim=True)
    draft = tokens.gather(1, source + column[:count] % (done - source).clamp(min=1))
    return draft, source > 0


@dataclass
class AcceptanceRate:
    """Moving average of the draft tokens accepted per pass; about twice as many are worth it."""

    accepted: float  # tokens per pass
    decay: float  # weight of the average so far
    extra: float  # tokens on top
    least: int
    most: int

    def draft_length(self) -> int:
        return min(max(int(2 * self.accepted + self.extra), self.least), self.most)

    def update(self, accepted: Tensor) -> None:
        """Add the numbers of accepted tokens of some rows."""
        mean = accepted.double().mean().item()
        self.accepted = self.decay * self.accepted + (1 - self.decay) * mean

    @classmethod
    def of_head(cls, most: int) -> AcceptanceRate:
        """Begin with what a sequential head gets on average: a draft token costs it a small MLP."""
        return cls(accepted=1.5, decay=0.75, extra=1.5, least=1, most=most)


class Verified(NamedTuple):
    tokens: Tensor  # (B, 1 + n) the causal stream's choice after each token that it read
    accepted: Tensor  # (B, 1) how many draft tokens equal it, up to the first that does not
    drafts: Tensor  # (B, length) draft tokens for the next pass


def verify(run: Run, tokens: Tensor, first: Tensor, length: int) -> Verified:
    """Verify draft tokens, and draft the next ones in the same pass (TiDAR, arXiv:2511.08923).

    Before the pass nobody knows how many draft tokens will be accepted, so there is a window for
    each number. Its first token is what the causal stream chooses itself; the others are drafts.

    Args:
        run: the decoding.
        tokens: (B, 1 + n) the last accepted token, then the draft.
        first: (B, 1) position of the last accepted token.
        length: number of tokens to draft; 0 takes a causal pass without windows.
    """
    column = torch.arange(max(tokens.shape[1], length + 1), device=first.device)
    positions, guesses = first + column[: tokens.shape[1]], None
    if length == 0:
        logits, _ = run.model.forward_causal(tokens, run.cache, positions)
    else:
        windows = draft_windows(tokens, positions, length)
        logits, guesses = combined_pass(run, tokens, positions, windows)
    chosen, log_p = run.sample(logits, positions + 1)
    accepted = (chosen[:, :-1] == tokens[:, 1:]).cumprod(1).sum(1, keepdim=True)
    if run.watch is not None:
        run.watch(positions + 1, chosen, log_p, positions > first + accepted)
    if guesses is None:
        return Verified(chosen, accepted, chosen[:, :0])
    used = accepted[:, 0].clamp(max=guesses.shape[1] - 1)
    of_row = guesses[torch.arange(len(used), device=used.device), used]  # (B, 1 + length, V)
    known = torch.cat((tokens.gather(1, accepted), chosen.gather(1, accepted)), dim=1)
    drafts = draft_after(run, of_row, known, first + accepted + 1 + column[: length + 1])
    return Verified(chosen, accepted, drafts)


def draft_after(run: Run, logits: Tensor, known: Tensor, positions: Tensor) -> Tensor:
    """Draft what follows the first token of a window, which the causal stream has chosen by now.

    Args:
        run: the decoding.
        logits: (B, S, V) of the window; those of its first token are not read.
        known: (B, 2) the token before the window, and its first.
        positions: (B, S) of the window.

    Returns:
        Tokens (B, S - 1).
    """
    head = run.decoding.head
    if head is None:
        return run.sample(logits[:, 1:], positions[:, 1:])[0]
    # The first logits are certain of the known token, so that the chain begins with it.
    certain = torch.full_like(logits[:, :1], -math.inf).scatter(2, known[:, 1:, None], 0.0)
    logits = torch.cat((certain, logits[:, 1:]), dim=1)
    windows = F.pad(known, (0, logits.shape[1] - 1), value=run.model.cfg.vocab_size)
    every = torch.ones_like(positions, dtype=torch.bool)
    return run.sample_along_chain(head, logits, windows, positions, every)[0][:, 2:]


def draft_windows(tokens: Tensor, positions: Tensor, length: int) -> MaskedWindows:
    """Mask windows of 1 + length tokens after each of the first 1 + length tokens (B, 1 + n)."""
    before = tokens[:, : length + 1, None]
    masked = torch.ones_like(before.expand(-1, -1, length + 1), dtype=torch.bool)
    return MaskedWindows(F.pad(before, (0, length + 1)), masked, positions[:, : length + 1])


def add_lookups(
    rows: Rows, draft: Callable[[], Tensor], rate: AcceptanceRate, least: int
) -> tuple[Tensor, Tensor]:
    """Take drafts of `least` or more tokens from the text of rows whose last tokens occur earlier
    there; `draft` gives those of the others, (B, n), and is called if there are any.

    Returns the drafts, and which rows have theirs from the text, (B, 1) bool.
    """
    ngram = rows.task.decoding.lookup_ngram
    if ngram == 0:
        return draft(), torch.zeros_like(rows.active())
    text, found = look_up(rows.tokens, rows.done, rate.most, ngram)
    drafts = draft() if bool((~found & rows.active()).any()) else rows.tokens[:, :0]
    if not bool((found & rows.active()).any()):
        return drafts, found
    merged = torch.where(found, text, F.pad(drafts, (0, rate.most - drafts.shape[1])))
    return merged[:, : max(rate.draft_length(), least)], found


# ==============================================================================
# 6  LOOPS -- one for each family of modes
# ==============================================================================
def decode_ar(task: Task) -> Decoded:
    """Decode left to right, one token per pass."""
    if task.watch is not None:
        without_drafts = task.decoding._replace(window=0, lookup_ngram=0)
        return decode_speculative(task._replace(decoding=without_drafts))
    x, run, end = (
        task.ids.clone(),
        start_run(task, task.stop - task.start),
        task.decoding.sampling.end,
    )
    ended = torch.zeros_like(run.keys, dtype=torch.bool)
    forwards = torch.zeros_like(run.keys)
    for place in range(task.start, task.stop if len(x) else task.start):
        last = torch.full_like(run.keys, place - 1)
        logits = task.model.forward_causal(x[:, place - 1 : place], run.cache, last)[0]
        token, _ = run.sample(logits, last + 1)
        x[:, place : place + 1] = torch.where(ended, end, token)
        forwards += ~ended
        if end >= 0:
            ended |= token == end
            if bool(ended.all()):
                x[:, place : task.stop] = end
                break
    return Decoded(x, forwards)


def decode_speculative(task: Task) -> Decoded:
    """Decode left to right; each pass verifies a draft and keeps what the causal stream chooses.

    The output is that of mode ar. A draft comes from the text where the row's last tokens occurred
    before, else from a window or a sequential head. With none of these (window 0, no lookup) a pass
    gives one token.
    """
    decoding = task.decoding
    longest = min(decoding.window, task.stop - task.start, decoding.longest_draft)
    most = max(longest, decoding.longest_draft if decoding.lookup_ngram else 0)
    ahead = task.stop - task.start + most + longest + 2  # drafts may go beyond the span
    run = start_run(task, ahead, scratch=(longest + 1) ** 2)
    rows = Rows.start(task, most + 1)
    on_gpu = int(task.ids.is_cuda)  # a window hardly adds to the time of a pass there
    by_lookup = AcceptanceRate(accepted=1.5, decay=0.0, extra=1.0, least=1, most=most)
    by_model = AcceptanceRate(accepted=0.3, decay=0.75, extra=0.5, least=on_gpu, most=longest)
    head = None if decoding.draft == "window" or not longest else decoding.head
    if head is not None:
        by_model = AcceptanceRate.of_head(longest)
    drafts = rows.tokens[:, :0]
    while rows.unfinished():
        active, wanted = rows.active(), by_model.draft_length()
        num_drafts = drafts.shape[1] if head is None else wanted
        own = functools.partial(own_drafts, run, rows, head, drafts, wanted)
        drafts, found = add_lookups(rows, own, by_lookup, num_drafts)
        others = active & ~found  # rows whose drafts do not come from the text
        any_other = bool(others.any())
        length = wanted if any_other and head is None else 0
        tokens = torch.cat((rows.tokens.gather(1, rows.done - 1), drafts), dim=1)
        verified = verify(run, tokens, rows.done - 1, length)
        if any_other and num_drafts:
            by_model.update(verified.accepted[others])
        by_lookup.update(verified.accepted[active])
        one_pass = torch.ones_like(rows.done)
        rows.accept(rows.done, verified.tokens, verified.accepted + 1, one_pass)
        drafts = verified.drafts
    return rows.decoded()


def draft_by_head(
    head: Head, known: Tensor, noise: Tensor | None, sampling: Sampling, length: int
) -> Tensor:
    """Draft tokens by the sequential head alone, without a window.

    Args:
        head: with its base logits.
        known: (B, 2) last tokens; V is one that does not exist.
        noise: (B, length, V) that these tokens will be sampled with, so that drafts are likely to
            be kept; None where the choice is greedy.
        sampling: as tokens are chosen.
        length: tokens to draft.

    Returns:
        Tokens (B, length).
    """
    tokens = list(known.unbind(1))
    for i in range(length):
        scores = head.prior + head.step(tokens[-2], tokens[-1])
        if noise is not None:
            scores = truncate(scores / sampling.temperature, sampling) + noise[:, i]
        tokens.append(scores.argmax(-1))
    return torch.stack(tokens, dim=1)[:, 2:]


def own_drafts(run: Run, rows: Rows, head: Head | None, drafts: Tensor, length: int) -> Tensor:
    """Return drafts of a window, or those of a head if it drafts: `length` tokens per row."""
    if head is None:
        return drafts
    tokens = F.pad(rows.tokens, (1, 0), value=run.model.cfg.vocab_size)  # nothing before the first
    known = tokens.gather(1, torch.cat((rows.done - 1, rows.done), dim=1))
    noise = run.noise_at(rows.done + torch.arange(length, device=known.device))
    return draft_by_head(head, known, noise, run.decoding.sampling, length)


Fill = Callable[[Run, Window, Tensor], tuple[Window, Tensor]]


def decode_blocks(task: Task, fill: Fill = fill_window) -> Decoded:
    """Fill windows left to right, into the cache; the last one reads the text after the span."""
    run, rows = start_windows(task)
    while rows.unfinished():
        window = rows.next_window()
        window, passes = fill(run, window, window.all_masked())
        if not window.is_last:
            read_window(run, window)
        rows.finish_window(window, passes + int(not window.is_last))
    return rows.decoded()


def decode_refine_cached(task: Task) -> Decoded:
    """Fill windows by passes over changed tokens only: approximate."""
    return decode_blocks(task, fill_window_cached)


def decode_remask(task: Task) -> Decoded:
    """Fill windows left to right, and revise each once."""
    run, rows = start_windows(task)
    while rows.unfinished():
        window = rows.next_window()
        window, passes = fill_window(run, window, window.all_masked())
        window, more = revise_window(run, window)
        rows.finish_window(window, passes + more)
    return rows.decoded()


def decode_revise(task: Task) -> Decoded:
    """Revise the tokens of the span, window by window."""
    run, rows = start_windows(task)
    while rows.unfinished():
        window, passes = revise_window(run, rows.next_window())
        rows.finish_window(window, passes)
    return rows.decoded()


def decode_draft_refine(task: Task) -> Decoded:
    """Draft the span left to right, then revise it."""
    draft = decode_ar(task)
    revised = decode_revise(task._replace(ids=draft.ids))
    return Decoded(revised.ids, draft.forwards + revised.forwards)


LOOPS: dict[str, Callable[[Task], Decoded]] = {
    "ar": decode_ar,
    "refine": decode_blocks,
    "refine_cached": decode_refine_cached,
    "block": decode_blocks,
    "threshold": decode_blocks,
    "remask": decode_remask,
    "draft_refine": decode_draft_refine,
    "edit": decode_revise,
    "speculative": decode_speculative,
}


@torch.no_grad()
def decode(
    model: tg.GPT,
    ids: Tensor,
    start: int,
    stop: int,
    decoding: Decoding,
    watch: Watch | None = None,
) -> Decoded:
    """Fill tokens [start, stop) of rows (B, L). Windows read the text after the span.

    Raises:
        UserError: the span is outside the rows, the mode is unknown, or it needs a denoiser that
            the model does not have.
    """
    check_decoding(decoding)
    check_span(model, ids, start, stop, needs_denoiser(decoding))
    return LOOPS[decoding.mode](Task(model, ids, start, stop, decoding, watch))


def generate(
    model: tg.GPT, prompt: Tensor, count: int, decoding: Decoding = MODES["ar"]
) -> Decoded:
    """Continue prompts (B, P) by `count` tokens."""
    start = prompt.shape[1]
    return decode(model, F.pad(prompt, (0, count)), start, start + count, decoding)


def infill(
    model: tg.GPT, prefix: Tensor, suffix: Tensor, count: int, decoding: Decoding = MODES["refine"]
) -> Decoded:
    """Fill `count` tokens between prefixes (B, P) and suffixes (B, Q)."""
    ids, start = torch.cat((F.pad(prefix, (0, count)), suffix), dim=1), prefix.shape[1]
    return decode(model, ids, start, start + count, decoding)


def edit(
    model: tg.GPT,
    ids: Tensor,
    start: int,
    stop: int,
    decoding: Decoding = MODES["draft_refine"],
    watch: Watch | None = None,
) -> Decoded:
    """Revise tokens [start, stop) of rows (B, L): fill those below `remask_threshold` again."""
    return decode(model, ids, start, stop, decoding._replace(mode="edit"), watch)


def compiled(model: tg.GPT) -> tg.GPT:
    """Compile what a pass computes, in place.

    Shapes differ from pass to pass and are left dynamic: the first passes compile, which takes a
    minute; later ones launch fewer kernels.
    """
    model.trunk = torch.compile(model.trunk, dynamic=True)  # type: ignore[method-assign]
    return model


# ==============================================================================
# 7  GUARD -- detect poor output and fall back to mode ar
# ==============================================================================
# Likelihood alone cannot judge decoded text: it is highest where text repeats itself
# (arXiv:1904.09751), and a row of one token may have the highest of all. `Limits.repeat` finds
# loops; `entropy` and `distinct` find text of few tokens without loops; `repeat` and `entropy`
# each refuse a row of one token.


class Quality(NamedTuple):
    """Measures of decoded rows, (B,) each; tokens after a row's end token do not count."""

    nats: Tensor  # mean per token, causal stream of the same weights: no independent judge
    entropy: Tensor  # bits, of the token frequencies of the row itself
    distinct: Tensor  # share of different bigrams among the row's bigrams; 1 where there is none
    repeat: Tensor  # share of tokens inside the longest loop
    tokens: Tensor  # number of tokens


class Limits(NamedTuple):
    """Limits of good rows.

    Of 1,000 true spans of 64 tokens 3 (English) and 29 (Python) exceed them, most by nats.
    """

    nats: float = 0.75  # most, as a share of log V: the nats of a uniform prediction
    entropy: float = 0.5  # least, as a share of the maximum, log2(min(tokens, V))
    distinct: float = 0.4  # least
    repeat: float = 0.5  # most


LIMITS = Limits()


class Guarded(NamedTuple):
    decoded: Decoded  # a row that fell back counts the passes of both decodings
    fell_back: Tensor  # (B,) bool
    quality: Quality  # of the returned rows; a row that fell back is not judged again


def entropy(tokens: Sequence[int]) -> float:
    """Entropy of the empirical distribution of tokens, bits."""
    return sum(-n / len(tokens) * math.log2(n / len(tokens)) for n in Counter(tokens).values())


def distinct(tokens: Sequence[int]) -> float:
    """Share of different bigrams (distinct-2, arXiv:1510.03055)."""
    bigrams = list(itertools.pairwise(tokens))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def repeat(tokens: Sequence[int]) -> float:
    """Share of tokens in the longest loop: a period of 1 to 8 tokens, at least twice in full."""
    longest = 0
    for period in range(1, 9):
        run = 0  # consecutive tokens that equal the token one period before
        for before, token in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if token == before else 0
            longest = max(longest, run + period if run >= period else 0)
    return longest / max(len(tokens), 1)


def quality(model: tg.GPT, ids: Tensor, start: int, stop: int, end: int = -1) -> Quality:
    """Measure tokens [start, stop) of rows (B, L), up to and including the first `end`."""
    nats = tg.token_nll_causal(model, ids[:, :stop])[:, start - 1 :].double()
    span = ids[:, start:stop]
    counts = (span == end).cumsum(1) - (span == end).long() == 0  # up to the first end token
    num_tokens = counts.sum(1)
    rows = [row[:n] for row, n in zip(span.tolist(), num_tokens.tolist(), strict=True)]
    return Quality(
        nats=(nats * counts).sum(1) / num_tokens.clamp(min=1),
        entropy=nats.new_tensor([entropy(row) for row in rows]),
        distinct=nats.new_tensor([distinct(row) for row in rows]),
        repeat=nats.new_tensor([repeat(row) for row in rows]),
        tokens=num_tokens,
    )


def judge(found: Quality, vocab_size: int, limits: Limits = LIMITS) -> tuple[Tensor, Tensor]:
    """Find rows that are too repetitive, and rows that exceed any limit, as NaN does: (B,) bool."""
    least = limits.entropy * found.tokens.clamp(1, vocab_size).double().log2()
    repetitive = (found.entropy < least) | (found.distinct < limits.distinct)
    repetitive = repetitive | (found.repeat > limits.repeat)
    return repetitive, repetitive | ~(found.nats <= limits.nats * math.log(vocab_size))


def guard(task: Task, limits: Limits = LIMITS) -> Guarded:
    """Decode; rows that exceed the limits get the tokens of mode ar.

    A row's key comes from its place in the batch, so mode ar decodes the whole batch, and the
    rows are taken from its output: each is what ar gives it, whatever the others are. Lossless
    modes have nothing to fall back on.
    """
    model, decoding = task.model, task.decoding
    decoded = decode(*task)
    end = decoding.sampling.end
    found = quality(model, decoded.ids, task.start, task.stop, end)
    bad = judge(found, model.cfg.vocab_size, limits)[1] & (decoding.mode not in LOSSLESS)
    if bool(bad.any()):
        ar = MODES["ar"]._replace(sampling=decoding.sampling)
        fallback = decode(model, task.ids, task.start, task.stop, ar)
        merged = torch.where(bad[:, None], fallback.ids, decoded.ids)
        decoded = Decoded(merged, decoded.forwards + bad[:, None] * fallback.forwards)
        found = quality(model, merged, task.start, task.stop, end)
    return Guarded(decoded, bad, found)


# ==============================================================================
# 8  AUTO -- the mode that meets a target, by trying all
# ==============================================================================
STEPS, THRESHOLDS = (1, 2, 4, 8, 12, 20, 30), (0.5, 0.7, 0.9)
TIMED_CALLS = 3  # their median counts, after one call that does not


class Target(NamedTuple):
    """What `choose` has to keep to: exactly one of the two."""

    seconds: float | None = None  # per call
    nats: float | None = None  # per token


class Measured(NamedTuple):
    decoding: Decoding
    seconds: float  # per call
    nats: float  # per token; repetitive rows count as log V, so that no mode wins by repeating
    repetitive: float  # share of such rows

    def __str__(self) -> str:
        mode, steps = self.decoding.mode, f" in {self.decoding.steps} passes"
        settings = {"threshold": f" {self.decoding.threshold:g}"}
        settings |= {"refine": steps, "refine_cached": steps}
        name = mode + settings.get(mode, "")
        return f"{name}: {self.seconds:.4g} s, {self.nats:.4f} nats per token"


class Choice(NamedTuple):
    best: Measured
    table: list[Measured]


def candidates(
    denoiser: bool, suffix: bool, span: int, sampling: Sampling = GREEDY, head: Head | None = None
) -> list[Decoding]:
    """List settings to try: only those that need no denoiser, or that read text after the span."""
    rows = list[Decoding]()
    if not suffix:
        speculative = MODES["speculative"]  # without a denoiser its drafts are looked up only
        rows += [MODES["ar"], speculative if denoiser else speculative._replace(window=0)]
    if denoiser:
        few = [steps for steps in STEPS if steps <= span]
        rows += [MODES[mode]._replace(steps=n) for mode in ("refine", "refine_cached") for n in few]
        rows += [MODES["threshold"]._replace(threshold=p) for p in THRESHOLDS]
        varied = (*LOSSLESS, "refine", "refine_cached", "threshold")  # listed above
        rows += [decoding for mode, decoding in MODES.items() if mode not in varied]
    return [decoding._replace(sampling=sampling, head=head) for decoding in rows]


def measure(model: tg.GPT, ids: Tensor, start: int, stop: int, decoding: Decoding) -> Measured:
    """Time a decoding of tokens [start, stop) of rows (B, L) and measure the output."""
    seconds, out = list[float](), ids
    for _ in range(1 + TIMED_CALLS):
        if decoding.head is not None:  # the same pairs again would be looked up
            decoding.head.pair_cache.clear()
        began = time.perf_counter()
        out = decode(model, ids, start, stop, decoding).ids
        int(out.sum())  # waits for the device
        seconds.append(time.perf_counter() - began)
    found = quality(model, out, start, stop, decoding.sampling.end)
    vocab_size = model.cfg.vocab_size
    repetitive = judge(found, vocab_size)[0]
    nats = found.nats.masked_fill(repetitive, math.log(vocab_size)).mean().item()
    share = repetitive.double().mean().item()
    return Measured(decoding, statistics.median(seconds[1:]), nats, share)


def check_target(target: Target) -> None:
    if (target.seconds is None) == (target.nats is None):
        given = f"seconds={target.seconds}, nats={target.nats}"
        raise tg.UserError(f"{given}: give exactly one of the two targets")


def select(table: Sequence[Measured], target: Target) -> Measured:
    """Pick the most likely row within `seconds`, or the fastest within `nats`; UserError: none."""
    check_target(target)
    limited, least = ("nats", "seconds") if target.seconds is None else ("seconds", "nats")
    limit = getattr(target, limited)
    fitting = [row for row in table if getattr(row, limited) <= limit]
    if not fitting:
        closest = min(table, key=attrgetter(limited))
        raise tg.UserError(f"no mode meets {limited}={limit}; the closest is {closest}")
    return min(fitting, key=attrgetter(least, limited))


def choose(
    model: tg.GPT,
    ids: Tensor,
    start: int,
    stop: int,
    target: Target,
    sampling: Sampling = GREEDY,
    head: Head | None = None,
) -> Choice:
    """Mode auto: try all candidates on rows (B, L) and `select` one.

    Raises:
        UserError: not exactly one target, no mode meets it, nothing to decode, or no mode that can
            read the rows.
    """
    check_target(target)
    suffix = stop < ids.shape[1]
    rows = candidates(model.mask_emb is not None, suffix, stop - start, sampling, head)
    if not rows or not len(ids) or start >= stop:
        reason = "is empty, or text after it needs a denoiser"
        raise tg.UserError(f"span {start}..{stop} of {len(ids)} rows {reason}")
    table = [measure(model, ids, start, stop, decoding) for decoding in rows]
    return Choice(select(table, target), table)
