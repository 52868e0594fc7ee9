"""Run recipes x seeds at one budget, one process a run, and lay the scores beside the published ones.

    python scripts/sweep.py defects --seeds 1337,42,2026 --seconds 600
    python scripts/sweep.py td_control td_late05 --steps 400 --set MICRO_BATCHES=2 --out out/late
    python scripts/sweep.py all --dry-run        every row: its settings, and what was chosen where none is published

Names are rows or ladders. DATA_PATH, PRESET and the like come from the environment, as for train_gpt.py. The same
command again goes on: finished runs are skipped, and one that was cut off resumes. Rows with equal settings share a
run. Results are OUT/sweep.jsonl and OUT/logs; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import report
from tqdm import tqdm

if TYPE_CHECKING:
    from train_gpt import Config

PROGRAM = Path(__file__).resolve().parents[1] / "train_gpt.py"
sys.path.insert(0, str(PROGRAM.parent))

# 1  ROWS -- settings over a recipe of train_gpt.RECIPES or over another row; never a size =============================


class Row(NamedTuple):
    """One recipe: what it changes, what was chosen where its description leaves a setting open, what it scored."""

    base: str  # a recipe or another row
    note: str
    published: Mapping[str, float]  # val_bpb by phase; FineWeb, one H100 for 180 s unless said
    settings: Mapping[str, Any]


def row(base: str, note: str, published: Mapping[str, float] | None = None, /, **settings: Any) -> Row:
    return Row(base, note, published or {}, settings)


LATE = dict(diffusion_start_frac=0.75)  # "late" has no published number: the last quarter of a run
PLAIN = dict(self_condition="none", mercury_task_mode="none")  # before predictions were fed back and masks had tasks

# fmt: off
ROWS: dict[str, Row] = {
    "direct": row("direct", "this project's default"),
    "ar": row("ar", "the challenge's naive baseline"),
    "retrograde": row("retrograde", "the predecessor's submission", {"8xH100, 600 s": 1.4564}),
    # "Mercury in Retrograde", phases 1 and 2: a denoising loss beside the causal one, from step 100 as submitted.
    "td_control": row("ar", "next-token loss alone", {"1": 2.0027, "2": 1.9997, "2, corruption": 2.0035}),
    "td_span15": row(
        "retrograde", "weight not published: that of the next-token loss; masked spans of 8, to meet 15 % at any T",
        {"1": 2.1725}, mercury_clean_loss_weight=1.0, diffusion_corruption_mode="mask", diffusion_regions="spans",
        diffusion_span_len=8, diffusion_spans_per_seq=64, diffusion_progressive=False, diffusion_min_mask_ratio=0.0,
        diffusion_max_mask_ratio=0.15, **PLAIN),
    "td_span30": row("td_span15", "as td_span15", {"1": 2.1831}, diffusion_max_mask_ratio=0.3),
    "td_prog15": row("td_span15", "start of the ramp not published: 0", {"1": 2.1752}, diffusion_progressive=True),
    "td_prog30": row("td_span30", "start of the ramp not published: 0", {"1": 2.1893}, diffusion_progressive=True),
    "td_late02": row(
        "td_span15", "rate not published: 15 % spans; late: last quarter", {"2": 2.0437}, diffusion_loss_weight=0.02,
        **LATE),
    "td_late05": row("td_late02", "as td_late02", {"2": 2.0485}, diffusion_loss_weight=0.05),
    "td_late05p": row("td_late05", "progressive from 0", {"2": 2.0489}, diffusion_progressive=True),
    "td_late10": row("td_late02", "as td_late02", {"2": 2.0489}, diffusion_loss_weight=0.1),
    "td_cons05": row(
        "td_late05", "05 read as the weight; 15 % spans", {"2": 2.0477}, diffusion_loss="consistency"),
    "td_hyb05": row(
        "td_late05", "5 % read as the corruption rate, weight and start as td_late05", {"2": 2.0515},
        diffusion_corruption_mode="hybrid", diffusion_max_mask_ratio=0.05),
    "td_hyb05m": row("td_hyb05", "mask-heavier read as 80 % masks", {"2": 2.0503}, diffusion_hybrid_mask_prob=0.8),
    "td_unif05": row("td_hyb05", "as td_hyb05", {"2": 2.0601}, diffusion_corruption_mode="uniform"),
    "td_unif10": row("td_unif05", "as td_hyb05, at 10 %", {"2": 2.0690}, diffusion_max_mask_ratio=0.1),
    # Phase 3: denoising is the main loss.
    "mercury_hybrid25": row(
        "retrograde", "tokens drawn one by one; next-token weight 0.1 as submitted", {"3": 3.5492},
        diffusion_regions="iid", diffusion_progressive=False, diffusion_max_mask_ratio=0.25, **PLAIN),
    "mercury_mask25": row(
        "mercury_hybrid25", "pure denoising read as no next-token loss", {"3": 12.9566},
        mercury_clean_loss_weight=0.0, diffusion_corruption_mode="mask"),
    "mercury_uniform50": row(
        "mercury_hybrid25", "as mercury_hybrid25", {"3": 3.5424}, diffusion_corruption_mode="uniform",
        diffusion_max_mask_ratio=0.5),
    "mercury_hybrid50p": row(
        "mercury_hybrid25", "from 25 %", {"3": 3.5412}, diffusion_progressive=True, diffusion_max_mask_ratio=0.5),
    "mercury_auxlate": row(
        "mercury_hybrid25", "next-token weight 1, denoising 0.05 in the last quarter", {"3": 2.0131, "3b": 2.0150},
        mercury_clean_loss_weight=1.0, diffusion_loss_weight=0.05, **LATE),
    # Phase 3b has two rows under names of phase 3; here they end in _mix. "sc" is the submitted self-conditioning.
    "mercury_uniform50_mix": row(
        "mercury_uniform50", "published as mercury_uniform50; weaker self-conditioning read as half of the windows",
        {"3b": 3.5056}, mercury_task_mode="mixed", self_condition="commit", mercury_self_condition_prob=0.5),
    "mercury_hybrid50p_mix": row(
        "mercury_hybrid50p", "published as mercury_hybrid50p; as mercury_uniform50_mix", {"3b": 3.4987},
        mercury_task_mode="mixed", self_condition="commit", mercury_self_condition_prob=0.5),
    "mercury_uniform50_suffixsc": row(
        "mercury_uniform50_mix", "continuation only", {"3b": 3.5043}, mercury_task_mode="continuation",
        mercury_self_condition_prob=1.0),
    "mercury_hybrid50p_mixsc": row(
        "retrograde", "25 -> 50 %", {"3b": 3.4980, "3c, 600 s": 2.2261}, diffusion_max_mask_ratio=0.5),
    "mercury_hybrid50p_cont90": row(
        "mercury_hybrid50p_mixsc", "90 % continuation", {"3c, 600 s": 2.2199}, mercury_continuation_prob=0.9),
    "mercury_hybrid37p5_mixsc": row(
        "retrograde", "25 -> 37.5 %", {"3d": 3.4984, "3c, 600 s": 2.2168}, diffusion_max_mask_ratio=0.375),
    "mercury_hybrid37p5_cont85": row(
        "mercury_hybrid37p5_mixsc", "85 % continuation", {"3d": 3.4980}, mercury_continuation_prob=0.85),
    "mercury_hybrid35_mixsc": row("retrograde", "the submitted recipe", {"3d": 3.4973}),
    "mercury_hybrid35_cont85": row("retrograde", "85 % continuation", {"3d": 3.4983}, mercury_continuation_prob=0.85),
    "mercury_hybrid3125_mixsc": row("retrograde", "25 -> 31.25 %", {"3d": 3.4982}, diffusion_max_mask_ratio=0.3125),
    "mercury_hybrid37p5_2step": row(
        "mercury_hybrid37p5_mixsc", "two passes with loss after the one that is fed back",
        {"3e": 6.8082, "3e, again": 7.0219}, diffusion_passes=2),
    "mercury_hybrid37p5_2step_cont90": row(
        "mercury_hybrid37p5_2step", "90 % continuation", {"3e": 6.7054, "3e, again": 6.9992},
        mercury_continuation_prob=0.9),
    # Phase 4. What an anchor is was not published: here a block keeps its first tokens, the rest is masked.
    "ab_control": row("ar", "next-token loss alone", {"4": 1.9970}),
    "ab_block32": row(
        "retrograde", "raw: masks anywhere in a block of 32, t uniform, no next-token loss", {"4": 12.9688},
        mercury_clean_loss_weight=0.0, diffusion_corruption_mode="mask", diffusion_windows="32",
        diffusion_regions="iid", diffusion_rate="uniform", diffusion_min_mask_ratio=0.0, diffusion_max_mask_ratio=1.0,
        **PLAIN),
    "ab_anchor32": row(
        "ab_block32", "anchor read as the unmasked first tokens of a block", {"4": 12.2302},
        diffusion_regions="continuation"),
    "ab_anchor32late": row("ab_anchor32", "next-token loss alone until the last quarter", {"4": 2.3869}, **LATE),
    "ab_anchor64": row("ab_anchor32", "as ab_anchor32, blocks of 64", {"4": 12.7226}, diffusion_windows="64"),
    # PR 1194 and its ablation, named next-token share first.
    "mdlm_30_70": row("mdlm_30_70", "t uniform for the cosine schedule: same ELBO", {"180 s, RTX 5090": 3.3801}),
    "mdlm_50_50": row("mdlm_30_70", "as mdlm_30_70", mercury_clean_loss_weight=0.5, diffusion_loss_weight=0.5),
    "mdlm_70_30": row("mdlm_30_70", "as mdlm_30_70", mercury_clean_loss_weight=0.7, diffusion_loss_weight=0.3),
    "mdlm_100_0": row("ar", "no denoiser: the ar recipe"),
    "mdlm_pure": row(
        "mdlm_30_70", "no next-token loss, so val_bpb is of an untrained stream; its likelihood is the bound",
        mercury_clean_loss_weight=0.0, diffusion_loss_weight=1.0),
    # Others. As in the papers none trains the clean stream unless said: compare bounds.
    "llada": row("mdlm_pure", "1/t up to 1,000, no time input; all rows of length T", diffusion_loss_clip=1000.0),
    "bd3_4": row("mdlm_pure", "t over all of (0, 1]: the paper searches a range per data set", diffusion_windows="4"),
    "bd3_16": row("mdlm_pure", "as bd3_4", diffusion_windows="16"),
    "bd3_64": row("mdlm_pure", "as bd3_4", diffusion_windows="64"),
    "sedd_absorb": row(
        "mdlm_pure", "log-linear sigma is t uniform; with time input", diffusion_loss="score_entropy",
        time_embed_dim=32),
    "gidd_20": row(
        "mdlm_pure", "80 % masks, 20 % random; unweighted mean for the paper's reweighted ELBO",
        diffusion_corruption_mode="hybrid", diffusion_hybrid_mask_prob=0.8, diffusion_loss="mean"),
    "gaussian_emb": row(
        "mdlm_pure", "a share t of the tokens is blurred, to level t; the papers blur all; no self-conditioning",
        diffusion_corruption_mode="gaussian", diffusion_loss="mean", time_embed_dim=32),
    "tidar_8": row(
        "mdlm_30_70", "both losses weigh 1; drafts of 8 all masked", mercury_clean_loss_weight=1.0,
        diffusion_loss_weight=1.0, diffusion_loss="mean", diffusion_windows="8", diffusion_full_prob=1.0),
    # Defects of the predecessor, each put back alone into `direct`.
    "defect_causal": row("direct", "attention inside a window is causal", diffusion_causal=True),
    "defect_run": row(
        "direct", "one contiguous run of 25-35 % of a row, t uniform in it; no window at t = 1", diffusion_windows="T",
        mercury_task_mode="mixed", diffusion_min_mask_ratio=0.25, diffusion_max_mask_ratio=0.35,
        diffusion_full_prob=0.0),
    "defect_ramp": row(
        "direct", "t ramps from 0 to 1 over ITERATIONS, not over what is run; the share at t = 1 stays",
        diffusion_rate="fixed", diffusion_ramp="iterations"),
    "defect_weight": row(
        "direct", "denoising 1.0 against next-token 0.1", mercury_clean_loss_weight=0.1, diffusion_loss_weight=1.0),
    "defect_commit": row(
        "direct", "always on, 75 % of the corrupted tokens", self_condition="commit", mercury_self_condition_prob=1.0,
        mercury_self_condition_fraction=0.75),
    "defect_notime": row("direct", "the slow loops that came with it are no setting", time_embed_dim=0),
    "retrograde_bidirectional": row("retrograde", "its windows read both ways, all else kept", diffusion_causal=False),
}

LADDERS: dict[str, tuple[str, ...]] = {name: tuple(rows.split()) for name, rows in {
    "main": "ar retrograde direct",
    "phase1": "td_control td_span15 td_span30 td_prog15 td_prog30",
    "late": "td_control td_late02 td_late05 td_late05p td_late10",
    "corruption": "td_control td_cons05 td_hyb05 td_hyb05m td_unif05 td_unif10",
    "mercury": "mercury_mask25 mercury_hybrid25 mercury_uniform50 mercury_hybrid50p mercury_auxlate",
    "selfcond": "mercury_uniform50_mix mercury_hybrid50p_mix mercury_uniform50_suffixsc mercury_hybrid50p_mixsc"
                " mercury_auxlate",
    "fine": "mercury_hybrid35_mixsc mercury_hybrid37p5_cont85 mercury_hybrid3125_mixsc mercury_hybrid35_cont85"
            " mercury_hybrid37p5_mixsc mercury_hybrid50p_mixsc mercury_hybrid50p_cont90",
    "two_step": "mercury_hybrid37p5_2step mercury_hybrid37p5_2step_cont90",
    "anchored": "ab_control ab_anchor32late ab_anchor32 ab_anchor64 ab_block32",
    "mdlm": "mdlm_30_70 mdlm_50_50 mdlm_70_30 mdlm_100_0 mdlm_pure",
    "others": "llada bd3_4 bd3_16 bd3_64 sedd_absorb gidd_20 gaussian_emb tidar_8",
    "defects": "direct defect_causal defect_run defect_ramp defect_weight defect_commit defect_notime"
               " retrograde_bidirectional retrograde",
    "all": " ".join(ROWS),
}.items()}

LEFT_OUT = {
    "sedd_uniform": "the score entropy of train_gpt.py is that of absorbing noise",
    "adapt_ar": "no setting starts from another run's weights or anneals attention",
    "defect_nocache": "it concerns what decoding is compared with, and parallel_eval always compares with a cache",
}
# fmt: on


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the recipe at the root of a row, and all settings of the rows down to it."""
    base, _, _, settings = ROWS[name]
    recipe, below = resolve(base) if base in ROWS and base != name else (base, {})
    return recipe, {**below, **settings}


def as_env(settings: Mapping[str, Any]) -> dict[str, str]:
    return {k.upper(): str(int(v)) if isinstance(v, bool) else str(v) for k, v in settings.items()}


# 2  PLAN -- every run's settings are checked before the first one starts ==============================================

OWN = ("RECIPE", "SEED", "RUN_ID", "OUT_DIR", "RESUME")  # what a sweep sets in each run
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # of whatever started this process
SCORING = ("nelbo_", "parallel_eval_", "eval_seed", "export_levels")  # settings that change scores but no training


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
    """Read the command line; exits with 2 on a wrong one."""
    text = "\n".join(f"  {name:12}{' '.join(rows) if name != 'all' else 'every row'}" for name, rows in LADDERS.items())
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"ladders:\n{text}", formatter_class=shape)
    parser.add_argument("names", nargs="+", metavar="NAME", help="ladders or rows")
    parser.add_argument("--seeds", default="1337", help="list, with commas (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help="MAX_WALLCLOCK_SECONDS of each run")
    budget.add_argument("--steps", type=int, help="ITERATIONS of each run, without a limit of time")
    parser.add_argument("--nproc", type=int, default=1, help="processes a run, by torchrun (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder of the sweep (default %(default)s)")
    parser.add_argument("--any-version", action="store_true", help="keep runs of another version of train_gpt.py")
    parser.add_argument("--dry-run", action="store_true", help="show rows and settings, and run nothing")
    args = parser.parse_args(argv)
    for name in ("seconds", "nproc"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name}={value} must be above 0")
    return args


def fail(*faults: str) -> None:
    """Raise the error that `main` prints without a traceback, if there are faults."""
    from train_gpt import UserError

    if faults:
        raise UserError("\n".join(faults))


def closest(name: str, known: Iterable[str]) -> str:
    return "closest: " + (", ".join(difflib.get_close_matches(name, list(known), 3, cutoff=0.4)) or "none")


def chosen_rows(names: Sequence[str]) -> list[str]:
    """Expand ladders into rows, each once, in order; UserError names what is near an unknown one."""
    why = {name: f"is left out: {LEFT_OUT[name]}" if name in LEFT_OUT else "is no row or ladder" for name in names}
    near = {name: closest(name, [*LADDERS, *ROWS]) for name in names if name not in LADDERS and name not in ROWS}
    fail(*(f"NAME={name!r} {why[name]}; {hint}; all: --dry-run all" for name, hint in near.items()))
    return list(dict.fromkeys(row for name in names for row in LADDERS.get(name, (name,))))


def overrides(args: argparse.Namespace) -> dict[str, str]:
    """Collect the settings of the command line; UserError: not a setting, or one that a sweep sets itself."""
    from train_gpt import Config

    known, values, faults = [name.upper() for name in Config.__dataclass_fields__], dict[str, str](), []
    if args.seconds is not None:
        values["MAX_WALLCLOCK_SECONDS"] = str(args.seconds)
    if args.steps is not None:
        values |= {"ITERATIONS": str(args.steps), "MAX_WALLCLOCK_SECONDS": "0"}
    for text in args.set:
        name, equals, value = text.partition("=")
        if name in OWN:
            faults.append(f"--set {text}: a sweep sets {name} itself; use rows, --seeds and --out")
        elif not equals or name not in known:
            faults.append(f"--set {text}: must be NAME=VALUE of a setting of train_gpt.py; {closest(name, known)}")
        values[name] = value
    fail(*faults)
    return values


def configure(name: str, seed: str, given: Mapping[str, str], nproc: int) -> tuple[Config, dict[str, str], list[str]]:
    """Return settings and environment of one run, and warnings; UserError: a fault, or a given setting is the row's."""
    import train_gpt as tg

    recipe, settings = resolve(name)
    taken = sorted(given.keys() & as_env(tg.RECIPES[recipe] | settings).keys())
    fail(*(f"{key}={given[key]!r} is the row's to set; leave it out of --set and the environment" for key in taken))
    env = {**given, **as_env(settings), "RECIPE": recipe, "SEED": seed}
    cfg, _, warnings = tg.Config.from_env(env | {"WORLD_SIZE": str(nproc)})
    assert dataclasses.replace(cfg, **settings) == cfg, name  # a misspelt setting is a TypeError here
    if cfg.micro_batches % nproc:
        fail(f"--nproc={nproc} must divide MICRO_BATCHES={cfg.micro_batches}; change one of them")
    return cfg, env | {"PRESET": cfg.preset}, warnings


def plan(args: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """Lay out all runs, seed by seed so that an unfinished sweep compares whole ladders; UserError lists all faults."""
    from train_gpt import UserError

    rows, runs, folders = chosen_rows(args.names), list[Run](), dict[str, Path]()
    faults, notes = dict[str, dict[str, None]](), dict[str, dict[str, None]]()  # what is said, and of which rows
    given = {k: v for k, v in os.environ.items() if k not in (*OWN, *LAUNCHER)} | overrides(args)
    notes |= {f"{name} of the environment is not read: a sweep sets it": {} for name in OWN if name in os.environ}
    for seed in dict.fromkeys(args.seeds.split(",")):
        for name in rows:
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
    said = [[text + f" (rows: {', '.join(of)})" * bool(of) for text, of in texts.items()] for texts in (faults, notes)]
    fail(*said[0])
    return runs, said[1]


def hollow(cfg: Config) -> Iterator[str]:
    """Say where the budget takes away what a row is about."""
    if cfg.diffusion and cfg.diffusion_start_step >= cfg.iterations:
        yield f"no windows before DIFFUSION_START_STEP={cfg.diffusion_start_step}, ITERATIONS={cfg.iterations}"
    ramps = cfg.diffusion and cfg.diffusion_rate == "fixed" and cfg.diffusion_progressive
    if ramps and cfg.diffusion_ramp == "iterations" and cfg.max_wallclock_seconds == 0:
        yield "DIFFUSION_RAMP=iterations falls short only where --seconds ends a run before ITERATIONS"


# 3  RUNS -- each a process of its own; what is finished is read from its log ==========================================


def read(run: Run) -> report.RunLog:
    return report.read_log(run.log) if run.log.exists() else report.RunLog(run.folder.name)


def state_of(run: Run, version: str | None) -> str:
    """Say from its log what became of a run: done, cut off (with a checkpoint), new, or of another version.

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
            fail(f"{name.upper()}={ours!r}, but {run.folder} was made with {theirs!r}; name another --out")
    if version not in (None, log.get("header", "sha256")):
        return "other version"
    rescored = any(values[name] != getattr(run.cfg, name) for name in values if name.startswith(SCORING))
    if not log.why_left_out and not rescored:
        return "done"
    return "cut off" if (run.folder / "checkpoints" / f"{run.folder.name}.pt").exists() else "new"


def execute(run: Run, resume: bool, nproc: int, bar: Any) -> str:
    """Train one run to its end; return what it gave as its error, empty if it ended well. Ctrl-C ends it, too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    env, printed = run.env | {"RESUME": "auto" if resume else "no"}, run.folder / "printed.txt"
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(printed, "wb") as out:  # a process group of its own: it hears of Ctrl-C from here, once
        streams: Any = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, process_group=0)
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
    lines = [line for line in printed.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
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
        "parallel_eval": [{k: v for k, v in event.items() if k != "event"} for event in log.decode.values()],
        "bytes": log.get("size", "total_bytes"),
        "published": ROWS[run.row].published,
        **{name: header.get(name) for name in ("machine", "world_size", "sha256")},
        "data": Path(run.cfg.data_path).name,
    }


class Store:
    """OUT/sweep.jsonl, one line a run, those of earlier sweeps included; UserError: damaged."""

    def __init__(self, out: Path) -> None:
        self.out, self.path, self.lines = out, out / "sweep.jsonl", dict[tuple[str, str], dict[str, Any]]()
        try:
            for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
                line = json.loads(text)
                self.lines[line["row"], line["hash"]] = line
        except (ValueError, TypeError, KeyError) as error:
            fail(f"{self.path} is damaged ({error}); move it away: the runs themselves are kept")

    def put(self, run: Run, line: dict[str, Any]) -> None:
        """Rewrite the file with this line, and copy the run's logs."""
        from train_gpt import atomic_write

        self.lines[run.row, run.digest] = line
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines.values()).encode(), "results")
        (self.out / "logs").mkdir(exist_ok=True)
        for source in (run.log, run.log.with_suffix(".txt")):
            if source.exists():
                shutil.copy2(source, self.out / "logs" / source.name)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder, and take SIGTERM and a closed terminal as Ctrl-C; UserError: another sweep holds it."""
    out.mkdir(parents=True, exist_ok=True)
    names = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup stays
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
    """Run what is not finished, one after the other; yield what was done and the line of each, or its error."""
    version = None if args.any_version else hashlib.sha256(PROGRAM.read_text(encoding="utf-8").encode()).hexdigest()
    states, store, errors = {run.folder: state_of(run, version) for run in runs}, Store(args.out), dict[Path, str]()
    print("; ".join(f"{n} {state}" for state, n in Counter(states.values()).items()), file=sys.stderr)
    if "other version" in states.values():
        print("runs of another version of train_gpt.py are made anew; --any-version keeps them", file=sys.stderr)
    todo = sum(state != "done" for state in states.values())
    with tqdm(total=todo, desc="sweep", unit="run", disable=None) as bar:
        for run in runs:
            did = {"done": "skipped", "cut off": "resumed"}.get(states[run.folder], "ran")
            if did != "skipped" and run.folder not in errors:
                bar.set_postfix_str(f"{run.row} seed {run.seed}{', resumed' if did == 'resumed' else ''}")
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


# 4  TABLES ============================================================================================================


def published_cell(name: str) -> str:
    return ", ".join(f"{value:.4f} ({phase})" for phase, value in ROWS[name].published.items()) or report.NONE


def score_table(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line a row: exact bits per byte and bounds, mean and deviation over seeds, beside what is published."""
    windows = sorted({int(window) for lines in scores.values() for line in lines for window in line["bounds"]})
    body = []
    for name, lines in scores.items():
        bounds = [report.mean_cell(report.numbers(line["bounds"].get(str(w)) for line in lines)) for w in windows]
        ours = report.mean_cell([line["val_bpb"] for line in lines])
        body.append([f"`{name}`", ours, str(len(lines)), published_cell(name), *bounds])
    head = ["row", "val_bpb", "n", "published (phase)", *(f"bound, window {w}" for w in windows)]
    return report.markdown(head, body, 1)


def plan_table(runs: Sequence[Run]) -> str:
    body = []
    for name in dict.fromkeys(run.row for run in runs):
        settings = " ".join(f"`{k}={v}`" for k, v in as_env(ROWS[name].settings).items())
        seeds = " ".join(str(run.seed) for run in runs if run.row == name)
        body.append([f"`{name}`", f"`{ROWS[name].base}`", settings, ROWS[name].note, seeds, published_cell(name)])
    return report.markdown(["row", "over", "settings", "note", "seeds", "published (phase)"], body, 6)


def run_command(args: argparse.Namespace) -> int:
    import train_gpt as tg

    runs, notes = plan(args)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print(plan_table(runs))
        print(json.dumps({"rows": len({run.row for run in runs}), "runs": len(runs), "notes": notes}))
        return 0
    for read_data in (lambda c: tg.TokenLoader(c, "train"), lambda c: tg.TokenLoader(c, "val"), tg.ByteCounter):
        read_data(runs[0].cfg)  # UserError, now and not in every run
    found, interrupted = list[tuple[str, dict[str, Any]]](), False
    with alone(args.out):
        try:
            for did in sweep(runs, args):
                found.append(did)
        except KeyboardInterrupt:
            interrupted = True
    scores, failed = dict[str, list[dict[str, Any]]](), [line for _, line in found if "error" in line]
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
        print(f"interrupted with {left} of {len(runs)} runs to go; the same command goes on", file=sys.stderr)
    values = {name: [line["val_bpb"] for line in lines] for name, lines in scores.items()}
    rows = {n: {"val_bpb": statistics.mean(v), "std": report.spread(v), "n": len(v)} for n, v in values.items()}
    counts = Counter(did for did, line in found if "error" not in line)
    done = {did: counts[did] for did in ("ran", "resumed", "skipped")}
    print(json.dumps({"rows": rows, **done, "failed": failed, "interrupted": interrupted, "out": str(args.out)}))
    return 130 if interrupted else int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if a run failed, 2 after an error the user can repair, 130 after Ctrl-C."""
    args = parse_args(argv)
    from train_gpt import UserError  # here, so that --help and a mistyped option answer at once

    try:
        return run_command(args)
    except (UserError, report.ReportError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
