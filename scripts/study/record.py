"""Make a record from nothing: data, seeds x recipes, tables and submission.json.

    python scripts/study/record.py 8xh100              FineWeb, `record`, 3 seeds x 600 s, 8 GPUs
    DATA_PATH=data/mine TOKENIZER_PATH=data/mine/tokenizer.model \\
        python scripts/study/record.py 1xgpu --seconds 150
    python scripts/study/record.py cpu                 3 recipes x 3 seeds x 300 s, and heads: 3 h
    python scripts/study/record.py 8xh100 --plan       only say what would be run
    python scripts/study/record.py 8xh100 --rehearse   4 steps on two CPU processes: a dry run
    python scripts/study/record.py 8xh100 --variant sp8192     another tokenizer; sets VOCAB_SIZE
    python scripts/study/record.py 8xh100 --package packages   then the folder that is handed in

Rerun the command to resume. Steps: prepare_data.py (FineWeb, or for cpu the Python library, unless
DATA_PATH names what is there), sweep.py twice (baselines, then the recipe `record`; finished runs
are skipped), bench/export.py (where the bytes go and what rounding costs both scores), for cpu
chain.py, bench/passes.py and bench/decode.py for every seed (a sequential head, the exact
likelihood of decoding with it, its speed), report.py.
OUT holds runs, logs/ with results.json, export.json, README.md with the tables and submission.json.
Settings of train_gpt.py come from the environment as always; a rehearsal sets COMPILE=0 and
MICRO_BATCHES=2 where it does not. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_gpt as tg
from scripts.chain import SUFFIX, why_no_head
from scripts.common import Parser, fail, run_command
from scripts.study import package, report
from scripts.study.child import STOP_SECONDS, ending, interruptible, stop
from scripts.study.runlog import read_log
from scripts.study.sweep import digest_of

SCRIPTS = Path(__file__).resolve().parents[1]
SEEDS = "1337,42,2026"
RESUME = "what is done is kept: rerun the command to resume"
RECIPE = package.RECIPE  # of the record; others are baselines
DATA_OPTIONS = ("source", "variant", "repo")  # of what is prepared
FILES = ("CHECKPOINT", "ARTIFACT", "HEAD", "RESULT")  # in a command KIND:recipe:seed[:name]


class Protocol(NamedTuple):
    """What is run, on how much."""

    nproc: int
    preset: str
    seconds: float  # of each run
    baselines: str  # recipes, if any
    source: str  # of text, where none is named
    heads: bool = False  # fit a sequential head to every record, and measure decoding with it


PROTOCOLS = {
    "8xh100": Protocol(8, "8xh100", 600.0, "", "fineweb --train-shards 80"),
    "1xgpu": Protocol(1, "1xgpu", 150.0, "ar,retrograde,direct", "fineweb --train-shards 80"),
    "cpu": Protocol(1, "cpu", 300.0, "ar,ar_record", "stdlib", heads=True),
}
HEAD_STEPS, HEAD_ROWS, HEAD_EXAMPLES = 600, 64, 24  # of the fit, of its scores, of decoding
EXPORT_ROWS = 4096  # of the bounds of each rounding, where NELBO_SEQUENCES=0 (all) is set


class Step(NamedTuple):
    """A command, and settings of its environment."""

    command: list[str]
    settings: dict[str, str]
    once: bool = False  # it is skipped where --out is there, and newer than what it is made of


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    baselines = "recipes to compare with (default: the protocol's; '': none)"
    add("protocol", choices=PROTOCOLS)
    add("--seeds", default=SEEDS, help="list, with commas (default %(default)s)")
    add("--seconds", type=float, help="of each run (default: the protocol's)")
    add("--baselines", help=baselines)
    add("--out", type=Path, help="folder of the record (default out/record_PROTOCOL)")
    add("--plan", action="store_true", help="print the commands and run nothing")
    add("--rehearse", action="store_true", help="four steps on a CPU; 8xh100: on two processes")
    add("--source", help="for prepare_data.py, with its arguments (default: the protocol's)")
    add("--variant", choices=("sp1024", "sp4096", "sp8192"), help="fineweb: which tokenizer")
    add("--repo", metavar="OWNER/NAME", help="fineweb: dataset repository")
    add("--package", type=Path, metavar="DIR", help="make the folder that is handed in, in DIR")
    args = parser.parse_args(argv)
    args.out = args.out or Path("out", f"record_{args.protocol}{'_rehearsal' * args.rehearse}")
    return args


def settings_of(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that the protocol gives to every run."""
    if not args.rehearse:
        preset = PROTOCOLS[args.protocol].preset
        return {"PRESET": preset} | ({"DEVICE": "cpu"} if preset == "cpu" else {})
    free = {"COMPILE": "0", "MICRO_BATCHES": "2"}  # no compiler is needed; two processes share
    return {"PRESET": "cpu", "DEVICE": "cpu"} | {k: v for k, v in free.items() if k not in env}


def record_config(env: Mapping[str, str], **more: str) -> tg.Config:
    """Return the settings of a record run; UserError: one is wrong."""
    return tg.Config.from_env({**env, **more, "RECIPE": RECIPE})[0]


def source_of(args: argparse.Namespace, protocol: Protocol) -> list[str]:
    """Return arguments of prepare_data.py: the source of text, and for FineWeb which export."""
    source = shlex.split(args.source or protocol.source)
    if args.source == "fineweb":  # no number of shards is named: the record's
        source = PROTOCOLS["8xh100"].source.split()
    for name in ("variant", "repo"):
        if value := getattr(args, name):
            source += [f"--{name}", value]
    return source


def data_settings(args: argparse.Namespace, data: Path) -> dict[str, str]:
    """Return the settings that name prepared data."""
    paths = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}
    return paths | ({"VOCAB_SIZE": args.variant.removeprefix("sp")} if args.variant else {})


def steps_of(args: argparse.Namespace, env: Mapping[str, str]) -> list[Step]:
    """List what is run, in order."""
    protocol, out = PROTOCOLS[args.protocol], args.out
    if args.rehearse:
        protocol = protocol._replace(nproc=min(protocol.nproc, 2), source="stdlib")
    settings, steps = settings_of(args, env), list[Step]()

    def add(script: str, *arguments: str, **more: str) -> None:
        command = [sys.executable, str(SCRIPTS / script), *arguments]
        steps.append(Step(command, settings | more))

    if "DATA_PATH" not in env:
        source = source_of(args, protocol)
        data = Path("data", f"{source[0]}_{args.variant}" if args.variant else source[0])
        settings |= data_settings(args, data)
        add("prepare_data.py", "--source", *source, "--out", str(data))
    elif given := [f"--{name}={value}" for name in DATA_OPTIONS if (value := getattr(args, name))]:
        there = f"DATA_PATH={env['DATA_PATH']} names the data already"
        fail(f"{' '.join(given)}: {there}; unset one of them")
    budget = ["--seconds", str(args.seconds or protocol.seconds)]
    budget = ["--steps", "4"] if args.rehearse else budget
    runs = ["--seeds", args.seeds, *budget, "--nproc", str(protocol.nproc), "--out", str(out)]
    baselines = protocol.baselines if args.baselines is None else args.baselines
    if baselines:
        add("study/sweep.py", *baselines.split(","), *runs)
    add("study/sweep.py", RECIPE, *runs)
    cfg, seeds = record_config(env, **settings), args.seeds.split(",")
    levels = ",".join(map(str, tg.SCHEMES[cfg.export_scheme].levels[:4]))  # the first ones
    device, rows = settings.get("DEVICE", "auto"), str(cfg.nelbo_sequences or EXPORT_ROWS)
    export = [f"CHECKPOINT:{RECIPE}:{seeds[0]}", "--levels", levels]
    export += ["--out", str(out / "export.json"), "--device", device]
    add("bench/export.py", *export, NELBO_SEQUENCES=rows)
    add("study/report.py", *report_options(out))  # before what may fail: it stands without heads
    for recipe in [*filter(None, baselines.split(",")), RECIPE] if protocol.heads else ():
        if can_have_head(recipe, env, settings):
            commands = [c for seed in seeds for c in head_commands(args, f"{recipe}:{seed}")]
            steps += [Step(command, settings, once=True) for command in commands]
    if steps[-1].once:
        add("study/report.py", *report_options(out))
    return steps


def report_options(out: Path) -> list[str]:
    """Return options with which report.py writes its files into a folder."""
    files = {"--logs": "logs", "--readme": "README.md", "--submission": "submission.json"}
    paths = [part for option, name in files.items() for part in (option, str(out / name))]
    return [*paths, "--write"]


def can_have_head(recipe: str, *envs: Mapping[str, str]) -> bool:
    """Say if a head can be fitted to what a recipe trains."""
    settings = {name: value for env in envs for name, value in env.items()}
    return not why_no_head(tg.Config.from_env(settings | {"RECIPE": recipe})[0])


def head_commands(args: argparse.Namespace, run: str) -> list[list[str]]:
    """List what fits a sequential head to a run, recipe:seed, and measures decoding with it."""
    artifact, head, device = f"ARTIFACT:{run}", f"HEAD:{run}", ["--device", "cpu"]
    steps, rows = (2, 2) if args.rehearse else (HEAD_STEPS, HEAD_ROWS)
    examples = 2 if args.rehearse else HEAD_EXAMPLES
    given = ["--head", head, *device, "--out"]
    modes = ["--modes", "speculative", "--no-lookup", "--batch", "1", "--examples", str(examples)]
    commands = [["chain.py", artifact, "--steps", str(steps), *device, "--out", head]]
    passes = ["bench/passes.py", "--artifact", artifact, "--rows", str(rows)]
    commands.append([*passes, *given, f"RESULT:{run}:{report.PARALLEL_BPB.name}"])
    for temperature in report.TEMPERATURES:
        decode = ["bench/decode.py", artifact, *modes, "--temperature", str(temperature)]
        commands.append([*decode, *given, f"RESULT:{run}:{report.DECODE.name}_{temperature}"])
    return [[sys.executable, str(SCRIPTS / script), *rest] for script, *rest in commands]


def file_of(part: str, args: argparse.Namespace, env: Mapping[str, str]) -> str:
    """Replace KIND:recipe:seed[:name] in a command by the path of that file of a finished run.

    Raises:
        UserError: there is no such run.
    """
    kind, *run = part.split(":")
    if kind not in FILES:
        return part
    time = {"ITERATIONS": "4", "MAX_WALLCLOCK_SECONDS": "0"}
    if not args.rehearse:
        time = {"MAX_WALLCLOCK_SECONDS": str(args.seconds or PROTOCOLS[args.protocol].seconds)}
    asked = {**env, **time, "RECIPE": run[0], "SEED": run[1], "RUN_ID": ""}
    cfg = tg.Config.from_env(asked | {"OUT_DIR": str(args.out)})[0]
    logs, digest = args.out / "logs", digest_of(cfg)

    def finished(path: Path) -> bool:
        log = logs / f"{path.stem}.jsonl"
        return log.exists() and not read_log(log).why_left_out

    names = f"*_{digest}/checkpoints/*_{digest}{cfg.checkpoints[0].suffix}"
    paths = filter(finished, Path(args.out).glob(names))
    if (path := next(paths, None)) is None:
        fail(f"OUT={args.out} holds no checkpoint of a finished {run[0]} run; name another --out")
    artifact = path.parents[1] / cfg.artifact.name
    result = logs / f"{path.stem}_{run[-1]}.json"
    files = {"CHECKPOINT": path, "ARTIFACT": artifact, "HEAD": artifact.with_suffix(SUFFIX)}
    return str(files.get(kind, result))


def check(args: argparse.Namespace, env: Mapping[str, str]) -> None:
    """Raise UserError, before a download, if devices or a library are missing."""
    settings, wanted = settings_of(args, env), PROTOCOLS[args.protocol].nproc
    cfg = record_config(env, **settings)
    if cfg.preset != "cpu" and (found := torch.cuda.device_count()) < wanted:
        rule = f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}, {found} found"
        fail(f"PROTOCOL={args.protocol} {rule}; run it there, or try the path with --rehearse")


def up_to_date(command: Sequence[str]) -> bool:
    """Say if the file after --out is newer than all other files of a command."""
    out = Path(command[command.index("--out") + 1])
    parts = [path for path in map(Path, command[2:]) if path != out and path.is_file()]
    return out.exists() and all(out.stat().st_mtime >= p.stat().st_mtime for p in parts)


def run_step(step: Step, args: argparse.Namespace, env: Mapping[str, str]) -> None:
    """Run one step, or with --plan only print it; UserError: it failed."""
    changes = [f"{name}={value}" for name, value in step.settings.items()]
    if args.plan:
        print(shlex.join(changes + step.command), file=sys.stderr)
        return
    all_env = {**env, **step.settings}
    command = [file_of(part, args, all_env) for part in step.command]
    if step.once and up_to_date(command):
        return
    print(shlex.join(changes + command), file=sys.stderr, flush=True)
    # A process group of its own: it hears of Ctrl-C from here, once.
    process = subprocess.Popen(command, env=all_env, stdout=2, process_group=0)
    try:
        process.wait()
    finally:
        stop(process, 2 * STOP_SECONDS)  # a sweep stops its own run first
    if why := ending(process.returncode):
        fail(f"{Path(command[1]).name}: {why}, see above; {RESUME}")


def make_package(args: argparse.Namespace) -> dict[str, Any]:
    """Make the folder that is handed in from the record runs; UserError: it would be refused."""
    protocol = PROTOCOLS[args.protocol]
    seconds = args.seconds or protocol.seconds
    ranked = args.protocol == "8xh100" and not args.rehearse and seconds <= package.TRAIN_SECONDS
    wanted = package.Request(
        args.out / "logs",
        args.package,
        tuple(map(int, args.seeds.split(","))),
        track=package.TEN_MINUTES if ranked else package.NON_RECORD,
        recipe=RECIPE,
        tiny=args.rehearse or protocol.preset == "cpu",
    )
    print(f"package {wanted.logs} -> {wanted.out}", file=sys.stderr, flush=True)
    return package.write_package(wanted)


def run_steps(steps: Sequence[Step], args: argparse.Namespace, env: Mapping[str, str]) -> None:
    """Run all steps in order; UserError: one failed."""
    for number, step in enumerate(steps):
        readme = args.out / "README.md"
        if Path(step.command[1]).name == "report.py" and not args.plan and not readme.exists():
            between = "\n\n".join(report.RESULTS)  # the report goes between these two lines
            readme.write_text(f"# Record: {args.protocol}\n\n{between}\n", encoding="utf-8")
        try:
            run_step(step, args, env)
        except KeyboardInterrupt:
            name = Path(step.command[1]).name
            print(f"{name} was ended; {number} of {len(steps)} steps are done", file=sys.stderr)
            raise


def run(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Run every step; UserError: one failed, or the machine lacks devices."""
    steps, entry = steps_of(args, env), dict[str, Any]()
    if not args.plan:
        check(args, env)
    with interruptible():
        run_steps(steps, args, env)
    if not args.plan:
        entry = json.loads((args.out / "submission.json").read_text(encoding="utf-8"))
    about = {"protocol": args.protocol, "out": str(args.out), "planned": args.plan}
    made = {"package": make_package(args)} if args.package and not args.plan else {}
    return about | {"val_bpb": entry.get("val_bpb"), **made}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args, os.environ), resume=RESUME)


if __name__ == "__main__":
    sys.exit(main())
