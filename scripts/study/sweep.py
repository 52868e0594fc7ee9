"""Run recipes x seeds at one budget, one process a run, and lay the scores beside the published
ones.

    python scripts/study/sweep.py defects --seeds 1337,42,2026 --seconds 600
    python scripts/study/sweep.py td_control td_late05 --steps 400 --set MICRO_BATCHES=2 --out out/late
    python scripts/study/sweep.py all --dry-run        every row: its settings, and what was chosen where none is published

Names are rows or ladders of scripts/study/ladder.toml. DATA_PATH, PRESET and the like come from the
environment, as for train_gpt.py. The same command again goes on: finished runs are skipped, and one
that was cut off resumes. Rows with equal settings share a run. Results are OUT/sweep.jsonl and
OUT/logs; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import train_gpt as tg
from scripts import ladder
from scripts.ladder import closest
from scripts.study import report
from train_gpt import Config, UserError

PROGRAM = Path(tg.__file__)

# 1  PLAN -- every run's settings are checked before the first one starts ==============================================

OWN = ("RECIPE", "SEED", "RUN_ID", "OUT_DIR", "RESUME")  # what a sweep sets in each run
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # of whatever started this process
SCORING = (
    "nelbo_",
    "parallel_eval_",
    "eval_",
    "export_",
)  # settings that change scores but no training


def rows() -> dict[str, dict[str, Any]]:
    return ladder.read(UserError)["rows"]


def ladders() -> dict[str, list[str]]:
    return ladder.read(UserError)["ladders"] | {"all": list(rows())}


class Run(NamedTuple):
    """One row at one seed."""

    row: str
    seed: int
    digest: str  # of the training settings, as in the names train_gpt gives
    cfg: Config
    env: dict[str, str]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.folder.name}.jsonl"

    @property
    def key(self) -> dict[str, Any]:
        return {"row": self.row, "seed": self.seed, "hash": self.digest, "run": self.folder.name}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one. UserError: the file of ladders is
    damaged.
    """
    text = "\n".join(
        f"  {name:12}{' '.join(of) if name != 'all' else 'every row'}"
        for name, of in ladders().items()
    )
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"ladders:\n{text}", formatter_class=shape
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="ladders or rows")
    parser.add_argument("--seeds", default="1337", help="list, with commas (default %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help="MAX_WALLCLOCK_SECONDS of each run")
    budget.add_argument("--steps", type=int, help="ITERATIONS of each run, without a limit of time")
    parser.add_argument(
        "--nproc", type=int, default=1, help="processes a run, by torchrun (default %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/sweep"),
        help="folder of the sweep (default %(default)s)",
    )
    parser.add_argument(
        "--any-version", action="store_true", help="keep runs of another version of train_gpt.py"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show rows and settings, and run nothing"
    )
    args = parser.parse_args(argv)
    for name in ("seconds", "nproc"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name}={value} must be above 0")
    return args


def fail(*faults: str) -> None:
    """Raise the error that `main` prints without a traceback, if there are faults."""
    if faults:
        raise UserError("\n".join(faults))


def chosen_rows(names: Sequence[str]) -> list[str]:
    """Expand ladders into rows, each once, in order; UserError names what is near an unknown one."""
    left_out = ladder.read(UserError)["left_out"]
    known = {name: [name] for name in rows()} | ladders()
    why = {
        name: f"is left out: {left_out[name]}" if name in left_out else "is no row or ladder"
        for name in names
    }
    near = {name: closest(name, known) for name in names if name not in known}
    fail(*(f"NAME={name!r} {why[name]}; {hint}; all: --dry-run all" for name, hint in near.items()))
    return list(dict.fromkeys(row for name in names for row in known[name]))


def overrides(args: argparse.Namespace) -> dict[str, str]:
    """Collect the settings of the command line; UserError: not a setting, or one that a sweep sets
    itself.
    """
    known = [name.upper() for name in Config.__dataclass_fields__]
    values = dict[str, str]()
    faults = []
    if args.seconds is not None:
        values["MAX_WALLCLOCK_SECONDS"] = str(args.seconds)
    if args.steps is not None:
        values |= {"ITERATIONS": str(args.steps), "MAX_WALLCLOCK_SECONDS": "0"}
    for text in args.set:
        name, equals, value = text.partition("=")
        if name in OWN:
            faults.append(f"--set {text}: a sweep sets {name} itself; use rows, --seeds and --out")
        elif not equals or name not in known:
            faults.append(
                f"--set {text}: must be NAME=VALUE of a setting of train_gpt.py; {closest(name, known)}"
            )
        values[name] = value
    fail(*faults)
    return values


def configure(
    name: str, seed: str, given: Mapping[str, str], nproc: int
) -> tuple[Config, dict[str, str], list[str]]:
    """Return settings and environment of one run, and warnings; UserError: a fault, or a given
    setting is the row's.
    """
    taken = sorted(given.keys() & {setting.upper() for setting in tg.all_recipes()[name]})
    fail(
        *(
            f"{key}={given[key]!r} is the row's to set; leave it out of --set and the environment"
            for key in taken
        )
    )
    env = {**given, "RECIPE": name, "SEED": seed}
    cfg, _, warnings = Config.from_env(env | {"WORLD_SIZE": str(nproc)})
    if cfg.micro_batches % nproc:
        fail(f"--nproc={nproc} must divide MICRO_BATCHES={cfg.micro_batches}; change one of them")
    return cfg, env | {"PRESET": cfg.preset}, warnings


def plan(args: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """Lay out all runs, seed by seed so that an unfinished sweep compares whole ladders; UserError
    lists all faults.
    """
    names = chosen_rows(args.names)
    runs = list[Run]()
    folders = dict[str, Path]()
    faults, notes = (
        dict[str, dict[str, None]](),
        dict[str, dict[str, None]](),
    )  # what is said, and of which rows
    given = {k: v for k, v in os.environ.items() if k not in (*OWN, *LAUNCHER)} | overrides(args)
    notes |= {
        f"{name} of the environment is not read: a sweep sets it": {}
        for name in OWN
        if name in os.environ
    }
    for seed in dict.fromkeys(args.seeds.split(",")):
        for name in names:
            try:
                cfg, env, warnings = configure(name, seed, given, args.nproc)
            except UserError as error:
                for fault in str(error).splitlines():
                    faults.setdefault(fault, {})[name] = None
                continue
            digest = cfg.path("", "").name[-8:]
            if digest not in folders:  # equal settings: one run, whatever row it was first made for
                made = sorted(args.out.glob(f"*_{cfg.seed}_{digest}"))
                folders[digest] = made[0] if made else args.out / f"{name}_{cfg.seed}_{digest}"
            env |= {"RUN_ID": folders[digest].name, "OUT_DIR": str(folders[digest])}
            runs.append(Run(name, cfg.seed, digest, cfg, env, folders[digest]))
            notes |= {text: {} for text in warnings}
            for text in hollow(cfg):
                notes.setdefault(text, {})[name] = None
    said = [
        [text + f" (rows: {', '.join(of)})" * bool(of) for text, of in texts.items()]
        for texts in (faults, notes)
    ]
    fail(*said[0])
    return runs, said[1]


def hollow(cfg: Config) -> Iterator[str]:
    """Say where the budget takes away what a row is about."""
    if cfg.diffusion and cfg.diffusion_start_step >= cfg.iterations:
        yield f"no windows before DIFFUSION_START_STEP={cfg.diffusion_start_step}, ITERATIONS={cfg.iterations}"
    ramps = cfg.diffusion and cfg.diffusion_rate == "fixed" and cfg.diffusion_progressive
    if ramps and cfg.diffusion_ramp == "iterations" and cfg.max_wallclock_seconds == 0:
        yield "DIFFUSION_RAMP=iterations falls short only where --seconds ends a run before ITERATIONS"


# 2  RUNS -- each a process of its own; what is finished is read from its log ==========================================


def read(run: Run) -> report.RunLog:
    return report.read_log(run.log) if run.log.exists() else report.RunLog(run.folder.name)


def state_of(run: Run, version: str | None) -> str:
    """Say from its log what became of a run: done, cut off (with a checkpoint), new, or of another
    version.

    Raises:
        UserError: it was made from other data.
        ReportError: its log is damaged.
    """
    log = read(run)
    values = log.events.get("config", {}).get("values")
    if values is None:
        return "new"
    for name in ("data_path", "tokenizer_path"):
        ours, theirs = getattr(run.cfg, name), values[name]
        if Path(ours).resolve() != Path(theirs).resolve():
            fail(
                f"{name.upper()}={ours!r}, but {run.folder} was made with {theirs!r}; name another --out"
            )
    if version not in (None, log.get("header", "sha256")):
        return "other version"
    rescored = any(
        values[name] != getattr(run.cfg, name, values[name])
        for name in values
        if name.startswith(SCORING)
    )
    if not log.why_left_out and not rescored:
        return "done"
    return "cut off" if (run.folder / "checkpoints" / f"{run.folder.name}.pt").exists() else "new"


def execute(run: Run, resume: bool, nproc: int, bar: Any) -> str:
    """Train one run to its end; return what it gave as its error, empty if it ended well. Ctrl-C
    ends it, too.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if nproc > 1
        else []
    )
    env, printed = run.env | {"RESUME": "auto" if resume else "no"}, run.folder / "printed.txt"
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(
        printed, "wb"
    ) as out:  # a process group of its own: it hears of Ctrl-C from here, once
        streams: Any = dict(
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, process_group=0
        )
        process = subprocess.Popen([sys.executable, *launcher, str(PROGRAM)], env=env, **streams)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                bar.refresh()
        finally:
            if process.poll() is None:
                process.terminate()  # it ends as by Ctrl-C
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=60)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    why = read(run).why_left_out if process.returncode == 0 else f"exit status {process.returncode}"
    if not why:
        return ""
    lines = [
        line
        for line in printed.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(named[:1] or lines[-1:] or ['nothing printed'])[0]} ({why}; see {printed})"


def result(run: Run) -> dict[str, Any]:
    """Gather one finished run's line of sweep.jsonl."""
    log = read(run)
    done, header = log.events["done"], log.events["header"]
    return {
        **run.key,
        **{name: done.get(name) for name in ("steps", "train_seconds", "peak_memory_mib")},
        "val_bpb": log.get("final", "val_bpb"),
        "bounds": {str(window): event["nelbo_bpb"] for window, event in sorted(log.nelbo.items())},
        "parallel_eval": [
            {k: v for k, v in event.items() if k != "event"} for event in log.decode.values()
        ],
        "bytes": log.get("size", "total_bytes"),
        "published": rows()[run.row].get("published", {}),
        **{name: header.get(name) for name in ("machine", "world_size", "sha256")},
        "data": Path(run.cfg.data_path).name,
    }


class Store:
    """OUT/sweep.jsonl, one line a run, those of earlier sweeps included; UserError: damaged."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "sweep.jsonl"
        self.lines = dict[tuple[str, str], dict[str, Any]]()
        try:
            for text in (
                self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()
            ):
                line = json.loads(text)
                self.lines[line["row"], line["hash"]] = line
        except (ValueError, TypeError, KeyError) as error:
            fail(f"{self.path} is damaged ({error}); move it away: the runs themselves are kept")

    def put(self, run: Run, line: dict[str, Any]) -> None:
        """Rewrite the file with this line, and copy the run's logs."""
        self.lines[run.row, run.digest] = line
        tg.atomic_write(
            self.path,
            "".join(json.dumps(line) + "\n" for line in self.lines.values()).encode(),
            "results",
        )
        (self.out / "logs").mkdir(exist_ok=True)
        for source in (run.log, run.log.with_suffix(".txt")):
            if source.exists():
                shutil.copy2(source, self.out / "logs" / source.name)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder, and take SIGTERM and a closed terminal as Ctrl-C; UserError: another sweep
    holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [
        n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN
    ]  # nohup stays
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"--out={out} is in use by another sweep; wait for it or name another")
        before = {name: signal.signal(name, signal.default_int_handler) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def sweep(runs: Sequence[Run], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run what is not finished, one after the other; yield what was done and the line of each, or
    its error.
    """
    version = (
        None
        if args.any_version
        else hashlib.sha256(PROGRAM.read_text(encoding="utf-8").encode()).hexdigest()
    )
    states = {run.folder: state_of(run, version) for run in runs}
    store = Store(args.out)
    errors = dict[Path, str]()
    print(
        "; ".join(f"{n} {state}" for state, n in Counter(states.values()).items()), file=sys.stderr
    )
    if "other version" in states.values():
        print(
            "runs of another version of train_gpt.py are made anew; --any-version keeps them",
            file=sys.stderr,
        )
    todo = sum(state != "done" for state in states.values())
    with tqdm(total=todo, desc="sweep", unit="run", disable=None) as bar:
        for run in runs:
            did = {"done": "skipped", "cut off": "resumed"}.get(states[run.folder], "ran")
            if did != "skipped" and run.folder not in errors:
                bar.set_postfix_str(
                    f"{run.row} seed {run.seed}{', resumed' if did == 'resumed' else ''}"
                )
                if error := execute(run, did == "resumed", args.nproc, bar):
                    errors[run.folder] = error
                else:
                    states[run.folder] = "done"
                bar.update()
            failed = run.folder in errors
            line = run.key | {"error": errors[run.folder]} if failed else result(run)
            store.put(run, line)
            shown = f"failed: {line['error']}" if failed else f"val_bpb {line['val_bpb']:.4f}"
            tqdm.write(f"{run.row} seed {run.seed}: {did}, {shown}", file=sys.stderr)
            yield did, line


# 3  TABLES ============================================================================================================


def published_cell(name: str) -> str:
    scores = rows()[name].get("published", {})
    return ", ".join(f"{value:.4f} ({phase})" for phase, value in scores.items()) or report.NONE


def score_table(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line a row: exact bits per byte and bounds, mean and deviation over seeds, beside what is
    published.
    """
    windows = sorted(
        {int(window) for lines in scores.values() for line in lines for window in line["bounds"]}
    )
    body = []
    for name, lines in scores.items():
        bounds = [
            report.mean_cell(report.numbers(line["bounds"].get(str(w)) for line in lines))
            for w in windows
        ]
        ours = report.mean_cell([line["val_bpb"] for line in lines])
        body.append([f"`{name}`", ours, str(len(lines)), published_cell(name), *bounds])
    head = ["row", "val_bpb", "n", "published (phase)", *(f"bound, window {w}" for w in windows)]
    return report.markdown(head, body, 1)


def plan_table(runs: Sequence[Run]) -> str:
    body = []
    for name in dict.fromkeys(run.row for run in runs):
        row = rows()[name]
        values = {
            k.upper(): int(v) if isinstance(v, bool) else v for k, v in ladder.changes(row).items()
        }
        settings = " ".join(f"`{k}={v}`" for k, v in values.items())
        seeds = " ".join(str(run.seed) for run in runs if run.row == name)
        over = row.get("base", name)
        body.append(
            [f"`{name}`", f"`{over}`", settings, row.get("note", ""), seeds, published_cell(name)]
        )
    return report.markdown(
        ["row", "over", "settings", "note", "seeds", "published (phase)"], body, 6
    )


def run_command(args: argparse.Namespace) -> int:
    runs, notes = plan(args)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print(plan_table(runs))
        print(
            json.dumps({"rows": len({run.row for run in runs}), "runs": len(runs), "notes": notes})
        )
        return 0
    for read_data in (
        lambda c: tg.TokenLoader(c, "train"),
        lambda c: tg.TokenLoader(c, "val"),
        tg.ByteCounter,
    ):
        read_data(runs[0].cfg)  # UserError, now and not in every run
    found, interrupted = list[tuple[str, dict[str, Any]]](), False
    with alone(args.out):
        try:
            for did in sweep(runs, args):
                found.append(did)
        except KeyboardInterrupt:
            interrupted = True
    scores = dict[str, list[dict[str, Any]]]()
    failed = [line for _, line in found if "error" in line]
    for _, line in found:
        if "error" not in line:
            scores.setdefault(line["row"], []).append(line)
    print(score_table(scores) + "\n\nPublished: FineWeb, one H100 for 180 s unless said.")
    if len(versions := {line["sha256"] for lines in scores.values() for line in lines}) > 1:
        print(f"note: scores of {len(versions)} versions of train_gpt.py", file=sys.stderr)
    for line in failed:
        print(f"failed: {line['row']} seed {line['seed']}: {line['error']}", file=sys.stderr)
    if interrupted:
        left = len(runs) - len(found)
        print(
            f"interrupted with {left} of {len(runs)} runs to go; the same command goes on",
            file=sys.stderr,
        )
    values = {name: [line["val_bpb"] for line in lines] for name, lines in scores.items()}
    rows = {
        n: {"val_bpb": statistics.mean(v), "std": report.spread(v), "n": len(v)}
        for n, v in values.items()
    }
    counts = Counter(did for did, line in found if "error" not in line)
    done = {did: counts[did] for did in ("ran", "resumed", "skipped")}
    print(
        json.dumps(
            {
                "rows": rows,
                **done,
                "failed": failed,
                "interrupted": interrupted,
                "out": str(args.out),
            }
        )
    )
    return 130 if interrupted else int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if a run failed, 2 after an error the user can repair, 130 after
    Ctrl-C.
    """
    try:
        return run_command(parse_args(argv))
    except (UserError, report.ReportError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
