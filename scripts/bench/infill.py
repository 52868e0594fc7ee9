"""Measure what a denoiser gains from the text after a span and from more passes, and whether it
detects wrong tokens.

    DATA_PATH=data/stdlib python scripts/bench/infill.py final_model.int8.ptz
    DATA_PATH=data/stdlib python scripts/bench/infill.py a.ptz b.ptz --spans 8 --passes 1,4 \\
        --examples 1024 --out infill.json --plot infill.png

Spans lie in evenly spaced excerpts of the validation data (DATA_PATH; else that of the artifact)
and are filled greedily twice: in a window that ends with the span, and in one that continues with
the text after it. Both read the same text before it, so their difference is paired. Standard errors
are over excerpts, not over tokens.

Nats per token of the filled-in text are those of the clean stream of the same weights, which is no
independent judge. Entropy and distinct-2 are reported beside them, since repetitive text has a high
likelihood, too.

Revision replaces tokens of true text by random ones and measures whether these have the lowest
probability: in a window all of whose tokens are possibly corrupted, and in the clean stream. As
many tokens as were replaced are then revised: set to the detector's own most probable token
(argmax), or remasked and filled in one pass (refill).

The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

import train_gpt as tg
from scripts import decoding
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
from train_gpt import GPT, Config

PLANTED = (1, 2, 4)  # wrong tokens in a window
ROWS_AT_ONCE = {"cpu": 32, "cuda": 256}  # more are no faster
WITH, WITHOUT = "with_suffix", "without_suffix"
TEXT, AR = ("text", 0), ("ar", 0)  # how a span is filled, besides (WITH or WITHOUT, passes)
Key = tuple[str, int]
# Line styles in the plot.
SIDES: dict[str, dict[str, Any]] = {
    WITH: dict(ls="-", marker="o"),
    WITHOUT: dict(ls="--", marker="o", mfc="white"),
}


def colour_of(artifact: int) -> str:
    """Return the colour of an artifact in the plot."""
    return f"C{artifact % 10}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, default = parser.add_argument, "(default %(default)s)"
    add("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    add("--spans", type=counts, default="8,16,64", help=f"tokens of an infill span {default}")
    passes = f"passes over a span {default}"
    add("--passes", type=counts, default="1,2,4,8,12,20,30", help=passes)
    parser.whole("--examples", 256, "excerpts", low=2)  # one has no standard error
    parser.whole("--prefix", 128, "tokens before the span", low=2)
    parser.whole("--suffix", 64, "tokens after the span")
    window = "tokens of which some are replaced"
    parser.whole("--revise-window", 32, window, low=max(PLANTED) + 1)
    parser.whole("--revise-examples", 256, "excerpts for it; 0: none", low=0)
    parser.whole("--seed", 0, "fixes the planted tokens", low=0)
    parser.device()
    parser.outputs("draw accuracy and likelihood against passes")
    args = parser.parse_args(argv)
    if args.revise_examples == 1:
        parser.error("--revise-examples=1 has no standard error; use 0 or at least 2")
    if args.passes[0] > args.spans[0]:
        rule = f"a span of {args.spans[0]} takes at most one pass per token"
        parser.error(f"--passes: {rule}; list a smaller number")
    if len(set(args.artifacts)) < len(args.artifacts):
        parser.error("an artifact is named twice")
    return args


# ==============================================================================
# 1  MEASURES -- pure functions of tensors; N examples
# ==============================================================================


def estimate(values: Tensor) -> dict[str, float]:
    """Mean over examples of one value per example, (N,), and its standard error."""
    values = values.double()
    return {"mean": values.mean().item(), "se": (values.var() / len(values)).sqrt().item()}


def paired(ours: Tensor, theirs: Tensor) -> dict[str, float | None]:
    """Mean difference of two values of the same examples, (N,) each, its standard error and a p.

    p is two-sided, of the normal distribution; None where all differences are equal.
    """
    found = estimate(ours.double() - theirs.double())
    z = found["mean"] / found["se"] if found["se"] > 0 else None
    return {**found, "z": z, "p": None if z is None else math.erfc(abs(z) / math.sqrt(2))}


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Compare values of examples (N,) with the suffix and without it."""
    return {WITH: estimate(ours), WITHOUT: estimate(theirs), "difference": paired(ours, theirs)}


def most_frequent(ids: Tensor) -> float:
    """Share of the most frequent token: the best accuracy of a constant prediction."""
    return ids.flatten().bincount().max().item() / ids.numel()


def unigram_entropy(ids: Tensor) -> float:
    """Entropy of the tokens of all examples together, (N, n), nats."""
    count = ids.flatten().bincount().double()
    share = count[count > 0] / ids.numel()
    return -(share * share.log()).sum().item()


def distinct_2(ids: Tensor) -> float | None:
    """Share of different bigrams among the bigrams of an example, mean over (N, n); n = 1: None."""
    if ids.shape[1] < 2:
        return None
    rows = [list(itertools.pairwise(row)) for row in ids.tolist()]
    return sum(len(set(row)) / len(row) for row in rows) / len(rows)


def quarters(size: int) -> dict[str, slice]:
    """Split a span of `size` tokens; the middle is two quarters. Empty parts are left out."""
    quarter = max(size // 4, 1)
    last = max(size - quarter, quarter)
    parts = {
        "first_quarter": slice(0, quarter),
        "middle": slice(quarter, last),
        "last_quarter": slice(last, size),
    }
    return {name: part for name, part in parts.items() if part.start != part.stop}


def plant(x0: Tensor, keys: Tensor, count: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Replace `count` tokens of each row (N, n) by others, all equally likely, by keys (N,).

    A smaller `count` replaces some of the tokens of a larger one, by the same tokens. Returns the
    text, and which tokens were planted, bool.
    """
    planted = (
        tg.random_uniform(tg.split_key(keys, 1), x0.shape[1]).argsort(dim=-1).argsort(dim=-1)
        < count
    )
    step = 1 + (tg.random_uniform(tg.split_key(keys, 2), x0.shape[1]) * (vocab_size - 1)).long()
    return (x0 + step * planted) % vocab_size, planted


def least_likely(log_p: Tensor, planted: Tensor) -> Tensor:
    """Mark as many tokens of each row (N, n) as were planted: those of lowest probability."""
    return log_p.argsort(dim=-1).argsort(dim=-1) < planted.sum(-1, keepdim=True)


def detection(log_p: Tensor, planted: Tensor) -> dict[str, Tensor]:
    """Measure how well low log-probability of visible tokens (N, n) detects planted ones.

    Returns one value per example, (N,). least_likely_is_planted: the least likely token is;
    found: share of planted tokens among as many least likely ones; auc: share of pairs of a planted
    and a true token in which the planted one is less likely, ties as a half.
    """
    lowest = planted.gather(1, log_p.argmin(-1, keepdim=True))[:, 0]
    found = (least_likely(log_p, planted) & planted).sum(-1) / planted.sum(-1)
    own, other = log_p[:, :, None], log_p[:, None, :]
    pairs = planted[:, :, None] & ~planted[:, None, :]
    won = ((own < other).double() + (own == other).double() / 2) * pairs
    auc = won.sum((1, 2)) / pairs.sum((1, 2))
    return {"least_likely_is_planted": lowest.double(), "found": found, "auc": auc}


def repairs(final: Tensor, x0: Tensor, planted: Tensor) -> dict[str, Tensor]:
    """Share of planted tokens that are now true, and of others that no longer are, (N,) each."""
    true = final == x0
    repaired = (true & planted).sum(-1) / planted.sum(-1)
    spoilt = (~true & ~planted).sum(-1) / (~planted).sum(-1)
    return {"repaired": repaired, "spoilt": spoilt}


# ==============================================================================
# 2  PASSES -- over a batch of excerpts whose text before the span was read once
# ==============================================================================


class Batch(NamedTuple):
    """Excerpts with a span from token `start` on, and what the model has read of them."""

    run: decoding.Run  # its cache has L places, filled up to the token before the last visible one
    rows: Tensor  # (B, L)
    start: int

    @property
    def before(self) -> Tensor:
        """The last visible token before the span, (B, 1)."""
        return self.rows[:, self.start - 1 : self.start]

    def window(self, ids: Tensor, suffix: Tensor) -> decoding.Window:
        """Put tokens (B, S) in the place of the span, before a suffix (B, n)."""
        first = torch.full_like(self.before, self.start - 1)
        return decoding.Window(torch.cat((self.before, ids), dim=1), first, suffix, is_last=True)

    def select(self, index: list[int]) -> Batch:
        """Keep some excerpts."""
        old = self.run.cache
        keys, values = [k[index] for k in old.keys], [v[index] for v in old.values]
        cache = tg.Cache(keys, values, old.tokens[index])
        run = self.run._replace(cache=cache, keys=self.run.keys[index])
        return self._replace(run=run, rows=self.rows[index])


def open_batch(model: GPT, rows: Tensor, index: Tensor, start: int, seed: int) -> Batch:
    """Read excerpts (B, L) up to a span at `start`; their numbers (B,) determine the noise."""
    cache = tg.fill_cache(model, rows[:, : start - 1], rows.shape[1] - start + 1)
    keys = tg.split_key(index[:, None], seed)
    return Batch(decoding.Run(model, decoding.MODES["refine"], cache, keys), rows, start)


def predict_causal(batch: Batch, ids: Tensor) -> Tensor:
    """Predict tokens (B, n) that fill the span, each from all before it: logits (B, n, V)."""
    read = torch.cat((batch.before, ids[:, :-1]), dim=1)
    positions = batch.start - 1 + torch.arange(ids.shape[1], device=ids.device)
    positions = positions.expand(len(ids), -1)
    return batch.run.model.forward_causal(read, batch.run.cache, positions)[0]


def decode_left_to_right(batch: Batch, count: int) -> Tensor:
    """Decode `count` tokens of the span from the clean stream, (B, count)."""
    stop = batch.start + count
    found = tg.decode_autoregressive(batch.run.model, batch.rows, batch.start, stop)
    return found[:, batch.start : stop]


def predict_masked(batch: Batch, window: decoding.Window, masked: Tensor) -> Tensor:
    """Predict a window by one pass with some of its tokens (B, S) masked: logits (B, S, V)."""
    logits = decoding.denoise(batch.run, decoding.with_suffix(window, masked))
    return logits[:, 0, : masked.shape[1]]


def fill(batch: Batch, window: decoding.Window, masked: Tensor, steps: int) -> Tensor:
    """Fill the masked tokens (B, S) of a window in `steps` passes; returns its tokens (B, S)."""
    refine = batch.run.decoding._replace(steps=steps)
    run = batch.run._replace(decoding=refine)
    return decoding.fill_window(run, window, masked)[0].tokens[:, 1:]


def predict_doubted(batch: Batch, ids: Tensor, wrong_share: float) -> Tensor:
    """Predict a window of tokens (B, S), any of which may be a wrong one: logits (B, S, V)."""
    none, visible = ids[:, :0], torch.zeros_like(ids, dtype=torch.bool)
    windows = decoding.with_suffix(batch.window(ids, none), visible)
    inputs = decoding.build_inputs(batch.run, none, none, windows)
    t = torch.full_like(inputs.noisy.t, wrong_share)
    noisy = tg.Corruption(ids[:, None], visible[:, None], ~visible[:, None], t)
    logits = batch.run.model.forward_denoise(inputs._replace(noisy=noisy), batch.run.cache)
    return logits[:, 0]


# ==============================================================================
# 3  INFILL -- spans of several lengths, with and without the text after them
# ==============================================================================


class Plan(NamedTuple):
    """What is measured."""

    spans: list[int]
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
            self.spans[-1] + self.suffix, self.revise_window if self.revise_examples else 0
        )

    def passes_of(self, span: int) -> list[int]:
        """List the numbers of passes for a span: at most one per token."""
        return [n for n in self.passes if n <= span]


class Fill(NamedTuple):
    """Tokens in the place of a span, (N, n), and nats of each under the clean stream."""

    ids: Tensor
    nats: Tensor

    def first(self, count: int) -> Fill:
        """Keep the first `count` tokens."""
        return Fill(self.ids[:, :count], self.nats[:, :count])


class Span(NamedTuple):
    """All that was measured of the spans of one length."""

    fills: dict[Key, Fill]  # by TEXT, AR or (side, passes)
    # By side: the first pass's most probable tokens, and its nats of the true ones.
    first: dict[str, Fill]


def score_fill(batch: Batch, ids: Tensor) -> Fill:
    """Score tokens (B, n) in the place of the span by the clean stream."""
    return Fill(ids, tg.token_nll(predict_causal(batch, ids), ids))


def fill_spans(batch: Batch, plan: Plan) -> dict[int, Span]:
    """Fill spans of every length in every way."""
    longest = plan.spans[-1]
    text = score_fill(batch, batch.rows[:, batch.start : batch.start + longest])
    ar = score_fill(batch, decode_left_to_right(batch, longest))
    found = {}
    for span in plan.spans:  # left to right, a shorter span is the beginning of a longer one
        parts = Span({TEXT: text.first(span), AR: ar.first(span)}, {})
        after = batch.rows[:, batch.start + span :][:, : plan.suffix]
        for side, suffix in ((WITH, after), (WITHOUT, after[:, :0])):
            fill_side(batch, parts, side, suffix, plan.passes_of(span))
        found[span] = parts
    return found


def fill_side(batch: Batch, parts: Span, side: str, suffix: Tensor, passes: Sequence[int]) -> None:
    """Fill spans before a suffix (B, n) in each number of passes, and add this to `parts`."""
    x0 = parts.fills[TEXT].ids
    masked = torch.ones_like(x0, dtype=torch.bool)
    window = batch.window(torch.zeros_like(x0), suffix)
    logits = predict_masked(batch, window, masked)
    parts.first[side] = Fill(logits.argmax(-1), tg.token_nll(logits, x0))
    for count in passes:
        once = count == 1  # the first pass is the only one
        ids = parts.first[side].ids if once else fill(batch, window, masked, count)
        parts.fills[side, count] = score_fill(batch, ids)


def join_spans(parts: Sequence[Span]) -> Span:
    """Put the examples of several batches together."""

    def join(fills: Iterator[Fill]) -> Fill:
        return Fill(*(torch.cat(tensors) for tensors in zip(*fills, strict=True)))

    return Span(
        {key: join(part.fills[key] for part in parts) for key in parts[0].fills},
        {side: join(part.first[side] for part in parts) for side in parts[0].first},
    )


def sum_up_span(span: Span, passes: Sequence[int], suffix: int) -> dict[str, Any]:
    """Turn the spans of one length into the numbers that are reported."""
    x0, first = span.fills[TEXT].ids, span.first
    size = x0.shape[1]

    def hits(fill: Fill, part: slice = slice(None)) -> Tensor:
        """Return the accuracy in each example, (N,)."""
        return (fill.ids == x0).double()[:, part].mean(-1)

    def quality(fill: Fill) -> dict[str, Any]:
        return {
            "clean_stream_nats": estimate(fill.nats.mean(-1)),
            "unigram_entropy": unigram_entropy(fill.ids),
            "distinct_2": distinct_2(fill.ids),
        }

    def row(count: int) -> dict[str, Any]:
        ours, theirs = span.fills[WITH, count], span.fills[WITHOUT, count]
        accuracy = compare(hits(ours), hits(theirs))
        accuracy["with_suffix_minus_ar"] = paired(hits(ours), hits(span.fills[AR]))
        both = {WITH: quality(ours), WITHOUT: quality(theirs)}
        return {"passes": count, "accuracy": accuracy, **both}

    one_pass = {
        name: compare(hits(first[WITH], part), hits(first[WITHOUT], part))
        for name, part in quarters(size).items()
    }
    return {
        "span": size,
        "window_with_suffix": size + suffix,
        "most_frequent_token": most_frequent(x0),
        "text": quality(span.fills[TEXT]),
        "ar": {"accuracy": estimate(hits(span.fills[AR])), **quality(span.fills[AR])},
        "first_pass_log_prob": compare(-first[WITH].nats.mean(-1), -first[WITHOUT].nats.mean(-1)),
        "one_pass_accuracy": one_pass,
        "passes": [row(count) for count in passes],
    }


# ==============================================================================
# 4  REVISION -- wrong tokens in true text
# ==============================================================================

Marks = dict[str, Any]  # nested; values (N,)


def revise(batch: Batch, plan: Plan) -> dict[int, Marks]:
    """Plant wrong tokens in true text, detect them, and revise the detected ones."""
    x0 = batch.rows[:, batch.start : batch.start + plan.revise_window]
    return {count: revise_some(batch, x0, count) for count in PLANTED}


def revise_some(batch: Batch, x0: Tensor, count: int) -> Marks:
    """Do so with `count` wrong tokens in each window of true ones (B, S)."""
    vocab_size = batch.run.model.cfg.vocab_size
    xt, planted = plant(x0, batch.run.keys[:, 0], count, vocab_size)
    window = batch.window(xt, xt[:, :0])
    predictions = {
        "window": predict_doubted(batch, xt, count / x0.shape[1]),
        "clean_stream": predict_causal(batch, xt),
    }
    known = {"refill": fill(batch, window, planted, 1)}
    detectors = {}
    for name, logits in predictions.items():
        known[f"{name}_argmax"] = logits.argmax(-1)
        log_p = logits.double().log_softmax(-1).gather(-1, xt[..., None])[..., 0]
        marked = least_likely(log_p, planted)
        detectors[name] = {
            **detection(log_p, planted),
            "argmax": repairs(torch.where(marked, logits.argmax(-1), xt), x0, planted),
            "refill": repairs(fill(batch, window, marked, 1), x0, planted),
        }
    at_known = {name: repairs(ids, x0, planted)["repaired"] for name, ids in known.items()}
    return {"detectors": detectors, "repaired_at_known_places": at_known}


def sum_up_marks(parts: Sequence[Marks]) -> Marks:
    """Put the examples of several batches together, and estimate every value."""
    return {
        key: sum_up_marks([part[key] for part in parts])
        if isinstance(value, dict)
        else estimate(torch.cat([part[key] for part in parts]))
        for key, value in parts[0].items()
    }


def trained_on_random_tokens(cfg: Config) -> bool:
    """Tell whether windows of training had random tokens."""
    mode, masked = cfg.diffusion_corruption_mode, cfg.diffusion_hybrid_mask_prob
    return mode == "uniform" or (mode == "hybrid" and masked < 1)


# ==============================================================================
# 5  ARTIFACTS AND EXCERPTS -- every fault is found before the long part
# ==============================================================================


class Loaded(NamedTuple):
    """A model with its name in tables and plot."""

    label: str
    path: Path
    model: GPT


def labels(paths: Sequence[Path]) -> list[str]:
    """Name artifacts by file, by folder or by both: the shortest names that differ and say more
    than `final_model`, which every run's artifact is called.
    """
    files = [path.name.split(".")[0] for path in paths]
    for names in (files, [path.absolute().parent.name for path in paths]):
        if len(set(names)) == len(names) and all(names) and "final_model" not in names:
            return names
    return [str(path) for path in paths]


def check_fits(path: Path, model: GPT, plan: Plan) -> None:
    """Raise UserError if a model cannot fill spans, or reads less than an excerpt."""
    if model.mask_emb is None:
        why = "has no trained denoiser (DIFFUSION_LOSS_WEIGHT=0), so it fills no spans"
        fail(f"{path} {why}; leave it out")
    if plan.length > model.cfg.train_seq_len:
        fail(
            f"--prefix={plan.prefix} and then a span of {plan.spans[-1]} with "
            f"--suffix={plan.suffix}, or --revise-window={plan.revise_window}, take "
            f"{plan.length} tokens; {path} was trained to read {model.cfg.train_seq_len} "
            "(TRAIN_SEQ_LEN); shorten one of them"
        )


def load(
    paths: Sequence[Path], plan: Plan, device: torch.device
) -> tuple[list[Loaded], tg.TokenLoader]:
    """Read artifacts that can all be measured on the same text, and open that text.

    Raises:
        UserError: one is missing or damaged, has no denoiser, reads too little, or has another
            tokenizer than another one or the text.
    """
    artifacts = [load_artifact(path, device) for path in paths]
    for artifact in artifacts:
        check_fits(artifact.path, artifact.model, plan)
    tokenizers = {artifact.tokenizer_sha256: str(artifact.path) for artifact in artifacts}
    if len(tokenizers) > 1:
        named = " and ".join(tokenizers.values())
        fail(f"{named} have different tokenizers; measure them one by one")
    if path_given := os.environ.get("TOKENIZER_PATH"):
        open_tokenizer(artifacts[0], path_given, remedy="DATA_PATH must fit that one")
    loader = open_validation(artifacts[0], text_config(artifacts[0].model.cfg))
    labelled = zip(labels(paths), artifacts, strict=True)
    return [Loaded(label, artifact.path, artifact.model) for label, artifact in labelled], loader


def excerpts(loader: tg.TokenLoader, plan: Plan, examples: int) -> tuple[Tensor, str]:
    """Take evenly spaced excerpts of the validation data, (examples, length), and say where from.

    Raises:
        UserError: so little data that spans would overlap.
    """
    room, data_path = loader.total - plan.length, str(loader.paths[0].parent)
    apart = max(plan.spans[-1], plan.revise_window if plan.revise_examples else 0)
    if room // examples < apart:
        fail(
            f"--examples={examples} spans of {apart} tokens (or windows with wrong tokens) overlap "
            f"in the {loader.total:,} validation tokens of DATA_PATH={data_path!r}; take at "
            f"most {max(room // apart, 0)}, or prepare more text"
        )
    starts = [i * room // examples for i in range(examples)]
    return torch.cat([loader.rows(start, 1, plan.length - 1) for start in starts]), data_path


def describe_artifact(loaded: Loaded) -> dict[str, Any]:
    """Describe an artifact and how it was trained."""
    cfg = loaded.model.cfg
    return {
        "artifact": str(loaded.path),
        "label": loaded.label,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "recipe": cfg.recipe,
        "corruption_mode": cfg.diffusion_corruption_mode,
        "largest_trained_window": max(size for size, _ in cfg.sizes(cfg.diffusion_windows)),
        "trained_on_random_tokens": trained_on_random_tokens(cfg),
    }


def measure(loaded: Loaded, rows: Tensor, plan: Plan, bar: Any) -> dict[str, Any]:
    """Measure one artifact on excerpts (N, L)."""
    model, device = loaded.model, loaded.model.tok_emb.device
    spans, marks = list[dict[int, Span]](), list[dict[int, Marks]]()
    at_once = ROWS_AT_ONCE[device.type]
    # The revised excerpts are evenly spaced, too.
    revised = {i * len(rows) // plan.revise_examples for i in range(plan.revise_examples)}
    with torch.no_grad(), autocast(device):
        for first in range(0, len(rows), at_once):
            index = torch.arange(first, min(first + at_once, len(rows)))
            here = rows[index].to(device)
            batch = open_batch(model, here, index.to(device), plan.prefix, plan.seed)
            spans.append(fill_spans(batch, plan))
            if chosen := [i for i, number in enumerate(index.tolist()) if number in revised]:
                marks.append(revise(batch.select(chosen), plan))
            bar.update()
    joined = {size: join_spans([part[size] for part in spans]) for size in plan.spans}
    infill = [sum_up_span(span, plan.passes_of(n), plan.suffix) for n, span in joined.items()]
    summed = {n: sum_up_marks([part[n] for part in marks]) for n in PLANTED if marks}
    revision = [{"planted": n, **values} for n, values in summed.items()]
    return {**describe_artifact(loaded), "infill": infill, "revision": revision}


# ==============================================================================
# 6  REPORT -- tables for people, and the plot
# ==============================================================================


def gain(found: Mapping[str, float | None], digits: int = 3) -> str:
    p = found["p"]
    return f"{found['mean']:+.{digits}f} ± {found['se']:.{digits}f}" + (
        "" if p is None else f" (p {p:.1g})"
    )


def plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def infill_table(span: Mapping[str, Any]) -> str:
    """Lay out a row for each number of passes, then the references."""
    head = ["passes", "accuracy, with suffix", "without", "gain of suffix", "gain over ar"]
    head += ["nats, with", "without", "entropy, with", "without", "distinct-2, with", "without"]
    rows = []
    for row in span["passes"]:
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
    for name, share in (("ar", cell(span["ar"]["accuracy"])), ("text", "1")):
        other = span[name]
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
    rows.append(["most frequent token", "-", plain(span["most_frequent_token"], 3), *["-"] * 8])
    return markdown(head, rows)


def first_pass_table(spans: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the first pass: log-probability of the text, and where in a span the suffix helps."""
    rows = []
    for span in spans:
        found = {"log p of the text, nats per token": span["first_pass_log_prob"]}
        found |= {
            f"accuracy, {name.replace('_', ' ')}": part
            for name, part in span["one_pass_accuracy"].items()
        }
        rows += [
            [
                str(span["span"]),
                name,
                cell(value[WITH]),
                cell(value[WITHOUT]),
                gain(value["difference"]),
            ]
            for name, value in found.items()
        ]
    return markdown(["span", "first pass", "with suffix", "without", "gain of suffix"], rows)


def revision_table(revision: Sequence[Mapping[str, Any]]) -> str:
    """Lay out a row for each number of planted tokens and detector; then at known places."""
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


def describe(result: Mapping[str, Any]) -> str:
    """Lay out all tables of one artifact, with what a reader must know of it."""
    largest, label = result["largest_trained_window"], result["label"]
    corruption = f"corruption {result['corruption_mode']}"
    parts = [f"## {label}: {result['parameters']:,} parameters, {corruption}"]
    for span in result["infill"]:
        size = span["window_with_suffix"]
        longer = f"; longer than any it was trained on ({largest})" if size > largest else ""
        parts.append(f"Spans of {span['span']}, in windows of {size} with the suffix{longer}:")
        parts.append(infill_table(span))
    parts.append(first_pass_table(result["infill"]))
    if result["revision"]:
        seen = "; this model never saw random tokens in a window"
        seen = "" if result["trained_on_random_tokens"] else seen
        parts += [f"Wrong tokens in true text{seen}:", revision_table(result["revision"])]
    return "\n\n".join(parts) + "\n"


def draw_artifact(
    top: Axes, bottom: Axes, found: Mapping[str, Any], colour: str, place: float
) -> None:
    """Draw accuracy (top) and likelihood (bottom) of one artifact.

    Args:
        top: of accuracy.
        bottom: of nats.
        found: its infill of one span length.
        colour: of its lines.
        place: twice the number of the artifact, less the number of artifacts: keeps bars apart.
    """
    ticks = [row["passes"] for row in found["passes"]]
    for side, style in SIDES.items():
        shift = 1.02 ** (place + (0.5 if side == WITH else 1.5))  # bars do not hide each other
        accuracy = [row["accuracy"][side] for row in found["passes"]]
        likelihood = [row[side]["clean_stream_nats"] for row in found["passes"]]
        for axes, values in ((top, accuracy), (bottom, likelihood)):
            mean, se = ([value[key] for value in values] for key in ("mean", "se"))
            x = [n * shift for n in ticks]
            axes.errorbar(x, mean, se, color=colour, capsize=2.5, ms=5, **style)
    top.axhline(found["ar"]["accuracy"]["mean"], color=colour, ls=":", lw=1.5)
    bottom.axhline(found["ar"]["clean_stream_nats"]["mean"], color=colour, ls=":", lw=1.5)
    bottom.axhline(found["text"]["clean_stream_nats"]["mean"], color=colour, ls="-.", lw=1.5)


def draw_span(top: Axes, bottom: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw accuracy (top) and likelihood (bottom) of one span length, for each artifact."""
    ticks = [row["passes"] for row in results[0]["passes"]]
    for i, found in enumerate(results):
        draw_artifact(top, bottom, found, colour_of(i), 2 * i - len(results))
    top.axhline(results[0]["most_frequent_token"], color="0.6", lw=1.5)
    top.set_title(f"span of {results[0]['span']} tokens")
    bottom.set_xlabel("denoising passes")
    for axes in (top, bottom):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)


def legend_lines(result: Mapping[str, Any]) -> list[Line2D]:
    """Return the lines of the legend: a colour per artifact, a style per curve."""
    from matplotlib.lines import Line2D

    def line(label: str, color: str = "0.3", **style: Any) -> Line2D:
        return Line2D([], [], color=color, label=label, **style)

    handles = [line(a["label"], colour_of(i), lw=4) for i, a in enumerate(result["artifacts"])]
    return [
        *handles,
        line(f"with a suffix of {result['suffix']} tokens", **SIDES[WITH]),
        line("without it", **SIDES[WITHOUT]),
        line("left to right (ar)", ls=":"),
        line("the text", ls="-."),
        line("most frequent token", "0.6"),
    ]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy and likelihood against passes: a column per span length, a colour per artifact.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    num_spans, artifacts = len(result["spans"]), result["artifacts"]
    figure = Figure(figsize=(max(1.5 + 3.8 * num_spans, 7), 8))
    axes = figure.subplots(2, num_spans, sharex="col", sharey="row", squeeze=False)
    for column in range(num_spans):
        found = [artifact["infill"][column] for artifact in artifacts]
        draw_span(axes[0, column], axes[1, column], found)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("accuracy (share of tokens)")
    axes[1, 0].set_ylabel(
        "nats per token of the filled-in text\n(clean stream of the same weights)"
    )
    handles = legend_lines(result)
    prefix = f"{result['prefix']} tokens before the span"
    bars = "bars: ± 1 standard error of each point (differences are paired: see the tables)"
    figure.suptitle(f"Greedy infill, {result['examples']} excerpts, {prefix}\n{bars}", size=11)
    columns = min(len(handles), 2 + num_spans)
    figure.tight_layout(rect=(0, 0.01 + 0.035 * -(-len(handles) // columns), 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"--plot={path} was not written ({error.strerror}); name another file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all artifacts; UserError: one cannot be measured, or a file not be written."""
    check_outputs(args)
    revise_examples = min(args.revise_examples, args.examples)
    shape = (args.prefix, args.suffix, args.revise_window, revise_examples)
    plan = Plan(args.spans, args.passes, *shape, args.seed)
    device = pick_device(args.device)
    artifacts, loader = load(args.artifacts, plan, device)
    rows, data_path = excerpts(loader, plan, args.examples)
    result = {"data_path": data_path, "examples": args.examples, **plan._asdict()}
    total = len(artifacts) * -(-len(rows) // ROWS_AT_ONCE[device.type])
    with tqdm(total=total, desc="infill", disable=None) as bar:
        found = [measure(loaded, rows, plan, bar) for loaded in artifacts]
    result |= {"device": str(device), "artifacts": found}
    write_result(args.out, result)
    print("\n".join(map(describe, found)))
    if args.plot is not None:
        draw(result, args.plot)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
