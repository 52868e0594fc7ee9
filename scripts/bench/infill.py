"""Measure what a denoiser gains from the text after a hole and from more passes, and whether it
finds wrong tokens.

    DATA_PATH=data/stdlib python scripts/bench/infill.py final_model.int8.ptz
    DATA_PATH=data/stdlib python scripts/bench/infill.py a.ptz b.ptz --holes 8 --passes 1,4 --examples 1024 \\
        --out infill.json --plot infill.png

Holes lie in evenly spaced excerpts of the validation data (DATA_PATH; else that of the artifact)
and are filled greedily twice: in a window that ends with the hole, and in one that goes on with the
text after it. Both read the same text before it, so their difference is paired. Standard errors are
over excerpts, not over tokens.

Nats per token of what was filled in are those of the clean stream of the same weights: no
independent judge. Entropy and distinct-2 stand beside them, since repetition is likely too.

Revision plants random tokens in true text, and looks whether they are the least likely ones: to the
window that may doubt every token, and to the clean stream. As many tokens as were planted are then
replaced: by the detector's own likeliest token (argmax), or masked and filled in again by one pass
(refill).

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor

    from train_gpt import GPT, KV, Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository


PLANTED = (1, 2, 4)  # wrong tokens in a window
ROWS_AT_ONCE = {"cpu": 32, "cuda": 256}  # more are no faster
WITH, WITHOUT = "with_suffix", "without_suffix"
TEXT, AR = ("text", 0), ("ar", 0)  # what a hole is filled with, besides (WITH or WITHOUT, passes)
Key = tuple[str, int]
COLOURS = [f"C{i}" for i in range(10)]  # of artifacts, in the plot


def fail(message: str) -> NoReturn:
    """Raise the error that `main` prints without a traceback."""
    from train_gpt import UserError

    raise UserError(message)


def counts(text: str) -> list[int]:
    """Read a list of whole numbers from 1, into rising order."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must list whole numbers from 1, as in 8,16,64")
    return found


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument(
        "--holes", type=counts, default="8,16,64", help="tokens of a hole (default %(default)s)"
    )
    parser.add_argument(
        "--passes",
        type=counts,
        default="1,2,4,8,12,20,30",
        help="passes a hole (default %(default)s)",
    )
    parser.add_argument("--examples", type=int, default=256, help="excerpts (default %(default)s)")
    parser.add_argument(
        "--prefix", type=int, default=128, help="tokens before the hole (default %(default)s)"
    )
    parser.add_argument(
        "--suffix", type=int, default=64, help="tokens after the hole (default %(default)s)"
    )
    parser.add_argument(
        "--revise-window",
        type=int,
        default=32,
        help="tokens among which some are wrong (%(default)s)",
    )
    parser.add_argument(
        "--revise-examples", type=int, default=256, help="excerpts for it; 0: none (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes the planted tokens (default %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result there")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw accuracy and likelihood against passes"
    )
    args = parser.parse_args(argv)
    for name, low in (
        ("examples", 2),  # one has no standard error
        ("prefix", 2),
        ("suffix", 1),
        ("revise_window", max(PLANTED) + 1),
        ("revise_examples", 0),
        ("seed", 0),
    ):
        if not low <= getattr(args, name) < 2**31:
            parser.error(
                f"--{name.replace('_', '-')}={getattr(args, name)} must lie in {low}..{2**31 - 1}"
            )
    if args.revise_examples == 1:
        parser.error("--revise-examples=1 has no standard error; use 0 or at least 2")
    if args.passes[0] > args.holes[0]:
        parser.error(
            f"--passes: a hole of {args.holes[0]} takes at most one pass a token; list a smaller "
            "number"
        )
    if len(set(args.artifacts)) < len(args.artifacts):
        parser.error("an artifact is named twice")
    return args


# ==============================================================================
# 1  MEASURES -- pure functions of tensors; N examples
# ==============================================================================


def estimate(values: Tensor) -> dict[str, float]:
    """Mean of one value an example, (N,), and its standard error."""
    values = values.double()
    return {"mean": values.mean().item(), "se": (values.var() / len(values)).sqrt().item()}


def paired(ours: Tensor, theirs: Tensor) -> dict[str, float | None]:
    """Mean difference of two values of the same examples, (N,) each, its standard error, and a
    two-sided p.

    p is of the normal distribution; None where all differences are equal.
    """
    found = estimate(ours.double() - theirs.double())
    z = found["mean"] / found["se"] if found["se"] > 0 else None
    return {**found, "z": z, "p": None if z is None else math.erfc(abs(z) / math.sqrt(2))}


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    return {WITH: estimate(ours), WITHOUT: estimate(theirs), "difference": paired(ours, theirs)}


def most_frequent(ids: Tensor) -> float:
    """Share of the most frequent token: what one constant guess gets right at best."""
    return ids.flatten().bincount().max().item() / ids.numel()


def unigram_entropy(ids: Tensor) -> float:
    """Entropy of the tokens of all examples together, (N, n), nats."""
    count = ids.flatten().bincount().double()
    share = count[count > 0] / ids.numel()
    return -(share * share.log()).sum().item()


def distinct_2(ids: Tensor) -> float | None:
    """Share of different pairs among the neighbouring pairs of one example, (N, n), mean; None
    where n = 1.
    """
    if ids.shape[1] < 2:
        return None
    rows = [list(itertools.pairwise(row)) for row in ids.tolist()]
    return sum(len(set(row)) / len(row) for row in rows) / len(rows)


def quarters(size: int) -> dict[str, slice]:
    """Parts of a hole of `size` tokens; the middle is two quarters. Empty parts are left out."""
    quarter = max(size // 4, 1)
    last = max(size - quarter, quarter)
    parts = {
        "first_quarter": slice(0, quarter),
        "middle": slice(quarter, last),
        "last_quarter": slice(last, size),
    }
    return {name: part for name, part in parts.items() if part.start != part.stop}


def plant(x0: Tensor, keys: Tensor, count: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Replace `count` tokens a row of (N, n) by others, all equally likely, with randomness from
    keys (N,).

    Fewer are planted at a part of the places of more, as the same tokens. Returns the text and
    where, bool.
    """
    from train_gpt import derive, uniform

    planted = uniform(derive(keys, 1), x0.shape[1]).argsort(dim=-1).argsort(dim=-1) < count
    step = 1 + (uniform(derive(keys, 2), x0.shape[1]) * (vocab_size - 1)).long()
    return (x0 + step * planted) % vocab_size, planted


def least_likely(log_p: Tensor, planted: Tensor) -> Tensor:
    """Mark as many tokens of each row (N, n) as were planted: the least likely ones."""
    return log_p.argsort(dim=-1).argsort(dim=-1) < planted.sum(-1, keepdim=True)


def detection(log_p: Tensor, planted: Tensor) -> dict[str, Tensor]:
    """Say how well low log-probability of the token shown, (N, n), tells planted ones; one value an
    example, (N,).

    least_likely_is_planted: of all tokens; found: share of the planted among as many least likely
    ones; auc: share of pairs of a planted and a right token in which the planted one is less
    likely, ties as a half.
    """
    lowest = planted.gather(1, log_p.argmin(-1, keepdim=True))[:, 0]
    found = (least_likely(log_p, planted) & planted).sum(-1) / planted.sum(-1)
    mine, other = log_p[:, :, None], log_p[:, None, :]
    pairs = planted[:, :, None] & ~planted[:, None, :]
    won = ((mine < other).double() + (mine == other).double() / 2) * pairs
    auc = won.sum((1, 2)) / pairs.sum((1, 2))
    return {"least_likely_is_planted": lowest.double(), "found": found, "auc": auc}


def repairs(final: Tensor, x0: Tensor, planted: Tensor) -> dict[str, Tensor]:
    """Share of planted tokens that are now true, and of right ones that no longer are; (N, n) to
    (N,).
    """
    right = final == x0
    repaired = (right & planted).sum(-1) / planted.sum(-1)
    spoilt = (~right & ~planted).sum(-1) / (~planted).sum(-1)
    return {"repaired": repaired, "spoilt": spoilt}


# ==============================================================================
# 2  PASSES -- a batch of excerpts whose text before the hole was read once
# ==============================================================================


class Batch(NamedTuple):
    """Excerpts with a hole from token `start` on, and what the model has read of them."""

    model: GPT
    rows: Tensor  # (B, L)
    keys: Tensor  # (B, 1)
    start: int
    past: list[KV]  # buffers of L places; filled up to the token before the last visible one

    @property
    def before(self) -> Tensor:
        return self.rows[:, self.start - 1 : self.start]  # (B, 1), the last visible token


def open_batch(model: GPT, rows: Tensor, index: Tensor, start: int, seed: int) -> Batch:
    """Read the excerpts (B, L) up to a hole at `start`; index (B,): their numbers, from which
    randomness comes.
    """
    from torch.nn.functional import pad

    from train_gpt import derive

    room = (0, 0, 0, rows.shape[1] - start + 1)
    past = [(pad(k, room), pad(v, room)) for k, v in model.clean(rows[:, : start - 1])[1]]
    return Batch(model, rows, derive(index[:, None], seed), start, past)


def read(batch: Batch, ids: Tensor, first: int) -> Tensor:
    """Clean stream's logits (B, n, V) of what follows each token of ids (B, n), which stand from
    place `first` on.
    """
    import torch

    at = torch.arange(first, first + ids.shape[1], device=ids.device).expand(len(ids), -1)
    return batch.model.clean(ids, batch.past, at)[0]


def follow(batch: Batch, ids: Tensor) -> Tensor:
    """Clean stream's logits (B, n, V) of the tokens (B, n) that fill a hole, each given all before
    it.
    """
    import torch

    return read(batch, torch.cat((batch.before, ids[:, :-1]), dim=1), batch.start - 1)


def left_to_right(batch: Batch, count: int) -> Tensor:
    """Decode `count` tokens from the clean stream, (B, count): `train_gpt.decode`, but what was
    read stays read.
    """
    import torch

    found = [batch.before]
    for i in range(count):
        found.append(read(batch, found[-1], batch.start - 1 + i).argmax(-1))
    return torch.cat(found[1:], dim=1)


class FirstPass:
    """Stands for a model, and keeps the logits of its first window pass."""

    def __init__(self, model: GPT) -> None:
        self.model, self.logits = model, cast("Tensor | None", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def read(self, *args: Any) -> Tensor:
        logits = self.model.read(*args)
        if self.logits is None:
            self.logits = logits[:, :-1] if self.model.cfg.diffusion_shift else logits[:, 1:]
        return logits


def refill(
    batch: Batch, ids: Tensor, hole: Tensor, suffix: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Fill the marked tokens of ids (B, S), which stand from `start` on before `suffix` (B, n), in
    `steps` passes.

    Returns the tokens (B, S) and the logits of the first pass (B, S, V).
    """
    import torch

    import train_gpt as tg

    watched, first = FirstPass(batch.model), torch.full_like(batch.keys, batch.start - 1)
    window = torch.cat((batch.before, ids), dim=1)
    run = tg.Decoder(cast("GPT", watched), tg.Decoding(steps=steps), batch.past, batch.keys)
    found, _ = run.refine(window, hole, suffix, first)
    assert watched.logits is not None
    return found, watched.logits[:, : ids.shape[1]]


def doubt(batch: Batch, ids: Tensor, wrong_share: float) -> Tensor:
    """Logits (B, S, V) of a window that shows all of ids (B, S), any of which may be wrong."""
    import torch

    from train_gpt import Corruption, Window

    (B, S) = ids.shape
    start = batch.start
    device = ids.device
    everything = torch.ones(B, 1, S, dtype=torch.bool, device=device)
    noisy = Corruption(
        ids[:, None], ~everything, everything, torch.full((B, 1), wrong_share, device=device)
    )
    positions = torch.arange(start - 1, start + S, device=device)
    mask = (torch.arange(start + S, device=device) <= positions[:, None]) | (
        not batch.model.cfg.diffusion_causal
    )
    past = [(k[:, :, : start - 1], v[:, :, : start - 1]) for k, v in batch.past]
    window = Window(before=batch.before[:, None], noisy=noisy, positions=positions, mask=mask)
    return batch.model.window(window, past)[:, 0]


# ==============================================================================
# 3  INFILL -- holes of several lengths, with and without the text after them
# ==============================================================================


class Plan(NamedTuple):
    """What is measured."""

    holes: list[int]
    passes: list[int]
    prefix: int
    suffix: int
    revise_window: int
    revise_examples: int
    seed: int

    @property
    def length(self) -> int:
        """Tokens of an excerpt."""
        return self.prefix + max(
            self.holes[-1] + self.suffix, self.revise_window if self.revise_examples else 0
        )

    def passes_of(self, hole: int) -> list[int]:
        return [n for n in self.passes if n <= hole]


class Fill(NamedTuple):
    """Tokens in the place of a hole, (N, n), and nats of each under the clean stream."""

    ids: Tensor
    nats: Tensor


class Hole(NamedTuple):
    """All that was measured of the holes of one length."""

    fills: dict[Key, Fill]  # by TEXT, AR or (side, passes)
    first: dict[
        str, Fill
    ]  # by side: the first pass's likeliest tokens, and its nats of the true ones


def fill_holes(batch: Batch, plan: Plan) -> dict[int, Hole]:
    """Fill holes of every length in every way."""
    import torch

    from train_gpt import token_nll

    longest = plan.holes[-1]
    text, ar = batch.rows[:, batch.start : batch.start + longest], left_to_right(batch, longest)
    shared = {
        key: Fill(ids, token_nll(follow(batch, ids), ids)) for key, ids in ((TEXT, text), (AR, ar))
    }
    found = {}
    for hole in plan.holes:  # left to right, a shorter hole is the beginning of a longer one
        fills = {key: Fill(ids[:, :hole], nats[:, :hole]) for key, (ids, nats) in shared.items()}
        first = {}
        x0, everything = text[:, :hole], torch.ones_like(text[:, :hole], dtype=torch.bool)
        after = batch.rows[:, batch.start + hole :][:, : plan.suffix]
        for side, suffix in ((WITH, after), (WITHOUT, after[:, :0])):
            for passes in plan.passes_of(hole)[::-1]:
                if passes > 1 or side not in first:  # one pass is the first of several
                    ids, logits = refill(batch, torch.zeros_like(x0), everything, suffix, passes)
                    first[side] = Fill(logits.argmax(-1), token_nll(logits, x0))
                ids = first[side].ids if passes == 1 else ids
                fills[side, passes] = Fill(ids, token_nll(follow(batch, ids), ids))
        found[hole] = Hole(fills, first)
    return found


def join_holes(parts: Sequence[Hole]) -> Hole:
    """Put the examples of several batches together."""
    import torch

    def join(fills: Iterator[Fill]) -> Fill:
        return Fill(*(torch.cat(tensors) for tensors in zip(*fills, strict=True)))

    return Hole(
        {key: join(part.fills[key] for part in parts) for key in parts[0].fills},
        {side: join(part.first[side] for part in parts) for side in parts[0].first},
    )


def sum_up_hole(hole: Hole, passes: Sequence[int], suffix: int) -> dict[str, Any]:
    """Turn the holes of one length into the numbers that are reported."""
    x0 = hole.fills[TEXT].ids

    def right(fill: Fill) -> Tensor:
        return (fill.ids == x0).double()

    def quality(fill: Fill) -> dict[str, Any]:
        return {
            "clean_stream_nats": estimate(fill.nats.mean(-1)),
            "unigram_entropy": unigram_entropy(fill.ids),
            "distinct_2": distinct_2(fill.ids),
        }

    def row(count: int) -> dict[str, Any]:
        ours, theirs = hole.fills[WITH, count], hole.fills[WITHOUT, count]
        accuracy = compare(right(ours).mean(-1), right(theirs).mean(-1))
        accuracy["with_suffix_minus_ar"] = paired(
            right(ours).mean(-1), right(hole.fills[AR]).mean(-1)
        )
        return {
            "passes": count,
            "accuracy": accuracy,
            WITH: quality(ours),
            WITHOUT: quality(theirs),
        }

    first, size = hole.first, x0.shape[1]
    marks = {side: right(fill) for side, fill in first.items()}
    parts = quarters(size).items()
    return {
        "hole": size,
        "window_with_suffix": size + suffix,
        "most_frequent_token": most_frequent(x0),
        "text": quality(hole.fills[TEXT]),
        "ar": {"accuracy": estimate(right(hole.fills[AR]).mean(-1)), **quality(hole.fills[AR])},
        "first_pass_log_prob": compare(-first[WITH].nats.mean(-1), -first[WITHOUT].nats.mean(-1)),
        "one_pass_accuracy": {
            name: compare(marks[WITH][:, part].mean(-1), marks[WITHOUT][:, part].mean(-1))
            for name, part in parts
        },
        "passes": [row(count) for count in passes],
    }


# ==============================================================================
# 4  REVISION -- wrong tokens in true text
# ==============================================================================

Marks = dict[str, Any]  # nested; values (N,)


def revise(batch: Batch, plan: Plan) -> dict[int, Marks]:
    """Plant wrong tokens, look for them and replace what is taken for them."""
    x0 = batch.rows[:, batch.start : batch.start + plan.revise_window]
    return {count: revise_some(batch, x0, count) for count in PLANTED}


def revise_some(batch: Batch, x0: Tensor, count: int) -> Marks:
    """Do so with `count` wrong tokens in every window of true ones (B, S)."""
    import torch

    xt, planted = plant(x0, batch.keys[:, 0], count, batch.model.cfg.vocab_size)
    logits = {"window": doubt(batch, xt, count / x0.shape[1]), "clean_stream": follow(batch, xt)}

    def masked_again(marked: Tensor) -> Tensor:
        return refill(batch, xt, marked, xt[:, :0], 1)[0]

    known = {"refill": masked_again(planted)}
    detectors = {}
    for name, shown in logits.items():
        known[f"{name}_argmax"] = shown.argmax(-1)
        log_p = shown.double().log_softmax(-1).gather(-1, xt[..., None])[..., 0]
        marked = least_likely(log_p, planted)
        detectors[name] = {
            **detection(log_p, planted),
            "argmax": repairs(torch.where(marked, shown.argmax(-1), xt), x0, planted),
            "refill": repairs(masked_again(marked), x0, planted),
        }
    at_known = {name: repairs(ids, x0, planted)["repaired"] for name, ids in known.items()}
    return {"detectors": detectors, "repaired_at_known_places": at_known}


def sum_up_marks(parts: Sequence[Marks]) -> Marks:
    """Put the examples of several batches together, and estimate every value."""
    import torch

    return {
        key: sum_up_marks([part[key] for part in parts])
        if isinstance(value, dict)
        else estimate(torch.cat([part[key] for part in parts]))
        for key, value in parts[0].items()
    }


def trained_on_random_tokens(cfg: Config) -> bool:
    """Has the window seen wrong tokens that look like any other?"""
    mode, masked = cfg.diffusion_corruption_mode, cfg.diffusion_hybrid_mask_prob
    return mode == "uniform" or (mode == "hybrid" and masked < 1)


# ==============================================================================
# 5  ARTIFACTS AND EXCERPTS -- everything that can be wrong is found before the long part
# ==============================================================================


class Loaded(NamedTuple):
    """A model with the name it goes by."""

    label: str
    path: Path
    model: GPT


def pick_device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda finds no CUDA device; use --device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def labels(paths: Sequence[Path]) -> list[str]:
    """Name artifacts by their folders, or by their files, or by both: the shortest that tells them
    apart.
    """
    for names in ([p.absolute().parent.name for p in paths], [p.name.split(".")[0] for p in paths]):
        if len(set(names)) == len(names) and all(names):
            return names
    return [str(path) for path in paths]


def load(paths: Sequence[Path], plan: Plan, device: torch.device) -> list[Loaded]:
    """Read artifacts that can all be measured on the same text.

    Raises:
        UserError: one is missing or damaged, has no denoiser, reads too little, or has another
        tokenizer.
    """
    import train_gpt as tg

    found, tokenizers = [], dict[str, Path]()
    for label, path in zip(labels(paths), paths, strict=True):
        model, tokenizer = tg.load_artifact(path, device)
        if model.mask_emb is None:
            fail(
                f"{path} has no trained denoiser (DIFFUSION_LOSS_WEIGHT=0), so it fills no holes; "
                "leave it out"
            )
        if plan.length > model.cfg.train_seq_len:
            fail(
                f"--prefix={plan.prefix} and then a hole of {plan.holes[-1]} with --suffix={plan.suffix}, or "
                f"--revise-window={plan.revise_window}, take {plan.length} tokens; {path} was trained to read "
                f"{model.cfg.train_seq_len} (TRAIN_SEQ_LEN); shorten one of them"
            )
        tokenizers.setdefault(tokenizer, path)
        found.append(Loaded(label, path, model))
    if len(tokenizers) > 1:
        fail(
            f"{' and '.join(map(str, tokenizers.values()))} have different tokenizers; measure "
            "them one by one"
        )
    named, (expected, path) = os.environ.get("TOKENIZER_PATH"), next(iter(tokenizers.items()))
    cfg = found[0].model.cfg
    if named and tg.ByteCounter(dataclasses.replace(cfg, tokenizer_path=named)).sha256 != expected:
        fail(
            f"TOKENIZER_PATH={named!r} is not the tokenizer {path} was trained with; DATA_PATH "
            "must fit that one"
        )
    return found


def excerpts(cfg: Config, plan: Plan, examples: int) -> tuple[Tensor, str]:
    """Take evenly spaced excerpts of the validation data, (examples, length), and say where from.

    Raises:
        UserError: no data, or so little that what is to be found would overlap.
    """
    import torch

    import train_gpt as tg

    data_path = os.environ.get("DATA_PATH", cfg.data_path)
    loader = tg.TokenLoader(dataclasses.replace(cfg, data_path=data_path), "val")
    room = loader.total - plan.length
    apart = max(plan.holes[-1], plan.revise_window if plan.revise_examples else 0)
    if room // examples < apart:
        fail(
            f"--examples={examples} holes of {apart} tokens (or windows with wrong tokens) overlap in the "
            f"{loader.total:,} validation tokens of DATA_PATH={data_path!r}; take at most {max(room // apart, 0)}, or "
            "prepare more text"
        )
    starts = [i * room // examples for i in range(examples)]
    return torch.cat([loader.rows(start, 1, plan.length - 1) for start in starts]), data_path


def check_outputs(args: argparse.Namespace) -> None:
    """Find out early that a file cannot be written.

    Raises:
        UserError: no such folder, a folder in its place, or nothing to draw with.
    """
    for name, path in (("out", args.out), ("plot", args.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            fail(
                f"--{name}={path} must be a file in a folder that exists; make the folder, or name "
                "another"
            )
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib: pip install matplotlib, or leave --plot out")


def measure(loaded: Loaded, rows: Tensor, plan: Plan, bar: Any) -> dict[str, Any]:
    """Measure one artifact on excerpts (N, L)."""
    import torch

    model, cfg, device = loaded.model, loaded.model.cfg, loaded.model.tok_emb.device
    holes, marks = list[dict[int, Hole]](), list[dict[int, Marks]]()
    at_once = ROWS_AT_ONCE[device.type]
    # Of N excerpts every so many are revised too: evenly spaced as well.
    revised = {i * len(rows) // plan.revise_examples for i in range(plan.revise_examples)}
    with (
        torch.no_grad(),
        torch.autocast("cuda", torch.bfloat16)
        if device.type == "cuda"
        else contextlib.nullcontext(),
    ):
        for first in range(0, len(rows), at_once):
            index = torch.arange(first, min(first + at_once, len(rows)))
            batch = open_batch(
                model, rows[index].to(device), index.to(device), plan.prefix, plan.seed
            )
            holes.append(fill_holes(batch, plan))
            if mine := [i for i, number in enumerate(index.tolist()) if number in revised]:
                past = [(k[mine], v[mine]) for k, v in batch.past]
                marks.append(
                    revise(
                        batch._replace(rows=batch.rows[mine], keys=batch.keys[mine], past=past),
                        plan,
                    )
                )
            bar.update()
    return {
        "artifact": str(loaded.path),
        "label": loaded.label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": cfg.recipe,
        "corruption_mode": cfg.diffusion_corruption_mode,
        "largest_trained_window": max(size for size, _ in cfg.sizes(cfg.diffusion_windows)),
        "trained_on_random_tokens": trained_on_random_tokens(cfg),
        "infill": [
            sum_up_hole(
                join_holes([part[hole] for part in holes]), plan.passes_of(hole), plan.suffix
            )
            for hole in plan.holes
        ],
        "revision": [
            {"planted": n, **sum_up_marks([part[n] for part in marks])} for n in PLANTED if marks
        ],
    }


# ==============================================================================
# 6  REPORT -- tables for people, and the plot
# ==============================================================================


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table of numbers, readable as it is."""
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * (w - 1) + ":" for w in width], *rows]
    return "\n".join(
        f"| {' | '.join(cell.rjust(w) for cell, w in zip(line, width, strict=True))} |"
        for line in lines
    )


def cell(found: Mapping[str, float], digits: int = 3) -> str:
    return f"{found['mean']:.{digits}f} ± {found['se']:.{digits}f}"


def gain(found: Mapping[str, float | None], digits: int = 3) -> str:
    p = found["p"]
    return f"{found['mean']:+.{digits}f} ± {found['se']:.{digits}f}" + (
        "" if p is None else f" (p {p:.1g})"
    )


def plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def infill_table(hole: Mapping[str, Any]) -> str:
    """One row a number of passes, then the references."""
    head = ["passes", "right, with suffix", "without", "gain of suffix", "gain over ar"]
    head += ["nats, with", "without", "entropy, with", "without", "distinct-2, with", "without"]
    rows = []
    for row in hole["passes"]:
        accuracy, sides = row["accuracy"], [row[WITH], row[WITHOUT]]
        rows.append(
            [
                str(row["passes"]),
                *(cell(accuracy[side]) for side in (WITH, WITHOUT)),
                *(gain(accuracy[name]) for name in ("difference", "with_suffix_minus_ar")),
                *(cell(side["clean_stream_nats"]) for side in sides),
                *(
                    plain(side[name])
                    for name in ("unigram_entropy", "distinct_2")
                    for side in sides
                ),
            ]
        )
    for name, share in (("ar", cell(hole["ar"]["accuracy"])), ("text", "1")):
        other = hole[name]
        entropy, distinct = (plain(other[key]) for key in ("unigram_entropy", "distinct_2"))
        rows.append(
            [
                name,
                "-",
                share,
                "-",
                "-",
                "-",
                cell(other["clean_stream_nats"]),
                "-",
                entropy,
                "-",
                distinct,
            ]
        )
    rows.append(["commonest token", "-", plain(hole["most_frequent_token"], 3), *["-"] * 8])
    return markdown(head, rows)


def first_pass_table(holes: Sequence[Mapping[str, Any]]) -> str:
    """What one pass makes of the holes: log-probability of the truth, and where in the hole the
    suffix helps.
    """
    rows = []
    for hole in holes:
        found = {"log p of the text, nats per token": hole["first_pass_log_prob"]}
        found |= {
            f"right, {name.replace('_', ' ')}": part
            for name, part in hole["one_pass_accuracy"].items()
        }
        rows += [
            [
                str(hole["hole"]),
                name,
                cell(value[WITH]),
                cell(value[WITHOUT]),
                gain(value["difference"]),
            ]
            for name, value in found.items()
        ]
    return markdown(["hole", "first pass", "with suffix", "without", "gain of suffix"], rows)


def revision_table(revision: Sequence[Mapping[str, Any]]) -> str:
    """One row a number of planted tokens and a detector; then the same at places that are known."""
    head = ["planted", "detector", "least likely is planted", "found", "AUC"]
    head += ["argmax repairs", "spoils", "refill repairs", "spoils"]
    rows = []
    for row in revision:
        for name, found in row["detectors"].items():
            ranks = [cell(found[key]) for key in ("least_likely_is_planted", "found", "auc")]
            ends = [
                cell(found[way][key])
                for way in ("argmax", "refill")
                for key in ("repaired", "spoilt")
            ]
            rows.append([str(row["planted"]), name.replace("_", " "), *ranks, *ends])
        known = row["repaired_at_known_places"]
        for name in ("window", "clean_stream"):
            ends = [cell(known[f"{name}_argmax"]), "-", cell(known["refill"]), "-"]
            rows.append(
                [
                    str(row["planted"]),
                    f"known places, {name.replace('_', ' ')}",
                    "-",
                    "-",
                    "-",
                    *ends,
                ]
            )
    return markdown(head, rows)


def tell(result: Mapping[str, Any]) -> str:
    """All tables of one artifact, with what a reader must know of it."""
    largest = result["largest_trained_window"]
    parts = [
        f"## {result['label']}: {result['parameters']:,} parameters, corruption "
        f"{result['corruption_mode']}"
    ]
    for hole in result["infill"]:
        size = hole["window_with_suffix"]
        longer = f"; longer than any it was trained on ({largest})" if size > largest else ""
        parts += [
            f"Holes of {hole['hole']}, in windows of {size} with the suffix{longer}:",
            infill_table(hole),
        ]
    parts.append(first_pass_table(result["infill"]))
    if result["revision"]:
        seen = (
            ""
            if result["trained_on_random_tokens"]
            else "; this model never saw random tokens in a window"
        )
        parts += [f"Wrong tokens in true text{seen}:", revision_table(result["revision"])]
    return "\n\n".join(parts) + "\n"


def draw_hole(top: Axes, bottom: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw tokens right (top) and likelihood (bottom) of one hole length, an artifact a result."""
    sides: dict[str, dict[str, Any]] = {
        WITH: dict(ls="-", marker="o"),
        WITHOUT: dict(ls="--", marker="o", mfc="white"),
    }
    ticks = [row["passes"] for row in results[0]["passes"]]
    for i, found in enumerate(results):
        colour = COLOURS[i % len(COLOURS)]
        for j, (side, style) in enumerate(sides.items()):
            beside = 1.02 ** (2 * i + j - len(results) + 0.5)  # so that bars do not hide each other
            for axes, values in (
                (top, [row["accuracy"][side] for row in found["passes"]]),
                (bottom, [row[side]["clean_stream_nats"] for row in found["passes"]]),
            ):
                mean, se = ([value[key] for value in values] for key in ("mean", "se"))
                axes.errorbar(
                    [n * beside for n in ticks], mean, se, color=colour, capsize=2.5, ms=5, **style
                )
        top.axhline(found["ar"]["accuracy"]["mean"], color=colour, ls=":", lw=1.5)
        bottom.axhline(found["ar"]["clean_stream_nats"]["mean"], color=colour, ls=":", lw=1.5)
        bottom.axhline(found["text"]["clean_stream_nats"]["mean"], color=colour, ls="-.", lw=1.5)
    top.axhline(results[0]["most_frequent_token"], color="0.6", lw=1.5)
    top.set_title(f"hole of {results[0]['hole']} tokens")
    bottom.set_xlabel("denoising passes")
    for axes in (top, bottom):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw tokens right and likelihood against passes: a column a hole length, a colour an
    artifact.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    def line(label: str, color: str = "0.3", **style: Any) -> Line2D:
        return Line2D([], [], color=color, label=label, **style)

    holes, artifacts = result["holes"], result["artifacts"]
    size = (max(1.5 + 3.8 * len(holes), 7), 8)
    figure, axes = plt.subplots(
        2, len(holes), figsize=size, sharex="col", sharey="row", squeeze=False
    )
    for column in range(len(holes)):
        draw_hole(
            axes[0, column], axes[1, column], [artifact["infill"][column] for artifact in artifacts]
        )
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("share of tokens right")
    axes[1, 0].set_ylabel("nats per token of the fill\n(clean stream of the same weights)")
    handles = [line(a["label"], COLOURS[i % len(COLOURS)], lw=4) for i, a in enumerate(artifacts)]
    handles += [
        line(f"with {result['suffix']} tokens after the hole", ls="-", marker="o"),
        line("without them", ls="--", marker="o", mfc="white"),
        line("left to right (ar)", ls=":"),
        line("the text itself", ls="-."),
        line("most frequent token", "0.6"),
    ]
    about = (
        f"Greedy infill, {result['examples']} excerpts, {result['prefix']} tokens before the hole"
    )
    figure.suptitle(
        f"{about}\nbars: ± 1 standard error of each point (differences are paired: see the tables)",
        size=11,
    )
    columns = min(len(handles), 2 + len(holes))
    figure.tight_layout(rect=(0, 0.01 + 0.035 * -(-len(handles) // columns), 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"--plot={path} was not written ({error.strerror}); name another file")
    finally:
        plt.close(figure)


def to_json(result: Mapping[str, Any]) -> str:
    """Write one line.

    Raises:
        UserError: a number is not finite.
    """
    try:
        return json.dumps(result, allow_nan=False)
    except ValueError:
        fail(
            "an artifact's predictions are not finite numbers, so its weights are spoilt; export "
            "it again"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error the user can repair."""
    args = parse_args(argv)
    from tqdm import tqdm

    from train_gpt import UserError  # here, so that --help and a mistyped option answer at once

    try:
        check_outputs(args)
        revise_examples = min(args.revise_examples, args.examples)
        shape = (args.prefix, args.suffix, args.revise_window, revise_examples)
        plan = Plan(args.holes, args.passes, *shape, args.seed)
        device = pick_device(args.device)
        artifacts = load(args.artifacts, plan, device)
        rows, data_path = excerpts(artifacts[0].model.cfg, plan, args.examples)
        result = {
            "data_path": data_path,
            "examples": args.examples,
            **plan._asdict(),
            "device": str(device),
        }
        total = len(artifacts) * -(-len(rows) // ROWS_AT_ONCE[device.type])
        with tqdm(total=total, desc="infill", disable=None) as bar:
            result["artifacts"] = [measure(loaded, rows, plan, bar) for loaded in artifacts]
        line = to_json(result)
        print("\n".join(tell(found) for found in result["artifacts"]))
        print(line, flush=True)
        if args.out is not None:
            args.out.write_text(line + "\n", encoding="utf-8")
        if args.plot is not None:
            draw(result, args.plot)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
