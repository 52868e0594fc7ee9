"""Time training steps: recipes x sizes x processes, each in a process of its own, turn by turn.

    python scripts/bench/train.py --recipes ar,direct,retrograde
    python scripts/bench/train.py --size MODEL_DIM=160 --size 'MODEL_DIM=320 NUM_LAYERS=8'
    python scripts/bench/train.py --nproc 1,2 --out train.json
    python scripts/bench/train.py --recipes direct --profile    the time of each operator
    python scripts/bench/train.py --program /old/train_gpt.py   compare with another version

Settings come from the environment as for train_gpt.py (PRESET, COMPILE, ...); --size sets more,
once for every row of the table. Text is random tokens: nothing needs to be prepared. A step with
windows and one without are timed apart; "run" is their mean over a run, by DIFFUSION_START_FRAC.
Ratios to `ar` (or, with --program, to this program) are taken within a round and their median is
shown, since a machine's speed drifts. "mfu" is model FLOPs utilisation: FLOPs per second over those
that the device could do. On CUDA a step that waits for the device is an error; "graphs" are
compilations after the warm-up, which should be none. Not timed: data preparation, start, scores
(bench/evaluation.py). The table is Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import train_gpt as tg
from scripts.bench.flops import flops_per_token
from scripts.common import (
    NONE,
    Parser,
    check_outputs,
    counts,
    error_line,
    fail,
    names,
    run_command,
    table,
    write_result,
)
from scripts.study.child import ending, stop

WARM = 3  # steps before the timed ones
OPERATORS = 12  # that a profile names
REFERENCE = "ar"

# Dense bf16 FLOPs per second with fp32 sums, from the makers' data sheets, by a part of the
# device's name.
PEAKS = {
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, size = parser.add_argument, "settings of a row; may be repeated"
    add("--recipes", default="ar,direct", help="list, with commas (default %(default)s)")
    add("--size", action="append", metavar="NAME=VALUE ...", help=size)
    add("--nproc", type=counts, default="1", help="processes, a list (default %(default)s)")
    parser.whole("--steps", 8, "timed steps of a kind")
    parser.whole("--rounds", 3, "turns")
    add("--program", type=Path, help="another version of train_gpt.py, timed in turns with this")
    add("--profile", action="store_true", help="also divide a step's time among operators")
    parser.outputs()
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.program and not args.program.is_file():
        parser.error(f"--program={args.program} is no file; name a train_gpt.py")
    return args


# ==============================================================================
# 1  ONE CASE -- in a process of its own
# ==============================================================================


def load_program(path: str) -> Any:
    """Import a train_gpt.py from anywhere, under a name of its own."""
    if not path:
        return tg
    spec = importlib.util.spec_from_file_location("other_train_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def graphs() -> int:
    """Compilations so far."""
    counters = torch._dynamo.utils.counters["stats"]
    return int(counters["unique_graphs"])


class Place(NamedTuple):
    """A place of a run, where steps are timed: its objects, of whatever version of train_gpt.py."""

    program: Any
    state: Any
    objective: Any
    run: Any
    progress: float

    @property
    def now(self) -> Any:
        """The values of the schedules; versions before ScheduleState call them Moment."""
        kind = getattr(self.program, "ScheduleState", None) or self.program.Moment
        return kind(self.state.step, self.progress, 1.0)

    def step(self) -> None:
        """Train one step."""
        self.program.train_step(self.state, self.objective, self.now)


def prime(at: Place) -> None:
    """Run every kind of pass of these steps once, whatever windows they will draw."""
    cfg, sizes = at.state.cfg, [*at.objective.masks] if at.progress else [0]
    num_rows = cfg.train_batch_tokens // cfg.micro_batches // cfg.train_seq_len
    rows = at.state.loader.rows(0, num_rows, cfg.train_seq_len, at.run.device)
    for size in sizes or [0]:
        with at.run.autocast():
            loss = at.objective(rows, 0, size, at.now)[0]
        loss.backward()
    at.state.model.zero_grad(set_to_none=True)


def time_steps(at: Place, steps: int) -> list[float]:
    """Seconds of each of a number of steps at a place of the run, after WARM others."""
    seconds, cuda = [], at.run.device.type == "cuda"
    for i in range(WARM + steps):
        began = at.run.clock()
        if cuda and i >= WARM:
            torch.cuda.set_sync_debug_mode("error")
        at.step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        seconds.append(at.run.clock() - began)
    return seconds[WARM:]


def profile(at: Place, steps: int) -> list[dict[str, Any]]:
    """Divide the time of steps among operators, without what they call; the device's, if any."""
    activities, cuda = [torch.profiler.ProfilerActivity.CPU], at.run.device.type == "cuda"
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(steps):
            at.step()
        at.run.clock()
    which = "self_device_time_total" if cuda else "self_cpu_time_total"
    # Operators; kernels of a device have entries of their own, whose time those of operators hold.
    events = [event for event in found.key_averages() if event.device_type.name == "CPU"]
    spent = {event.key: getattr(event, which) / 1e3 / steps for event in events}
    calls = {event.key: event.count // steps for event in events}
    if not (whole := sum(spent.values())):
        fail("--profile: the profiler saw no time on the device; run without it")
    ranked = sorted(spent, key=lambda key: -spent[key])[:OPERATORS]
    return [
        {"operator": key, "ms": spent[key], "share": spent[key] / whole, "calls": calls[key]}
        for key in ranked
    ]


def time_kinds(
    place: Place, task: Mapping[str, Any], shares: Mapping[str, float]
) -> dict[str, Any]:
    """Time steps of each kind that a run has: "clean" without windows and "windows" with them."""
    found: dict[str, Any] = {}
    places = {"clean": place._replace(progress=0.0), "windows": place._replace(progress=1.0)}
    cfg = place.state.cfg
    for name, at in places.items():
        if shares[name] > 0:
            at.state.step = max(cfg.iterations // 2, cfg.diffusion_start_step)
            prime(at)
            before = graphs()
            found[name] = time_steps(at, task["steps"])
            found["graphs"] = found.get("graphs", 0) + graphs() - before
    found["peak_mib"] = peak_mib(place.run)
    if task["profile"]:
        profiled = {name: at for name, at in places.items() if name in found}
        found["profile"] = {name: profile(at, task["steps"]) for name, at in profiled.items()}
    return found


def peak_mib(run: Any) -> int:
    """Return the most memory so far: the device's, or that of the process."""
    peak = torch.cuda.max_memory_allocated() // 2**20 if run.device.type == "cuda" else 0
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def flops_of(program: Any) -> Callable[..., float] | None:
    """Find how FLOPs per token of a version of train_gpt.py are counted; None: not known."""
    if hasattr(program, "beside"):  # versions that ran scripts/flops.py
        found: Callable[..., float] | None = program.beside("flops.py", "per_token")
        return found
    return flops_per_token if program is tg else getattr(program, "flops_per_token", None)


def mean_flops(per_token: Callable[..., float], cfg: Any, start: float) -> float:
    """Return FLOPs per token, the mean over a run whose windows start at `start` of it."""
    sizes = cfg.sizes(cfg.diffusion_windows) if cfg.diffusion else []
    windows = sum(per_token(cfg, size) * share for size, share in sizes)
    return float(start * per_token(cfg) + (1 - start) * windows)


def peak_flops(device: torch.device) -> float | None:
    """Return the FLOPs per second that a device can do at best.

    A GPU by its data sheet (None if it is not listed), a CPU by what an fp32 product of matrices of
    512 rows and columns reaches here, the best of 9.
    """
    if device.type == "cuda":
        name = tg.machine_name(device)
        return next((value for part, value in PEAKS.items() if part in name), None)
    a, best = torch.ones(512, 512), float("inf")
    for _ in range(9):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * 512**3 / best


def work(task: Mapping[str, Any]) -> None:
    """Time one case and print what was found, as JSON (rank 0)."""
    program = load_program(task["program"])
    cfg = program.Config.from_env(os.environ)[0]
    with program.Run.start(cfg) as run:
        state = program.TrainState(cfg, run, program.TokenLoader(cfg, "train"))
        objective = program.Objective(cfg, run, state.model)
        start = cfg.diffusion_start_frac if cfg.diffusion else 1.0
        found: dict[str, Any] = {"start": start, "tokens": cfg.train_batch_tokens}
        found |= {"world": run.world_size}
        shares = {"clean": start, "windows": 1 - start}
        found |= time_kinds(Place(program, state, objective, run, 0.0), task, shares)
        found["params"] = sum(p.numel() for p in state.model.parameters())
        if (per_token := flops_of(program)) is not None:
            found["flops"] = mean_flops(per_token, cfg, start)
        found |= {"peak": peak_flops(run.device), "machine": tg.machine_name(run.device)}
        if run.rank == 0:
            print("\n" + json.dumps(found))


# ==============================================================================
# 2  ALL CASES -- in turns
# ==============================================================================


def overrides(size: str) -> dict[str, str]:
    """Read `NAME=VALUE NAME=VALUE`; UserError: a name is no setting."""
    settings = dict(part.partition("=")[::2] for part in size.split())
    if unknown := settings.keys() - {name.upper() for name in tg.Config.__dataclass_fields__}:
        rule = "is no setting of train_gpt.py; name settings, with spaces between"
        fail(f"--size {size!r}: {min(unknown)} {rule}")
    return settings


def random_text(folder: Path, cfg: tg.Config, count: int) -> None:
    """Write a shard of `count` random tokens for either split."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, count).astype("<u2")
    header = np.zeros(tg.SHARD_HEADER, dtype="<i4")
    header[:3] = tg.SHARD_MAGIC, 1, count
    for split in ("train", "val"):
        (folder / f"random_{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


def one(case: Mapping[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one case; UserError: it failed."""
    text, nproc = folder / "text", case["nproc"]
    text.mkdir(exist_ok=True)
    env = {**os.environ, **case["settings"], "RECIPE": case["recipe"], "DATA_PATH": str(text)}
    env |= {"OUT_DIR": str(folder), "RUN_ID": "bench", "RESUME": "no"}
    env["PRESET"] = case["preset"]  # the same for any number of processes
    cfg = tg.Config.from_env(env)[0]
    enough_for_a_step = max(2 * cfg.train_batch_tokens, 4 * cfg.train_seq_len) + 1
    random_text(text, cfg, enough_for_a_step)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    task = {"program": case["program"], "steps": args.steps, "profile": args.profile}
    command = [sys.executable, *launcher * (nproc > 1), __file__, "--worker", json.dumps(task)]
    streams: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # A process group of its own: it hears of Ctrl-C from here, once, and so do its ranks.
    process = subprocess.Popen(command, env=env, process_group=0, **streams)
    try:
        out, err = process.communicate()
    finally:
        stop(process)
    lines = out.strip().splitlines()
    if why := ending(process.returncode) or ("" if lines else "it printed no result"):
        fail(f"{case['recipe']} {case['settings']} failed: {error_line(err)} ({why})")
    return dict(json.loads(lines[-1]))


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """List what is timed in a round; UserError: a setting or recipe is wrong."""
    found = []
    programs = ["", str(args.program)] if args.program else [""]
    axes = itertools.product(args.size or [""], args.nproc, names(args.recipes))
    for axis in axes:
        case = dict(zip(("size", "nproc", "recipe"), axis, strict=True))
        settings = overrides(case["size"])
        cfg = tg.Config.from_env({**os.environ, **settings, "RECIPE": case["recipe"]})[0]
        case |= {"size": case["size"] or NONE, "settings": settings, "preset": cfg.preset}
        found += [case | {"program": program} for program in programs]
    return found


KINDS = ("clean", "windows")


def step_seconds(found: Mapping[str, Any]) -> float:
    """Mean seconds per step over a run."""
    median = {name: statistics.median(found[name]) if name in found else 0.0 for name in KINDS}
    return float(found["start"] * median["clean"] + (1 - found["start"]) * median["windows"])


def reference_of(case: Mapping[str, Any], all_cases: Sequence[Mapping[str, Any]]) -> int | None:
    """Find what a case is compared with: this program, or if it is that, the recipe REFERENCE."""
    recipe = case["recipe"] if case["program"] else REFERENCE
    wanted = {"size": case["size"], "nproc": case["nproc"], "recipe": recipe, "program": ""}
    found = (j for j, c in enumerate(all_cases) if all(c[k] == v for k, v in wanted.items()))
    return next(found, None)


def median_ms(found: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    """Median over rounds of the median step of a kind; None if the run has none."""
    if kind not in found[0]:
        return None
    return 1e3 * float(statistics.median(statistics.median(f[kind]) for f in found))


def mfu(found: Sequence[Mapping[str, Any]], rate: float) -> float | None:
    """Return the share of a device's best that `rate` tokens per second are; None: not known."""
    flops, peaks = found[0].get("flops"), [f["peak"] for f in found if f["peak"]]
    return rate * flops / statistics.median(peaks) if flops and peaks else None


def summarise(
    all_cases: Sequence[dict[str, Any]], rounds: Sequence[Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Medians over rounds of every case, and ratios of its step to its reference's in a round."""
    rows = []
    for i, case in enumerate(all_cases):
        mine, other = [found[i] for found in rounds], reference_of(case, all_cases)
        seconds = statistics.median(map(step_seconds, mine))
        rate, ratio = mine[0]["tokens"] / seconds, None
        if other is not None:
            pairs = [(step_seconds(f[i]), step_seconds(f[other])) for f in rounds]
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        rows.append(
            {
                "size": case["size"],
                "recipe": case["recipe"],
                "program": case["program"] or NONE,
                "nproc": case["nproc"],
                "params": mine[0]["params"],
                "clean_ms": median_ms(mine, "clean"),
                "windows_ms": median_ms(mine, "windows"),
                "run_ms": 1e3 * seconds,
                "tok_per_sec": rate,
                "mfu": mfu(mine, rate / case["nproc"]),
                "ratio": ratio,
                "peak_mib": max(f["peak_mib"] for f in mine),
                "graphs": max(f["graphs"] for f in mine),
            }
        )
    return rows


def operators(
    todo: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Gather the profiles of a round, one line an operator."""
    return [
        {name: case[name] for name in ("recipe", "size", "program", "nproc")}
        | {"step": kind}
        | line
        for case, measured in zip(todo, found, strict=True)
        for kind, lines in measured.get("profile", {}).items()
        for line in lines
    ]


Found = list[dict[str, Any]]


def take_turns(todo: Found, args: argparse.Namespace) -> list[Found]:
    """Run all cases in every round."""
    rounds: list[Found] = []
    bar = tqdm(total=args.rounds * len(todo), disable=None)
    with tempfile.TemporaryDirectory() as name, bar:
        for _ in range(args.rounds):
            rounds.append([])
            for case in todo:
                bar.set_postfix_str(f"{case['recipe']} {case['size']}")
                rounds[-1].append(one(case, args, Path(name)))
                bar.update()
    return rounds


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time all cases and print the tables; UserError: one failed."""
    check_outputs(args)
    todo = cases(args)
    rounds = take_turns(todo, args)
    rows, profiles = summarise(todo, rounds), operators(todo, rounds[-1])
    preset = tg.Config.from_env(os.environ)[0].preset
    found: dict[str, Any] = {"preset": preset, "rounds": args.rounds, "steps": args.steps}
    found |= {"machine": rounds[0][0]["machine"], "torch": torch.__version__, "rows": rows}
    found |= {"profiles": profiles} if profiles else {}
    write_result(args.out, found)
    print(table(rows, 3) + "\n")
    if profiles:
        columns = ["recipe", "size", "step", "operator", "ms", "share", "calls"]
        print(table([{name: line[name] for name in columns} for line in profiles], 4) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    if args.worker:
        return run_command(lambda: work(json.loads(args.worker)))
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
