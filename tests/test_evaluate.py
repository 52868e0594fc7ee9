"""Scores: exact where they are called exact, never below the truth where called a bound."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from tests.conftest import CPU, MAIN, make_run, random_rows, randomise, recorded, tiny

MODES = ["mask", "uniform", "hybrid", "gaussian"]


def evaluation(
    recipe: str = "direct", **overrides: Any
) -> tuple[tg.GPT, tg.Run, tg.TokenLoader, tg.ByteCounter]:
    """What evaluate_bpb needs, around a model of random weights."""
    cfg = tiny(recipe, **{"bigram_vocab_size": 50} | overrides)
    model = randomise(tg.GPT(cfg), std=0.2)
    return model, make_run(cfg), tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg)


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        (recipe, size)
        for recipe in MAIN
        for size in (0, 1, 4, 16)
        if not size or tiny(recipe).diffusion
    ],
)
def test_the_uniform_predictor_scores_the_size_of_the_vocabulary(
    recipe: str, size: int, data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(recipe, **data)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = tg.evaluate_bpb(model, run, loader, counter, size)
    num_rows = (loader.total - 1) // 16 if size == 0 else 8
    assert found["tokens"] == num_rows * 16
    flat = torch.cat([loader.rows(i * 16, 1, 16, CPU) for i in starts_of(loader, num_rows)])
    assert found["bytes"] == counter.count(flat[:, :-1], flat[:, 1:]).sum()
    bytes_per_token = found["bytes"] / found["tokens"]
    assert found["bpb"] == pytest.approx(math.log2(400) / bytes_per_token, rel=1e-6)
    assert found["loss"] == pytest.approx(math.log(400), rel=1e-6)
    assert found["standard_error"] < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_uniform_predictor_is_scored_alike_under_every_noise(
    mode: str, data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(diffusion_corruption_mode=mode, **data)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    losses = [tg.evaluate_bpb(model, run, loader, counter, size)["loss"] for size in (1, 4, 16)]
    assert losses == pytest.approx([math.log(400)] * 3, rel=1e-6)


def starts_of(loader: tg.TokenLoader, num_rows: int) -> list[int]:
    total = (loader.total - 1) // 16
    return [i * total // num_rows for i in range(num_rows)]


def test_the_exact_score_is_the_chain_rule() -> None:
    model, ids = randomise(tg.GPT(tiny())), random_rows(2, 9, 64)
    found = tg.score(model, ids)
    assert found.shape == (2, 8)
    for i in range(8):
        log_p = model.clean(ids[:, : i + 1])[0][:, -1].log_softmax(-1)
        torch.testing.assert_close(
            found[:, i], -log_p.gather(-1, ids[:, i + 1 : i + 2])[:, 0], rtol=1e-4, atol=1e-4
        )


def test_the_score_of_a_split_adds_up(data: dict[str, Any]) -> None:
    model, run, loader, counter = evaluation("ar", **data)
    rows = loader.rows(0, (loader.total - 1) // 16, 16, CPU)
    nats = tg.score(model, rows).double().sum().item()
    found = tg.evaluate_bpb(model, run, loader, counter)
    assert found["loss"] == pytest.approx(nats / rows[:, 1:].numel(), rel=1e-6)
    num_bytes = int(counter.count(rows[:, :-1], rows[:, 1:]).sum())
    assert found["bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert (found["samples"], found["standard_error"]) == (1, 0)


# A model small enough to write its distribution down: windows of 3 tokens out of 3.
T3 = 6
S3 = 3
V3 = 3
ORDERS = list(itertools.permutations(range(S3)))


def small_model(mode: str = "mask", **overrides: Any) -> tg.GPT:
    small = dict(
        vocab_size=V3, train_seq_len=T3, train_batch_tokens=2 * T3, parallel_eval_examples=0
    )
    windows = dict(
        bigram_vocab_size=50,
        diffusion_windows="3",
        nelbo_windows="1,3",
        diffusion_corruption_mode=mode,
    )
    return randomise(tg.GPT(tiny(**small | windows | overrides)), std=0.4)


@torch.no_grad()
def masked_set_nll(model: tg.GPT, rows: Tensor, window: int) -> Tensor:
    """Nats of each token of one window under every set of masked tokens, (B, 2^S, S), by the
    cut-off cache.
    """
    start = window * S3
    past = model.clean(rows[:, :start])[1] if start else None
    x0, sets = rows[:, start + 1 : start + 1 + S3], []
    for masked_set in range(2**S3):
        masked = torch.tensor([bool(masked_set >> i & 1) for i in range(S3)]).expand(
            len(rows), 1, S3
        )
        suspect = (
            masked if model.cfg.diffusion_corruption_mode == "mask" else torch.ones_like(masked)
        )
        t = masked.float().mean(-1).clamp_min(1e-6)
        noisy = tg.Corruption(torch.where(masked, V3, x0[:, None]), masked, suspect, t)
        positions = torch.arange(start, start + S3 + 1)
        mask = (torch.arange(start + S3 + 1) <= positions[:, None]) | (
            not model.cfg.diffusion_causal
        )
        logits = model.window(
            tg.Window(rows[:, None, start : start + 1], noisy, positions, mask), past
        )[:, 0]
        sets.append(-logits.double().log_softmax(-1).gather(-1, x0[..., None])[..., 0])
    return torch.stack(sets, dim=1)


def order_nll(nll: Tensor) -> Tensor:
    """Nats of the window under each order, (B, orders): each token given those before it in the
    order.
    """
    columns = []
    for order in ORDERS:
        open_set, total = 2**S3 - 1, torch.zeros(len(nll), dtype=torch.float64)
        for i in order:
            total = total + nll[:, open_set, i]
            open_set -= 1 << i
        columns.append(total)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("overrides", [{}, {"diffusion_causal": True}, {"diffusion_shift": False}])
@pytest.mark.parametrize("mode", ["mask", "hybrid", "uniform"])
def test_the_bound_is_the_exact_any_order_bound(mode: str, overrides: dict[str, Any]) -> None:
    model, copies = small_model(mode, **overrides), 3000
    row = random_rows(1, T3 + 1, V3, seed=4)
    mask = tg.window_mask(T3, S3, model.cfg.diffusion_causal, CPU)
    keys = tg.derive(torch.arange(copies)[:, None], 9, torch.arange(T3 // S3))
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
def test_the_distribution_that_is_bounded_sums_to_one(mode: str) -> None:
    model = small_model(mode)
    texts = torch.tensor(list(itertools.product(range(V3), repeat=S3)))
    rows = torch.cat((torch.tensor([[1]]).expand(len(texts), 1), texts), dim=1)
    orders = order_nll(masked_set_nll(model, rows, 0))
    assert orders.neg().exp().mean(1).sum().item() == pytest.approx(1, rel=1e-5)


class Table:
    """A model that knows the distribution of texts, and reads in a window all that is not masked,
    or nothing.
    """

    def __init__(self, p: Tensor, texts: Tensor, cfg: tg.Config, reads_window: bool) -> None:
        self.p = p
        self.texts = texts
        self.cfg = cfg
        self.reads_window = reads_window

    def clean(self, ids: Tensor) -> tuple[None, Tensor]:
        return None, ids

    def window(self, window: tg.Window, past: Tensor) -> Tensor:
        """Logits of the true conditionals; positions of the text begin at 1, after a token that is
        always the same.
        """
        xt, size = window.noisy.xt, window.noisy.xt.shape[-1]
        logits = torch.zeros(*xt.shape, V3)
        for w in range(xt.shape[1]):
            known = torch.full((len(xt), self.texts.shape[1]), -1)
            known[:, : w * size] = past[:, 1 : w * size + 1]
            if self.reads_window:
                known[:, w * size : (w + 1) * size] = torch.where(xt[:, w] == V3, -1, xt[:, w])
            fits = ((self.texts == known[:, None]) | (known[:, None] < 0)).all(
                -1
            ) * self.p  # (B, texts)
            for i in range(size):
                of = torch.nn.functional.one_hot(self.texts[:, w * size + i], V3).double()
                logits[:, w, i] = (fits @ of / fits.sum(-1, keepdim=True)).log().float()
        return logits


@pytest.mark.parametrize("reads_window", [False, True])
def test_a_bound_over_blocks_is_at_most_that_over_the_whole_row(reads_window: bool) -> None:
    """By enumeration: with the true conditionals every bound is the entropy, and blocks lose
    nothing; a denoiser that reads only what stands before its window loses the less, the smaller
    the windows are.
    """
    T, samples = 4, 64
    texts = torch.tensor(list(itertools.product(range(V3), repeat=T)))
    p = torch.softmax(2 * torch.randn(len(texts), dtype=torch.float64), 0)
    entropy = -(p * p.log()).sum().item()
    rows, found = torch.nn.functional.pad(texts, (1, 0), value=1), dict[int, float]()
    for size in (1, 2, 4):
        cfg = tiny(vocab_size=V3, train_seq_len=T, train_batch_tokens=2 * T,
                   parallel_eval_examples=0,
                   diffusion_windows=str(size), nelbo_windows="1")  # fmt: skip
        model: Any = Table(p, texts, cfg, reads_window)
        keys = tg.derive(torch.arange(len(rows))[:, None], 3, torch.arange(T // size))
        mask = tg.window_mask(T, size, False, CPU)
        nats = tg.window_bounds(model, rows, keys, size, samples, mask).mean(0).sum(-1)
        found[size] = (p * nats).sum().item()
        if not reads_window:  # the sum of H(token | what stands before its window)
            exact = 0.0
            for i in range(T):
                before = range(i // size * size)
                for value in itertools.product(range(V3), repeat=len(before)):
                    where = (
                        (texts[:, : len(before)] == torch.tensor(value)).all(-1)
                        if value
                        else torch.ones(len(texts)) > 0
                    )
                    share = torch.stack([p[where & (texts[:, i] == v)].sum() for v in range(V3)])
                    exact -= (share * (share / share.sum()).log()).sum().item()
            assert found[size] == pytest.approx(exact, rel=0.02)
    assert found[1] == pytest.approx(entropy, rel=1e-5)
    if reads_window:
        assert [found[2], found[4]] == pytest.approx([entropy] * 2, rel=0.02)
    else:
        assert entropy * 1.03 < found[2] < found[4] / 1.03


class Spy(tg.GPT):
    """A model that remembers the windows it was shown and what it said."""

    seen: list[tuple[tg.Window, Tensor]]

    def window(self, window: tg.Window, past: Any) -> Tensor:
        logits = super().window(window, past)
        self.seen.append((window, logits.detach()))
        return logits


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_never_sees_what_it_scores(mode: str) -> None:
    model = randomise(Spy(tiny(diffusion_corruption_mode=mode)))
    size = 4
    samples = 6
    rows, mask = random_rows(3, 17, 64), tg.window_mask(16, 4, False, CPU)
    keys = tg.derive(torch.arange(3)[:, None], torch.arange(4))
    numbers = set()
    for token in range(size):  # of window 2
        other = rows.clone()
        other[:, 8 + 1 + token] = (rows[:, 8 + 1 + token] + 1) % 64
        runs = []
        for text in (rows, other):
            model.seen = []
            tg.window_bounds(model, text, keys, size, samples, mask)
            runs.append(model.seen)
        for (window, logits), (_, moved) in zip(*runs, strict=True):
            hidden = window.noisy.corrupted[:, 2, token]
            assert (moved - logits)[hidden, 2].abs().sum() == 0, "a token that is scored was read"
            numbers |= set(window.noisy.corrupted[hidden, 2].sum(-1).tolist())
    assert numbers == {1, 2, 3, 4}  # of tokens hidden at once


@pytest.mark.parametrize(
    "overrides", [{}, {"diffusion_shift": False}, {"diffusion_corruption_mode": "hybrid"}]
)
def test_windows_of_one_token_are_scored_exactly(
    overrides: dict[str, Any], data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(**data, **overrides)
    rows = torch.cat([loader.rows(i * 16, 1, 16, CPU) for i in starts_of(loader, 8)])
    total = 0.0
    with torch.no_grad():
        for i in range(16):  # left to right, the noisy mode alone
            past = model.clean(rows[:, :i])[1] if i else None
            yes = torch.ones(len(rows), 1, 1, dtype=torch.bool)
            noisy = tg.Corruption(
                torch.full((len(rows), 1, 1), 400), yes, yes, torch.ones(len(rows), 1)
            )
            everything = torch.ones(2, i + 2, dtype=torch.bool)
            window = tg.Window(rows[:, None, i : i + 1], noisy, torch.arange(i, i + 2), everything)
            log_p = model.window(window, past)[:, 0, 0].log_softmax(-1)
            total -= log_p.gather(-1, rows[:, i + 1 : i + 2]).double().sum().item()
    found = tg.evaluate_bpb(model, run, loader, counter, 1)
    assert found["loss"] == pytest.approx(total / (8 * 16), rel=1e-5)
    assert (found["samples"], found["standard_error"]) == (1, 0)


class OneOf(tg.Run):
    """One rank of several: its sums are added to those of the ranks that ran before."""

    total: Tensor | float = 0.0

    def sum(self, values: Tensor) -> Tensor:
        type(self).total = type(self).total + values
        return torch.as_tensor(type(self).total)


@pytest.mark.parametrize("size", [0, 1, 4])
def test_neither_batch_nor_world_size_moves_a_score(size: int, data: dict[str, Any]) -> None:
    model, run, loader, counter = evaluation(**data)
    expected = tg.evaluate_bpb(model, run, loader, counter, size)
    for tokens in (1, 48, 100_000):
        other = make_run(dataclasses.replace(run.cfg, val_batch_size=tokens))
        assert tg.evaluate_bpb(model, other, loader, counter, size) == pytest.approx(
            expected, rel=1e-6
        )
    for world_size in (2, 3, 50):  # 50 ranks: some have no row at all
        ranks = type("Ranks", (OneOf,), {})
        for rank in range(world_size):
            found = tg.evaluate_bpb(
                model, ranks(**vars(make_run(run.cfg, rank, world_size))), loader, counter, size
            )
            assert rank or found["tokens"] < expected["tokens"]
        assert found == pytest.approx(expected, rel=1e-6)


def test_rows_of_a_bound_are_evenly_spaced_over_the_split(data: dict[str, Any]) -> None:
    cfg = tiny(**data)
    loader, seen = tg.TokenLoader(cfg, "val"), list[int]()
    model, counter = randomise(tg.GPT(cfg)), tg.ByteCounter(cfg)
    plain = loader.rows

    def rows(start: int, *args: Any) -> Tensor:
        seen.append(start)
        return plain(start, *args)

    loader.rows = rows  # type: ignore[method-assign]
    total = (loader.total - 1) // 16
    assert total == 21
    for asked, expected in ((3, [0, 7, 14]), (0, list(range(21))), (99, list(range(21)))):
        seen.clear()
        run = make_run(dataclasses.replace(cfg, nelbo_sequences=asked))
        found = tg.evaluate_bpb(model, run, loader, counter, 4)
        assert seen == [row * 16 for row in expected]
        assert found["tokens"] == len(expected) * 16
    seen.clear()
    tg.evaluate_bpb(model, make_run(dataclasses.replace(cfg, nelbo_sequences=3)), loader, counter)
    assert len(seen) == 21  # the exact score always takes the whole split


@pytest.mark.parametrize("stride", [1, 5, 16, 99])
def test_a_sliding_score_gives_every_token_its_longest_context(
    stride: int, data: dict[str, Any]
) -> None:
    model, run, loader, counter = evaluation(**data, val_batch_size=80)
    # 69 tokens to predict.
    loader.shards, loader.ends, loader.total = (
        [loader.shards[0][:70]],
        [70],
        70,
    )
    found = tg.evaluate_bpb(model, run, loader, counter, stride=stride)
    stride = min(stride, 16)
    rows = (69 - 16) // stride + 1
    text = torch.tensor(loader.shards[0].astype("int64"))
    ends = [16 + stride * i for i in range(rows)]
    nats = 0.0
    num_bytes = 0
    scored = 0
    for place in range(1, ends[-1] + 1):  # the first row that reaches it has the longest context
        end = next(end for end in ends if end >= place)
        nats += tg.score(model, text[None, end - 16 : end + 1])[0, place - 1 - end].item()
        num_bytes += int(counter.count(text[place - 1], text[place]))
        scored += 1
    assert (found["tokens"], found["bytes"], found["stride"]) == (scored, num_bytes, stride)
    assert found["loss"] == pytest.approx(nats / scored, rel=1e-6)
    if stride == 16:
        assert found["bpb"] == tg.evaluate_bpb(model, run, loader, counter)["bpb"]
    ranks = type("Ranks", (OneOf,), {})
    for rank in range(3):
        shared = tg.evaluate_bpb(
            model, ranks(**vars(make_run(run.cfg, rank, 3))), loader, counter, stride=stride
        )
    assert shared == pytest.approx(found, rel=1e-6)


def test_a_bound_converges_and_knows_its_error(data: dict[str, Any]) -> None:
    model, run, loader, counter = evaluation(**data, nelbo_sequences=4)

    def found(samples: int, seed: int = 0) -> dict[str, Any]:
        cfg = dataclasses.replace(run.cfg, nelbo_samples=samples, eval_seed=seed)
        return tg.evaluate_bpb(model, make_run(cfg), loader, counter, 8)

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


def test_parallel_decoding_is_judged_by_decoded_tokens_alone(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(
        **data, parallel_eval_examples=4, parallel_eval_span_len="4,2", parallel_eval_steps="1,2,4"
    )
    run = make_run(cfg)
    loader = tg.TokenLoader(cfg, "val")
    calls = list[tuple[Any, ...]]()
    # A warm-up that must not count, then 1, 3 and 2 seconds.
    readings = itertools.cycle([0, 0, 0, 1, 1, 4, 4, 6])
    monkeypatch.setattr(run, "clock", lambda: next(readings))

    def decode(model: tg.GPT, ids: Tensor, start: int, stop: int, how: tg.Decoding) -> tg.Decoded:
        calls.append((tuple(ids.shape), start, stop, how.window, how.steps))
        wrong = ids.clone()
        wrong[0, start] += 1  # one token of the first example
        wrong[:, :start] += 1  # and what does not count
        wrong[:, stop:] += 1
        return tg.Decoded(wrong, torch.full((len(wrong), 1), 7))

    monkeypatch.setattr(tg, "decode", decode)
    tg.evaluate_parallel(tg.GPT(cfg), run, loader)
    lines = recorded(run, "parallel_eval")
    named = [(line["task"], line["span"], line["steps"], line["mode"]) for line in lines]
    expected = []
    for span, steps in ((4, (1, 2, 4)), (2, (1, 2))):
        expected.append(("continuation", span, span, "ar_cached"))
        expected += [
            (task, span, n, "refine") for task in ("continuation", "infill") for n in steps
        ]
    assert named == expected
    for line in lines:
        assert line["tokens"] == 4 * line["span"]
        assert line["token_acc"] == pytest.approx(1 - 1 / line["tokens"])
        assert line["exact_seq"] == 0.75
        assert line["forwards"] == 7
        assert line["tok_per_sec"] == line["tokens"] / 2  # by the median of what is timed
    assert len(calls) == 4 * len(lines)  # a warm-up and three that are timed
    for (shape, start, stop, window, steps), (task, span, n, mode) in zip(
        calls[::4], named, strict=True
    ):
        assert shape == (4, 4 + span + (4 if task == "infill" else 0))
        assert (start, stop) == (4, 4 + span)
        assert (window, steps) == ((1 << 30, n) if mode == "refine" else (0, 8))


def test_a_model_without_a_denoiser_is_decoded_left_to_right_only(data: dict[str, Any]) -> None:
    cfg = tiny("ar", **data)
    run = make_run(cfg)
    tg.evaluate_parallel(randomise(tg.GPT(cfg)), run, tg.TokenLoader(cfg, "val"))
    assert [line["mode"] for line in recorded(run, "parallel_eval")] == ["ar_cached"]
