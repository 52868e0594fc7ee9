"""Who reads whom: masks against a rule spelt out in loops, and a model that no forbidden token can
move.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from tests.conftest import CPU, random_rows, randomise, tiny

T, V = 8, 16


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_len", "size"), [(8, 1), (8, 2), (8, 8), (12, 3), (16, 4)])
def test_mask_cell_by_cell(seq_len: int, size: int, causal: bool) -> None:
    mask = tg.window_mask(seq_len, size, causal, CPU)
    # Window, position in the row.
    places = [(w, w * size + o) for w in range(seq_len // size) for o in range(size + 1)]
    assert mask.dtype == torch.bool
    assert mask.shape == (len(places), seq_len + len(places))
    for query, (window, position) in enumerate(places):
        for key in range(seq_len):  # the clean token before a window travels with it
            assert mask[query, key] == (key < window * size), (query, key)
        for key, (other, other_position) in enumerate(places):
            reads = other == window and (other_position <= position or not causal)
            assert mask[query, seq_len + key] == reads, (query, key)
    row = torch.arange(seq_len + 1)[None]
    x0, before, positions = tg.tile(row, size)
    assert positions.tolist() == [position for _, position in places]
    # Of a row whose tokens are their positions.
    assert torch.cat((before, x0), dim=-1).flatten().equal(positions)


def model_of(**overrides: Any) -> tg.GPT:
    shape = dict(vocab_size=V, train_seq_len=T, bigram_vocab_size=50)
    return randomise(tg.GPT(tiny(**shape, parallel_eval_examples=0, **overrides)))


def test_a_future_token_never_moves_a_clean_logit() -> None:
    model, rows = model_of(), random_rows(2, T, V)
    before = model.clean(rows)[0]
    for i in range(T):
        rows_i = rows.clone()
        rows_i[:, i] = (rows[:, i] + 1) % V
        after = model.clean(rows_i)[0]
        assert after[:, :i].equal(before[:, :i])
        assert (after[:, i:] != before[:, i:]).any(-1).all()


def inputs_of(size: int, cfg: tg.Config) -> tuple[Tensor, Tensor, Tensor, tg.Corruption]:
    """A clean row and, as inputs of their own, the tokens of its windows."""
    row = random_rows(1, T + 1, V, seed=2)
    x0, before, _ = tg.tile(row, size)
    corrupted = torch.rand(x0.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    noisy = tg.apply_noise(
        x0, corrupted, torch.full(x0.shape[:2], 0.6), torch.arange(x0.shape[1])[None], cfg, 0.7
    )
    return row, before.clone(), x0, noisy


@pytest.mark.parametrize("mode", ["mask", "hybrid"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_only_what_a_window_may_read_moves_it(
    size: int, shift: bool, causal: bool, mode: str
) -> None:
    model = model_of(diffusion_causal=causal, diffusion_shift=shift, diffusion_corruption_mode=mode)
    row, before, _, noisy = inputs_of(size, model.cfg)
    positions, mask = tg.tile(row, size)[2], tg.window_mask(T, size, causal, CPU)

    def logits(row: Tensor, before: Tensor, xt: Tensor) -> Tensor:
        past = model.clean(row[:, :-1])[1]
        with torch.no_grad():
            return model.window(tg.Window(before, noisy._replace(xt=xt), positions, mask), past)[0]

    base = logits(row, before, noisy.xt)
    window, token = torch.meshgrid(torch.arange(T // size), torch.arange(size), indexing="ij")
    # Of the input that predicts a token; 0 is the clean token before.
    offset = token if shift else token + 1
    for p in range(T):  # a token of the clean stream
        other = row.clone()
        other[0, p] = (row[0, p] + 1) % V
        moved = (logits(other, before, noisy.xt) != base).any(-1)
        assert moved.equal(p < window * size), p
    for w in range(T // size):
        for o in range(size + 1):  # a token of a window
            other_before, other_xt = before.clone(), noisy.xt.clone()
            changed = other_xt[0, w, o - 1 : o] if o else other_before[0, w]
            changed.copy_((changed + 1) % V)
            moved = (logits(row, other_before, other_xt) != base).any(-1)
            assert moved.equal((window == w) & ((offset >= o) | (not causal))), (w, o)


def decode_window(model: tg.GPT, ids: Tensor, at: int, size: int, end: int) -> Tensor:
    """Logits of `size` masked tokens from `at` on, in a window that shows the text up to `end`; as
    decoding does it.
    """
    past = model.clean(ids[:, : at - 1])[1]
    places = torch.arange(end - at)
    hole = (places < size).expand(1, 1, -1)
    noisy = tg.apply_noise(
        ids[:, None, at:end], hole, torch.ones(1, 1), torch.zeros(1, 1).long(), model.cfg, 1.0
    )
    positions = torch.arange(at - 1, end)
    mask = (torch.arange(end) <= positions[:, None]) | (not model.cfg.diffusion_causal)
    with torch.no_grad():
        return model.window(tg.Window(ids[:, None, at - 1 : at], noisy, positions, mask), past)[
            0, 0, :size
        ]


@pytest.mark.parametrize("shift", [True, False])
def test_an_infill_reads_the_suffix_and_a_continuation_does_not(shift: bool) -> None:
    ids = random_rows(1, 10, V)
    bidirectional, causal = (
        model_of(diffusion_causal=causal, diffusion_shift=shift) for causal in (False, True)
    )
    infill, blind = (decode_window(model, ids, 3, 4, 10) for model in (bidirectional, causal))
    continuation = decode_window(bidirectional, ids, 3, 4, 7)
    for p in range(7, 10):
        other = ids.clone()
        other[0, p] = (ids[0, p] + 1) % V
        assert (decode_window(bidirectional, other, 3, 4, 10) != infill).any(-1).all()
        assert decode_window(bidirectional, other, 3, 4, 7).equal(continuation)
        # The predecessor's defect, kept as a setting.
        assert decode_window(causal, other, 3, 4, 10).equal(blind)
    for p in range(3, 7):  # what is to be found out is never shown
        other = ids.clone()
        other[0, p] = (ids[0, p] + 1) % V
        assert decode_window(bidirectional, other, 3, 4, 10).equal(infill)
    for p in range(3):
        other = ids.clone()
        other[0, p] = (ids[0, p] + 1) % V
        assert (decode_window(bidirectional, other, 3, 4, 10) != infill).any(-1).all()


def test_only_the_last_of_several_windows_reads_the_suffix() -> None:
    model, ids = model_of(), random_rows(64, 20, V)
    how = tg.Decoding(window=4, steps=2, temperature=1.0)
    found = tg.decode(model, ids, 5, 13, how).ids
    other = ids.clone()
    other[:, 13:] = (ids[:, 13:] + 1) % V
    again = tg.decode(model, other, 5, 13, how).ids
    assert again[:, :9].equal(found[:, :9])
    assert not again[:, 9:13].equal(found[:, 9:13])


@pytest.mark.parametrize("reach", [1, 3, 20])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_next_sure_token_is_found_in_the_same_window_within_reach(
    size: int, reach: int
) -> None:
    positions = tg.tile(random_rows(1, T + 1, V), size)[2]
    starts = torch.arange(len(positions)) % (size + 1) == 0
    sure = (
        torch.rand(6, len(positions), generator=torch.Generator().manual_seed(size)) < 0.3
    ) | starts
    at, far = tg.next_sure(sure, positions, reach)
    for row in range(len(sure)):
        for i in range(len(positions)):
            last = i - i % (size + 1) + size
            after = [j for j in range(i + 1, min(last, i + reach) + 1) if sure[row, j]][:1]
            if sure[row, i] and after == [i + 1]:  # the token that it predicts is known
                after = []
            assert far[row, i] == (after[0] - i if after else 0), (row, i)
            assert not after or at[row, i] == after[0], (row, i)


def test_windows_at_any_places_of_one_row_are_not_told_of_each_other() -> None:
    """Drafts for several ends share a pass: their positions overlap, and clean tokens stand before
    them.
    """
    model, ids = model_of(), random_rows(2, 24, V)
    past = [(torch.nn.functional.pad(k, (0, 0, 0, 40)), torch.nn.functional.pad(v, (0, 0, 0, 40)))
            for k, v in model.clean(ids[:, :9])[1]]  # fmt: skip
    run = tg.Decoder(model, tg.Decoding(), past, torch.arange(2)[:, None])
    at, ends = torch.arange(9, 12).expand(2, -1), torch.arange(9, 12).expand(2, -1)
    windows = torch.nn.functional.pad(ids.gather(1, ends)[..., None], (0, 5))
    hole = torch.ones(2, 3, 5, dtype=torch.bool)
    with torch.no_grad():
        together = run.denoise(ids.gather(1, at), at, windows, hole, ends)[1]
        for w in range(3):
            alone = run.denoise(
                ids.gather(1, at), at, windows[:, w : w + 1], hole[:, w : w + 1], ends[:, w : w + 1]
            )[1]
            torch.testing.assert_close(alone[:, 0], together[:, w])
