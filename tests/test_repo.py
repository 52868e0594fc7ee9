"""The repository: the size of the code, its order, and the files that users expect."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts import common
from tests.conftest import ROOT

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_the_program_stays_small() -> None:
    assert len(SOURCE.splitlines()) <= 2400
    assert max(len(line) for line in SOURCE.splitlines()) <= 100


def test_ten_sections_in_order() -> None:
    banners = re.findall(r"^# ==== (\d+)  ([A-Z][A-Z ,]+) -- (.+)$", SOURCE, re.MULTILINE)
    assert [int(number) for number, *_ in banners] == list(range(1, 11))
    assert all(purpose.strip("= ") for *_, purpose in banners)


def functions(source: str = SOURCE) -> list[tuple[str, int]]:
    """List every function of a source with its number of lines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in nodes]


def test_no_function_is_long() -> None:
    assert len(functions()) > 80
    assert [(name, lines) for name, lines in functions() if lines > 40] == []


def names_bound(source: str) -> list[tuple[int, list[str]]]:
    """List the names that each assignment, loop and comprehension binds, `_` not counted."""
    found = list[tuple[int, list[str]]]()
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.For | ast.comprehension) else targets
        parts = [part for target in targets for part in ast.walk(target)]
        stored = [part for part in parts if isinstance(getattr(part, "ctx", None), ast.Store)]
        names = [getattr(part, "id", None) or getattr(part, "attr", "") for part in stored]
        found.append(
            (getattr(node, "lineno", 0), [name for name in names if name not in ("", "_")])
        )
    return found


def test_a_statement_binds_at_most_two_names() -> None:
    assert max(len(names) for _, names in names_bound(SOURCE)) == 2
    assert [found for found in names_bound(SOURCE) if len(found[1]) > 2] == []
    assert [len(n) for _, n in names_bound("a, b, c = x\nfor i, _ in y: pass") if n] == [3, 1]


def test_no_function_is_complex() -> None:
    limit = ["--select", "C901", "--config", "lint.mccabe.max-complexity=10"]
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        *limit,
        "train_gpt.py",
        "scripts",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "All checks passed!"), done.stderr


def test_the_program_runs_no_other_file() -> None:
    for word in ("runpy", "importlib", "exec(", "eval(", "spec_from_file"):
        assert word not in SOURCE.replace(".eval()", "")
    modules = {name.split(".")[0] for name in imports_of(ROOT / "train_gpt.py")}
    packages = {"filelock", "numpy", "sentencepiece", "torch", "tqdm"}
    assert modules - set(sys.stdlib_module_names) == packages


SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_have_short_functions_and_lines(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert [(name, lines) for name, lines in functions(source) if lines > 40] == []
    assert max(map(len, source.splitlines() or [""])) <= 100


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Names that a file imports, also inside functions: modules, and what is taken from them."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_import_circle() -> None:
    files = {module_name(path): path for path in [ROOT / "train_gpt.py", *SCRIPTS]}
    left = {name: imports_of(path) & files.keys() for name, path in files.items()}
    assert left["train_gpt"] == set()
    assert "train_gpt" in left["scripts.bench.train"]
    while ready := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in ready}
    assert left == {}  # each of these needs another of them


def test_scripts_import_no_tests() -> None:
    for path in SCRIPTS:
        assert {name.split(".")[0] for name in imports_of(path)}.isdisjoint({"tests", "conftest"})


COMMANDS = [p for p in SCRIPTS if "if __name__ == " in p.read_text(encoding="utf-8")]


FORKS = """
import os, runpy, sys
import torch  # once for all commands: it takes most of their time
for path in sys.argv[1:]:
    if pid := os.fork():
        print(path, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{os.path.basename(path)}.{name}", os.O_CREAT | os.O_WRONLY), stream)
    sys.argv, sys.path[0] = [path, "--help"], os.path.dirname(path)
    runpy.run_path(path, run_name="__main__")
    sys.exit()
"""


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[int, str, str]]:
    """Status, output and complaints of every command's --help, started in an empty folder."""
    folder = tmp_path_factory.mktemp("help")
    command = [sys.executable, "-c", FORKS, *map(str, COMMANDS)]
    out = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {Path(path): int(status) for path, status in map(str.split, out.splitlines())}
    return {
        path: (status, *((folder / f"{path.name}.{name}").read_text() for name in ("out", "err")))
        for path, status in found.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_explains_itself_from_any_folder(
    path: Path, explained: dict[Path, tuple[int, str, str]]
) -> None:
    status, out, err = explained[path]
    assert (status, err) == (0, "")
    assert "usage: " in out


def test_a_command_ends_in_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert common.run_command(lambda: {"a": 1}) == 0
    assert capsys.readouterr().out == '{"a": 1}\n'
    assert common.run_command(lambda: {"a": 1}, lambda result: int(result["a"])) == 1
    assert common.run_command(lambda: common.fail("one", "two")) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    assert common.run_command(interrupted, resume="rerun the command to resume") == 130
    assert capsys.readouterr().err == "error: interrupted; rerun the command to resume\n"
    assert common.run_command(lambda: {"a": math.nan}) == 2
    assert "not finite numbers" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["demo", "model"])
def test_settings_of_the_makefile_exist(target: str) -> None:
    command = ["make", "-n", "-o", ".venv/.requirements", target, "STAGE=60"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in printed.replace("\\\n", " ").splitlines() if "train_gpt.py" in line]
    given = dict(re.findall(r"\b([A-Z_]+)=(\S+)", line))
    assert given.keys() <= {name.upper() for name in tg.Config.__dataclass_fields__}
    cfg = tg.Config.from_env(given | {"DEVICE": "cpu"})[0]
    assert (cfg.recipe, cfg.preset, cfg.strength) == ("record", "cpu", True)
    if target == "model":  # what is trained in stages, and where it is found
        assert (cfg.resume, cfg.max_wallclock_seconds) == ("auto", 7200)
        assert f"cp {cfg.artifact} {common.packaged_name()}" in printed
        assert "timeout --foreground --signal=INT 60 " in line


@pytest.mark.parametrize("name", ["README.md", "submission.json", "LICENSE", "requirements.txt"])
def test_a_file_that_users_expect_is_there(name: str) -> None:
    assert (ROOT / name).is_file()
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def pairs(value: Any) -> list[tuple[str, Any]]:
    """Every key of nested JSON with its value."""
    if isinstance(value, list):
        return [pair for part in value for pair in pairs(part)]
    if isinstance(value, dict):
        return [*value.items(), *(pair for part in value.values() for pair in pairs(part))]
    return []


def test_the_submission_holds_numbers_or_says_that_it_does_not() -> None:
    text = (ROOT / "submission.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    found = pairs(json.loads(text, parse_constant=refuse))
    measured = [(key, value) for key, value in found if re.search(r"bpb|loss|bytes", key)]
    assert {"val_bpb", "val_loss", "bytes_total"} <= {key for key, _ in measured}
    for key, value in measured:
        assert value is None or (isinstance(value, int | float) and not isinstance(value, bool)), (
            key
        )
