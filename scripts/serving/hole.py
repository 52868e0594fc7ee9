"""How many tokens are missing between two texts.

An editor sends the text before and after the cursor and does not know how long the missing part
is. Spans of several lengths are decoded as rows of one batch. Each is scored exactly by the causal
stream, prefix + span + suffix; a longer span costs more nats because it has more tokens, so a
correction for its length, fitted on validation text, is added. The length with the least corrected
nats wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.common import fail

LENGTHS = (2, 4, 8, 16, 32)  # tokens
FITTED = Path(__file__).with_name("hole_length.json")  # by scripts/bench/serving.py


def candidates(most: int) -> list[int]:
    """List the lengths to try for a span of at most `most` tokens."""
    return [length for length in LENGTHS if length <= most] or [most]


def read_correction(path: Path | None = None) -> dict[int, float]:
    """Read nats to add by length, else those fitted here; UserError: missing or damaged."""
    path = path or FITTED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["correction_nats"]
        return {int(length): float(nats) for length, nats in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = "does not hold the correction of span lengths; fit it by scripts/bench/serving.py"
        fail(f"{path} {rule} ({type(error).__name__}: {error})")


def correct(correction: Mapping[int, float], length: int) -> float:
    """Return the nats to add for a length: those of the nearest length that was fitted."""
    if not correction:
        return 0.0
    return correction[min(correction, key=lambda known: abs(known - length))]


def choose(lengths: Sequence[int], nats: Sequence[float], correction: Mapping[int, float]) -> int:
    """Return the index of the length with the least corrected nats."""
    scores = [n + correct(correction, length) for length, n in zip(lengths, nats, strict=True)]
    return min(range(len(scores)), key=scores.__getitem__)
