"""Decode one row: short loops that ask for passes, which an engine takes for many rows at once.

A loop is a generator: it yields the pass that the row needs next and is sent the result. So rows
may be at different places, in different modes, windows and passes, and none waits for another. The
loops do what those of scripts/decoding.py do for whole batches, with the same keys: a row gets the
tokens that `decode` gives it there, but for ties within rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

import train_gpt as tg
from scripts.decoding import (
    LOSSLESS,
    MODES,
    AcceptanceRate,
    Decoding,
    Quality,
    distinct,
    entropy,
    judge,
    look_up,
    repeat,
)
from scripts.serving.passes import NO_TOKEN, Choices, Denoise, Pass, Read, Step, Top, Unmasked
from scripts.serving.text import CommittedText, Vocabulary

DRAFT = 7  # tokens that a speculative pass verifies, after the last accepted one
HEAD_DRAFT = 4  # most of them, where the sequential head drafts: more are seldom accepted

Loop = Generator[Pass, Any, None]


class Cell(NamedTuple):
    """One token of the span after a pass."""

    token: int
    p: float  # probability when it was chosen
    masked: bool  # only a prediction


class Event(NamedTuple):
    """What a row tells its request."""

    row: Row
    kind: str  # text, frame or done
    text: str = ""  # committed since the last event
    cells: tuple[Cell, ...] = ()  # the whole span, for kind frame
    passes: int = 0  # of the row so far


class Pace(Protocol):
    """How long passes take now."""

    def pass_seconds(self, width: int) -> float:
        """Expect the seconds of a pass with a window of `width` tokens, others included."""
        ...


@dataclass(eq=False)
class Row:
    """A span to be decoded, and how far it is."""

    vocabulary: Vocabulary
    prompt: list[int]  # tokens before the span; the first opens the document
    num: int  # most tokens of the span
    decoding: Decoding  # with the row's sampling
    notify: Callable[[Event], None]  # called in the model's thread
    suffix: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)  # mode edit: tokens of the span to revise
    index: int = 0  # place among the rows of the request: the row's key depends on it
    opens: bool = False  # the span is the first text of the document
    stops: tuple[str, ...] = ()
    top: int | None = None  # alternatives to report per token; None: no log-probabilities
    score_prompt: bool = False
    guard: bool = True  # redo poor output
    rank: bool = False  # score span and suffix, and leave poor output to the caller
    frames: bool = False
    deadline: float = math.inf  # of time.monotonic()
    expires: float = math.inf  # of time.monotonic(), when the row is given up

    # State
    span: list[int] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)  # nats, one per token of the span
    tops: list[Top] = field(default_factory=list)
    prompt_log_p: list[float] = field(default_factory=list)  # of all but the first
    prompt_tops: list[Top] = field(default_factory=list)
    suffix_nats: float = 0.0
    passes: int = 0
    reused: int = 0  # tokens of the prompt whose keys another row left
    finish: str = ""  # eos, limit, word or deadline, when the span is complete
    end: tuple[int, float, list[Top]] | None = None  # the end token, if a causal pass chose it
    fell_back: str = ""  # ar or passes
    poor: bool = False  # the span exceeds the limits of the quality monitor
    remasked: int = 0  # mode edit
    error: Exception | None = None
    cancelled: bool = False
    pending: str = ""  # text that is held until the quality is known
    times: dict[str, float] = field(default_factory=dict)  # moments, time.monotonic()
    pace: Pace | None = None
    slot: int = -1
    wanted: Pass | None = None

    def __post_init__(self) -> None:
        first = torch.tensor([self.index])
        self.key = int(tg.split_key(first, self.decoding.sampling.seed))
        self.text = CommittedText(self.vocabulary, self.stops, self.opens)
        self.times["queued"] = time.monotonic()
        self.loop = run(self)

    @property
    def start(self) -> int:
        """Position of the first token of the span."""
        return len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of prompt, longest span and suffix."""
        return self.start + self.num + len(self.suffix)

    @property
    def last(self) -> int:
        """The last clean token."""
        return self.span[-1] if self.span else self.prompt[-1]

    @property
    def place(self) -> int:
        """Position of the last clean token."""
        return self.start + len(self.span) - 1

    @property
    def held(self) -> bool:
        """Is text held back until the span is judged?"""
        revised = self.guard or self.decoding.remask_threshold > 0
        return revised and self.decoding.mode not in LOSSLESS

    def tell(self, kind: str, text: str = "", cells: Sequence[Cell] = ()) -> None:
        self.notify(Event(self, kind, text, tuple(cells), self.passes))

    def accept(self, tokens: Sequence[int], log_p: Sequence[float], tops: Sequence[Top]) -> None:
        """Add tokens to the span, up to an end token, a stop string or its length."""
        end = self.decoding.sampling.end
        for i, token in enumerate(tokens):
            if token == end:
                self.finish = "eos"
                if self.decoding.mode in LOSSLESS:
                    self.end = token, log_p[i], list(tops[i : i + 1])
                break
            self.span.append(token)
            self.log_p.append(log_p[i])
            self.tops += tops[i : i + 1]
            self.pending += self.text.push([token])
            if self.text.stopped or len(self.span) == self.num:
                self.finish = "word" if self.text.stopped else "limit"
                break
        if not self.held:
            self.release()

    def release(self) -> None:
        """Send the text that is held."""
        text, self.pending = self.pending, ""
        if text:
            self.tell("text", text)

    def restart(self, decoding: Decoding) -> None:
        """Forget the span, to decode it in another way."""
        self.decoding, self.finish, self.pending = decoding, "", ""
        self.span, self.log_p, self.tops = [], [], []
        self.end = None
        self.text = CommittedText(self.vocabulary, self.stops, self.opens)

    def show(self, cells: Sequence[Cell]) -> None:
        """Tell a pass: the accepted tokens, then the cells of the present window."""
        if self.frames:
            pairs = zip(self.span, self.log_p, strict=True)
            accepted = [Cell(token, math.exp(log_p), False) for token, log_p in pairs]
            self.tell("frame", cells=[*accepted, *cells])


# ==============================================================================
# 1  LOOPS -- one for each family of modes
# ==============================================================================
def prompt_lookup(row: Row) -> list[int]:
    """Draft what followed the row's last tokens where they occurred before, if they did."""
    text = row.prompt + row.span
    count = min(DRAFT, row.num - len(row.span) - 1)
    ngram = row.decoding.lookup_ngram
    if ngram == 0 or count < 1 or len(text) <= ngram:
        return []
    tokens, done = torch.tensor([text]), torch.tensor([[len(text)]])
    draft, found = look_up(tokens, done, count, ngram)
    return draft[0].tolist() if bool(found) else []


def decode_causally(row: Row) -> Loop:
    """Decode left to right; mode speculative verifies draft tokens in the same pass.

    The output is that of mode ar. Drafts come from the text (arXiv:2304.04487) or else from the
    sequential head, not from windows, whose number would differ from row to row.
    """
    speculative = row.decoding.mode == "speculative"
    width, sampling = 1 + DRAFT * speculative, row.decoding.sampling
    rate = AcceptanceRate.of_head(HEAD_DRAFT)
    while not row.finish:
        draft, room = prompt_lookup(row), row.num - len(row.span) - 1
        wanted = Step(
            row.slot,
            [row.last, *draft],
            row.place,
            width,
            row.key,
            sampling,
            row.top or 0,
            before=(row.prompt + row.span)[-2] if row.place else NO_TOKEN,
            draft=min(rate.draft_length(), room) if speculative and not draft else 0,
        )
        found: Choices = yield wanted
        draft = draft or list(found.draft)
        row.passes += 1
        pairs = enumerate(zip(draft, found.tokens, strict=False))
        count = next((i for i, (token, chosen) in pairs if token != chosen), len(draft)) + 1
        if found.draft:
            rate.update(torch.tensor(count - 1))
        row.accept(found.tokens[:count], found.log_p[:count], found.top[:count])
        row.show([])
        if not row.finish and time.monotonic() >= row.deadline:
            row.finish = "deadline"


def decode_windows(row: Row) -> Loop:
    """Fill windows left to right; the last one reads the text after the span."""
    while not row.finish:
        left = row.num - len(row.span)
        size = min(row.decoding.window, left)
        suffix = row.suffix if size == left else []
        before, place = row.last, row.place
        cells = yield from fill(row, [0] * size, [True] * size, suffix)
        tokens = [cell.token for cell in cells]
        row.accept(tokens, [math.log(max(cell.p, 1e-30)) for cell in cells], [])
        if not row.finish:
            yield Read(row.slot, [before, *tokens], place, [])


def decode_edit(row: Row) -> Loop:
    """Fill tokens of a draft again that the causal stream holds improbable."""
    tokens = [row.last, *row.draft[:-1]]
    found: Choices = yield Read(row.slot, tokens, row.place, row.draft)
    limit = row.decoding.remask_threshold
    low = [math.exp(log_p) < limit for log_p in found.log_p]
    row.remasked = sum(low)
    row.show([Cell(*cell) for cell in zip(row.draft, map(math.exp, found.log_p), low, strict=True)])
    cells = yield from fill(row, row.draft, low, row.suffix)
    pairs = zip(cells, found.log_p, low, strict=True)
    log_p = [math.log(max(cell.p, 1e-30)) if masked else old for cell, old, masked in pairs]
    row.accept([cell.token for cell in cells], log_p, [])


def fill(
    row: Row, own: Sequence[int], masked: Sequence[bool], suffix: Sequence[int]
) -> Generator[Pass, Unmasked, list[Cell]]:
    """Fill the masked tokens of a window, the most confident first (arXiv:1904.09324)."""
    size, total = len(own), sum(masked)
    cells = [Cell(token, 1.0, is_masked) for token, is_masked in zip(own, masked, strict=True)]
    first, before, sampling = row.place, row.last, row.decoding.sampling
    previous: torch.Tensor | None = None
    for step in range(total):
        open_cells = [cell.masked for cell in cells]
        if not any(open_cells):
            break
        found = yield Denoise(
            slot=row.slot,
            first=first,
            tokens=[before, *(cell.token for cell in cells), *suffix],
            masked=open_cells + [False] * len(suffix),
            remaining=plan(row, total, open_cells, step),
            threshold=row.decoding.threshold,
            step=step,
            key=row.key,
            sampling=sampling,
            previous=previous,
        )
        row.passes += 1
        previous = found.previous
        lists = zip(cells, found.tokens[:size], found.log_p, found.masked, strict=False)
        cells = [
            Cell(token, math.exp(log_p), still) if cell.masked else cell
            for cell, token, log_p, still in lists
        ]
        row.show(cells)
    return cells


def plan(row: Row, total: int, masked: Sequence[bool], step: int) -> int:
    """Decide how many tokens stay masked after the next pass.

    Without a deadline `steps` passes take even shares. With one, the passes that still fit before
    it take even shares of what is masked; the last one that fits takes all.
    """
    steps, left = row.decoding.steps, sum(masked)
    if math.isinf(row.deadline) or row.pace is None:
        return int(tg.num_still_masked(torch.tensor(total), step + 1, steps))
    seconds = row.pace.pass_seconds(len(masked) + len(row.suffix) + 1)
    windows = -(-(row.num - len(row.span)) // len(masked))  # this one and those after it
    # The result of the last pass has still to be scored and sent.
    fitting = int((row.deadline - time.monotonic()) / seconds) - windows
    steps = max(min(steps - step, fitting // windows), 1)
    return int(tg.num_still_masked(torch.tensor(left), 1, steps))


LOOPS: dict[str, Callable[[Row], Loop]] = {
    "ar": decode_causally,
    "speculative": decode_causally,
    "refine": decode_windows,
    "block": decode_windows,
    "threshold": decode_windows,
    "edit": decode_edit,
}


# ==============================================================================
# 2  QUALITY -- score the span, and redo it where it is poor
# ==============================================================================
def score(row: Row) -> Loop:
    """Score span and suffix by the causal stream, whose log-probabilities are exact."""
    targets = [*row.span, *row.suffix]
    if not targets:
        return
    tokens = [row.prompt[-1], *targets[:-1]]
    found: Choices = yield Read(row.slot, tokens, row.start - 1, targets, row.top or 0)
    count = len(row.span)
    row.log_p, row.tops = found.log_p[:count], found.top[:count]
    row.suffix_nats = -sum(found.log_p[count:])


def is_poor(row: Row) -> bool:
    """Judge the span as `guard` of scripts/decoding.py does."""
    span = row.span
    if not span:
        return False
    found = Quality(
        nats=torch.tensor([-sum(row.log_p) / len(span)]),
        entropy=torch.tensor([entropy(span)]),
        distinct=torch.tensor([distinct(span)]),
        repeat=torch.tensor([repeat(span)]),
        tokens=torch.tensor([len(span)]),
    )
    return bool(judge(found, len(row.vocabulary))[1])


def redo(row: Row) -> Decoding | None:
    """Choose how a poor span is decoded again: a continuation by ar, an infill by more passes."""
    decoding = row.decoding
    if time.monotonic() >= row.deadline:
        return None
    if not row.suffix:
        row.fell_back = "ar"
        return MODES["ar"]._replace(sampling=decoding.sampling)
    if decoding.steps >= row.num:
        return None
    row.fell_back = "passes"
    return MODES["refine"]._replace(steps=row.num, sampling=decoding.sampling)


def run(row: Row) -> Loop:
    """Decode a row and judge it."""
    if row.num == 0:
        row.finish = "limit"
        return
    yield from decode(row)
    judged = row.guard and row.decoding.mode not in (*LOSSLESS, "edit")
    decoding = redo(row) if judged and row.poor and not row.rank else None
    if decoding is not None:
        row.draft = []
        row.restart(decoding)
        yield from decode(row)
    row.release()


def decode(row: Row) -> Loop:
    """Decode the span, revise it if that is wanted, and score and judge it."""
    mode, limit = row.decoding.mode, row.decoding.remask_threshold
    yield from LOOPS[mode](row)
    if limit and row.span and mode not in (*LOSSLESS, "edit"):
        finish, row.draft = row.finish, row.span
        row.restart(row.decoding)
        yield from decode_edit(row)
        row.finish = finish
    row.pending += row.text.finish()
    if mode not in LOSSLESS and (row.guard or row.rank or row.top is not None):
        yield from score(row)
        row.poor = is_poor(row)
