"""Shared by all scripts: options and their checks, artifacts, tables, and how a command ends.

A script begins with `sys.path.insert(0, <repository>)`, so that it runs from any working directory,
and then imports `train_gpt` and `scripts.*` by their full names. `torch` and `train_gpt` are
imported inside functions here, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from scripts.process import Interruptible, end, report_errors, visible

if TYPE_CHECKING:
    import torch

    from train_gpt import GPT, ByteCounter, Config

ROOT = Path(__file__).resolve().parents[1]
NONE = "-"  # a table cell nothing was measured for
MAX_INT = 2**31 - 1
ARTIFACTS = ("final_model.int6.ptz", "final_model.int8.ptz")  # of train_gpt.py
PACKAGED = ROOT / "models" / "python.ptz"  # what `make model` makes; used where it is there


def fail(*faults: str) -> NoReturn:
    """Raise the error that `run_command` prints without a traceback, one line a fault."""
    from train_gpt import UserError

    raise UserError("\n".join(faults))


def check_faults(faults: Iterable[str]) -> None:
    """Raise UserError with all faults, if there are any."""
    if found := list(faults):
        fail(*found)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {visible(message)}", file=sys.stderr)


def need(module: str, why: str, requirements: str = "requirements-dev.txt") -> None:
    """Require a package that only some commands use; UserError: it is not installed."""
    if importlib.util.find_spec(module) is None:
        fail(f"{why} needs {module}: pip install {module} (version: see {requirements})")


# ==============================================================================
# 1  OPTIONS
# ==============================================================================


def in_range(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], Any]:
    """Return the reader of an option that is a number of this kind within limits."""

    def read(text: str) -> float:
        value = kind(text)  # argparse reports a ValueError as an invalid value of `read.__name__`
        if not low <= value <= high:
            only_low = high == MAX_INT and not value > high
            rule = f"{low:g} or more" if only_low else f"between {low:g} and {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text} must be {rule}")
        return value

    read.__name__ = "whole number" if kind is int else "number"
    return read


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the layout of its description; a fault is one line."""

    def __init__(self, description: str | None, **options: Any) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=shape, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2, as every other error of the user."""
        self.exit(2, f"error: {visible(message)} (--help lists all options)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit as `run_command` does, also where the output of --help cannot be written."""
        sys.stderr.write(message or "")
        sys.exit(end(status))

    def whole(
        self, flag: str, default: int | None, text: str, low: int = 1, high: int = MAX_INT
    ) -> None:
        """Add an option that is a whole number from `low` to `high`."""
        self._number(int, flag, default, text, low, high)

    def real(self, flag: str, default: float | None, text: str, low: float, high: float) -> None:
        """Add an option that is a real number from `low` to `high`."""
        self._number(float, flag, default, text, low, high)

    def _number(self, kind: Any, flag: str, default: Any, text: str, *limits: float) -> None:
        shown = text if default is None else f"{text} (default %(default)s)"
        self.add_argument(flag, type=in_range(kind, *limits), default=default, help=shown)

    def artifact(
        self,
        default: str = "the newest final_model.*.ptz of the current folder",
        tokenizer: str = "the one that the artifact names",
    ) -> None:
        """Add --artifact and --tokenizer, with what they are by default."""
        self.add_argument("--artifact", type=Path, metavar="FILE", help=f"default: {default}")
        self.add_argument("--tokenizer", type=Path, metavar="MODEL", help=f"default: {tokenizer}")

    def device(self) -> None:
        """Add --device, for `pick_device`."""
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    def outputs(self, plot: str = "") -> None:
        """Add --out and, with a help text for it, --plot, for `check_outputs`."""
        self.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result")
        if plot:
            self.add_argument("--plot", type=Path, metavar="FILE.png", help=plot)


def counts(text: str) -> list[int]:
    """Read a list of whole numbers from 1, in increasing order."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must list whole numbers from 1, as in 8,16,64")
    return found


def names(text: str) -> list[str]:
    """Read a list of names, separated by commas; each once."""
    return list(dict.fromkeys(text.split(",")))


def argument_text(text: str, option: str) -> str:
    """Return the text of an option, which may be UTF-8 in a terminal of another encoding.

    Raises:
        UserError: it is no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError:
            fail(f"the text of {option} is not valid UTF-8; convert it")
    return text


def check_outputs(args: argparse.Namespace) -> None:
    """Find out before a long run that a result cannot be written.

    Raises:
        UserError: no such folder, a folder in its place, or --plot without matplotlib.
    """
    for name, path in (("out", args.out), ("plot", getattr(args, "plot", None))):
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            rule = "must be a file in a folder that exists; make the folder, or name another"
            fail(f"--{name}={path} {rule}")
    if getattr(args, "plot", None) is not None:
        need("matplotlib", "--plot")


# ==============================================================================
# 2  MODELS AND TEXT
# ==============================================================================


class Artifact(NamedTuple):
    """A model, and the file it was read from."""

    path: Path
    model: GPT
    identity: Mapping[str, str]  # SHA-256 digests of what made it; empty: not known

    @property
    def tokenizer_sha256(self) -> str:
        """Of the tokenizer that it was trained with."""
        return self.identity["tokenizer_sha256"]

    @property
    def data_sha256(self) -> str:
        """Of the shards that it was trained on; empty: not known."""
        return self.identity.get("data_sha256", "")

    @property
    def program_sha256(self) -> str:
        """Of the train_gpt.py that trained it; empty: not known."""
        return self.identity.get("program_sha256", "")


def pick_device(name: str) -> torch.device:
    """Return the device that --device names; UserError: there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda finds no CUDA device; use --device=cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan a kernel for every new shape
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def packaged_name() -> str:
    """Name the packaged model as the documents do."""
    return "/".join(PACKAGED.parts[-2:])


def default_artifact() -> Path:
    """Take the packaged model, else the newest of the current folder; UserError: neither."""
    if PACKAGED.is_file():
        return PACKAGED
    return newest_artifact(f"{packaged_name()} is not there, and ")


def newest_artifact(before: str = "", remedy: str = "name one by --artifact FILE") -> Path:
    """Find the newest artifact of the current folder; UserError, after `before`: none."""
    found = [path for path in Path().glob("final_model.*.ptz") if path.is_file()]
    if not found:
        neither = f"{before}the current folder holds neither {' nor '.join(ARTIFACTS)}"
        fail(f"{neither}; {remedy}, or train one: python train_gpt.py")
    return max(found, key=lambda path: path.stat().st_mtime)


def load_artifact(path: Path, device: torch.device) -> Artifact:
    """Read an artifact; a tokenizer beside it (NAME.model) takes the place of the one that its
    settings name. UserError: it is missing or damaged.
    """
    import train_gpt as tg

    model, identity = tg.load_artifact(path, device)
    if (beside := path.with_suffix(".model")).is_file():
        model.cfg = dataclasses.replace(model.cfg, tokenizer_path=str(beside))
    return Artifact(path, model, identity)


def sha256_of(path: Path) -> str:
    """Digest of a file; of nothing for a pipe, which would block."""
    return hashlib.sha256(b"" if path.is_fifo() else path.read_bytes()).hexdigest()


def check_base(what: str, about: Mapping[str, Any], artifact: Path, command: str) -> None:
    """Raise UserError if a file (`what`, as an error names it) was made for another artifact."""
    theirs, found = about["artifact_sha256"], sha256_of(artifact)
    if theirs != found:
        hashes = f"its SHA-256 is {theirs[:12]}, that of {artifact} is {found[:12]}"
        fail(f"{what} belongs to another artifact: {hashes}; name that artifact, or {command}")


def program_sha256() -> str:
    """SHA-256 of train_gpt.py, as a run logs it."""
    import train_gpt as tg

    return hashlib.sha256(Path(tg.__file__).read_bytes()).hexdigest()


def text_config(cfg: Config) -> Config:
    """Take DATA_PATH and TOKENIZER_PATH from the environment where it sets them."""
    given = {name: os.environ.get(name.upper()) for name in ("data_path", "tokenizer_path")}
    paths: dict[str, Any] = {name: path for name, path in given.items() if path is not None}
    return dataclasses.replace(cfg, **paths)


def open_tokenizer(
    artifact: Artifact,
    path: Path | str,
    option: str = "TOKENIZER_PATH=",
    remedy: str = "name that one",
) -> ByteCounter:
    """Read a tokenizer; UserError: it is missing, or not the one the artifact was trained with.

    Args:
        artifact: whose tokenizer it must be.
        path: of the SentencePiece model.
        option: how an error introduces the path.
        remedy: what an error advises for another tokenizer.
    """
    import train_gpt as tg

    try:
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        fail(f"{option}{path} cannot be read ({error.strerror}); {remedy}")
    if sha256 != artifact.tokenizer_sha256:
        fail(
            f"{option}{path} (SHA-256 {sha256[:12]}) is not the tokenizer {artifact.path} "
            f"was trained with ({artifact.tokenizer_sha256[:12]}); {remedy}"
        )
    return tg.ByteCounter(dataclasses.replace(artifact.model.cfg, tokenizer_path=str(path)))


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute as the evaluation in training does: bf16 where a GPU has it, else fp32."""
    import torch

    import train_gpt as tg

    return torch.autocast(device.type, torch.bfloat16, enabled=tg.has_bf16(device))


# ==============================================================================
# 3  RESULTS
# ==============================================================================


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 0) -> str:
    """Lay out a Markdown table; columns after the first `num_texts` are numbers, right-aligned."""
    rule = ["---" if i < num_texts else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def cell(value: Any, digits: int = 3) -> str:
    """Write a table cell: a number with some decimals, a mean ± its error, or text as it is."""
    if isinstance(value, Mapping):
        return f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"
    if isinstance(value, int):
        return f"{value:,}"
    return NONE if value is None else str(value)


def table(rows: Sequence[Mapping[str, Any]], num_texts: int = 0, digits: int = 3) -> str:
    """Lay out dicts of equal keys, a line each, with their keys as the head."""
    cells = [[cell(value, digits) for value in row.values()] for row in rows]
    return markdown(list(rows[0]), cells, num_texts)


def to_json(result: Mapping[str, Any]) -> str:
    """Write a result as one line; UserError: a number in it is not finite."""
    try:
        return json.dumps(result, allow_nan=False)
    except ValueError:
        fail(
            "results are not finite numbers, so the weights of a model are damaged; export it again"
        )


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result to --out, if given.

    Raises:
        UserError: a number is not finite, or the file cannot be written; then it is printed.
    """
    line = to_json(result)
    if path is None:
        return
    import train_gpt as tg

    try:
        tg.atomic_write(path, f"{line}\n".encode(), "result")
    except tg.UserError as error:
        print(line, flush=True)
        why = getattr(error.__cause__, "strerror", None) or error
        fail(f"--out={path} cannot be written ({why}); the result is on standard output instead")


def error_line(printed: str) -> str:
    """Find what a failed process says of itself: its first error, else its last line."""
    lines = [line for line in printed.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named[:1] or lines[-1:] or ["nothing printed"])[0]


def run_command(
    body: Callable[[], Mapping[str, Any] | None],
    status: Callable[[Mapping[str, Any]], int] = lambda _: 0,
    resume: str = "nothing was written",
) -> int:
    """Run the body of a command and end in the way common to all scripts.

    Args:
        body: does the work; what it returns is printed as one JSON object on the last line.
        status: exit status that a result means.
        resume: what an interrupted user needs to know.
    Returns:
        0 or the status of the result, 2 after an error the user can repair, 130 after Ctrl-C, 143
        after SIGTERM, 141 if nobody reads the output any more.
    """
    from train_gpt import UserError

    with Interruptible(resume) as interrupts:
        try:
            result = body()
            if result is not None:
                print(to_json(result), flush=True)
            return end(0 if result is None else status(result))
        except BaseException as error:
            interrupts.ending = True
            if isinstance(error, KeyboardInterrupt) or interrupts.received:
                report_errors(f"interrupted; {resume}")
                return interrupts.status
            if isinstance(error, MemoryError):
                report_errors("out of memory; close other programs or give less text at a time")
            elif isinstance(error, UserError | OSError):
                report_errors(error)
            else:
                raise
            return end(getattr(error, "status", 2))
