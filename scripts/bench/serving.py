"""Measure the server: load, context, deadlines, span lengths, fallback and memory.

    DATA_PATH=data/stdlib python scripts/bench/serving.py final_model.int8.ptz --out serving.json
    DATA_PATH=data/stdlib python scripts/bench/serving.py final_model.int8.ptz --parts lengths \\
        --correction scripts/serving/hole_length.json

Parts: `load` sends the same requests from 1, 8, 32 and 200 clients, to a server that decodes many
rows at once and to one that decodes one at a time; `context` varies the length of the prompt;
`deadlines` counts those kept, and the passes that were taken; `lengths` fits the correction of span
lengths on half of some validation spans and counts how often the true length is found on the other
half; `fallback` counts continuations that the quality monitor redid; `memory` watches the server's
resident memory under load. Servers run in processes of their own, on loopback; clients share the
machine with them. Text comes from DATA_PATH and TOKENIZER_PATH, or from the artifact's settings.
The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_gpt as tg
from scripts.bench.text import open_validation
from scripts.chain import Head, find_head
from scripts.common import (
    ROOT,
    Artifact,
    Parser,
    check_outputs,
    counts,
    fail,
    load_artifact,
    names,
    need,
    open_tokenizer,
    run_command,
    table,
    text_config,
    write_result,
)
from scripts.decoding import MODES, Sampling
from scripts.serving import hole
from scripts.serving.engine import Engine, Limits
from scripts.serving.metrics import Metrics
from scripts.serving.rows import Row
from scripts.serving.text import Vocabulary

PARTS = ("load", "context", "deadlines", "lengths", "fallback", "memory")
TOKENS = 32  # decoded per request of the load test
DEADLINES_MS = (25, 50, 100, 200, 400, 800)
PRIOR_NATS = 3.0
PREFIX, SUFFIX = 96, 48  # tokens around a span of validation text
Rows = list[dict[str, Any]]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("artifact", type=Path, help="exported model with a denoiser")
    add("--parts", type=names, default=[*PARTS], help=f"some of {','.join(PARTS)}")
    add("--clients", type=counts, default=[1, 8, 32, 200], help="default 1,8,32,200")
    parser.whole("--slots", 16, "rows that are decoded at once")
    parser.real("--seconds", 8.0, "of load per number of clients", 0.1, 3600)
    parser.real("--memory-seconds", 30.0, "of load while memory is watched", 1, 3600)
    parser.whole("--spans", 40, "validation spans per length", low=2)
    add("--correction", type=Path, metavar="FILE", help="also write the fitted correction")
    parser.outputs()
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts={','.join(unknown)} is unknown; name some of {', '.join(PARTS)}")
    return args


def say(part: str) -> None:
    """Name on standard error what is measured now; all parts take a quarter of an hour."""
    print(part, file=sys.stderr, flush=True)


# ==============================================================================
# 1  LOAD -- clients over HTTP
# ==============================================================================
class Served(NamedTuple):
    """A server in a process of its own."""

    url: str
    pid: int

    def resident_mb(self) -> float:
        """Resident memory in MB (10^6 bytes)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 1e6


@contextlib.contextmanager
def served(args: argparse.Namespace, tokenizer: str, slots: int) -> Iterator[Served]:
    """Start a server, wait until it is ready, and end it by SIGTERM."""
    import httpx

    argv = [sys.executable, str(ROOT / "scripts/serve.py"), "--artifact", str(args.artifact)]
    argv += ["--tokenizer", tokenizer, "--port", "0", "--slots", str(slots), "--queue", "1000"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            fail("scripts/serve.py did not start; run it alone to see why")
        while httpx.get(f"{words[1]}/health", trust_env=False).status_code != 200:
            time.sleep(0.05)
        yield Served(words[1], process.pid)
    finally:
        process.terminate()
        process.communicate()


class Answer(NamedTuple):
    """One response, as a client sees it."""

    seconds: float
    status: int
    body: dict[str, Any]


def send(
    url: str, clients: int, seconds: float, make: Callable[[int], dict[str, Any]]
) -> tuple[list[Answer], float]:
    """Let clients send one request after the other for some seconds.

    Returns the answers, and the seconds until the last of them.
    """
    import httpx

    answers = list[Answer]()

    async def one(http: httpx.AsyncClient, client: int, end: float) -> None:
        number = client
        while time.perf_counter() < end:
            began = time.perf_counter()
            found = await http.post("/v1/completions", json=make(number))
            answers.append(Answer(time.perf_counter() - began, found.status_code, found.json()))
            number += clients

    async def crowd() -> float:
        limits = httpx.Limits(max_connections=None)
        options: dict[str, Any] = {"timeout": 300, "limits": limits, "trust_env": False}
        async with httpx.AsyncClient(base_url=url, **options) as http:
            began = time.perf_counter()
            end = began + seconds
            await asyncio.gather(*(one(http, client, end) for client in range(clients)))
            return time.perf_counter() - began

    return answers, asyncio.run(crowd())


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share does not exceed (nearest rank); 0 for none."""
    ranked = sorted(values)
    return ranked[max(math.ceil(share * len(ranked)) - 1, 0)] if ranked else 0.0


def requests_of(texts: Sequence[str]) -> Callable[[int], dict[str, Any]]:
    """Make requests: a third continues by ar, a third by block, a third fills 16 tokens in."""

    def make(number: int) -> dict[str, Any]:
        text = texts[number % len(texts)]
        half = len(text) // 2
        body: dict[str, Any] = {"prompt": text[:half], "max_tokens": TOKENS, "seed": number}
        if number % 3 == 0:
            return {**body, "mode": "ar"}
        if number % 3 == 1:
            return {**body, "mode": "block"}
        return {**body, "suffix": text[half + 40 :], "hole": 16, "steps": 4}

    return make


def measure_load(args: argparse.Namespace, tokenizer: str, texts: Sequence[str]) -> Rows:
    """Throughput and latency by the number of clients, batched and one at a time."""
    found = Rows()
    for slots in (args.slots, 1):
        with served(args, tokenizer, slots) as server:
            send(server.url, 4, 1.0, requests_of(texts))  # warms up
            for clients in args.clients:
                say(f"load, {slots} slots, {clients} clients")
                answers, seconds = send(server.url, clients, args.seconds, requests_of(texts))
                good = [each for each in answers if each.status == 200]
                tokens = sum(each.body["usage"]["completion_tokens"] for each in good)
                times = [1000 * each.seconds for each in good]
                row: dict[str, Any] = {"slots": slots, "clients": clients, "requests": len(good)}
                row |= {"refused": len(answers) - len(good), "tokens_per_s": tokens / seconds}
                row |= {"requests_per_s": len(good) / seconds, "p50_ms": percentile(times, 0.5)}
                found.append(row | {"p95_ms": percentile(times, 0.95)})
    return found


def measure_context(server: Served, text: Sequence[int], length: int) -> Rows:
    """Latency of one client by the tokens of its prompt, for 16 tokens by ar and by refine."""
    found = Rows()
    for tokens in (n for n in (16, 32, 64, 128, 192, 224, 448, 960) if n + 17 < length):
        for mode in ("ar", "refine"):

            def make(number: int, mode: str = mode, tokens: int = tokens) -> dict[str, Any]:
                # Each begins with another token, so that no prefix is known.
                prompt = [number % 200 + 20, *text[: tokens - 1]]
                body: dict[str, Any] = {"prompt": prompt, "max_tokens": 16, "mode": mode}
                return {**body, "guard": False, **({"steps": 4} if mode == "refine" else {})}

            answers = send(server.url, 1, 1.5, make)[0]
            timings = [each.body["choices"][0]["timings"] for each in answers]
            row = {"mode": mode, "prompt_tokens": tokens, "requests": len(answers)}
            for name in ("prompt_ms", "predicted_ms"):
                row[name] = statistics.median(each[name] for each in timings)
            found.append(row)
    return found


def measure_deadlines(server: Served, texts: Sequence[str], seconds: float) -> Rows:
    """Share of deadlines kept and the passes taken, by clients and deadline."""
    found = Rows()
    for clients in (1, 8, 32):
        for deadline in DEADLINES_MS:

            def make(number: int, deadline: int = deadline) -> dict[str, Any]:
                text = texts[number % len(texts)]
                half = len(text) // 2
                body: dict[str, Any] = {"prompt": text[:half], "suffix": text[half + 60 :]}
                body |= {"max_tokens": 32, "hole": 32, "guard": False}
                return {**body, "deadline_ms": deadline}

            answers = send(server.url, clients, seconds, make)[0]
            facts = [a.body["choices"][0]["decoding"] for a in answers if a.status == 200]
            kept = [each["deadline_kept"] for each in facts]
            passes = [each["passes"] for each in facts]
            row: dict[str, Any] = {"clients": clients, "deadline_ms": deadline}
            row |= {"requests": len(kept)}
            row |= {"kept": statistics.mean(kept) if kept else None}
            row |= {"passes": statistics.mean(passes) if passes else None}
            found.append(row)
    return found


def measure_memory(
    server: Served, texts: Sequence[str], seconds: float, clients: int
) -> dict[str, Any]:
    """Resident memory of the server over equal parts of a time of load."""
    sizes, num, failed = [server.resident_mb()], 0, 0
    for _ in range(5):
        answers = send(server.url, clients, seconds / 5, requests_of(texts))[0]
        sizes.append(server.resident_mb())
        num += len(answers)
        failed += sum(each.status != 200 for each in answers)
    facts = {"clients": clients, "seconds": seconds, "requests": num, "failed": failed}
    return {**facts, "resident_mb": [round(size, 1) for size in sizes]}


# ==============================================================================
# 2  TEXT -- span lengths and fallback, by an engine in this process
# ==============================================================================
class Bench(NamedTuple):
    """A model with its validation text."""

    artifact: Artifact
    head: Head | None  # that which the server would find
    vocabulary: Vocabulary
    tokens: list[int]
    tokenizer: str


def open_bench(args: argparse.Namespace) -> Bench:
    """Load the model and its text; UserError: one is missing or not the other's."""
    artifact = load_artifact(args.artifact, tg.CPU)
    if artifact.model.mask_emb is None:
        fail(f"{args.artifact} has no denoiser; name an artifact that was trained with one")
    cfg = text_config(artifact.model.cfg)
    loader = open_validation(artifact, cfg)
    counter = open_tokenizer(artifact, cfg.tokenizer_path)
    row = loader.rows(0, 1, min(loader.total, 400_000) - 1, tg.CPU)[0]
    head = find_head(None, artifact.model, args.artifact)
    return Bench(artifact, head, Vocabulary(counter.tokenizer), row.tolist(), cfg.tokenizer_path)


def decode_rows(bench: Bench, rows: Sequence[Row], slots: int) -> None:
    """Decode rows in this thread."""
    limits = Limits(slots, len(rows), 1e9)
    engine = Engine(bench.artifact.model, limits, Metrics(), head=bench.head)
    with engine.computing():
        engine.submit(rows)
        while not engine.idle:
            engine.tick()
    for row in rows:
        if row.error is not None:
            raise row.error


def spots(bench: Bench, count: int, size: int, seed: int) -> Iterator[int]:
    """Draw places of validation text where `size` tokens of one document stand."""
    keys = tg.split_key(torch.arange(100 * count), seed)
    places = (tg.random_uniform(keys, 1)[:, 0] * (len(bench.tokens) - size)).long().tolist()
    good = [p for p in places if bench.vocabulary.bos not in bench.tokens[p : p + size]]
    if len(good) < count:
        fail(f"the validation text has fewer than {count} places of {size} tokens; prepare more")
    yield from good[:count]


def length_rows(bench: Bench, count: int) -> list[tuple[int, list[Row]]]:
    """Make rows of all candidate lengths at validation spans, with the true length of each."""
    found = list[tuple[int, list[Row]]]()
    setting, bos = MODES["refine"], bench.vocabulary.bos
    for true in hole.LENGTHS:
        for place in spots(bench, count, PREFIX + true + SUFFIX, seed=true):
            middle = place + PREFIX
            prompt = [bos, *bench.tokens[place:middle]]
            suffix = bench.tokens[middle + true : middle + true + SUFFIX]
            options: dict[str, Any] = {"suffix": suffix, "rank": True, "guard": False}
            rows = [
                Row(bench.vocabulary, prompt, n, setting, lambda event: None, **options)
                for n in hole.LENGTHS
            ]
            found.append((true, rows))
    return found


def fit_correction(nats: torch.Tensor, true: torch.Tensor) -> dict[int, float]:
    """Fit nats to add by length: multinomial logistic regression on the exact scores.

    P(length n) is proportional to exp(-a (nats_n + c_n)), with one scale a. The offsets c_n are
    drawn to the values at which all lengths score alike on average, with a standard deviation of
    `PRIOR_NATS`: where scores tell little of the length, nothing else would hold them.

    Args:
        nats: (N, lengths) float64, of span and suffix.
        true: (N,) int64, index of the true length.
    """
    centre = -nats.mean(0)
    scale = torch.tensor(-2.0, dtype=torch.double, requires_grad=True)  # log a
    offsets = centre.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([scale, offsets], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = -scale.exp() * (nats + offsets)
        value = torch.nn.functional.cross_entropy(logits, true, reduction="sum")
        value = value + ((offsets - centre) / PRIOR_NATS).square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = (offsets - offsets[0]).tolist()
    return dict(zip(hole.LENGTHS, found, strict=True))


def measure_lengths(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Fit the correction on every second span; count how often the others' length is found."""
    examples = length_rows(bench, args.spans)
    decode_rows(bench, [row for _, rows in examples for row in rows], args.slots)
    nats = torch.tensor([[r.suffix_nats - sum(r.log_p) for r in rows] for _, rows in examples])
    true = torch.tensor([hole.LENGTHS.index(length) for length, _ in examples])
    fitted = fit_correction(nats[::2].double(), true[::2])
    rules: dict[str, dict[int, float]] = {"fitted": fitted, "none": {}}
    shares = dict[str, Any]()
    for name, correction in rules.items():
        chosen = [hole.choose(hole.LENGTHS, row, correction) for row in nats[1::2].tolist()]
        errors = [abs(a - b) for a, b in zip(chosen, true[1::2].tolist(), strict=True)]
        shares[f"found_{name}"] = statistics.mean(error == 0 for error in errors)
        shares[f"within_factor_2_{name}"] = statistics.mean(error <= 1 for error in errors)
    hits = [hole.choose(hole.LENGTHS, row, fitted) for row in nats[1::2].tolist()]
    pairs = list(zip(true[1::2].tolist(), hits, strict=True))
    by_length = {
        str(n): statistics.mean(hit == i for label, hit in pairs if label == i)
        for i, n in enumerate(hole.LENGTHS)
    }
    result = {"spans": len(pairs), "chance": 1 / len(hole.LENGTHS), **shares}
    result |= {"found_by_length": by_length}
    result["correction_nats"] = {str(n): round(x, 3) for n, x in fitted.items()}
    if args.correction is not None:
        about = {key: result[key] for key in ("correction_nats", "spans", "found_fitted")}
        tg.atomic_write(args.correction, f"{json.dumps(about)}\n".encode(), "correction")
    return result


def measure_fallback(args: argparse.Namespace, bench: Bench) -> Rows:
    """Share of spans of 32 tokens that the monitor redid, and of those poor after it."""
    found, bos = Rows(), bench.vocabulary.bos
    sampled = Sampling(temperature=0.8, top_p=0.95, seed=1)
    cases = [("refine", False), ("block", False), ("threshold", False), ("refine", True)]
    for mode, has_suffix in cases:
        for sampling in (Sampling(), sampled):
            rows = list[Row]()
            for i, place in enumerate(spots(bench, 2 * args.spans, PREFIX + 32 + SUFFIX, 77)):
                middle = place + PREFIX
                suffix = bench.tokens[middle + 32 : middle + 32 + SUFFIX] if has_suffix else []
                prompt = [bos, *bench.tokens[place:middle]]
                setting = MODES[mode]._replace(sampling=sampling)
                options: dict[str, Any] = {"suffix": suffix, "index": i}
                rows.append(
                    Row(bench.vocabulary, prompt, 32, setting, lambda event: None, **options)
                )
            decode_rows(bench, rows, args.slots)
            row = {"mode": mode, "suffix": has_suffix, "temperature": sampling.temperature}
            row |= {"spans": len(rows), "redone": statistics.mean(bool(r.fell_back) for r in rows)}
            found.append(row | {"poor_after": statistics.mean(r.poor for r in rows)})
    return found


# ==============================================================================
# 3  ALL
# ==============================================================================
def texts_of(bench: Bench, count: int, size: int) -> list[str]:
    """Take pieces of validation text of `size` tokens."""
    return [
        bench.vocabulary.decode(bench.tokens[place : place + size])
        for place in spots(bench, count, size, seed=5)
    ]


def measure_served(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Measure the parts that need a server of its own."""
    result, length = dict[str, Any](), bench.artifact.model.cfg.train_seq_len
    texts = texts_of(bench, 300, min(120, length // 2))
    if "load" in args.parts:
        result["load"] = measure_load(args, bench.tokenizer, texts)
    wanted = {"context", "deadlines", "memory"} & {*args.parts}
    if not wanted:
        return result
    with served(args, bench.tokenizer, args.slots) as server:
        send(server.url, 4, 1.0, requests_of(texts))
        if "context" in wanted:
            say("context")
            result["context"] = measure_context(server, bench.tokens[1:length], length)
        if "deadlines" in wanted:
            say("deadlines")
            result["deadlines"] = measure_deadlines(server, texts, args.seconds / 3)
        if "memory" in wanted:
            clients = max(args.clients)
            say(f"memory, {clients} clients for {args.memory_seconds:g} s")
            result["memory"] = measure_memory(server, texts, args.memory_seconds, clients)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the parts as tables."""
    for name, value in result.items():
        if isinstance(value, list):
            print(f"{name}\n\n{table(value)}\n")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts."""
    need("httpx", "scripts/bench/serving.py")
    check_outputs(args)
    bench = open_bench(args)
    cfg, threads = bench.artifact.model.cfg, torch.get_num_threads()
    result: dict[str, Any] = {
        "artifact": {
            "parameters": sum(p.numel() for p in bench.artifact.model.parameters()),
            "train_seq_len": cfg.train_seq_len,
            "program_sha256": bench.artifact.program_sha256,
            "data_sha256": bench.artifact.data_sha256,
        },
        "machine": {"name": tg.machine_name(tg.CPU), "threads": threads},
        "settings": {"slots": args.slots, "tokens": TOKENS, "seconds": args.seconds},
    }
    if "lengths" in args.parts:
        say("lengths")
        result["lengths"] = measure_lengths(args, bench)
    if "fallback" in args.parts:
        say("fallback")
        result["fallback"] = measure_fallback(args, bench)
    result |= measure_served(args, bench)
    show(result)
    write_result(args.out, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
