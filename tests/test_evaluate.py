"""Scores: exact where they are called exact, and never below the truth where called a bound."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import train_gpt as tg
from tests.conftest import (
    CPU,
    MAIN,
    make_run,
    pass_rounding,
    random_rows,
    randomise,
    recorded,
    rounding,
    tiny,
)

MODES = ["mask", "uniform", "hybrid", "gaussian"]


def evaluation(
    recipe: str = "direct", **overrides: Any
) -> tuple[tg.GPT, tg.Run, tg.TokenLoader, tg.ByteCounter]:
    """What the functions of evaluation need, around a model of random weights."""
    cfg = tiny(recipe, **{"bigram_vocab_size": 50} | overrides)
    model = randomise(tg.GPT(cfg), std=0.2)
    return model, make_run(cfg), tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg)


def score(
    model: tg.GPT, run: tg.Run, loader: tg.TokenLoader, counter: tg.ByteCounter, size: int
) -> dict[str, Any]:
    """Bound over windows of `size`; 0: the exact score."""
    if not size:
        return tg.evaluate_exact(model, run, loader, counter)
    return tg.evaluate_bound(model, run, loader, counter, size)


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        (recipe, size)
        for recipe in MAIN
        for size in (0, 1, 4, 16)
        if not size or tiny(recipe).diffusion
    ],
)
def test_a_uniform_predictor_scores_the_logarithm_of_the_vocabulary(
    recipe: str, size: int, data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(recipe, **data)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = score(model, run, loader, counter, size)
    num_rows = (loader.total - 1) // 16 if size == 0 else 8
    assert found["tokens"] == num_rows * 16
    flat = torch.cat([loader.rows(i * 16, 1, 16, CPU) for i in starts_of(loader, num_rows)])
    assert found["bytes"] == counter.count(flat[:, :-1], flat[:, 1:]).sum()
    bytes_per_token = found["bytes"] / found["tokens"]
    assert found["bpb"] == pytest.approx(math.log2(400) / bytes_per_token, rel=rounding(400))
    assert found["loss"] == pytest.approx(math.log(400), rel=rounding(400))
    assert found.get("standard_error", 0) < rounding(400)


@pytest.mark.parametrize("mode", MODES)
def test_a_uniform_predictor_has_the_same_bound_under_every_noise(
    mode: str, data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(diffusion_corruption_mode=mode, **data)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    losses = [score(model, run, loader, counter, size)["loss"] for size in (1, 4, 16)]
    assert losses == pytest.approx([math.log(400)] * 3, rel=rounding(400))


def starts_of(loader: tg.TokenLoader, num_rows: int) -> list[int]:
    total = (loader.total - 1) // 16
    return [i * total // num_rows for i in range(num_rows)]


def test_the_exact_score_follows_the_chain_rule() -> None:
    model, ids = randomise(tg.GPT(tiny())).double(), random_rows(2, 9, 64)
    found = tg.token_nll_causal(model, ids)
    assert found.shape == (2, 8)
    # Rounded logits up to the cap, and a sum over the vocabulary.
    bound = rounding(64) + 18 * rounding(1) * model.cfg.logit_softcap
    for i in range(8):
        log_p = model.forward_causal(ids[:, : i + 1])[0][:, -1].log_softmax(-1)
        expected = -log_p.gather(-1, ids[:, i + 1 : i + 2])[:, 0]
        torch.testing.assert_close(found[:, i], expected, rtol=0, atol=bound)


def test_the_exact_score_is_the_sum_over_the_split(data: dict[str, Any]) -> None:
    model, run, loader, counter = evaluation("ar", **data)
    rows = loader.rows(0, (loader.total - 1) // 16, 16, CPU)
    nats = tg.token_nll_causal(model, rows).double().sum().item()
    found = tg.evaluate_exact(model, run, loader, counter)
    assert found.keys() == {"loss", "bpb", "tokens", "bytes", "stride"}
    assert found["loss"] == pytest.approx(nats / rows[:, 1:].numel(), rel=pass_rounding(run.cfg))
    num_bytes = int(counter.count(rows[:, :-1], rows[:, 1:]).sum())
    bpb = nats / math.log(2) / num_bytes
    assert found["bpb"] == pytest.approx(bpb, rel=pass_rounding(run.cfg))
    assert (found["tokens"], found["bytes"]) == (rows[:, 1:].numel(), num_bytes)
    assert found["stride"] == 16


# A model small enough to write its distribution down: windows of 3 tokens out of 3.
T3, S3, V3 = 6, 3, 3
ORDERS = list(itertools.permutations(range(S3)))


def small_model(mode: str = "mask", **overrides: Any) -> tg.GPT:
    small = dict(vocab_size=V3, train_seq_len=T3, train_batch_tokens=2 * T3)
    windows = dict(diffusion_windows="3", nelbo_windows="1,3", parallel_eval_examples=0)
    own = dict(bigram_vocab_size=50, diffusion_corruption_mode=mode)
    return randomise(tg.GPT(tiny(**small | windows | own | overrides)), std=0.4)


@torch.no_grad()
def masked_set_nll(model: tg.GPT, rows: Tensor, window: int) -> Tensor:
    """Nats of each token of one window under every set of masked tokens, (B, 2^S, S).

    The cache ends before the window.
    """
    start = window * S3
    cache = model.forward_causal(rows[:, :start])[1] if start else None
    x0, sets = rows[:, start + 1 : start + 1 + S3], []
    positions = torch.arange(start, start + S3 + 1)
    mask = (torch.arange(start + S3 + 1) <= positions[:, None]) | (not model.cfg.diffusion_causal)
    for masked_set in range(2**S3):
        masked = torch.tensor([bool(masked_set >> i & 1) for i in range(S3)])
        masked = masked.expand(len(rows), 1, S3)
        every = model.cfg.diffusion_corruption_mode != "mask"
        t = masked.float().mean(-1).clamp_min(1e-6)
        noisy = tg.Corruption(torch.where(masked, V3, x0[:, None]), masked, masked | every, t)
        given = tg.WindowInput(rows[:, None, start : start + 1], noisy, positions, mask)
        log_p = model.forward_denoise(given, cache)[:, 0].double().log_softmax(-1)
        sets.append(-log_p.gather(-1, x0[..., None])[..., 0])
    return torch.stack(sets, dim=1)


def order_nll(nll: Tensor) -> Tensor:
    """Nats of the window in each order, (B, orders): each token given those before it."""
    columns = []
    for order in ORDERS:
        still_masked, total = 2**S3 - 1, torch.zeros(len(nll), dtype=torch.float64)
        for i in order:
            total = total + nll[:, still_masked, i]
            still_masked -= 1 << i
        columns.append(total)
    return torch.stack(columns, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, {"diffusion_causal": True}, {"diffusion_shift": False}])
@pytest.mark.parametrize("mode", ["mask", "hybrid", "uniform"])
def test_the_bound_estimates_the_mean_over_all_orders(mode: str, overrides: dict[str, Any]) -> None:
    model, copies = small_model(mode, **overrides), 3000
    row = random_rows(1, T3 + 1, V3, seed=4)
    mask = tg.window_mask(T3, S3, model.cfg.diffusion_causal, CPU)
    keys = tg.split_key(torch.arange(copies)[:, None], 9, torch.arange(T3 // S3))
    sampled = tg.window_bounds(model, row.expand(copies, -1), keys, S3, 2, mask).mean(0)  # (B, W)
    error = sampled.std(0) / math.sqrt(copies)
    for window in range(T3 // S3):
        orders = order_nll(masked_set_nll(model, row, window))[0]
        bound = orders.mean().item()
        exact = -(torch.logsumexp(-orders, 0) - math.log(len(ORDERS))).item()
        assert exact < bound - 1e-3  # orders disagree, so that a bound is not the likelihood
        assert error[window] < 0.02 * bound
        assert abs(sampled[:, window].mean() - bound) < 4.5 * error[window]


@pytest.mark.parametrize("mode", ["mask", "hybrid"])
def test_probabilities_of_all_texts_sum_to_one(mode: str) -> None:
    model = small_model(mode).double()
    texts = torch.tensor(list(itertools.product(range(V3), repeat=S3)))
    rows = torch.cat((torch.tensor([[1]]).expand(len(texts), 1), texts), dim=1)
    total = order_nll(masked_set_nll(model, rows, 0)).neg().exp().mean(1).sum().item()
    # The logits of one masked set are computed in several rows, rounded to float32 in each.
    assert total == pytest.approx(1, abs=S3 * 8 * rounding(1) * model.cfg.logit_softcap)


class Table:
    """A model that knows the distribution of texts.

    Windows read the clean text before them and, with `reads_window`, their own visible tokens.
    """

    def __init__(self, p: Tensor, texts: Tensor, cfg: tg.Config, reads_window: bool) -> None:
        self.p, self.texts = p, texts
        self.cfg, self.reads_window = cfg, reads_window

    def forward_causal(self, ids: Tensor) -> tuple[None, Tensor]:
        return None, ids

    def forward_denoise(self, window: tg.WindowInput, cache: Tensor) -> Tensor:
        """Logits of the true conditionals. A text begins at position 1, after a constant token."""
        xt, size = window.noisy.xt, window.noisy.xt.shape[-1]
        logits = torch.zeros(*xt.shape, V3)
        for w in range(xt.shape[1]):
            known = torch.full((len(xt), self.texts.shape[1]), -1)
            known[:, : w * size] = cache[:, 1 : w * size + 1]
            if self.reads_window:
                known[:, w * size : (w + 1) * size] = torch.where(xt[:, w] == V3, -1, xt[:, w])
            matches = (self.texts == known[:, None]) | (known[:, None] < 0)
            p = matches.all(-1) * self.p  # (B, texts)
            for i in range(size):
                token = torch.nn.functional.one_hot(self.texts[:, w * size + i], V3).double()
                logits[:, w, i] = (p @ token / p.sum(-1, keepdim=True)).log().float()
        return logits


def entropy_by_windows(p: Tensor, texts: Tensor, size: int) -> float:
    """Sum of the entropies of all tokens given the text before their windows, nats."""
    total = 0.0
    for i in range(texts.shape[1]):
        before = i // size * size
        for value in itertools.product(range(V3), repeat=before):
            matches = (texts[:, :before] == torch.tensor(value, dtype=torch.int64)).all(-1)
            joint = torch.stack([p[matches & (texts[:, i] == v)].sum() for v in range(V3)])
            total -= (joint * (joint / joint.sum()).log()).sum().item()
    return total


@pytest.mark.parametrize("reads_window", [False, True])
def test_smaller_windows_have_the_lower_bound(reads_window: bool) -> None:
    """By enumeration: with the true conditionals every bound is the entropy.

    A denoiser that reads only the text before its window loses less in smaller windows.
    """
    T, samples = 4, 64
    texts = torch.tensor(list(itertools.product(range(V3), repeat=T)))
    p = torch.softmax(2 * torch.randn(len(texts), dtype=torch.float64), 0)
    entropy = -(p * p.log()).sum().item()
    rows, found = torch.nn.functional.pad(texts, (1, 0), value=1), dict[int, float]()
    small = dict(vocab_size=V3, train_seq_len=T, train_batch_tokens=2 * T)
    for size in (1, 2, 4):
        windows = dict(diffusion_windows=str(size), nelbo_windows="1", parallel_eval_examples=0)
        model: Any = Table(p, texts, tiny(**small, **windows), reads_window)
        keys = tg.split_key(torch.arange(len(rows))[:, None], 3, torch.arange(T // size))
        mask = tg.window_mask(T, size, False, CPU)
        nats = tg.window_bounds(model, rows, keys, size, samples, mask).mean(0).sum(-1)
        found[size] = (p * nats).sum().item()
        if not reads_window:
            assert found[size] == pytest.approx(entropy_by_windows(p, texts, size), rel=0.02)
    # Each of T conditionals, float32, is at least the smallest probability.
    exact = T * rounding(V3) * -p.log().min().item()
    assert found[1] == pytest.approx(entropy, abs=exact)
    if reads_window:
        assert [found[2], found[4]] == pytest.approx([entropy] * 2, rel=0.02)
    else:
        assert entropy * 1.03 < found[2] < found[4] / 1.03


class Spy(tg.GPT):
    """A model that keeps the input and the logits of each denoising pass."""

    passes: list[tuple[tg.WindowInput, Tensor]]

    def forward_denoise(self, window: tg.WindowInput, cache: tg.Cache | None = None) -> Tensor:
        logits = super().forward_denoise(window, cache)
        self.passes.append((window, logits))
        return logits


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_reads_no_token_that_it_scores(mode: str) -> None:
    model, size, samples = randomise(Spy(tiny(diffusion_corruption_mode=mode))), 4, 6
    rows, mask = random_rows(3, 17, 64), tg.window_mask(16, 4, False, CPU)
    keys = tg.split_key(torch.arange(3)[:, None], torch.arange(4))
    counts = set()
    for token in range(size):  # of window 2
        other = rows.clone()
        other[:, 8 + 1 + token] = (rows[:, 8 + 1 + token] + 1) % 64
        runs = []
        for text in (rows, other):
            model.passes = []
            tg.window_bounds(model, text, keys, size, samples, mask)
            runs.append(model.passes)
        for (window, logits), (_, moved) in zip(*runs, strict=True):
            masked = window.noisy.corrupted[:, 2, token]
            assert moved[masked, 2].equal(logits[masked, 2]), "a scored token was read"
            counts |= set(window.noisy.corrupted[masked, 2].sum(-1).tolist())
    assert counts == {1, 2, 3, 4}  # of tokens masked at once


@pytest.mark.parametrize(
    "overrides", [{}, {"diffusion_shift": False}, {"diffusion_corruption_mode": "hybrid"}]
)
def test_the_bound_is_exact_for_windows_of_one_token(
    overrides: dict[str, Any], data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(**data, **overrides)
    rows = torch.cat([loader.rows(i * 16, 1, 16, CPU) for i in starts_of(loader, 8)])
    total = 0.0
    corrupted = torch.ones(len(rows), 1, 1, dtype=torch.bool)
    xt, t = torch.full((len(rows), 1, 1), 400), torch.ones(len(rows), 1)
    noisy = tg.Corruption(xt, corrupted, corrupted, t)
    with torch.no_grad():
        for i in range(16):  # left to right, by denoising passes alone
            cache = model.forward_causal(rows[:, :i])[1] if i else None
            everything = torch.ones(2, i + 2, dtype=torch.bool)
            places = torch.arange(i, i + 2)
            window = tg.WindowInput(rows[:, None, i : i + 1], noisy, places, everything)
            log_p = model.forward_denoise(window, cache)[:, 0, 0].log_softmax(-1)
            total -= log_p.gather(-1, rows[:, i + 1 : i + 2]).double().sum().item()
    found = tg.evaluate_bound(model, run, loader, counter, 1)
    assert found["loss"] == pytest.approx(total / (8 * 16), rel=pass_rounding(run.cfg))
    assert (found["samples"], found["standard_error"]) == (1, 0)


class OneOf(tg.Run):
    """One rank of several: its sums are added to those of the ranks that ran before."""

    total: Tensor | float = 0.0

    def sum(self, values: Tensor) -> Tensor:
        """Add in place, as an all-reduce does."""
        values += type(self).total
        type(self).total = values.clone()
        return values


@pytest.mark.parametrize("size", [0, 1, 4])
def test_where_passes_are_compiled_all_batches_have_one_shape(
    size: int, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run, loader, counter = evaluation(**data, val_batch_size=48)
    expected = score(model, run, loader, counter, size)
    shapes = list[tuple[int, ...]]()

    def compile(function: Any, **_: Any) -> Any:
        def compiled(first: Any, *rest: Any) -> Any:
            shapes.append(tuple((first if isinstance(first, Tensor) else first.noisy.xt).shape))
            return function(first, *rest)

        return compiled

    monkeypatch.setattr("torch.compile", compile)
    run.compile = True
    with monkeypatch.context() as patch:
        patch.setattr(run, "device", torch.device("cuda"))
        fast = tg.compile_passes(model, run)
    assert fast.tok_emb is model.tok_emb
    found = score(fast, run, loader, counter, size)
    assert found == pytest.approx(expected, rel=pass_rounding(run.cfg))  # padding does not count
    assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"])
    assert len(shapes) > 2
    assert len(set(shapes)) == (2 if size else 1)
    assert "forward_causal" not in vars(tg.compile_passes(model, run))  # on a CPU: not compiled


@pytest.mark.parametrize("size", [0, 1, 4])
def test_neither_batch_nor_world_size_changes_a_score(size: int, data: dict[str, Any]) -> None:
    model, run, loader, counter = evaluation(**data)
    expected = score(model, run, loader, counter, size)
    close = pytest.approx(expected, rel=pass_rounding(run.cfg))
    for tokens in (1, 48, 100_000):
        other = make_run(dataclasses.replace(run.cfg, val_batch_size=tokens))
        assert score(model, other, loader, counter, size) == close
    for world_size in (2, 3, 50):  # 50 ranks: some have no row at all
        ranks = type("Ranks", (OneOf,), {})
        for rank in range(world_size):
            one = ranks(**vars(make_run(run.cfg, rank, world_size)))
            found = score(model, one, loader, counter, size)
            assert rank or found["bytes"] < expected["bytes"]
        assert found == close


def test_rows_of_a_bound_are_evenly_spaced_over_the_split(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(**data)
    loader, seen = tg.TokenLoader(cfg, "val"), list[int]()
    model, counter = randomise(tg.GPT(cfg)), tg.ByteCounter(cfg)
    plain = tg.validation_batches

    def batches(run: tg.Run, val: tg.TokenLoader, starts: Tensor) -> Iterator[tg.Pair]:
        for found, rows in plain(run, val, starts):
            seen.extend(found.tolist())
            assert rows.equal(torch.cat([val.rows(start, 1, 16) for start in found.tolist()]))
            yield found, rows

    monkeypatch.setattr(tg, "validation_batches", batches)
    total = (loader.total - 1) // 16
    assert total == 21
    for asked, expected in ((3, [0, 7, 14]), (0, list(range(21))), (99, list(range(21)))):
        seen.clear()
        run = make_run(dataclasses.replace(cfg, nelbo_sequences=asked))
        found = tg.evaluate_bound(model, run, loader, counter, 4)
        assert seen == [row * 16 for row in expected]
        assert found["tokens"] == len(expected) * 16
    seen.clear()
    few = make_run(dataclasses.replace(cfg, nelbo_sequences=3))
    tg.evaluate_exact(model, few, loader, counter)
    assert len(seen) == 21  # the exact score always takes the whole split


@pytest.mark.parametrize("stride", [1, 5, 16, 99])
def test_with_a_stride_every_token_is_scored_in_its_longest_context(
    stride: int, data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(**data, val_batch_size=80)
    loader.counts, loader.ends = [70], np.array([70])
    loader.total = 70  # 69 tokens to predict
    found = tg.evaluate_exact(model, run, loader, counter, stride)
    stride = min(stride, 16)
    text = torch.tensor(loader.read(0, 0, 70).astype("int64"))
    ends = [16 + stride * i for i in range((69 - 16) // stride + 1)]
    nats, num_bytes = 0.0, 0
    for place in range(1, ends[-1] + 1):  # the first row that reaches it has the longest context
        end = next(end for end in ends if end >= place)
        row_nats = tg.token_nll_causal(model, text[None, end - 16 : end + 1])
        nats += row_nats[0, place - 1 - end].item()
        num_bytes += int(counter.count(text[place - 1], text[place]))
    assert (found["tokens"], found["bytes"]) == (ends[-1], num_bytes)
    assert found["stride"] == stride
    assert found["loss"] == pytest.approx(nats / ends[-1], rel=pass_rounding(run.cfg))
    assert found["bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=pass_rounding(run.cfg))
    if stride == 16:
        assert found["bpb"] == tg.evaluate_exact(model, run, loader, counter)["bpb"]
    ranks = type("Ranks", (OneOf,), {})
    for rank in range(3):
        one = ranks(**vars(make_run(run.cfg, rank, 3)))
        shared = tg.evaluate_exact(model, one, loader, counter, stride)
    assert shared == pytest.approx(found, rel=pass_rounding(run.cfg))


@pytest.mark.slow
def test_a_bound_converges_as_its_standard_error_says(data: dict[str, Any]) -> None:
    model, run, loader, counter = evaluation(**data, nelbo_sequences=4)

    def found(samples: int, seed: int = 0) -> dict[str, Any]:
        cfg = dataclasses.replace(run.cfg, nelbo_samples=samples, eval_seed=seed)
        return tg.evaluate_bound(model, make_run(cfg), loader, counter, 8)

    reference, few = found(400, seed=99), [found(4, seed) for seed in range(24)]
    stated = sum(f["standard_error"] for f in few) / len(few)
    actual = torch.tensor([f["bpb"] - reference["bpb"] for f in few])
    assert 0.2 * stated < actual.std() < 1.5 * stated
    assert abs(actual.mean()) < 4 * stated / math.sqrt(len(few))
    many = found(64)
    assert many["samples"] == 64
    assert 0.15 * stated < many["standard_error"] < 0.4 * stated  # a sixteenth of the variance
    assert abs(many["bpb"] - reference["bpb"]) < 4 * many["standard_error"]
    assert found(4) == few[0]  # the seed fixes it


Call = tuple[tuple[int, ...], int, int, int]  # shape of the rows, span, number of steps


def test_parallel_decoding_is_scored_by_decoded_tokens_only(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = dict(parallel_eval_span_len="4,2", parallel_eval_steps="1,2,4")
    cfg = tiny(**data, **lengths, parallel_eval_examples=4)
    run, calls = make_run(cfg), list[Call]()
    # A warm-up that must not count, then 1, 3 and 2 seconds.
    readings = itertools.cycle([0, 0, 0, 1, 1, 4, 4, 6])
    monkeypatch.setattr(run, "clock", lambda: next(readings))

    def decode(model: tg.GPT, ids: Tensor, start: int, stop: int, num_steps: int = 0) -> Tensor:
        calls.append((tuple(ids.shape), start, stop, num_steps))
        wrong = ids.clone()
        wrong[0, start] += 1  # one token of the first example
        wrong[:, :start] += 1  # and what does not count
        wrong[:, stop:] += 1
        return wrong

    monkeypatch.setattr(tg, "decode_autoregressive", lambda *args: decode(*args[:4]))
    monkeypatch.setattr(tg, "decode_refine", decode)
    tg.evaluate_parallel(tg.GPT(cfg), run, tg.TokenLoader(cfg, "val"))
    lines = recorded(run, "parallel_eval")
    named = [(line["task"], line["span"], line["steps"], line["mode"]) for line in lines]
    expected = []
    for span, steps in ((4, (1, 2, 4)), (2, (1, 2))):
        expected.append(("continuation", span, span, "ar_cached"))
        for task in ("continuation", "infill"):
            expected += [(task, span, n, "refine") for n in steps]
    assert named == expected
    for line in lines:
        assert line["tokens"] == 4 * line["span"]
        assert line["token_acc"] == pytest.approx(1 - 1 / line["tokens"])
        assert line["exact_seq"] == 0.75
        assert line["forwards"] == line["steps"]
        assert line["tok_per_sec"] == line["tokens"] / 2  # by the median of the timed ones
    wanted = list[Call]()
    for task, span, n, mode in named:
        shape = (4, 4 + span + (4 if task == "infill" else 0))
        wanted += [(shape, 4, 4 + span, n if mode == "refine" else 0)] * 4  # a warm-up and three
    assert calls == wanted


def test_parallel_examples_are_evenly_spaced_over_the_split(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, seen = tiny(**data, parallel_eval_examples=5), list[Tensor]()
    loader = tg.TokenLoader(cfg, "val")

    def decode(model: tg.GPT, ids: Tensor, *_: Any, **more: Any) -> Tensor:
        seen.append(ids)
        return ids

    monkeypatch.setattr(tg, "decode_autoregressive", decode)
    monkeypatch.setattr(tg, "decode_refine", decode)
    tg.evaluate_parallel(tg.GPT(cfg), make_run(cfg), loader)
    text = loader.rows(0, 1, loader.total - 1)[0]
    offsets = [i * (loader.total - 12) // 5 for i in range(5)]
    rows = torch.stack([text[offset : offset + 12] for offset in offsets])
    assert {ids.shape[1] for ids in seen} == {8, 12}  # infill also has a suffix
    assert all(ids.equal(rows[:, : ids.shape[1]]) for ids in seen)


def test_a_model_without_a_denoiser_is_decoded_left_to_right_only(data: dict[str, Any]) -> None:
    cfg = tiny("ar", **data)
    run = make_run(cfg)
    tg.evaluate_parallel(randomise(tg.GPT(cfg)), run, tg.TokenLoader(cfg, "val"))
    assert [line["mode"] for line in recorded(run, "parallel_eval")] == ["ar_cached"]
