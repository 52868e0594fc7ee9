"""Measure every decoding mode of an artifact: speed against cached AR of the same weights, and
quality beside it.

    DATA_PATH=data/stdlib python scripts/bench/decode.py final_model.int8.ptz --judge other_ar.ptz --python
    python scripts/bench/decode.py final_model.int8.ptz --modes speculative,refine --passes 1,8 --predecessor

Prompts are excerpts of the validation data (DATA_PATH; else that of the artifact). Seconds hold the
pass over the prompt in every row, AR's too, and only decoded tokens count; median of --repeats runs
after a warm-up. The last line of the output is one JSON object.

passes              of one window; `block` and `remask` take several windows
tokens per forward  mean over examples of decoded tokens by passes, not counting the one over the prompt
times cached ar     speed by that of AR with a cache: same weights, same batch, same run
identical           share of examples in which every token equals AR's
right, right infill share of tokens equal to the text, in a continuation and in a hole whose suffix
the window reads
judge, own nats     a token of what was decoded, under a model trained apart and under this one. Repetition is likely to
                    both, so the entropy of all decoded tokens and distinct-2 (mean over examples)
                    stand beside them
python              (--python) share of outputs, prompt included, that ast.parse accepts; prompts begin with a top-level
                    `def` or `class`. A last line that is not complete is dropped, then each last
                    line that only lacks what would come next (an open bracket or string, a block
                    without a body). Something decoded besides blanks must be left; one line is
                    enough, so see the entropy too. The true text is cut likewise
"""

from __future__ import annotations

import argparse
import ast
import codeop
import contextlib
import dataclasses
import difflib
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import train_gpt as tg
from scripts import policy
from scripts.bench import infill as shared
from scripts.bench.infill import fail

SCORED_AT_ONCE, SCAN_TOKENS = 32, 1 << 22  # rows; validation tokens searched for functions
BAD_SOURCE = (
    SyntaxError,
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,
)  # what parsing a text may raise
# Tokens/s of the "Mercury in Retrograde" submission on one H100.
PUBLISHED = {"ar, no cache": 1519, "1 pass": 33315, "2 passes": 52424, "1 pass, infill": 147729}
Decode = Callable[[Tensor, int], tg.Decoded]  # of excerpts (B, L) and a seed


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; UserError: an option is wrong in itself or does not go with another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail  # type: ignore[method-assign]  # report a wrong command line as any other mistake
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--judge", type=Path, metavar="ARTIFACT", help="another model of the same tokenizer"
    )
    parser.add_argument(
        "--modes", default=",".join(policy.MODES), help="default all; ar is always measured"
    )
    parser.add_argument(
        "--passes", type=shared.counts, default="1,2,4,8,12,20,30", help="default %(default)s"
    )
    parser.add_argument(
        "--batch", type=shared.counts, default="1,32", help="examples at once (default %(default)s)"
    )
    parser.add_argument("--examples", type=int, default=32, help="default %(default)s")
    parser.add_argument(
        "--prefix", type=int, default=128, help="tokens of a prompt (default %(default)s)"
    )
    parser.add_argument(
        "--target", type=int, default=64, help="tokens to decode (default %(default)s)"
    )
    parser.add_argument(
        "--suffix", type=int, default=64, help="tokens after a hole (default %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs (default %(default)s)")
    parser.add_argument(
        "--predecessor", action="store_true", help="add rows in the predecessor's protocol"
    )
    parser.add_argument(
        "--python", action="store_true", help="the text is Python: count outputs that parse"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile what a pass computes (torch.compile)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="of the CPU; 0: PyTorch's choice (default)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw quality against speed")
    args = parser.parse_args(argv)
    for name, low in dict(examples=2, prefix=1, target=1, suffix=1, repeats=1, threads=0).items():
        if not low <= getattr(args, name) < 2**31:
            fail(f"--{name}={getattr(args, name)} must lie in {low}..{2**31 - 1}")
    if not 0 <= args.temperature < math.inf:
        fail(f"--temperature={args.temperature} must be 0 or a positive number")
    if odd := [size for size in args.batch if args.examples % size]:
        fail(
            f"--examples={args.examples} must be a multiple of --batch={odd[0]}, so that all "
            "batches are alike"
        )
    for name in args.modes.split(","):
        if name not in policy.MODES:
            near = ", ".join(difflib.get_close_matches(name, policy.MODES, cutoff=0.4)) or "none"
            fail(
                f"--modes: no mode is called {name!r}; closest: {near}; all: "
                f"{', '.join(policy.MODES)}"
            )
    args.modes = list(dict.fromkeys(["ar", *args.modes.split(",")]))
    return args


class Job(NamedTuple):
    mode: str
    passes: int  # a window; 0: the mode has none, or takes as many as it needs
    batch: int
    how: tg.Decoding


class Bench(NamedTuple):
    """What all lines share."""

    model: tg.GPT
    judge: tg.GPT | None
    tokenizer: Any  # SentencePiece; None unless outputs are to be parsed
    # (N, prefix + target + suffix) int64: prompts, their true continuation, and what follows it.
    rows: Tensor
    prefix: int
    target: int
    repeats: int

    def text(self, ids: Tensor) -> Tensor:
        """The part between prefix and suffix of ids (N, L), (N, target)."""
        return ids[:, self.prefix : self.prefix + self.target]

    def clock(self) -> float:
        """Seconds, once the device has done all it was asked."""
        if self.rows.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def reads_suffix(how: tg.Decoding) -> bool:
    """Do windows fill the span, so that the last one reads what follows it?"""
    return how.window > 0 and not how.verify


def plan_jobs(modes: Sequence[str], args: argparse.Namespace) -> list[Job]:
    """List every mode x passes x batch, the first mode first in each batch; no window has more
    passes than tokens.
    """
    jobs = []
    for batch in args.batch:
        for mode in modes:
            how = policy.MODES[mode]._replace(temperature=args.temperature)
            stepped = reads_suffix(how) and how.threshold == math.inf
            steps = (
                sorted({min(n, how.window, args.target) for n in args.passes}) if stepped else [0]
            )
            jobs += [Job(mode, n, batch, how._replace(steps=n or how.steps)) for n in steps]
    return jobs


def decoder(at: Bench, how: tg.Decoding, suffix: bool = False) -> Decode:
    """Continue prompts, or with the suffix fill the hole before it."""
    before = slice(at.prefix)
    after = slice(at.prefix + at.target, None if suffix else at.prefix + at.target)
    return lambda rows, seed: tg.infill(
        at.model, rows[:, before], rows[:, after], at.target, how._replace(seed=seed)
    )


@torch.no_grad()
def uncached(model: tg.GPT, prompt: Tensor, count: int, how: tg.Decoding) -> tg.Decoded:
    """Continue prompts (B, P) by `count` tokens, the same as `generate` with AR, but read all again
    for each token.
    """
    ids = prompt
    keys = tg.derive(torch.arange(len(prompt), device=prompt.device)[:, None], how.seed)
    for place in range(prompt.shape[1], prompt.shape[1] + count):
        token, _ = tg.pick(model.clean(ids)[0][:, -1:], how, tg.derive(keys, place))
        ids = torch.cat((ids, token), dim=1)
    return tg.Decoded(ids, torch.full_like(ids[:, :1], count))


def decode_all(at: Bench, decode: Decode, batch: int) -> tg.Decoded:
    """Decode all excerpts, `batch` at a time, each batch with a seed of its own."""
    parts = [decode(at.rows[i : i + batch], i) for i in range(0, len(at.rows), batch)]
    return tg.Decoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def timed(at: Bench, decode: Decode, batch: int) -> tuple[tg.Decoded, dict[str, Any]]:
    """Decode all excerpts once, then again under the clock; return the output, (N, L), and the
    speed.
    """
    found, seconds = decode_all(at, decode, batch), list[float]()
    for _ in range(at.repeats):
        began = at.clock()
        decode_all(at, decode, batch)
        seconds.append(at.clock() - began)
    return found, {
        "tokens_per_second": at.text(found.ids).numel() / statistics.median(seconds),
        "seconds": seconds,
    }


def nats(model: tg.GPT | None, ids: Tensor, prefix: int) -> dict[str, float] | None:
    """Estimate the exact nats of a token after the prefix of ids (N, L)."""
    if model is None:
        return None
    parts = [
        tg.score(model, part)[:, prefix - 1 :].double() for part in torch.split(ids, SCORED_AT_ONCE)
    ]
    return shared.estimate(torch.cat(parts).mean(-1))


def right(at: Bench, ids: Tensor) -> float:
    """Share of decoded tokens of ids (N, L) that equal the text."""
    return (at.text(ids) == at.text(at.rows)).double().mean().item()


def parses(text: str, prompt: str) -> bool:
    """Is what can be judged of a Python text right, and does it reach beyond the prompt? The rule
    stands at the top.
    """
    lines = text.split("\n")[:-1]
    with warnings.catch_warnings(), contextlib.suppress(*BAD_SOURCE):
        warnings.simplefilter("ignore")  # "\d" is bad style, not bad syntax
        while len((source := "\n".join(lines)).rstrip()) > len(prompt.rstrip()):
            with contextlib.suppress(*BAD_SOURCE):
                ast.parse(source + "\n")
                return True
            codeop.compile_command(
                source + "\n", symbol="exec"
            )  # raises unless only its end is missing
            lines.pop()
    return False


def quality(at: Bench, ids: Tensor) -> dict[str, Any]:
    """Judge continuations, (N, prefix + target)."""
    new, python = at.text(ids), None
    judged, own = (nats(model, ids, at.prefix) for model in (at.judge, at.model))
    entropy, pairs = shared.unigram_entropy(new) / math.log(2), shared.distinct_2(new)
    if at.tokenizer is not None:
        texts = [
            [at.tokenizer.decode(row[:end]) for end in (at.prefix, None)] for row in ids.tolist()
        ]
        python = sum(parses(text, prompt) for prompt, text in texts) / len(texts)
    return {
        "judge_nats": judged,
        "own_nats": own,
        "entropy_bits": entropy,
        "distinct_2": pairs,
        "python": python,
    }


def measure(at: Bench, jobs: Sequence[Job], bar: Any) -> list[dict[str, Any]]:
    """Measure every job; the first of a batch, ar, is its reference."""
    found, references = list[dict[str, Any]](), dict[int, tuple[float, Tensor]]()
    for job in jobs:
        out, speed = timed(at, decoder(at, job.how), job.batch)
        reference, ids = references.setdefault(job.batch, (speed["tokens_per_second"], out.ids))
        row: dict[str, Any] = {"mode": job.mode, "passes": job.passes or None, "batch": job.batch}
        row |= {"tokens_per_forward": (at.target / out.forwards.double()).mean().item(), **speed}
        row["times_cached_ar"] = speed["tokens_per_second"] / reference
        row |= {
            "identical": (out.ids == ids).all(dim=1).double().mean().item(),
            "right": right(at, out.ids),
        }
        filled = (
            decode_all(at, decoder(at, job.how, suffix=True), job.batch)
            if reads_suffix(job.how)
            else None
        )
        found.append(
            row | {"right_infill": filled and right(at, filled.ids)} | quality(at, out.ids)
        )
        bar.update()
    return found


def predecessor(at: Bench, bar: Any) -> list[dict[str, Any]]:
    """Measure as the predecessor did: all examples at once, greedy, a hole against a continuation,
    AR not cached.
    """
    decoders: dict[str, Decode] = {
        "ar, no cache": lambda rows, _: uncached(at.model, rows[:, : at.prefix], at.target, tg.AR),
        "ar": decoder(at, tg.AR),
    }
    if at.model.mask_emb is not None:
        once, twice = (policy.MODES["refine"]._replace(steps=n) for n in (1, 2))
        decoders |= {"1 pass": decoder(at, once), "2 passes": decoder(at, twice)}
        decoders["1 pass, infill"] = decoder(at, once, suffix=True)
    found = list[dict[str, Any]]()
    for name, decode in decoders.items():
        out, speed = timed(at, decode, len(at.rows))
        found.append(
            {
                "decoding": name,
                **speed,
                "right": right(at, out.ids),
                "published": PUBLISHED.get(name),
            }
        )
        bar.update()
    for row in found:
        for key, reference in zip(("times_uncached_ar", "times_cached_ar"), found, strict=False):
            row[key] = row["tokens_per_second"] / reference["tokens_per_second"]
        row["published_times_uncached_ar"] = (
            row["published"] and row["published"] / PUBLISHED["ar, no cache"]
        )
    return found


def function_starts(stream: Tensor, tokenizer: Any, length: int) -> list[int]:
    """Find where a top-level `def` or `class` begins in a stream (n,), at least `length` apart and
    from the end.
    """
    newlines = torch.tensor(
        [i for i in range(tokenizer.vocab_size()) if tokenizer.decode([i]) == "\n"]
    )
    starts, free = list[int](), 0
    for start in (torch.isin(stream, newlines).nonzero()[:, 0] + 1).tolist():
        fits = free <= start <= len(stream) - length
        if fits and tokenizer.decode(stream[start : start + 8].tolist()).startswith(
            ("def ", "class ")
        ):
            starts, free = [*starts, start], start + length
    return starts


def excerpts(cfg: tg.Config, length: int, examples: int, tokenizer: Any) -> Tensor:
    """Take evenly spaced excerpts, (examples, length), with a tokenizer of Python; UserError: they
    would overlap.
    """
    loader = tg.TokenLoader(cfg, "val")
    starts, what = list(range(0, loader.total - length + 1, length)), "excerpts"
    if tokenizer is not None:
        starts = function_starts(
            loader.rows(0, 1, min(loader.total, SCAN_TOKENS) - 1)[0], tokenizer, length
        )
        what = "excerpts that begin with a top-level def or class"
    if len(starts) < examples:
        held = (
            f"{len(starts)} {what} of --prefix + --target + --suffix = {length} tokens; ask for "
            "less, or prepare more"
        )
        fail(
            f"--examples={examples}: the {loader.total:,} validation tokens of {cfg.data_path} "
            f"hold only {held}"
        )
    chosen = [starts[i * len(starts) // examples] for i in range(examples)]
    return torch.cat([loader.rows(start, 1, length - 1) for start in chosen])


def load(args: argparse.Namespace, device: torch.device) -> tuple[Bench, str]:
    """Read artifacts and text, and say where it is from; UserError: missing, damaged, or does not
    fit the others.
    """
    (model, sha256) = tg.load_artifact(args.artifact, device)
    judge = None
    stop = args.prefix + args.target
    if args.compile:  # the warm-up of every timing compiles what is new
        policy.compiled(model)
    if args.judge is not None:
        judge, other = tg.load_artifact(args.judge, device)
        if other != sha256:
            fail(
                f"--judge={args.judge} has another tokenizer than {args.artifact}; name a judge "
                "with the same"
            )
        if args.judge.read_bytes() == args.artifact.read_bytes():
            fail(
                f"--judge={args.judge} is the model to be judged; name one that was trained apart, "
                "or none"
            )
    for path, reader, need in (
        (args.artifact, model, stop + args.suffix),
        (args.judge, judge, stop),
    ):
        if reader is not None and need > reader.cfg.train_seq_len:
            read = f"{path} was trained to read {reader.cfg.train_seq_len} (TRAIN_SEQ_LEN)"
            fail(f"--prefix, --target and --suffix take {need} tokens; {read}; shorten one of them")
    paths = {
        name: os.environ.get(name.upper(), getattr(model.cfg, name))
        for name in ("data_path", "tokenizer_path")
    }
    cfg, tokenizer = dataclasses.replace(model.cfg, **paths), None
    if args.python or "TOKENIZER_PATH" in os.environ:
        counter = tg.ByteCounter(cfg)
        if counter.sha256 != sha256:
            fail(
                f"TOKENIZER_PATH={cfg.tokenizer_path!r} is not the tokenizer {args.artifact} was "
                "trained with"
            )
        tokenizer = counter.tokenizer if args.python else None
    rows = excerpts(cfg, stop + args.suffix, args.examples, tokenizer).to(device)
    return Bench(
        model, judge, tokenizer, rows, args.prefix, args.target, args.repeats
    ), cfg.data_path


def cell(value: Any) -> str:
    """Write a name, a count, a number or an estimate; a dash for what was not measured."""
    if isinstance(value, dict):
        return f"{value['mean']:.3f} ± {value['se']:.3f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out what was measured, in the order of the first row, without columns that no row has a
    value for.
    """
    keys = [
        key for key in rows[0] if key != "seconds" and any(row.get(key) is not None for row in rows)
    ]
    return shared.markdown(
        [key.replace("_", " ") for key in keys], [[cell(row.get(k)) for k in keys] for row in rows]
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw nats a token, a judge's or the model's own, against new tokens/s: a panel a batch, a
    line a mode.
    """
    from matplotlib.figure import Figure

    key = "own_nats" if result["judge"] is None else "judge_nats"
    batches, modes = (
        list(dict.fromkeys(row[name] for row in result["rows"])) for name in ("batch", "mode")
    )
    figure = Figure(figsize=(1 + 5 * len(batches), 5), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        for mode in modes:
            rows = [row for row in result["rows"] if (row["batch"], row["mode"]) == (batch, mode)]
            points = [(row["tokens_per_second"], row[key]["mean"]) for row in rows]
            panel.plot(*zip(*points, strict=True), "o-", label=mode)
            for row, point in zip(rows, points, strict=True):
                panel.annotate(
                    str(row["passes"] or ""),
                    point,
                    textcoords="offset points",
                    xytext=(4, 4),
                    size=8,
                )
        panel.axhline(result["text"][key]["mean"], color="0.5", ls="-.", label="the text")
        panel.set(title=f"batch {batch}", xlabel="new tokens/s", xscale="log")
    panels[0, 0].set_ylabel(
        "nats a token, " + ("the model's own" if key == "own_nats" else "of the judge")
    )
    panels[0, 0].legend()
    figure.suptitle(
        "Numbers at points: passes a window. Repetition has few nats too: see the entropy.", size=10
    )
    figure.savefig(path, dpi=150, format="png")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all that was asked for; UserError: it cannot be measured."""
    shared.check_outputs(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    at, data_path = load(args, shared.pick_device(args.device))
    modes, notes = args.modes if at.model.mask_emb is not None else ["ar"], list[str]()
    if left_out := args.modes[len(modes) :]:
        notes.append(
            f"Left out, since {args.artifact} has no trained denoiser: {', '.join(left_out)}."
        )
    if at.judge is None:
        notes.append(
            "No --judge: only the model's own nats, which favour what it would say anyway."
        )
    if args.predecessor and (args.examples, args.prefix, args.target) != (32, 128, 64):
        notes.append(
            "Not the predecessor's protocol: it decoded 64 tokens after 128, of 32 examples at "
            "once."
        )
    jobs = plan_jobs(modes, args)
    cuda = at.rows.is_cuda
    bar = tqdm(total=len(jobs) + 5 * args.predecessor, desc="decode", disable=None)
    with (
        bar,
        torch.autocast(at.rows.device.type, torch.bfloat16, enabled=cuda),
    ):  # as training's evaluation does
        found = {
            "text": quality(at, at.rows[:, : args.prefix + args.target]),
            "rows": measure(at, jobs, bar),
        }
        before = predecessor(at, bar) if args.predecessor else None
    about = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    about |= {
        "data_path": data_path,
        "recipe": at.model.cfg.recipe,
        "threads": torch.get_num_threads(),
    }
    about |= {"device": torch.cuda.get_device_name() if cuda else "cpu", "notes": notes}
    return about | {
        "parameters": sum(p.numel() for p in at.model.parameters()),
        **found,
        "predecessor": before,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error the user can repair."""
    try:
        args = parse_args(argv)
        result = run(args)
        line = shared.to_json(result)
        print(table([*result["rows"], {"mode": "the text"} | result["text"]]))
        if result["predecessor"]:
            print(
                f"\nAll {args.examples} examples at once, greedy:\n\n{table(result['predecessor'])}"
            )
        print("", *result["notes"], line, sep="\n", flush=True)
        if args.out is not None:
            args.out.write_text(line + "\n", encoding="utf-8")
        if args.plot is not None:
            draw(result, args.plot)
    except (tg.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
