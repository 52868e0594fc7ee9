"""Which tokens a token reads: masks against a rule in loops, and logits that a token changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import train_gpt as tg
from tests.conftest import CPU, make_run, random_rows, randomise, tiny

T, V = 8, 16


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_len", "size"), [(8, 1), (8, 2), (8, 8), (12, 3), (16, 4)])
def test_window_mask_equals_the_rule_in_loops(seq_len: int, size: int, causal: bool) -> None:
    mask = tg.window_mask(seq_len, size, causal, CPU)
    # Window, position in the row.
    places = [(w, w * size + o) for w in range(seq_len // size) for o in range(size + 1)]
    assert mask.dtype == torch.bool
    assert mask.shape == (len(places), seq_len + len(places))
    for query, (window, position) in enumerate(places):
        for key in range(seq_len):  # the clean token before a window is a token of the window, too
            assert mask[query, key] == (key < window * size), (query, key)
        for key, (other, other_position) in enumerate(places):
            reads = other == window and (other_position <= position or not causal)
            assert mask[query, seq_len + key] == reads, (query, key)
    row = torch.arange(seq_len + 1)[None]
    windows, found = tg.split_into_windows(row, size)
    assert found.tolist() == [position for _, position in places]
    # Of a row whose tokens are their positions.
    assert windows.shape == (1, seq_len // size, size + 1)
    assert windows.flatten().equal(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_attention_rule_holds_for_windows_at_any_place(size: int, causal: bool) -> None:
    first = torch.tensor([4, 1, 4])  # places of the clean tokens before the windows
    rule = tg.attention_rule(lambda w: first[w], size, 6, causal)
    num = 3 * (size + 1)
    mask = rule(torch.arange(num)[:, None], torch.arange(6 + num))
    for query in range(num):
        window = query // (size + 1)
        for key in range(6 + num):
            noisy = key - 6
            own = noisy >= 0 and noisy // (size + 1) == window and (noisy <= query or not causal)
            assert mask[query, key] == (key < first[window] or own), (query, key)


def test_annealed_mask_keeps_later_keys_with_a_chance() -> None:
    causal, both = (tg.window_mask(64, 16, causal, CPU) for causal in (True, False))
    later = both & ~causal
    first, second = torch.tensor([1]), torch.tensor([2])
    assert tg.anneal_mask(both, 0.0, first).equal(causal)
    assert tg.anneal_mask(both, 1.0, first).equal(both)
    found = tg.anneal_mask(both, 0.3, first)
    assert (found & ~later).equal(causal)  # all other pairs are as they were
    drawn = found[later].double()
    assert abs(drawn.mean().item() - 0.3) < 5 * (0.3 * 0.7 / len(drawn)) ** 0.5
    assert found.equal(tg.anneal_mask(both, 0.3, first))
    other = tg.anneal_mask(both, 0.3, second)[later].double()
    assert abs(torch.corrcoef(torch.stack((drawn, other)))[0, 1]) < 5 / len(drawn) ** 0.5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_len", "size"), [(8, 1), (8, 2), (8, 8), (12, 3), (12, 6), (64, 8)])
def test_a_split_mask_holds_every_pair_that_is_read(seq_len: int, size: int, causal: bool) -> None:
    mask = tg.window_mask(seq_len, size, causal, CPU)
    parts, rest, at = tg.split_mask(mask, size), mask.clone(), 0
    assert len(parts) == min(4, seq_len // size)
    for part in parts:
        num, clean = len(part), part.shape[1] - len(part)
        own = slice(seq_len + at, seq_len + at + num)
        assert part[:, :clean].equal(mask[at : at + num, :clean])
        assert part[:, clean:].equal(mask[at : at + num, own])
        assert clean == 0 or part[:, clean - 1].any()  # the furthest clean key is read
        rest[at : at + num, :clean] = False
        rest[at : at + num, own] = False
        at += num
    assert at == len(mask)
    assert not rest.any()
    if seq_len == size:
        assert parts[0].shape == (size + 1, size + 1)  # no clean key at all
    if (seq_len, size) == (64, 8):
        assert sum(part.numel() for part in parts) < 0.45 * mask.numel()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_split_mask_gives_the_outputs_and_gradients_of_the_whole(size: int) -> None:
    rows, found = random_rows(2, T + 1, V), []
    model = model_of(value_residual=True).double()
    tokens, positions = tg.split_into_windows(rows, size)
    keys = tg.split_key(torch.arange(2)[:, None], torch.arange(T // size))
    noisy = tg.corrupt(tokens[..., 1:], torch.full(keys.shape, 0.6), keys, model.cfg)
    whole = tg.window_mask(T, size, False, CPU)
    for mask in (whole, tg.split_mask(whole, size)):
        model.zero_grad()
        cache = model.forward_causal(rows[:, :-1])[1]
        window = tg.WindowInput(tokens[..., :1], noisy, positions, mask)
        logits = model.forward_denoise(window, cache)
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((logits, grads))
    (logits, grads), (other_logits, other_grads) = found
    torch.testing.assert_close(logits, other_logits, rtol=1e-5, atol=1e-5)
    assert len(grads) == len(other_grads) > 20
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-7)


BLOCK = 128  # of queries and of keys that a kernel skips as a whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seq_len", "size"), [(8, 2), (12, 3), (16, 16), (256, 1), (384, 384), (512, 16), (512, 128)]
)
def test_a_block_mask_holds_the_pairs_of_the_window_mask(
    seq_len: int, size: int, causal: bool
) -> None:
    whole = tg.window_mask(seq_len, size, causal, CPU)
    if size == seq_len:  # no clean key is read
        assert not whole[:, :seq_len].any()
        whole = whole[:, seq_len:]
    blocks = tg.block_mask(seq_len, size, causal, CPU)
    assert blocks.shape == (1, 1, *whole.shape)
    assert create_mask(blocks.mask_mod, 1, 1, *whole.shape, "cpu")[0, 0].equal(whole)
    padded = F.pad(whole, (0, -whole.shape[1] % BLOCK, 0, -whole.shape[0] % BLOCK))
    parts = padded.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).flatten(2)
    read = blocks.to_dense()[0, 0].bool()
    assert read.equal(parts.any(-1))
    # Of a full block the kernel does not ask for the rule.
    assert blocks.full_kv_num_blocks.sum() == parts.all(-1).sum()
    if (seq_len, size) == (512, 16):
        assert read.double().mean() <= 0.6


# PyTorch warns that attention is not compiled, and its tracer hides a warning of its own.
uncompiled = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@uncompiled
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_gives_the_losses_and_gradients_of_groups(
    causal: bool, flex_on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # rotary tables and logits, too
    sizes, rows = (1, 4, 8, 16), random_rows(3, 17, 64)
    found = dict[tuple[str, int], list[Tensor]]()
    for kind in ("groups", "flex"):
        own = dict(window_attention=kind, diffusion_windows="1,4,8,T", value_residual=True)
        cfg = tiny(model_dim=32, num_heads=2, num_kv_heads=1, diffusion_causal=causal, **own)
        model = randomise(tg.GPT(cfg)).double()
        objective = tg.Objective(cfg, make_run(cfg), model)
        for size in sizes:
            model.zero_grad()
            loss, terms = objective(rows, 0, size, tg.ScheduleState(3, 0.5, 1.0))
            loss.backward()  # type: ignore[no-untyped-call]
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found[kind, size] = [terms, *grads]
    assert flex_on_cpu == [n for size in sizes for n in [16 // size * (size + 1)] * cfg.num_layers]
    for size in sizes:
        ours, theirs = found["flex", size], found["groups", size]
        assert ours[0].dtype == torch.float64
        assert len(ours) == len(theirs) > 20
        assert sum(bool(grad.any()) for grad in theirs) > 20
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@uncompiled
def test_windows_in_blocks_are_whole_graphs_one_a_size(
    flex_on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    counters, rows = torch._dynamo.utils.counters, random_rows(2, 17, 64)
    totals = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        cfg = tiny(model_dim=32, window_attention="flex", diffusion_windows="4,T", num_layers=1)
        run, model = make_run(cfg), randomise(tg.GPT(cfg))
        run.compile = compiled
        objective = tg.Objective(cfg, run, model)
        for size in (4, 16, 4, 16):
            objective(rows, 0, size, tg.ScheduleState(3, 0.5, 1.0))[0].backward()
        totals.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for eager, other in zip(*totals, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 3  # the clean stream, and windows of two sizes


def model_of(**overrides: Any) -> tg.GPT:
    shape = dict(vocab_size=V, train_seq_len=T, bigram_vocab_size=50)
    return randomise(tg.GPT(tiny(**shape, parallel_eval_examples=0, **overrides)))


def with_another_token(ids: Tensor, place: int) -> Tensor:
    """The same rows, with another token at a place."""
    other = ids.clone()
    other[:, place] = (ids[:, place] + 1) % V
    return other


def test_a_token_changes_no_causal_logits_before_it() -> None:
    model, rows = model_of(), random_rows(2, T, V)
    before = model.forward_causal(rows)[0]
    for i in range(T):
        after = model.forward_causal(with_another_token(rows, i))[0]
        assert after[:, :i].equal(before[:, :i])
        assert (after[:, i:] != before[:, i:]).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["mask", "hybrid"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_window_reads_exactly_the_tokens_of_its_mask(
    size: int, shift: bool, causal: bool, mode: str
) -> None:
    model = model_of(diffusion_causal=causal, diffusion_shift=shift, diffusion_corruption_mode=mode)
    row = random_rows(1, T + 1, V, seed=2)
    windows, positions = tg.split_into_windows(row, size)
    x0, mask = windows[..., 1:], tg.window_mask(T, size, causal, CPU)
    corrupted = torch.rand(x0.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    t, keys = torch.full(x0.shape[:2], 0.6), torch.arange(x0.shape[1])[None]
    noisy = tg.apply_noise(x0, corrupted, t, keys, model.cfg, 0.7)

    def logits(row: Tensor, before: Tensor, xt: Tensor) -> Tensor:
        cache = model.forward_causal(row[:, :-1])[1]
        corruption = noisy._replace(xt=xt)
        window = tg.WindowInput(before, corruption, positions, mask)
        return model.forward_denoise(window, cache)[0]

    before = windows[..., :1].clone()
    base = logits(row, before, noisy.xt)
    window, token = torch.meshgrid(torch.arange(T // size), torch.arange(size), indexing="ij")
    # Of the input that predicts a token; 0 is the clean token before.
    offset = token if shift else token + 1
    for p in range(T):  # a token of the clean stream
        moved = (logits(with_another_token(row, p), before, noisy.xt) != base).any(-1)
        assert moved.equal(p < window * size), p
    for w in range(T // size):
        for o in range(size + 1):  # a token of a window
            other_before, other_xt = before.clone(), noisy.xt.clone()
            changed = other_xt[0, w, o - 1 : o] if o else other_before[0, w]
            changed.copy_((changed + 1) % V)
            moved = (logits(row, other_before, other_xt) != base).any(-1)
            assert moved.equal((window == w) & ((offset >= o) | (not causal))), (w, o)


@torch.no_grad()
def decode_window(model: tg.GPT, ids: Tensor, start: int, size: int, end: int) -> Tensor:
    """Logits of `size` masked tokens at `start` in a window that ends at `end`, as in decoding."""
    cache = model.forward_causal(ids[:, : start - 1])[1]
    masked = (torch.arange(end - start) < size).expand(1, 1, -1)
    t, keys = torch.ones(1, 1), torch.zeros(1, 1).long()
    noisy = tg.apply_noise(ids[:, None, start:end], masked, t, keys, model.cfg, 1.0)
    positions = torch.arange(start - 1, end)
    mask = (torch.arange(end) <= positions[:, None]) | (not model.cfg.diffusion_causal)
    window = tg.WindowInput(ids[:, None, start - 1 : start], noisy, positions, mask)
    return model.forward_denoise(window, cache)[0, 0, :size]


@pytest.mark.parametrize("shift", [True, False])
def test_infill_reads_the_suffix_and_continuation_does_not(shift: bool) -> None:
    ids, models = random_rows(1, 10, V), {}
    for causal in (False, True):
        models[causal] = model_of(diffusion_causal=causal, diffusion_shift=shift)
    infill, continuation = (decode_window(models[False], ids, 3, 4, end) for end in (10, 7))
    blind = decode_window(models[True], ids, 3, 4, 10)
    for p in range(10):
        other = with_another_token(ids, p)
        moved = (decode_window(models[False], other, 3, 4, 10) != infill).any(-1)
        if 3 <= p < 7:  # the masked tokens are not read
            assert not moved.any(), p
        else:
            assert moved.all(), p
        if p >= 7:
            assert decode_window(models[False], other, 3, 4, 7).equal(continuation)
            # The predecessor's defect, kept as a setting.
            assert decode_window(models[True], other, 3, 4, 10).equal(blind)


@pytest.mark.parametrize("reach", [1, 3, 20])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_next_visible_is_the_next_one_of_the_same_window_within_reach(
    size: int, reach: int
) -> None:
    positions = tg.split_into_windows(random_rows(1, T + 1, V), size)[1]
    starts = torch.arange(len(positions)) % (size + 1) == 0
    draws = torch.rand(6, len(positions), generator=torch.Generator().manual_seed(size))
    visible = (draws < 0.3) | starts
    index, distance = tg.next_visible(visible, positions, reach)
    for row in range(len(visible)):
        for i in range(len(positions)):
            last = i - i % (size + 1) + size
            after = [j for j in range(i + 1, min(last, i + reach) + 1) if visible[row, j]][:1]
            if visible[row, i] and after == [i + 1]:  # attention reads it already
                after = []
            assert distance[row, i] == (after[0] - i if after else 0), (row, i)
            assert not after or index[row, i] == after[0], (row, i)


def test_next_visible_follows_the_positions_of_each_row() -> None:
    visible = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 1]]).bool()
    positions = torch.tensor([[4, 5, 6, 7, 8, 9], [4, 5, 6, 4, 5, 6]])  # one window, or two
    index, distance = tg.next_visible(visible, positions, 8)
    assert distance.tolist() == [[3, 2, 1, 2, 1, 0], [0, 0, 0, 2, 1, 0]]
    assert index[distance > 0].tolist() == [3, 3, 3, 5, 5, 5, 5]


@torch.no_grad()
def test_windows_of_one_pass_do_not_read_each_other() -> None:
    """Windows of one pass may overlap, each with its own number of clean tokens before it."""
    model, ids = model_of().double(), random_rows(2, 12, V)
    cache, starts = model.forward_causal(ids)[1], torch.tensor([6, 7, 8])
    before = ids[:, starts, None]
    xt = torch.full((2, 3, 3), V)
    corrupted = torch.ones(2, 3, 3, dtype=torch.bool)
    places = starts[:, None] + torch.arange(4)
    rule = tg.attention_rule(lambda w: starts[w], 3, 12, causal=False)
    mask = rule(torch.arange(12)[:, None], torch.arange(24))
    noisy = tg.Corruption(xt, corrupted, corrupted, torch.ones(2, 3))
    together = model.forward_denoise(tg.WindowInput(before, noisy, places.flatten(), mask), cache)
    for w in range(3):
        one = slice(w, w + 1)
        some = tg.Corruption(xt[:, one], corrupted[:, one], corrupted[:, one], torch.ones(2, 1))
        read = mask[4 * w : 4 * w + 4, : 12 + 4 * w + 4]
        read = torch.cat((read[:, :12], read[:, -4:]), dim=1)
        alone = model.forward_denoise(tg.WindowInput(before[:, one], some, places[w], read), cache)
        # The last operations, up to the softcap, are float32.
        bound = 8 * torch.finfo(torch.float32).eps * model.cfg.logit_softcap
        torch.testing.assert_close(alone[:, 0], together[:, w], rtol=0, atol=bound)
