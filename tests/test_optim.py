"""Optimizers and schedules: every parameter trains, by the rule and at the rate that its group
says.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train_gpt as tg
from tests.conftest import MAIN, make_run, random_rows, tiny


class NoData(tg.TokenLoader):
    """Random rows, so that an optimizer step needs no file."""

    def __init__(self) -> None:
        self.total = 0

    def rows(
        self, start: int, num_rows: int, seq_len: int, device: torch.device = tg.CPU
    ) -> Tensor:
        return random_rows(num_rows, seq_len + 1, 64, seed=start)


def state_of(recipe: str = "direct", **overrides: Any) -> tg.TrainState:
    cfg = tiny(recipe, **overrides)
    return tg.TrainState(cfg, make_run(cfg), NoData())


@pytest.mark.parametrize("self_condition", ["none", "soft"])
@pytest.mark.parametrize("recipe", MAIN)
def test_every_parameter_is_in_one_group(recipe: str, self_condition: str) -> None:
    state = state_of(recipe, self_condition=self_condition)
    expected = {id(p): name for name, p in state.model.named_parameters()}
    grouped = [id(p) for group in tg.assign_groups(state.model).values() for p in group]
    optimized = [id(p) for group in state.adam.param_groups for p in group["params"]] + [
        id(p) for p in state.matrices
    ]
    assert sorted(grouped) == sorted(expected)
    assert sorted(optimized) == sorted(expected)


def test_groups_hold_what_their_names_say() -> None:
    state = state_of(self_condition="soft", tied_embed_lr=0.1, adapter_lr=0.2, scalar_lr=0.3)
    names = {id(p): name for name, p in state.model.named_parameters()}
    groups = {
        group: {names[id(p)] for p in params}
        for group, params in tg.assign_groups(state.model).items()
    }
    assert groups["embed"] == {"tok_emb", "mask_emb"}
    assert groups["adapter"] == {n for n in names.values() if "time_proj" in n or n == "self_cond"}
    matrices = {n for n in names.values() if n.endswith(".weight")} | {"next_visible_proj"}
    assert groups["matrix"] == matrices == {names[id(p)] for p in state.matrices}
    rates = {
        names[id(p)]: group["base_lr"] for group in state.adam.param_groups for p in group["params"]
    }
    for group, rate in (("embed", 0.1), ("adapter", 0.2), ("scalar", 0.3)):
        assert {rates[name] for name in groups[group]} == {rate}


def test_an_untied_output_matrix_has_rates_of_its_own() -> None:
    state = state_of(tie_embeddings=False, tied_embed_lr=0.1, embed_lr=0.2, head_lr=0.3)
    rates = {id(p): group["base_lr"] for group in state.adam.param_groups for p in group["params"]}
    assert rates[id(state.model.tok_emb)] == 0.2
    assert state.model.lm_head is not None
    assert rates[id(state.model.lm_head)] == 0.3


def test_a_parameter_that_no_group_takes_is_named() -> None:
    model = nn.Module()
    model.kernel = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"no row of GROUPS takes kernel \(2, 3, 4\); add one"):
        tg.assign_groups(model)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (3, 8, 40), (2, 40, 8)])
def test_orthogonalize_moves_singular_values_to_one(shape: tuple[int, ...], scale: float) -> None:
    g = torch.randn(shape) * scale
    x = tg.orthogonalize(g, 5)
    assert x.shape == g.shape
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # And leaves singular vectors where they are.
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    core = u.mT @ x @ vh.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3
    torch.testing.assert_close(tg.orthogonalize(g.mT, 5), x.mT)


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """The published iteration, a matrix at a time, in the matrix's singular values."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 18), (18, 6)])
def test_muon_by_hand(shape: tuple[int, int], decay: float) -> None:
    cfg = tiny(muon_weight_decay=decay, muon_backend_steps=5)
    momentum = 0.9
    rate = 0.02
    other = nn.Parameter(torch.randn(4, 4))  # of another shape, in between
    start = torch.randn(2, *shape)
    # Two are stepped together.
    params = [
        nn.Parameter(start[0].clone()),
        other,
        nn.Parameter(start[1].clone()),
    ]
    buffers = [torch.zeros_like(p) for p in params]
    expected, velocity = start.double(), torch.zeros(2, *shape, dtype=torch.float64)
    for _ in range(3):
        grads = torch.randn(2, *shape)
        for p, g in zip(params, (grads[0], torch.randn(4, 4), grads[1]), strict=True):
            p.grad = g.clone()
        tg.muon_step(params, buffers, rate, momentum, cfg)
        velocity = momentum * velocity + grads
        update = torch.stack([newton_schulz(g, 5) for g in grads + momentum * velocity])
        expected = (
            expected * (1 - rate * decay) - rate * max(1, shape[0] / shape[1]) ** 0.5 * update
        )
        for i, j in ((0, 0), (2, 1)):
            torch.testing.assert_close(
                params[i].detach().double(), expected[j], rtol=1e-4, atol=1e-5
            )
            grad = params[i].grad
            assert grad is not None
            assert grad.equal(grads[j])  # the gradient is read, not changed


def test_the_rate_is_full_and_then_falls_to_zero() -> None:
    cfg = tiny(iterations=100, warmdown_iters=20)
    rates = [tg.ScheduleState.at(cfg, step, 12.3).rate for step in range(101)]
    assert rates[:81] == [1.0] * 81
    assert rates[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 101)], abs=1e-6)
    # The share caps a long warm-down.
    short = tiny(iterations=100, warmdown_iters=1000, warmdown_frac=0.4)
    assert [tg.ScheduleState.at(short, step, 0).rate for step in (60, 80)] == pytest.approx(
        [1.0, 0.5]
    )
    for none in (tiny(warmdown_iters=0), tiny(warmdown_frac=0.0)):
        assert tg.ScheduleState.at(none, 7, 0).rate == 1.0


def test_the_clock_decides_when_it_ends_the_run_first() -> None:
    cfg = tiny(iterations=1000, warmdown_iters=50, max_wallclock_seconds=100.0)
    for step, seconds, left in (
        (0, 0.0, 1000),  # nothing is known before the first step
        (100, 20.0, 400),  # 5 steps a second for 80 more
        (100, 5.0, 900),  # fast enough to reach the last iteration
        (400, 80.0, 100),
        (475, 95.0, 25),
        (500, 100.0, 0),
        (500, 120.0, 0),
    ):
        now = tg.ScheduleState.at(cfg, step, seconds)
        assert now.step == step
        assert now.progress == pytest.approx(step / (step + left), abs=1e-6)
        assert now.rate == pytest.approx(min(left / 50, 1), abs=1e-6)
    assert tg.ScheduleState.at(tiny(iterations=1000), 500, 1e9).progress == 0.5  # no cap


def test_momentum_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[float]()
    monkeypatch.setattr(
        tg, "muon_step", lambda params, buffers, lr, momentum, cfg: seen.append(momentum)
    )
    state = state_of(
        "ar", muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=10
    )
    for step in (0, 5, 10, 11, 500):
        state.update(tg.ScheduleState(step, 0.5, 1.0))
    assert seen == pytest.approx([0.85, 0.90, 0.95, 0.95, 0.95])


def test_an_update_sets_every_rate_and_forgets_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = list[float]()
    monkeypatch.setattr(tg, "muon_step", lambda params, buffers, lr, momentum, cfg: seen.append(lr))
    state = state_of(matrix_lr=0.5)
    for p in state.model.parameters():
        p.grad = torch.randn_like(p)
    state.update(tg.ScheduleState(8, 0.8, 0.5))
    assert seen == [0.25]
    for group in state.adam.param_groups:
        assert group["lr"] == pytest.approx(group["base_lr"] / 2)
    assert state.step == 1
    assert all(p.grad is None for p in state.model.parameters())


def test_the_gradient_is_clipped_as_a_whole() -> None:
    state, seen = state_of("ar", grad_clip_norm=0.5), list[float]()
    params = list(state.model.parameters())
    state.adam.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.square().sum().item() for p in params)
    )
    for p in params:
        p.grad = torch.ones_like(p)
    state.update(tg.ScheduleState(0, 0.0, 1.0))
    assert math.sqrt(sum(seen)) == pytest.approx(0.5, rel=1e-4)


def test_the_average_of_weights_is_kept_in_fp32_and_exported() -> None:
    state = state_of(ema_decay=0.25)
    names = [name for name, _ in state.model.named_parameters()]
    expected = [p.detach().clone() for p in state.model.parameters()]
    objective = tg.Objective(state.cfg, state.run, state.model)
    for step in range(6):
        tg.train_step(state, objective, tg.ScheduleState.at(state.cfg, step, 0.0))
        decay = min(0.25, (1 + step) / (10 + step))  # early averages forget the initial weights
        expected = [
            decay * e + (1 - decay) * p.detach()
            for e, p in zip(expected, state.model.parameters(), strict=True)
        ]
    assert (1 + 0) / (10 + 0) < 0.25 < (1 + 5) / (10 + 5)  # both were met
    exported = state.weights()
    assert list(exported) == names
    for name, e in zip(names, expected, strict=True):
        assert exported[name].dtype == torch.float32
        torch.testing.assert_close(exported[name], e)
    assert not exported["tok_emb"].equal(state.model.tok_emb)
    plain = state_of()
    assert plain.weights()["tok_emb"].data_ptr() == plain.model.tok_emb.data_ptr()
