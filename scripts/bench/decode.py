"""Measure every decoding mode of an artifact: speedup over its cached AR, and quality.

    DATA_PATH=data/stdlib python scripts/bench/decode.py final_model.int8.ptz --judge other_ar.ptz
    python scripts/bench/decode.py final_model.int8.ptz --modes speculative,refine --passes 1,8

Prompts are excerpts of the validation data (DATA_PATH; else that of the artifact). Seconds include
the pass over the prompt in every row, AR's too, and only decoded tokens count; median of --repeats
rounds after a warm-up. In a round all modes take turns, batch by batch, so that a machine that
slows down slows all of them; a sequential head begins each round with an empty cache of pairs. The
last line of the output is one JSON object.

passes              over one window; `block` and `remask` fill several windows
tokens per forward  decoded tokens / passes, mean over examples; the pass over the prompt is not
                    counted
speedup             over AR with a cache: same weights, same batch, same run
identical           share of examples in which every token equals AR's
accuracy            share of tokens equal to the text, in a continuation; infill accuracy: in a
                    masked span whose suffix the window reads
judge, own nats     per decoded token, under a model that was trained separately and under this one.
                    Repetition has few nats under both, so the entropy of all decoded tokens and
                    distinct-2 (mean over examples) are reported, too
python              (--python) share of outputs, prompt included, that ast.parse accepts; prompts
                    begin with a top-level `def` or `class`. An incomplete last line is dropped,
                    then each last line that is only unfinished (an open bracket or string, a block
                    without a body). More than blanks must remain of the decoded text; one line is
                    enough, so see the entropy, too. The true text is cut in the same way
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import ast
import codeop
import contextlib
import copy
import functools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import train_gpt as tg
from scripts import decoding
from scripts.bench.infill import distinct_2, estimate, unigram_entropy
from scripts.bench.text import open_validation
from scripts.chain import Head, load_head
from scripts.common import (
    Artifact,
    Parser,
    autocast,
    cell,
    check_outputs,
    counts,
    fail,
    load_artifact,
    markdown,
    names,
    open_tokenizer,
    pick_device,
    run_command,
    text_config,
    write_result,
)
from scripts.decoding import Decoding

SCORED_AT_ONCE, SCAN_TOKENS = 32, 1 << 22  # rows; validation tokens searched for functions
WITH_HEAD = " + head"  # in the name of a mode
# What parsing a text may raise.
BAD_SOURCE = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
# Tokens/s of the "Mercury in Retrograde" submission on one H100.
PUBLISHED = {"ar, no cache": 1519, "1 pass": 33315, "2 passes": 52424, "1 pass, infill": 147729}
Decode = Callable[[Tensor, int], decoding.Decoded]  # of excerpts (B, L) and a seed


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, modes = parser.add_argument, ",".join(decoding.MODES)
    add("artifact", type=Path)
    add("--judge", type=Path, metavar="ARTIFACT", help="another model of the same tokenizer")
    add("--modes", type=names, default=modes, help="default all; ar is always measured")
    head = "of scripts/chain.py: modes with windows also with it"
    add("--head", type=Path, metavar="FILE", help=head)
    add("--no-lookup", action="store_true", help="speculative also without prompt lookup")
    passes, batch = "1,2,4,8,12,20,30", "examples at once (default %(default)s)"
    add("--passes", type=counts, default=passes, help="default %(default)s")
    add("--batch", type=counts, default="1,32", help=batch)
    parser.whole("--examples", 32, "excerpts", low=2)
    parser.whole("--prefix", 128, "tokens of a prompt")
    parser.whole("--target", 64, "tokens to decode")
    parser.whole("--suffix", 64, "tokens after an infill span")
    parser.real("--temperature", 0.0, "0: greedy", 0, 1e6)
    parser.whole("--repeats", 3, "timed runs")
    add("--predecessor", action="store_true", help="add rows in the predecessor's protocol")
    add("--python", action="store_true", help="the text is Python: count outputs that parse")
    add("--compile", action="store_true", help="compile what a pass computes (torch.compile)")
    parser.whole("--threads", 0, "of the CPU; 0: PyTorch's choice", low=0)
    parser.device()
    parser.outputs("draw quality against speed")
    args = parser.parse_args(argv)
    if odd := [size for size in args.batch if args.examples % size]:
        rule = f"must be a multiple of --batch={odd[0]}, so that all batches are alike"
        parser.error(f"--examples={args.examples} {rule}")
    for name in args.modes:
        for fault in tg.unknown("--modes", name, decoding.MODES):
            parser.error(fault)
    args.modes = names(",".join(["ar", *args.modes]))
    return args


class Job(NamedTuple):
    """One line of the table."""

    mode: str
    passes: int  # over a window; 0: the mode has none, or takes as many as it needs
    batch: int
    decoding: Decoding


class Bench(NamedTuple):
    """What all lines share."""

    model: tg.GPT
    judge: tg.GPT | None
    tokenizer: Any  # SentencePiece; None unless outputs are to be parsed
    rows: Tensor  # (N, prefix + target + suffix) int64: prompts, their true continuations, suffixes
    prefix: int
    target: int
    repeats: int

    def text(self, ids: Tensor) -> Tensor:
        """Cut what lies between prefix and suffix out of ids (N, L): (N, target)."""
        return ids[:, self.prefix : self.prefix + self.target]

    def clock(self) -> float:
        """Wait for the device; seconds."""
        if self.rows.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def fills_windows(settings: Decoding) -> bool:
    """Tell whether the output is that of windows, the last of which reads a suffix."""
    return settings.mode not in decoding.LOSSLESS


def variants(
    modes: Sequence[str], args: argparse.Namespace, head: Head | None
) -> Iterator[tuple[str, Decoding]]:
    """Yield each mode with its settings; with a sequential head; without prompt lookup."""
    for mode in modes:
        plain = decoding.MODES[mode]
        yield mode, plain
        fewer = args.no_lookup and plain.lookup_ngram > 0
        if fewer:
            yield f"{mode}, no lookup", plain._replace(lookup_ngram=0)
        if head is not None and mode != "ar":
            yield f"{mode}{WITH_HEAD}", plain._replace(head=head)
            if fewer:
                yield f"{mode}{WITH_HEAD}, no lookup", plain._replace(head=head, lookup_ngram=0)


def without_cache(head: Head | None) -> Head | None:
    """Copy a head but for its cache, which must not speed up another row."""
    same = copy.copy(head)
    if same is not None:
        same.pair_cache = {}
    return same


def clear_caches(heads: Sequence[Head]) -> None:
    """Empty the caches of heads."""
    for head in heads:
        head.pair_cache.clear()


def plan_jobs(
    modes: Sequence[str], args: argparse.Namespace, head: Head | None = None
) -> list[Job]:
    """List every mode x passes x batch, the first mode first in each batch.

    A window takes at most one pass per token.
    """
    sampling, jobs = decoding.Sampling(temperature=args.temperature), []
    for batch in args.batch:
        for mode, variant in variants(modes, args, head):
            settings = variant._replace(sampling=sampling)
            has_steps = fills_windows(settings) and settings.threshold == math.inf
            most = min(settings.window, args.target)
            steps = sorted({min(n, most) for n in args.passes}) if has_steps else [0]
            for n in steps:
                own = settings._replace(
                    steps=n or settings.steps, head=without_cache(settings.head)
                )
                jobs.append(Job(mode, n, batch, own))
    return jobs


def decoder(at: Bench, settings: Decoding, suffix: bool = False) -> Decode:
    """Continue prompts, or with the suffix fill the masked span before it."""
    before = slice(at.prefix)
    after = slice(at.prefix + at.target, None if suffix else at.prefix + at.target)

    def decode(rows: Tensor, seed: int) -> decoding.Decoded:
        seeded = settings._replace(sampling=settings.sampling._replace(seed=seed))
        return decoding.infill(at.model, rows[:, before], rows[:, after], at.target, seeded)

    return decode


@torch.no_grad()
def decode_uncached(
    model: tg.GPT, prompt: Tensor, count: int, sampling: decoding.Sampling = decoding.GREEDY
) -> decoding.Decoded:
    """Continue prompts (B, P) by `count` tokens as mode ar does, but read all for each token."""
    ids, keys = prompt, decoding.row_keys(prompt, sampling.seed)
    for place in range(prompt.shape[1], prompt.shape[1] + count):
        logits = model.forward_causal(ids)[0][:, -1:]
        token, _ = decoding.sample_tokens(logits, sampling, tg.split_key(keys, place))
        ids = torch.cat((ids, token), dim=1)
    return decoding.Decoded(ids, torch.full_like(ids[:, :1], count))


def decode_all(at: Bench, decode: Decode, batch: int) -> decoding.Decoded:
    """Decode all excerpts, `batch` at a time, each batch with its own seed."""
    parts = [decode(at.rows[i : i + batch], i) for i in range(0, len(at.rows), batch)]
    return decoding.Decoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def timed(
    at: Bench,
    decoders: Sequence[Decode],
    batch: int,
    bar: Any,
    before_round: Callable[[], object] = lambda: None,
) -> list[tuple[decoding.Decoded, dict[str, Any]]]:
    """Decode all excerpts once by each decoder, then again in turns under the clock.

    Args:
        at: excerpts, and how many rounds.
        decoders: which take turns at each batch; another one begins each time.
        batch: excerpts at once.
        bar: of progress, by one for each decoder and round, the warm-up included.
        before_round: called before each round, to drop what the last one left.

    Returns:
        Output (N, L) and speed of each decoder.
    """
    found, seconds = list[decoding.Decoded](), [[0.0] * at.repeats for _ in decoders]
    for decode in decoders:
        found.append(decode_all(at, decode, batch))
        bar.update()
    for i in range(at.repeats):
        before_round()
        for turn, start in enumerate(range(0, len(at.rows), batch)):
            for j in range(len(decoders)):
                which = (i + turn + j) % len(decoders)
                began = at.clock()
                decoders[which](at.rows[start : start + batch], start)
                seconds[which][i] += at.clock() - began
        bar.update(len(decoders))
    count = at.text(at.rows).numel()
    speeds = [{"tokens_per_second": count / statistics.median(s), "seconds": s} for s in seconds]
    return [*zip(found, speeds, strict=True)]


def nats(model: tg.GPT | None, ids: Tensor, prefix: int) -> dict[str, float] | None:
    """Estimate the exact nats per token after the prefix of ids (N, L)."""
    if model is None:
        return None
    batches = torch.split(ids, SCORED_AT_ONCE)
    parts = [tg.token_nll_causal(model, part)[:, prefix - 1 :].double() for part in batches]
    return estimate(torch.cat(parts).mean(-1))


def accuracy(at: Bench, ids: Tensor) -> float:
    """Share of decoded tokens of ids (N, L) that equal the text."""
    return (at.text(ids) == at.text(at.rows)).double().mean().item()


def parses(text: str, prompt: str) -> bool:
    """Tell whether a Python text parses, cut as described at the top, and exceeds the prompt."""
    lines = text.split("\n")[:-1]
    with warnings.catch_warnings(), contextlib.suppress(*BAD_SOURCE):
        warnings.simplefilter("ignore")  # "\d" is bad style, not bad syntax
        while len((source := "\n".join(lines)).rstrip()) > len(prompt.rstrip()):
            with contextlib.suppress(*BAD_SOURCE):
                ast.parse(source + "\n")
                return True
            # Raises unless only its end is missing.
            codeop.compile_command(source + "\n", symbol="exec")
            lines.pop()
    return False


def quality(at: Bench, ids: Tensor) -> dict[str, Any]:
    """Measure the quality of continuations, (N, prefix + target)."""
    new, python = at.text(ids), None
    if at.tokenizer is not None:
        found = []
        for row in ids.tolist():
            text, prompt = at.tokenizer.decode(row), at.tokenizer.decode(row[: at.prefix])
            found.append(parses(text, prompt))
        python = sum(found) / len(found)
    return {
        "judge_nats": nats(at.judge, ids, at.prefix),
        "own_nats": nats(at.model, ids, at.prefix),
        "entropy_bits": unigram_entropy(new) / math.log(2),
        "distinct_2": distinct_2(new),
        "python": python,
    }


def measure(at: Bench, jobs: Sequence[Job], bar: Any) -> list[dict[str, Any]]:
    """Measure every job; the first of a batch, ar, is its reference."""
    found = list[dict[str, Any]]()
    for batch in dict.fromkeys(job.batch for job in jobs):
        group = [job for job in jobs if job.batch == batch]
        heads = [head for job in group if (head := job.decoding.head) is not None]
        decoders = [decoder(at, job.decoding) for job in group]
        each = timed(at, decoders, batch, bar, functools.partial(clear_caches, heads))
        for job, (out, speed) in zip(group, each, strict=True):
            found.append(measured(at, job, out, speed, *each[0]))
    return found


def measured(
    at: Bench,
    job: Job,
    out: decoding.Decoded,
    speed: Mapping[str, Any],
    reference: decoding.Decoded,
    reference_speed: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe the output of a job beside that of mode ar."""
    row: dict[str, Any] = {"mode": job.mode, "passes": job.passes or None, "batch": job.batch}
    row["tokens_per_forward"] = (at.target / out.forwards.double()).mean().item()
    row |= speed
    row["times_cached_ar"] = speed["tokens_per_second"] / reference_speed["tokens_per_second"]
    row["identical"] = (out.ids == reference.ids).all(dim=1).double().mean().item()
    row |= {"accuracy": accuracy(at, out.ids), "infill_accuracy": None}
    if fills_windows(job.decoding):
        filled = decode_all(at, decoder(at, job.decoding, suffix=True), job.batch)
        row["infill_accuracy"] = accuracy(at, filled.ids)
    return row | quality(at, out.ids)


def predecessor_decoders(at: Bench) -> dict[str, Decode]:
    """Name the decoders of the predecessor's protocol: greedy, AR without a cache first."""

    def uncached(rows: Tensor, _: int) -> decoding.Decoded:
        return decode_uncached(at.model, rows[:, : at.prefix], at.target)

    decoders = {"ar, no cache": uncached, "ar": decoder(at, decoding.MODES["ar"])}
    if at.model.mask_emb is not None:
        once, twice = (decoding.MODES["refine"]._replace(steps=n) for n in (1, 2))
        decoders |= {"1 pass": decoder(at, once), "2 passes": decoder(at, twice)}
        decoders["1 pass, infill"] = decoder(at, once, suffix=True)
    return decoders


def predecessor(at: Bench, bar: Any) -> list[dict[str, Any]]:
    """Measure in the predecessor's protocol: all examples at once, greedy, AR not cached.

    The speed of infill is compared with that of a continuation, not of infill by another mode.
    """
    found = list[dict[str, Any]]()
    decoders = predecessor_decoders(at)
    each = timed(at, [*decoders.values()], len(at.rows), bar)
    for name, (out, speed) in zip(decoders, each, strict=True):
        row = {"decoding": name, **speed, "accuracy": accuracy(at, out.ids)}
        found.append(row | {"published": PUBLISHED.get(name)})
    for row in found:
        for key, reference in zip(("times_uncached_ar", "times_cached_ar"), found, strict=False):
            row[key] = row["tokens_per_second"] / reference["tokens_per_second"]
        published = row["published"]
        row["published_times_uncached_ar"] = published and published / PUBLISHED["ar, no cache"]
    return found


def function_starts(stream: Tensor, tokenizer: Any, length: int) -> list[int]:
    """Find where a top-level `def` or `class` begins in a stream (n,).

    The places are at least `length` apart and from the end.
    """
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size())]
    newlines = torch.tensor([i for i, piece in enumerate(pieces) if piece == "\n"])
    starts, free = list[int](), 0
    for start in (torch.isin(stream, newlines).nonzero()[:, 0] + 1).tolist():
        if free <= start <= len(stream) - length:
            text = tokenizer.decode(stream[start : start + 8].tolist())
            if text.startswith(("def ", "class ")):
                starts.append(start)
                free = start + length
    return starts


def excerpts(loader: tg.TokenLoader, length: int, examples: int, tokenizer: Any) -> Tensor:
    """Take evenly spaced excerpts, (examples, length); UserError: they would overlap.

    With a tokenizer, the text is Python and excerpts begin with a top-level def or class.
    """
    starts, what = list(range(0, loader.total - length + 1, length)), "excerpts"
    if tokenizer is not None:
        stream = loader.rows(0, 1, min(loader.total, SCAN_TOKENS) - 1)[0]
        starts = function_starts(stream, tokenizer, length)
        what = "excerpts that begin with a top-level def or class"
    if len(starts) < examples:
        folder = loader.paths[0].parent
        held = f"the {loader.total:,} validation tokens of {folder} hold only {len(starts)}"
        remedy = f"of --prefix + --target + --suffix = {length} tokens; lower them, or prepare more"
        fail(f"--examples={examples}: {held} {what} {remedy}")
    chosen = [starts[i * len(starts) // examples] for i in range(examples)]
    return torch.cat([loader.rows(start, 1, length - 1) for start in chosen])


def check_judge(args: argparse.Namespace, artifact: Artifact, judge: Artifact) -> None:
    """Raise UserError if a judge has another tokenizer, or is the model it is to judge."""
    if judge.tokenizer_sha256 != artifact.tokenizer_sha256:
        rule = f"has another tokenizer than {args.artifact}; name a judge with the same"
        fail(f"--judge={args.judge} {rule}")
    if args.judge.read_bytes() == args.artifact.read_bytes():
        rule = "is the model to be judged; name one that was trained separately, or none"
        fail(f"--judge={args.judge} {rule}")


def check_length(artifact: Artifact, needed: int) -> None:
    """Raise UserError if a model was trained to read fewer tokens."""
    if needed > artifact.model.cfg.train_seq_len:
        read = f"was trained to read {artifact.model.cfg.train_seq_len} (TRAIN_SEQ_LEN)"
        rule = f"{artifact.path} {read}; shorten one of them"
        fail(f"--prefix, --target and --suffix take {needed} tokens; {rule}")


def load(args: argparse.Namespace, device: torch.device) -> tuple[Bench, str]:
    """Read artifacts and text, and say where it is from.

    Raises:
        UserError: one is missing or damaged, or does not fit the others.
    """
    artifact, judge = load_artifact(args.artifact, device), None
    stop, tokenizer = args.prefix + args.target, None
    if args.compile:  # the warm-up of each timing compiles
        decoding.compiled(artifact.model)
    check_length(artifact, stop + args.suffix)
    if args.judge is not None:
        judge = load_artifact(args.judge, device)
        check_judge(args, artifact, judge)
        check_length(judge, stop)
    cfg = text_config(artifact.model.cfg)
    if args.python or "TOKENIZER_PATH" in os.environ:
        counter = open_tokenizer(artifact, cfg.tokenizer_path)
        tokenizer = counter.tokenizer if args.python else None
    loader = open_validation(artifact, cfg)
    rows = excerpts(loader, stop + args.suffix, args.examples, tokenizer).to(device)
    shape = (args.prefix, args.target, args.repeats)
    return Bench(artifact.model, judge and judge.model, tokenizer, rows, *shape), cfg.data_path


LABELS = {"times_cached_ar": "speedup over cached AR", "times_uncached_ar": "over uncached AR"}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out what was measured, without columns that no row has a value for."""
    keys = [key for key in rows[0] if any(row.get(key) is not None for row in rows)]
    keys.remove("seconds")
    head = [LABELS.get(key, key.replace("_", " ")) for key in keys]
    return markdown(head, [[cell(row.get(key)) for key in keys] for row in rows])


def draw_batch(panel: Any, result: Mapping[str, Any], batch: int, key: str) -> None:
    """Draw the nats of one batch size against new tokens/s, a line per mode: a colour is a mode,
    hollow points are those with a head.
    """
    modes = dict.fromkeys(row["mode"] for row in result["rows"])
    plain = list(dict.fromkeys(mode.replace(WITH_HEAD, "") for mode in modes))
    for mode in modes:
        rows = [row for row in result["rows"] if (row["batch"], row["mode"]) == (batch, mode)]
        points = [(row["tokens_per_second"], row[key]["mean"]) for row in rows]
        colour = f"C{plain.index(mode.replace(WITH_HEAD, ''))}"
        style: dict[str, Any] = dict(color=colour, marker="o", label=mode)
        style |= dict(mfc="white", ls="--") if WITH_HEAD in mode else {}
        panel.plot(*zip(*points, strict=True), **style)
        for row, point in zip(rows, points, strict=True):
            place: dict[str, Any] = dict(textcoords="offset points", xytext=(4, 4), size=8)
            panel.annotate(str(row["passes"] or ""), point, **place)
    panel.axhline(result["text"][key]["mean"], color="0.5", ls="-.", label="the text")
    panel.set(title=f"batch {batch}", xlabel="new tokens/s", xscale="log")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw nats per token, a judge's or the model's own, against speed: a panel per batch size."""
    from matplotlib.figure import Figure

    key = "own_nats" if result["judge"] is None else "judge_nats"
    batches = list(dict.fromkeys(row["batch"] for row in result["rows"]))
    figure = Figure(figsize=(2 + 4.5 * len(batches), 4.5), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        draw_batch(panel, result, batch, key)
    whose = "the model's own" if key == "own_nats" else "of the judge"
    panels[0, 0].set_ylabel(f"nats per token, {whose}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    title = "Numbers at points: passes per window. Repetition has few nats, too: see the entropy."
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=150, format="png")


def notes_of(args: argparse.Namespace, at: Bench, modes: Sequence[str]) -> list[str]:
    """Say what is left out, and what is not comparable."""
    notes = list[str]()
    if left_out := [mode for mode in args.modes if mode not in modes]:
        why = f"{args.artifact} has no trained denoiser"
        notes.append(f"Left out, since {why}: {', '.join(left_out)}.")
    if at.judge is None:
        own = "only the model's own nats, which favour its own output"
        notes.append(f"No --judge: {own}.")
    if args.predecessor and (args.examples, args.prefix, args.target) != (32, 128, 64):
        protocol = "it decoded 64 tokens after 128, of 32 examples at once"
        notes.append(f"Not the predecessor's protocol: {protocol}.")
    return notes


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all modes of --modes; UserError: they cannot be measured."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    at, data_path = load(args, pick_device(args.device))
    modes = args.modes if at.model.mask_emb is not None else ["ar"]
    head = load_head(args.head, at.model, args.artifact) if args.head else None
    jobs, cuda = plan_jobs(modes, args, head), at.rows.is_cuda
    total = (len(jobs) + 5 * args.predecessor) * (1 + args.repeats)
    bar = tqdm(total=total, desc="decode", disable=None)
    with bar, autocast(at.rows.device):
        text = quality(at, at.rows[:, : args.prefix + args.target])
        rows = measure(at, jobs, bar)
        before = predecessor(at, bar) if args.predecessor else None
    options = vars(args).items()
    about = {name: str(value) if isinstance(value, Path) else value for name, value in options}
    about |= {"data_path": data_path, "recipe": at.model.cfg.recipe, "seed": at.model.cfg.seed}
    about |= {"threads": torch.get_num_threads(), "notes": notes_of(args, at, modes)}
    about |= {"device": torch.cuda.get_device_name() if cuda else "cpu"}
    about |= {"parameters": sum(p.numel() for p in at.model.parameters())}
    return about | {"text": text, "rows": rows, "predecessor": before}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write; UserError: it cannot be."""
    check_outputs(args)
    result = measure_all(args)
    write_result(args.out, result)
    print(table([*result["rows"], {"mode": "the text"} | result["text"]]))
    if result["predecessor"]:
        title = f"All {args.examples} examples at once, greedy"
        print(f"\n{title}:\n\n{table(result['predecessor'])}")
    print("", *result["notes"], sep="\n")
    if args.plot is not None:
        draw(result, args.plot)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
