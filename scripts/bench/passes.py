"""Score decoding itself: exact bits per byte against forward passes per token, without samples.

    python scripts/bench/passes.py --head final_model.int6.head      windows of 4, 8, 16 tokens
    python scripts/bench/passes.py --head final_model.int6.head --rows 256 --plot passes.png
    python scripts/bench/passes.py --order spread                    tokens of a pass far apart

parallel_bpb window:S passes:N is what a decoder that fills windows of S tokens in N passes, by a
schedule fixed in advance, gives the text: by the chain rule over passes and, inside a pass, over
tokens, which are independent (factorised) or decided left to right with a sequential head of
scripts/chain.py (chained). It is no bound: the probabilities of all windows sum to one. A pass of
the clean stream per window, which enters it into the cache, is not counted. `alone` is the head
without a window: what it adds, and logits that were fitted with it.

Text comes from DATA_PATH and TOKENIZER_PATH, or from where the artifact was trained; rows are
evenly spaced over the validation split. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import train_gpt as tg
from scripts.bench.likelihood import Loaded, causal, load, window_sizes
from scripts.chain import Head, alone_nll, load_head, parallel_nll, window_groups
from scripts.common import (
    Parser,
    autocast,
    check_outputs,
    fail,
    markdown,
    run_command,
    to_json,
    write_result,
)

ORDERS = ("parts", "spread")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--artifact", type=Path, help="default: the newest final_model.*.ptz here")
    add("--adapter", type=Path, metavar="FILE", help="of scripts/finetune.py, trained beside it")
    add("--head", type=Path, metavar="FILE", help="of scripts/chain.py, fitted to the artifact")
    add("--windows", default="4,8,16", help="window sizes, T for a row (default %(default)s)")
    parser.whole("--rows", 64, "validation rows of T tokens")
    order = "what a pass decides: a part of the window, the first ones first, or every N-th token"
    add("--order", choices=ORDERS, default="parts", help=f"{order} (default %(default)s)")
    parser.device()
    parser.outputs("picture of bits per byte against passes per token")
    return parser.parse_args(argv)


# ==============================================================================
# 1  SCORES
# ==============================================================================


def schedule(size: int, passes: int, order: str) -> Tensor:
    """Number of the pass that decides each token of a window, (S,) int64."""
    place = torch.arange(size)
    return place * passes // size if order == "parts" else place % passes


def pass_counts(size: int) -> list[int]:
    """Powers of two up to the window's size, and that size."""
    return sorted({1 << i for i in range(size.bit_length()) if 1 << i <= size} | {size})


@torch.no_grad()
def score(
    at: Loaded, head: Head | None, order: Tensor, mask: tuple[Tensor, ...]
) -> tuple[float, float]:
    """Bits per byte of a schedule (S,): factorised, and chained (without a head the same)."""
    sums = torch.zeros(2, dtype=torch.double, device=at.device)
    for _, rows in at.batches():
        with autocast(at.device):
            sums += parallel_nll(at.model, head, rows, order, mask).double().flatten(1).sum(1)
    factorised, chained = (tg.bits_per_byte(nats, at.bytes) for nats in sums.tolist())
    return factorised, chained


@torch.no_grad()
def score_alone(at: Loaded, head: Head, size: int) -> float:
    """Bits per byte of windows of which the clean stream predicts the first token, and the head
    alone the others.
    """
    nats = 0.0
    for _, rows in at.batches():
        with autocast(at.device):
            first = tg.token_nll_causal(at.model, rows)[:, ::size]
            x = rows.unfold(1, size + 1, size).flatten(0, 1)  # (B W, 1 + S)
            others = alone_nll(head, x)
        nats += first.double().sum().item() + others.double().sum().item()
    return tg.bits_per_byte(nats, at.bytes)


def measure(at: Loaded, head: Head | None, args: argparse.Namespace) -> dict[str, Any]:
    """Score all schedules; the result as it is printed."""
    sizes = [size for size in window_sizes(args.windows, at.cfg, "--windows") if size > 1]
    if not sizes:
        fail(f"--windows={args.windows!r} must name windows of two or more tokens")
    plan = [(size, passes) for size in sizes for passes in pass_counts(size)]
    rows, exact = list[dict[str, Any]](), causal(at, lambda: None)
    for size, passes in tqdm(plan, "passes", leave=False, disable=None):
        mask = window_groups(at.cfg, size, at.device)
        order = schedule(size, passes, args.order).to(at.device)
        row: dict[str, Any] = {"window": size, "passes": passes, "passes_per_token": passes / size}
        row["factorised_bpb"], chained = score(at, head, order, mask)
        row["chained_bpb"] = None if head is None else chained
        alone = head is not None and passes == 1
        row["alone_bpb"] = score_alone(at, head, size) if head and alone else None
        rows.append(row)
    about = {name: getattr(args, name) for name in ("artifact", "head", "adapter")}
    result: dict[str, Any] = {k: None if v is None else str(v) for k, v in about.items()}
    result |= {"recipe": at.cfg.recipe, "seed": at.cfg.seed, "data_path": at.cfg.data_path}
    result |= {"rows": len(at.rows), "tokens": at.rows[:, 1:].numel(), "bytes": int(at.bytes)}
    return result | {"order": args.order, "causal_bpb": exact, "scores": rows}


# ==============================================================================
# 2  TABLE AND PICTURE
# ==============================================================================
KINDS = {"factorised_bpb": "factorised", "chained_bpb": "chained", "alone_bpb": "head alone"}


def show(result: Mapping[str, Any]) -> None:
    """Print the scores, each with its ratio to the causal one."""
    exact, table = result["causal_bpb"], list[list[str]]()
    for row in result["scores"]:
        cells = [f"{row[k]:.4f} ({row[k] / exact:.3f} x)" if row[k] else "-" for k in KINDS]
        table.append([str(row["window"]), str(row["passes"]), *cells])
    print(f"Exact bits per byte; causal, one pass per token: {exact:.4f}")
    print(markdown(["window", "passes", *KINDS.values()], table))


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw exact bits per byte against passes per token, of the largest window."""
    from matplotlib.figure import Figure

    size = max(row["window"] for row in result["scores"])
    own = [row for row in result["scores"] if row["window"] == size]
    figure = Figure(figsize=(6.5, 4), layout="constrained", facecolor="white")
    panel = figure.subplots()
    for kind, style in (("factorised_bpb", "s--"), ("chained_bpb", "o-"), ("alone_bpb", "x")):
        points = [(row["passes_per_token"], row[kind]) for row in own if row[kind] is not None]
        if points:
            panel.plot(*zip(*points, strict=True), style, label=KINDS[kind])
    panel.axhline(result["causal_bpb"], color="0.4", ls="-.", label="causal: 1 pass per token")
    panel.set(xscale="log", xlabel="denoising passes per token", ylabel="exact bits per byte")
    panel.set_xticks([row["passes_per_token"] for row in own])
    panel.xaxis.set_major_formatter(lambda x, _: f"1/{1 / x:.0f}" if x < 1 else "1")
    panel.minorticks_off()
    panel.legend(title=f"windows of {size} tokens")
    figure.savefig(path, dpi=110, format="png")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; UserError: it cannot be measured."""
    check_outputs(args)
    if args.adapter is not None and args.head is not None:
        fail("--head was fitted to the artifact without --adapter; leave one of them out")
    at = load(args)
    head = None if args.head is None else load_head(args.head, at.model, args.artifact)
    result = measure(at, head, args)
    to_json(result)  # UserError, before a table of such numbers
    show(result)
    write_result(args.out, result)
    if args.plot:
        draw(result, args.plot)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
