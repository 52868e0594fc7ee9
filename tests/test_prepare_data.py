"""prepare_data.py: what is in the shards, that it is the text, and that every fault is named."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import random
import re
import resource
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import zstandard

import train_gpt as tg
from scripts import prepare_data as prep
from tests.conftest import train_tokenizer

BOS = 1
VOCAB = "400"
HARD_TEXTS = [
    "日本語の文章と漢字。\n\n\n二行目\n",
    "naïve café — Ελληνικά, русский текст, עברית 🙂\n",
    "def f(x):\n    if x:\n\t\treturn  x   \n\n\n",
    "  leading and trailing spaces  ",
    "\n\n\nbare newlines\n\n",
    "crlf\r\nline\r\n\ttab",
    "literal <s> </s> <unk> <0x0A> and a NUL \0 inside",
]


def sentence(i: int) -> str:
    words = ["value", "return", "index", "total", "while", "number", "string", "result"]
    chosen = [words[(i * k + k) % len(words)] for k in range(1, 9)]
    return (
        f"def name_{i}(x):\n    {' '.join(chosen)} = {i * 37}\n        # "
        f"{' '.join(reversed(chosen))}\n"
    )


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree that stands in for the standard library."""
    root = tmp_path / "stdlib"
    for i in range(120):
        path = root / ("pkg" if i % 3 else ".") / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sentence(i).encode())
    for i, text in enumerate(HARD_TEXTS):
        (root / f"hard_{i}.txt").write_bytes(text.encode())
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """400 documents, enough for both splits at 2 percent."""
    path = tmp_path / "docs.jsonl"
    path.write_text(
        "".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(400)), encoding="utf-8"
    )
    return path


@pytest.fixture
def folding_tokenizer(tmp_path: Path, jsonl: Path) -> Path:
    """A SentencePiece model with the usual settings, which fold white space and drop newlines."""
    path = tmp_path / "folding.model"
    with open(path, "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(sentence(i) for i in range(400)),
            model_writer=file,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            add_dummy_prefix=False,
            minloglevel=2,
        )
    return path


def tokens_of(out: Path, split: str) -> np.ndarray[Any, Any]:
    """All tokens of a split, read from the bytes of the format and not through our own reader."""
    parts = []
    for path in sorted(out.glob(f"*_{split}_*.bin")):
        raw = path.read_bytes()
        header = np.frombuffer(raw[:1024], dtype="<i4")
        assert header[:2].tolist() == [20240520, 1]
        assert not header[3:].any()
        assert len(raw) == 1024 + 2 * int(header[2])
        parts.append(np.frombuffer(raw[1024:], dtype="<u2"))
    return np.concatenate(parts)


def texts_of(out: Path, split: str) -> list[str]:
    """Decode a split document by document; each must begin with BOS."""
    tokens = tokens_of(out, split)
    tokenizer = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert tokens[0] == BOS
    starts = np.flatnonzero(tokens == BOS)
    documents = np.split(tokens, starts[1:])
    return [tokenizer.decode(document[1:].tolist()) for document in documents]


def manifest_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def run_ok(*argv: object) -> None:
    assert prep.main([str(arg) for arg in argv]) == 0


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, require exit status 2, and return what it said."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert prep.main([str(arg) for arg in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        message = captured.err.splitlines()[-1]
        assert message.startswith("error: ")
        return message

    return run


def test_stdlib_text_comes_back_byte_for_byte_and_splits_are_disjoint(
    stdlib: Path, tmp_path: Path
) -> None:
    run_ok("--out", tmp_path / "out", "--vocab-size", VOCAB)
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    expected = {path.read_bytes().decode() for path in stdlib.rglob("*") if path.is_file()}
    assert set(HARD_TEXTS) <= expected
    assert set(train) | set(val) == expected
    assert len(train) + len(val) == len(expected)  # and none twice
    for text in expected:
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        assert (text in val) == (number % 10_000 < 500)


def test_the_manifest_counts_what_the_shards_hold(stdlib: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_ok("--out", out, "--vocab-size", VOCAB)
    manifest = manifest_of(out)
    for split in ("train", "val"):
        texts = texts_of(out, split)
        expected = {
            "documents": len(texts),
            "tokens": len(tokens_of(out, split)),
            "bytes": sum(len(text.encode()) for text in texts),
            "counted_bytes": sum(len(text.encode()) for text in texts),
        }
        assert manifest["splits"][split] == expected
    for name, row in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == row["sha256"]
    assert (
        hashlib.sha256((out / "tokenizer.model").read_bytes()).hexdigest()
        == manifest["tokenizer"]["sha256"]
    )
    assert str(tmp_path) not in (out / "manifest.json").read_text(encoding="utf-8")


def test_training_counts_the_same_bytes(stdlib: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_ok("--out", out, "--vocab-size", VOCAB)
    counter = tg.ByteCounter(
        tg.Config(vocab_size=int(VOCAB), tokenizer_path=str(out / "tokenizer.model"))
    )
    for split in ("train", "val"):
        tokens = tg.torch.from_numpy(tokens_of(out, split).astype(np.int64))
        assert (
            int(counter.count(tokens[:-1], tokens[1:]).sum())
            == manifest_of(out)["splits"][split]["bytes"]
        )


def test_the_tokenizer_keeps_newlines_and_indentation_as_pieces(
    stdlib: Path, tmp_path: Path
) -> None:
    run_ok("--out", tmp_path / "out", "--vocab-size", VOCAB)
    tokenizer = spm.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert len(pieces) == int(VOCAB)
    assert "\n" in pieces
    assert [piece for piece in pieces if "\n" in piece] == ["\n"]
    assert "\u2581" * 4 in pieces
    assert pieces[:4] == ["<pad>", "<s>", "</s>", "<unk>"]


def test_two_runs_give_the_same_bytes(stdlib: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_ok("--out", tmp_path / name, "--vocab-size", VOCAB)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "manifest.json",
        "stdlib_train_000000.bin",
        "stdlib_val_000000.bin",
        "tokenizer.model",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_stdlib_leaves_out_what_is_not_its_source(stdlib: Path) -> None:
    for name in ("site-packages/x.py", "dist-packages/x.py", "lib2to3/tests/data/x.py", "x.pyc"):
        (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / name).write_text("print('not ours')\n", encoding="utf-8")
    (stdlib / "latin.py").write_bytes("# caf\u00e9\n".encode("latin-1"))
    (stdlib / "twin.py").write_text(sentence(0), encoding="utf-8")
    corpus = prep.stdlib_corpus(stdlib, 10**9, 5.0)
    assert "print('not ours')\n" not in [document.text for document in corpus.documents()]
    assert corpus.skipped == {"not_utf8": 1, "duplicates": 1, "over_cap": 0}


def test_the_cap_takes_documents_in_order_of_their_hash(stdlib: Path) -> None:
    def key(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    everything = [document.text for document in prep.stdlib_corpus(stdlib, 10**9, 5.0).documents()]
    assert everything == sorted(everything, key=key)
    capped = prep.stdlib_corpus(stdlib, 5000, 5.0)
    some = [document.text for document in capped.documents()]
    assert some == everything[: len(some)]
    total = sum(len(text.encode()) for text in some)
    assert total <= 5000 < total + len(everything[len(some)].encode())
    assert capped.skipped["over_cap"] == len(everything) - len(some)
    assert capped.inputs != prep.stdlib_corpus(stdlib, 10**9, 5.0).inputs


def test_a_second_run_changes_nothing_and_says_so(
    stdlib: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_ok("--out", tmp_path / "out", "--vocab-size", VOCAB)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    with monkeypatch.context() as patch:
        patch.setattr(prep, "build", lambda *_: pytest.fail("built again"))
        run_ok("--out", tmp_path / "out", "--vocab-size", VOCAB)
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (first.pop("was_complete"), second.pop("was_complete")) == (False, True)
    del first["seconds"], second["seconds"]
    assert first == second


@pytest.mark.parametrize("name", ["stdlib_train_000000.bin", "tokenizer.model"])
def test_a_damaged_or_missing_file_is_made_again(stdlib: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run_ok("--out", out, "--vocab-size", VOCAB)
    good = (out / name).read_bytes()
    (out / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    run_ok("--out", out, "--vocab-size", VOCAB)
    assert (out / name).read_bytes() == good
    (out / name).unlink()
    run_ok("--out", out, "--vocab-size", VOCAB)
    assert (out / name).read_bytes() == good


def test_changed_text_is_noticed(stdlib: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    run_ok("--out", tmp_path / "out", "--vocab-size", VOCAB)
    (stdlib / "more.py").write_text("import this\n", encoding="utf-8")
    assert "inputs" in fails("--out", tmp_path / "out", "--vocab-size", VOCAB)


def test_other_settings_need_force_and_leave_no_old_shard(
    stdlib: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    run_ok("--out", out, "--vocab-size", VOCAB, "--shard-tokens", 1500)
    many = len(list(out.glob("*_train_*.bin")))
    assert many > 1
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    message = fails("--out", out, "--vocab-size", VOCAB)
    assert "shard_tokens 1500 -> 100000000" in message
    assert "--force" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run_ok("--out", out, "--vocab-size", VOCAB, "--force")
    assert len(list(out.glob("*_train_*.bin"))) == 1


def test_shards_without_a_manifest_are_not_overwritten(
    stdlib: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    shard = tmp_path / "out" / "mine_train_000000.bin"
    shard.parent.mkdir()
    shard.write_bytes(b"precious")
    for manifest in (None, "{}", '{"datasets": []}', "not json"):
        if manifest is not None:
            (tmp_path / "out" / "manifest.json").write_text(manifest, encoding="utf-8")
        assert "no manifest" in fails("--out", tmp_path / "out", "--vocab-size", VOCAB)
    assert shard.read_bytes() == b"precious"


def test_cutting_into_shards_does_not_change_the_stream(stdlib: Path, tmp_path: Path) -> None:
    run_ok("--out", tmp_path / "one", "--vocab-size", VOCAB)
    run_ok("--out", tmp_path / "many", "--vocab-size", VOCAB, "--shard-tokens", 100)
    for split in ("train", "val"):
        assert np.array_equal(
            tokens_of(tmp_path / "one", split), tokens_of(tmp_path / "many", split)
        )
    sizes = [
        row["tokens"]
        for name, row in manifest_of(tmp_path / "many")["files"].items()
        if "train" in name
    ]
    assert len(sizes) > 10
    assert set(sizes[:-1]) == {100}
    assert 0 < sizes[-1] <= 100


def test_files_of_every_kind_are_read_and_split_by_the_first_byte(
    tmp_path: Path, jsonl: Path
) -> None:
    hard = [
        json.dumps({"text": text, "id": i}, ensure_ascii=bool(i % 2))
        for i, text in enumerate(HARD_TEXTS[1:])
    ]
    with gzip.open(tmp_path / "some.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(hard[:3]))
    with lzma.open(tmp_path / "more.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n\n".join(hard[3:]) + "\n")
    edge = next(
        sentence(i)
        for i in range(400, 9999)
        if hashlib.sha256(sentence(i).encode()).digest()[0] == 5
    )
    (tmp_path / "plain_0.txt").write_bytes(HARD_TEXTS[0].encode())
    (tmp_path / "plain_1.txt").write_bytes(edge.encode())
    out = tmp_path / "out"
    arguments = [
        "--source",
        "files",
        tmp_path / "*.jsonl",
        tmp_path / "some*",
        "--files",
        tmp_path / "more*",
    ]
    run_ok(*arguments, tmp_path / "plain_?.txt", "--out", out, "--vocab-size", "450")
    train, val = texts_of(out, "train"), texts_of(out, "val")
    expected = [sentence(i) for i in range(400)] + [*HARD_TEXTS, edge]
    assert sorted(train + val) == sorted(expected)
    assert val
    assert val == [text for text in expected if text in val]  # in the order of the files
    for text in expected:
        assert (text in val) == (hashlib.sha256(text.encode()).digest()[0] < 5)


def test_a_tokenizer_brought_along_is_kept_and_may_fold_white_space(
    tmp_path: Path, jsonl: Path, folding_tokenizer: Path
) -> None:
    out = tmp_path / "out"
    run_ok("--source", "files", jsonl, "--tokenizer", folding_tokenizer, "--out", out)
    assert (out / "tokenizer.model").read_bytes() == folding_tokenizer.read_bytes()
    assert sorted(texts_of(out, "train") + texts_of(out, "val")) == sorted(
        " ".join(sentence(i).split()) for i in range(400)
    )


def test_a_lossy_tokenizer_of_our_own_is_refused(
    jsonl: Path,
    tmp_path: Path,
    folding_tokenizer: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prep, "train_tokenizer", lambda *_: folding_tokenizer.read_bytes())
    message = fails("--source", "files", jsonl, "--out", tmp_path / "out")
    assert f"{jsonl}, line 1: the tokenizer does not give the text back" in message


def test_the_tokenizer_sees_training_text_only(
    stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = prep.train_tokenizer
    monkeypatch.setattr(
        prep, "train_tokenizer", lambda sample, size: (seen.extend(sample), train(sample, size))[1]
    )
    run_ok("--out", tmp_path / "out", "--vocab-size", VOCAB, "--val-percent", "30")
    assert len(texts_of(tmp_path / "out", "val")) > 10
    assert sorted(seen) == sorted(texts_of(tmp_path / "out", "train"))


def test_the_sample_is_bounded_and_does_not_depend_on_order(stdlib: Path) -> None:
    corpus = prep.stdlib_corpus(stdlib, 10**9, 5.0)
    documents = list(corpus.documents())
    sample = prep.training_sample(corpus, 3000)
    corpus.documents = lambda: iter(documents[::-1])
    assert prep.training_sample(corpus, 3000) == sample
    sizes = [len(text.encode()) for text in sample]
    assert sum(sizes) >= 3000 > sum(sizes[:-1])


def prepare_texts(tmp_path: Path, texts: Sequence[str], *argv: object) -> list[str]:
    """Prepare texts, one a JSONL line; return them from the shards, without the split's order."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    run_ok("--source", "files", path, "--out", tmp_path / "out", "--val-percent", 30, *argv)
    return texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")


def draw_texts(alphabet: str, count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(alphabet, k=draw.randint(20, 90))) for _ in range(count)]


@pytest.mark.parametrize(
    ("texts", "size"),
    [
        ([*draw_texts("ACGT", 30), "A C\n G"], 290),  # one space in thousands of characters
        (draw_texts("ACGT", 30), 290),  # none
        (draw_texts("0123456789", 30), 272),
        (draw_texts("\n\t x", 30), 268),
        ([*draw_texts("".join(map(chr, range(0x4E00, 0x5400))), 60), "丁 七"], 1900),
        ([f"\0{text}" for text in draw_texts("ab", 30)], 262),  # no line can be trained on
    ],
)
def test_a_trained_tokenizer_gives_every_text_back(
    tmp_path: Path, texts: list[str], size: int
) -> None:
    assert sorted(prepare_texts(tmp_path, texts, "--vocab-size", size)) == sorted(texts)
    model = spm.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert model.decode(model.encode(" a  b\n c ")) == " a  b\n c "
    for row in manifest_of(tmp_path / "out")["splits"].values():
        assert row["counted_bytes"] == row["bytes"]


def test_a_space_is_required_only_where_it_is_rare(tmp_path: Path, jsonl: Path) -> None:
    lines = [line for i in range(400) for line in sentence(i).split("\n") if line]
    assert prep.train_tokenizer([sentence(i) for i in range(400)], 300) == prep.fit_tokenizer(
        lines, 300
    )


@pytest.mark.parametrize("size", ["1", "261", "262", "60000"])
def test_the_vocabulary_size_that_an_error_names_works(
    tmp_path: Path, size: str, fails: Callable[..., str]
) -> None:
    for i, texts in enumerate(([sentence(i) for i in range(60)], draw_texts("ACGT", 30))):
        path = write(
            tmp_path / f"{i}.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
        argv = ["--source", "files", path, "--val-percent", "30", "--out", tmp_path / size / str(i)]
        named = re.search(r"use --vocab-size (\d+) or", fails(*argv, "--vocab-size", size))
        assert named
        run_ok(*argv, "--vocab-size", named[1])


def test_a_tokenizer_that_spells_the_space_in_bytes_is_refused(
    tmp_path: Path, jsonl: Path, folding_tokenizer: Path, fails: Callable[..., str]
) -> None:
    model, mark = folding_tokenizer.read_bytes(), b"\x0a\x03\xe2\x96\x81"
    assert model.count(mark) == 1
    bare = write(tmp_path / "bare.model", model.replace(mark, b"\x0a\x03\xe1\x9a\x80"))
    out = tmp_path / "out"
    message = fails("--source", "files", jsonl, "--tokenizer", bare, "--out", out)
    assert f"--tokenizer={bare} has no piece for a space" in message
    assert "required_chars" in message
    assert not list(out.glob("**/*"))


def test_bytes_counted_beyond_those_of_the_tokens_are_refused(
    jsonl: Path, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tg.ByteCounter.count
    monkeypatch.setattr(tg.ByteCounter, "count", lambda *args: count(*args) + 1)
    message = fails("--source", "files", jsonl, "--vocab-size", VOCAB, "--out", tmp_path / "out")
    assert f"{jsonl}, line 1: training would count" in message


def test_other_bytes_than_the_source_has_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "expands.model"
    train_tokenizer(model, [sentence(i) for i in range(60)], vocab_size=320)
    texts = [f"{sentence(i)} ½ cup ﷺ" for i in range(60)]
    argv = ("--tokenizer", model)
    for _ in range(2):  # also where everything is there already
        capsys.readouterr()
        prepare_texts(tmp_path, texts, *argv)
        captured = capsys.readouterr()
        for split, row in manifest_of(tmp_path / "out")["splits"].items():
            decoded = sum(len(text.encode()) for text in texts_of(tmp_path / "out", split))
            assert row["counted_bytes"] == decoded != row["bytes"]
            both = f"{decoded:,} bytes counted by tokens, {row['bytes']:,} bytes of source text"
            assert f"warning: {split}: {both}" in captured.err
            assert f"({decoded:,} bytes counted)" in captured.out


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "a.json", "a.txt", "a.jsonl.zst", "a.bz2"])
def test_json_never_becomes_text(tmp_path: Path, jsonl: Path, name: str) -> None:
    pack = {".zst": zstandard.ZstdCompressor().compress, ".bz2": bz2.compress}
    data = pack.get(Path(name).suffix, bytes)(jsonl.read_bytes())
    files = ["--source", "files", write(tmp_path / name, data), "--vocab-size", VOCAB]
    run_ok(*files, "--out", tmp_path / "out")
    run_ok(*files[:2], jsonl, *files[3:], "--out", tmp_path / "expected")
    for path in (tmp_path / "expected").glob("*.bin"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    # Data that an earlier version made of the same file is not taken for this.
    inputs = manifest_of(tmp_path / "out")["settings"]["inputs"]
    assert ("json_files" in inputs) == (name not in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz"))


# ---- one document, few documents ----


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n\n".join(sentence(i) for i in range(90)), "paragraph"),
        ("".join(f"line {i} has no blank line after it\n" for i in range(90)), "line"),
        (" ".join(f"Sentence {i} ends." for i in range(90)), "sentence"),
        (" ".join(f"word{i}" for i in range(90)), "word"),
        ("first\n\nsecond", "paragraph"),
    ],
)
def test_one_document_is_cut_in_two(
    tmp_path: Path, text: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    book, out = write(tmp_path / "book.txt", text), tmp_path / "out"
    run_ok("--source", "files", book, write(tmp_path / "empty.txt", " \n"), "--out", out,
           "--vocab-size", {"word": 280}.get(kind, 300) if len(text) > 99 else 275)  # fmt: skip
    assert f"warning: {book} is one document: the last" in capsys.readouterr().err
    (train,), (val,) = texts_of(out, "train"), texts_of(out, "val")
    assert train + val == text
    assert train[-1] == {"paragraph": "\n", "line": "\n"}.get(kind, " ")
    assert len(val) / len(text) < 0.08 or len(text) < 99
    cut = {"character": len(train), "end_of": kind}
    assert manifest_of(out)["settings"]["inputs"]["cut_after"] == cut
    assert manifest_of(out)["skipped"]["empty"] == 1


def test_one_document_that_cannot_be_cut_is_named(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    for text in ("ACGT" * 999, "word ", f">name\n{'ACGT' * 999}\n", "a\na\n"):
        message = fails("--source", "files", write(tmp_path / "a.txt", text))
        assert "a.txt: the only document has no place to cut it" in message


@pytest.mark.parametrize("percent", [0, 0.1, 100, 99.9])
@pytest.mark.parametrize("source", ["files", "stdlib"])
def test_the_share_that_an_error_names_fills_both_splits(
    tmp_path: Path,
    stdlib: Path,
    folding_tokenizer: Path,
    source: str,
    percent: float,
    fails: Callable[..., str],
) -> None:
    for path in [*stdlib.rglob("*.txt"), *list(stdlib.rglob("*.py"))[4:]]:
        path.unlink()
    argv = ["--out", tmp_path / "out", "--tokenizer", folding_tokenizer]
    argv += ["--source", "files", stdlib / "**/*.py"] if source == "files" else []
    named = re.search(r"--val-percent ([\d.]+)", fails(*argv, "--val-percent", percent))
    assert named
    run_ok(*argv, "--val-percent", named[1])


def test_equal_documents_cannot_be_told_apart(tmp_path: Path, fails: Callable[..., str]) -> None:
    files = [write(tmp_path / f"{i}.txt", "all alike\n\nin two") for i in range(3)]
    message = fails("--source", "files", *files)
    assert "all 3 documents fell into" in message
    assert "no --val-percent tells them apart: add documents" in message


@pytest.mark.parametrize("removed", [False, True])
def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path,
    jsonl: Path,
    removed: bool,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = prep.train_tokenizer

    def change(sample: Sequence[str], size: int) -> bytes:
        with open(jsonl, "a", encoding="utf-8") as file:
            file.write('{"text": "another line"}\n')
        if removed:
            jsonl.unlink()
        return train(sample, size)

    monkeypatch.setattr(prep, "train_tokenizer", change)
    out = tmp_path / "out"
    message = fails("--source", "files", jsonl, "--out", out, "--vocab-size", VOCAB)
    assert f"{jsonl} {'cannot be read' if removed else 'changed while it was read'}" in message
    assert not list(out.glob("**/*"))


@pytest.mark.slow
def test_few_file_handles_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(120):
        write(tmp_path / f"{i}.txt", sentence(i))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    try:
        argv = ["--source", "files", tmp_path / "*.txt", "--val-percent", 20, "--out"]
        run_ok(*argv, tmp_path / "out", "--vocab-size", 300, "--shard-tokens", 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(manifest_of(tmp_path / "out")["files"]) > 120


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        (
            "a.jsonl",
            '{"text": "ok"}\n\n{"body": "x", "id": 1}\n',
            "a.jsonl, line 3: holds fields 'body', 'id'",
        ),
        ("a.jsonl", '{"text": 5}\n', 'needs a string field "text"'),
        ("a.jsonl", '["text"]\n', "a.jsonl, line 1: holds a list"),
        ("a.jsonl", '{"text": "\\ud800 half"}\n', "half a surrogate pair (0xd800)"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not JSON"),
        ("a.txt", b"abc\xff", "not UTF-8 text (byte 3)"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9],
            "a.jsonl.gz cannot be read after line",
        ),
        ("a.jsonl.xz", b"not xz at all", "a.jsonl.xz cannot be read after line 0"),
        ("a.jsonl", '{"text": ""}\n{"text": " \\n"}\n', "no document with text was found"),
        ("a.jsonl", "", "no document with text was found"),
    ],
)
def test_faults_in_files_are_named(
    tmp_path: Path, name: str, content: str | bytes, expected: str, fails: Callable[..., str]
) -> None:
    assert expected in fails(
        "--source", "files", write(tmp_path / name, content), "--out", tmp_path / "out"
    )
    assert not list((tmp_path / "out").glob("**/*"))


def test_a_glob_without_match_is_named(
    tmp_path: Path, jsonl: Path, fails: Callable[..., str]
) -> None:
    assert "nothing*.jsonl' matches no file" in fails(
        "--source", "files", jsonl, tmp_path / "nothing*.jsonl"
    )


def test_empty_documents_and_the_space_mark_are_skipped_and_counted(
    tmp_path: Path, jsonl: Path
) -> None:
    with open(jsonl, "a", encoding="utf-8") as file:
        for text in ("", "  \n", "a \u2581 b"):
            file.write(json.dumps({"text": text}) + "\n")
    run_ok("--source", "files", jsonl, "--out", tmp_path / "out", "--vocab-size", VOCAB)
    assert manifest_of(tmp_path / "out")["skipped"] == {"empty": 2, "with_space_mark": 1}
    assert len(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == 400


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize(("percent", "empty"), [("0", "val"), ("100", "train")])
def test_an_empty_split_is_an_error(
    tmp_path: Path,
    jsonl: Path,
    folding_tokenizer: Path,
    percent: str,
    empty: str,
    reuse: bool,
    fails: Callable[..., str],
) -> None:
    extra = ["--tokenizer", folding_tokenizer] if reuse else ["--vocab-size", VOCAB]
    message = fails(
        "--source", "files", jsonl, "--out", tmp_path / "out", "--val-percent", percent, *extra
    )
    assert f"the {empty} split is empty: all 400 documents" in message


def test_a_tokenizer_that_cannot_serve_is_named(
    tmp_path: Path,
    jsonl: Path,
    folding_tokenizer: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--source", "files", jsonl, "--out", tmp_path / "out", "--tokenizer"]
    assert "missing.model cannot be read" in fails(*arguments, tmp_path / "missing.model")
    assert "is not a SentencePiece model" in fails(
        *arguments, write(tmp_path / "bad.model", "hello")
    )
    assert "is not a SentencePiece model" in fails(*arguments, write(tmp_path / "none.model", ""))
    damaged = folding_tokenizer.read_bytes().replace(b"\xe2\x96\x81", b"\xe2\xff\x81")
    assert "damaged.model is not a SentencePiece model ('utf-8' codec" in fails(
        *arguments, write(tmp_path / "damaged.model", damaged)
    )
    monkeypatch.setattr(prep, "MAX_VOCAB", 319)
    assert "has 320 pieces, uint16 shards hold at most 319" in fails(
        *arguments, folding_tokenizer, "--vocab-size", 300
    )


@pytest.mark.parametrize("size", ["262", "60000"])
def test_a_vocabulary_that_does_not_fit_is_named(
    tmp_path: Path, jsonl: Path, size: str, fails: Callable[..., str]
) -> None:
    message = fails("--source", "files", jsonl, "--out", tmp_path / "out", "--vocab-size", size)
    assert f"--vocab-size={size} does not fit this text" in message


def test_a_document_too_long_to_encode_is_named(
    tmp_path: Path, jsonl: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prep, "MAX_DOCUMENT", 100)
    assert f"{jsonl}, line 1: one document of" in fails(
        "--source", "files", jsonl, "--out", tmp_path / "out"
    )


def test_a_full_disk_leaves_the_old_files(
    stdlib: Path, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_ok("--out", out, "--vocab-size", VOCAB)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prep.ShardWriter, "close", full)
    message = fails("--out", out, "--vocab-size", VOCAB, "--val-percent", "10", "--force")
    assert f"--out={out} could not be written (No space left on device)" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_output_that_cannot_be_a_folder_is_named(
    stdlib: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    assert "could not be written" in fails(
        "--out", write(tmp_path / "file", "x"), "--vocab-size", VOCAB
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--source", "files"], "needs at least one GLOB"),
        (["a.txt"], "GLOB needs --source files"),
        (["--source", "files", "a.txt", "--max-bytes", "5"], "--max-bytes needs --source stdlib"),
        (["--train-shards", "2"], "--train-shards needs --source fineweb"),
        (["--variant", "sp8192"], "--variant needs --source fineweb"),
        (["--repo", "a/b"], "--repo needs --source fineweb"),
        (["--source", "fineweb", "--variant", "sp5"], "invalid choice"),
        (["--source", "fineweb", "--repo", "name"], "--repo=name must be OWNER/NAME"),
        (["--vocab-size", "70000"], "argument --vocab-size: 70000 must be between 1 and 65535"),
        (["--val-percent", "101"], "argument --val-percent: 101 must be between 0 and 100"),
        (["--shard-tokens", "0"], "argument --shard-tokens: 0 must be 1 or more"),
        (["--source", "web"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        prep.main(argv)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


# ---- fineweb: a hub that is a dictionary


class Hub:
    """Stands in for huggingface_hub: files by path, and every request that was made."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.requests = files, list[tuple[str, bool]]()
        self.broken: dict[
            str, list[bytes | None]
        ] = {}  # what the first requests of a path get instead
        self.repo, self.lists = "willdepueoai/parameter-golf", True

    def hf_hub_download(
        self,
        repo_id: str,
        filename: str,
        *,
        subfolder: str,
        repo_type: str,
        local_dir: str,
        force_download: bool,
    ) -> str:
        assert (repo_id, repo_type) == (self.repo, "dataset")
        name = f"{subfolder}/{filename}"
        self.requests.append((name, force_download))
        data = self.broken[name].pop(0) if self.broken.get(name) else self.files.get(name)
        if data is None:
            raise ConnectionError(f"404 for {name}")
        path = Path(local_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    def list_repo_files(self, repo_id: str, *, repo_type: str) -> list[str]:
        assert (repo_id, repo_type) == (self.repo, "dataset")
        if not self.lists:
            raise ConnectionError("no network")
        return ["README.md", *self.files]

    def shards_requested(self) -> list[str]:
        return [name.rsplit("/", 1)[1] for name, _ in self.requests if name.endswith(".bin")]


def shard(values: list[int], *, announced: int | None = None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(values) if announced is None else announced
    return header.tobytes() + np.array(values, dtype="<u2").tobytes()


FOLDER = "datasets/datasets/fineweb10B_sp1024"
TRAIN = [f"fineweb_train_{i:06d}.bin" for i in range(3)]
VAL = [f"fineweb_val_{i:06d}.bin" for i in range(2)]


@pytest.fixture
def hub(folding_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    published = {
        "datasets": [
            {"name": "other", "stats": {"files_train": 9, "files_val": 9}},
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp1024",
                "stats": {"files_train": 3, "files_val": 2},
            },
        ],
        "tokenizers": [{"name": "sp1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files = {
        f"{FOLDER}/{name}": shard([1, 10 + i, 20, 1, 30]) for i, name in enumerate(TRAIN + VAL)
    }
    files["datasets/manifest.json"] = json.dumps(published).encode()
    files["datasets/tokenizers/fineweb_1024_bpe.model"] = folding_tokenizer.read_bytes()
    hub = Hub(files)
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hub.hf_hub_download  # type: ignore[attr-defined]
    module.list_repo_files = hub.list_repo_files  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return hub


def test_fineweb_brings_the_full_val_split_and_a_prefix_of_train(tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "out"
    run_ok("--source", "fineweb", "--out", out, "--train-shards", 2)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*TRAIN[:2], *VAL, "manifest.json", "tokenizer.model"]
    )
    for name in TRAIN[:2] + VAL:
        assert (out / name).read_bytes() == hub.files[f"{FOLDER}/{name}"]
    assert manifest_of(out)["splits"] == {
        "train": {"documents": 4, "tokens": 10, "bytes": None},
        "val": {"documents": 4, "tokens": 10, "bytes": None},
    }


def test_fineweb_resumes_and_downloads_a_damaged_shard_again(
    tmp_path: Path, hub: Hub, fails: Callable[..., str]
) -> None:
    out, lost = tmp_path / "out", hub.files.pop(f"{FOLDER}/{TRAIN[1]}")
    message = fails("--source", "fineweb", "--out", out, "--train-shards", 3)
    assert f"{TRAIN[1]} of willdepueoai/parameter-golf could not be downloaded (404" in message
    assert not (out / "manifest.json").exists()
    hub.files[f"{FOLDER}/{TRAIN[1]}"] = lost
    (out / VAL[0]).write_bytes(hub.files[f"{FOLDER}/{VAL[0]}"][:-2])  # cut short on disk
    hub.requests.clear()
    run_ok("--source", "fineweb", "--out", out, "--train-shards", 3)
    assert sorted(hub.shards_requested()) == sorted([VAL[0], *TRAIN[1:]])
    assert (out / VAL[0]).read_bytes() == hub.files[f"{FOLDER}/{VAL[0]}"]
    hub.requests.clear()
    run_ok("--source", "fineweb", "--out", out, "--train-shards", 3)
    assert hub.requests == []


def test_fineweb_tries_a_bad_download_once_more(
    tmp_path: Path, hub: Hub, fails: Callable[..., str]
) -> None:
    name = f"{FOLDER}/{TRAIN[0]}"
    hub.broken[name] = [shard([1, 2], announced=9)]
    run_ok("--source", "fineweb", "--out", tmp_path / "a")
    assert [again for path, again in hub.requests if path == name] == [False, True]
    assert (tmp_path / "a" / TRAIN[0]).read_bytes() == hub.files[name]
    hub.broken[name] = [b"<html>", b"<html>"]
    message = fails("--source", "fineweb", "--out", tmp_path / "b")
    assert "damaged a file twice" in message
    assert f"{TRAIN[0]} is not a token shard" in message
    assert not (tmp_path / "b" / TRAIN[0]).exists()


def test_fineweb_can_be_extended_but_not_cut_without_force(
    tmp_path: Path, hub: Hub, fails: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    run_ok("--source", "fineweb", "--out", out)
    hub.requests.clear()
    run_ok("--source", "fineweb", "--out", out, "--train-shards", 2)
    assert hub.shards_requested() == [TRAIN[1]]
    assert "is fewer than the 2" in fails("--source", "fineweb", "--out", out, "--train-shards", 1)
    run_ok("--source", "fineweb", "--out", out, "--train-shards", 1, "--force")
    assert [path.name for path in sorted(out.glob("*_train_*.bin"))] == TRAIN[:1]


def test_fineweb_faults_are_named(
    tmp_path: Path,
    hub: Hub,
    jsonl: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    arguments = ["--source", "fineweb", "--out", out]
    assert "--train-shards=4 is more than the 3" in fails(*arguments, "--train-shards", 4)
    published = hub.files["datasets/manifest.json"]
    for content in (
        b"[]",
        b"{}",
        b"no json",
        b'{"datasets": [{"name": "fineweb10B_sp1024"}]}',
        b'{"datasets": [1]}',
    ):
        hub.files["datasets/manifest.json"] = content
        assert "does not describe fineweb10B_sp1024 as expected" in fails(*arguments)
    hub.files["datasets/manifest.json"] = published
    other = tmp_path / "other"
    run_ok("--source", "files", jsonl, "--out", other, "--vocab-size", VOCAB)
    assert "already holds shards made otherwise" in fails("--source", "fineweb", "--out", other)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -r requirements-dev.txt" in fails(
        "--source", "fineweb", "--out", tmp_path / "new"
    )


def publish(hub: Hub, variant: str, tokenizer: bytes) -> None:
    """Add a variant to the files of the hub and to its manifest, if it has one."""
    names = {
        "sp4096": ("fineweb10B_sp4096", "fineweb_4096_bpe"),
        "sp8192": ("fineweb10B_sp8192", "fineweb_8192_bpe"),
    }
    dataset, model = names[variant]
    for i, name in enumerate([*TRAIN[:2], VAL[0]]):
        hub.files[f"datasets/datasets/{dataset}/{name}"] = shard([1, 40 + i, 50, 1, 60])
    hub.files[f"datasets/tokenizers/{model}.model"] = tokenizer
    if "datasets/manifest.json" in hub.files:
        published = json.loads(hub.files["datasets/manifest.json"])
        row = {
            "name": dataset,
            "tokenizer_name": variant,
            "stats": {"files_train": 2, "files_val": 1},
        }
        published["datasets"].append(row)
        published["tokenizers"].append({"name": variant, "model_path": f"tokenizers/{model}.model"})
        hub.files["datasets/manifest.json"] = json.dumps(published).encode()


@pytest.mark.parametrize("variant", ["sp4096", "sp8192"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_fineweb_variants_bring_their_own_shards_and_tokenizer(
    variant: str,
    with_manifest: bool,
    tmp_path: Path,
    hub: Hub,
    folding_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if not with_manifest:
        del hub.files["datasets/manifest.json"]
    publish(hub, variant, folding_tokenizer.read_bytes())
    run_ok("--source", "fineweb", "--variant", variant, "--train-shards", 2)
    out = Path("data") / f"fineweb_{variant}"
    for name in [*TRAIN[:2], VAL[0]]:
        assert (out / name).read_bytes() == hub.files[
            f"datasets/datasets/fineweb10B_{variant}/{name}"
        ]
    assert (out / "tokenizer.model").read_bytes() == folding_tokenizer.read_bytes()
    assert manifest_of(out)["settings"]["dataset"] == f"fineweb10B_{variant}"
    printed = capsys.readouterr().out
    assert (
        f"DATA_PATH={out} TOKENIZER_PATH={out}/tokenizer.model VOCAB_SIZE=320 python train_gpt.py"
        in printed
    )
    assert json.loads(printed.splitlines()[-1])["vocab_size"] == 320


def test_fineweb_comes_from_another_repository(
    tmp_path: Path, hub: Hub, folding_tokenizer: Path, fails: Callable[..., str]
) -> None:
    hub.repo = "someone/retrained"
    publish(hub, "sp8192", folding_tokenizer.read_bytes())
    ours = ["--source", "fineweb", "--variant", "sp8192", "--repo", "someone/retrained"]
    run_ok(*ours, "--out", tmp_path / "a")
    expected = {"source": "fineweb", "repo": "someone/retrained", "dataset": "fineweb10B_sp8192"}
    assert manifest_of(tmp_path / "a")["settings"] == expected
    hub.files.pop(f"datasets/datasets/fineweb10B_sp8192/{TRAIN[0]}")
    message = fails(*ours, "--out", tmp_path / "b")
    assert f"{TRAIN[0]} of someone/retrained could not be downloaded" in message


def test_fineweb_names_a_variant_that_is_not_there_and_what_is(
    tmp_path: Path, hub: Hub, fails: Callable[..., str]
) -> None:
    arguments = ["--source", "fineweb", "--variant", "sp8192", "--out", tmp_path / "out"]
    message = fails(*arguments)
    assert (
        "--variant=sp8192: willdepueoai/parameter-golf has no dataset fineweb10B_sp8192" in message
    )
    assert "(looked for in datasets/manifest.json; it holds: fineweb10B_sp1024, other)" in message
    assert "--repo OWNER/NAME" in message
    manifest = hub.files.pop("datasets/manifest.json")
    message = fails(*arguments)
    assert (
        "(looked for in datasets/datasets/fineweb10B_sp8192/; it holds: fineweb10B_sp1024)"
        in message
    )
    hub.files[f"datasets/datasets/fineweb10B_sp8192/{TRAIN[0]}"] = b"x"
    hub.files[f"datasets/datasets/fineweb10B_sp8192/{VAL[0]}"] = b"x"
    message = fails(*arguments)
    assert (
        "has no datasets/tokenizers/fineweb_8192_bpe.model (its models: tokenizers/fineweb_1024_bpe"
        in message
    )
    hub.lists = False  # nothing can be said but that the manifest did not come
    assert "manifest.json of willdepueoai/parameter-golf could not be downloaded (404" in fails(
        *arguments
    )
    hub.files["datasets/manifest.json"], hub.lists = manifest, True
    hub.broken["datasets/manifest.json"] = [None]  # it is there, and did not come
    assert "manifest.json of willdepueoai/parameter-golf could not be downloaded (404" in fails(
        *arguments
    )
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_fineweb_never_mixes_variants_in_one_folder(
    tmp_path: Path, hub: Hub, folding_tokenizer: Path, fails: Callable[..., str]
) -> None:
    publish(hub, "sp8192", folding_tokenizer.read_bytes())
    out, second = tmp_path / "out", ["--source", "fineweb", "--variant", "sp8192", "--out"]
    run_ok("--source", "fineweb", "--out", out)
    assert 'dataset "fineweb10B_sp1024" -> "fineweb10B_sp8192"' in fails(*second, out)
    lost = hub.files.pop(f"{FOLDER}/{VAL[1]}")  # cut off: one shard is there, no manifest
    fails("--source", "fineweb", "--out", tmp_path / "cut")
    hub.files[f"{FOLDER}/{VAL[1]}"] = lost
    assert 'dataset "fineweb10B_sp1024" -> "fineweb10B_sp8192"' in fails(*second, tmp_path / "cut")
    for folder in (out, tmp_path / "cut"):
        run_ok(*second, folder, "--force")
        for name in [TRAIN[0], VAL[0]]:
            assert (folder / name).read_bytes() == hub.files[
                f"datasets/datasets/fineweb10B_sp8192/{name}"
            ]
        assert len(list(folder.glob("*.bin"))) == 2


def test_fineweb_shards_of_another_tokenizer_are_refused(
    tmp_path: Path, hub: Hub, fails: Callable[..., str]
) -> None:
    hub.files[f"{FOLDER}/{TRAIN[0]}"] = shard([1, 320])
    message = fails("--source", "fineweb", "--out", tmp_path / "out")
    assert f"{TRAIN[0]} holds token 320, its tokenizer has 320 pieces" in message
    assert not (tmp_path / "out" / "manifest.json").exists()
