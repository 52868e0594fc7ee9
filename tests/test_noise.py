"""Noise and losses: exact shares, exact densities, and randomness that depends on its key only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from tests.conftest import random_rows, rounding, tiny

V = 64


def keys_of(rows: int, windows: int = 1, seed: int = 0) -> Tensor:
    return tg.split_key(torch.arange(rows)[:, None], seed, torch.arange(windows))


def close_to_share(hits: Tensor, share: float) -> bool:
    """Is the mean of independent draws within 5 standard deviations of what it must be?"""
    spread = math.sqrt(max(share * (1 - share), 1e-12) / hits.numel())
    return abs(hits.double().mean().item() - share) <= 5 * spread


def test_split_key_is_splitmix64() -> None:
    # Of seed 0.
    published = (
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
    )
    assert [x % 2**64 for x in tg.split_key(torch.arange(4), 0).tolist()] == list(published)


def test_keys_depend_on_every_part_and_their_order() -> None:
    keys = torch.tensor([0, 1, -1, 2**62])
    assert tg.split_key(keys, 3, 4).equal(tg.split_key(tg.split_key(keys, 3), 4))
    assert not (tg.split_key(keys, 3, 4) == tg.split_key(keys, 4, 3)).any()
    grid = tg.split_key(
        torch.arange(64)[:, None, None], 7, torch.arange(64)[:, None], torch.arange(64)
    )
    assert grid.unique().numel() == 64**3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20_000, 4), (4, 20_000)])  # many keys; many draws of few keys
def test_random_uniform_is_uniform(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    u = tg.random_uniform(keys_of(shape[0])[:, 0], shape[1], dtype)
    assert u.dtype == dtype
    assert u.shape == shape
    assert u.min() >= 0
    assert u.max() < 1
    u = u.double()
    n = u.numel()
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * n)
    counts = torch.histc(u, 50, 0, 1)
    # Chi-square, 49 degrees of freedom.
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 49 + 5 * math.sqrt(98)


def test_random_uniform_uses_every_bit_of_the_mantissa() -> None:
    for dtype, bits in ((torch.float32, 24), (torch.float64, 53)):
        u = tg.random_uniform(torch.arange(4096), 4, dtype).double()
        assert ((u * 2**bits) % 2 == 1).double().mean() > 0.45  # the last bit is used
        assert (u * 2**bits == (u * 2**bits).round()).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_draws_of_neighbouring_keys_and_indices_are_independent(axis: int) -> None:
    u = tg.random_uniform(torch.arange(300), 300).double()  # plain consecutive keys are the hardest
    a, b = (u[:-1], u[1:]) if axis == 0 else (u[:, :-1], u[:, 1:])
    n = a.numel()
    assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 5 / math.sqrt(n)
    joint = torch.bincount(((a * 10).long() * 10 + (b * 10).long()).flatten(), minlength=100)
    assert ((joint - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * math.sqrt(198)


def test_random_uniform_depends_on_the_key_only() -> None:
    keys, order = keys_of(7, 5), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    u = tg.random_uniform(keys, 6)
    assert u.equal(tg.random_uniform(keys.clone(), 6))
    assert tg.random_uniform(keys[order], 6).equal(u[order])  # whatever else is in the batch
    assert tg.random_uniform(keys[3, 2], 6).equal(u[3, 2])
    assert tg.random_uniform(keys, 3).equal(u[..., :3])


def test_random_normal_is_the_inverse_of_the_normal_distribution() -> None:
    keys = keys_of(7, 5)
    u = tg.random_uniform(keys, 6).double() + 2.0**-25
    found = tg.random_normal(keys, 6)
    assert found.shape == (7, 5, 6)
    assert found.dtype == torch.float32
    cdf = torch.special.ndtr(found.double())
    torch.testing.assert_close(cdf, u, rtol=0, atol=4 * rounding(1))
    assert tg.random_normal(keys, 3).equal(found[..., :3])
    assert tg.random_normal(keys[3, 2], 6).equal(found[3, 2])
    many = tg.random_normal(keys_of(1, 1)[0], 200_000)
    assert abs(many.mean().item()) < 0.01
    assert abs(many.std().item() - 1) < 0.01
    assert bool(many.isfinite().all())


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_normal_distribution_are_finite(
    u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg, "random_uniform", lambda keys, count: torch.full((count,), u))
    assert 5 < tg.random_normal(torch.zeros(1), 2).abs().max().item() < 6


def levels(count: int, start: int = 0, ramp: float = 0.0, **overrides: Any) -> Tensor:
    cfg = tiny(**{"diffusion_full_prob": 0.0, **overrides})
    return tg.noise_level(cfg, keys_of(1, count), start + torch.arange(count)[None], ramp)[0]


def discrepancy(u: Tensor) -> float:
    """Star discrepancy of points in [0, 1]: the largest error of any share [0, x)."""
    u, n = u.double().sort().values, u.numel()
    return max(
        (torch.arange(1, n + 1) / n - u).max().item(), (u - torch.arange(n) / n).max().item()
    )


@pytest.mark.parametrize("rate", ["uniform", "fixed"])
def test_noise_levels_are_above_zero_and_at_most_one(rate: str) -> None:
    for start in (0, 10**6, 14_930_352):  # a Fibonacci number, where the fraction rounds to 1
        t = levels(50_000, start, 0.3, diffusion_rate=rate, diffusion_full_prob=0.2)
        assert t.dtype == torch.float32
        assert t.min() > 0
        assert t.max() == 1


@pytest.mark.parametrize("count", [8, 50, 400, 3000])
@pytest.mark.parametrize("start", [0, 12_345, 10**9])
def test_noise_levels_of_consecutive_windows_are_stratified(count: int, start: int) -> None:
    assert discrepancy(levels(count, start)) < 3 / count  # independent draws: 0.87 / sqrt(count)
    bounded = levels(count, start, diffusion_min_mask_ratio=0.2, diffusion_max_mask_ratio=0.7)
    assert discrepancy((bounded - 0.2) / 0.5) < 3 / count


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_given_share_of_windows_is_fully_corrupted(share: float) -> None:
    t = levels(20_000, 1, diffusion_full_prob=share, diffusion_max_mask_ratio=0.9)
    assert close_to_share(t == 1, share)
    if share == 0.3:  # the rest stay spread over their range
        assert discrepancy(t[t < 1] / 0.9) < 0.02


def test_a_progressive_noise_level_goes_from_min_to_max() -> None:
    rising = dict(
        diffusion_rate="fixed", diffusion_min_mask_ratio=0.25, diffusion_max_mask_ratio=0.35
    )
    close = rounding(4)  # 1 - ramp, its product, the difference, and the limits as float32
    for ramp, expected in ((0.0, 0.25), (0.5, 0.30), (1.0, 0.35)):
        found = levels(5, ramp=ramp, **rising).tolist()
        assert found == pytest.approx([expected] * 5, rel=close)
        constant = levels(5, ramp=ramp, **rising, diffusion_progressive=False).tolist()
        assert constant == pytest.approx([0.35] * 5, rel=close)


def region(name: str, size: int, count: int = 4000, **overrides: Any) -> tuple[Tensor, Tensor]:
    """Marked tokens (count, S) and noise levels (count,) of many windows."""
    t = torch.linspace(0.001, 0.999, count)[None]
    return tg.region_mask(name, t, keys_of(1, count, seed=3), size, tiny(**overrides))[0], t[0]


def lengths_of(t: Tensor, size: int) -> Tensor:
    return (t * size).round().clamp(1, size).long()


def runs_of(row: Tensor) -> list[tuple[int, int]]:
    """Start and length of every run of marked tokens."""
    cells = [False, *row.tolist(), False]
    starts = [i for i in range(1, len(cells)) if cells[i] and not cells[i - 1]]
    return [(i - 1, next(j for j in range(i, len(cells)) if not cells[j]) - i) for i in starts]


def test_iid_marks_each_token_with_probability_t() -> None:
    marked, t = region("iid", 16, 20_000)
    for low in torch.arange(0, 1, 0.1):
        group = (t > low) & (t <= low + 0.1)
        assert close_to_share(marked[group], t[group].mean().item())
    assert (marked.double().mean(0) - 0.5).abs().max() < 0.02  # at every place alike
    pairs = torch.corrcoef((marked.double() - t[:, None]).T).fill_diagonal_(0)
    assert pairs.abs().max() < 0.04  # and independently


def test_continuation_marks_one_span_up_to_the_end() -> None:
    marked, t = region("continuation", 16)
    assert marked.equal(torch.arange(16) >= 16 - lengths_of(t, 16)[:, None])


@pytest.mark.parametrize("size", [2, 16])
def test_infill_marks_one_span_with_text_after_it(size: int) -> None:
    marked, t = region("infill", size)
    starts = set()
    for row, length in zip(marked, lengths_of(t, size).tolist(), strict=True):
        ((start, found),) = runs_of(row)
        assert found == length
        assert start + found < size or length == size
        starts.add((start, length))
    # Every one.
    assert starts >= {
        (start, length) for length in range(1, size) for start in range(size - length)
    }


@pytest.mark.parametrize(("size", "span"), [(16, 3), (16, 1), (2, 8)])
def test_the_number_of_spans_follows_the_noise_level(size: int, span: int) -> None:
    marked, t = region("spans", size, 2000, diffusion_span_len=span, diffusion_spans_per_seq=4)
    span = min(span, size)
    overlapping = 0
    for row, length in zip(marked, lengths_of(t, size).tolist(), strict=True):
        wanted = min(math.ceil(length / span), 4)
        assert all(found >= span for _, found in runs_of(row))
        assert span <= row.sum() <= wanted * span
        overlapping += int(row.sum() < wanted * span)
    assert overlapping < 1800  # they are not all in one place
    assert marked.any(0).all()


@pytest.mark.parametrize("mode", ["mask", "uniform", "hybrid", "gaussian"])
@pytest.mark.parametrize("name", ["iid", "spans", "continuation", "infill"])
def test_noise_level_one_corrupts_every_token(name: str, mode: str) -> None:
    cfg = tiny(diffusion_regions=name, diffusion_corruption_mode=mode, diffusion_span_len=3)
    noisy = tg.corrupt(random_rows(6, 16, V).view(6, 1, 16), torch.ones(6, 1), keys_of(6), cfg)
    assert noisy.corrupted.all()
    assert noisy.possibly_corrupted.all()


def test_regions_are_drawn_by_their_shares() -> None:
    cfg = tiny(diffusion_regions="continuation:3,infill:1")
    noisy = tg.corrupt(
        random_rows(4000, 8, V)[:, None], torch.full((4000, 1), 0.5), keys_of(4000), cfg
    )
    assert (noisy.corrupted.sum(-1) == 4).all()
    assert close_to_share(noisy.corrupted[..., -1], 0.75)  # only a continuation reaches the end


def corruption(mode: str, rows: int = 2000, **overrides: Any) -> tuple[Tensor, tg.Corruption]:
    cfg = tiny(diffusion_corruption_mode=mode, diffusion_regions="iid", **overrides)
    x0 = random_rows(rows, 32, V).view(rows, 2, 16)
    return x0, tg.corrupt(x0, torch.full((rows, 2), 0.6), keys_of(rows, 2, seed=5), cfg)


@pytest.mark.parametrize(
    ("mode", "share"),
    [("mask", 1.0), ("uniform", 0.0), ("hybrid", 0.5), ("hybrid", 0.1), ("hybrid", 1.0)],
)
def test_corrupted_tokens_become_masks_or_uniform_tokens(mode: str, share: float) -> None:
    x0, noisy = corruption(mode, diffusion_hybrid_mask_prob=share)
    assert close_to_share(noisy.corrupted, 0.6)
    assert noisy.xt[~noisy.corrupted].equal(x0[~noisy.corrupted])
    put = noisy.xt[noisy.corrupted]
    assert close_to_share(put == V, share)
    if share < 1:
        drawn = put[put != V]
        counts = torch.bincount(drawn, minlength=V)
        assert len(counts) == V  # [MASK] is the one id past the vocabulary
        assert ((counts - len(drawn) / V) ** 2 / (len(drawn) / V)).sum() < 63 + 5 * math.sqrt(126)
        # The truth is as likely as any other.
        assert close_to_share(drawn == x0[noisy.corrupted][put != V], 1 / V)


def test_every_token_is_possibly_corrupted_unless_masks_mark_them() -> None:
    for mode in ("uniform", "hybrid"):
        _, noisy = corruption(mode, 50)
        assert noisy.possibly_corrupted.all()
        assert not noisy.corrupted.all()
    for mode in ("mask", "gaussian"):
        _, noisy = corruption(mode, 50)
        assert noisy.possibly_corrupted.equal(noisy.corrupted)


def test_gaussian_noise_is_standard_normal() -> None:
    x0, noisy = corruption("gaussian", 400)
    assert noisy.xt.equal(x0)
    assert noisy.noise is not None
    assert noisy.noise.shape == (400, 2, 16, tiny().model_dim)
    z = noisy.noise.double().flatten()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n)
    flat = noisy.noise.double().flatten(0, 2)
    assert abs(torch.corrcoef(flat.T).fill_diagonal_(0)).max() < 5 / math.sqrt(len(flat))


@pytest.mark.parametrize("mode", ["mask", "uniform", "hybrid", "gaussian"])
def test_noise_of_a_window_does_not_depend_on_its_batch(mode: str) -> None:
    cfg = tiny(diffusion_corruption_mode=mode, diffusion_regions="iid,spans,continuation,infill")
    x0 = random_rows(9, 16, V).view(9, 2, 8)
    t = torch.linspace(0.1, 1, 18).view(9, 2)
    keys = keys_of(9, 2)
    together = tg.corrupt(x0, t, keys, cfg)
    some = torch.tensor([7, 2])
    apart = tg.corrupt(x0[some], t[some], keys[some], cfg)
    for a, b in zip(apart, together, strict=True):
        assert (a is None and b is None) or a.equal(b[some])


S3, V3 = 3, 4


def any_order_nll(logits: Tensor, x0: Tensor) -> float:
    """Mean over all orders of the chain rule, nats, for a predictor given by logits (2^S, S, V) of
    each masked set.
    """
    nll, total = tg.token_nll(logits, x0.expand(2**S3, S3)), 0.0
    for order in itertools.permutations(range(S3)):
        open_set = 2**S3 - 1
        for i in order:
            total += nll[open_set, i].item()
            open_set -= 1 << i
    return total / math.factorial(S3)


def test_the_elbo_loss_estimates_the_any_order_likelihood() -> None:
    cfg = tiny(
        vocab_size=V3, diffusion_regions="iid", diffusion_full_prob=0.0, diffusion_loss_clip=1e9
    )
    count, groups = 20_000, 20
    table = torch.randn(2**S3, S3, V3, generator=torch.Generator().manual_seed(1)) * 2
    x0, estimates = torch.tensor([2, 0, 3]), []
    for group in range(groups):
        keys, windows = keys_of(1, count, seed=group), group * count + torch.arange(count)[None]
        noisy = tg.corrupt(
            x0.expand(1, count, S3), tg.noise_level(cfg, keys, windows, 0.0), keys, cfg
        )
        masked_set = (noisy.corrupted * torch.tensor([1, 2, 4])).sum(-1)
        logits = table[masked_set]
        estimates.append(
            S3 * tg.denoising_loss(logits, logits, x0.expand(1, count, S3), noisy, cfg).item()
        )
    mean = torch.tensor(estimates).mean().item()
    error = torch.tensor(estimates).std().item() / math.sqrt(groups)
    exact = any_order_nll(table, x0)
    assert error < 0.01 * exact
    assert abs(mean - exact) < 4 * error


def by_hand(**overrides: Any) -> tuple[Tensor, Tensor, tg.Corruption, tg.Config]:
    """Two windows of two tokens at t = 0.5 and 0.2: three tokens corrupted."""
    corrupted = torch.tensor([[[True, True], [False, True]]])
    logits = torch.randn(1, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    x0 = torch.tensor([[[0, 1], [2, 3]]])
    noisy = tg.Corruption(x0, corrupted, corrupted, torch.tensor([[0.5, 0.2]]))
    return logits, x0, noisy, tiny(vocab_size=5, **overrides)


def test_losses_equal_those_by_hand() -> None:
    logits, x0, noisy, cfg = by_hand()
    (a, b), (_, c) = (-logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]).tolist()[0]
    scores = (logits - math.log(5)).exp().sum(-1)[0] - logits.gather(-1, x0[..., None])[0, ..., 0]
    entropy = ((scores + math.log(5) - 1) * torch.tensor([[2, 2], [0, 5]])).sum().item() / 4
    for overrides, expected in (
        ({"diffusion_loss": "mean"}, (a + b + c) / 3),
        ({"diffusion_loss": "elbo"}, (2 * a + 2 * b + 5 * c) / 4),
        ({"diffusion_loss": "elbo", "diffusion_loss_clip": 4.0}, (2 * a + 2 * b + 4 * c) / 4),
        ({"diffusion_loss": "score_entropy"}, entropy),
    ):
        found = tg.denoising_loss(logits, logits, x0, noisy, dataclasses.replace(cfg, **overrides))
        # Log-softmax over 5, the sum of 4 and its division; each loss is the size of its logits.
        assert found.item() == pytest.approx(expected, rel=rounding(5, 4, 4)), overrides


@pytest.mark.parametrize("loss", [name for name in tg.LOSSES if name != "sedd_uniform"])
def test_only_corrupted_tokens_carry_loss(loss: str) -> None:
    logits, x0, noisy, cfg = by_hand(diffusion_loss=loss)
    clean = logits * 0.5
    before = tg.denoising_loss(logits, clean, x0, noisy, cfg)
    assert before > 0
    for values in (logits, clean):
        values[0, 1, 0] += torch.arange(5.0)  # the one token that is as it was
        assert tg.denoising_loss(logits, clean, x0, noisy, cfg).equal(before)
    nothing = noisy._replace(corrupted=torch.zeros_like(noisy.corrupted))
    assert tg.denoising_loss(logits, logits, x0, nothing, cfg) == 0


def test_choices_of_the_setting_are_the_rows_of_losses() -> None:
    choices = tg.Config.__dataclass_fields__["diffusion_loss"].metadata["choices"]
    assert sorted(tg.LOSSES) == sorted(choices)


def test_consistency_is_the_divergence_from_the_clean_stream() -> None:
    logits, x0, noisy, cfg = by_hand(diffusion_loss="consistency")
    close = rounding(5, 4) * (logits.abs().max().item() + 3)  # sums of log-probabilities
    assert tg.denoising_loss(logits, logits, x0, noisy, cfg).item() == 0
    shifted = tg.denoising_loss(logits + 3, logits, x0, noisy, cfg)  # the same distribution
    assert shifted.item() == pytest.approx(0, abs=close)
    clean = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    divergence = F.kl_div(logits.log_softmax(-1), clean.softmax(-1), reduction="none").sum(-1)
    found = tg.denoising_loss(logits, clean, x0, noisy, cfg).item()
    assert found > 0.1
    assert found == pytest.approx(divergence[noisy.corrupted].mean().item(), abs=close)


def test_score_entropy_is_minimal_at_the_posterior() -> None:
    posterior = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    x0 = torch.arange(4)

    def expected(logits: Tensor) -> Tensor:
        return (posterior * tg.score_entropy(logits.expand(4, 4), x0)).sum()

    best = (posterior.log() + math.log(4)).requires_grad_()
    (gradient,) = torch.autograd.grad(expected(best), best)
    assert gradient.abs().max() < 1e-12
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shift = torch.randn(4, generator=generator, dtype=torch.float64) * 0.3
        assert expected(best + shift) > expected(best)
    # There it is the cross-entropy; and it is not blind to a constant, as a cross-entropy is.
    torch.testing.assert_close(tg.score_entropy(best.expand(4, 4), x0).detach(), -posterior.log())
    assert expected(best + 0.5) > expected(best)


# One token of a tiny vocabulary: everything can be enumerated.
PRIOR = torch.tensor([0.45, 0.3, 0.2, 0.05], dtype=torch.float64)


def joint(t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Under uniform noise at level t: p(xt | x0), (V0, Vt); p(x0 | xt), (Vt, V0); p(y) / p(xt),
    (Vt, Vy).
    """
    kernel = (1 - t) * torch.eye(4, dtype=torch.float64) + t / 4
    both, marginal = PRIOR[:, None] * kernel, PRIOR @ kernel
    return kernel, (both / marginal).T, marginal / marginal[:, None]


def expected_sedd(table: Tensor, t: float) -> Tensor:
    """Mean loss of a predictor with logits table (Vt, V) over x0 and xt, times its weight."""
    kernel, *_ = joint(t)
    x0, xt = (
        x.flatten()[:, None, None]
        for x in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    )
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    noisy = tg.Corruption(xt, everywhere, everywhere, torch.full((16, 1), t, dtype=torch.float64))
    nats = tg.sedd_uniform(table[xt], x0, torch.empty(0), noisy).view(4, 4)
    weight = tg.LOSSES["sedd_uniform"].weight(torch.tensor(t, dtype=torch.float64), 1e12)
    return (PRIOR[:, None] * kernel * nats).sum() * weight


def by_the_paper(score: Tensor, t: float) -> Tensor:
    """Equation 9 of arXiv:2310.16834, term by term: scores (Vt, Vy), the rate of uniform noise 1 /
    ((1 - t) V).
    """
    kernel, *_ = joint(t)
    total = torch.zeros((), dtype=torch.float64)
    for x0, xt, y in itertools.product(range(4), repeat=3):
        if y != xt:
            ratio = kernel[x0, y] / kernel[x0, xt]
            part = score[xt, y] - ratio * score[xt, y].log() + ratio * (ratio.log() - 1)
            total = total + PRIOR[x0] * kernel[x0, xt] * part / ((1 - t) * 4)
    return total


@pytest.mark.parametrize("t", [0.01, 0.3, 0.8, 0.99])
def test_uniform_score_entropy_is_minimal_at_the_true_ratios(t: float) -> None:
    _, posterior, ratios = joint(t)
    least = by_the_paper(ratios, t)  # what no score can remove
    best = (posterior.log() + 1.7).requires_grad_()  # a constant says nothing
    found = expected_sedd(best, t)
    assert found.item() - least.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(found, best)
    assert gradient.abs().max() < 1e-12
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        table = best.detach() + torch.randn(4, 4, generator=generator, dtype=torch.float64) * 0.3
        q = table.softmax(-1)
        kernel, *_ = joint(t)
        # The mean of p(y | x0) / p(xt | x0).
        score = torch.einsum("xz,zy,zx->xy", q, kernel, 1 / kernel)
        assert expected_sedd(table, t).item() == pytest.approx(
            by_the_paper(score, t).item(), rel=1e-9
        )
        assert expected_sedd(table, t) - least > 1e-9


@pytest.mark.slow
def test_uniform_score_entropy_integrates_to_the_entropy() -> None:
    """Over all t its mean under the exact scores is the entropy of the data, as the bound is tight
    there.
    """
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    points = (3 * u**2 - 2 * u**3, 6 * u * (1 - u) / 4000)  # denser at both ends
    total = sum(
        expected_sedd(joint(t)[1].log(), t).item() * w
        for t, w in zip(*(x.tolist() for x in points), strict=True)
    )
    assert total == pytest.approx(-(PRIOR * PRIOR.log()).sum().item(), rel=1e-4)


def test_score_entropy_of_masks_is_that_of_the_paper() -> None:
    """Equation 9 for absorbing noise: from [MASK], at level t, each token comes back at a rate of 1
    / t.
    """
    logits = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, x0 in itertools.product((0.1, 0.5, 0.9), range(4)):
        score = (logits - math.log(4)).exp() * (1 - t) / t
        ratio = F.one_hot(torch.tensor(x0), 4).double() * (1 - t) / t
        entropy = (
            score - ratio * score.log() + torch.where(ratio > 0, ratio * (ratio.log() - 1), 0.0)
        )
        weight = tg.LOSSES["score_entropy"].weight(torch.tensor(t, dtype=torch.float64), 1e9)
        rate = 1 / (1 - t)  # sigma' of the log-linear schedule
        nats = tg.score_entropy(logits[None], torch.tensor([x0])).item() * weight.item()
        assert nats == pytest.approx(rate * entropy.sum().item(), rel=1e-9)


def noisy_logits(scale: float) -> Tensor:
    """Logits of 64 windows of 16 tokens, at most `scale`."""
    draws = torch.randn(64, 1, 16, V, generator=torch.Generator().manual_seed(1))
    return draws.clamp(-1, 1) * scale


def test_uniform_score_entropy_is_finite_and_reaches_every_token() -> None:
    cfg = tiny(
        diffusion_corruption_mode="uniform", diffusion_loss="sedd_uniform", diffusion_regions="iid"
    )
    x0 = random_rows(64, 16, V)[:, None]
    for t in (1e-6, 1e-3, 0.5, 1 - 1e-7, 1.0):
        noisy = tg.corrupt(x0, torch.full((64, 1), t), keys_of(64), cfg)
        for scale in (0.0, 1.0, 30.0):
            logits = noisy_logits(scale).requires_grad_()
            loss = tg.denoising_loss(logits, logits, x0, noisy, cfg)
            loss.backward()
            assert loss.isfinite()
            # Nearly equal scores of 1: three rounded terms, times the weight.
            error = 3 * rounding(1) * cfg.diffusion_loss_clip
            assert loss > (0 if t < 0.9 else -error)
            assert logits.grad.isfinite().all()
            reached = logits.grad.abs().sum(-1) > 0
            assert reached.all() or scale == 30 or t > 0.9, (t, scale)  # also tokens that were kept
    noisy = tg.corrupt(x0, torch.full((64, 1), 0.95), keys_of(64), cfg)
    values = []
    for clip in (5.0, 10.0, 1e9):
        clipped = dataclasses.replace(cfg, diffusion_loss_clip=clip)
        logits = noisy_logits(1.0)
        values.append(tg.denoising_loss(logits, logits, x0, noisy, clipped).item())
    # 1 / (1 - 0.95) is 20, and so is its condition number.
    ratios = [value / values[0] for value in values]
    assert ratios == pytest.approx([1, 2, 4], rel=rounding(20, x0.numel()))


def test_uniform_score_entropy_needs_uniform_noise() -> None:
    for mode in ("mask", "hybrid", "gaussian"):
        with pytest.raises(
            tg.UserError,
            match=f"DIFFUSION_LOSS='sedd_uniform' .*DIFFUSION_CORRUPTION_MODE='{mode}'",
        ):
            tiny(diffusion_loss="sedd_uniform", diffusion_corruption_mode=mode)
