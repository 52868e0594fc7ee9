"""Turn text into tokens and tokens into text that is safe to send piece by piece.

A piece of a SentencePiece vocabulary may be one byte of a character. `CommittedText` sends a
character only when all of its bytes are there, and holds back what may be the beginning of a stop
string, so that a client can concatenate what it gets.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from train_gpt import SPACE_MARK

if TYPE_CHECKING:
    import sentencepiece as spm


class Vocabulary:
    """The tokens of a SentencePiece model, and the bytes that each stands for.

    Attributes:
        bos: token that opens a document, and so ends the one before.
        pieces: name of each token.
        longest: characters of the longest piece; a text has no fewer tokens than its length in
            characters divided by it.
        drops_space: the tokenizer drops the space of a first piece when it decodes.
    """

    def __init__(self, tokenizer: spm.SentencePieceProcessor) -> None:
        self.tokenizer = tokenizer
        self.bos: int = tokenizer.bos_id()
        self.pieces: list[str] = [tokenizer.id_to_piece(i) for i in range(len(self))]
        self.longest = max(map(len, self.pieces))
        self.bytes = [self._bytes_of(i) for i in range(len(self))]
        self._space: int = tokenizer.piece_to_id(SPACE_MARK)
        first = next((i for i, raw in enumerate(self.bytes) if raw[:1] == b" " != raw[1:2]), -1)
        self.drops_space = first >= 0 and not tokenizer.decode([first]).startswith(" ")

    def __len__(self) -> int:
        return int(self.tokenizer.vocab_size())

    def _bytes_of(self, token: int) -> bytes:
        sp = self.tokenizer
        if sp.is_byte(token):
            return bytes([int(self.pieces[token][1:-1], 16)])
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            return b""
        return self.pieces[token].replace(SPACE_MARK, " ").encode()

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Turn text into tokens.

        Args:
            text: valid Unicode.
            continues: other text stands before it, so a leading space is kept even if the
                tokenizer drops one.
        """
        ids: list[int] = self.tokenizer.encode(text)
        kept = self.bytes[ids[0]].startswith(b" ") if ids else False
        known = not self.tokenizer.is_unknown(self._space)
        return [self._space, *ids] if continues and text[:1] == " " and not kept and known else ids

    def raw(self, tokens: Sequence[int], opens: bool = False) -> bytes:
        """Join the bytes of tokens; `opens`: they are the first of a document."""
        joined = b"".join(self.bytes[token] for token in tokens)
        return joined[1:] if opens and self.drops_space and joined[:1] == b" " else joined

    def decode(self, tokens: Sequence[int], opens: bool = False) -> str:
        """Turn tokens into text; bytes of no character become U+FFFD."""
        return self.raw(tokens, opens).decode("utf-8", errors="replace")

    def label(self, token: int) -> str:
        """Name a token for log-probabilities: its text, or `bytes:\\xe2` for a part of one.

        Control tokens have their piece as a name, so that no two tokens share one.
        """
        raw = self.bytes[token]
        if not raw:
            return self.pieces[token]
        if self.tokenizer.is_byte(token):
            return f"bytes:\\x{raw[0]:02x}"
        return raw.decode()


class Stopped(NamedTuple):
    """Where a text ends before its tokens do."""

    word: str  # the stop string
    at: int  # characters of text before it


def find_stop(text: str, stops: Sequence[str], begin: int = 0) -> Stopped | None:
    """Find the first stop string in text[begin:]."""
    found = [Stopped(word, at) for word in stops if (at := text.find(word, begin)) >= 0]
    return min(found, key=lambda stop: stop.at, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Count the characters at the end of a text that may begin a stop string."""
    most = min(max(map(len, stops), default=1) - 1, len(text))
    sizes = range(most, 0, -1)
    return next((n for n in sizes if any(word.startswith(text[-n:]) for word in stops)), 0)


class CommittedText:
    """Text of tokens as they come, in whole characters, up to a stop string.

    Attributes:
        text: all characters so far, those that are held back included.
        sent: number of characters that `push` and `finish` have returned.
        stopped: the stop string that ended the text, if one did.
        num_tokens: tokens up to there.
        offsets: characters of text before each token.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], opens: bool = False) -> None:
        self.vocabulary, self.stops, self.opens = vocabulary, stops, opens
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.sent, self.num_tokens = "", 0, 0
        self.stopped: Stopped | None = None
        self.offsets = list[int]()

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that can be sent now."""
        for token in tokens:
            if self.stopped is None:
                self._add(token)
        end = len(self.text)
        if self.stopped is None:
            end -= held_back(self.text, self.stops)
        return self._send(end)

    def finish(self) -> str:
        """End the text: return what was held back. Bytes of half a character become U+FFFD."""
        if self.stopped is None:
            self.text += self.decoder.decode(b"", final=True)
        return self._send(len(self.text))

    def _add(self, token: int) -> None:
        before = len(self.text)
        self.offsets.append(before)
        raw = self.vocabulary.raw([token], self.opens and self.num_tokens == 0)
        self.text += self.decoder.decode(raw)
        self.num_tokens += 1
        # A stop string that ends in this token begins at most its own length before it.
        longest = max(map(len, self.stops), default=0)
        self.stopped = find_stop(self.text, self.stops, max(before - longest, 0))
        if self.stopped is not None:
            self.text = self.text[: self.stopped.at]

    def _send(self, end: int) -> str:
        end = max(end, self.sent)
        part, self.sent = self.text[self.sent : end], end
        return part
