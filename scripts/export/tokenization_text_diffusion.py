"""The SentencePiece tokenizer of a text-diffusion model, as transformers loads it.

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

All work is done by the sentencepiece library on the model file that training used, so tokens are
those of training, exactly. A conversion to the format of `tokenizers` would have to imitate its
normalisation, byte fallback and white space rules. Needs sentencepiece and transformers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece as spm
from transformers import PreTrainedTokenizer

VOCAB_FILE = "tokenizer.model"


class TextDiffusionTokenizer(PreTrainedTokenizer):
    """Encode text as `SentencePieceProcessor.encode` does, with BOS before each text.

    `add_special_tokens=False` leaves BOS out. Special tokens that are spelled in a text, such as
    `<s>`, stay text. `decode` gives what `SentencePieceProcessor.decode` gives: control tokens are
    never shown. BOS separates documents, so generated text ends with it: it is `eos_token`, too.

    Args:
        vocab_file: path of the SentencePiece model.
        kwargs: of PreTrainedTokenizer.
    Raises:
        OSError, RuntimeError: the file cannot be read, or is no SentencePiece model.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012 -- as its base class has it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.processor = spm.SentencePieceProcessor(model_file=str(vocab_file))
        sp, spell = self.processor, self.processor.id_to_piece
        pad = next(i for i in (sp.pad_id(), sp.eos_id(), sp.bos_id()) if i >= 0)  # -1: has none
        special = dict.fromkeys(("bos_token", "eos_token"), spell(sp.bos_id()))
        special |= {"pad_token": spell(pad), "unk_token": spell(sp.unk_id())}
        rules = dict(split_special_tokens=True, clean_up_tokenization_spaces=False)
        super().__init__(**{**special, **kwargs, **rules, "padding_side": "right"})

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self.processor.vocab_size())

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each piece."""
        return {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put BOS before one text, or before each of two."""
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [token for text in texts for token in (self.processor.bos_id(), *text)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text."""
        return str(self.processor.decode([self._convert_token_to_id(token) for token in tokens]))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy the SentencePiece model to a folder; return its path."""
        name = f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE
        path = Path(save_directory, name)
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        # The piece of an unknown token, not its text, which may be spelled as another piece.
        return [self.processor.id_to_piece(i) for i in self.processor.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.processor.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.processor.id_to_piece(index))
