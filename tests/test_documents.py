"""scripts/documents.py: which formats are read, how, and that no damage passes for text."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from scripts import documents
from train_gpt import UserError

TEXTS = ["one\n\ntwo", "  naïve 日本 🙂\t", "", 'three {"text": 4}']
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
BOM = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstd,
}


def read(path: Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [document.text for document in documents.read_files([path])]


def fault(path: Path, data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(path, data)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# ---- formats ----


@pytest.mark.parametrize(
    "data",
    [
        LINES,
        LINES.rstrip(),
        LINES.replace(b"\n", b"\r\n"),
        b"\n" + LINES.replace(b"\n", b"\n \n"),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=1).encode(),
        BOM + LINES,
        BOM + json.dumps(ROWS, indent=1).encode(),
        BOM + LINES.replace(b'{"id": 2', BOM + b'{"id": 2'),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json", "a.txt", "a"])
def test_json_is_json_under_any_name(tmp_path: Path, name: str, data: bytes) -> None:
    assert read(tmp_path / name, data) == TEXTS


def test_one_object_over_many_lines_is_one_document(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", json.dumps(ROWS[1], indent=2).encode()) == [TEXTS[1]]


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_files_are_known_by_content_or_name(tmp_path: Path, kind: str) -> None:
    pack = PACKERS[kind]
    for name in (f"a.jsonl.{kind}", f"a.JSON.{kind.upper()}", "a", "a.txt"):
        assert read(tmp_path / name, pack(LINES)) == TEXTS
    half = LINES.index(b"\n") + 1
    assert read(tmp_path / f"a.ndjson.{kind}", pack(LINES[:half]) + pack(LINES[half:])) == TEXTS
    assert read(tmp_path / f"a.txt.{kind}", pack(BOM + b"a\nb")) == ["a\nb"]


def test_zstd_frames_may_be_skippable(tmp_path: Path) -> None:
    skippable = struct.pack("<II", 0x184D2A5E, 5) + b"12345"
    for data in (skippable + zstd(LINES), zstd(LINES) + skippable):
        assert read(tmp_path / "a.jsonl.zst", data) == TEXTS


def test_byte_order_marks_are_dropped_where_files_begin(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", BOM + b"a\n" + BOM + b"b") == ["a\nb"]
    inside = f"a{documents.BYTE_ORDER_MARK}b".encode()
    assert read(tmp_path / "b.txt", inside) == [inside.decode()]
    assert read(tmp_path / "c.jsonl", b'{"text": "\\ufeffa"}') == ["a"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"PAR1\x15\x04\x15\xff", "Parquet"),
        (b"ARROW1\0\0\xff\xff\xff\xff", "Arrow"),
        (b"PK\x03\x04\x14\0\0\0", "ZIP"),
        (b"%PDF-1.7\n1 0 obj", "PDF"),
        (b"SQLite format 3\0\x10", "SQLite"),
        (b"\x93NUMPY\x01\0v\0", "NumPy"),
        ("abc".encode("utf-16"), "UTF-16"),
        ("abc def".encode("utf-16-le"), "UTF-16"),
        ("abc def".encode("utf-16-be"), "UTF-16"),
        ("abc".encode("utf-32"), "UTF-32"),
        (struct.pack("<256i", 20240520, 1, *[0] * 254), "token shard"),
        (gzip.compress(gzip.compress(b"abc", mtime=0), mtime=0), "gzip data"),
        (gzip.compress(b"a" * 257 + b"ustar\0" + b"\0" * 300, mtime=0), "tar archive"),
    ],
)
@pytest.mark.parametrize("file", ["data", "a.txt", "a.jsonl"])
def test_other_formats_are_refused_by_name(
    tmp_path: Path, data: bytes, name: str, file: str
) -> None:
    message = fault(tmp_path / file, data)
    assert f"is {name}" in message or name in message.split(";")[0]
    assert "leave it out of GLOB" in message


@pytest.mark.parametrize("text", ["PKZIP is a program", "ORCHESTRA", "GGUF, a format", "a\0b", ""])
def test_text_that_begins_like_another_format_is_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "a.txt", text.encode()) == [text]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', ", line 2: not JSON"),
        (b'{"text": "a\n{"text": "b"}\n', ", line 1: not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ", line 2: not JSON (not UTF-8"),
        (b'{\n "text": "a",\n "b": }\n', ", line 3: not JSON"),
        (b'[{"text": "a"},\n {"body": "b"}]', ", item 2: holds fields 'body'"),
        (b"[1, 2]", ", line 1: holds a list whose item 1 is of type int"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a"} {"text": "b"}', ", line 1: not JSON"),
        (b'{"data": [{"text": "a"}]}', "holds fields 'data'"),
    ],
)
def test_json_that_cannot_be_used_is_named_with_its_place(
    tmp_path: Path, data: bytes, expected: str
) -> None:
    assert expected in fault(tmp_path / "a.json", data)


# ---- damage ----


@pytest.mark.parametrize("kind", PACKERS)
def test_damaged_files_are_named_with_the_place(tmp_path: Path, kind: str) -> None:
    path, data = tmp_path / f"a.jsonl.{kind}", PACKERS[kind](LINES * 50)
    assert "it ends too early" in fault(path, data[:-5])
    after = fault(path, data + b"garbage")
    assert f"cannot be read after line {50 * len(ROWS)} (damaged" in after
    assert f"bytes {len(data):,} to {len(data) + 7:,}" in after
    assert "it is empty" in fault(path, b"")
    assert "does not begin so" in fault(path, LINES)
    assert read(path, data + b"\0" * 100) == TEXTS * 50  # padding, as tools write it


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKERS)
def test_no_flipped_bit_and_no_cut_passes_silently(tmp_path: Path, kind: str) -> None:
    draw, path = random.Random(7), tmp_path / f"a.jsonl.{kind}"
    data = PACKERS[kind](LINES * 20)
    for _ in range(150):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        with contextlib.suppress(UserError):
            assert read(path, bytes(damaged)) == TEXTS * 20  # in a field without meaning
    for length in range(0, len(data), 5):
        assert str(path) in fault(path, data[:length])


# ---- names ----


def test_what_exists_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("part[0].txt", "part0.txt", "set[1]/a.txt", "set[1]/b.txt", "set1/c.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x", encoding="utf-8")
    for pattern, expected in (
        ("part[0].txt", ["part[0].txt"]),
        ("part[01].txt", ["part0.txt"]),
        ("set[1]/*.txt", ["set[1]/a.txt", "set[1]/b.txt"]),
        ("**/c.txt", ["set1/c.txt"]),
        (str(tmp_path / "set[1]" / "[ab].txt"), [str(tmp_path / f"set[1]/{c}.txt") for c in "ab"]),
    ):
        assert list(map(str, documents.find_files([pattern]))) == expected
    twice = documents.find_files(["part0.txt", "./part0.txt", str(tmp_path / "part*")])
    assert list(map(str, twice)) == ["part0.txt", str(tmp_path / "part[0].txt")]


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (("pipe", "no regular file"), (".", "is a folder"), ("x", "no file in")):
        with pytest.raises(UserError, match=expected):
            documents.find_files([str(tmp_path / name)])
