"""How a script lives in its process: its standard streams and the signals that end it.

A script imports this before anything that takes time. In a program that is no script of this
folder (a test, a notebook) the import does nothing, and only `Interruptible` acts.

Output that cannot be encoded is escaped. A reader that is gone or a full disk does not stop the
work: what was to be written to files is written, and `end` gives the exit status. SIGINT (Ctrl-C)
and SIGTERM end a script in one line, with status 130 and 143.
"""

from __future__ import annotations

import os
import sys

NOT_BEGUN = "the work had not begun, nothing was written"
try:
    import io
    import signal
except KeyboardInterrupt:  # the only import here that takes milliseconds
    os.write(2, f"error: interrupted; {NOT_BEGUN}\n".encode())
    os._exit(130)

TYPE_CHECKING = False  # typing and threading take milliseconds to import
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

CLOSED_PIPE = 141  # exit status of a command whose reader is gone, as a shell reports SIGPIPE
STEERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"  # direction, lines


def visible(text: str) -> str:
    """Escape what could control a terminal: control characters but line ends and tabs, and marks
    that change the direction of writing.
    """
    import unicodedata

    controls = {c for c in set(text) - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cs")}
    controls |= set(STEERING) & set(text)
    return text.translate({ord(c): ascii(c)[1:-1] for c in controls})


def report_errors(text: object) -> None:
    """Print an error on standard error, each of its lines marked as one."""
    lines = str(text).split("\n")
    print("\n".join(f"error: {visible(line)}" for line in lines if line), file=sys.stderr)


# ==============================================================================
# 1  STANDARD STREAMS
# ==============================================================================


class Tolerant(io.FileIO):
    """A standard stream that takes what nobody reads or no disk holds; it keeps the first error."""

    fault: OSError | None = None

    def write(self, data: Any) -> int:
        """Write data; after an error all of it counts as written."""
        try:
            return super().write(data)
        except OSError as error:
            self.fault = self.fault or error
            return memoryview(data).nbytes


def fill_missing() -> None:
    """Open the null device in place of a closed standard stream, or the next file that is opened
    would get its number, and output meant for the stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def stream(number: int, name: str) -> None:
    """Make standard output or error tolerant, and escape what it cannot encode."""
    current, raw = getattr(sys, name), Tolerant(number, "w", closefd=False)
    made = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(current, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=name == "stderr" or raw.isatty(),
        write_through=getattr(current, "write_through", False),
    )
    setattr(sys, name, made)


def output_fault() -> OSError | None:
    """Flush standard output and return the first error of writing to it, if any."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, Tolerant):
        return None
    sys.stdout.flush()
    return raw.fault


def end(status: int) -> int:
    """Return the exit status of a command that ends with `status`, its output considered."""
    fault = output_fault()
    if isinstance(fault, BrokenPipeError):
        return status or CLOSED_PIPE
    if fault is not None:
        remedy = "free space or redirect it elsewhere, and rerun the command"
        report_errors(f"standard output cannot be written ({fault.strerror}); {remedy}")
        return status or 2
    return status


# ==============================================================================
# 2  SIGNALS
# ==============================================================================


class Interruptible:
    """While a command works, a signal raises KeyboardInterrupt; while it is `ending`, it ends now.

    Args:
        note: what an interrupted user needs to know.
    """

    received: int | None = None  # number of the first signal
    ending = False
    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, note: str) -> None:
        self.note = note
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        self.hook = sys.unraisablehook
        sys.unraisablehook = self.unraisable
        import threading

        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in self.signals}
            # None: not set by Python. Ignored: a background job or nohup, which the shell decides.
            self.before = {n: h for n, h in found.items() if h not in (None, signal.SIG_IGN)}
        for number in self.before:
            signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            over = getattr(handler, "__func__", None) is Interruptible.leave  # of `begin`
            signal.signal(number, signal.SIG_IGN if over else handler)  # a script only has to end
        sys.unraisablehook = self.hook

    def unraisable(self, caught: Any) -> None:
        """End the process if an interrupt was raised where Python cannot pass it on."""
        if self.received is not None and issubclass(caught.exc_type, KeyboardInterrupt):
            self.leave(self.received)
        self.hook(caught)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the work."""
        if self.ending:
            self.leave(number, frame)
        self.received = self.received or number
        raise KeyboardInterrupt

    def leave(self, number: int, _: FrameType | None = None) -> None:
        """End the process, whatever it is doing."""
        try:
            os.write(2, f"error: interrupted; {self.note}\n".encode("ascii", "backslashreplace"))
        finally:
            os._exit(128 + number)

    @property
    def status(self) -> int:
        """Exit status of an interrupted command."""
        return 128 + (self.received or signal.SIGINT)


def is_script() -> bool:
    """Is the program of this process one of the scripts in this folder?"""
    folder = os.path.dirname(os.path.abspath(__file__))
    program = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    return os.path.abspath(program).startswith(folder + os.sep)


def begin() -> None:
    """Prepare the process of a script: until its work begins, a signal ends it at once."""
    started = Interruptible(NOT_BEGUN)
    for number in Interruptible.signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, started.leave)
    fill_missing()
    stream(1, "stdout")
    stream(2, "stderr")


if is_script():
    begin()
