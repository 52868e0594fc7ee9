"""scripts/serving/text.py: text that is sent piece by piece is the text that is meant."""

from __future__ import annotations

import random

import pytest
import sentencepiece as spm

from scripts.serving.text import CommittedText, Vocabulary, find_stop, held_back
from tests.conftest import BOS, HARD_TEXTS, Tokenizers


@pytest.fixture(params=["identity", "nmt_nfkc"])
def vocabulary(request: pytest.FixtureRequest, tokenizers: Tokenizers) -> Vocabulary:
    path = getattr(tokenizers, request.param)
    return Vocabulary(spm.SentencePieceProcessor(model_file=str(path)))


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_tokens_decode_as_the_tokenizer_does(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids, opens=True) == vocabulary.tokenizer.decode(ids)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_parts_are_whole_characters_and_join_to_the_text(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    committed = CommittedText(vocabulary, (), opens=True)
    parts = [committed.push([token]) for token in ids]
    assert "\ufffd" not in "".join(parts)
    assert "".join([*parts, committed.finish()]) == vocabulary.decode(ids, opens=True)
    assert len(committed.offsets) == len(ids)
    assert committed.offsets == sorted(committed.offsets)


def test_half_a_character_is_held_and_only_the_end_replaces_it(vocabulary: Vocabulary) -> None:
    ids = [vocabulary.tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in "é🙂".encode()]
    committed = CommittedText(vocabulary, ())
    assert [committed.push([i]) for i in ids] == ["", "é", "", "", "", "🙂"]
    assert committed.offsets == [0, 0, 1, 1, 1, 1]
    committed = CommittedText(vocabulary, ())
    assert committed.push(ids[:4]) == "é"
    assert committed.finish() == "\ufffd"


def test_a_stop_string_is_found_across_tokens_and_never_sent(vocabulary: Vocabulary) -> None:
    text, draw = "return  value # end of it\nand more", random.Random(1)
    for _ in range(200):
        begin = draw.randrange(len(text) - 1)
        stop = text[begin : begin + draw.randint(1, 8)]
        ids = vocabulary.encode(text)
        whole = vocabulary.decode(ids, opens=True)
        if stop not in whole:  # the tokenizer folded white space
            continue
        committed = CommittedText(vocabulary, (stop, "nowhere"), opens=True)
        parts = [committed.push([i]) for i in ids]
        sent = "".join([*parts, committed.finish()])
        assert sent == committed.text == whole[: whole.index(stop)]
        assert committed.stopped is not None
        assert committed.stopped.word == stop
        assert committed.num_tokens <= len(ids)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert held_back("abc", ("cde",)) == 1
    assert held_back("abcd", ("cde", "bcdx")) == 3
    assert held_back("abc", ()) == held_back("", ("x",)) == held_back("ab", ("b",)) == 0
    assert find_stop("aXbY", ("Y", "X")) == ("X", 1)
    assert find_stop("aXb", ("Z",)) is None


def test_labels_of_tokens_differ(vocabulary: Vocabulary) -> None:
    labels = [vocabulary.label(i) for i in range(len(vocabulary))]
    assert len(set(labels)) == len(labels)
    assert vocabulary.label(vocabulary.tokenizer.piece_to_id("<0xE2>")) == "bytes:\\xe2"
    assert vocabulary.label(BOS) == "<s>"


def test_a_space_before_a_suffix_is_kept(vocabulary: Vocabulary) -> None:
    assert vocabulary.decode(vocabulary.encode(" after", continues=True)) == " after"
    assert vocabulary.decode(vocabulary.encode("\nafter", continues=True)).endswith("after")
