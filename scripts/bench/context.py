"""Measure likelihood and speed by context length, with and without position interpolation.

    DATA_PATH=data/stdlib python scripts/bench/context.py final_model.int8.ptz
    DATA_PATH=data/stdlib python scripts/bench/context.py final_model.int8.ptz --factors 1,2,4,8 \\
        --out context.json

A factor f means rows of f times the TRAIN_SEQ_LEN (T) tokens that a model was trained on: at their
own positions, of which those from T on were not trained, and with all positions divided by f
(ROPE_SCALE; arXiv:2306.15595), without further training. Every factor scores the same text, cut
into longer or shorter rows. "Beyond T" are the tokens with more than T tokens before them in a row
of f T; the next column has the same tokens in rows of T. Neither kind of row has text before it, so
these tokens have (f + 1) T / 2 tokens before them on average in the one, and T / 2 in the other.

Speeds are tokens per second of a batch, medians of three after a warm-up; decoding is mode ar with
its cache, the prompt not counted. Text comes from DATA_PATH and TOKENIZER_PATH, or from the
artifact's settings. The table is Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import train_gpt as tg
from scripts.bench.text import open_validation
from scripts.common import (
    Parser,
    autocast,
    cell,
    check_outputs,
    counts,
    fail,
    load_artifact,
    markdown,
    open_tokenizer,
    pick_device,
    run_command,
    text_config,
    write_result,
)

TOKENS_AT_ONCE = 4096  # a batch; larger ones are slower on a CPU, whose cache they leave
DECODED_ROWS = 4  # decoded together, whatever their length
TIMED = 3  # runs whose median counts, after one that does not


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT")
    add("--factors", type=counts, default="1,2,4", help="rows over T (default %(default)s)")
    parser.whole("--rows", 32, "rows of the longest common length")
    # The first token's time is subtracted.
    parser.whole("--decode-tokens", 64, "tokens to decode, below T", low=2)
    parser.device()
    parser.outputs()
    return parser.parse_args(argv)


class Loaded(NamedTuple):
    """A model, and text that divides into rows of every factor."""

    model: tg.GPT
    text: Tensor  # (N, L + 1) int64 on the device; L is a multiple of every context length
    bytes: Tensor  # (N, L) of each token but the first, as the challenge counts them, on the CPU


def load(args: argparse.Namespace) -> Loaded:
    """Read artifact, tokenizer and evenly spaced pieces of validation text.

    Raises:
        UserError: one is missing, damaged, too short or does not fit; no CUDA device.
    """
    device = pick_device(args.device)
    artifact = load_artifact(args.artifact, device)
    cfg = text_config(artifact.model.cfg)
    counter, loader = open_tokenizer(artifact, cfg.tokenizer_path), open_validation(artifact, cfg)
    if args.decode_tokens >= cfg.train_seq_len:
        rule = f"must be below TRAIN_SEQ_LEN={cfg.train_seq_len}"
        fail(f"--decode-tokens={args.decode_tokens} {rule}")
    length = math.lcm(*args.factors) * cfg.train_seq_len
    if loader.total <= length:
        held = f"DATA_PATH={cfg.data_path!r} holds {loader.total:,} validation tokens"
        fail(f"--factors: rows of all of them need {length:,} tokens, but {held}; name lower ones")
    total = (loader.total - 1) // length
    count = min(args.rows, total)
    text = torch.cat([loader.rows(i * total // count * length, 1, length) for i in range(count)])
    return Loaded(artifact.model, text.to(device), counter.count(text[:, :-1], text[:, 1:]))


def rescaled(model: tg.GPT, factor: float) -> tg.GPT:
    """The same weights with positions divided by a further factor."""
    other = tg.GPT(dataclasses.replace(model.cfg, rope_scale=model.cfg.rope_scale * factor))
    other.load_state_dict(model.state_dict())
    return other.to(model.tok_emb.device).eval()


def cut(text: Tensor, length: int) -> list[Tensor]:
    """Cut text (N, L + 1), in order, into batches (B, length + 1): rows and the token before."""
    rows = text.unfold(1, length + 1, length).flatten(0, 1)
    at_once = max(TOKENS_AT_ONCE // length, 1)
    return [rows[i : i + at_once] for i in range(0, len(rows), at_once)]


def token_nats(at: Loaded, model: tg.GPT, length: int) -> Tensor:
    """Score the text in rows of `length`: nats of each token but the first, (N, L) float64."""
    with autocast(at.text.device):
        parts = [tg.token_nll_causal(model, rows).double().cpu() for rows in cut(at.text, length)]
    return torch.cat(parts).view(at.bytes.shape)


def bpb(nats: Tensor, num_bytes: Tensor, where: Tensor) -> float | None:
    """Bits per byte of some tokens, (N, L) at (L,) bool; None where they hold no byte."""
    total = num_bytes[:, where].sum().item()
    return tg.bits_per_byte(nats[:, where].sum().item(), total) if total else None


def seconds(run: Callable[[], Tensor]) -> float:
    """Time a function: median of TIMED calls after one that does not count."""
    times = list[float]()
    for _ in range(1 + TIMED):
        began = time.perf_counter()
        run().sum().item()  # waits for the device
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def speeds(at: Loaded, model: tg.GPT, length: int, count: int) -> dict[str, float]:
    """Measure tokens per second of scoring rows, and of decoding their last `count` tokens.

    The time of decoding is less that of reading the prompt and decoding one token.
    """
    batch = cut(at.text, length)[0]
    ids = at.text[:DECODED_ROWS, :length]
    start = length - count
    with autocast(at.text.device):
        scored = batch[:, 1:].numel() / seconds(lambda: tg.token_nll_causal(model, batch))
        first = seconds(lambda: tg.decode_autoregressive(model, ids, start, start + 1))
        others = seconds(lambda: tg.decode_autoregressive(model, ids, start, length)) - first
    return {"scored_tok_s": scored, "decoded_tok_s": len(ids) * (count - 1) / max(others, 1e-9)}


def measure(at: Loaded, factors: Sequence[int], count: int) -> dict[str, Any]:
    """Measure rows of every factor, each with and without interpolation."""
    T = at.model.cfg.train_seq_len
    place = torch.arange(at.bytes.shape[1])
    base, results = token_nats(at, at.model, T), []
    jobs = [(factor, scale) for factor in factors for scale in dict.fromkeys((1, factor))]
    for factor, scale in tqdm(jobs, desc="context", leave=False, disable=None):
        model, length = rescaled(at.model, scale), factor * T
        nats, beyond = token_nats(at, model, length), place % length >= T
        row = {"factor": factor, "context": length, "rope_scale": model.cfg.rope_scale}
        row |= {"bpb": bpb(nats, at.bytes, place >= 0), "bpb_beyond": bpb(nats, at.bytes, beyond)}
        row["bpb_beyond_in_rows_of_t"] = bpb(base, at.bytes, beyond)
        results.append(row | speeds(at, model, length, count))
    size = {"tokens": at.bytes.numel(), "bytes": int(at.bytes.sum())}
    about = {"train_seq_len": T, **size, "device": str(at.text.device)}
    about |= {"decode_tokens": count, "decoded_rows": min(DECODED_ROWS, len(at.text))}
    return about | {"bpb_in_rows_of_t": bpb(base, at.bytes, place >= 0), "results": results}


def table(result: dict[str, Any]) -> str:
    """Write the result as Markdown."""
    T, rows = result["train_seq_len"], []
    head = ["context", "ROPE_SCALE", "bpb", f"bpb beyond {T}", f"same, rows of {T}"]
    head += ["scored tok/s", "decoded tok/s"]
    for row in result["results"]:
        scores = [row["bpb"], row["bpb_beyond"], row["bpb_beyond_in_rows_of_t"]]
        cells = [f"{row['context']:,}", f"{row['rope_scale']:g}"]
        cells += [cell(score, 4) for score in scores]
        rows.append([*cells, f"{row['scored_tok_s']:,.0f}", f"{row['decoded_tok_s']:,.0f}"])
    return f"{result['tokens']:,} tokens of {result['bytes']:,} bytes\n\n{markdown(head, rows)}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; UserError: it cannot be measured, or the result not be written."""
    check_outputs(args)
    found = measure(load(args), args.factors, args.decode_tokens)
    result = {"artifact": str(args.artifact)} | found
    write_result(args.out, result)
    print(table(result) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
