"""Time training steps: recipes x sizes x processes, each in a process of its own, turn by turn.

    python scripts/bench/train.py --recipes ar,direct,retrograde
    python scripts/bench/train.py --size MODEL_DIM=160 --size 'MODEL_DIM=320 NUM_LAYERS=8' --rounds 5
    python scripts/bench/train.py --nproc 1,2 --out train.json
    python scripts/bench/train.py --recipes direct --profile     which operators a step's time goes to
    python scripts/bench/train.py --program /old/train_gpt.py    this program against another version, in turns

Settings come from the environment as for train_gpt.py (PRESET, COMPILE, ...); --size sets more,
once for every row of the table. Text is random tokens: nothing needs to be prepared. A step with
windows and one without are timed apart; "run" is their mean over a run, by DIFFUSION_START_FRAC.
Ratios to `ar` (or, with --program, to this program) are taken within a round and their median is
shown, since a machine's speed drifts. MFU: flops.py. On CUDA a step that waits for the device is an
error; "graphs" are compilations after the warm-up, which should be none. Not timed: data
preparation, start, scores (bench/evaluation.py). The table is Markdown; the last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import train_gpt as tg
from scripts.study.runlog import markdown

WARM = 3  # steps before the timed ones
OPERATORS = 12  # that a profile names
REFERENCE = "ar"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipes", default="ar,direct", help="list, with commas (default %(default)s)"
    )
    parser.add_argument(
        "--size",
        action="append",
        metavar="NAME=VALUE ...",
        help="settings of a row; may be repeated",
    )
    parser.add_argument("--nproc", type=numbers, default=[1], help="processes, a list (default 1)")
    parser.add_argument(
        "--steps", type=int, default=8, help="timed steps of a kind (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns (default %(default)s)")
    parser.add_argument(
        "--program", type=Path, help="another version of train_gpt.py, timed in turns with this one"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also share out a step's time among operators"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be 1 or more")
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


def prime(program: Any, state: Any, objective: Any, run: Any, progress: float) -> None:
    """Run every kind of pass of these steps once, whatever windows they will draw, as training
    does.
    """
    cfg, sizes = state.cfg, [*objective.masks] if progress else [0]
    num_rows = cfg.train_batch_tokens // cfg.micro_batches // cfg.train_seq_len
    rows = state.loader.rows(0, num_rows, cfg.train_seq_len, run.device)
    for size in sizes or [0]:
        with run.autocast():
            loss, _ = objective(rows, 0, size, program.Moment(state.step, progress, 1.0))
        loss.backward()
    state.model.zero_grad(set_to_none=True)


def time_steps(
    program: Any, state: Any, objective: Any, run: Any, progress: float, steps: int
) -> list[float]:
    """Seconds of each of a number of steps at a place of the run, after WARM others."""
    seconds = []
    for i in range(WARM + steps):
        began = run.clock()
        if run.device.type == "cuda" and i >= WARM:
            torch.cuda.set_sync_debug_mode("error")
        program.train_step(state, objective, program.Moment(state.step, progress, 1.0))
        if run.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        seconds.append(run.clock() - began)
    return seconds[WARM:]


def profile(
    program: Any, state: Any, objective: Any, run: Any, progress: float, steps: int
) -> list[dict[str, Any]]:
    """Share out the time of steps among operators, without what they call; the device's time where
    there is one.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(steps):
            program.train_step(state, objective, program.Moment(state.step, progress, 1.0))
        run.clock()
    which = "self_device_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    # Operators; kernels of a device have entries of their own, whose time those of operators hold,
    # too.
    events = [event for event in found.key_averages() if event.device_type.name == "CPU"]
    spent = {
        event.key: (getattr(event, which) / 1e3 / steps, event.count // steps) for event in events
    }
    if not (whole := sum(ms for ms, _ in spent.values())):
        raise tg.UserError("--profile: the profiler saw no time on the device; run without it")
    ranked = sorted(spent.items(), key=lambda item: -item[1][0])[:OPERATORS]
    return [
        {"operator": k, "ms": ms, "share": ms / whole, "calls": calls} for k, (ms, calls) in ranked
    ]


def work(task: Mapping[str, Any]) -> None:
    """Time one case and print what was found, as JSON (rank 0)."""
    program = load_program(task["program"])
    cfg, _, _ = program.Config.from_env(os.environ)
    with program.Run.start(cfg) as run:
        state = program.TrainState(cfg, run, program.TokenLoader(cfg, "train"))
        objective = program.Objective(cfg, run, state.model)
        start = cfg.diffusion_start_frac if cfg.diffusion else 1.0
        found: dict[str, Any] = {
            "start": start,
            "tokens": cfg.train_batch_tokens,
            "world": run.world_size,
        }
        for name, progress, part in (("clean", 0.0, start), ("windows", 1.0, 1 - start)):
            if part > 0:
                state.step = max(cfg.iterations // 2, cfg.diffusion_start_step)
                prime(program, state, objective, run, progress)
                before = graphs()
                found[name] = time_steps(program, state, objective, run, progress, task["steps"])
                found["graphs"] = found.get("graphs", 0) + graphs() - before
        found["params"] = sum(p.numel() for p in state.model.parameters())
        peak = torch.cuda.max_memory_allocated() // 2**20 if run.device.type == "cuda" else 0
        found["peak_mib"] = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        for name, progress in (("clean", 0.0), ("windows", 1.0)):
            if task["profile"] and name in found:
                shares = profile(program, state, objective, run, progress, task["steps"])
                found.setdefault("profile", {})[name] = shares
        per_token, best = (tg.beside("flops.py", name) for name in ("per_token", "peak"))
        sizes = cfg.sizes(cfg.diffusion_windows) if cfg.diffusion else []
        if not task["program"]:  # the settings of another version may be others
            windows = sum(per_token(cfg, size) * share for size, share in sizes)
            found["operations"] = start * per_token(cfg) + (1 - start) * windows
        found["best"] = best(str(run.device))
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
        raise tg.UserError(f"--size {size!r}: {min(unknown)} {rule}")
    return settings


def random_text(folder: Path, cfg: tg.Config, count: int) -> None:
    """Write a shard of `count` random tokens for either split."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, count).astype("<u2")
    header = np.zeros(tg.SHARD_HEADER, dtype="<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, count
    for split in ("train", "val"):
        (folder / f"random_{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


def one(case: Mapping[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one case; UserError: it failed."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    env = {
        **os.environ,
        **case["settings"],
        "RECIPE": case["recipe"],
        "DATA_PATH": str(text),
        "OUT_DIR": str(folder),
    }
    env |= {
        "RUN_ID": "bench",
        "RESUME": "no",
        "PRESET": case["preset"],
    }  # the same for any number of processes
    cfg, _, _ = tg.Config.from_env(env)
    random_text(
        text, cfg, max(2 * cfg.train_batch_tokens, 4 * cfg.train_seq_len) + 1
    )  # enough for a step
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case['nproc']}"]
    task = {"program": case["program"], "steps": args.steps, "profile": args.profile}
    command = [
        sys.executable,
        *launcher * (case["nproc"] > 1),
        __file__,
        "--worker",
        json.dumps(task),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        why = (named[:1] or lines[-1:] or ["nothing printed"])[0]
        raise tg.UserError(f"{case['recipe']} {case['settings']} failed: {why}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """List what is timed in a round; UserError: a setting or recipe is wrong."""
    found = []
    for size in args.size or [""]:
        settings = overrides(size)
        for nproc in args.nproc:
            for recipe in args.recipes.split(","):
                for program in ("", str(args.program))[: 2 if args.program else 1]:
                    case = {
                        "size": size or "-",
                        "settings": settings,
                        "nproc": nproc,
                        "recipe": recipe,
                    }
                    cfg, _, _ = tg.Config.from_env({**os.environ, **settings, "RECIPE": recipe})
                    found.append(case | {"program": program, "preset": cfg.preset})
    return found


def step_seconds(found: Mapping[str, Any]) -> float:
    """Mean seconds a step over a run."""
    median = {
        name: statistics.median(found[name]) for name in ("clean", "windows") if name in found
    }
    return float(
        found["start"] * median.get("clean", 0.0)
        + (1 - found["start"]) * median.get("windows", 0.0)
    )


def summarise(
    all_cases: Sequence[dict[str, Any]], rounds: Sequence[Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Medians over rounds of every case, and the ratio of its step to that of its reference in the
    same round.
    """
    rows = []
    for i, case in enumerate(all_cases):
        mine = [found[i] for found in rounds]
        wanted = (
            {"recipe": case["recipe"], "program": ""}
            if case["program"]
            else {"recipe": REFERENCE, "program": ""}
        )
        same = {"size": case["size"], "nproc": case["nproc"]} | wanted
        other = next(
            (j for j, c in enumerate(all_cases) if all(c[k] == v for k, v in same.items())), None
        )
        ratios = (
            [] if other is None else [step_seconds(f[i]) / step_seconds(f[other]) for f in rounds]
        )
        seconds = statistics.median(map(step_seconds, mine))
        kinds = {
            k: statistics.median(statistics.median(f[k]) for f in mine)
            for k in ("clean", "windows")
            if k in mine[0]
        }
        rate = mine[0]["tokens"] / seconds
        best = statistics.median(f["best"] for f in mine)
        row = {
            "size": case["size"],
            "recipe": case["recipe"],
            "program": case["program"] or "-",
            "nproc": case["nproc"],
        }
        row |= {
            "params": mine[0]["params"],
            "clean_ms": 1e3 * kinds["clean"] if "clean" in kinds else None,
        }
        row |= {
            "windows_ms": 1e3 * kinds["windows"] if "windows" in kinds else None,
            "run_ms": 1e3 * seconds,
        }
        operations = mine[0].get("operations")
        row |= {"tok_per_sec": rate, "mfu": operations and rate * operations / case["nproc"] / best}
        row |= {
            "ratio": statistics.median(ratios) if ratios else None,
            "peak_mib": max(f["peak_mib"] for f in mine),
        }
        row |= {"graphs": max(f["graphs"] for f in mine)}
        rows.append(row)
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


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.3f}"
        if value < 10
        else f"{value:,.0f}"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    todo = cases(args)
    with (
        tempfile.TemporaryDirectory() as name,
        tqdm(total=args.rounds * len(todo), disable=None) as bar,
    ):
        rounds = []
        for _ in range(args.rounds):
            found = []
            for case in todo:
                bar.set_postfix_str(f"{case['recipe']} {case['size']}")
                found.append(one(case, args, Path(name)))
                bar.update()
            rounds.append(found)
    rows = summarise(todo, rounds)
    print(markdown(list(rows[0]), [[cell(v) for v in row.values()] for row in rows], 3) + "\n")
    profiles = operators(todo, rounds[-1])
    if profiles:
        names = ["recipe", "size", "step", "operator", "ms", "share", "calls"]
        print(
            markdown(names, [[cell(line[name]) for name in names] for line in profiles], 4) + "\n"
        )
    preset = tg.Config.from_env(os.environ)[0].preset
    found_all = {
        "preset": preset,
        "rounds": args.rounds,
        "steps": args.steps,
        "torch": torch.__version__,
        "rows": rows,
    }
    found_all |= {"profiles": profiles} if profiles else {}
    if args.out:
        tg.atomic_write(args.out, json.dumps(found_all, indent=1).encode(), "result")
    return found_all


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error the user can repair."""
    args = parse_args(argv)
    try:
        if args.worker:
            work(json.loads(args.worker))
            return 0
        print(json.dumps(run(args)))
    except (tg.UserError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
