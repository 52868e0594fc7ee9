"""Write the folder that is handed in to the challenge, and refuse what its reviewers refuse.

    python scripts/study/package.py --logs out/record_8xh100/logs --out packages
    python scripts/study/package.py --logs out/record_cpu/logs --track non_record_16mb --tiny \\
        --seeds 1337,42 --out packages

OUT/YYYY-MM-DD_NAME gets train_gpt.py (the program that the logs embed), requirements.txt, one log
per seed, README.md and submission.json. Nothing is written if a seed is missing or unfinished, if
settings or machines of the seeds differ, if a log was written by another program than PROGRAM, if
train and validation data overlap, or if a limit of the challenge is exceeded. Then four steps are
trained inside the folder, with no other file of this project: the program must export, reload and
score an artifact there. A failure leaves no folder. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import contextlib
import datetime
import filecmp
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import train_gpt as tg
from scripts.common import NONE, Parser, check_faults, markdown, run_command
from scripts.study import runlog
from scripts.study.runlog import RunLog
from train_gpt import UserError

RECIPE = "record"
TEN_MINUTES, NON_RECORD = "10min_16mb", "non_record_16mb"  # tracks
TRAIN_SECONDS = 600.0  # the challenge's limit
LAST_STEP_SECONDS = 1.0  # the step that reaches the cap is finished: at most one mean step longer
RANKS, GPU = 8, "H100"  # the machine of the ten-minute track
RULE = "=" * 100  # the line of a log that ends the program's source

# Settings in which the seeds of one record may differ. A resumed run has the seconds of all starts.
OWN = ("seed", "run_id", "out_dir", "resume")

# The run inside the folder: its steps, the tokens that it reads of each split, what it inherits of
# the environment, settings that keep it short, and sizes for a CPU.
STEPS, HEAD_TOKENS = 4, 65_536
# fmt: off
KEPT = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CXX",
)
QUICK = dict(
    ITERATIONS=str(STEPS), MAX_WALLCLOCK_SECONDS="0", RESUME="no", RUN_ID="four_steps",
    EVAL_STRIDE="0", NELBO_SEQUENCES="8", PARALLEL_EVAL_EXAMPLES="2", VAL_LOSS_EVERY="0",
)
TINY = dict(
    DEVICE="cpu", COMPILE="0", NUM_LAYERS="2", MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1",
    TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="512", MICRO_BATCHES="4", VAL_BATCH_SIZE="8192",
    DIFFUSION_WINDOWS="8:1,T:1", NELBO_WINDOWS="1,8", PARALLEL_EVAL_PREFIX_LEN="16",
    PARALLEL_EVAL_SPAN_LEN="8", PARALLEL_EVAL_SUFFIX_LEN="8", PARALLEL_EVAL_STEPS="1,2",
)
# fmt: on


class Request(NamedTuple):
    """What is packaged, and what no log knows."""

    logs: Path
    out: Path
    seeds: tuple[int, ...]
    about: Mapping[str, Any] = runlog.ABOUT  # author, github_id, name, blurb
    track: str = TEN_MINUTES
    date: str = ""  # YYYY-MM-DD; empty: that of the last log
    recipe: str = RECIPE
    program: Path = Path(tg.__file__)
    data: Path | None = None  # folder of shards; None: as logged
    tokenizer: Path | None = None
    tiny: bool = False  # four steps at sizes for a CPU
    timeout: float = 900.0  # of the four steps


class SeedRun(NamedTuple):
    """The log of one seed."""

    seed: int
    path: Path  # of its events
    log: RunLog
    source: str  # of the program that the log for people embeds

    @property
    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = self.log.get("config", "values")
        return found

    @property
    def artifact(self) -> Path:
        return Path(self.log.get("done", "artifact"))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    default = Request(Path(), Path(), ())
    parser.add_argument("--logs", type=Path, required=True, help="folder of *.jsonl and *.txt")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder in which the package is made"
    )
    parser.add_argument(
        "--seeds", default="1337,42,2026", help="list, with commas (default %(default)s)"
    )
    parser.add_argument(
        "--recipe", default=default.recipe, help="of the runs (default %(default)s)"
    )
    parser.add_argument("--track", choices=(TEN_MINUTES, NON_RECORD), default=default.track)
    parser.add_argument("--date", default="", help="YYYY-MM-DD (default: that of the last log)")
    for name, value in runlog.ABOUT.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=value, help="(default %(default)s)"
        )
    parser.add_argument("--program", type=Path, default=default.program, help="that the logs embed")
    parser.add_argument("--data", type=Path, help="folder of shards (default: as logged)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: as logged)")
    parser.add_argument("--tiny", action="store_true", help="train the four steps at CPU sizes")
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds for them")
    args = parser.parse_args(argv)
    try:
        args.seeds = tuple(map(int, args.seeds.split(",")))
    except ValueError:
        parser.error(f"--seeds={args.seeds} must be whole numbers, with commas")
    return args


def request_of(args: argparse.Namespace) -> Request:
    values = {name: value for name, value in vars(args).items() if name in Request._fields}
    return Request(**values, about={name: getattr(args, name) for name in runlog.ABOUT})


# ==============================================================================
# 1  LOGS -- one finished run per seed, with the program that it embeds
# ==============================================================================


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def embedded_source(path: Path) -> str:
    """Return the program at the top of a log for people; UserError: there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"log {path} cannot be read ({error}); copy it beside its .jsonl again"
        ) from error
    source, rule = text.partition(f"\n{RULE}\n")[:2]
    if not rule:
        raise UserError(
            f"log {path} embeds no program: no line of {len(RULE)} '='; copy the whole log again"
        )
    return source + "\n"


def read_run(path: Path) -> SeedRun:
    """Read both files of one run."""
    log, source = runlog.read_whole_log(path), embedded_source(path.with_suffix(".txt"))
    return SeedRun(log.setting("seed"), path, log, source)


def find_logs(request: Request) -> tuple[dict[int, list[Path]], list[str]]:
    """Return the logs of a recipe by seed, and what is wrong with those that are damaged."""
    found: dict[int, list[Path]] = {}
    logs = runlog.read_logs(request.logs)
    for log in logs:
        values = log.events.get("config", {}).get("values", {})
        if values.get("recipe") == request.recipe:
            found.setdefault(values["seed"], []).append(log.path)
    return found, [log.complaint for log in logs if log.damage]


def read_runs(request: Request) -> list[SeedRun]:
    """Read the logs of the asked seeds, in their order; UserError: one is missing or double."""
    found, damaged = find_logs(request)
    asked = ",".join(map(str, request.seeds))
    held = ",".join(map(str, sorted(found))) or "none"
    faults = list[str]()
    if missing := [str(seed) for seed in request.seeds if seed not in found]:
        faults.append(
            f"--seeds={asked}: {request.logs} has no log of recipe {request.recipe!r} with seed "
            f"{', '.join(missing)} (it has seeds {held}); every asked seed is needed: run the "
            "others, too"
        )
        faults += [f"{complaint}; copy it again: it may be one of them" for complaint in damaged]
    for seed in request.seeds:
        if len(paths := found.get(seed, [])) > 1:
            names = ", ".join(path.name for path in paths)
            faults.append(
                f"seed {seed} has {len(paths)} logs ({names}); only one may count: move the others "
                "away"
            )
    check_faults(faults)
    return [read_run(found[seed][0]) for seed in request.seeds]


# ==============================================================================
# 2  CHECKS -- what reviewers refuse; each yields faults: the thing, the value, the rule, the remedy
# ==============================================================================


def check_finished(runs: Sequence[SeedRun], request: Request) -> Iterator[str]:
    for run in runs:
        if why := run.log.why_left_out:
            yield (
                f"log {run.path}: {why}; only a finished run with finite scores counts: rerun its "
                "command to resume"
            )
        elif not runlog.is_number(loss := run.log.get("final", "val_loss")):
            yield f"log {run.path}: val_loss={loss} is not a finite number; train this seed again"


def check_program(runs: Sequence[SeedRun], request: Request) -> Iterator[str]:
    """Compare the embedded program with the headers and with the one on disk, by sha256."""
    try:
        on_disk = sha256(request.program.read_text(encoding="utf-8"))
    except OSError as error:
        yield (
            f"--program={request.program} cannot be read ({error.strerror}); name the train_gpt.py "
            "of the logs"
        )
        return
    for run in runs:
        embedded = sha256(run.source)
        for said in dict.fromkeys(run.log.hashes):  # of every start
            if said != embedded:
                yield (
                    f"stale log {run.path.with_suffix('.txt')}: it embeds a program of sha256 "
                    f"{embedded}, its header says {said}; both must be one program: train this "
                    "seed "
                    "again"
                )
        if embedded != on_disk:
            yield (
                f"stale log {run.path.with_suffix('.txt')}: it embeds a program of sha256 "
                f"{embedded}, "
                f"{request.program} has {on_disk}; train the seeds again, or name the program of "
                "the "
                "logs by --program"
            )


def check_settings(runs: Sequence[SeedRun], request: Request) -> Iterator[str]:
    """Require the same settings, machine and library version of all seeds."""
    rows = []
    for run in runs:
        header = run.log.events["header"] | {"world_size": runlog.num_ranks(run.log)}
        about = {f"header {name}": header.get(name) for name in ("machine", "world_size", "torch")}
        about |= {f"SHA-256 of {what}": run.log.identity(what) for what in ("data", "tokenizer")}
        rows.append({k.upper(): v for k, v in run.values.items() if k not in OWN} | about)
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{v!r} (seed {r.seed})" for v, r in zip(values, runs, strict=True))
            yield (
                f"mixed settings: {name} is {shown}; seeds of one record share all but "
                f"{', '.join(OWN)}: train the others again"
            )


def check_bytes(runs: Sequence[SeedRun], request: Request) -> Iterator[str]:
    """Require each artifact to be there, and program and artifact to fit the limit."""
    for run in runs:
        code = len(run.source.encode())
        logged, model = (int(run.log.number("size", f"{part}_bytes")) for part in ("code", "model"))
        total = max(int(run.log.number("size", "total_bytes")), code + model)
        if total > tg.SIZE_LIMIT:
            yield (
                f"log {run.path}: submission of {total:,} bytes (code {code:,} + model {model:,}) "
                f"exceeds {tg.SIZE_LIMIT:,}; take EXPORT_SCHEME=int6+lzma, or lower NUM_LAYERS or "
                "BIGRAM_VOCAB_SIZE"
            )
        if code != logged:
            yield (
                f"log {run.path}: code_bytes={logged:,}, but its program has {code:,}; the size "
                "must "
                "be that of this program: train this seed again"
            )
        if not run.artifact.is_file():
            yield (
                f"log {run.path}: artifact {run.artifact} is missing; it must be the one that was "
                "scored: copy it there, or train this seed again"
            )
        elif (size := run.artifact.stat().st_size) != model:
            yield (
                f"log {run.path}: artifact {run.artifact} has {size:,} bytes, not the {model:,} of "
                "the "
                "log: another run wrote it; train this seed again in a folder of its own"
            )


def check_time(runs: Sequence[SeedRun], request: Request) -> Iterator[str]:
    """Require evaluation within its limit, and what the ten-minute track requires."""
    for run in runs:
        evaluation = run.log.events.get("timing", {}).get("evaluation_seconds")
        if evaluation is None or not runlog.is_number(evaluation):
            yield (
                f"log {run.path}: evaluation_seconds of its timing event is {evaluation}; it must "
                "be a "
                "number: train this seed again with the present program"
            )
        elif evaluation > tg.EVALUATION_SECONDS:
            yield (
                f"log {run.path}: evaluation took {evaluation:.1f} s, more than "
                f"{tg.EVALUATION_SECONDS}; raise EVAL_STRIDE, or lower NELBO_SAMPLES or "
                "NELBO_SEQUENCES"
            )
        if request.track == TEN_MINUTES:
            yield from check_ten_minutes(run)


def check_ten_minutes(run: SeedRun) -> Iterator[str]:
    """Require what the ten-minute track requires: its cap of training time, and its machine."""
    seconds, steps = run.log.number("done", "train_seconds"), run.log.number("done", "steps")
    if seconds > TRAIN_SECONDS + min(LAST_STEP_SECONDS, seconds / max(steps, 1)):
        yield (
            f"log {run.path}: training took {seconds:.1f} s, more than the {TRAIN_SECONDS:.0f} of "
            "track "
            f"{TEN_MINUTES}; set MAX_WALLCLOCK_SECONDS=600, or take --track {NON_RECORD}"
        )
    machine, ranks = run.log.get("header", "machine"), runlog.num_ranks(run.log)
    if GPU not in machine or ranks != RANKS:
        yield (
            f"log {run.path}: it ran on {ranks} x {machine}, track {TEN_MINUTES} needs {RANKS} x "
            f"{GPU}; "
            f"run it there, or take --track {NON_RECORD}"
        )


def shards(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*_{split}_*.bin") if path.is_file())


def data_of(run: SeedRun, request: Request) -> Path:
    return request.data or Path(run.values["data_path"])


def tokenizer_of(run: SeedRun, request: Request) -> Path:
    return request.tokenizer or Path(run.values["tokenizer_path"])


def check_data(runs: Sequence[SeedRun], request: Request) -> Iterator[str]:
    """Require train and validation shards that have no file, name or content in common."""
    folder = data_of(runs[0], request)
    train, val = shards(folder, "train"), shards(folder, "val")
    for split, found in (("train", train), ("val", val)):
        if not found:
            yield (
                f"DATA_PATH={folder} holds no *_{split}_*.bin; overlap of train and validation "
                "must be "
                "checked: name the folder of the shards by --data"
            )
    for ours, theirs in ((ours, theirs) for ours in train for theirs in val):
        if ours == theirs:
            why = f"{ours.name} is read as both"
        elif filecmp.cmp(ours, theirs, shallow=False):
            why = f"{ours.name} and {theirs.name} hold the same tokens"
        else:
            continue
        yield (
            f"DATA_PATH={folder}: train and validation data overlap: {why}; they must have nothing "
            "in "
            "common: remove it from train, and train again"
        )
    yield from check_manifest(folder)
    if train and val and runs[0].log.identity("data") != runlog.UNKNOWN:
        yield from check_digests(runs[0], request)


def check_digests(run: SeedRun, request: Request) -> Iterator[str]:
    """Require that shards and tokenizer are those that the seeds were trained and scored on."""
    paths = data_of(run, request), tokenizer_of(run, request)
    values = {k: v for k, v in run.values.items() if k in tg.Config.__dataclass_fields__}
    values |= {"data_path": str(paths[0]), "tokenizer_path": str(paths[1])}
    try:
        cfg = tg.Config(**values)
        splits = tg.TokenLoader(cfg, "train"), tg.TokenLoader(cfg, "val")
        facts = tg.check_data(cfg, *splits, tg.ByteCounter(cfg))[0]
    except UserError as error:
        yield f"{error}; data of the logs must be checked: name it by --data and --tokenizer"
        return
    for name, path in zip(("data", "tokenizer"), paths, strict=True):
        if (ours := facts[f"{name}_sha256"]) != (theirs := run.log.identity(name)):
            yield (
                f"{path} has SHA-256 {ours}, the logs say {theirs} of their {name}; name what the "
                f"seeds were trained on by --{name}"
            )


def check_manifest(folder: Path) -> Iterator[str]:
    """Require that the manifest, where there is one, lists no content in both splits."""
    path = folder / "manifest.json"
    if not path.exists():
        return
    splits: dict[str, set[str]] = {}
    try:
        for name, row in runlog.parse_object(path.read_bytes()).get("files", {}).items():
            split = "val" if "_val_" in name else "train"
            splits.setdefault(str(row.get("sha256", name)), set()).add(split)
    except (OSError, ValueError, AttributeError) as error:
        yield f"{path} is damaged ({error}); prepare the data again, or move it away"
    for digest, where in splits.items():
        if len(where) > 1:
            yield (
                f"{path}: train and validation data overlap: both list sha256 "
                f"{digest}; "
                "prepare the data again, and train again"
            )


CHECKS = (check_program, check_settings, check_bytes, check_time, check_data)


def checked_runs(request: Request) -> list[SeedRun]:
    """Return the runs of all seeds; UserError names all faults at once."""
    runs = read_runs(request)
    check_faults(check_finished(runs, request))
    check_faults(fault for each in CHECKS for fault in each(runs, request))
    return runs


# ==============================================================================
# 3  FILES -- README.md, submission.json, program and logs
# ==============================================================================


def as_environment(run: SeedRun) -> dict[str, str]:
    """Return the settings that were given to a run, as its environment had them."""
    source = run.log.get("config", "source")
    named = [
        name for name in run.values if source.get(name) == "env" or name in ("recipe", "preset")
    ]
    values = {name.upper(): run.values[name] for name in named if name not in OWN}
    return {name: str(int(v)) if isinstance(v, bool) else str(v) for name, v in values.items()}


def command(run: SeedRun) -> str:
    """Return the command of one run; of absolute paths only what says which data they are."""
    given = {
        name: "/".join(Path(value).parts[-2:]) if value.startswith("/") else value
        for name, value in as_environment(run).items()
    }
    settings = " \\\n    ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
    ranks = runlog.num_ranks(run.log)
    launcher = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    return f"SEED={run.seed} \\\n    {settings} \\\n    {launcher} train_gpt.py"


def seed_table(runs: Sequence[SeedRun]) -> str:
    """One row per seed, then mean and standard deviation."""
    results = {str(run.seed): runlog.seed_result(run.log) for run in runs}
    names = list(next(iter(results.values())))
    digits = {"val_loss": 6, "val_bpb": 6, "train_seconds": 1, "eval_seconds": 1}
    columns = {name: [float(result[name]) for result in results.values()] for name in names}
    rows = [
        [seed, *(f"{result[name]:,.{digits.get(name, 0)}f}" for name in names)]
        for seed, result in results.items()
    ]
    for label, summary in (("mean", statistics.mean), ("std", runlog.spread)):
        found = [(name, summary(values)) for name, values in columns.items()]
        cells = [NONE if v is None else f"{v:,.{digits.get(name, 0)}f}" for name, v in found]
        rows.append([label, *cells])
    head = [
        "seed",
        "val_loss",
        "val_bpb",
        "artifact bytes",
        "steps",
        "train seconds",
        "evaluation seconds",
    ]
    return markdown(head, rows, 1)


def compliance(runs: Sequence[SeedRun], request: Request) -> str:
    """State the rules of the challenge, each with the figure that shows it."""
    results = [runlog.seed_result(run.log) for run in runs]
    evaluation, train = (
        max(r[name] for r in results) for name in ("eval_seconds", "train_seconds")
    )
    train_rule = "no limit on this track"
    if request.track == TEN_MINUTES:
        train_rule = f"cap {TRAIN_SECONDS:.0f}; the step that reaches it is finished"
    lines = (
        "Strict causal prefix: the probability of a token depends on the artifact and the tokens "
        "before "
        "it alone. `val_bpb` is the exact chain rule over the full validation split, normalised "
        "over the "
        "whole vocabulary.",
        "Pairs of *input* tokens only: a row of the hashed bigram table is chosen by an input "
        "token and "
        "the input token before it, never by the token that is predicted.",
        "Single pass: each token is scored once, left to right; no weight changes during "
        "evaluation.",
        "No training on validation data: no shard is in both splits, by name, file or content.",
        f"Evaluation: at most {evaluation:,.1f} seconds, all scores together (limit "
        f"{tg.EVALUATION_SECONDS}).",
        f"Training: at most {train:,.1f} seconds ({train_rule}).",
        f"Bytes: at most {max(r['artifact_bytes'] for r in results):,}, program and compressed "
        "model "
        f"(limit {tg.SIZE_LIMIT:,}); all counted code is `train_gpt.py`.",
        "What is scored is the artifact, reloaded from its file.",
    )
    return "\n".join(f"- {line}" for line in lines)


def method(run: SeedRun) -> str:
    """Say in a few sentences how the model is trained and scored."""
    text = (
        "A causal transformer reads the text left to right and predicts the next token: this "
        "stream "
        "gives `val_bpb`."
    )
    if run.values.get("diffusion_loss_weight", 0):
        text += (
            " On a part of the rows a second stream, through the same weights, reads windows in "
            "which "
            "some tokens are masked, attends within a window in both directions, and predicts the "
            "masked "
            "tokens: text diffusion, used for infill and parallel decoding. Its likelihood is a "
            "bound "
            "and is not part of the score."
        )
    return text


def readme(runs: Sequence[SeedRun], entry: Mapping[str, Any], request: Request) -> str:
    """Lay out README.md from the logs alone."""
    mean = f"{entry['val_bpb']:.6f}"
    if entry["val_bpb_std"] is not None:
        mean += f" ± {entry['val_bpb_std']:.6f}"
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    parts = [
        f"# {entry['name']}",
        str(entry["blurb"]),
        f"**val_bpb {mean}** ({seeds}; mean ± standard deviation), {entry['bytes_total']:,} bytes, "
        "of "
        f"which code {entry['bytes_code']:,}. Track {entry['track']}.",
        f"## Results\n\n{seed_table(runs)}",
        f"## Method\n\n{method(runs[0])}",
        "## Command\n\nOne run per seed; DATA_PATH and TOKENIZER_PATH name the shards and their "
        f"tokenizer.\n\n```bash\npip install -r requirements.txt\n{command(runs[0])}\n```",
        f"## Hardware\n\n{entry['hardware']}, PyTorch {entry['pytorch_version']}.",
        f"## Compliance\n\n{compliance(runs, request)}",
        "## Files\n\n`train_gpt.py` is the program that every log embeds in its first lines "
        f"(sha256 {sha256(runs[0].source)}); `train_seed*.log` are the logs; `submission.json` "
        "holds "
        "the figures above.",
    ]
    return "\n\n".join(parts) + "\n"


def date_of(runs: Sequence[SeedRun], request: Request) -> str:
    """Return the date of the package; UserError: it is none."""
    text = request.date or max(str(run.log.get("header", "time")) for run in runs)[:10]
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise UserError(f"--date={text!r} must be a date, as in 2026-01-31") from error


def entry_of(runs: Sequence[SeedRun], request: Request) -> dict[str, Any]:
    about = {**request.about, "track": request.track, "date": date_of(runs, request)}
    return runlog.submission_entry(about, [run.log for run in runs])


def log_name(run: SeedRun) -> str:
    return f"train_seed{run.seed}.log"


def write_files(folder: Path, runs: Sequence[SeedRun], request: Request) -> dict[str, Any]:
    """Fill an empty folder; return what submission.json says."""
    entry = entry_of(runs, request)
    requirements = request.program.with_name("requirements.txt")
    if not requirements.is_file():
        raise UserError(
            f"{requirements} is missing; the package needs it beside the program: add it"
        )
    shutil.copyfile(requirements, folder / "requirements.txt")
    for run in runs:
        shutil.copyfile(run.path.with_suffix(".txt"), folder / log_name(run))
    texts = {"train_gpt.py": runs[0].source, "README.md": readme(runs, entry, request)}
    texts["submission.json"] = json.dumps(entry, indent=2, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return entry


# ==============================================================================
# 4  FOUR STEPS -- does the folder work alone?
# ==============================================================================


def write_head(source: Path, target: Path) -> None:
    """Copy the first tokens of a shard, as a shard."""
    with open(source, "rb") as file:
        header = bytearray(file.read(tg.SHARD_HEADER * 4))
        tokens = file.read(HEAD_TOKENS * 2)
    header[8:12] = (len(tokens) // 2).to_bytes(4, "little")  # the third number is the count
    target.write_bytes(header + tokens)


def write_heads(source: Path, target: Path) -> None:
    """Make a folder with the head of one shard of each split: enough for a few steps."""
    target.mkdir()
    for split in ("train", "val"):
        first = shards(source, split)[0]
        write_head(first, target / f"head_{split}_000000.bin")


def environment(run: SeedRun, request: Request, scratch: Path) -> dict[str, str]:
    """Return all that the run inside the package sees: the logged settings, and few steps."""
    tokenizer = tokenizer_of(run, request)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    sizes = dict(TINY) if request.tiny else {}
    if request.tiny and run.values.get("bigram_vocab_size", 0):
        sizes["BIGRAM_VOCAB_SIZE"] = "64"
    paths = {"DATA_PATH": str(scratch / "data"), "OUT_DIR": str(scratch / "out")}
    paths["TOKENIZER_PATH"] = str(tokenizer.resolve())
    python = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **python, **as_environment(run), **QUICK, **sizes, **paths}


def execute(folder: Path, env: Mapping[str, str], timeout: float) -> None:
    """Run the program inside the folder; UserError: it failed, with the end of what it printed."""
    streams: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    argv = [sys.executable, "train_gpt.py"]
    with subprocess.Popen(argv, cwd=folder, env=env, process_group=0, **streams) as process:
        try:
            printed = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"four steps inside the package took more than --timeout={timeout:.0f} s; they "
                "must "
                "end: raise it, or take --tiny"
            ) from error
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it started
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        tail = "\n".join(printed.splitlines()[-20:])
        raise UserError(
            f"four steps inside the package ended with status {process.returncode}; the folder "
            "must "
            f"work without other files, so it was not written; the end of the output:\n{tail}"
        )


def read_scores(path: Path) -> tuple[RunLog, list[str]]:
    """Return the log of a run, and its lines with the score of the reloaded artifact."""
    try:
        text = path.with_suffix(".txt").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if re.match(r"final_\w+ val_loss:", line)]
        return runlog.read_whole_log(path), lines
    except (OSError, UserError) as error:
        raise UserError(
            f"four steps inside the package left no log ({error}); the program must write one to "
            "OUT_DIR/logs"
        ) from error


def four_steps(folder: Path, run: SeedRun, request: Request) -> dict[str, Any]:
    """Train a few steps inside the folder, alone; return what its reloaded artifact scored.

    Raises:
        UserError: the program failed, was another one, gave no finite score, or left files behind.
    """
    before, began = sorted(os.listdir(folder)), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_heads(data_of(run, request), scratch / "data")
        execute(folder, environment(run, request, scratch), request.timeout)
        found, lines = read_scores(scratch / "out" / "logs" / f"{QUICK['RUN_ID']}.jsonl")
    score = found.events.get("final", {})
    faults = []
    if found.why_left_out or not lines:
        faults.append(f"four steps inside the package: {found.why_left_out or 'no final_ line'}")
    if (other := found.get("header", "sha256")) != (ours := sha256(run.source)):
        faults.append(f"four steps inside the package ran a program of sha256 {other}, not {ours}")
    if (after := sorted(os.listdir(folder))) != before:
        faults.append(f"four steps left {sorted(set(after) - set(before))} inside the package")
    check_faults(faults)
    steps, seconds = found.get("done", "steps"), round(time.perf_counter() - began, 1)
    scores = {name: score[name] for name in ("val_loss", "val_bpb")}
    return {
        "steps": steps,
        **scores,
        "final_line": lines[-1],
        "tiny": request.tiny,
        "seconds": seconds,
    }


# ==============================================================================
# 5  MAIN -- read, check, write, try, move into place
# ==============================================================================


def folder_name(entry: Mapping[str, Any]) -> str:
    slug = re.sub(r"[^A-Za-z0-9]+", "_", str(entry["name"])).strip("_")
    return f"{entry['date']}_{slug}"


def write_package(request: Request) -> dict[str, Any]:
    """Make the package; return its path, score and what the four steps gave.

    Raises:
        UserError: a reviewer would refuse it, or it does not work alone; nothing is left behind.
    """
    runs = checked_runs(request)
    entry = entry_of(runs, request)
    target = request.out / folder_name(entry)
    if target.exists():
        raise UserError(
            f"{target} exists; a package is never overwritten: move it away, or change --name or "
            "--date"
        )
    request.out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".package-", dir=request.out))
    try:
        write_files(staging, runs, request)
        tried = four_steps(staging, runs[0], request)
        staging.chmod(0o755)  # mkdtemp lets its owner in, only
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    scores = {name: entry[name] for name in ("val_bpb", "val_bpb_std", "bytes_total", "seeds")}
    return {
        "package": str(target),
        **scores,
        "files": sorted(os.listdir(target)),
        "four_steps": tried,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: write_package(request_of(args)))


if __name__ == "__main__":
    sys.exit(main())
