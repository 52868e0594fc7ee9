"""Score an artifact by every likelihood it has: causal, denoised left to right, and bounds.

    python scripts/bench/likelihood.py                          windows of 1, 4, 8, 16, 32 and T
    python scripts/bench/likelihood.py --rows 256 --samples 16  more text, smaller Monte Carlo error
    python scripts/bench/likelihood.py --wrong --windows 16     what wrong estimators print

Text comes from DATA_PATH and TOKENIZER_PATH, or from where the artifact was trained; all other
settings are its own. Rows are evenly spaced over the validation split. The last line is one JSON
object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import train_gpt as tg
from scripts.bench import estimators
from scripts.bench.text import open_validation
from scripts.common import (
    NONE,
    Parser,
    autocast,
    fail,
    load_artifact,
    markdown,
    newest_artifact,
    open_tokenizer,
    pick_device,
    run_command,
    text_config,
    to_json,
)
from scripts.finetune import load_adapter
from train_gpt import GPT, ByteCounter, Config

WINDOWS = "1,4,8,16,32,T"
SAMPLE_COUNTS = (1, 2, 4, 8, 16, 32, 64)  # K of the convergence table
CONVERGENCE_EVERY = 4  # rows of which that table takes one: its 254 passes are most of the work
TOKENS_AT_ONCE = 4096  # a batch; larger ones are slower on a CPU, whose cache they leave
REPLICA = 1 << 20  # offset of the convergence table's random streams, apart from the others'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    windows = f"window sizes, T for a row (default {WINDOWS}, as far as they fit)"
    window = "window size of the convergence and wrong tables (default %(default)s)"
    add("--artifact", type=Path, help="default: the newest final_model.*.ptz here")
    add("--adapter", type=Path, metavar="FILE", help="of scripts/finetune.py, trained beside it")
    parser.whole("--rows", 64, "validation rows of T tokens")
    parser.whole("--samples", 8, "Monte Carlo samples K of a bound", low=2)
    add("--windows", help=windows)
    add("--window", default="16", help=window)
    add("--wrong", action="store_true", help="also print what wrong estimators give")
    parser.device()
    return parser.parse_args(argv)


# ==============================================================================
# 1  MODEL AND TEXT
# ==============================================================================


class Loaded(NamedTuple):
    """A model, the text it is scored on, and where."""

    model: GPT
    cfg: Config
    counter: ByteCounter
    numbers: Tensor  # (N,) int64, which rows of the split
    rows: Tensor  # (N, T + 1) int64, on the CPU
    device: torch.device

    @property
    def bytes(self) -> float:
        """Bytes of all rows, as the challenge counts them."""
        return self.counter.count(self.rows[:, :-1], self.rows[:, 1:]).sum().item()

    def some(self, every: int) -> Loaded:
        """Keep every so many rows, the first at least."""
        return self._replace(numbers=self.numbers[::every], rows=self.rows[::every])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield numbers (B,) and rows (B, T + 1) of a few rows at a time, rows on the device."""
        at_once = max(TOKENS_AT_ONCE // self.cfg.train_seq_len, 1)
        for i in range(0, len(self.rows), at_once):
            yield self.numbers[i : i + at_once], self.rows[i : i + at_once].to(self.device)


def load(args: argparse.Namespace) -> Loaded:
    """Read artifact, adapter if any, tokenizer and rows.

    Raises:
        UserError: one is missing, damaged or does not fit; no denoiser; no CUDA device.
    """
    device = pick_device(args.device)
    args.artifact = args.artifact or newest_artifact()
    artifact = load_artifact(args.artifact, device)
    if args.adapter is not None:
        load_adapter(args.adapter, artifact.model, args.artifact)
    if not artifact.model.cfg.diffusion:
        rule = "so no bound; its log holds its val_bpb"
        fail(f"{args.artifact} has no denoiser (DIFFUSION_LOSS_WEIGHT=0), {rule}")
    cfg = text_config(artifact.model.cfg)
    counter, loader = open_tokenizer(artifact, cfg.tokenizer_path), open_validation(artifact, cfg)
    T = cfg.train_seq_len
    total = (loader.total - 1) // T
    count = min(args.rows, total)
    numbers = torch.tensor([i * total // count for i in range(count)])
    rows = torch.cat([loader.rows(i * T, 1, T) for i in numbers.tolist()])
    at = Loaded(artifact.model, cfg, counter, numbers, rows, device)
    if at.bytes == 0 or at.some(CONVERGENCE_EVERY).bytes == 0:
        held = f"some of the {count} rows hold no byte of text"
        fail(f"DATA_PATH={cfg.data_path!r}: {held}; name other data")
    return at


def window_sizes(text: str, cfg: Config, option: str) -> list[int]:
    """Read window sizes; T is the length of a row.

    Raises:
        UserError: not a list of sizes that divide T.
    """
    try:
        sizes = [int(size) for size, _ in cfg.sizes(text)] if ":" not in text else []
    except ValueError:
        sizes = []
    if not sizes or any(size < 1 or cfg.train_seq_len % size for size in sizes):
        rule = f"divide the {cfg.train_seq_len} tokens of a row: 1,16,T"
        fail(f"{option}={text!r} must be sizes, or T, that {rule}")
    return list(dict.fromkeys(sizes))


# ==============================================================================
# 2  SCORES
# ==============================================================================


class Score(NamedTuple):
    """Bits per byte with the Monte Carlo error of K samples; 0 where nothing is drawn."""

    bpb: float
    standard_error: float
    samples: int


Tick = Callable[[], Any]


def causal(at: Loaded, tick: Tick) -> float:
    """Exact bits per byte of the clean stream."""
    nats = 0.0
    for _, rows in at.batches():
        with autocast(at.device):
            nats += tg.token_nll_causal(at.model, rows).double().sum().item()
        tick()
    return tg.bits_per_byte(nats, at.bytes)


def bound_nats(at: Loaded, size: int, samples: int, offset: int, tick: Tick) -> Tensor:
    """Sampled nats of each row over windows of `size`.

    Args:
        at: model and rows, N of them.
        size: tokens of a window.
        samples: K.
        offset: of the random streams; 0 draws what train_gpt.py draws.
        tick: called after each batch.
    Returns:
        (K, N) float64.
    """
    mask = tg.window_mask(at.cfg.train_seq_len, size, at.cfg.diffusion_causal, at.device)
    windows, place = [], torch.arange(at.cfg.train_seq_len // size)
    for numbers, rows in at.batches():
        keys = tg.split_key(numbers[:, None], at.cfg.eval_seed + offset, place)
        with autocast(at.device):
            nats = tg.window_bounds(at.model, rows, keys.to(at.device), size, samples, mask)
        windows.append(nats.sum(-1).cpu())
        tick()
    return torch.cat(windows, dim=1)


def bound(at: Loaded, size: int, samples: int, tick: Tick) -> Score:
    """Bound over windows of `size` tokens; its error is that of the spread over samples."""
    samples = samples if size > 1 else 1  # exact
    nats = bound_nats(at, size, samples, 0, tick)
    spread = nats.var(dim=0).sum().item() / samples if samples > 1 else 0.0
    bpb = tg.bits_per_byte(nats.mean(0).sum().item(), at.bytes)
    return Score(bpb, tg.bits_per_byte(spread**0.5, at.bytes), samples)


def convergence(at: Loaded, size: int, tick: Tick) -> list[Score]:
    """Bound with each number of samples, and its error by the difference of two draws.

    A single sample states no error of its own; two independent draws measure it for every K. The
    mean does not depend on K: more samples reduce the error, they do not tighten the bound.
    """
    scores = []
    for place, samples in enumerate(SAMPLE_COUNTS):
        offsets = (REPLICA + 2 * place, REPLICA + 2 * place + 1)
        first, second = (bound_nats(at, size, samples, offset, tick).mean(0) for offset in offsets)
        spread = (first - second).square().sum().item() / 2
        bpb = tg.bits_per_byte(first.sum().item(), at.bytes)
        scores.append(Score(bpb, tg.bits_per_byte(spread**0.5, at.bytes), samples))
    return scores


def wrong_scores(at: Loaded, size: int, samples: int, tick: Tick) -> dict[str, dict[str, Any]]:
    """Score by estimators.py: bits per byte, and per cent under the right bound of the windows."""
    functions: dict[str, Any] = {"right": estimators.right}
    functions |= {name: row.estimate for name, row in estimators.ESTIMATORS.items()}
    parts: dict[str, list[Any]] = {name: [] for name in functions}
    place = torch.arange(at.cfg.train_seq_len // size)
    for numbers, rows in at.batches():
        keys = tg.split_key(numbers[:, None], at.cfg.eval_seed, place)
        with autocast(at.device), torch.no_grad():
            text = estimators.prepare(at.model, at.counter, rows, keys.to(at.device), samples)
            for name, function in functions.items():
                parts[name].append(function(text))
                tick()
    bounded, result = estimators.summarise(parts["right"])[0], {}
    for name, estimates in parts.items():
        bpb, error = estimators.summarise(estimates)
        row = estimators.ESTIMATORS.get(name)
        about: dict[str, Any] = {"source": row.source if row else "train_gpt.py"}
        about["exposed"] = row.exposed if row else False
        under = 100 * (1 - bpb / bounded)
        result[name] = {"bpb": bpb, "standard_error": error, "percent_under": under, **about}
    return result


# ==============================================================================
# 3  TABLES
# ==============================================================================


def show(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 0
) -> None:
    """Print a table under its title."""
    print(f"\n{title}:\n\n{markdown(head, rows, num_texts)}")


def numbers(row: dict[str, Any]) -> list[str]:
    """Return the cells of a score: bits per byte and their standard error."""
    return [f"{row['bpb']:.4f}", f"{row['standard_error']:.4f}"]


def show_scores(at: Loaded, result: dict[str, Any]) -> None:
    """Print all that was measured."""
    per_token = f"{result['bytes_per_token']:.4f} bytes per token"
    print(f"{len(at.rows)} rows of {at.cfg.train_seq_len} tokens, {per_token}")
    print(f"exact, causal                           {result['causal_bpb']:.4f} bpb")
    print(f"exact, denoised left to right           {result['left_to_right_bpb']:.4f} bpb")
    rows = [[str(r["window"]), *numbers(r), str(r["samples"])] for r in result["bounds"]]
    show(f"upper bound by window size, {result['rows']} rows", ("window", "bpb", "s.e.", "K"), rows)
    rows = [[str(r["samples"]), *numbers(r)] for r in result["convergence"]]
    title = f"upper bound at window {result['window']} by number of samples"
    show(f"{title}, {result['convergence_rows']} rows", ("K", "bpb", "s.e."), rows)
    if result["wrong"] is not None:
        show_wrong(result)


def show_wrong(result: dict[str, Any]) -> None:
    """Print what the wrong estimators give."""
    lines = []
    for name, row in result["wrong"].items():
        shown = NONE if name == "right" else "yes" if row["exposed"] else "no"
        under = f"{row['percent_under']:+.1f} %"
        lines.append([row["source"], name, *numbers(row), under, shown])
    title = f"estimators at window {result['window']}: per cent under the right bound"
    head = ("used by", "estimator", "bpb", "s.e.", "under", "uniform shows it")
    show(title, head, lines, 2)


def measure(at: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Compute everything that is printed."""
    T = at.cfg.train_seq_len
    fitting = ",".join(size for size in WINDOWS.split(",") if size == "T" or T % int(size) == 0)
    sizes = window_sizes(fitting if args.windows is None else args.windows, at.cfg, "--windows")
    size = window_sizes(args.window, at.cfg, "--window")[0]
    num_wrong = len(estimators.ESTIMATORS) + 1 if args.wrong else 0
    few = at.some(CONVERGENCE_EVERY)
    num_batches, num_few = (sum(1 for _ in part.batches()) for part in (at, few))
    total = num_batches * (1 + len({1, *sizes}) + num_wrong) + num_few * 2 * len(SAMPLE_COUNTS)
    with tqdm(total=total, desc="likelihood", leave=False, disable=None) as bar:
        exact = causal(at, bar.update)
        scores = {s: bound(at, s, args.samples, bar.update) for s in dict.fromkeys([1, *sizes])}
        converging = convergence(few, size, bar.update)
        wrong = wrong_scores(at, size, args.samples, bar.update) if args.wrong else None
    tokens = at.rows[:, 1:].numel()
    return {
        "artifact": str(args.artifact),
        "adapter": None if args.adapter is None else str(args.adapter),
        "rows": len(at.rows),
        "tokens": tokens,
        "bytes": int(at.bytes),
        "bytes_per_token": at.bytes / tokens,
        "causal_bpb": exact,
        "left_to_right_bpb": scores[1].bpb,
        "bounds": [{"window": s, **scores[s]._asdict()} for s in sizes],
        "window": size,
        "convergence_rows": len(few.rows),
        "convergence": [score._asdict() for score in converging],
        "wrong": wrong,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; UserError: it cannot be measured."""
    at = load(args)
    result = measure(at, args)
    to_json(result)  # UserError, before a table of such numbers
    show_scores(at, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
