"""The documents: short, true about files, options and settings, in the field's words."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import train_gpt as tg
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "LOG.md"]
ENDING = r"\.(?:ini|json|jsonl|md|png|ptz|py|sh|toml|txt|yaml)\b"

# What commands in the documents write, and files of users that they name as examples.
MADE_BY_USERS = re.compile(
    r"(data|out|models|packages|checkpoints)/.*|(logs/)?(RUN_ID|demo)\b.*|final_model\..*|.*[*<>].*"
    r"|(draft|pass_by_pass|documents|bpe|manifest|config|generation_config)\.\w+"
)
EXTERNAL_VARIABLES = {"DIFFUSION_TRAIN_MODE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


of_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name)
of_page = pytest.mark.parametrize("path", PAGES, ids=name)


def code_blocks(text: str) -> list[str]:
    """Fenced and indented blocks of a page."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"(?<=\n\n)(?: {4}.*\n)+", text)


def commands(text: str) -> Iterator[str]:
    """Lines of a page's code blocks, joined where they end in a backslash, without comments."""
    for block in code_blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.split(r"\s+#|\s{3,}", line.strip())[0]


# ---- files ----


@of_page
def test_a_page_is_short(path: Path) -> None:
    assert len(read(path).splitlines()) <= (150 if path.name == "README.md" else 200)


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(path), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(path: Path, text: str) -> list[str]:
    """Links to a file or a heading that is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(link)
    return broken


@of_document
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, read(path)) == []


@functools.cache
def tracked() -> set[str]:
    """Files of the repository, their names and the ends of their paths."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    files = done.stdout.split() or [name(path) for path in ROOT.rglob("*.*")]
    parts = [file.split("/") for file in files]
    return {"/".join(part[i:]) for part in parts for i in range(len(part))}


def missing_files(text: str) -> set[str]:
    """Names of files in code, and paths of this repository anywhere, that no file has."""
    code = [*re.findall(r"`([^`\n]+)`", text), *code_blocks(text)]
    found = set(re.findall(r"\b(?:docs|logs|scripts|tests)/[\w./-]*\w" + ENDING, text))
    for part in code:
        found |= set(re.findall(r"(?<![\w./<*{-])[\w~/][\w./*-]*" + ENDING, part))
    return {file for file in found - tracked() if not MADE_BY_USERS.fullmatch(file)}


@of_document
def test_named_files_exist(path: Path) -> None:
    assert missing_files(read(path)) == set()


def test_a_missing_file_or_link_would_be_found() -> None:
    text = "[a](docs/none.md) [b](docs/data.md#none) `none.py` `data.md`, see logs/none.txt."
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "docs/data.md#none"]
    assert missing_files(text) == {"none.py", "logs/none.txt", "docs/none.md"}


# ---- commands ----


@of_page
def test_commands_have_options_that_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for line in commands(read(path)):
        if line.startswith("make "):
            assert shlex.split(line)[1] in targets or ".venv/" in line, line
        if found := re.match(r"(?:[A-Z_]+=\S* )*python (scripts/\S+)\.py ?(.*)", line):
            module = importlib.import_module(found[1].replace("/", "."))
            try:
                module.parse_args(shlex.split(found[2]))
            except SystemExit as error:
                raise AssertionError(f"{name(path)}: {line}") from error


@of_page
def test_settings_exist(path: Path) -> None:
    known = {field.upper() for field in tg.Config.__dataclass_fields__} | EXTERNAL_VARIABLES
    for line in commands(read(path)):
        if "train_gpt.py" in line or line.startswith("export "):
            assert set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", line)) <= known, line


# ---- words ----

# What was written, and what the field writes; "(?i)" is set for all.
RETIRED = {
    r"\bforerunners?\b|\bof before\b": "the previous version",
    r"\b(likel|right)ie(r|st)\b|\brighter\b": "higher likelihood, higher accuracy",
    r"\btokens? right\b|\bright tokens?\b": "accuracy",
    r"\b(asked|hoped) for\b": "requested, target",
    r"\bholes?\b": "span",
    r"\b(next|nearest) sure\b|\bsure (one|token)s?\b": "visible",
    r"\bsuspect\b": "possibly corrupted",
    r"\btokens? that stands?\b(?! for)": "accepted",
    r"\b(nats|bits|bytes|ms|milliseconds|[GM]?FLOPs?) an? [a-z]": "per",
    r"\b(tokens|seconds|minutes|lines?|keys?) an? (second|step|pass|run|row|shard|recipe)"
    r"|\b(accepted|kept|tokens) a (cycle|pass|window)\b": "per",
    r"\bx cached\b": "speedup over cached AR",
    r"\b(run|command|again) goes on\b": "continues, resumes",
}


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Public text of a file by line: prose; docstrings, messages and names of tests. No code."""
    text = read(path)
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
        yield from enumerate(re.sub(r"`[^`\n]*`", "", text).splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, re.sub(r"`[^`]*`", "", node.value)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def retired(path: Path) -> list[str]:
    """Retired words of a file, with what to write."""
    return [
        f"{path}:{line}: {found[0]!r}: write {better}"
        for line, text in sentences(path)
        for pattern, better in RETIRED.items()
        for found in re.finditer(pattern, text, re.IGNORECASE)
    ]


SOURCES = [ROOT / "train_gpt.py", *sorted((ROOT / "scripts").rglob("*.py"))]
SOURCES += [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]


@of_document
def test_a_document_has_no_retired_word(path: Path) -> None:
    assert retired(path) == []


def test_docstrings_messages_and_test_names_have_no_retired_word() -> None:
    assert [found for path in SOURCES for found in retired(path)] == []


def test_a_retired_word_would_be_found(tmp_path: Path) -> None:
    page, program = tmp_path / "a.md", tmp_path / "a.py"
    page.write_text("3 nats a token\n\n```\na hole\n```\n`hole`\nthe forerunner\n", "utf-8")
    assert [re.sub(r".*a.md:(\d).*", r"\1", found) for found in retired(page)] == ["1", "7"]
    program.write_text(
        'def test_a_hole(): "Fill it."\nfail(f"{x} is suspect")\nb["hole"]\n', "utf-8"
    )
    assert len(retired(program)) == 2
