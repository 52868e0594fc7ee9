"""Read documents from files: plain text or JSON objects with a text field, also compressed.

The format of a file is found by its content and by its name. JSON is one object a line, one array
of objects, or one object; gzip, xz, bzip2 and zstd are read. Other formats are refused by name, and
a damaged file with the place of the damage.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from scripts.common import fail

HEAD = 1 << 16  # bytes that tell the format of a file
CHUNK = 1 << 11  # bytes decompressed at a time: how exactly a place of damage is known
BYTE_ORDER_MARK = "\ufeff"
JSON_NAMES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".jl")
JSON_START = re.compile(rb'\s*(\[\s*)?\{\s*"([^"\\]|\\.)*"\s*:')
JSON_RULE = 'must hold objects such as {"text": "..."}, one a line or in one array'


class Document(NamedTuple):
    """One text and the words that name it in an error."""

    text: str
    place: str


def reason(error: Exception) -> str:
    """Say in one line what an error is."""
    return (
        getattr(error, "strerror", None)
        or " ".join(str(error).split())[:300]
        or type(error).__name__
    )


def drop_marks(text: str) -> str:
    """Remove byte order marks: where a file begins, and where one was appended to another."""
    return re.sub(f"(?m)^{BYTE_ORDER_MARK}+", "", text) if BYTE_ORDER_MARK in text else text


# ==============================================================================
# 1  FILES -- which there are, and which formats
# ==============================================================================


def matches(pattern: str) -> list[str]:
    """List the paths of a pattern. What exists under its literal name, whole or as the folder that
    it begins with, is no pattern.
    """
    if os.path.lexists(pattern):
        return [pattern]
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return sorted(glob.glob(glob.escape(folder) + pattern[len(folder) :], recursive=True))


def find_files(patterns: Sequence[str]) -> list[Path]:
    """List the files of all patterns, in the order of the patterns, each once."""
    paths: dict[str, Path] = {}
    for pattern in patterns:
        found = matches(pattern)
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files and found:
            kind = "a folder" if os.path.isdir(found[0]) else "no regular file"
            remedy = "name files, as in 'books/*.jsonl'; a pipe must be saved, as it is read twice"
            fail(f"GLOB {pattern!r} is {kind}; {remedy}")
        if not files:
            remedy = "check the spelling, and quote it in the shell"
            fail(f"GLOB {pattern!r} matches no file in {Path.cwd()}; {remedy}")
        for path in files:
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


TABLES = "convert it to JSONL, as with pandas: read_X(...).to_json(NAME, orient='records', lines=1)"
UNPACK, EXTRACT = "unpack it and name its files", "extract its text"
ENCODING = "convert it: iconv -f {} -t UTF-8"
# How files of other formats begin, and what to do with them.
FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "Parquet", TABLES),
    (b"ARROW1", "Arrow", TABLES),
    (b"FEA1", "Feather", TABLES),
    (b"\xff\xff\xff\xff", "an Arrow stream", TABLES),
    (b"ORC", "ORC", TABLES),
    (b"Obj\x01", "Avro", TABLES),
    (b"SQLite format 3\0", "an SQLite database", TABLES),
    (b"\x89HDF", "HDF5", TABLES),
    (b"\x93NUMPY", "a NumPy array", TABLES),
    (b"PK", "a ZIP archive (.zip, .docx, .epub, .npz, .pt)", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a", "a RAR archive", UNPACK),
    (b"\x04\x22\x4d\x18", "LZ4", UNPACK),
    (b"\x1f\x8b", "gzip data", UNPACK),
    (b"\xfd7zXZ\0", "xz data", UNPACK),
    (b"BZh", "bzip2 data", UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd data", UNPACK),
    (b"\x1f\x9d", "compress data (.Z)", UNPACK),
    (b"LZIP", "lzip data", UNPACK),
    (b"\x5d\0\0", "LZMA data", UNPACK),
    (b"%PDF-", "PDF", EXTRACT),
    (b"\xd0\xcf\x11\xe0", "an old Office document", EXTRACT),
    (b"\xff\xd8\xff", "a JPEG image", EXTRACT),
    (b"\x89PNG", "a PNG image", EXTRACT),
    (b"GIF8", "a GIF image", EXTRACT),
    (b"\x88\xd8\x34\x01", "a token shard of this program", "train on its folder: DATA_PATH"),
    (b"GGUF", "a GGUF model", EXTRACT),
    (b"\x7fELF", "a program", EXTRACT),
    *((bytes([0x80, version]), "a Python pickle", EXTRACT) for version in range(2, 6)),
    (b"\xff\xfe\0\0", "UTF-32 text", ENCODING.format("UTF-32")),
    (b"\0\0\xfe\xff", "UTF-32 text", ENCODING.format("UTF-32")),
    (b"\xff\xfe", "UTF-16 text", ENCODING.format("UTF-16")),
    (b"\xfe\xff", "UTF-16 text", ENCODING.format("UTF-16")),
)


def is_text(head: bytes) -> bool:
    """Could these bytes begin a UTF-8 text?"""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def foreign_format(head: bytes) -> tuple[str, str] | None:
    """Name the format of a file that is neither text nor JSON, and what to do with it."""
    if head.startswith(b"%PDF-") or not is_text(head):
        for magic, name, remedy in FORMATS:
            if head.startswith(magic):
                return name, remedy
        if head[257:262] == b"ustar":
            return "a tar archive", UNPACK
        zeros = [head[parity::2].count(0) for parity in (0, 1)]
        if sum(zeros) * 4 >= len(head) >= 8:
            order = "LE" if zeros[1] > zeros[0] else "BE"
            remedy = ENCODING.format(f"UTF-16{order}")
            return "binary data, or UTF-16 text without a byte order mark", remedy
    return None


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raise UserError if a file is of a format that cannot be read."""
    if found := foreign_format(head):
        name, remedy = found
        rule = "text and JSON are read, also as gzip, xz, bzip2 or zstd"
        fail(f"{path} is {name}; {rule}: {remedy}, or leave it out of GLOB")


# ==============================================================================
# 2  COMPRESSION
# ==============================================================================


class Compression(NamedTuple):
    """A compressed form: how its data and the names of its files look, and how it is read."""

    name: str
    magic: re.Pattern[bytes]
    suffixes: tuple[str, ...]
    decoder: Callable[[], Any]  # of one member; has decompress, eof and unused_data


def zstd_decoder() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


COMPRESSIONS = (
    Compression("gzip", re.compile(rb"\x1f\x8b"), (".gz", ".gzip"), lambda: zlib.decompressobj(31)),
    Compression("xz", re.compile(rb"\xfd7zXZ\0"), (".xz",), lzma.LZMADecompressor),
    Compression("bzip2", re.compile(rb"BZh[1-9]"), (".bz2",), bz2.BZ2Decompressor),
    Compression(
        "zstd",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # also a skippable frame
        (".zst", ".zstd"),
        zstd_decoder,
    ),
)


def decoding_errors() -> tuple[type[Exception], ...]:
    """Return what the decoders raise for damaged data."""
    import zstandard

    return (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class Damage(Exception):
    """A compressed file cannot be read any further."""


class Decompressed(io.RawIOBase):
    """The content of a compressed file; Damage: it cannot be read further.

    Members may follow each other; zeros, which some tools pad with, may follow the last one.
    """

    def __init__(self, file: io.BufferedReader, form: Compression) -> None:
        self.file = file
        self.form = form
        self.errors = decoding_errors()
        self.decoder: Any = None
        self.ready, self.rest = b"", b""  # decompressed; not yet decompressed
        self.position = 0  # of `rest` in the file

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one step gives data."""
        while not self.ready and self.advance():
            pass
        part = self.ready[: len(buffer)]
        self.ready = self.ready[len(part) :]
        buffer[: len(part)] = part
        return len(part)

    def advance(self) -> bool:
        """Decompress the next bytes of the file; False: it is over."""
        if len(self.rest) < 8:  # a magic number is not to be cut
            self.rest += self.file.read(CHUNK)
        if self.decoder is None:
            self.position += len(self.rest) - len(stripped := self.rest.lstrip(b"\0"))
            self.rest = stripped
            if not self.rest:
                return bool(self.file.peek(1))
            if not self.form.magic.match(self.rest):
                self.stop("what follows is no part of it")
            self.decoder = self.form.decoder()
        if not self.rest:
            self.stop("it ends too early")
        try:
            self.ready = self.decoder.decompress(self.rest)
        except self.errors as error:
            self.stop(reason(error))
        left = self.decoder.unused_data if self.decoder.eof else b""
        self.position += len(self.rest) - len(left)
        self.decoder, self.rest = (None if self.decoder.eof else self.decoder), left
        return True

    def stop(self, why: str) -> NoReturn:
        """Raise Damage."""
        end = self.position + len(self.rest)
        raise Damage(f"damaged {self.form.name} data, bytes {self.position:,} to {end:,}: {why}")


def compression_of(path: Path, head: bytes) -> Compression | None:
    """Find the compressed form of a file; Damage: its name says one and its content does not."""
    for form in COMPRESSIONS:
        if form.magic.match(head):
            return form
    for form in COMPRESSIONS:
        if path.name.lower().endswith(form.suffixes):
            wrong = f"its name says {form.name}, but it does not begin so"
            raise Damage(wrong if head else "it is empty")
    return None


def open_content(path: Path) -> io.BufferedReader:
    """Open a file, decompressed."""
    file = open(path, "rb")  # noqa: SIM115 -- the caller closes it
    try:
        form = compression_of(path, file.peek(8))
    except BaseException:
        file.close()
        raise
    return io.BufferedReader(Decompressed(file, form), HEAD) if form else file


# ==============================================================================
# 3  DOCUMENTS
# ==============================================================================


class Reading:
    """A file that is being read: what an error says of the place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line: int | None = None  # the last one that was read, of JSON

    def documents(self) -> Iterator[Document]:
        """Yield the documents of the file; UserError: it cannot be read to its end."""
        try:
            if self.is_json():
                self.line = 0
            with open_content(self.path) as file:
                yield from self.text(file) if self.line is None else self.json(file)
        except (OSError, Damage) as error:
            after = "" if self.line is None else f" after line {self.line:,}"
            remedy = "check its permissions" if isinstance(error, OSError) else "copy it again"
            fail(f"{self.path} cannot be read{after} ({reason(error)}); {remedy} or leave it out")

    def head(self) -> bytes:
        """Read how the file begins, as far as it can be read."""
        head = b""
        with contextlib.suppress(OSError, Damage), open_content(self.path) as file:
            while len(head) < HEAD and (part := file.read1(HEAD)):
                head += part
        return head

    def is_json(self) -> bool:
        """Do name or content say that the file holds JSON? UserError: neither that nor text."""
        head = self.head()
        refuse_foreign(self.path, head)
        name = self.path.name.lower()
        for form in COMPRESSIONS:
            for suffix in form.suffixes:
                name = name.removesuffix(suffix)
        content = head.removeprefix(codecs.BOM_UTF8)
        return name.endswith(JSON_NAMES) or bool(JSON_START.match(content))

    def text(self, file: IO[bytes]) -> Iterator[Document]:
        """Yield the whole file as one document."""
        place = str(self.path)
        try:
            yield Document(drop_marks(file.read().decode("utf-8")), place)
        except UnicodeDecodeError as error:
            remedy = "convert it, or leave it out of GLOB"
            fail(f"{place} is not UTF-8 text (byte {error.start}); {remedy}")

    def lines(self, file: IO[bytes]) -> Iterator[Document]:
        """Yield every line that is not blank, and its place."""
        for self.line, line in enumerate(file, start=1):
            place = f"{self.path}, line {self.line}"
            text = self.decode(line, place).lstrip(BYTE_ORDER_MARK)
            if text.strip():
                yield Document(text, place)

    def decode(self, data: bytes, place: str) -> str:
        """Decode JSON; UserError: it is not UTF-8."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            fail(f"{place}: not JSON (not UTF-8, byte {error.start}); convert the file to UTF-8")

    def json(self, file: IO[bytes]) -> Iterator[Document]:
        """Yield the text fields of JSON: an object a line, or one value over many lines."""
        lines = self.lines(file)
        for first in lines:
            if begins_a_value(first.text):
                yield from self.one_value(first, file)
            else:
                yield text_field(parse(*first), first.place)
            break
        for line in lines:
            yield text_field(parse(*line), line.place)

    def one_value(self, first: Document, file: IO[bytes]) -> Iterator[Document]:
        """Yield the text fields of one JSON value that begins with a line."""
        before = (self.line or 1) - 1
        rest = self.decode(file.read(), f"{self.path}, after line {before + 1}")
        value = parse(first.text + rest, str(self.path), before)
        if not isinstance(value, list):
            yield text_field(value, str(self.path))
            return
        for number, item in enumerate(value, start=1):
            if not isinstance(item, dict):
                held = f"holds a list whose item {number} is of type {type(item).__name__}"
                fail(f"{first.place}: {held}; {JSON_RULE}")
            yield text_field(item, f"{self.path}, item {number}")


def begins_a_value(line: str) -> bool:
    """Does a JSON value begin in this line that is an array, or that does not end in it?"""
    try:
        return isinstance(json.loads(line), list)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        return False


def parse(text: str, place: str, lines_before: int | None = None) -> Any:
    """Read a JSON value; UserError: it is none.

    Args:
        text: what to read.
        place: of the text, for an error.
        lines_before: count lines of the text from here, and say which one is wrong.
    """
    try:
        return json.loads(text)
    except RecursionError:
        fail(f"{place}: JSON nested too deeply; {JSON_RULE}")
    except ValueError as error:
        if lines_before is not None:
            place = f"{place}, line {lines_before + getattr(error, 'lineno', 1)}"
        fail(f"{place}: not JSON ({reason(error)}); {JSON_RULE}")


def text_field(row: Any, place: str) -> Document:
    """Return the text of a JSON object; UserError: it has none."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        names = ", ".join(map(repr, list(row)[:20])) if isinstance(row, dict) else ""
        held = f"fields {names or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
        remedy = "rename or add it, or leave the file out of GLOB"
        fail(f'{place}: holds {held}, needs a string field "text"; {remedy}')
    return Document(drop_marks(row["text"]), place)


def read_files(paths: Sequence[Path]) -> Iterator[Document]:
    """Yield the documents of all files."""
    for path in paths:
        yield from Reading(path).documents()


def num_other_json(paths: Sequence[Path]) -> int:
    """Count files with JSON under another name than .jsonl, .jsonl.gz or .jsonl.xz."""
    usual = (".jsonl", ".jsonl.gz", ".jsonl.xz")
    return sum(Reading(path).is_json() for path in paths if not path.name.endswith(usual))
