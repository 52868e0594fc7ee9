"""Decoding left to right and refinement of a span: greedily in train_gpt.py, sampled in scripts.

Models are float64, so that passes of other shapes give the same logits up to the final rounding to
float32, and the order of two tokens can change only if their logits are that close.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from scripts import decoding as dec
from tests.conftest import random_rows, randomise, tiny

V = 64
CORRUPTION = ["mask", "uniform", "hybrid", "gaussian"]
HOT = dec.Sampling(temperature=1.0, seed=3)

Decoder = Callable[..., dec.Decoded]


def autoregressive(
    model: tg.GPT, ids: Tensor, start: int, stop: int, sampling: dec.Sampling = dec.GREEDY
) -> dec.Decoded:
    return dec.decode(model, ids, start, stop, dec.MODES["ar"]._replace(sampling=sampling))


def refine(
    model: tg.GPT, ids: Tensor, start: int, stop: int, sampling: dec.Sampling = dec.GREEDY
) -> dec.Decoded:
    decoding = dec.MODES["refine"]._replace(steps=3, sampling=sampling)
    return dec.decode(model, ids, start, stop, decoding)


DECODERS: dict[str, Decoder] = {"autoregressive": autoregressive, "refine": refine}
every_decoder = pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)


class Spy(tg.GPT):
    """A model that keeps the input (None: a causal pass) and the logits (B, N, V) of each pass."""

    passes: list[tuple[tg.WindowInput | None, Tensor]]
    window: tg.WindowInput | None = None

    def embed_windows(
        self, window: tg.WindowInput, cache: tg.Cache | None
    ) -> tuple[Tensor, Tensor]:
        self.window = window
        return super().embed_windows(window, cache)

    def trunk(self, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        found = super().trunk(*args)
        self.passes.append((self.window, found[0]))
        self.window = None
        return found

    def denoised(self) -> list[tuple[tg.WindowInput, Tensor]]:
        """Inputs and logits of denoising passes."""
        return [(window, logits) for window, logits in self.passes if window is not None]


def model_of(recipe: str = "direct", **overrides: Any) -> Spy:
    model = Spy(tiny(recipe, **{"bigram_vocab_size": 50} | overrides))
    model.passes = []
    randomise(model, std=0.4)
    return model.double()


# ---- left to right ----


@pytest.mark.parametrize(
    ("start", "stop", "length"), [(1, 12, 12), (5, 12, 12), (3, 9, 14), (11, 12, 12)]
)
@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
@pytest.mark.parametrize("recipe", ["direct", "ar"])
def test_autoregressive_equals_a_loop_without_a_cache(
    recipe: str, sampling: dec.Sampling, start: int, stop: int, length: int
) -> None:
    model, ids = model_of(recipe), random_rows(3, length, V)
    expected, keys = ids.clone(), dec.row_keys(ids, sampling.seed)
    with torch.no_grad():
        for i in range(start, stop):
            logits = model.forward_causal(expected[:, :i])[0][:, -1:]
            token, _ = dec.sample_tokens(logits, sampling, tg.split_key(keys, i))
            expected[:, i : i + 1] = token
    assert autoregressive(model, ids, start, stop, sampling).ids.equal(expected)
    if sampling == dec.GREEDY:
        assert tg.decode_autoregressive(model, ids, start, stop).equal(expected)


def test_sampled_text_has_the_distribution_of_the_chain_rule() -> None:
    model, num_rows = model_of(vocab_size=3), 6000
    prompt = torch.tensor([[1, 2, 0, 0, 0]])
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
    texts = torch.cat((prompt[:, :2].expand(27, -1), every), dim=1)
    p = torch.exp(-tg.token_nll_causal(model, texts)[:, 1:].double().sum(1))
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=torch.float64), rtol=1e-6, atol=0)
    ids = prompt.expand(num_rows, -1)
    found = autoregressive(model, ids, 2, 5, dec.Sampling(temperature=1.0)).ids[:, 2:]
    count = torch.bincount((found * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    expected = num_rows * p
    chi_square = ((count - expected) ** 2 / expected).sum()
    assert chi_square < 64  # 26 degrees of freedom: p = 5e-5


# ---- refinement of a span ----


def slow_refine(model: tg.GPT, row: Tensor, key: Tensor, span: range, num_steps: int) -> Tensor:
    """Refine one row (L,) by its definition: nothing is cached, the mask is written out."""
    cfg, x, start = model.cfg, row.clone(), span.start
    positions, size = torch.arange(start - 1, len(row)), len(row) - start
    left, previous = list(span), None
    for step in range(num_steps):
        masked = torch.zeros(1, 1, size, dtype=torch.bool)
        masked[0, 0, [i - start for i in left]] = True
        t = torch.tensor([[len(left) / size]])
        mask_share = float(cfg.diffusion_corruption_mode != "uniform")
        noise_key = tg.split_key(key, start - 1, step)
        noisy = tg.apply_noise(x[None, None, start:], masked, t, noise_key, cfg, mask_share)
        cache = model.forward_causal(x[None, : start - 1])[1] if start > 1 else None
        mask = torch.ones(size + 1, start - 1 + size + 1, dtype=torch.bool)
        if cfg.diffusion_causal:
            mask = mask.tril(start - 1)
        before = x[None, None, start - 1 : start]
        logits = model.forward_denoise(
            tg.WindowInput(before, noisy, positions, mask, previous), cache
        )
        if cfg.self_condition == "soft":
            previous = tg.expected_embedding(model, logits)
        log_p, tokens = logits[0].log_softmax(-1).max(-1)
        left.sort(key=lambda i: -log_p[0, i - start].item())
        goal = math.ceil(len(span) * (step + 1) / num_steps)  # unmasked after this pass
        num_now = goal - (len(span) - len(left))
        for i in left[:num_now]:
            x[i] = tokens[0, i - start]
        left = left[num_now:]
    assert not left
    return x


@pytest.mark.parametrize("overrides", [{}, {"diffusion_shift": False}, {"self_condition": "soft"}])
@pytest.mark.parametrize("mode", CORRUPTION)
@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_refine_equals_the_slow_reference(
    num_steps: int, mode: str, overrides: dict[str, Any]
) -> None:
    """With as many steps as tokens, one token is filled in per pass."""
    model, ids = model_of(diffusion_corruption_mode=mode, **overrides), random_rows(3, 15, V)
    keys, found = dec.row_keys(ids, 0), tg.decode_refine(model, ids, 4, 12, num_steps)
    assert len(model.denoised()) == num_steps
    with torch.no_grad():
        for row in range(3):
            expected = slow_refine(model, ids[row], keys[row : row + 1], range(4, 12), num_steps)
            assert found[row].equal(expected)


@pytest.mark.parametrize(("span", "steps"), [(6, 6), (6, 4), (7, 2), (5, 1), (8, 3)])
def test_the_most_confident_tokens_are_unmasked_first_and_kept(span: int, steps: int) -> None:
    model, ids = model_of(), random_rows(3, 4 + span + 3, V)
    found = tg.decode_refine(model, ids, 4, 4 + span, steps)[:, 4 : 4 + span]
    passes = model.denoised()
    still_masked = torch.ones(3, span, dtype=torch.bool)
    for i, (window, logits) in enumerate(passes):
        noisy = window.noisy
        masked, visible = noisy.corrupted[:, 0, :span], noisy.xt[:, 0, :span]
        assert masked.equal(still_masked)
        assert (masked.sum(-1) == span - math.ceil(span * i / steps)).all()  # even shares
        assert (visible[masked] == V).all()
        assert visible[~masked].equal(found[~masked])
        assert not noisy.corrupted[:, 0, span:].any()  # the text after the span is given
        torch.testing.assert_close(noisy.t[:, 0], masked.sum(-1) / (span + 3))
        confidence, tokens = logits[:, :span].log_softmax(-1).max(-1)
        left = span - math.ceil(span * (i + 1) / steps)
        unsure = confidence.masked_fill(~masked, 9.0).topk(left, largest=False).indices
        still_masked = torch.zeros_like(masked).scatter(1, unsure, True)
        accepted = masked & ~still_masked
        assert found[accepted].equal(tokens[accepted])
    assert len(passes) == steps
    assert not still_masked.any()


@pytest.mark.parametrize("shift", [True, False])
def test_infill_reads_the_suffix(shift: bool) -> None:
    """Every token around the span moves its prediction; those after it only without `causal`."""
    ids, spans = random_rows(1, 10, V), (3, 7)

    def first_logits(ids: Tensor, causal: bool) -> Tensor:
        model = model_of(diffusion_causal=causal, diffusion_shift=shift)
        tg.decode_refine(model, ids, *spans, 1)
        ((_, logits),) = model.denoised()
        return logits[:, int(not shift) :][:, :4]

    for causal in (False, True):
        base = first_logits(ids, causal)
        for position in range(10):
            other = ids.clone()
            other[0, position] = (ids[0, position] + 1) % V
            moved = (first_logits(other, causal) != base).any(-1)
            reads = position < 3 or (position >= 7 and not causal)
            assert moved.all() if reads else not moved.any(), (position, causal)


def test_infill_matches_training_inputs() -> None:
    for mode, masked in (("mask", True), ("hybrid", True), ("uniform", False)):
        model = model_of(diffusion_corruption_mode=mode)
        tg.decode_refine(model, random_rows(2, 13, V), 5, 13, 2)
        for window, _ in model.denoised():
            noisy = window.noisy
            filled_in = noisy.xt[noisy.corrupted]
            assert (filled_in == V).all() if masked else (filled_in < V).all()
            every = mode != "mask" or bool(noisy.corrupted.all())
            assert noisy.possibly_corrupted.all() == every


@pytest.mark.parametrize("self_condition", ["none", "soft", "commit"])
def test_the_last_prediction_is_fed_back_if_training_did_so(self_condition: str) -> None:
    model = model_of(self_condition=self_condition)
    tg.decode_refine(model, random_rows(2, 13, V), 5, 13, 3)
    (first, logits), (second, _), _ = model.denoised()
    assert first.previous is None
    if self_condition == "soft":
        assert second.previous is not None
        assert second.previous[:, 0].equal(tg.expected_embedding(model, logits[:, :-1]))
    else:
        assert second.previous is None


def test_expected_embedding_is_the_mean_over_the_prediction() -> None:
    model = model_of()
    certain = torch.full((3, V), -1e9).scatter(1, torch.tensor([[5], [0], [63]]), 0.0)
    table = tg.rms_norm(model.tok_emb)
    torch.testing.assert_close(tg.expected_embedding(model, certain), table[[5, 0, 63]])
    found = tg.expected_embedding(model, torch.zeros(V))
    torch.testing.assert_close(found, table.mean(0))


# ---- both ----


@every_decoder
@pytest.mark.parametrize("mode", CORRUPTION)
def test_text_around_the_span_is_kept_and_the_span_is_not_read(mode: str, decode: Decoder) -> None:
    model, ids = model_of(diffusion_corruption_mode=mode), random_rows(3, 16, V)
    original = ids.clone()
    found = decode(model, ids, 4, 12, HOT).ids
    assert ids.equal(original)  # the caller's tensor does not change
    assert found[:, :4].equal(ids[:, :4])
    assert found[:, 12:].equal(ids[:, 12:])
    assert found.max() < V
    assert not found[:, 4:12].equal(ids[:, 4:12])
    other = ids.clone()
    other[:, 4:12] = (ids[:, 4:12] + 7) % V
    assert decode(model, other, 4, 12, HOT).ids.equal(found)


@pytest.mark.parametrize("start", [1, 2, 6])
@pytest.mark.parametrize("span", [1, 5, 8])
@pytest.mark.parametrize("steps", [0, 1, 3, 99])
def test_the_number_of_forwards_is_exact(start: int, span: int, steps: int) -> None:
    model, ids = model_of(), random_rows(2, start + span, V)
    if steps:
        tg.decode_refine(model, ids, start, start + span, steps)
    else:
        tg.decode_autoregressive(model, ids, start, start + span)
    assert len(model.passes) == (min(steps, span) or span) + 1  # the prompt


@every_decoder
def test_forwards_are_the_passes_of_each_row(decode: Decoder) -> None:
    model, ids = model_of(), random_rows(2, 9, V)
    found = decode(model, ids, 4, 9)
    expected = 3 if decode is refine else 5
    assert len(model.passes) == expected + 1  # the prompt
    assert found.forwards.tolist() == [[expected]] * 2


@pytest.mark.parametrize("mode", CORRUPTION)
def test_greedy_decoding_is_the_same_in_train_gpt_and_scripts(mode: str) -> None:
    model, ids = model_of(diffusion_corruption_mode=mode), random_rows(3, 16, V)
    assert refine(model, ids, 4, 12).ids.equal(tg.decode_refine(model, ids, 4, 12, 3))
    left_to_right = tg.decode_autoregressive(model, ids, 4, 12)
    assert autoregressive(model, ids, 4, 12).ids.equal(left_to_right)


@pytest.mark.parametrize("decode", [tg.decode_autoregressive, tg.decode_refine])
def test_greedy_decoding_keeps_the_text_around_the_span(decode: Callable[..., Tensor]) -> None:
    model, ids = model_of(), random_rows(3, 16, V)
    original, found = ids.clone(), decode(model, ids, 4, 12)
    assert ids.equal(original)  # the caller's tensor does not change
    assert found[:, :4].equal(ids[:, :4])
    assert found[:, 12:].equal(ids[:, 12:])
    assert decode(model, ids[:1], 4, 12).equal(found[:1])
    assert decode(model, ids, 6, 6).equal(ids)


@every_decoder
def test_an_empty_span_takes_no_pass(decode: Decoder) -> None:
    model, ids = model_of(), random_rows(2, 6, V)
    found = decode(model, ids, 6, 6)
    assert found.ids.equal(ids)
    assert found.forwards.tolist() == [[0], [0]]


@every_decoder
@pytest.mark.parametrize("sampling", [dec.GREEDY, HOT])
@pytest.mark.parametrize("mode", ["mask", "uniform"])
def test_a_batch_of_one_equals_a_batch_of_four(
    mode: str, sampling: dec.Sampling, decode: Decoder
) -> None:
    model, ids = model_of(diffusion_corruption_mode=mode), random_rows(4, 16, V)
    together = decode(model, ids, 4, 12, sampling).ids
    assert decode(model, ids[:1], 4, 12, sampling).ids.equal(together[:1])
    assert decode(model, ids[:3], 4, 12, sampling).ids.equal(together[:3])


@every_decoder
def test_rows_and_seeds_have_different_noise(decode: Decoder) -> None:
    model, ids = model_of(), random_rows(1, 13, V).expand(20, -1)
    assert len(decode(model, ids, 5, 13).ids.unique(dim=0)) == 1
    sampled = decode(model, ids, 5, 13, HOT).ids
    assert len(sampled.unique(dim=0)) == 20
    assert decode(model, ids, 5, 13, HOT).ids.equal(sampled)
    assert not decode(model, ids, 5, 13, HOT._replace(seed=4)).ids.equal(sampled)


@every_decoder
def test_a_row_stops_at_its_end_token(decode: Decoder) -> None:
    model, ids = model_of(), random_rows(6, 21, V)
    whole = decode(model, ids, 5, 21)
    end = int(whole.ids[0, 16])
    ids[1, 2] = end  # an end token of the prompt ends nothing
    whole = decode(model, ids, 5, 21)
    found = decode(model, ids, 5, 21, dec.Sampling(end=end))
    for row, expected in zip(found.ids[:, 5:].tolist(), whole.ids[:, 5:].tolist(), strict=True):
        cut = expected.index(end) if end in expected else 16
        assert row[: cut + 1] == expected[: cut + 1]
        assert set(row[cut:]) <= {end}
    assert found.ids[:, :5].equal(ids[:, :5])
    if decode is autoregressive:
        ends = [row.index(end) + 1 if end in row else 16 for row in whole.ids[:, 5:].tolist()]
        assert found.forwards[:, 0].tolist() == ends


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 4), (3, 9), (5, 4), (9, 9)])
@every_decoder
def test_a_span_outside_the_rows_is_an_error(decode: Decoder, start: int, stop: int) -> None:
    with pytest.raises(tg.UserError, match=rf"span {start}\.\.{stop} must lie in 1\.\.8.*BOS"):
        decode(model_of(), random_rows(2, 8, V), start, stop)


def test_refinement_needs_a_denoiser() -> None:
    with pytest.raises(tg.UserError, match=r"no trained denoiser \(DIFFUSION_LOSS_WEIGHT=0\)"):
        refine(model_of("ar"), random_rows(1, 8, V), 4, 8)


# ---- sampling ----


def test_filters_keep_the_most_probable_tokens() -> None:
    logits, keys = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]), tg.split_key(torch.arange(4000))[None]
    p = logits.softmax(-1)

    def frequencies(**filters: Any) -> Tensor:
        sampling = dec.Sampling(temperature=1.0, **filters)
        tokens, _ = dec.sample_tokens(logits.expand(1, 4000, 5), sampling, keys)
        return torch.bincount(tokens[0], minlength=5) / 4000

    assert (frequencies()[:4] > 0).all()
    cases: list[tuple[dict[str, Any], int]] = [
        (dict(top_k=2), 2),
        (dict(top_p=0.7), 2),
        (dict(top_p=0.3), 1),
        (dict(top_k=3, top_p=0.7), 2),
    ]
    for filters, left in cases:
        found, expected = frequencies(**filters), p[:left] / p[:left].sum()
        assert not found[left:].any()
        five_sigma = 5 * (0.25 / 4000) ** 0.5
        torch.testing.assert_close(found[:left], expected, rtol=0, atol=five_sigma)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_distribution(temperature: float) -> None:
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]), 40_000
    keys = tg.split_key(torch.arange(count), 8).view(100, 400)
    sampling = dec.Sampling(temperature=temperature)
    tokens, log_p = dec.sample_tokens(logits.expand(100, 400, 5), sampling, keys)
    p = (logits.double() / temperature).softmax(-1)
    expected, found = p * count, torch.bincount(tokens.flatten(), minlength=5)
    assert found[4] == 0
    assert ((found - expected) ** 2 / expected)[:4].sum() < 25  # 3 degrees of freedom: p = 1e-5
    assert log_p.equal(logits.double().log_softmax(-1)[tokens])  # at temperature 1
    pairs = torch.bincount((tokens[:, :-1] * 5 + tokens[:, 1:]).flatten(), minlength=25)
    joint = p[:, None] * p * pairs.sum()  # of independent neighbours
    assert ((pairs.view(5, 5) - joint) ** 2 / joint)[:4, :4].sum() < 60  # 15: p = 2e-7


def test_temperature_zero_takes_the_most_probable_token() -> None:
    logits = torch.randn(4, 7, V)
    tokens, log_p = dec.sample_tokens(logits, dec.GREEDY, torch.zeros(4, 7, dtype=torch.int64))
    assert tokens.equal(logits.argmax(-1))
    rounding = V * torch.finfo(torch.float32).eps  # of a sum of V terms
    expected = logits.double().log_softmax(-1).amax(-1)
    torch.testing.assert_close(log_p, expected, atol=rounding, rtol=rounding)
    cold = dec.Sampling(temperature=1e-3)
    keys = tg.split_key(torch.arange(28)).view(4, 7)
    assert dec.sample_tokens(logits, cold, keys)[0].equal(tokens)


def test_scaled_positions_are_read_as_nearer_ones() -> None:
    positions = torch.arange(16)
    near, far = (tg.rotary(n * positions, tiny()) for n in (1, 2))
    assert not near.equal(far)
    torch.testing.assert_close(tg.rotary(2 * positions, tiny(rope_scale=2.0)), near)
