"""Time every score of a run, and say how long they would take together over a whole split.

    python scripts/bench/evaluation.py
    python scripts/bench/evaluation.py --size NELBO_SAMPLES=4 --size NELBO_SAMPLES=16
    PRESET=8xh100 python scripts/bench/evaluation.py --devices 8     on one device, projected to 8

Settings come from the environment as for train_gpt.py; --size sets more, once for every case.
Weights and text are random: speed depends on neither, and nothing needs to be prepared. What is
timed is what a run does: the exact score, val_bpb_sliding (EVAL_STRIDE), the bounds (NELBO_WINDOWS,
NELBO_SAMPLES), each on a split of --rows rows, and parallel_eval as a whole. Cases take turns;
medians over rounds are shown. A device gets its share of VAL_BATCH_SIZE, as in a run on --devices.
"whole" is the time for --tokens on --devices, shared evenly (NELBO_SEQUENCES counts); the exact
score is taken twice in a run, before export and of the artifact; parallel_eval runs on one device
only. The table is Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import train_gpt as tg
from scripts.bench.train import overrides, random_text
from scripts.common import Parser, check_outputs, fail, run_command, table, write_result

FINEWEB = 62_021_632  # scored tokens of the challenge's validation split
PARALLEL = "parallel_eval"


class OneByte:
    """In place of a byte counter: random text has no tokenizer, and counting is a look-up of the
    same cost.
    """

    def count(self, _prev: Tensor, target: Tensor) -> Tensor:
        """Say that every token is one byte, any shape."""
        return torch.ones_like(target)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    size = "settings of a case; may be repeated"
    parser.add_argument("--size", action="append", metavar="NAME=VALUE ...", help=size)
    rows = "of T tokens in the timed split (default: two batches, at least 32)"
    parser.whole("--rows", None, rows)
    parser.whole("--rounds", 3, "turns")
    parser.whole("--tokens", FINEWEB, "of the whole split, FineWeb's")
    parser.whole("--devices", 1, "that share the whole split")
    parser.outputs()
    return parser.parse_args(argv)


@dataclasses.dataclass
class Job:
    """One score of one case."""

    case: str
    name: str
    tokens: int  # that are scored when it is timed
    whole: float  # times that work for the whole split, on one device's share
    run: Callable[[], Any]
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_mib: int = 0  # of the device, where it keeps count


def jobs(
    case: str, cfg: tg.Config, run: tg.Run, rows: int | None, tokens: int, devices: int
) -> list[Job]:
    """List the scores of a run with these settings, on `rows` rows of random text (None: two
    batches of a device).
    """
    cfg = dataclasses.replace(cfg, val_batch_size=max(cfg.val_batch_size // devices, 1))
    run, T = dataclasses.replace(run, cfg=cfg), cfg.train_seq_len
    folder = Path(cfg.data_path)
    folder.mkdir(parents=True, exist_ok=True)
    random_text(folder, cfg, (rows or max(2 * cfg.val_batch_size // T, 32)) * T + 1)
    model, val = tg.GPT(cfg).to(run.device).eval(), tg.TokenLoader(cfg, "val")

    everything = dataclasses.replace(run, cfg=dataclasses.replace(cfg, nelbo_sequences=0))
    counter: Any = OneByte()
    fast = tg.compile_passes(model, run)  # as a run scores

    def exact(stride: int = 0) -> Callable[[], Any]:
        return lambda: tg.evaluate_exact(fast, everything, val, counter, stride)

    def bound(size: int) -> Callable[[], Any]:
        return lambda: tg.evaluate_bound(fast, everything, val, counter, size)

    scored = (val.total - 1) // T * T
    share = tokens / devices / scored
    found = [Job(case, "exact", scored, 2 * share, exact())]
    if cfg.eval_stride:
        step = min(cfg.eval_stride, T)
        count = (val.total - 1 - T) // step * step + T
        sliding = exact(cfg.eval_stride)
        found.append(Job(case, "sliding", count, tokens / devices / count, sliding))
    for size, _ in cfg.sizes(cfg.nelbo_windows) if cfg.diffusion else []:
        part = min(cfg.nelbo_sequences * T or tokens, tokens)  # what a run scores
        found.append(Job(case, f"bound {size}", scored, part / devices / scored, bound(size)))
    if cfg.parallel_eval_examples:
        found.append(Job(case, PARALLEL, 0, 1.0, lambda: tg.evaluate_parallel(model, run, val)))
    return found


def time_job(job: Job, run: tg.Run) -> None:
    """Time one turn of a job."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = run.clock()
    job.run()
    job.seconds.append(run.clock() - began)
    if run.device.type == "cuda":
        job.peak_mib = max(job.peak_mib, torch.cuda.max_memory_allocated() // 2**20)


@contextlib.contextmanager
def prepared(args: argparse.Namespace) -> Iterator[tuple[list[Job], tg.Run]]:
    """Yield the jobs of all cases and the run they share; UserError: a setting is wrong, before
    anything is timed.
    """
    with tempfile.TemporaryDirectory() as name:
        configs = []
        for i, size in enumerate(args.size or [""]):
            env = {
                **os.environ,
                **overrides(size),
                "DATA_PATH": f"{name}/{i}",
                "OUT_DIR": name,
                "RUN_ID": "bench",
            }
            configs.append((size or "-", tg.Config.from_env(env)[0]))
        with tg.Run.start(configs[0][1]) as run:
            run.log.active = False
            yield (
                [
                    job
                    for case in configs
                    for job in jobs(*case, run, args.rows, args.tokens, args.devices)
                ],
                run,
            )


def take_turns(todo: Sequence[Job], run: tg.Run, rounds: int) -> int:
    """Time all jobs in turns, the first of which warms up, and return how many whole ones count;
    fewer after Ctrl-C. UserError: it came before the first.
    """
    try:
        with tqdm(total=(rounds + 1) * len(todo), disable=None) as bar:
            for _ in range(rounds + 1):
                for job in todo:
                    bar.set_postfix_str(f"{job.name} {job.case}")
                    time_job(job, run)
                    bar.update()
    except KeyboardInterrupt:
        whole = min(len(job.seconds) for job in todo) - 1
        if whole < 1:
            fail("stopped before a turn that counts was over: nothing is known; start again")
        print(
            f"stopped: --rounds={rounds}, {whole} of them whole; they are what follows",
            file=sys.stderr,
        )
        return whole
    return rounds


def row_of(job: Job, rounds: int) -> dict[str, Any]:
    """Return the table row of a job: medians over whole rounds, without the first, a warm-up."""
    seconds = statistics.median(job.seconds[1 : rounds + 1])
    return {
        "size": job.case,
        "score": job.name,
        "tokens": job.tokens,
        "seconds": seconds,
        "tok_per_sec": job.tokens / seconds if job.tokens else None,
        "peak_mib": job.peak_mib or None,
        "whole_seconds": seconds * job.whole,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all cases in turns and sum up."""
    check_outputs(args)
    with prepared(args) as (todo, run):
        rounds, device = take_turns(todo, run, args.rounds), str(run.device)
    rows = [row_of(job, rounds) for job in todo]
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["size"]] = totals.get(row["size"], 0.0) + row["whole_seconds"]
    found = {"device": device, "devices": args.devices, "tokens": args.tokens, "rounds": rounds}
    found |= {"whole_seconds": totals, "rows": rows}
    write_result(args.out, found)
    print(table(rows, 2) + "\n")
    for case, seconds in totals.items():
        where = f"{args.tokens:,} tokens on {args.devices} x {device}"
        print(f"{case}: all scores of {where}: {seconds:,.0f} s\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
