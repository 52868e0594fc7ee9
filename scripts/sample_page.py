"""Passes of one decoding, kept by a `Recording`, and a page that plays them in a browser.

The page needs no other file.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

PAGE = Path(__file__).with_suffix(".html")
SPACE_MARK = "\u2581"  # a space, inside a piece


class Cell(NamedTuple):
    """One token of the span after a pass."""

    token: int  # -1: nothing was predicted yet
    p: float  # its probability when it was chosen
    masked: bool  # the token is only a prediction
    chosen: int  # the pass that chose it; 0: none


MASKED = Cell(-1, 0.0, True, 0)


class Unit(NamedTuple):
    """What is shown as one: a token, or the byte tokens of one character."""

    text: str
    label: str  # names of its tokens
    p: float
    masked: bool
    chosen: int


def character(raw: bytes) -> tuple[str, int]:
    """Return the first character and its number of bytes; bytes of no character: one U+FFFD."""
    text = raw.decode(errors="replace")
    sizes = (n for n in range(1, len(raw) + 1) if raw[:n].decode(errors="replace") == text[0])
    return text[0], next(n for n in sizes if raw[n:].decode(errors="replace") == text[1:])


def join(tokenizer: Any, cells: Sequence[Cell]) -> list[Unit]:
    """Spell tokens; the byte tokens of one character, named <0x00> to <0xFF>, become one unit."""
    names = [tokenizer.id_to_piece(cell.token) if cell.token >= 0 else "" for cell in cells]
    is_byte = [not cell.masked and tokenizer.is_byte(cell.token) for cell in cells]
    units, i = list[Unit](), 0
    while i < len(cells):
        # No character has more than four bytes.
        run = itertools.takewhile(is_byte.__getitem__, range(i, min(i + 4, len(cells))))
        raw = bytes(int(names[j][1:-1], 16) for j in run)
        text, size = character(raw) if raw else (names[i].replace(SPACE_MARK, " "), 1)
        own, label = cells[i : i + size], " ".join(names[i : i + size])
        p, chosen = min(cell.p for cell in own), max(cell.chosen for cell in own)
        units.append(Unit(text, label, p, own[0].masked, chosen))
        i += size
    return units


def spell(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Text of tokens in the middle of a text: unlike `decode` it keeps a leading space."""
    cells = [Cell(token, 1.0, False, 0) for token in tokens]
    return "".join(unit.text for unit in join(tokenizer, cells))


class Recording:
    """Keeps every pass over a span of the first row, as `watch` of a decoding.

    `seconds` is its own time, which is not that of the decoding.
    """

    def __init__(
        self, start: int, size: int, draw: Callable[[str, Sequence[Cell]], None] | None = None
    ) -> None:
        self.start = start
        self.cells = [MASKED] * size
        self.draw = draw
        self.frames = list[tuple[str, list[Cell]]]()
        self.passes = 0
        self.seconds = 0.0

    def add(self, name: str) -> None:
        """Keep the cells as they are as a frame."""
        self.frames.append((name, list(self.cells)))
        if self.draw:
            self.draw(name, self.cells)

    def put(self, name: str, tokens: Sequence[int], nats: Sequence[float]) -> None:
        """Add tokens that no pass over the span chose; there may be more nats than tokens."""
        pairs = zip(tokens, nats, strict=False)
        self.cells = [Cell(token, math.exp(-n), False, 0) for token, n in pairs]
        self.add(name)

    def __call__(self, positions: Tensor, tokens: Tensor, log_p: Tensor, masked: Tensor) -> None:
        """Keep a pass: positions, tokens, log-probabilities, what is still masked, (B, n) each."""
        began = time.perf_counter()
        self.passes += 1
        lists = [x[0].tolist() for x in (tokens, log_p.exp(), masked)]
        cells = [Cell._make((*values, self.passes)) for values in zip(*lists, strict=True)]
        for position, cell in zip(positions[0].tolist(), cells, strict=True):
            self.update(position - self.start, cell)
        self.add(f"pass {self.passes}")
        self.seconds += time.perf_counter() - began

    def update(self, i: int, cell: Cell) -> None:
        """Set a cell; an accepted token keeps the probability it was chosen with."""
        if not 0 <= i < len(self.cells):  # windows show text around the span, too
            return
        old = self.cells[i]
        if cell.masked or old.masked or old.token != cell.token:
            self.cells[i] = cell

    def for_page(self, tokenizer: Any, count: int, **about: str) -> dict[str, Any]:
        """Return what the page needs of the first `count` tokens, each unit once.

        Args:
            tokenizer: of the tokens.
            count: tokens of the span to show.
            about: title, note, before, after.
        """
        index, frames = dict[Unit, int](), []
        for name, cells in self.frames:
            units = [unit._replace(p=round(unit.p, 4)) for unit in join(tokenizer, cells[:count])]
            frames.append([name, [index.setdefault(unit, len(index)) for unit in units]])
        return {**about, "units": list(index), "frames": frames}


def page(recordings: Sequence[dict[str, Any]]) -> str:
    """Return the page that plays recordings. Their text is JSON in which no tag can end."""
    data = json.dumps(recordings, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("@DATA@", data)
