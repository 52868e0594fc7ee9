"""scripts/process.py: a script ends in one line on a signal, and loses nothing with its output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts import common, process
from tests.conftest import CPU, ROOT

PREPARE = str(ROOT / "scripts" / "prepare_data.py")
AS_SCRIPT = f"import os, signal, __main__\n__main__.__file__ = {PREPARE!r}\n"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def python(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    settings: dict[str, Any] = {"cwd": ROOT, "text": True, "errors": "replace", "check": False}
    return subprocess.run([sys.executable, *argv], **(pipes | settings | options))


# ---- signals ----


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_before_the_work_ends_a_script_in_one_line(number: int, status: int) -> None:
    done = python("-c", f"{AS_SCRIPT}import scripts.process\nos.kill(os.getpid(), {number:d})")
    assert done.returncode == status
    assert done.stderr == f"error: interrupted; {process.NOT_BEGUN}\n"


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_during_the_work_is_reported_with_what_is_kept(
    number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    body = lambda: os.kill(os.getpid(), number)  # noqa: E731
    assert common.run_command(body, resume="parts are kept") == status
    assert capsys.readouterr().err == "error: interrupted; parts are kept\n"
    assert signal.getsignal(number) is before


def test_an_interrupt_is_one_whatever_a_library_makes_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("INTERNAL: callback failed") from None

    assert common.run_command(body) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"


def test_cleaning_up_can_be_interrupted_too(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with contextlib.suppress(KeyboardInterrupt):  # as of waiting for a child
                os.kill(os.getpid(), signal.SIGINT)

    assert common.run_command(body) == 143
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"


def test_an_interrupt_that_python_cannot_raise_ends_the_process() -> None:
    lines = [
        "import os, signal",
        "from scripts.process import Interruptible",
        "class Lost:",
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)",
        "with Interruptible('all is kept'):",
        "    Lost()",
        "    print('went on')",
    ]
    done = python("-c", "\n".join(lines))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "error: interrupted; all is kept\n"


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a background job
    try:
        with process.Interruptible("x"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# ---- standard streams ----


@pytest.fixture
def prepared(tmp_path: Path) -> list[str]:
    """A command that writes `tmp_path / "out"`."""
    rows = [json.dumps({"text": f"line {i} of text\n" * (i % 7 + 1)}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    files = ["--source", "files", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    return [PREPARE, *files, "--vocab-size", "290", "--val-percent", "20"]


@pytest.fixture
def unread() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def full() -> Iterator[int]:
    """A file on a full disk."""
    number = os.open("/dev/full", os.O_WRONLY)
    yield number
    os.close(number)


def test_help_that_nobody_reads_or_no_disk_holds(unread: int, full: int) -> None:
    done = python(PREPARE, "--help", stdout=unread)
    assert (done.returncode, done.stderr) == (141, "")
    done = python(PREPARE, "--help", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output cannot be written (No space left")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pipe", "full", "closed"])
def test_files_are_written_whatever_becomes_of_the_output(
    prepared: list[str], tmp_path: Path, how: str, unread: int, full: int
) -> None:
    if how == "closed":
        shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, *prepared]
        done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    else:
        done = python(*prepared, stdout={"pipe": unread, "full": full}[how])
    assert done.returncode == {"pipe": 141, "full": 2, "closed": 0}[how]
    assert done.stderr.count("\n") == (how == "full")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    for name in manifest["files"]:
        assert (tmp_path / "out" / name).read_bytes()[:4] == (20240520).to_bytes(4, "little")


def test_errors_stay_errors_where_standard_error_is_closed() -> None:
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, PREPARE, "--no-such-option"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_names_outside_the_terminals_encoding(
    prepared: list[str], tmp_path: Path, env: dict[str, str]
) -> None:
    folder = tmp_path / "déjà 漢"
    folder.mkdir()
    prepared[3] = str((tmp_path / "rows.jsonl").rename(folder / "é.jsonl"))
    prepared[5] = str(folder / "öut")
    done = python(*prepared, env={**os.environ, **env})
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "öut" / "manifest.json").is_file()
    done = python(*prepared[:3], str(folder / "none"), env={**os.environ, **env})
    assert done.returncode == 2
    assert done.stderr.startswith("error: GLOB")


def test_what_could_control_a_terminal_is_escaped() -> None:
    assert process.visible("a\x1b[2J\x07\tb\nc\x9b\u202ed\udcff\x7f") == (
        "a\\x1b[2J\\x07\tb\nc\\x9b\\u202ed\\udcff\\x7f"
    )
    for text in ("plain\n\ttext", "日本語 🙂 👨\u200d👩", "e\u0301"):
        assert process.visible(text) == text


def test_errors_and_warnings_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    process.report_errors("one\x1b\ntwo")
    common.warn("three\x07")
    assert capsys.readouterr().err == "error: one\\x1b\nerror: two\nwarning: three\\x07\n"


@pytest.mark.parametrize("has_bf16", [False, True])
def test_scripts_compute_in_the_type_of_a_run(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg, "has_bf16", lambda device: has_bf16)
    with common.autocast(CPU):
        assert torch.is_autocast_enabled("cpu") == has_bf16


def test_a_result_that_cannot_be_written_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.json").mkdir()  # made since the options were checked
    out = tmp_path / "out.json"
    assert common.run_command(lambda: common.write_result(out, {"hours": 5})) == 2
    captured = capsys.readouterr()
    assert captured.out == '{"hours": 5}\n'
    assert captured.err.startswith(f"error: --out={out} cannot be written (Is a directory)")
