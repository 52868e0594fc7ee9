"""From the body of a request to rows, and from finished rows to choices."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scripts.decoding import LOSSLESS, MODES, Decoding, Sampling
from scripts.serving import hole
from scripts.serving.bodies import EFFORTS, Body
from scripts.serving.engine import Draining, Engine, QueueFull, TimedOut
from scripts.serving.errors import ApiError
from scripts.serving.rows import Cell, Event, Row
from scripts.serving.text import Vocabulary

WINDOW_MODES = ("refine", "block", "threshold")  # they read text after the span
REVISED_BELOW = MODES["draft_refine"].remask_threshold  # probability


class Options(NamedTuple):
    """Limits of requests."""

    max_rows: int = 32  # prompts x n of one request
    suffix_tokens: int = 64  # most text after a span that its window reads
    correction: dict[int, float] = {}  # noqa: RUF012 -- of hole.py; never changed


class Model(NamedTuple):
    """What requests need to know of the model."""

    name: str
    vocabulary: Vocabulary
    length: int  # TRAIN_SEQ_LEN: the context in tokens
    denoiser: bool


class Wish(NamedTuple):
    """What a request asks for, in tokens."""

    body: Body
    prompts: list[list[int]]  # the first token of each opens the document
    hidden: list[int]  # tokens at the beginning of each that the client did not send
    suffix: list[int]
    num: int  # most tokens
    n: int = 1
    draft: Sequence[int] = ()
    echo: bool = False
    top: int | None = None
    deadline_ms: float | None = None
    truncated: bool = False


class Update(NamedTuple):
    """News of a choice, for a stream."""

    choice: Choice
    text: str = ""  # committed since the last
    cells: tuple[Cell, ...] = ()
    passes: int = 0
    done: bool = False


@dataclass(eq=False)
class Choice:
    """One answer: a row, or rows of different lengths of which one is chosen."""

    index: int
    rows: list[Row]
    hidden: int
    row: Row = field(init=False)
    left: int = field(init=False)
    earlier: Row | None = None  # the chosen row, while `row` is its second try
    lengths: dict[int, float] = field(default_factory=dict)  # corrected nats by length

    def __post_init__(self) -> None:
        self.row, self.left = self.rows[-1], len(self.rows)

    @property
    def finish_reason(self) -> str:
        return "length" if self.row.finish in ("limit", "deadline") else "stop"


# ==============================================================================
# 1  SETTINGS
# ==============================================================================
def choose_mode(body: Body, wish: Wish, model: Model) -> str:
    """Return the mode; ApiError: the model or the mode cannot do what is wanted."""
    plans = (body.steps, body.window, body.threshold, body.redo, body.reasoning_effort)
    default = "refine" if wish.suffix else "ar"
    if default == "ar" and model.denoiser and any(value is not None for value in plans):
        default = "block"
    mode = "edit" if wish.draft else body.mode or default
    if not model.denoiser and mode not in LOSSLESS:
        what = "suffix" if wish.suffix and not body.mode else "mode"
        rule = "needs a denoiser, and this model was trained without one (DIFFUSION_LOSS_WEIGHT=0)"
        remedy = "use mode ar without a suffix, or serve another artifact"
        raise ApiError(400, f"{mode} {rule}; {remedy}", "no_denoiser", what)
    unread = [name for name in ("steps", "threshold", "redo") if getattr(body, name) is not None]
    if unread and body.mode in LOSSLESS:
        rule = f"not read by mode={mode}; leave it out, or use mode=block"
        raise ApiError(400, f"{', '.join(unread)}: {rule}", "invalid_value", unread[0])
    if wish.suffix and mode not in (*WINDOW_MODES, "edit"):
        rule = f"cannot read text after the span; use one of {', '.join(WINDOW_MODES)}"
        raise ApiError(400, f"mode={mode} {rule}", "invalid_value", "mode")
    return mode


def choose_decoding(wish: Wish, model: Model) -> Decoding:
    """Return the settings of all rows of a request."""
    body = wish.body
    mode = choose_mode(body, wish, model)
    decoding = MODES["refine" if mode == "edit" else mode]._replace(mode=mode)
    steps = body.steps or EFFORTS.get(body.reasoning_effort or "")
    if steps is None and wish.deadline_ms is not None:
        steps = max(wish.num, len(wish.draft), 1)  # as many as fit
    given: dict[str, Any] = {"steps": steps, "window": body.window, "threshold": body.threshold}
    given["remask_threshold"] = REVISED_BELOW if mode == "edit" and body.redo is None else body.redo
    decoding = decoding._replace(**{k: v for k, v in given.items() if v is not None})
    seed = body.seed if body.seed not in (None, -1) else secrets.randbits(32)
    end = model.vocabulary.bos if not wish.suffix and mode != "edit" else -1
    sampling = Sampling(
        temperature=body.temperature or 0.0,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed or 0,
        end=end,
    )
    return decoding._replace(sampling=sampling)


def lengths_of(wish: Wish, mode: str) -> list[int]:
    """List the lengths of the span to try: several where text follows and none is given."""
    length = wish.body.hole
    if isinstance(length, int):
        return [min(length, wish.num)]
    if not wish.suffix or mode not in WINDOW_MODES or wish.num == 0:
        return [wish.num]
    return hole.candidates(wish.num)


# ==============================================================================
# 2  A REQUEST -- its rows, and what they tell
# ==============================================================================
class Job:
    """A request that is being decoded.

    Its deadline and the limit of the server count from `began`, of time.monotonic(), when it
    arrived: a second try gets what is left of them.

    Raises:
        ApiError: more rows than one request may have, or a mode that the model does not have.
    """

    def __init__(
        self,
        wish: Wish,
        model: Model,
        engine: Engine,
        options: Options,
        began: float | None = None,
    ) -> None:
        self.wish, self.model = wish, model
        self.engine, self.options = engine, options
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.frames: dict[Row, Event] = {}  # the newest of each row that is in the queue
        self.decoding = choose_decoding(wish, model)
        self.began = time.monotonic() if began is None else began
        self.lengths = lengths_of(wish, self.decoding.mode)
        num_rows = len(wish.prompts) * wish.n * len(self.lengths)
        if num_rows > options.max_rows:
            rule = f"{num_rows} rows (prompts x n x span lengths) exceed {options.max_rows}"
            raise ApiError(400, f"{rule}; send fewer at a time", "too_many_rows", "n")
        self.choices = list[Choice]()
        for prompt, hidden in zip(wish.prompts, wish.hidden, strict=True):
            for i in range(wish.n):
                rows = [self._row(prompt, i, length) for length in self.lengths]
                self.choices.append(Choice(len(self.choices), rows, hidden))
        self.of_row = {row: choice for choice in self.choices for row in choice.rows}

    def _row(self, prompt: list[int], index: int, num: int) -> Row:
        wish, deadline = self.wish, math.inf
        if wish.deadline_ms is not None:
            deadline = self.began + wish.deadline_ms / 1000
        return Row(
            vocabulary=self.model.vocabulary,
            prompt=prompt,
            num=len(wish.draft) or num,
            decoding=self.decoding,
            notify=self._notify,
            suffix=wish.suffix,
            draft=list(wish.draft),
            index=index,
            opens=len(prompt) == 1,
            stops=wish.body.stops(),
            top=wish.top,
            score_prompt=wish.echo and wish.top is not None,
            guard=wish.body.guard,
            rank=len(self.lengths) > 1,
            frames=bool(wish.body.diffusing),
            deadline=deadline,
            expires=self.began + self.engine.limits.max_seconds,
        )

    def _notify(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        """Queue an event. A frame takes the place of the one of its row that still waits.

        So a client that reads slowly misses frames, and a row holds the cells of one at most.
        """
        waits = event.row in self.frames
        if event.kind == "frame":
            self.frames[event.row] = event
        if event.kind != "frame" or not waits:
            self.events.put_nowait(event)

    async def _next(self) -> Event:
        event = await self.events.get()
        return self.frames.pop(event.row) if event.kind == "frame" else event

    def submit(self) -> None:
        """Queue all rows; ApiError: 429 or 503."""
        self._submit([row for choice in self.choices for row in choice.rows])

    def _submit(self, rows: Sequence[Row]) -> None:
        try:
            self.engine.submit(rows)
        except QueueFull as error:
            message = f"all slots are busy and {self.engine.limits.queue} rows wait; try again"
            raise ApiError(429, message, "queue_full", None, error.retry_after) from error
        except Draining as error:
            raise ApiError(503, "the server is about to end", "draining", None, 5) from error

    def cancel(self) -> bool:
        """Give up what is not finished; say whether there was anything."""
        rows = [row for row in self.of_row if not (row.cancelled or "done" in row.times)]
        self.engine.cancel(rows)
        return bool(rows)

    async def updates(self) -> AsyncIterator[Update]:
        """Yield what streams show, and each choice once when it is done.

        Raises:
            ApiError: a row failed.
        """
        left = len(self.choices)
        while left:
            event = await self._next()
            choice = self.of_row[event.row]
            if event.row.error is not None and not self._revert(choice, event.row):
                raise failure(event.row.error)
            if event.kind == "done":
                choice.left -= 1
                if choice.left == 0 and self._settle(choice):
                    left -= 1
                    if len(self.lengths) > 1:
                        yield Update(choice, choice.row.text.text)
                    yield Update(choice, done=True)
            elif event.kind == "frame":
                # Of several lengths only the longest is shown; which one is best is not known yet.
                if event.row is choice.rows[-1] or event.row not in choice.rows:
                    yield Update(choice, cells=event.cells, passes=event.passes)
            elif len(self.lengths) == 1:
                yield Update(choice, event.text)

    def _settle(self, choice: Choice) -> bool:
        """Choose among rows of different lengths; a poor choice is decoded again first."""
        if len(choice.rows) > 1 and not choice.lengths:
            nats = [row.suffix_nats - sum(row.log_p) for row in choice.rows]
            sizes, correction = [row.num for row in choice.rows], self.options.correction
            pairs = zip(sizes, nats, strict=True)
            choice.lengths = {n: x + hole.correct(correction, n) for n, x in pairs}
            choice.row = choice.rows[hole.choose(sizes, nats, correction)]
            again = self._again(choice.row)
            if again is not None:
                self.of_row[again] = choice
                choice.earlier = choice.row
                choice.row, choice.left = again, 1
                return False
        return True

    @staticmethod
    def _revert(choice: Choice, row: Row) -> bool:
        """Return to the row before a second try that failed; False: there is none."""
        if choice.earlier is None or row is not choice.row:
            return False
        choice.row, choice.earlier = choice.earlier, None
        choice.row.times["done"] = row.times["done"]
        return True

    def _again(self, row: Row) -> Row | None:
        """Queue a poor span once more, with a pass per token; None: not needed or no room."""
        steps = row.num
        if not (row.poor and row.guard) or row.decoding.steps >= steps:
            return None
        if time.monotonic() >= row.deadline:
            return None
        more = self._row(row.prompt, row.index, row.num)
        more.decoding = row.decoding._replace(steps=steps)
        more.fell_back, more.rank = "passes", True
        try:
            self._submit([more])
        except ApiError:  # the span that is there is better than none
            return None
        return more

    async def finish(self) -> list[Choice]:
        """Wait for all choices; ApiError: a row failed."""
        async for _ in self.updates():
            pass
        return self.choices


def failure(error: Exception) -> ApiError:
    """Turn the error of a row into that of its request."""
    if isinstance(error, TimedOut):
        message = f"the request {error}; ask for fewer tokens or passes"
        return ApiError(503, message, "timeout", None, 5)
    if isinstance(error, Draining):
        return ApiError(503, "the server has ended", "draining", None, 5)
    return ApiError(500, f"decoding failed ({type(error).__name__}: {error})", "internal_error")


def deadline_kept(row: Row) -> bool | None:
    """Was the row done by its deadline? None: it has none."""
    if math.isinf(row.deadline):
        return None
    return row.times["done"] <= row.deadline


def about(choice: Choice) -> dict[str, Any]:
    """Say how a choice was decoded."""
    row = choice.row
    facts: dict[str, Any] = {
        "mode": row.decoding.mode,
        "passes": row.passes,
        "seed": row.decoding.sampling.seed,
        "fell_back": row.fell_back or None,
    }
    if row.poor:
        facts["poor"] = True
    if choice.lengths:
        nats = {str(n): round(x, 3) for n, x in choice.lengths.items()}
        facts["hole"] = {"length": row.num, "corrected_nats": nats}
    if (kept := deadline_kept(row)) is not None:
        facts["deadline_kept"] = kept
    if row.draft:
        changed = sum(old != new for old, new in zip(row.draft, row.span, strict=False))
        facts |= {"remasked": row.remasked, "changed": changed}
    return facts
