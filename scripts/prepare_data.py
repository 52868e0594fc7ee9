"""Turn text into the token shards that train_gpt.py reads, with their tokenizer and a manifest.

    python scripts/prepare_data.py                       the Python standard library; no network
    python scripts/prepare_data.py --source files --tokenizer bpe.model 'books/*.jsonl.xz'
    python scripts/prepare_data.py --source fineweb --train-shards 10      the published export
    python scripts/prepare_data.py --source fineweb --variant sp8192 --repo OWNER/NAME

A shard is a header of 256 little-endian int32 (magic, version, number of tokens, zeros) and then
that many uint16 tokens; every document begins with BOS. The same text, settings and SentencePiece
version give the same bytes.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(abspath(__file__))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import contextlib
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import sentencepiece as spm

from scripts.common import Parser, fail, in_range, run_command, warn
from scripts.documents import (
    Document,
    find_files,
    num_other_json,
    read_files,
    reason,
)

Item = TypeVar("Item")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
# Folders inside --out that a finished command leaves no trace of.
STAGING, DOWNLOADS = ".staging", ".download"
MAX_VOCAB = 65_535  # tokens are uint16
SHARD_VERSION = 1
FIXED_PIECES = 261  # of a trained tokenizer, whatever the text
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
SAMPLE_BYTES = 8_000_000  # of training text that a tokenizer is fitted to; trains in seconds
BATCH_BYTES = 4_000_000  # of text encoded at a time
MAX_DOCUMENT = (
    16_000_000  # bytes; encoding takes about 45 bytes of memory for each byte of a document
)
STDLIB_MAX_BYTES = 24_000_000
SPACE_MARK = (
    "\u2581"  # stands for a space inside SentencePiece, which therefore cannot tell it from one
)
COUNT_TOLERANCE = 0.001  # of the bytes of a split: training may count so many others unsaid
SETTINGS = "settings.json"  # in DOWNLOADS: what is being downloaded
HUB_REPO = "willdepueoai/parameter-golf"
HUB_ROOT = "datasets"
VARIANTS = {"sp1024": 1024, "sp4096": 4096, "sp8192": 8192}  # pieces of the tokenizer


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, glob_help = (
        parser.add_argument,
        "files: JSON objects with a text field, or plain text; also .gz .xz .bz2 .zst",
    )
    add("--source", choices=list(SOURCES), default="stdlib", help="where text comes from")
    add("patterns", nargs="*", metavar="GLOB", help=glob_help)
    add("--files", nargs="+", default=[], metavar="GLOB", help="the same as GLOB")
    add("--out", type=Path, help="folder to write; default ./data/SOURCE")
    tokenizer = "use this SentencePiece model, train none"
    add("--tokenizer", type=Path, metavar="MODEL", help=tokenizer)
    parser.whole("--vocab-size", 1024, "pieces of a trained tokenizer", high=MAX_VOCAB)
    held_out = "share of documents held out (default: stdlib 5, files 2)"
    add("--val-percent", type=in_range(float, 0, 100), help=held_out)
    parser.whole("--shard-tokens", 100_000_000, "most tokens per shard", high=MAX_SHARD_TOKENS)
    parser.whole("--max-bytes", None, f"stdlib: most bytes of text (default {STDLIB_MAX_BYTES})")
    shards = "fineweb: how many training shards (default 1)"
    parser.whole("--train-shards", None, shards, high=1_000_000)
    add("--variant", choices=VARIANTS, help="fineweb: which tokenizer (default sp1024)")
    add("--repo", metavar="OWNER/NAME", help=f"fineweb: dataset repository (default {HUB_REPO})")
    add("--force", action="store_true", help="replace the shards of another manifest in --out")
    args = parser.parse_args(argv)
    args.patterns += args.files
    check_source(parser, args)
    args.out = args.out or Path("data", "_".join(filter(None, (args.source, args.variant))))
    if args.val_percent is None:
        args.val_percent = 5.0 if args.source == "stdlib" else 2.0
    args.max_bytes = args.max_bytes or STDLIB_MAX_BYTES
    args.train_shards = args.train_shards or 1
    return args


def check_source(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with 2 if an option does not fit the source."""
    owners = {"patterns": "files", "max_bytes": "stdlib"}
    owners |= dict.fromkeys(("train_shards", "variant", "repo"), "fineweb")
    for name, source in owners.items():
        if getattr(args, name) and args.source != source:
            flag = "GLOB" if name == "patterns" else "--" + name.replace("_", "-")
            parser.error(f"{flag} needs --source {source}; got --source {args.source}")
    if args.source == "files" and not args.patterns:
        parser.error("--source files needs at least one GLOB, as in 'books/*.jsonl'")
    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        rule = f"must be OWNER/NAME of a dataset repository, as in {HUB_REPO}"
        parser.error(f"--repo={args.repo} {rule}")


# ==============================================================================
# 1  DOCUMENTS -- where text comes from and which split it belongs to
# ==============================================================================


@dataclass
class Corpus:
    """Documents that can be read more than once, and the rule that holds some of them out.

    `inputs` identifies the text for the manifest: equal inputs mean equal documents in equal order.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    rank: Callable[[bytes], int]  # of the SHA-256 of a text
    num_ranks: int
    limit: int  # lower ranks are held out
    inputs: dict[str, Any]
    skipped: dict[str, int] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)  # that are read again for every use
    stamps: list[tuple[int, int]] = field(default_factory=list)  # of these, when first read

    def is_val(self, key: bytes) -> bool:
        """Is the text with this SHA-256 held out?"""
        return self.rank(key) < self.limit

    def check_unchanged(self) -> None:
        """Raise UserError if a file is not what it was when its SHA-256 was taken."""
        for path, stamp in zip(self.paths, self.stamps, strict=True):
            if stamp_of(path) != stamp:
                fail(f"{path} changed while it was read; rerun the command when it is complete")

    def usable(self) -> Iterator[tuple[Document, bytes]]:
        """Yield every document that has tokens, with the SHA-256 of its text; count the others in
        `skipped`.
        """
        empty = marked = 0
        for document in self.documents():
            if not document.text.strip():
                empty += 1
            elif SPACE_MARK in document.text:
                marked += 1
            else:
                try:
                    data = document.text.encode()
                except UnicodeEncodeError as error:
                    char = hex(ord(document.text[error.start]))
                    fail(
                        f"{document.place}: text holds half a surrogate pair ({char}), which is no "
                        "character; remove it"
                    )
                if len(data) > MAX_DOCUMENT:
                    size = f"one document of {len(data):,} bytes, more than {MAX_DOCUMENT:,}"
                    remedy = "cut it into several files or JSONL lines"
                    fail(f"{document.place}: {size}; {remedy}")
                yield document, hashlib.sha256(data).digest()
        self.skipped |= {"empty": empty, "with_space_mark": marked}


class Splits:
    """Counts the documents of each split."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.counts = {"train": 0, "val": 0}
        self.lowest, self.highest = corpus.num_ranks, -1  # ranks of documents

    def add(self, key: bytes) -> str:
        """Count a document; return its split."""
        rank = self.corpus.rank(key)
        self.lowest, self.highest = min(rank, self.lowest), max(rank, self.highest)
        split = "val" if self.corpus.is_val(key) else "train"
        self.counts[split] += 1
        return split

    def check(self) -> None:
        """Raise UserError if a split is empty."""
        if not any(self.counts.values()):
            fail("no document with text was found; name other files")
        for split, other in (("train", "val"), ("val", "train")):
            if not self.counts[split]:
                why = f"all {self.counts[other]} documents fell into {other}"
                fail(f"the {split} split is empty: {why}; {self.remedy(split)}")

    def remedy(self, empty: str) -> str:
        """Advise a share that fills both splits, if there is one."""
        more = "add documents (a plain text file counts as one)"
        if self.lowest == self.highest:
            return f"no --val-percent tells them apart: {more}"
        limit = self.highest if empty == "train" else self.lowest + 1
        percent = limit * 100 / self.corpus.num_ranks
        verb = {"train": "lower", "val": "raise"}[empty]
        return f"{verb} it with --val-percent {percent:.7g}, or {more}"


# Where a text may be cut in two, best first.
CUTS = {
    "paragraph": re.compile(r"\n[^\S\n]*\n"),
    "line": re.compile(r"\n"),
    "sentence": re.compile(r"[.!?]\s|[\u3002\uff01\uff1f]"),
    "word": re.compile(r"\s"),
}


def cut_place(text: str, percent: float) -> tuple[int, str] | None:
    """Find where to cut a text so that about this share of it comes after, and behind what."""
    target, least = len(text) * (1 - percent / 100), len(text) - len(text.lstrip())
    for distance in (max(percent / 100, 0.05), 0.5):
        for kind, pattern in CUTS.items():
            ends = (match.end() for match in pattern.finditer(text))
            places = [end for end in ends if least < end < len(text.rstrip())]
            best = min(places, key=lambda end: abs(end - target), default=None)
            if best is not None and abs(best - target) <= distance * len(text):
                return best, kind
    return None


def cut_single(corpus: Corpus, percent: float) -> None:
    """Cut the only document of a corpus in two, so that there is text for both splits.

    Raises:
        UserError: there is no place for it.
    """
    found = list(itertools.islice(corpus.usable(), 2))
    if len(found) != 1:
        return
    whole, documents = found[0][0], corpus.documents
    at, kind = cut_place(whole.text, percent) or (0, "")
    parts = [Document(whole.text[:at], whole.place), Document(whole.text[at:], whole.place)]
    if not at or parts[0].text == parts[1].text:
        remedy = "break it into lines, or add documents (a plain text file counts as one)"
        fail(f"{whole.place}: the only document has no place to cut it for validation; {remedy}")

    def both() -> Iterator[Document]:
        for document in documents():
            yield from parts if document.text == whole.text else [document]

    held_out = hashlib.sha256(parts[1].text.encode()).digest()
    corpus.documents, corpus.rank = both, lambda key: int(key != held_out)
    corpus.num_ranks, corpus.limit = 2, 1
    corpus.inputs["cut_after"] = {"character": at, "end_of": kind}
    share = f"the last {100 - 100 * at / len(whole.text):.2g} %"
    warn(f"{whole.place} is one document: {share}, after a {kind}, are its validation split")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{path} cannot be read ({reason(error)}); check its permissions or leave it out")


def stdlib_paths(root: Path) -> Iterator[Path]:
    """Yield the Python files and texts of a standard library, without those wrong on purpose."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        installed = {"site-packages", "dist-packages"} & set(parts)
        if installed or parts[:3] == ("lib2to3", "tests", "data"):
            continue
        if path.suffix in (".py", ".rst", ".txt") and path.is_file():
            yield path


def stdlib_corpus(root: Path, max_bytes: int, val_percent: float) -> Corpus:
    """Collect the texts of a standard library, without duplicates, up to `max_bytes`.

    Documents come in order of the SHA-256 of their text, which is also the order they are dropped
    in at the cap, so the choice and the mixture depend on the library alone. Files that are not
    UTF-8 are counted and left out.
    """
    chosen: dict[bytes, Document] = {}
    documents, digest = list[Document](), hashlib.sha256()
    foreign = found = 0
    for path in stdlib_paths(root):
        found += 1
        try:
            text = read_bytes(path).decode("utf-8")
        except UnicodeDecodeError:
            foreign += 1
            continue
        document = Document(text, path.relative_to(root).as_posix())
        chosen.setdefault(hashlib.sha256(text.encode()).digest(), document)
    total = 0
    for key in sorted(chosen):
        size = len(chosen[key].text.encode())
        if total + size > max_bytes:
            break
        total += size
        digest.update(key)
        documents.append(chosen[key])
    duplicates, over_cap = found - foreign - len(chosen), len(chosen) - len(documents)
    skipped = {"not_utf8": foreign, "duplicates": duplicates, "over_cap": over_cap}
    inputs: dict[str, Any] = {"python": platform.python_version(), "files": len(documents)}
    inputs |= {"bytes": total, "sha256": digest.hexdigest()}

    def rank(key: bytes) -> int:
        return int.from_bytes(key[:4], "big") % 10_000

    limit = math.ceil(val_percent * 100)
    return Corpus("stdlib", lambda: iter(documents), rank, 10_000, limit, inputs, skipped)


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of a file; UserError: it is gone."""
    try:
        found = path.stat()
    except OSError as error:
        fail(f"{path} cannot be read ({reason(error)}); rerun the command when it is there")
    return found.st_size, found.st_mtime_ns


def file_sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fail(f"{path} cannot be read ({reason(error)}); check its permissions or leave it out")


def files_corpus(patterns: Sequence[str], val_percent: float) -> Corpus:
    """Read files, in the order named: JSON with a document in each object, text with one a file."""
    paths = find_files(patterns)
    stamps = [stamp_of(path) for path in paths]
    digest = hashlib.sha256("".join(file_sha256(path) for path in paths).encode()).hexdigest()
    inputs = {
        "files": len(paths),
        "bytes": sum(size for size, _ in stamps),
        "sha256": digest,
    }
    if others := num_other_json(paths):
        inputs["json_files"] = others  # a program before this one took them for text
    limit = round(256 * val_percent / 100)
    corpus = Corpus("files", lambda: read_files(paths), lambda key: key[0], 256, limit, inputs)
    corpus.paths, corpus.stamps = paths, stamps
    cut_single(corpus, val_percent)
    return corpus


# ==============================================================================
# 2  TOKENIZER -- trained on training text only, or brought along
# ==============================================================================


def training_sample(corpus: Corpus, max_bytes: int) -> list[str]:
    """Choose training documents of about `max_bytes` in all, by hash, in one pass and bounded
    memory.

    Raises:
        UserError: a split is empty.
    """
    heap: list[tuple[int, int, str]] = []  # largest key first: (-key, bytes, text)
    total, splits = 0, Splits(corpus)
    for document, key in progress(corpus.usable(), "read", "documents"):
        if splits.add(key) == "val":
            continue
        size = len(document.text.encode())
        # other bytes than the ones that split, or the sample would lean towards one end of the
        # training part
        heapq.heappush(heap, (-int.from_bytes(key[8:16], "big"), size, document.text))
        total += size
        while total - heap[0][1] >= max_bytes:
            total -= heapq.heappop(heap)[1]
    splits.check()
    return [entry[2] for entry in sorted(heap, reverse=True)]


# Of SentencePiece. A newline is a piece of its own and no other piece crosses it; runs of spaces
# may be pieces, for indentation; what is outside the alphabet is spelled in UTF-8 bytes.
TOKENIZER_OPTIONS: dict[str, Any] = dict(
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    user_defined_symbols=["\n"],
    character_coverage=0.9995,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    max_sentence_length=1 << 20,  # a line; the default of 4,192 bytes drops long ones
    shuffle_input_sentence=False,
    num_threads=2,  # a constant, because the model file records it
    minloglevel=2,
)


def sample_lines(sample: Sequence[str]) -> Iterator[str]:
    """Yield the lines of texts that the trainer takes, up to SAMPLE_BYTES."""
    budget = SAMPLE_BYTES
    for text in sample:
        for line in text.split("\n"):
            budget -= len(line.encode()) + 1
            if budget < 0:
                return
            if line and "\0" not in line:  # the trainer refuses NUL; encoding does not
                yield line


def fit_tokenizer(lines: Sequence[str], vocab_size: int, **options: Any) -> bytes:
    """Train a BPE and return its model file; RuntimeError: it cannot be."""
    import sentencepiece as spm

    model = io.BytesIO()
    options |= dict(vocab_size=vocab_size, model_writer=model, sentence_iterator=iter(lines))
    spm.SentencePieceTrainer.train(**TOKENIZER_OPTIONS, **options)
    return model.getvalue()


def train_tokenizer(sample: Sequence[str], vocab_size: int) -> bytes:
    """Train a BPE that gives every text back unchanged, and return its model file."""
    lines = list(sample_lines(sample)) or [SPACE_MARK]
    size = max(vocab_size, FIXED_PIECES)  # which never fit: then the error says how many do
    with contextlib.suppress(RuntimeError):
        model = fit_tokenizer(lines, size)
        if has_space(load_tokenizer(model, "the new tokenizer")):
            return model
    try:
        # Where spaces are rare, they are no piece unless they must be.
        return fit_tokenizer(lines, size, required_chars=SPACE_MARK)
    except (RuntimeError, OSError) as error:
        fail(f"--vocab-size={vocab_size} does not fit this text: {size_advice(reason(error))}")


def size_advice(message: str) -> str:
    """Turn what SentencePiece says of a vocabulary size into the size that fits."""
    fixed = f"{FIXED_PIECES} pieces are fixed (4 control, 256 bytes, newline)"
    if high := re.search(r"set it to a value <= (\d+)", message):
        return f"it has no more merges; use --vocab-size {high[1]} or less, or add text"
    if low := re.search(r"required_chars\. \d+ vs (\d+)", message):
        needed = f"{fixed} and each of its common characters needs one"
        if int(low[1]) > MAX_VOCAB:
            remedy = f"uint16 shards hold at most {MAX_VOCAB:,}; bring another by --tokenizer MODEL"
            return f"{needed}, {low[1]} in all; {remedy}"
        return f"{needed}; use --vocab-size {low[1]} or more"
    return f"{message.split('] ')[-1]}; {fixed}; change it or add text"


def has_space(tokenizer: spm.SentencePieceProcessor) -> bool:
    """Is a space alone a piece? Else it would be unknown, or spelled in three bytes."""
    return not tokenizer.is_unknown(tokenizer.piece_to_id(SPACE_MARK))


def load_tokenizer(data: bytes, name: str) -> spm.SentencePieceProcessor:
    """Open a SentencePiece model that fits uint16 shards.

    Raises:
        UserError: not a model, damaged, too many pieces, or no BOS.
    """
    import sentencepiece as spm

    try:
        # Without a model it would not complain.
        tokenizer = spm.SentencePieceProcessor(model_proto=data or b"empty")
        size, bos = tokenizer.vocab_size(), tokenizer.bos_id()
        for piece in range(size):
            tokenizer.id_to_piece(piece)
    except (RuntimeError, OSError, ValueError) as error:
        remedy = "name another, or train one without --tokenizer"
        fail(f"{name} is not a SentencePiece model ({reason(error)}); {remedy}")
    if size > MAX_VOCAB:
        rule = f"uint16 shards hold at most {MAX_VOCAB:,}; use a smaller vocabulary"
        fail(f"{name} has {size:,} pieces, {rule}")
    if bos < 0:
        fail(f"{name} has no BOS piece, which opens every document; train it with bos_id=1")
    return tokenizer


def check_spaces(tokenizer: spm.SentencePieceProcessor, name: str) -> None:
    """Raise UserError if bytes that training counts would exceed those of the text."""
    if not has_space(tokenizer):
        why = "spells it in three bytes, so bits per byte would come out too low"
        remedy = f"train it with required_chars={SPACE_MARK}, or train one without --tokenizer"
        fail(f"{name} has no piece for a space and {why}; {remedy}")


def check_roundtrip(
    tokenizer: spm.SentencePieceProcessor, batch: Sequence[Document], ids: list[Any], exact: bool
) -> list[str]:
    """Decode what was encoded, compare, and return it.

    Args:
        tokenizer: the model that made `ids`.
        batch: the documents.
        ids: one int array a document.
        exact: the text must come back unchanged. Otherwise the tokenizer may normalise it (fold
            white space, say), but doing so again must change nothing.
    """
    threads = num_threads()
    decoded: list[str] = tokenizer.decode(ids, num_threads=threads)
    expected, texts = [document.text for document in batch], decoded
    if not exact:
        expected = texts
        again = tokenizer.encode(texts, out_type="numpy", num_threads=threads)
        texts = tokenizer.decode(again, num_threads=threads)
    for i, document in enumerate(batch):
        before, after = expected[i], texts[i]
        if before != after:
            same = [a == b for a, b in zip(before, after, strict=False)]
            at = [*same, False].index(False)
            was, became = before[at : at + 20], after[at : at + 20]
            change = f"{was!r} became {became!r} at character {at:,}"
            remedy = "leave the document out or use another --tokenizer"
            fail(f"{document.place}: the tokenizer does not give the text back: {change}; {remedy}")
    return decoded


def check_counts(batch: Sequence[Document], decoded: Sequence[str], counted: Sequence[int]) -> None:
    """Raise UserError if more bytes are counted for a document than its decoded text has."""
    for document, text, num_bytes in zip(batch, decoded, counted, strict=True):
        if num_bytes > (size := len(text.encode())):
            counts = f"training would count {num_bytes:,} bytes for the {size:,} of its tokens"
            why = "so bits per byte would come out too low; use another --tokenizer"
            fail(f"{document.place}: {counts}, {why}")


def num_threads() -> int:
    return os.cpu_count() or 1


# ==============================================================================
# 3  SHARDS -- encoding, files and the manifest
# ==============================================================================


class ShardWriter:
    """Write the tokens of one split into consecutive shards of at most `limit` tokens."""

    def __init__(self, folder: Path, prefix: str, limit: int) -> None:
        self.folder = folder
        self.prefix = prefix
        self.limit = limit
        self.file: IO[bytes] | None = None
        self.held = 0  # tokens in the open shard
        self.documents = 0
        self.tokens = 0
        self.bytes = 0
        self.counted_bytes = 0  # as training counts them, by the tokens
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, tokens: np.ndarray[Any, Any], num_bytes: int, counted_bytes: int) -> None:
        """Append one document, BOS included; it may run on into the next shard."""
        self.documents += 1
        self.tokens += len(tokens)
        self.bytes += num_bytes
        self.counted_bytes += counted_bytes
        while len(tokens):
            if self.file is None or self.held == self.limit:
                self.open_next()
            part = tokens[: self.limit - self.held]
            assert self.file is not None
            self.file.write(part.astype("<u2").tobytes())
            self.held, tokens = self.held + len(part), tokens[len(part) :]

    @property
    def totals(self) -> dict[str, int]:
        """What the manifest says of the split."""
        names = ("documents", "tokens", "bytes", "counted_bytes")
        return {name: getattr(self, name) for name in names}

    def open_next(self) -> None:
        """Begin the next shard."""
        self.close()
        self.path = self.folder / f"{self.prefix}_{len(self.files):06d}.bin"
        self.file = open(self.path, "wb")  # noqa: SIM115 -- stays open over many documents
        self.file.write(header(0))

    def close(self) -> None:
        """Complete the open shard: its header, its entry in `files`."""
        if self.file is None:
            return
        with self.file as file:
            file.seek(0)
            file.write(header(self.held))
            file.flush()
            os.fsync(file.fileno())
        self.files[self.path.name] = {"tokens": self.held, "sha256": file_sha256(self.path)}
        self.file, self.held = None, 0

    def abandon(self) -> None:
        """Let go of a shard that an error left open."""
        if self.file is not None:
            # The disk may be full: that is being reported already.
            with contextlib.suppress(OSError):
                self.file.close()


def header(num_tokens: int) -> bytes:
    import numpy as np

    from train_gpt import SHARD_HEADER, SHARD_MAGIC

    values = np.zeros(SHARD_HEADER, dtype="<i4")
    values[:3] = SHARD_MAGIC, SHARD_VERSION, num_tokens
    return values.tobytes()


def progress(items: Iterable[Item], label: str, unit: str) -> Iterator[Item]:
    """Pass items through, with a bar on a terminal."""
    from tqdm import tqdm

    yield from tqdm(
        items, desc=label, unit=f" {unit}", disable=not sys.stderr.isatty(), file=sys.stderr
    )


def batches(items: Iterator[tuple[Document, bytes]]) -> Iterator[list[tuple[Document, bytes]]]:
    """Group documents until they hold BATCH_BYTES characters."""
    batch: list[tuple[Document, bytes]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[0].text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Encoder:
    """Turns documents into tokens, and checks what comes back and how training counts it."""

    def __init__(self, model: Path, tokenizer: spm.SentencePieceProcessor, exact: bool) -> None:
        import numpy as np

        import train_gpt as tg

        self.tokenizer = tokenizer
        self.exact = exact
        self.bos = np.array([tokenizer.bos_id()])
        cfg = tg.Config(tokenizer_path=str(model), vocab_size=tokenizer.vocab_size())
        self.counter = tg.ByteCounter(cfg)

    def encode(self, documents: Sequence[Document]) -> list[tuple[np.ndarray[Any, Any], int]]:
        """Return the tokens of each document, BOS first, and the bytes counted for them."""
        import numpy as np

        texts = [document.text for document in documents]
        ids = self.tokenizer.encode(texts, out_type="numpy", num_threads=num_threads())
        decoded = check_roundtrip(self.tokenizer, documents, ids, self.exact)
        rows = [np.concatenate((self.bos, tokens)) for tokens in ids]
        counted = [self.count(row) for row in rows]
        check_counts(documents, decoded, counted)
        return list(zip(rows, counted, strict=True))

    def count(self, row: np.ndarray[Any, Any]) -> int:
        """Count the bytes of a document as training does."""
        import torch

        tokens = torch.from_numpy(row).long()
        return int(self.counter.count(tokens[:-1], tokens[1:]).sum())


def encode_corpus(
    corpus: Corpus, encoder: Encoder, folder: Path, shard_tokens: int
) -> dict[str, ShardWriter]:
    """Write all shards of a corpus into a folder; return the closed writers of both splits.

    Raises:
        UserError: a text does not survive encoding, or a split would be empty.
    """
    splits, writers = Splits(corpus), dict[str, ShardWriter]()
    with contextlib.ExitStack() as stack:
        for split in splits.counts:
            writers[split] = ShardWriter(folder, f"{corpus.name}_{split}", shard_tokens)
            stack.callback(writers[split].abandon)
        for batch in batches(progress(corpus.usable(), "encode", "documents")):
            encoded = encoder.encode([document for document, _ in batch])
            for source, (tokens, counted) in zip(batch, encoded, strict=True):
                document, key = source
                writers[splits.add(key)].add(tokens, len(document.text.encode()), counted)
        for writer in writers.values():
            writer.close()
    splits.check()
    return writers


def build(corpus: Corpus, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Make tokenizer, shards and manifest in a staging folder, then move them into --out together.

    Until everything is written, whatever --out holds stays as it was.
    """
    staging, given = args.out / STAGING, args.tokenizer
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if given:
            model = read_bytes(given)
        else:
            model = train_tokenizer(training_sample(corpus, SAMPLE_BYTES), args.vocab_size)
        name = f"--tokenizer={given}" if given else "the new tokenizer"
        tokenizer = load_tokenizer(model, name)
        check_spaces(tokenizer, name)
        (staging / TOKENIZER).write_bytes(model)
        encoder = Encoder(staging / TOKENIZER, tokenizer, given is None)
        writers = encode_corpus(corpus, encoder, staging, args.shard_tokens)
        corpus.check_unchanged()
        sha256, size = hashlib.sha256(model).hexdigest(), tokenizer.vocab_size()
        manifest = {
            "settings": settings,
            "tokenizer": {"sha256": sha256, "vocab_size": size},
            "splits": {split: writer.totals for split, writer in writers.items()},
            "skipped": dict(sorted(corpus.skipped.items())),
            "files": {name: row for w in writers.values() for name, row in w.files.items()},
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        install(staging, args.out, list(manifest["files"]))
    except OSError as error:
        kept = "shards that were there are intact: free space or name another folder"
        fail(f"--out={args.out} could not be written ({reason(error)}); {kept}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def install(staging: Path, out: Path, shards: Sequence[str]) -> None:
    """Move finished files into place, the manifest last, and remove shards it does not list."""
    for name in [*shards, TOKENIZER]:
        os.replace(staging / name, out / name)
    for path in shards_in(out):
        if path.name not in shards:
            path.unlink()
    os.replace(staging / MANIFEST, out / MANIFEST)


def shards_in(out: Path) -> list[Path]:
    return sorted([*out.glob("*_train_*.bin"), *out.glob("*_val_*.bin")])


def read_manifest(out: Path) -> dict[str, Any]:
    """Return the manifest of a folder, or an empty one if there is none of ours."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest["settings"], dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def refuse_other(out: Path, old: dict[str, Any], settings: dict[str, Any]) -> None:
    """Stop before shards of other settings would be replaced, saying which settings differ."""
    before = old.get("settings", {})
    if not shards_in(out) or before == settings:
        return
    every = dict.fromkeys([*settings, *before])
    keys = [key for key in every if settings.get(key) != before.get(key)]
    changes = [f"{key} {short(before.get(key))} -> {short(settings.get(key))}" for key in keys]
    differing = "; ".join(changes) if before else "no manifest"
    remedy = "name another folder, or replace them with --force"
    fail(f"--out={out} already holds shards made otherwise ({differing}); {remedy}")


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_complete(out: Path, old: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Do the manifest's settings and files agree with what is asked and what is there?"""
    there = {path.name for path in shards_in(out)}
    if old.get("settings") != settings or there != old.get("files", {}).keys():
        return False
    wanted = {name: row["sha256"] for name, row in old["files"].items()}
    wanted[TOKENIZER] = old["tokenizer"]["sha256"]
    return all(
        (out / name).is_file() and file_sha256(out / name) == digest
        for name, digest in wanted.items()
    )


def make_corpus(corpus: Corpus, args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Build a corpus unless --out holds it; return its manifest, and whether it was there."""
    given = args.tokenizer
    settings = {
        "source": corpus.name,
        "vocab_size": None if given else args.vocab_size,
        "tokenizer": hashlib.sha256(read_bytes(given)).hexdigest() if given else None,
        "val_percent": args.val_percent,
        "shard_tokens": args.shard_tokens,
        "inputs": corpus.inputs,
    }
    old = read_manifest(args.out)
    if is_complete(args.out, old, settings):
        return old, True
    if not args.force:
        refuse_other(args.out, old, settings)
    return build(corpus, settings, args), False


def make_stdlib(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Prepare the Python standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return make_corpus(stdlib_corpus(root, args.max_bytes, args.val_percent), args)


def make_files(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    return make_corpus(files_corpus(args.patterns, args.val_percent), args)


# ==============================================================================
# 4  FINEWEB -- the challenge's published shards, fetched and verified
# ==============================================================================


class Export(NamedTuple):
    """One variant of the published data, in one dataset repository."""

    repo: str
    variant: str

    @property
    def dataset(self) -> str:
        return f"fineweb10B_{self.variant}"

    @property
    def tokenizer(self) -> str:
        return f"tokenizers/fineweb_{VARIANTS[self.variant]}_bpe.model"

    @property
    def settings(self) -> dict[str, Any]:
        return {"source": "fineweb", "repo": self.repo, "dataset": self.dataset}


class Published(NamedTuple):
    """What a repository holds of one export."""

    num_train: int
    num_val: int
    tokenizer: str  # its path under the root folder


def fetch(out: Path, export: Export, remote: str, again: bool = False) -> Path:
    """Download one file of the published export; an interrupted download continues.

    Args:
        out: the --out folder, in which a hidden folder receives the file.
        export: names the repository.
        remote: path inside the export.
        again: ignore what was downloaded before.

    Raises:
        UserError: huggingface_hub is missing, or the download failed.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        remedy = "pip install -r requirements-dev.txt"
        fail(f"--source fineweb needs the package huggingface_hub: {remedy}")
    path = Path(HUB_ROOT) / remote
    where: dict[str, Any] = dict(subfolder=path.parent.as_posix(), repo_type="dataset")
    where |= dict(local_dir=str(out / DOWNLOADS), force_download=again)
    try:
        return Path(str(hf_hub_download(repo_id=export.repo, filename=path.name, **where)))
    except Exception as error:  # hub, HTTP library and disk each have a family of errors
        remedy = "check network and disk space, then rerun the command: finished shards are kept"
        fail(f"{remote} of {export.repo} could not be downloaded ({reason(error)}); {remedy}")


def refuse_missing(export: Export, where: str, held: Iterable[str]) -> NoReturn:
    """Say that a repository lacks a variant, where it was looked for, and what is there."""
    names = ", ".join(sorted(held)) or "none"
    lacks = f"--variant={export.variant}: {export.repo} has no dataset {export.dataset}"
    remedy = "name another --variant, or another repository by --repo OWNER/NAME"
    fail(f"{lacks} (looked for in {where}; it holds: {names}); {remedy}")


def list_files(export: Export) -> list[str]:
    """List the paths in a repository under the root folder; empty if the hub does not say."""
    try:
        from huggingface_hub import list_repo_files

        names = list_repo_files(export.repo, repo_type="dataset")
    except Exception:  # as for fetch, whose error is the one to show
        return []
    return [name.removeprefix(f"{HUB_ROOT}/") for name in names if name.startswith(f"{HUB_ROOT}/")]


def listed_shards(export: Export, files: Sequence[str]) -> Published:
    """Count shards by their names where there is no manifest; UserError: there are none."""
    folder = f"datasets/{export.dataset}/fineweb"
    train, val = (
        sum(name.startswith(f"{folder}_{split}_") for name in files) for split in ("train", "val")
    )
    if not train or not val:
        held = {name.split("/")[1] for name in files if name.startswith("datasets/")}
        refuse_missing(export, f"{HUB_ROOT}/datasets/{export.dataset}/", held)
    if export.tokenizer not in files:
        models = ", ".join(name for name in files if name.endswith(".model")) or "none"
        lacks = f"{export.repo} has no {HUB_ROOT}/{export.tokenizer} (its models: {models})"
        remedy = "the shards need their tokenizer: name another repository by --repo OWNER/NAME"
        fail(f"--variant={export.variant}: {lacks}; {remedy}")
    return Published(train, val, export.tokenizer)


def manifest_shards(export: Export, path: Path) -> Published:
    """Read what a repository's manifest says of an export; UserError: not as expected."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in manifest["datasets"]}
        if export.dataset not in rows:
            refuse_missing(export, f"{HUB_ROOT}/{MANIFEST}", rows)
        entry, tokenizer = rows[export.dataset], export.tokenizer
        train, val = (int(entry["stats"][f"files_{split}"]) for split in ("train", "val"))
        wanted = entry.get("tokenizer_name")
        for row in [row for row in manifest.get("tokenizers", []) if row.get("name") == wanted][:1]:
            tokenizer = str(row.get("model_path") or export.tokenizer)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {reason(error)}"
        found = f"the manifest of {export.repo} does not describe {export.dataset} as expected"
        fail(f"{found} ({why}); the export has changed: use --source files")
    return Published(train, val, tokenizer)


def published_shards(out: Path, export: Export) -> Published:
    """Ask the manifest, or without one the list of files, for the shards and the tokenizer."""
    from train_gpt import UserError

    try:
        path = fetch(out, export, MANIFEST)
    except UserError:
        files = list_files(export)
        if not files or MANIFEST in files:
            raise
        return listed_shards(export, files)
    return manifest_shards(export, path)


def shard_fault(path: Path) -> str:
    """Say what is wrong with a shard, judging by its header and length; empty if nothing."""
    import numpy as np

    from train_gpt import SHARD_HEADER

    try:
        found, size = np.fromfile(path, dtype="<i4", count=SHARD_HEADER), path.stat().st_size
    except OSError as error:
        return f"{path} cannot be read ({reason(error)})"
    if len(found) < SHARD_HEADER or found.tobytes() != header(int(found[2])):
        return f"{path} is not a token shard"
    held = (size - found.nbytes) / 2
    fault = f"{path} announces {found[2]:,} tokens but holds {held:,.1f}"
    return "" if 0 < found[2] == held else fault


def fetch_shard(out: Path, export: Export, name: str) -> None:
    """Bring one shard into --out unless a sound one is there.

    Raises:
        UserError: it is damaged even when downloaded anew.
    """
    for again in (False, True):
        if not (fault := shard_fault(out / name)):
            return
        if (out / name).exists():
            print(f"downloading again: {fault}", file=sys.stderr)
        os.replace(fetch(out, export, f"datasets/{export.dataset}/{name}", again), out / name)
    if fault := shard_fault(out / name):
        (out / name).unlink()
        twice = f"{export.repo} or the way from it damaged a file twice: {fault}"
        fail(f"{twice}; rerun the command later")


def describe_shards(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Count tokens and documents of downloaded shards for the manifest; bytes of text are not
    known.
    """
    import numpy as np

    from train_gpt import SHARD_HEADER

    tokenizer = load_tokenizer((out / TOKENIZER).read_bytes(), str(out / TOKENIZER))
    splits = {split: {"documents": 0, "tokens": 0, "bytes": None} for split in ("train", "val")}
    files = {}
    for name in names:
        tokens = np.memmap(out / name, dtype="<u2", mode="r", offset=SHARD_HEADER * 4)
        row: dict[str, Any] = splits[name.split("_")[1]]
        if (worst := int(tokens.max())) >= (size := tokenizer.vocab_size()):
            why = f"holds token {worst}, its tokenizer has {size} pieces"
            remedy = "they are of different variants: name another --repo, or an empty --out"
            fail(f"{out / name} {why}; {remedy}")
        row["tokens"] += len(tokens)
        row["documents"] += int(np.count_nonzero(tokens == tokenizer.bos_id()))
        files[name] = {"tokens": len(tokens), "sha256": file_sha256(out / name)}
    return {
        "tokenizer": {"sha256": file_sha256(out / TOKENIZER), "vocab_size": tokenizer.vocab_size()},
        "splits": splits,
        "skipped": {},
        "files": files,
    }


def unfinished(out: Path) -> dict[str, Any]:
    """Return the settings of a download that was cut off, or none."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out / DOWNLOADS / SETTINGS).read_text(encoding="utf-8"))
    return found


def settings_of(out: Path, old: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the shards in --out, finished or not; empty if there are none."""
    return old.get("settings") or unfinished(out)


def wanted_shards(args: argparse.Namespace, export: Export, old: dict[str, Any]) -> set[str]:
    """Name the training shards; UserError: --out holds others that would go."""
    out, before = args.out, settings_of(args.out, old)
    others = [path for path in shards_in(out) if not path.name.startswith("fineweb_")]
    if not args.force and (others or (before or export.settings) != export.settings):
        refuse_other(out, {"settings": before} if before else {}, export.settings)
    wanted = {f"fineweb_train_{i:06d}.bin" for i in range(args.train_shards)}
    held = train_shards_in(out)
    if not args.force and held - wanted:
        fewer = f"is fewer than the {len(held)} that --out={out} holds"
        remedy = "name another folder, or remove the others with --force"
        why = f"{fewer}, and training reads all of a folder"
        fail(f"--train-shards={args.train_shards} {why}; {remedy}")
    return wanted


def train_shards_in(out: Path) -> set[str]:
    """Return the names of the training shards of a folder."""
    return {path.name for path in out.glob("*_train_*.bin")}


def begin(out: Path, export: Export, tokenizer: Path) -> None:
    """Put the tokenizer into --out, and remove shards of another export: they have equal names."""
    before = settings_of(out, read_manifest(out))
    (out / DOWNLOADS / SETTINGS).write_text(json.dumps(export.settings), encoding="utf-8")
    for path in shards_in(out) if before not in ({}, export.settings) else ():
        path.unlink()
    os.replace(tokenizer, out / TOKENIZER)


def download(args: argparse.Namespace, export: Export, wanted: set[str]) -> dict[str, Any]:
    """Bring tokenizer and shards into --out, and replace the manifest last."""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    published = published_shards(out, export)
    if args.train_shards > published.num_train:
        held = f"the {published.num_train} that {export.repo} publishes of {export.dataset}"
        fail(f"--train-shards={args.train_shards} is more than {held}; lower it")
    names = [f"fineweb_val_{i:06d}.bin" for i in range(published.num_val)] + sorted(wanted)
    begin(out, export, fetch(out, export, published.tokenizer))
    for name in progress(names, "download", "shards"):
        fetch_shard(out, export, name)
    manifest = {"settings": export.settings, **describe_shards(out, names)}
    text = json.dumps(manifest, indent=1) + "\n"
    (out / DOWNLOADS / MANIFEST).write_text(text, encoding="utf-8")
    for name in {path.name for path in shards_in(out)} - set(names):
        (out / name).unlink()
    os.replace(out / DOWNLOADS / MANIFEST, out / MANIFEST)
    shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
    return manifest


def make_fineweb(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Download the val split and the first --train-shards shards; finished ones are kept."""
    old, export = read_manifest(args.out), Export(args.repo or HUB_REPO, args.variant or "sp1024")
    wanted = wanted_shards(args, export, old)
    faults = [shard_fault(args.out / name) for name in old.get("files", {})]
    whole = old.get("settings") == export.settings and train_shards_in(args.out) == wanted
    if whole and not any(faults):
        return old, True
    try:
        return download(args, export, wanted), False
    except OSError as error:
        kept = "finished shards are kept: free space and rerun the command"
        fail(f"--out={args.out} could not be written ({reason(error)}); {kept}")


SOURCES: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], bool]]] = {
    "stdlib": make_stdlib,
    "files": make_files,
    "fineweb": make_fineweb,
}


def describe_split(split: str, row: dict[str, Any]) -> str:
    """Write the sizes of a split in one line; warn if training counts other bytes."""
    text = f"  {split:<6}{row['documents']:>10,} documents  {row['tokens']:>12,} tokens"
    num_bytes, counted = row["bytes"], row.get("counted_bytes")
    if not num_bytes:
        return text
    per_token = f"{num_bytes / row['tokens']:.3f} bytes per token"
    if counted is not None and abs(counted - num_bytes) > num_bytes * COUNT_TOLERANCE:
        figures = f"{counted:,} bytes counted by tokens, {num_bytes:,} bytes of source text"
        rule = f"val_bpb divides by the former, which is {counted / num_bytes:.4f} of the latter"
        warn(f"{split}: {figures}: the tokenizer changes the text; {rule}")
        per_token += f"  ({counted:,} bytes counted)"
    return f"{text}  {num_bytes:>12,} bytes  {per_token}"


def summary(manifest: dict[str, Any], out: Path, was_there: bool, seconds: float) -> dict[str, Any]:
    """Print sizes for people; return them for programs."""
    print(f"{out} was already complete" if was_there else f"{out} written in {seconds:.1f} s")
    sizes: dict[str, Any] = {}
    for split, row in manifest["splits"].items():
        print(describe_split(split, row))
        sizes |= {f"{split}_{key}": value for key, value in row.items()}
    skipped = [f"{count} {why}" for why, count in manifest["skipped"].items() if count]
    if skipped:
        print("  left out:", ", ".join(skipped))
    about = {"data_path": str(out), "tokenizer_path": str(out / TOKENIZER)}
    about["vocab_size"] = manifest["tokenizer"]["vocab_size"]
    settings = " ".join(f"{name.upper()}={shlex.quote(str(x))}" for name, x in about.items())
    print(f"train on it: {settings} python train_gpt.py")
    return {**about, **sizes, "was_complete": was_there, "seconds": round(seconds, 2)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare the data; UserError: it cannot be."""
    began = time.perf_counter()
    manifest, was_there = SOURCES[args.source](args)
    return summary(manifest, args.out, was_there, time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args), resume="what --out held stays; rerun the command")


if __name__ == "__main__":
    sys.exit(main())
