"""Run one command in a process of its own, within limits, and measure what it took."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch._dynamo  # noqa: F401  # the optimizer imports it: 3 s, once here, not in each fork

import train_gpt as tg

PAGE_MIB = resource.getpagesize() / 2**20
POLL_SECONDS = 0.002
GRACE_SECONDS = 15.0  # for a process that was asked to end
MARK = "CAMPAIGN_TRY"  # in the environment of every process of a try; no setting of the program
OURS = {name.upper() for name in tg.Config.__dataclass_fields__}

Watch = Callable[[int], object]  # called again and again with the id of the running process


class Limits(NamedTuple):
    """What a process may take before it is ended."""

    seconds: float = 180.0  # a busy machine needs up to one minute to import PyTorch
    mib: float = 4000.0  # resident
    address_mib: int = 0  # above what this process has; 0: no limit. Then allocations fail
    slow: bool = False  # may take longer than `seconds`: it is asked to end, and must


class Outcome(NamedTuple):
    """How a process ended."""

    status: int  # negative: by this signal
    seconds: float
    mib: float  # peak resident
    out: str
    err: str
    ended: str = ""  # why it was ended from here: "", "time", "memory", "slow"


def base_environment(folder: Path) -> dict[str, str]:
    """This environment without settings of the program, on one thread."""
    kept = {k: v for k, v in os.environ.items() if k.upper() not in OURS.union(tg.LAUNCHER)}
    return kept | {"OMP_NUM_THREADS": "1", MARK: str(folder)}


def fork(
    body: Callable[[], int | None],
    folder: Path,
    env: Mapping[str, str],
    limits: Limits = Limits(),  # noqa: B008
    watch: Watch | None = None,
    stdin: bytes = b"",
) -> Outcome:
    """Run a command's `main` in a fork of this process, which has imported all it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stdin").write_bytes(stdin)
    sys.stdout.flush()
    sys.stderr.flush()
    before = printed(folder)
    signal.pthread_sigmask(signal.SIG_BLOCK, tg.ENDING_SIGNALS)  # until the child takes them
    pid = os.fork()
    if pid == 0:
        run_child(body, folder, base_environment(folder) | dict(env), limits)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, tg.ENDING_SIGNALS)
    return follow(pid, folder, before, limits, watch)


def run_child(
    body: Callable[[], int | None], folder: Path, env: Mapping[str, str], limits: Limits
) -> NoReturn:
    """Become that command; ends this process as the interpreter would."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(name, flags, 0o644), number)
        os.environ.clear()
        os.environ.update(env)
        for ending in tg.ENDING_SIGNALS:
            signal.signal(ending, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, tg.ENDING_SIGNALS)
        if limits.address_mib:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + limits.address_mib * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        status = body() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 255)


def spawn(
    argv: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    limits: Limits = Limits(),  # noqa: B008
    watch: Watch | None = None,
) -> Outcome:
    """Run a command line."""
    folder.mkdir(parents=True, exist_ok=True)
    before = printed(folder)
    with open(folder / "stdout", "ab") as out, open(folder / "stderr", "ab") as err:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=base_environment(folder) | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    outcome = follow(process.pid, folder, before, limits, watch)
    process.returncode = outcome.status  # it is no longer there to be waited for
    return outcome


def printed(folder: Path) -> list[str]:
    """What processes of a try have printed: on standard output and on standard error."""
    return [text(folder / name) for name in ("stdout", "stderr")]


def follow(
    pid: int, folder: Path, before: list[str], limits: Limits, watch: Watch | None
) -> Outcome:
    """Wait for a process, of which others printed `before`; end it when it breaks a limit."""
    began, asked = time.monotonic(), 0.0
    ended = ""
    while True:
        waited = os.wait4(pid, os.WNOHANG)  # its id or 0, its status, what it used
        passed = time.monotonic() - began
        if waited[0]:
            break
        if watch is not None:
            with ending(pid):
                watch(pid)
        if resident_mib(pid) > limits.mib:
            ended = "memory"
            send(pid, signal.SIGKILL)
        elif asked and passed - asked > GRACE_SECONDS:
            ended = "time"
            send(pid, signal.SIGKILL)
        elif passed > limits.seconds and not asked:
            asked, ended = passed, "slow" if limits.slow else "time"
            send(pid, signal.SIGTERM if limits.slow else signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    code = os.waitstatus_to_exitcode(waited[1])
    out, err = (new.removeprefix(old) for new, old in zip(printed(folder), before, strict=True))
    return Outcome(code, passed, waited[2].ru_maxrss / 1024, out, err, ended)


@contextlib.contextmanager
def ending(pid: int) -> Iterator[None]:
    """Leave no process behind when something fails."""
    try:
        yield
    except BaseException:
        send(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def text(path: Path) -> str:
    """What a process printed; empty if it printed nothing."""
    return path.read_text("utf-8", "backslashreplace") if path.exists() else ""


def resident_mib(pid: int) -> float:
    """Memory that a process holds now; 0 if it is gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB
    return 0.0


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def processes_of(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Processes of a try that are still there, each with its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parts = path.joinpath("environ").read_bytes().split(b"\0")
            pairs = [os.fsdecode(part).partition("=") for part in parts]
            env = {key: value for key, _, value in pairs}
            if env.get(MARK) == str(folder) and int(path.name) != os.getpid():
                yield int(path.name), env
