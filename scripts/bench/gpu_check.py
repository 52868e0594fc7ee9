"""Check the program on a GPU and time it: one command for the first minutes on one.

    python scripts/bench/gpu_check.py --seconds 540
    python scripts/bench/gpu_check.py --baseline /path/train_gpt.py     the challenge's own script
    PRESET=cpu python scripts/bench/gpu_check.py --device cpu --seeds 0   rehearsal without a GPU

Settings come from the environment as for train_gpt.py; on a GPU the preset is 8xh100, so that a
step has the eight parts that eight devices would share. In this order: the start of the loss,
windows against attention with a dense mask, losses and gradients against the CPU, decoding; steps
of ar, direct, record and retrograde, with and without cuDNN attention, and of direct with windows
read by FlexAttention, which is compared with the dense mask, too; the time of each score,
projected to eight devices; decoding at batch 1 and 32 against cached AR; then runs of ar and record
of --seed-seconds each, seed after seed, on the text of DATA_PATH. Until then text and weights are
random, and nothing needs to be prepared. What does not fit into --seconds is left out and named.

A part that fails is a failed check, and the next one follows. Tables go to standard output and to
OUT/gpu_check.txt, with machine, data and command above them; progress to standard error. The last
line is one JSON object; exit status 1 means that a check failed. Targets are printed, not checked.
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
import functools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt as tg
from scripts import decoding
from scripts.bench import decode as bench_decode
from scripts.bench import evaluation as bench_evaluation
from scripts.bench import train as bench_train
from scripts.bench.decode import Bench
from scripts.bench.train import Place, random_text
from scripts.common import (
    Parser,
    autocast,
    error_line,
    fail,
    pick_device,
    program_sha256,
    run_command,
    table,
    to_json,
)
from scripts.study.child import ending, stop

RECIPES = ("ar", "direct", "record", "retrograde")
DEVICES = 8  # that scores are projected to
WINDOWS_TARGET = 1.35  # a step of direct with windows over one of ar
SEEDS = (1337, 42, 2026, 7, 11)
START_MARGIN = 0.1  # nats between the first loss and ln V
STEP_LINE = re.compile(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms")
ERRORS = "errors.txt"  # what a child process complained of
Row = dict[str, Any]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    parser.whole("--seconds", 540, "after which no part goes on")
    folder = "of the log (default %(default)s)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", default="gpu_check", help=folder)
    baseline = "the challenge's baseline script, for the time of its step"
    parser.add_argument("--baseline", type=Path, metavar="FILE", help=baseline)
    parser.whole("--steps", 8, "timed steps of a kind")
    parser.whole("--seeds", 3, "most seeds of ar and record; 0: none, no text is needed", 0, 5)
    parser.whole("--seed-seconds", 60, "training time of each of their runs")
    parser.device()
    args = parser.parse_args(argv)
    if args.baseline and not args.baseline.is_file():
        parser.error(f"--baseline={args.baseline} is no file; name the script, or leave it out")
    return args


class OutOfTime(Exception):
    """The time of --seconds is over."""


class Check(NamedTuple):
    """Something that must hold."""

    name: str
    holds: bool
    found: str


@dataclasses.dataclass
class Session:
    """What was found so far, and where it goes."""

    args: argparse.Namespace
    device: torch.device
    folder: Path  # for what is thrown away
    began: float = dataclasses.field(default_factory=time.monotonic)
    checks: list[Check] = dataclasses.field(default_factory=list)
    tables: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)
    header: Row = dataclasses.field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return float(self.args.seconds - (time.monotonic() - self.began))

    def check(self, name: str, holds: bool, found: str) -> None:
        """Note whether something holds."""
        self.checks.append(Check(name, bool(holds), found))
        print(f"{name}: {'holds' if holds else 'FAILED'} ({found})", file=sys.stderr, flush=True)

    def add(self, title: str, row: Row) -> None:
        """Add a row to a table."""
        self.tables.setdefault(title, []).append(row)
        print(f"{title}: {row}", file=sys.stderr, flush=True)

    def part(self, name: str, work: Callable[[], object]) -> None:
        """Do a part of the work, unless the time is over; what it raises is a failed check."""
        if self.left <= 0:
            self.left_out.append(name)
            return
        print(f"{name} ({self.left:.0f} s left)", file=sys.stderr, flush=True)
        try:
            work()
        except Exception as error:  # the next part is to be seen, too
            if self.left <= 0:  # libraries may wrap OutOfTime
                self.left_out.append(f"{name} (stopped)")
            else:
                why = " ".join(str(error).split())[:300]
                self.check(name, False, f"{type(error).__name__}: {why}")
        finally:
            self.write()

    def text(self) -> str:
        """Lay out everything."""
        head = "\n".join(f"{name}: {value}" for name, value in self.header.items())
        checks = [c._asdict() | {"holds": "yes" if c.holds else "NO"} for c in self.checks]
        parts = [head, table(checks, 3)] if checks else [head]
        parts += [f"{title}\n\n{table(rows, 1, 2)}" for title, rows in self.tables.items()]
        if self.left_out:
            parts.append(f"Left out, since --seconds was over: {', '.join(self.left_out)}.")
        return "\n\n".join(parts)

    def write(self) -> None:
        """Write the log anew."""
        tg.atomic_write(self.args.out / "gpu_check.txt", f"{self.text()}\n".encode(), "log")

    def result(self) -> Row:
        """Everything as one object."""
        found: Row = dict(self.header, seconds=round(time.monotonic() - self.began, 1))
        found |= {"checks": [check._asdict() for check in self.checks], "left_out": self.left_out}
        passed = bool(self.checks) and all(check.holds for check in self.checks)
        return found | {"passed": passed, "tables": self.tables}


def environment(at: Session, recipe: str, **more: Any) -> dict[str, str]:
    """Settings of a recipe on this device, for text in a folder of this session."""
    env = {**os.environ, "RECIPE": recipe, "DATA_PATH": str(at.folder / "text")}
    env |= {"OUT_DIR": str(at.folder), "RUN_ID": "gpu_check", "RESUME": "no"}
    env["DEVICE"] = at.device.type
    if at.device.type == "cuda":
        env.setdefault("PRESET", "8xh100")
    return env | {name.upper(): str(value) for name, value in more.items()}


@contextlib.contextmanager
def opened(at: Session, recipe: str, **more: Any) -> Iterator[Place]:
    """Open a run of a recipe on random text, at its start."""
    cfg = tg.Config.from_env(environment(at, recipe, **more))[0]
    folder = Path(cfg.data_path)
    folder.mkdir(parents=True, exist_ok=True)
    random_text(folder, cfg, max(2 * cfg.train_batch_tokens, 4 * cfg.train_seq_len) + 1)
    torch._dynamo.reset()
    if at.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tg.Run.start(cfg) as run:
        run.log.active = False
        state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
        yield Place(tg, state, tg.Objective(cfg, run, state.model), run, 0.0)


# ==============================================================================
# 1  CHECKS
# ==============================================================================


@torch.no_grad()
def randomise(model: tg.GPT) -> None:
    """Give every weight a value: a fresh model's zeros hide what reaches the logits, and its blocks
    must say more than the embedding, which predicts its own token.
    """
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator) * 2 / p.shape[-1] ** 0.5
        p.add_(noise.to(p.device))


def rows_of(place: Place, count: int = 2) -> Tensor:
    """Take the first rows of the text, (count, T + 1)."""
    found: Tensor = place.state.loader.rows(0, count, place.state.cfg.train_seq_len)
    return found.to(place.run.device)


def check_start(at: Session) -> None:
    """Check that an untrained model knows nothing."""
    with opened(at, "ar") as place:
        rows, cfg = rows_of(place), place.state.cfg
        with place.run.autocast(), torch.no_grad():
            nats = tg.token_nll_causal(place.state.model, rows).mean().item()
    expected = math.log(cfg.vocab_size)
    found = f"{nats:.4f} nats, ln V = {expected:.4f}"
    at.check("first loss of ar is ln V", abs(nats - expected) < START_MARGIN, found)


def dense_mask(T: int, size: int, causal: bool, device: torch.device) -> Tensor:
    """Which of T clean and N noisy keys each noisy query reads, from the definition, (N, T + N):
    window w reads the clean tokens before the one at w S, and itself.
    """
    window = torch.arange(T // size, device=device).repeat_interleave(size + 1)  # of each query
    clean = torch.arange(T, device=device) < window[:, None] * size
    own = window == window[:, None]
    return torch.cat((clean, own.tril() if causal else own), dim=1)


def loss_and_gradients(place: Place, objective: Any, rows: Tensor, size: int) -> tg.Pair:
    """The denoising loss of windows of rows, and all gradients of it, joined."""
    model = place.state.model
    model.zero_grad(set_to_none=True)
    loss, terms = objective(rows, 0, size, tg.ScheduleState(0, 1.0, 1.0))
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return terms[1:], torch.cat(grads)


@contextlib.contextmanager
def dense_attention() -> Iterator[None]:
    """Let attention compute a mask as a whole, by products and a softmax."""
    split = tg.split_mask
    try:
        tg.split_mask = lambda mask, size, most=1: split(mask, size, 1)  # one group of windows
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        tg.split_mask = split


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the second; infinite if it is not finite."""
    far = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()
    return float(far) if math.isfinite(far) else math.inf


def check_windows(at: Session, kind: str = "groups") -> None:
    """Compare windows as they are trained with attention in fp32 under a dense mask."""
    alone: Row = {"mercury_clean_loss_weight": 0.0, "diffusion_loss_weight": 1.0}
    alone |= {"window_attention": kind, "diffusion_row_frac": 1.0}
    with opened(at, "direct", **alone) as place:
        randomise(place.state.model)
        rows, cfg = rows_of(place), place.state.cfg
        eager = dataclasses.replace(place.run, cfg=dataclasses.replace(cfg, compile="0"))
        reference = tg.Objective(cfg, eager, place.state.model)
        limit = 0.05 if at.device.type == "cuda" else 1e-4  # bf16, fp32
        for size in place.objective.masks:
            mask = dense_mask(cfg.train_seq_len, size, cfg.diffusion_causal, rows.device)
            reference.masks = {size: mask}
            with dense_attention():
                loss, grads = loss_and_gradients(place, reference, rows, size)
            with place.run.autocast():
                ours, our_grads = loss_and_gradients(place, place.objective, rows, size)
            far = distance(ours, loss), distance(our_grads, grads)
            found = f"relative distance of the loss {far[0]:.1e}, of gradients {far[1]:.1e}"
            name = f"windows of {size} in {kind} equal a dense mask"
            at.check(name, max(far) < limit, f"{found}; limit {limit:.0e}")


def losses_on(at: Session, device: str) -> list[float]:
    """Both losses of a batch of two rows by the whole objective, on a device."""
    T = tg.Config.from_env(environment(at, "direct"))[0].train_seq_len
    small = {"train_batch_tokens": 2 * T, "micro_batches": 1, "device": device}
    if device == "cpu":
        small["window_attention"] = "groups"
    with opened(at, "direct", **small) as place:
        randomise(place.state.model)
        size, now = max(place.objective.masks), tg.ScheduleState(0, 1.0, 1.0)
        with place.run.autocast():
            terms = place.objective(rows_of(place), 0, size, now)[1]
        return [float(term) for term in terms.tolist()]


def check_against_cpu(at: Session) -> None:
    """Compare the losses of compiled bf16 with those of the CPU in fp32."""
    ours, theirs = losses_on(at, at.device.type), losses_on(at, "cpu")
    far = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    text = " and ".join(f"{a:.4f} (CPU {b:.4f})" for a, b in zip(ours, theirs, strict=True))
    at.check("losses equal the CPU's", far < 0.01, text)


def check_decoding(at: Session) -> None:
    """Check that each decoded token has the highest logit, within rounding, given all before it."""
    with opened(at, "direct") as place:
        model = place.state.model.eval()
        randomise(model)
        T = place.state.cfg.train_seq_len
        rows, stop_at = rows_of(place)[:, : T // 2], T // 2 + min(32, T // 4)
        count = stop_at - rows.shape[1]
        for mode in ("ar", "speculative"):
            with autocast(at.device), torch.no_grad():
                out = decoding.infill(model, rows, rows[:, :0], count, decoding.MODES[mode]).ids
                logits = model.forward_causal(out[:, :-1])[0][:, -count:].float()
            chosen = logits.gather(-1, out[:, -count:, None])[..., 0]
            behind = (logits.max(-1).values - chosen).max().item()
            limit = 0.1 if at.device.type == "cuda" else 1e-3
            found = f"at most {behind:.1e} below the best logit; limit {limit:.0e}"
            at.check(f"decoding by {mode} is greedy", behind < limit, found)


# ==============================================================================
# 2  TIMES
# ==============================================================================


def time_recipe(at: Session, recipe: str, cudnn: bool | None, kind: str = "groups") -> None:
    """Time steps of a recipe; `cudnn`: let attention use it or not, None: as the program has it."""
    backends: Any = torch.backends.cuda
    with opened(at, recipe, window_attention=kind) as place:
        if cudnn is not None:
            backends.enable_cudnn_sdp(cudnn)
        cfg = place.state.cfg
        start = cfg.diffusion_start_frac if cfg.diffusion else 1.0
        usual = cudnn is None and kind == "groups"
        profiled = at.device.type == "cuda" and recipe == "direct" and usual
        task = {"steps": at.args.steps, "profile": profiled}
        shares = {"clean": start, "windows": 1 - start}
        found = bench_train.time_kinds(place, task, shares)
        now = tg.ScheduleState(place.state.step, 1.0, 1.0)
        sums = tg.train_step(place.state, place.objective, now)
        losses = tg.check_finite(place.state, sums)
    name = attention_name(at, cudnn) if kind == "groups" else kind
    row: Row = {"recipe": recipe, "attention": name}
    for kind in bench_train.KINDS:
        row[f"{kind}_ms"] = 1e3 * statistics.median(found[kind]) if kind in found else None
    row |= {"tokens": cfg.train_batch_tokens, "peak_mib": found["peak_mib"]}
    at.add("Steps", row | {"late_graphs": found["graphs"]} | losses)
    for kind, lines in found.get("profile", {}).items():
        at.tables[f"Operators of a step of direct, {kind}"] = lines


def attention_name(at: Session, cudnn: bool | None) -> str:
    """Say which attention a row is of."""
    if at.device.type != "cuda":
        return "cpu"
    return "default" if cudnn is None else "cuDNN" if cudnn else "no cuDNN"


def targets(at: Session) -> None:
    """Compare steps with what they should take."""
    rows = [row for row in at.tables.get("Steps", []) if row["attention"] in ("default", "cpu")]
    step = {row["recipe"]: row for row in rows}
    if "ar" not in step:
        return
    ar, baseline = step["ar"]["clean_ms"], at.tables.get("Baseline", [{}])[0].get("step_ms")
    for name, ours, most in (
        ("ar, against the baseline script", ar, baseline),
        (
            f"direct with windows, {WINDOWS_TARGET} x ar",
            step.get("direct", {}).get("windows_ms"),
            WINDOWS_TARGET * ar,
        ),
    ):
        if ours is not None and most is not None:
            row = {"target": name, "ms": ours, "at most": most}
            at.add("Targets", row | {"met": "yes" if ours <= most else "NO"})


def time_baseline(at: Session) -> None:
    """Time steps of the challenge's baseline script, at the same batch, and end it after them."""
    cfg = tg.Config.from_env(environment(at, "ar"))[0]
    env = dict(os.environ, TRAIN_BATCH_TOKENS=str(cfg.train_batch_tokens), ITERATIONS="1000")
    env |= dict(VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY="10", WARMUP_STEPS="3", RUN_ID="baseline")
    env["MAX_WALLCLOCK_SECONDS"] = str(max(int(at.left), 1))
    seen = list[tuple[int, int]]()  # step, milliseconds
    with child(at, [sys.executable, str(at.args.baseline.resolve())], env) as process:
        for line in process.stdout:
            if (match := STEP_LINE.search(line)) and int(match[1]) >= 10:
                seen.append((int(match[1]), int(match[2])))
            if len(seen) > 3:
                break
    if len(seen) < 2:
        why = error_line((at.folder / ERRORS).read_text(encoding="utf-8"))
        fail(
            f"{at.args.baseline} printed no `step:N/M train_loss:.. train_time:..ms` lines ({why})"
        )
    steps, ms = seen[-1][0] - seen[0][0], seen[-1][1] - seen[0][1]
    at.add("Baseline", {"script": str(at.args.baseline), "step_ms": ms / steps})


@contextlib.contextmanager
def child(at: Session, command: Sequence[str], env: Mapping[str, str]) -> Iterator[Any]:
    """Start a process whose output is read here; it does not outlive the block."""
    with open(at.folder / ERRORS, "w", encoding="utf-8") as errors:
        streams: Any = dict(stdout=subprocess.PIPE, stderr=errors, text=True, cwd=at.folder)
        process: Any = subprocess.Popen(command, env=dict(env), process_group=0, **streams)
        try:
            yield process
        finally:
            stop(process, 10.0)
            process.stdout.close()


def time_scores(at: Session) -> None:
    """Time every score of direct on a device's share, and project it to eight devices."""
    cfg = tg.Config.from_env(environment(at, "direct"))[0]
    with tg.Run.start(cfg) as run:
        run.log.active = False
        tokens = bench_evaluation.FINEWEB
        for job in bench_evaluation.jobs("direct", cfg, run, None, tokens, DEVICES):
            for _ in range(2):  # the first warms up
                bench_evaluation.time_job(job, run)
            row = bench_evaluation.row_of(job, 1)
            projected = {f"seconds_on_{DEVICES}": row.pop("whole_seconds")}
            at.add("Scores", {"score": row.pop("score")} | row | projected)


def time_decoding(at: Session) -> None:
    """Time the modes of decoding at batch 1 and 32 against cached AR, on random weights."""
    with opened(at, "direct") as place:
        model, T = place.state.model.eval(), place.state.cfg.train_seq_len
        randomise(model)
        shape = dict(prefix=T // 8, target=min(64, T // 4), repeats=1)
        shape["repeats"] = 3 if at.device.type == "cuda" else 1
        length = shape["prefix"] + 2 * shape["target"]
        rows = torch.cat([place.state.loader.rows(i * T, 1, length - 1) for i in range(3)])
        rows = rows.repeat(11, 1)[:32].to(at.device)
        bench = Bench(model, None, None, rows, **shape)
        plan = argparse.Namespace(
            batch=[1, 32], passes=[8], temperature=0.0, no_lookup=False, **shape
        )
        for batch in plan.batch:
            plan.batch = [batch]
            few = bench._replace(rows=rows[: max(batch, 2)])
            jobs = bench_decode.plan_jobs(["ar", "speculative", "refine"], plan)
            with autocast(at.device):
                for row in bench_decode.measure(few, jobs, Silent()):
                    kept = ("mode", "passes", "batch", "tokens_per_second", "times_cached_ar")
                    at.add("Decoding", {name: row[name] for name in kept})


class Silent:
    """In place of a progress bar."""

    def update(self, count: int = 1) -> None:
        """Show nothing."""


# ==============================================================================
# 3  RUNS
# ==============================================================================


def train_seed(at: Session, recipe: str, seed: int) -> None:
    """Run the program itself: train, export, score; its log goes to OUT."""
    env = {**os.environ, "RECIPE": recipe, "SEED": str(seed), "DEVICE": at.device.type}
    env |= {"OUT_DIR": str((at.args.out / "runs").resolve()), "RUN_ID": f"{recipe}_seed{seed}"}
    env |= {"MAX_WALLCLOCK_SECONDS": str(at.args.seed_seconds), "EVAL_STRIDE": "0"}
    env.setdefault("NELBO_SEQUENCES", "64")
    env |= {"PARALLEL_EVAL_EXAMPLES": "0", "RESUME": "no"}
    cfg = tg.Config.from_env(env)[0]
    for name in ("data_path", "tokenizer_path"):  # the process runs in another folder
        env[name.upper()] = str(Path(getattr(cfg, name)).resolve())
    began = time.monotonic()
    with child(at, [sys.executable, str(Path(tg.__file__).resolve())], env) as process:
        lines = list(process.stdout)
        status = process.wait()
    errors = (at.folder / ERRORS).read_text(encoding="utf-8")
    if status:
        fail(f"{recipe} seed {seed}: {error_line(errors)} ({ending(status)})")
    final = re.findall(r"final_\S+_exact val_loss:(\S+) val_bpb:(\S+)", "".join(lines))
    bounds = re.findall(r"nelbo_bpb window:16 bound:(\S+)", "".join(lines))
    steps = re.findall(r"^step:(\d+)/", "".join(lines), re.MULTILINE)
    loss, bpb = map(float, final[0])
    row: Row = {"recipe": recipe, "seed": seed, "steps": int(steps[-1]), "val_bpb": bpb}
    row |= {"bound_16": float(bounds[0]) if bounds else None}
    at.add("Runs", row | {"seconds": time.monotonic() - began})
    uniform = math.log(cfg.vocab_size)
    what = f"val_bpb {bpb:.4f}, loss {loss:.4f}; a uniform predictor has {uniform:.4f}"
    at.check(f"{recipe} seed {seed} learns", loss < uniform, what)


def train_seeds(at: Session) -> None:
    """Run both recipes with one seed after the other, as long as the time of a run is left."""
    needed = 1.3 * at.args.seed_seconds + 5
    for seed in SEEDS[: at.args.seeds]:
        for recipe in ("ar", "record"):
            name = f"{recipe} seed {seed}"
            if at.left < needed:
                at.left_out.append(name)
            else:
                at.part(name, functools.partial(train_seed, at, recipe, seed))
                spent = [row["seconds"] for row in at.tables.get("Runs", [])]
                needed = max([needed, *spent])


# ==============================================================================
# 4  COMMAND
# ==============================================================================


def about(at: Session) -> Row:
    """Machine, versions, data and command."""
    cuda = at.device.type == "cuda"
    found: Row = {"time": time.strftime("%FT%TZ", time.gmtime()), "command": " ".join(sys.argv)}
    found |= {"machine": tg.machine_name(at.device), "device": str(at.device)}
    found |= {"gpus": torch.cuda.device_count(), "torch": torch.__version__}
    cudnn: Any = torch.backends.cudnn
    found |= {"cuda": torch.version.cuda, "cudnn": cudnn.version() if cuda else None}
    settings = {k: v for k, v in os.environ.items() if k.lower() in vars(tg.Config())}
    found |= {"settings": settings, "program_sha256": program_sha256()}
    if at.args.seeds:  # all that is wrong with the text is said before anything is timed
        cfg = tg.Config.from_env({**os.environ, "RECIPE": "record"})[0]
        loaders = tg.TokenLoader(cfg, "train"), tg.TokenLoader(cfg, "val")
        facts, _ = tg.check_data(cfg, *loaders, tg.ByteCounter(cfg))
        found |= {"data": cfg.data_path, "data_sha256": facts["data_sha256"]}
    else:
        found["data"] = "random tokens"
    return found


def alarm(_number: int, _frame: object) -> None:
    """End the part that runs."""
    raise OutOfTime("the time of --seconds is over")


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this thread after some seconds."""
    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work(at: Session) -> None:
    """Do all parts, the most telling first."""
    at.part("start of the loss", functools.partial(check_start, at))
    at.part("windows against a dense mask", functools.partial(check_windows, at))
    kinds = ("flex",) if at.device.type == "cuda" else ()  # a CPU has no gradient of it
    for kind in kinds:
        name = f"windows in {kind} against a dense mask"
        at.part(name, functools.partial(check_windows, at, kind))
    at.part("losses against the CPU", functools.partial(check_against_cpu, at))
    at.part("decoding", functools.partial(check_decoding, at))
    if at.args.baseline:
        at.part("baseline", functools.partial(time_baseline, at))
    for cudnn in (None, True, False) if at.device.type == "cuda" else (None,):
        for recipe in RECIPES:
            name = f"steps of {recipe}, {attention_name(at, cudnn)}"
            at.part(name, functools.partial(time_recipe, at, recipe, cudnn))
        if cudnn is None:
            for kind in kinds:
                name = f"steps of direct, {kind}"
                at.part(name, functools.partial(time_recipe, at, "direct", None, kind))
            targets(at)
            at.part("scores", functools.partial(time_scores, at))
            at.part("speed of decoding", functools.partial(time_decoding, at))
    train_seeds(at)


def run(args: argparse.Namespace) -> Row:
    """Check and time everything; print the tables."""
    with tempfile.TemporaryDirectory() as name:
        at = Session(args, pick_device(args.device), Path(name))
        at.header = about(at)
        at.write()
        with contextlib.suppress(OutOfTime), limited(max(at.left, 0.01)):
            work(at)
        at.write()
    print(at.text() + "\n")
    found = at.result()
    tg.atomic_write(args.out / "gpu_check.json", f"{to_json(found)}\n".encode(), "result")
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args), lambda found: 0 if found["passed"] else 1)


if __name__ == "__main__":
    sys.exit(main())
