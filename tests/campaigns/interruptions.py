"""Campaigns kills and ranks: a run is ended at a random instant and resumed until it is done."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.campaigns.inputs import Inputs
from tests.campaigns.processes import (
    GRACE_SECONDS,
    Limits,
    Outcome,
    processes_of,
    send,
    spawn,
)
from tests.campaigns.tries import ENDED_BY_SIGNAL, Try, last_line, result
from tests.conftest import ROOT

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# A checkpoint every step, so that most instants lie in or right after one.
OFTEN = {"checkpoint_seconds": 1e-9, "resume": "auto"}
PROGRAM = str(ROOT / "train_gpt.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PROGRAM]
RANK_SETTINGS = OFTEN | {"micro_batches": 2, "iterations": 24, "warmdown_iters": 8}
# torchrun gives ranks 30 s to end; gloo notices a lost rank at once.
RANKS_SECONDS = 120.0
NAMED_RANK = re.compile(r"rank[\s:=]*\[?\d", re.IGNORECASE)


class Shot:
    """Sends a signal once: after so many seconds, or when a file is being written."""

    def __init__(self, number: int, seconds: float, folder: Path, writes: int) -> None:
        self.number, self.folder = number, folder
        self.at, self.writes = time.monotonic() + seconds, writes
        self.seen, self.sent = "", False

    def __call__(self, pid: int) -> None:
        if not self.sent and self.due():
            self.sent = True
            send(pid, self.number)

    def due(self) -> bool:
        if not self.writes:
            return time.monotonic() >= self.at
        # An unfinished file is there for a millisecond: look as often as the limits allow.
        for _ in range(20):
            found = unfinished(self.folder)
            if found and found[0] != self.seen:
                self.seen = found[0]
                self.writes -= 1
                if not self.writes:
                    return True
        return False


def unfinished(folder: Path) -> list[str]:
    """Files that are being written into OUT_DIR, each with its inode: they have other names."""
    known = (".ckpt", ".ptz", ".jsonl", ".txt", ".lock")
    found = list[str]()
    for path in (folder / "out", folder / "out" / "checkpoints"):
        with contextlib.suppress(OSError):
            entries = [entry for entry in os.scandir(path) if not entry.is_dir()]
            found += [f"{e.name} {e.inode()}" for e in entries if not e.name.endswith(known)]
    return sorted(found)


@functools.cache
def undisturbed(inputs: Inputs) -> tuple[Path, Outcome]:
    return inputs.run("undisturbed", **OFTEN)


def kills(t: Try) -> None:
    """End a run once or twice, from the start of the process to its last line, and resume it."""
    folder, whole = undisturbed(t.inputs)
    env, real = t.inputs.env(**OFTEN), t.number % 6 == 5
    start = t.inputs.start_seconds if real else 0.0
    for _ in range(t.draw.choice((1, 1, 2))):
        number, writes = t.draw.choice(SIGNALS), t.draw.choice((0, 0, t.draw.randrange(1, 12)))
        seconds = t.draw.uniform(0, start + 1.1 * whole.seconds)
        place = f"at write {writes}" if writes else f"after {seconds:.3f} s"
        kind = "python train_gpt.py" if real else "main()"
        t.note(f"{signal.Signals(number).name} to {kind} {place}")
        shot = Shot(number, seconds, t.folder, writes)
        outcome = run_once(t, env, real, shot)
        if real and outcome.err.strip() == "KeyboardInterrupt":
            continue  # Python's own word, with status 1, before the first line of the program
        # The last one: before the program has begun to watch for it.
        allowed = (0, -number) if number == signal.SIGKILL else (0, 2, *ENDED_BY_SIGNAL, -number)
        t.judge(outcome, ["signal", "interrupted"], allowed)
    outcome = run_once(t, env, real, None)
    t.judge_run(outcome, [], (0,))
    t.same(result(folder), "resumed")


def run_once(t: Try, env: dict[str, str], real: bool, watch: Shot | None) -> Outcome:
    if real:
        return t.count(spawn([sys.executable, PROGRAM], t.folder, env, Limits(), watch))
    return t.train(env, Limits(), watch)


class RankShot(Shot):
    """Sends a signal to one rank or to the launcher, counted from when that process is there."""

    def __init__(self, number: int, seconds: float, folder: Path, rank: str) -> None:
        super().__init__(number, seconds, folder, 0)
        self.rank, self.wait = rank, seconds
        self.target = 0  # its process, once it is there

    def __call__(self, pid: int) -> None:
        if not self.target:
            found = [(p, env) for p, env in processes_of(self.folder) if p != pid]
            named = [p for p, env in found if env.get("RANK") == self.rank]
            self.target = (pid if found else 0) if self.rank == "launcher" else sum(named[:1])
            self.at = time.monotonic() + self.wait
        elif not self.sent and self.due():
            self.sent = True
            send(self.target, self.number)


def launch(t: Try, watch: Callable[[int], object] | None = None) -> Outcome:
    env, argv = t.inputs.env(**RANK_SETTINGS), [sys.executable, *LAUNCH]
    outcome = t.count(spawn(argv, t.folder, env, Limits(seconds=RANKS_SECONDS), watch))
    check_leftovers(t)
    return outcome


def check_leftovers(t: Try) -> None:
    """Wait until every process of a try has ended; one that does not is ended, and a fault."""
    until = time.monotonic() + GRACE_SECONDS + 30
    while (left := list(processes_of(t.folder))) and time.monotonic() < until:
        time.sleep(0.1)
    for pid, env in left:
        t.fault(f"hang: process {pid} (RANK={env.get('RANK')}) is still there after the launcher")
        send(pid, signal.SIGKILL)


@functools.cache
def undisturbed_ranks(inputs: Inputs) -> tuple[Path, Outcome]:
    folder = inputs.folder / "undisturbed_ranks"
    argv = [sys.executable, *LAUNCH]
    outcome = spawn(argv, folder, inputs.env(**RANK_SETTINGS), Limits(seconds=RANKS_SECONDS))
    if outcome.status:
        raise RuntimeError(f"two ranks: status {outcome.status}: {outcome.err[-2000:]}")
    return folder, outcome


def ranks(t: Try) -> None:
    """End one of two ranks, or their launcher; then resume both."""
    folder, whole = undisturbed_ranks(t.inputs)
    number, rank = t.draw.choice(SIGNALS), t.draw.choice(("0", "1", "launcher"))
    seconds = t.draw.uniform(0, whole.seconds)
    t.note(f"{signal.Signals(number).name} to rank {rank} {seconds:.3f} s after its start")
    shot = RankShot(number, seconds, t.folder, rank)
    outcome = launch(t, shot)
    if outcome.ended:
        t.fault(f"hang: over its {outcome.ended} ({outcome.seconds:.0f} s)")
    if of_program(outcome.err):
        t.fault(f"Traceback of the program: {last_line(outcome.err)}")
    # A launcher that gets a signal says so itself; it may end its ranks while they start.
    named = NAMED_RANK.search(outcome.err) or (rank == "launcher" and "got signal" in outcome.err)
    by_launcher = rank == "launcher" and number == signal.SIGKILL
    if outcome.status and not by_launcher and not named:
        t.fault(f"no line names a rank: {last_line(outcome.err)}")
    outcome = launch(t)
    t.judge_run(outcome, [], (0,))
    t.same(result(folder), "resumed")


def of_program(printed: str) -> bool:
    """Whether a traceback is the program's own; the launcher writes one of its own, too."""
    parts = printed.split("Traceback (most recent call last)")[1:]
    own = [part for part in parts if "train_gpt.py" in part.split("Error")[0]]
    return any("torch/distributed/run.py" not in part for part in own)
