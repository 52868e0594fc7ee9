"""Run recipes x seeds at one budget, one process a run, and show the published scores beside them.

    python scripts/study/sweep.py defects --seeds 1337,42,2026 --seconds 600
    python scripts/study/sweep.py td_control td_late05 --steps 400 --set MICRO_BATCHES=2
    python scripts/study/sweep.py all --dry-run         every row: its settings and a note

Names are rows or ladders of scripts/study/ladder.toml. DATA_PATH, PRESET and the like come from the
environment, as for train_gpt.py. Rerun the command to resume: finished runs are skipped, and one
that was cut off continues from its checkpoint. Rows with equal settings share a run. Results are
OUT/sweep.jsonl and OUT/logs; the last line is one JSON object.
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
import datetime
import functools
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from tqdm import tqdm

import train_gpt as tg
from scripts.common import (
    MAX_INT,
    NONE,
    Parser,
    check_faults,
    error_line,
    fail,
    in_range,
    markdown,
    run_command,
    warn,
)
from scripts.study.child import ending, interruptible, stop
from scripts.study.runlog import (
    SCORE,
    SWEEP_RESULTS,
    UNKNOWN,
    RunLog,
    is_text,
    mean_cell,
    numbers,
    parse_object,
    read_log,
    shown,
    spread,
)
from train_gpt import Config, UserError, unknown

PROGRAM = Path(tg.__file__)

# ==============================================================================
# 1  PLAN -- every run's settings are checked before the first one starts
# ==============================================================================


OWN = ("RECIPE", "SEED", "RUN_ID", "OUT_DIR", "RESUME")  # what a sweep sets in each run
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # of whatever started this process
RESUME = "rerun the command to resume"
CLOCK_SECONDS = 5.0  # by which a clock may be set back during a run
# Settings that change scores but no training.
SCORING = ("nelbo_", "parallel_eval_", "eval_", "export_")


ABOUT = ("base", "note", "published")  # what a row says of itself; the rest are its settings


TEXTS = ("data", "tokenizer")  # whose digests tell runs apart
TABLES = ("rows", "ladders", "left_out")  # of the ladder file


class Ladder(NamedTuple):
    """What the ladder file holds, and with its rows the built-in recipes."""

    rows: dict[str, dict[str, Any]]
    ladders: dict[str, list[str]]
    left_out: dict[str, str]  # why, by name
    recipes: dict[str, dict[str, Any]]
    fault: str = ""  # why the file is not used


def known_ladder() -> Ladder:
    """Read the ladder file; one that is damaged gives built-in recipes and the fault."""
    path = tg.LADDER_FILE
    try:
        return checked_ladder(path, path.read_bytes() if path.exists() else b"")
    except OSError as error:
        return no_ladder(f"{path} cannot be read ({error.strerror}); make it readable")


def no_ladder(fault: str) -> Ladder:
    return Ladder({}, {}, {}, dict(tg.RECIPES), fault)


@functools.lru_cache
def checked_ladder(path: Path, content: bytes) -> Ladder:
    """Check the content of the ladder file, once as long as it does not change."""
    remedy = "repair it, or move it away"
    try:
        tables = tomllib.loads(content.decode("utf-8"))
        if faults := list(ladder_faults(tables)):
            return no_ladder("\n".join(f"{path} is damaged ({text}); {remedy}" for text in faults))
        recipes = tg.all_recipes()
    except UserError as error:
        return no_ladder(str(error))
    except ValueError as error:
        return no_ladder(f"{path} is damaged ({error}); {remedy}")
    except RecursionError:
        return no_ladder(f"{path} is damaged (nested too deeply); {remedy}")
    return Ladder(**{name: tables.get(name, {}) for name in TABLES}, recipes=recipes)


def ladder_faults(tables: Mapping[str, Any]) -> Iterator[str]:
    """Say what of the ladder file is not as the scripts need it, besides the settings of rows."""
    wrong = [name for name in TABLES if not isinstance(tables.get(name, {}), dict)]
    for name in wrong:
        yield f"{name} must be a table, not {shown(tables[name])}"
    if wrong:
        return
    rows, ladders, left_out = (tables.get(name, {}) for name in TABLES)
    for name, row in rows.items():
        yield from row_faults(name, row)
    for name, members in ladders.items():
        if not isinstance(members, list) or not all(isinstance(row, str) for row in members):
            yield f"ladder {name!r} must be a list of rows, not {shown(members)}"
        elif unknown := [row for row in members if row not in rows]:
            yield f"ladder {name!r} names {shown(unknown[0])}, which is no row"
    for name, why in left_out.items():
        if not isinstance(why, str):
            yield f"left_out: {name!r} must say why, not {shown(why)}"


def row_faults(name: str, row: Any) -> Iterator[str]:
    """Say what is wrong with what a row says of itself."""
    if not isinstance(row, dict):
        yield f"row {name!r} must be a table, not {shown(row)}"
        return
    for text in (name, row.get("base", ""), row.get("note", "")):
        if not is_text(text):
            yield f"row {name!r}: {shown(text)} must be a line of text without |"
    published = row.get("published", {})
    if not isinstance(published, dict):
        yield f"row {name!r}: published must be a table of scores, not {shown(published)}"
        return
    for phase, score in published.items():
        if not is_text(phase) or not SCORE.holds(score):
            yield f"row {name!r}: published {phase!r} is {shown(score)}, not {SCORE.text}"


def read_ladder() -> Ladder:
    """Read the ladder file; UserError: it is damaged."""
    found = known_ladder()
    if found.fault:
        fail(found.fault)
    return found


def rows() -> dict[str, dict[str, Any]]:
    """Return every row of the ladder file by name; UserError: the file is damaged."""
    return read_ladder().rows


def ladders() -> dict[str, list[str]]:
    """Return the names of every ladder's rows; UserError: the file is damaged."""
    return read_ladder().ladders | {"all": list(rows())}


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
    """Read the command line; exits with 2 on a wrong one.

    Raises:
        UserError: the ladder file is damaged.
    """
    members = {name: " ".join(of) for name, of in ladders().items()} | {"all": "every row"}
    text = "\n".join(f"  {name:12}{of}" for name, of in members.items())
    parser = Parser(__doc__, epilog=f"ladders:\n{text}")
    add, budget = parser.add_argument, parser.add_mutually_exclusive_group()
    positive = in_range(float, 1e-3, MAX_INT)
    add("names", nargs="+", metavar="NAME", help="ladders or rows")
    add("--seeds", default="1337", help="list, with commas (default %(default)s)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs")
    budget.add_argument("--seconds", type=positive, help="MAX_WALLCLOCK_SECONDS of each run")
    budget.add_argument("--steps", type=int, help="ITERATIONS of each run, without a time limit")
    parser.whole("--nproc", 1, "processes a run, by torchrun")
    folder = "folder of the sweep (default %(default)s)"
    add("--out", type=Path, default=Path("out/sweep"), help=folder)
    add("--any-version", action="store_true", help="keep runs of other versions of train_gpt.py")
    add("--dry-run", action="store_true", help="show rows and settings, and run nothing")
    return parser.parse_args(argv)


def chosen_rows(names: Sequence[str]) -> list[str]:
    """Expand ladders into rows, each once, in order; UserError: one is unknown."""
    left_out = read_ladder().left_out
    known = {name: [name] for name in rows()} | ladders()
    faults = [f"NAME={name!r} is left out: {left_out[name]}" for name in names if name in left_out]
    for name in (name for name in names if name not in left_out):
        faults += [f"{why} (rows: {tg.LADDER_FILE})" for why in unknown("NAME", name, known)]
    check_faults(faults)
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
        name, *value = text.split("=", 1)
        if name in OWN:
            faults.append(f"--set {text}: a sweep sets {name} itself; use rows, --seeds and --out")
        elif not value:
            faults.append(f"--set {text}: must be NAME=VALUE of a setting of train_gpt.py")
        elif name in values:
            which = f"--seconds, --steps or another --set sets {name}={values[name]}"
            faults.append(f"--set {text}: {which}; leave one of them out")
        faults += unknown("--set", name, known)
        values[name] = "".join(value)
    check_faults(faults)
    return values


def configure(
    name: str, seed: str, given: Mapping[str, str], nproc: int
) -> tuple[Config, dict[str, str]]:
    """Return settings and environment of one run.

    Raises:
        UserError: a setting is wrong, or a given one is the row's.
    """
    taken = sorted(given.keys() & {setting.upper() for setting in read_ladder().recipes[name]})
    rule = "is the row's to set; leave it out of --set and the environment"
    check_faults(f"{key}={given[key]!r} {rule}" for key in taken)
    env = {**given, "RECIPE": name, "SEED": seed}
    cfg, _ = Config.from_env(env | {"WORLD_SIZE": str(nproc)})
    if cfg.micro_batches % nproc:
        fail(f"--nproc={nproc} must divide MICRO_BATCHES={cfg.micro_batches}; change one of them")
    return cfg, env | {"PRESET": cfg.preset}


class Said:
    """Texts that are each said once, with the rows that they are about."""

    def __init__(self) -> None:
        self.about: dict[str, dict[str, None]] = {}

    def add(self, text: str, row: str = "") -> None:
        """Say a text, about a row if one is given."""
        named = self.about.setdefault(text, {})
        if row:
            named[row] = None

    def lines(self) -> list[str]:
        """Return one line a text."""
        return [
            f"{text} (rows: {', '.join(named)})" if named else text
            for text, named in self.about.items()
        ]


def folder_of(cfg: Config, row: str, out: Path) -> Path:
    """Return the folder of a run: that of any row with equal settings, else a new one."""
    digest = digest_of(cfg)
    made = sorted(out.glob(f"*_{cfg.seed}_{digest}"))
    return made[0] if made else out / f"{row}_{cfg.seed}_{digest}"


def digest_of(cfg: Config) -> str:
    """Return the hash of the training settings that train_gpt puts into names."""
    return cfg.path("", "").name[-8:]


def plan(args: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """Lay out all runs, and notes, seed by seed so that an unfinished sweep compares whole ladders.

    Raises:
        UserError: settings are wrong; it lists all faults.
    """
    rows_of_sweep = chosen_rows(args.names)
    runs, folders = list[Run](), dict[str, Path]()
    faults, notes = Said(), Said()
    given = {k: v for k, v in os.environ.items() if k not in (*OWN, *LAUNCHER)} | overrides(args)
    for name in OWN:
        if name in os.environ:
            notes.add(f"{name} of the environment is not read: a sweep sets it")
    for text in tg.near_misses(given):
        notes.add(text)
    for seed, name in itertools.product(dict.fromkeys(args.seeds.split(",")), rows_of_sweep):
        try:
            cfg, env = configure(name, seed, given, args.nproc)
        except UserError as error:
            for fault in str(error).splitlines():
                faults.add(fault, name)
            continue
        digest = digest_of(cfg)
        folder = folders.setdefault(digest, folder_of(cfg, name, args.out))
        env |= {"RUN_ID": folder.name, "OUT_DIR": str(folder)}
        runs.append(Run(name, cfg.seed, digest, cfg, env, folder))
        for text in hollow(cfg):
            notes.add(text, name)
    check_faults(faults.lines())
    return runs, notes.lines()


def hollow(cfg: Config) -> Iterator[str]:
    """Say where the budget takes away what a row is about."""
    if cfg.diffusion and cfg.diffusion_start_step >= cfg.iterations:
        start = f"DIFFUSION_START_STEP={cfg.diffusion_start_step}"
        yield f"no windows before {start}, ITERATIONS={cfg.iterations}"
    ramps = cfg.diffusion and cfg.diffusion_rate == "fixed" and cfg.diffusion_progressive
    if ramps and cfg.diffusion_ramp == "iterations" and cfg.max_wallclock_seconds == 0:
        rule = "falls short only where --seconds ends a run before ITERATIONS"
        yield f"DIFFUSION_RAMP=iterations {rule}"


class Asked(NamedTuple):
    """What the runs of a sweep must be made by, and of."""

    version: str | None  # SHA-256 of train_gpt.py; None: any
    texts: dict[str, str]  # SHA-256 of data and tokenizer


def check_text(cfg: Config) -> dict[str, str]:
    """Read shards and tokenizer before any run, and return their digests; UserError: they are
    missing, damaged or do not fit each other.
    """
    splits = (tg.TokenLoader(cfg, "train"), tg.TokenLoader(cfg, "val"))
    facts, warnings = tg.check_data(cfg, *splits, tg.ByteCounter(cfg))
    for warning in warnings:
        warn(warning)
    return {name: str(facts[f"{name}_sha256"]) for name in TEXTS}


# ==============================================================================
# 2  RUNS -- each a process of its own; what is finished is read from its log
# ==============================================================================


def read(run: Run) -> RunLog:
    return read_log(run.log) if run.log.exists() else RunLog(run.folder.name)


def foreign(run: Run, log: RunLog, asked: Asked) -> str:
    """Say what shows that a log is not of this run; empty if nothing does."""
    values = log.events.get("config", {}).get("values", {})
    ours = run.cfg.training_settings()
    for name in sorted(ours.keys() & values.keys()):
        if values[name] != ours[name]:
            return f"{name.upper()}={shown(values[name])}, not {shown(ours[name])}"
    for name, digest in asked.texts.items():
        if (theirs := log.identity(name)) not in (UNKNOWN, digest):
            return f"{name} of SHA-256 {theirs[:12]}, not {digest[:12]}"
    return ""


def state_of(run: Run, asked: Asked) -> str:
    """Say from its log what became of a run.

    Returns:
        "done", "cut off" (with a checkpoint), "new", or "other version".

    Raises:
        UserError: it was made from other data, or its log is that of another run.
    """
    log = read(run)
    if log.damage:
        warn(f"{log.complaint}; the run is not finished, so it is run again")
    values = log.events.get("config", {}).get("values")
    if values is None:
        return "cut off" if log.damage and checkpoints_of(run) else "new"
    for name in ("data_path", "tokenizer_path"):
        ours, theirs = getattr(run.cfg, name), values.get(name, getattr(run.cfg, name))
        if Path(ours).resolve() != Path(theirs).resolve():
            made = f"{run.folder} was made with {theirs!r}"
            fail(f"{name.upper()}={ours!r}, but {made}; name another --out")
    if asked.version not in (None, log.get("header", "sha256")):
        return "other version"
    if other := foreign(run, log, asked):
        remedy = "move its folder away, or name another --out"
        fail(f"log {run.log} is of another run ({other}); {remedy}")
    scoring = [name for name in values if name.startswith(SCORING)]
    rescored = any(values[name] != getattr(run.cfg, name, values[name]) for name in scoring)
    if not log.why_left_out and not rescored:
        return "done"
    return "cut off" if checkpoints_of(run) else "new"


def checkpoints_of(run: Run) -> list[Path]:
    """List the checkpoints of a run that are there."""
    cfg = dataclasses.replace(run.cfg, run_id=run.folder.name, out_dir=str(run.folder))
    return [path for path in cfg.checkpoints if path.exists()]


def set_aside(run: Run) -> None:
    """Rename the checkpoints of a run that begins anew: it must not be resumed from what another
    program trained.
    """
    for path in checkpoints_of(run):
        path.replace(path.with_name(f"{path.name}.before"))


def execute(run: Run, resume: bool, nproc: int, asked: Asked, bar: Any) -> str:
    """Train one run to its end; return its error, empty if it ended well. Ctrl-C ends it, too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *launcher * (nproc > 1), str(PROGRAM)]
    env, printed = run.env | {"RESUME": "auto" if resume else "no"}, run.folder / "printed.txt"
    run.folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        set_aside(run)
    began = time.time()
    # Appended to: a trainer that a killed sweep left behind may still write there.
    with open(printed, "ab") as out:
        start = out.tell()
        streams: Any = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        # A process group of its own: it hears of Ctrl-C from here, once.
        process = subprocess.Popen(command, env=env, process_group=0, **streams)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                bar.refresh()
        finally:
            stop(process)
    why = ending(process.returncode) or wrong_log(run, asked, began)
    text = printed.read_bytes()[start:].decode(errors="replace")
    return f"{error_line(text)} ({why}; see {printed})" if why else ""


def wrong_log(run: Run, asked: Asked, began: float) -> str:
    """Say why the log of a process that ended well holds no result of it; empty if it does."""
    log = read(run)
    if why := log.why_left_out or foreign(run, log, asked):
        return f"log {run.log}: {why}"
    old = started(log) < began - CLOCK_SECONDS
    return f"log {run.log} is older than this run" if old else ""


def started(log: RunLog) -> float:
    """Return when the last start of a log began; 0 if it does not say."""
    try:
        return datetime.datetime.fromisoformat(log.get("header", "time")).timestamp()
    except ValueError:
        return 0.0


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
    """OUT/sweep.jsonl, one line per run, those of earlier sweeps included; UserError: damaged."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / SWEEP_RESULTS
        self.lines = dict[tuple[str, str], dict[str, Any]]()
        try:
            text = self.path.read_bytes() if self.path.exists() else b""
            for line in map(parse_object, text.splitlines()):
                self.lines[line["row"], line["hash"]] = line
        except (ValueError, TypeError, KeyError) as error:
            fail(f"{self.path} is damaged ({error}); move it away: the runs themselves are kept")

    def put(self, run: Run, line: dict[str, Any]) -> None:
        """Rewrite the file with this line, and copy the run's logs."""
        self.lines[run.row, run.digest] = line
        text = "".join(json.dumps(line) + "\n" for line in self.lines.values())
        tg.atomic_write(self.path, text.encode(), "results")
        (self.out / "logs").mkdir(exist_ok=True)
        for source in (run.log, run.log.with_suffix(".txt")):
            if source.exists():
                shutil.copy2(source, self.out / "logs" / source.name)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder, interruptible; UserError: another sweep holds it."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(out / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        fail(f"--out={out} is in use by another sweep; wait for it or name another")
    with lock, interruptible():
        yield


Line = dict[str, Any]  # of sweep.jsonl


def version_of(args: argparse.Namespace) -> str | None:
    """Return the hash of train_gpt.py that runs must be made by; None: any."""
    program = PROGRAM.read_text(encoding="utf-8").encode()
    return None if args.any_version else hashlib.sha256(program).hexdigest()


def sweep(
    runs: Sequence[Run], args: argparse.Namespace, asked: Asked
) -> Iterator[tuple[str, Line]]:
    """Run what is not finished, one by one; yield what was done and each line, or its error."""
    states = {run.folder: state_of(run, asked) for run in runs}
    store, errors = Store(args.out), dict[Path, str]()
    counts = Counter(states.values())
    print("; ".join(f"{n} {state}" for state, n in counts.items()), file=sys.stderr)
    if "other version" in counts:
        rule = "are made anew; --any-version keeps them"
        print(f"runs of another version of train_gpt.py {rule}", file=sys.stderr)
    todo = sum(state != "done" for state in states.values())
    with tqdm(total=todo, desc="sweep", unit="run", disable=None) as bar:
        for run in runs:
            did = {"done": "skipped", "cut off": "resumed"}.get(states[run.folder], "ran")
            if did != "skipped" and run.folder not in errors:
                bar.set_postfix_str(f"{run.row} seed {run.seed}, {did}")
                if error := execute(run, did == "resumed", args.nproc, asked, bar):
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


# ==============================================================================
# 3  TABLES
# ==============================================================================


def published_cell(name: str) -> str:
    scores = known_ladder().rows.get(name, {}).get("published", {})
    return ", ".join(f"{value:.4f} ({phase})" for phase, value in scores.items()) or NONE


def score_table(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line per row: exact bits per byte and bounds over seeds, beside what is published."""
    lines = [line for of_row in scores.values() for line in of_row]
    windows = sorted({int(window) for line in lines for window in line["bounds"]})
    body = []
    for name, of_row in scores.items():
        found = [numbers(line["bounds"].get(str(w)) for line in of_row) for w in windows]
        ours = mean_cell([line["val_bpb"] for line in of_row])
        cells = [f"`{name}`", ours, str(len(of_row)), published_cell(name)]
        body.append([*cells, *map(mean_cell, found)])
    head = ["row", "val_bpb", "n", "published (phase)", *(f"bound, window {w}" for w in windows)]
    return markdown(head, body, 1)


def plan_table(runs: Sequence[Run]) -> str:
    """One line per row: what it changes, what is said of it, and its seeds."""
    body = []
    for name in dict.fromkeys(run.row for run in runs):
        row = rows()[name]
        changed = {key: value for key, value in row.items() if key not in ABOUT}
        values = {k.upper(): int(v) if isinstance(v, bool) else v for k, v in changed.items()}
        settings = " ".join(f"`{k}={v}`" for k, v in values.items())
        seeds = " ".join(str(run.seed) for run in runs if run.row == name)
        cells = [f"`{name}`", f"`{row.get('base', name)}`", settings, row.get("note", "")]
        body.append([*cells, seeds, published_cell(name)])
    return markdown(["row", "over", "settings", "note", "seeds", "published (phase)"], body, 6)


def summary(found: Sequence[tuple[str, Line]]) -> dict[str, Any]:
    """Print the table and the failures; return what the last line says of them."""
    scores = dict[str, list[Line]]()
    failed = [line for _, line in found if "error" in line]
    done = [(did, line) for did, line in found if "error" not in line]
    for _, line in done:
        scores.setdefault(line["row"], []).append(line)
    print(score_table(scores) + "\n\nPublished: FineWeb, one H100 for 180 s unless said.")
    if len(versions := {line["sha256"] for _, line in done}) > 1:
        print(f"note: scores of {len(versions)} versions of train_gpt.py", file=sys.stderr)
    for line in failed:
        print(f"failed: {line['row']} seed {line['seed']}: {line['error']}", file=sys.stderr)
    values = {name: [line["val_bpb"] for line in lines] for name, lines in scores.items()}
    means = {
        name: {"val_bpb": statistics.mean(v), "std": spread(v), "n": len(v)}
        for name, v in values.items()
    }
    counts = Counter(did for did, _ in done)
    return {
        "rows": means,
        **{did: counts[did] for did in ("ran", "resumed", "skipped")},
        "failed": failed,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan, then run or resume; UserError: a setting or the data is wrong."""
    runs, notes = plan(args)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print(plan_table(runs))
        return {"rows": len({run.row for run in runs}), "runs": len(runs), "notes": notes}
    asked = Asked(version_of(args), check_text(runs[0].cfg))
    found, interrupted = list[tuple[str, Line]](), False
    with alone(args.out):
        try:
            for did in sweep(runs, args, asked):
                found.append(did)
        except KeyboardInterrupt:
            interrupted = True
    result = summary(found)
    if interrupted:
        left = f"interrupted with {len(runs) - len(found)} of {len(runs)} runs to go"
        print(f"{left}; {RESUME}", file=sys.stderr)
    return result | {"interrupted": interrupted, "out": str(args.out)}


def status_of(result: Mapping[str, Any]) -> int:
    """Return 130 after Ctrl-C, 1 if a run failed, else 0."""
    return 130 if result.get("interrupted") else int(bool(result.get("failed")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, 1 if a run failed."""
    return run_command(lambda: run(parse_args(argv)), status_of, RESUME)


if __name__ == "__main__":
    sys.exit(main())
