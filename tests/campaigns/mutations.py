"""Random damage to bytes, text and JSON; each change says what it did."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Changed = tuple[str, bytes]  # what was changed, and what came out
# fmt: off
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 1e30, 2**31, 2**63, 2**64, 2**70, 10**400, "", "1",
    "text", "nan", "\u65e5\u672c", "\x00", "\x1b[31m", "a" * 10_000, [], [1], [[]], {}, {"a": 1},
    float("nan"), float("inf"), -float("inf"),
)
# fmt: on


def flip_bit(data: bytes, draw: random.Random) -> Changed:
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return f"bit {bit} of byte {place} flipped", bytes(changed)


def overwrite(data: bytes, draw: random.Random) -> Changed:
    place, size = draw.randrange(len(data)), draw.choice((1, 4, 64, 4096))
    new = draw.choice((b"\0" * size, b"\xff" * size, draw.randbytes(size)))
    return f"{size} bytes at {place} overwritten", data[:place] + new + data[place + size :]


def truncate(data: bytes, draw: random.Random) -> Changed:
    size = draw.choice((0, 1, len(data) - 1, len(data) - 2, draw.randrange(len(data))))
    return f"truncated from {len(data)} to {size} bytes", data[:size]


def append(data: bytes, draw: random.Random) -> Changed:
    size = draw.choice((1, 2, 100, 5000))
    new = draw.choice((b"\0" * size, draw.randbytes(size), data))
    return f"{len(new)} bytes appended", data + new


def insert(data: bytes, draw: random.Random) -> Changed:
    place, size = draw.randrange(len(data)), draw.choice((1, 2, 100))
    return f"{size} bytes inserted at {place}", data[:place] + draw.randbytes(size) + data[place:]


def delete(data: bytes, draw: random.Random) -> Changed:
    place, size = draw.randrange(len(data)), draw.choice((1, 2, 100))
    return f"{size} bytes removed at {place}", data[:place] + data[place + size :]


def replace_all(data: bytes, draw: random.Random) -> Changed:
    size = draw.choice((1, 100, len(data)))
    return f"replaced by {size} random bytes", draw.randbytes(size)


BYTE_CHANGES = (flip_bit, flip_bit, flip_bit, overwrite, truncate, append, insert, delete)
ANY_CHANGE: tuple[Callable[[bytes, random.Random], Changed], ...] = (*BYTE_CHANGES, replace_all)


def damage(data: bytes, draw: random.Random) -> Changed:
    """Change bytes in one way; the result is another one."""
    while True:
        what, changed = draw.choice(ANY_CHANGE)(data, draw)
        if changed != data:
            return what, changed


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value inside nested JSON."""
    rows = value if isinstance(value, dict) else {}
    if isinstance(value, list):
        rows = dict(enumerate(value))
    found = list[tuple[Any, ...]]()
    for key, part in rows.items():
        found += [(*above, key), *places(part, (*above, key))]
    return found


def change_json(value: Any, draw: random.Random) -> tuple[str, Any]:
    """Give one place inside nested JSON another value, or remove it."""
    changed = copy.deepcopy(value)
    path = draw.choice(places(changed))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    name = ".".join(map(str, path))
    if draw.random() < 0.2:
        del holder[path[-1]]
        return f"{name} removed", changed
    new = draw.choice(ODD_VALUES)
    holder[path[-1]] = new
    return f"{name} = {repr(new)[:60]}", changed


def change_json_text(text: str, draw: random.Random) -> Changed:
    """The same for a document of JSON, which may also stop being one."""
    kind = draw.randrange(8)
    if kind == 0:
        return "nested 100,000 deep", b"[" * 100_000
    if kind == 1:
        return "a list", b"[]"
    if kind == 2:
        return "UTF-16", text.encode("utf-16")
    if kind == 3:
        return "a number of 10,000 digits", b'{"settings": ' + b"9" * 10_000 + b"}"
    if kind == 4:
        return damage(text.encode(), draw)
    what, changed = change_json(json.loads(text), draw)
    return what, json.dumps(changed).encode()
