"""Decode many rows at once: a bounded queue, slots, and one thread that owns the model.

Each tick admits waiting rows, reads a few chunks of their prompts (chunked prefill,
arXiv:2403.02310), takes one pass for every row that is being decoded (iteration-level scheduling,
Yu et al. 2022, Orca), and frees the slots of rows that are done. Keys of an equal prefix are
copied from the slot that has them: an editor sends the same text again with a few letters more.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

import train_gpt as tg
from scripts.chain import Head
from scripts.common import autocast
from scripts.decoding import GREEDY, LOSSLESS
from scripts.serving.passes import Choices, Denoise, Pass, Passes, Read, Result, Step
from scripts.serving.rows import Row

if TYPE_CHECKING:
    from scripts.serving.metrics import Metrics

CHUNK = 32  # tokens of a prompt that one pass reads, at multiples of it
CHUNKS_PER_TICK = 4  # so that a long prompt does not stop the other rows
DECAY = 0.8  # weight of the average of seconds so far


class QueueFull(Exception):
    """No room for more rows; `retry_after` seconds may help."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Draining(Exception):
    """The server is about to end, and takes no more rows."""


class TimedOut(Exception):
    """A row took longer than the limit of the server."""


class Limits(NamedTuple):
    """What one server takes on."""

    slots: int = 16  # rows that are decoded at once
    queue: int = 64  # rows that wait
    max_seconds: float = 120.0  # of a request, the wait included


@dataclass
class Slot:
    """Static buffers of one row."""

    row: Row | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # clean, known
    read: int = 0  # tokens of the row's prompt that are in the cache

    def common(self, prompt: np.ndarray) -> int:
        """Count the tokens at the beginning that are equal."""
        n = min(len(self.tokens), len(prompt))
        different = np.flatnonzero(self.tokens[:n] != prompt[:n])
        return int(different[0]) if len(different) else n


class Costs:
    """Moving averages of the seconds of a tick, by the tokens in its passes (powers of two)."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def observe(self, tokens: int, seconds: float) -> None:
        bucket = max(tokens, 1).bit_length()
        known = self.seconds.get(bucket, seconds)
        self.seconds[bucket] = DECAY * known + (1 - DECAY) * seconds

    def estimate(self, tokens: int) -> float:
        """Expect the seconds of a tick: of the nearest known size, scaled up but never down."""
        bucket = max(tokens, 1).bit_length()
        if not self.seconds:
            return 0.01
        nearest = min(self.seconds, key=lambda known: abs(known - bucket))
        return float(self.seconds[nearest] * 2.0 ** max(bucket - nearest, 0))


class Engine:
    """Rows in slots, on a thread of their own.

    Args:
        model: in evaluation mode, on its device.
        limits: of the server.
        metrics: counters that the thread updates.
        deterministic: see `Passes`.
        head: see `Passes`.
    """

    def __init__(
        self,
        model: tg.GPT,
        limits: Limits,
        metrics: Metrics,
        deterministic: bool = False,
        head: Head | None = None,
    ) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self.deterministic = deterministic
        self.slots = [Slot() for _ in range(limits.slots)]
        self.waiting: deque[Row] = deque()
        self.wake = threading.Condition()
        self.costs = Costs()
        self.load = 0  # tokens in the passes of the last tick
        self.row_seconds = 1.0  # moving average of the time that a row holds a slot
        self.draining = self.stopping = False
        with self.computing():
            self.passes = Passes(model, limits.slots, deterministic, head)
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradients, in the model's type."""
        with torch.inference_mode(), autocast(next(self.model.parameters()).device):
            yield

    def warm_up(self) -> None:
        """Time passes of some sizes, so that the first deadline is kept, too; before `start`."""
        length = self.model.cfg.train_seq_len
        self.passes.used[0] = length
        for size in (1, 16, 64, min(length - 1, 256)):
            size = min(size, length - 1)
            wanted: Step | Denoise = Step(0, [0] * size, 0, size, 0, GREEDY)
            if self.model.mask_emb is not None and size > 1:
                tokens, masked = [0] * size, [True] * (size - 1)
                wanted = Denoise(0, 0, tokens, masked, 0, math.inf, 0, 0, GREEDY)
            for _ in range(2):  # the first call also allocates
                began = time.perf_counter()
                with self.computing():
                    self.passes.take([wanted])
            self.costs.observe(size, time.perf_counter() - began)
        self.passes.used[0] = 1

    # --- used by any thread ---

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread; rows that are left are given up."""
        with self.wake:
            self.stopping = self.draining = True
            self.wake.notify()
        if self.thread.is_alive():
            self.thread.join()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows together.

        Raises:
            QueueFull: free slots and the queue have no room for all of them.
            Draining: the server ends.
        """
        with self.wake:
            if self.draining:
                raise Draining
            free = self.limits.slots - len(self.active())
            if len(self.waiting) + len(rows) > self.limits.queue + free:
                raise QueueFull(self.retry_after())
            for row in rows:
                row.pace = self
            self.waiting.extend(rows)
            self.wake.notify()

    def retry_after(self) -> int:
        """Expect the seconds until half of the queue has gone, 1 to 30."""
        waits = len(self.waiting) / 2 / self.limits.slots * self.row_seconds
        return min(max(math.ceil(waits), 1), 30)

    def cancel(self, rows: Sequence[Row]) -> None:
        """Give rows up: their slots are free at the next tick."""
        for row in rows:
            row.cancelled = True
        with self.wake:
            self.wake.notify()

    def active(self) -> list[Row]:
        return [slot.row for slot in self.slots if slot.row is not None]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.active()

    def pass_seconds(self, width: int) -> float:
        return self.costs.estimate(max(self.load, width))

    # --- the model's thread ---

    def _work(self) -> None:
        with self.computing():
            while not self.stopping:
                with self.wake:
                    while self.idle and not self.stopping:
                        self.wake.wait()
                try:
                    self.tick()
                except Exception as error:  # whatever it is, the thread must live on
                    for row in self.active():
                        row.error = error
                        self._free(row)
        for row in [*self.waiting, *self.active()]:
            row.error = Draining("the server has ended")
            row.tell("done")

    def tick(self) -> None:
        """Admit, read prompts, take one pass for each row, and free what is done."""
        began = time.perf_counter()
        with self.wake:
            self._drop()
            self._admit()
        self._read_prompts()
        rows = [row for row in self.active() if row.wanted is not None]
        if rows:
            self.load = sum(len(row.wanted.tokens) for row in rows if row.wanted is not None)
            self._advance(rows)
            seconds = time.perf_counter() - began
            self.costs.observe(self.load, seconds)
            self.metrics.tick.observe(seconds)
        else:
            self.load = 0
        self.metrics.slots.set(len(self.active()))
        self.metrics.queue.set(len(self.waiting))

    def _drop(self) -> None:
        """Forget rows whose client has gone or whose time is over."""
        now = time.monotonic()
        for row in [*self.waiting, *self.active()]:
            if row.cancelled or now > row.expires:
                if row in self.waiting:
                    self.waiting.remove(row)
                if not row.cancelled:
                    row.error = TimedOut(f"took longer than {self.limits.max_seconds:g} s")
                self._free(row)

    def _admit(self) -> None:
        while self.waiting and any(slot.row is None for slot in self.slots):
            row = self.waiting.popleft()
            i = self._choose_slot(row)
            slot = self.slots[i]
            row.slot, slot.row, slot.read = i, row, 0
            row.times["admitted"] = time.monotonic()
            # Others may still copy what the slot held before.
            most = max(row.length, len(slot.tokens))
            self.passes.used[i] = min(most, self.model.cfg.train_seq_len)

    def _choose_slot(self, row: Row) -> int:
        """Take the free slot with the longest equal prefix, else one at an end.

        Rows that are read causally fill slots from below and rows that are denoised from above, so
        that the rows of a pass are neighbours.
        """
        free = [i for i, slot in enumerate(self.slots) if slot.row is None]
        prompt = np.array(row.prompt[:-1])
        best = max(free, key=lambda i: self.slots[i].common(prompt))
        if self.slots[best].common(prompt) >= CHUNK:
            return best
        return free[0] if row.decoding.mode in LOSSLESS else free[-1]

    def _read_prompts(self) -> None:
        """Read chunks of prompts, those of the row that was admitted first before others."""
        reading = [row for row in self.active() if row.wanted is None]
        reading.sort(key=lambda row: row.times["admitted"])
        chunks = CHUNKS_PER_TICK
        for row in reading:
            slot, prompt = self.slots[row.slot], np.array(row.prompt[:-1])
            if slot.read == 0:
                self._reuse(row, prompt)
            while chunks and slot.read < len(prompt) and row.error is None:
                self._read_chunk(row, slot, prompt)
                chunks -= 1
            if row.error is not None:
                self._free(row)
            elif slot.read < len(prompt):
                return
            else:
                self._start(row)

    def _reuse(self, row: Row, prompt: np.ndarray) -> None:
        """Copy the keys of an equal prefix from the slot that has the longest."""
        own = self.slots[row.slot]
        source = max(range(len(self.slots)), key=lambda i: self.slots[i].common(prompt))
        count = self.slots[source].common(prompt)
        if self.slots[source] is not own and count == own.common(prompt):
            source = row.slot
        if self.deterministic:  # a chunk that was read in part has other rounding
            count -= count % CHUNK
        if row.score_prompt:  # needs the logits of all tokens
            count = 0
        if count and source != row.slot:
            self.passes.copy_prefix(source, row.slot, count)
        own.tokens, own.read, row.reused = prompt[:count], count, count
        self.metrics.reused.inc(count)

    def _read_chunk(self, row: Row, slot: Slot, prompt: np.ndarray) -> None:
        stop = min((slot.read // CHUNK + 1) * CHUNK, len(prompt))
        tokens = row.prompt[slot.read : stop]
        targets = row.prompt[slot.read + 1 : stop + 1] if row.score_prompt else []
        wanted = Read(row.slot, tokens, slot.read, targets, row.top or 0)
        for found in self._take([row], [wanted]):
            row.prompt_log_p += found.log_p
            row.prompt_tops += found.top if isinstance(found, Choices) else []
            slot.read, slot.tokens = stop, prompt[:stop]

    def _take(self, rows: Sequence[Row], wanted: Sequence[Pass]) -> list[Result]:
        """Take passes; if that fails, as for want of memory, their rows have the error."""
        for each in wanted:
            self.metrics.passes.labels(type(each).__name__.lower()).inc()
        try:
            return self.passes.take(wanted)
        except Exception as error:  # whatever it is, the thread must live on
            for row in rows:
                row.error = error
            return []

    def _start(self, row: Row) -> None:
        row.times["started"] = time.monotonic()
        self._resume(row, None)

    def _advance(self, rows: Sequence[Row]) -> None:
        """Take one pass for each row and hand them the results."""
        wanted = [row.wanted for row in rows if row.wanted is not None]
        results = self._take(rows, wanted)
        for row, found in zip(rows, results, strict=False):
            self._resume(row, found)
        for row in rows:
            if row.error is not None:
                self._free(row)

    def _resume(self, row: Row, found: Result | None) -> None:
        """Go on with the loop of a row up to its next pass."""
        try:
            row.wanted = row.loop.send(found)
        except StopIteration:
            self._free(row)
        except Exception as error:  # a row must not end the thread
            row.error = error

    def _free(self, row: Row) -> None:
        """Tell that a row is done and free its slot, whose prompt stays known."""
        if row.slot >= 0:
            slot = self.slots[row.slot]
            slot.row = None
            self.passes.used[row.slot] = max(len(slot.tokens), 1)
            held = time.monotonic() - row.times["admitted"]
            self.row_seconds = DECAY * self.row_seconds + (1 - DECAY) * held
        row.times["done"] = time.monotonic()
        if not row.cancelled:
            row.tell("done")
