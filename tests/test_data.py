"""Shards, the order of tokens, and bytes: what is read is what was written, and every fault is
named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch

import train_gpt as tg
from tests.conftest import (
    BOS,
    CPU,
    HARD_TEXTS,
    IDENTITY,
    Tokenizers,
    env_of,
    make_run,
    settings,
    tiny,
    train_tokenizer,
    write_shard,
)


def shards(folder: Path, *parts: list[int], split: str = "train") -> tg.Config:
    for i, part in enumerate(parts):
        write_shard(folder / f"x_{split}_{i:06}.bin", part)
    return tiny(data_path=str(folder), train_seq_len=16)


def fault_of(act: Callable[[], object]) -> str:
    with pytest.raises(tg.UserError) as caught:
        act()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def damage_magic(path: Path) -> None:
    write_shard(path, range(40), magic=20240521)


def damage_version(path: Path) -> None:
    write_shard(path, range(40), version=2)


def damage_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def damage_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def damage_all(path: Path) -> None:
    path.write_bytes(b"")


def damage_count(path: Path) -> None:
    write_shard(path, range(40), count=39)


def damage_sign(path: Path) -> None:
    raw = bytearray(write_shard(path, range(40)).read_bytes())
    raw[8:12] = (-40).to_bytes(4, "little", signed=True)
    path.write_bytes(raw)


def damage_token(path: Path) -> None:
    write_shard(path, [*range(39), 64])


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (
            damage_magic,
            (
                "its header is [256, 20240521, 1], not [256, 20240520, 1]",
                "build it again: python scripts/",
            ),
        ),
        (
            damage_version,
            ("its header is [256, 20240520, 2], not [256, 20240520, 1]", "build it again"),
        ),
        (
            damage_tail,
            ("announces 40 tokens but holds 38.5", "but holds 38.5", "build it again"),
        ),
        (
            damage_header,
            ("its header is [250, 20240520, 1], not [256, 20240520, 1]", "build it again"),
        ),
        (damage_all, ("not a token shard: its header is [0], not [256", "build it again")),
        (damage_count, ("announces 39 tokens but holds 40", "build it again")),
        (damage_sign, ("announces -40 tokens", "build it again")),
        (damage_token, ("holds token 64", "VOCAB_SIZE")),
    ],
)
def test_a_damaged_shard_is_named(
    tmp_path: Path, damage: Callable[[Path], None], names: tuple[str, ...]
) -> None:
    cfg = shards(tmp_path, list(range(40)), list(range(40)))
    assert tg.TokenLoader(cfg, "train").total == 80
    damage(tmp_path / "x_train_000001.bin")  # the second: all are looked at before training starts
    message = fault_of(lambda: tg.TokenLoader(cfg, "train"))
    for name in ("x_train_000001.bin", *names):
        assert name in message


def test_a_token_outside_the_vocabulary_is_found_in_data_too_large_to_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = shards(tmp_path, list(range(40)), [*range(20), 64, *range(20)])
    monkeypatch.setattr(tg, "SCAN_TOKENS", 50)
    monkeypatch.setattr(tg, "END_TOKENS", 8)
    loader = tg.TokenLoader(cfg, "train")
    assert loader.rows(0, 1, 40, CPU).shape == (1, 41)
    assert "x_train_000001.bin holds token 64" in fault_of(lambda: loader.rows(60, 1, 19, CPU))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(tmp_path: Path, split: str) -> None:
    cfg = shards(tmp_path, list(range(40)), split="val" if split == "train" else "train")
    message = fault_of(lambda: tg.TokenLoader(cfg, split))
    assert message.startswith(f"DATA_PATH={str(tmp_path)!r} holds no *_{split}_*.bin")
    assert "python scripts/prepare_data.py" in message
    (tmp_path / f"x_{split}_000000.bin").mkdir()  # a folder is no shard
    assert fault_of(lambda: tg.TokenLoader(cfg, split)) == message
    missing = tiny(data_path=str(tmp_path / "nowhere"))
    assert f"DATA_PATH={str(tmp_path / 'nowhere')!r}" in fault_of(
        lambda: tg.TokenLoader(missing, split)
    )


@pytest.mark.parametrize("count", [1, 15, 16])
def test_fewer_tokens_than_a_row_needs(tmp_path: Path, count: int) -> None:
    cfg = shards(tmp_path, list(range(count)))
    message = fault_of(lambda: tg.TokenLoader(cfg, "train"))
    assert "TRAIN_SEQ_LEN=16" in message
    assert f"the {count} train tokens of DATA_PATH={str(tmp_path)!r}" in message
    assert "prepare more text, or lower it" in message
    shards(tmp_path, list(range(17)))
    assert tg.TokenLoader(cfg, "train").rows(0, 1, 16, CPU).tolist() == [list(range(17))]


@pytest.mark.parametrize("content", [None, b"", b"no model at all", b"\x0a\x05abcde" * 9])
def test_an_unreadable_tokenizer_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    message = fault_of(lambda: tg.ByteCounter(tiny(tokenizer_path=str(path))))
    assert message.startswith(f"TOKENIZER_PATH={str(path)!r} is no SentencePiece model")
    assert "python scripts/prepare_data.py" in message


def test_a_tokenizer_of_another_size_is_named(data: dict[str, Any]) -> None:
    message = fault_of(lambda: tg.ByteCounter(tiny(**data | {"vocab_size": 401})))
    assert message == (
        f"TOKENIZER_PATH={data['tokenizer_path']!r} has 400 pieces, not VOCAB_SIZE=401; "
        "name the tokenizer of the shards"
    )


def test_main_prints_a_data_fault_without_a_traceback(
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = settings(
        **data | {"data_path": str(tmp_path / "nowhere"), "out_dir": str(tmp_path / "out")}
    )
    monkeypatch.setattr("os.environ", env_of(values))
    assert tg.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: DATA_PATH=")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_rows_overlap_by_one_and_wrap_over_shards(tmp_path: Path) -> None:
    cfg = shards(tmp_path, list(range(10)), list(range(10, 12)), list(range(12, 25)))
    loader, stream = tg.TokenLoader(cfg, "train"), [i % 25 for i in range(400)]
    assert loader.total == 25
    for start in (0, 1, 9, 10, 11, 24, 25, 63):
        rows = loader.rows(start, 3, 4, CPU)
        assert rows.tolist() == [stream[start + 4 * i : start + 4 * i + 5] for i in range(3)]
        assert rows.dtype == torch.int64
    # Several times around.
    assert loader.rows(20, 2, 100, CPU).tolist() == [
        stream[20:121],
        stream[120:221],
    ]


class Alone(tg.Run):
    """One rank of several whose sums stay its own."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Watched(tg.TokenLoader):
    """A loader that notes which rows were requested."""

    def __init__(self, cfg: tg.Config, split: str) -> None:
        super().__init__(cfg, split)
        self.asked: list[int] = []

    def rows(self, start: int, num_rows: int, seq_len: int, device: torch.device) -> torch.Tensor:
        self.asked += [start + i * seq_len for i in range(num_rows)]
        return super().rows(start, num_rows, seq_len, device)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_every_batch_without_overlap(tmp_path: Path, world_size: int) -> None:
    shards(tmp_path, [i % 64 for i in range(2000)])
    cfg = tiny("ar", data_path=str(tmp_path), micro_batches=4, train_batch_tokens=128)
    for step in range(2):
        asked = []
        for rank in range(world_size):
            run = Alone(**vars(make_run(cfg, rank, world_size)))
            state = tg.TrainState(cfg, run, loader := Watched(cfg, "train"))
            state.step = step
            tg.train_step(
                state, tg.Objective(cfg, run, state.model), tg.ScheduleState.at(cfg, step, 0.0)
            )
            asked.append(loader.asked)
            assert len(loader.asked) == 8 // world_size
        # Every row of the batch once, whatever the number of ranks.
        assert sorted(start for part in asked for start in part) == [
            step * 128 + i * 16 for i in range(8)
        ]


def counted(sp: spm.SentencePieceProcessor, counter: tg.ByteCounter, text: str) -> tuple[int, int]:
    """Bytes as counted and as decoded, of one whole document."""
    tokens = torch.tensor([BOS, *sp.encode(text)])
    return int(counter.count(tokens[:-1], tokens[1:]).sum()), len(
        sp.decode(tokens.tolist()).encode()
    )


@pytest.mark.parametrize("name", ["identity", "nmt_nfkc"])
def test_bytes_are_those_of_the_decoded_text(
    name: str, tokenizers: Tokenizers, texts: list[str]
) -> None:
    path = getattr(tokenizers, name)
    sp = spm.SentencePieceProcessor(model_file=str(path))
    counter = tg.ByteCounter(tiny(vocab_size=400, tokenizer_path=str(path)))
    for text in [*texts, "".join(texts), *(a + b for a in HARD_TEXTS for b in HARD_TEXTS)]:
        count, decoded = counted(sp, counter, text)
        assert count == decoded, text[:60]
        if name == "identity":
            assert decoded == len(text.encode())
    used = {token for text in texts for token in sp.encode(text)}
    assert any(sp.is_byte(token) for token in used)  # the hard texts do reach the byte fallback


def test_bytes_of_a_tokenizer_that_adds_one_space_and_keeps_the_rest(
    tmp_path: Path, texts: list[str]
) -> None:
    sp = train_tokenizer(tmp_path / "t.model", texts, **IDENTITY | {"add_dummy_prefix": True})
    counter = tg.ByteCounter(tiny(vocab_size=400, tokenizer_path=str(tmp_path / "t.model")))
    for text in texts:
        assert counted(sp, counter, text) == (len(text.encode()),) * 2, text[:60]


def test_a_piece_of_several_spaces(tokenizers: Tokenizers) -> None:
    sp = spm.SentencePieceProcessor(model_file=str(tokenizers.identity))
    counter = tg.ByteCounter(tiny(vocab_size=400, tokenizer_path=str(tokenizers.identity)))
    four = sp.piece_to_id("\u2581" * 4)
    assert sp.id_to_piece(four) == "\u2581" * 4
    # Indentation counts in full, at the start of a text too.
    for prev in (
        BOS,
        four,
        sp.piece_to_id("<0x0A>"),
    ):
        assert counter.count(torch.tensor([[prev]]), torch.tensor([[four]])).tolist() == [[4]]


def test_pieces_count_as_the_challenge_counts_them(tokenizers: Tokenizers) -> None:
    sp = spm.SentencePieceProcessor(model_file=str(tokenizers.nmt_nfkc))
    counter = tg.ByteCounter(tiny(vocab_size=400, tokenizer_path=str(tokenizers.nmt_nfkc)))
    spaced = next(
        i
        for i in range(400)
        if len(sp.id_to_piece(i)) > 2 and sp.id_to_piece(i).startswith("\u2581")
    )
    inner = sp.piece_to_id("e")
    byte = sp.piece_to_id("<0xE6>")
    wide = sp.piece_to_id("—")
    length = len(sp.id_to_piece(spaced)) - 1
    assert not sp.is_unknown(wide)
    # fmt: off
    for prev, target, expected in (
        # No space after a boundary.
        (BOS, spaced, length), (0, spaced, length), (3, spaced, length),
        (inner, spaced, length + 1), (byte, spaced, length + 1),
        (BOS, inner, 1), (inner, byte, 1), (inner, wide, 3),
        (inner, BOS, 0), (inner, 0, 0), (inner, 2, 0), (inner, 3, 0),  # control and unknown
    ):
        found = counter.count(torch.tensor(prev), torch.tensor(target)).item()
        assert found == expected, (prev, target)
    # fmt: on


def test_bits_per_byte_by_hand() -> None:
    assert tg.bits_per_byte(3 * math.log(2), 2) == pytest.approx(1.5, rel=1e-15)
    # 10 tokens of 10 bits.
    assert tg.bits_per_byte(math.log(1024) * 10, 25) == pytest.approx(4.0, rel=1e-15)
