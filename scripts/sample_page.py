"""Passes of one decoding, kept by a `Film`, and a page without outside resources that plays them in
a browser.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).with_suffix(".html")
SPACE_MARK = "\u2581"  # a space, inside a piece


class Cell(NamedTuple):
    """One token of the span after a pass."""

    token: int  # -1: nothing was guessed yet
    p: float  # its probability when it was chosen
    open: bool  # masked; the token is a guess
    at: int  # the pass that chose it; 0: it stood there before


class Unit(NamedTuple):
    """What is shown as one: a token, or the byte tokens of one character."""

    text: str
    label: str  # names of its tokens
    p: float
    open: bool
    at: int


def character(raw: bytes) -> tuple[str, int]:
    """Return the first character and its number of bytes; bytes that make none are one replacement
    mark.
    """
    text = raw.decode(errors="replace")
    sizes = (n for n in range(1, len(raw) + 1) if raw[:n].decode(errors="replace") == text[0])
    return text[0], next(n for n in sizes if raw[n:].decode(errors="replace") == text[1:])


def join(tokenizer: Any, cells: Sequence[Cell]) -> list[Unit]:
    """Spell tokens; the byte tokens of one character, named <0x00> to <0xFF>, become one unit."""
    names = [tokenizer.id_to_piece(cell.token) if cell.token >= 0 else "" for cell in cells]
    is_byte = [not cell.open and tokenizer.is_byte(cell.token) for cell in cells]
    units, i = list[Unit](), 0
    while i < len(cells):
        # No character has more bytes.
        run = itertools.takewhile(is_byte.__getitem__, range(i, min(i + 4, len(cells))))
        raw = bytes(int(names[j][1:-1], 16) for j in run)
        text, size = character(raw) if raw else (names[i].replace(SPACE_MARK, " "), 1)
        own, label = cells[i : i + size], " ".join(names[i : i + size])
        units.append(
            Unit(
                text, label, min(cell.p for cell in own), own[0].open, max(cell.at for cell in own)
            )
        )
        i += size
    return units


def spell(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Text of tokens in the middle of a text: unlike `decode` it keeps a leading space."""
    return "".join(
        unit.text for unit in join(tokenizer, [Cell(token, 1.0, False, 0) for token in tokens])
    )


class Film:
    """Keeps every pass over a span (the first row's); `decode` calls it. Its own time is kept
    apart.
    """

    def __init__(
        self, start: int, cells: Sequence[Cell], draw: Callable[[str, Sequence[Cell]], None] | None
    ) -> None:
        self.start = start
        self.cells = list(cells)
        self.draw = draw
        self.frames = list[tuple[str, list[Cell]]]()
        self.passes = 0
        self.seconds = 0.0

    def add(self, name: str) -> None:
        self.frames.append((name, list(self.cells)))
        if self.draw:
            self.draw(name, self.cells)

    def put(self, name: str, tokens: Sequence[int], nats: Sequence[float]) -> None:
        """Add tokens that no pass over the span has chosen; there may be more nats than tokens."""
        self.cells = [
            Cell(token, math.exp(-n), False, 0) for token, n in zip(tokens, nats, strict=False)
        ]
        self.add(name)

    def __call__(self, *seen: Any) -> None:
        """Take in positions, tokens, log-probabilities and what is still open after a pass: tensors
        (B, n).
        """
        began = time.perf_counter()
        self.passes += 1
        for place, token, log_p, still_open in zip(*(x[0].tolist() for x in seen), strict=True):
            # Windows show text around the span too.
            if 0 <= (i := place - self.start) < len(self.cells):
                was = self.cells[i]
                # Else it stood, and its probability with it.
                if still_open or was.open or was.token != token:
                    self.cells[i] = Cell(token, math.exp(log_p), still_open, self.passes)
        self.add(f"pass {self.passes}")
        self.seconds += time.perf_counter() - began

    def reel(self, tokenizer: Any, count: int, **about: str) -> dict[str, Any]:
        """Return what the page needs of the first `count` tokens, each unit once; about: title,
        note, before, after.
        """
        index, frames = dict[Unit, int](), []
        for name, cells in self.frames:
            units = [unit._replace(p=round(unit.p, 4)) for unit in join(tokenizer, cells[:count])]
            frames.append([name, [index.setdefault(unit, len(index)) for unit in units]])
        return {**about, "units": list(index), "frames": frames}


def page(reels: Sequence[dict[str, Any]]) -> str:
    """Return the page that plays reels. Their text is JSON in which no tag can end."""
    template = PAGE.read_text(encoding="utf-8")
    return template.replace(
        "@DATA@", json.dumps(reels, separators=(",", ":")).replace("<", "\\u003c")
    )
