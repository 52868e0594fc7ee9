"""Child processes of a script: how they are ended, and how their end is told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

STOP_SECONDS = 60.0  # that a process may take to end after SIGTERM


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Take SIGTERM and a closed terminal as Ctrl-C."""
    stopping = [signal.SIGTERM, signal.SIGHUP]
    caught = [n for n in stopping if signal.getsignal(n) is not signal.SIG_IGN]  # nohup stays
    before = {name: signal.signal(name, signal.default_int_handler) for name in caught}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def ending(status: int) -> str:
    """Say how a process failed; empty if it ended well."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else ""


def stop(process: subprocess.Popen[Any], seconds: float = STOP_SECONDS) -> None:
    """End a process that still runs, and its group: first as Ctrl-C does, then by force."""
    if process.poll() is None:
        process.terminate()
        # A second Ctrl-C does not wait.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
