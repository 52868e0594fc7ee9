"""Time every score of a run, and say how long they would take together over a whole split.

    python scripts/bench/evaluation.py
    python scripts/bench/evaluation.py --size NELBO_SAMPLES=4 --size NELBO_SAMPLES=16 --size TRAIN_SEQ_LEN=512
    PRESET=8xh100 python scripts/bench/evaluation.py --devices 8      on one device, projected to eight: FineWeb's split

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

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import train_gpt as tg
from scripts.bench.train import cell, overrides, random_text
from scripts.study.runlog import markdown

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        action="append",
        metavar="NAME=VALUE ...",
        help="settings of a case; may be repeated",
    )
    parser.add_argument(
        "--rows",
        type=int,
        help="of T tokens in the timed split (default: two batches, at least 32)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns (default %(default)s)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=FINEWEB,
        help="of the whole split (default: FineWeb's, %(default)s)",
    )
    parser.add_argument(
        "--devices", type=int, default=1, help="that share the whole split (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result there")
    args = parser.parse_args(argv)
    for name in ("rows", "rounds", "tokens", "devices"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be 1 or more")
    return args


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

    def bpb(size: int = 0, stride: int = 0) -> Callable[[], Any]:
        everything = dataclasses.replace(run, cfg=dataclasses.replace(cfg, nelbo_sequences=0))
        return lambda: tg.evaluate_bpb(model, everything, val, OneByte(), size, stride)  # type: ignore[arg-type]

    scored = (val.total - 1) // T * T
    share = tokens / devices / scored
    found = [Job(case, "exact", scored, 2 * share, bpb())]
    if cfg.eval_stride:
        step = min(cfg.eval_stride, T)
        count = (val.total - 1 - T) // step * step + T
        found.append(
            Job(case, "sliding", count, tokens / devices / count, bpb(stride=cfg.eval_stride))
        )
    for size, _ in cfg.sizes(cfg.nelbo_windows) if cfg.diffusion else []:
        part = min(cfg.nelbo_sequences * T or tokens, tokens)  # what a run scores
        found.append(Job(case, f"bound {size}", scored, part / devices / scored, bpb(size)))
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
            raise tg.UserError(
                "stopped before a turn that counts was over: nothing is known; start again"
            ) from None
        print(
            f"stopped: --rounds={rounds}, {whole} of them whole; they are what follows",
            file=sys.stderr,
        )
        return whole
    return rounds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all cases in turns and sum up."""
    with prepared(args) as (todo, run):
        rounds, device = take_turns(todo, run, args.rounds), str(run.device)
    rows = []
    for job in todo:
        seconds = statistics.median(job.seconds[1 : rounds + 1])
        row: dict[str, Any] = {
            "size": job.case,
            "score": job.name,
            "tokens": job.tokens,
            "seconds": seconds,
        }
        row |= {
            "tok_per_sec": job.tokens / seconds if job.tokens else None,
            "peak_mib": job.peak_mib or None,
        }
        rows.append(row | {"whole_seconds": seconds * job.whole})
    totals = {
        case: sum(r["whole_seconds"] for r in rows if r["size"] == case)
        for case in dict.fromkeys(j.case for j in todo)
    }
    print(markdown(list(rows[0]), [[cell(v) for v in row.values()] for row in rows], 2) + "\n")
    for case, seconds in totals.items():
        print(
            f"{case}: all scores of {args.tokens:,} tokens on {args.devices} x {device}: "
            f"{seconds:,.0f} s\n"
        )
    found = {"device": device, "devices": args.devices, "tokens": args.tokens, "rounds": rounds}
    found |= {"whole_seconds": totals, "rows": rows}
    if args.out:
        tg.atomic_write(args.out, json.dumps(found, indent=1).encode(), "result")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error the user can repair."""
    args = parse_args(argv)
    try:
        print(json.dumps(measure(args)))
    except (tg.UserError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
