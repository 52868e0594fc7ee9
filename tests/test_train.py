"""Training: the curve, resuming to the bit, the clock, and what stops a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from tests.conftest import (
    CPU,
    MAIN,
    ROOT,
    env_of,
    make_run,
    random_rows,
    randomise,
    read_events,
    recorded,
    settings,
    tiny,
    train_lines,
    wait_for,
    write_shard,
)

GOLDEN = ROOT / "tests" / "golden" / "tiny_cpu.json"


@pytest.fixture
def synthetic(tmp_path: Path) -> dict[str, Any]:
    """Settings that name shards which depend on nothing but these lines: 64 tokens that follow a
    simple rule.
    """
    state, tokens = 1, []
    for i in range(6000):
        state = (1103515245 * state + 12345) % 2**31
        tokens.append(
            (tokens[-1] * 5 + 3 + (state >> 16) % 4) % 64 if i % 7 else (state >> 20) % 64
        )
    write_shard(tmp_path / "data" / "s_train_0.bin", tokens[:5000])
    write_shard(tmp_path / "data" / "s_val_0.bin", tokens[5000:])
    return {"data_path": str(tmp_path / "data"), "out_dir": str(tmp_path / "out")}


class CountTokens(tg.ByteCounter):
    """Two bytes per token: synthetic tokens have no text."""

    def __init__(self) -> None:
        self.sha256 = "none"

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        return torch.full_like(target, 2)


def trained(cfg: tg.Config) -> tuple[tg.TrainState, list[dict[str, Any]]]:
    """Train in this process; the state at the end and the events of every step."""
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"))
    state.resume()
    tg.train(state, tg.TokenLoader(cfg, "val"), CountTokens())
    return state, recorded(state.run, "train")


def curve(steps: list[dict[str, Any]]) -> list[list[float]]:
    return [[step["train_loss"], step["denoise_loss"]] for step in steps]


def test_the_loss_curve_is_the_golden_one(
    synthetic: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    cfg = tiny(**synthetic, iterations=12, train_batch_tokens=128)
    state, steps = trained(cfg)
    (val,) = recorded(state.run, "val")
    found = {"train_loss, denoise_loss": curve(steps), "val_loss": val["loss"]}
    if pytestconfig.getoption("update_golden"):
        GOLDEN.write_text(json.dumps(found).replace("], [", "],\n [") + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found["val_loss"] == pytest.approx(golden["val_loss"], rel=1e-4)
    assert len(found["train_loss, denoise_loss"]) == 12
    for here, there in zip(
        found["train_loss, denoise_loss"], golden["train_loss, denoise_loss"], strict=True
    ):
        assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.slow
def test_it_learns(synthetic: dict[str, Any]) -> None:
    cfg = tiny(**synthetic, iterations=60, train_batch_tokens=256, train_log_every=1)
    _, steps = trained(cfg)
    losses = [step["train_loss"] for step in steps]
    assert losses[0] == pytest.approx(math.log(64), abs=0.15)
    assert sum(losses[-5:]) / 5 < 3.0  # two bits of each token are random, and 1 in 7 is


@pytest.mark.slow
def test_two_runs_are_equal_to_the_bit(synthetic: dict[str, Any]) -> None:
    cfg = tiny(
        **synthetic, ema_decay=0.9, grad_clip_norm=1.0, self_condition="soft", diffusion_passes=2
    )
    (first, a), (second, b) = trained(cfg), trained(cfg)
    assert curve(a) == curve(b)
    for name, w in first.weights().items():
        assert w.equal(second.weights()[name]), name
    other, c = trained(dataclasses.replace(cfg, seed=1))
    assert curve(a)[0] != curve(c)[0]
    assert not other.model.tok_emb.equal(first.model.tok_emb)


def test_an_evaluation_moves_nothing(synthetic: dict[str, Any]) -> None:
    state, steps = trained(tiny(**synthetic))
    often, others = trained(tiny(**synthetic, val_loss_every=2))
    assert curve(steps) == curve(others)
    assert [val["step"] for val in recorded(often.run, "val")] == [2, 4, 6, 8]
    assert len(recorded(state.run, "val")) == 1
    assert all(w.equal(often.weights()[name]) for name, w in state.weights().items())


@pytest.mark.parametrize("recipe", MAIN)
def test_every_recipe_trains(recipe: str, synthetic: dict[str, Any]) -> None:
    for start in (0, 2):
        cfg = tiny(recipe, **synthetic, iterations=3, diffusion_start_step=start)
        state, steps = trained(cfg)
        assert len(steps) == 3
        for i, step in enumerate(steps):
            assert math.isfinite(step["train_loss"])
            assert (step["denoise_loss"] > 0) == (cfg.diffusion and i >= start)
        fresh = tg.GPT(cfg).state_dict()
        moved = {name for name, w in state.model.state_dict().items() if not w.equal(fresh[name])}
        # A gradient reaches the first factor of a product only once the second has left zero.
        still = {name for name in fresh.keys() - moved if not name.endswith("next_visible_gain")}
        assert not still


@pytest.mark.parametrize("windows", ["", "5", "none"])
def test_a_run_without_windows_does_not_read_their_sizes(
    windows: str, synthetic: dict[str, Any]
) -> None:
    _, steps = trained(tiny("ar", **synthetic, diffusion_windows=windows, iterations=2))
    assert len(steps) == 2


# fmt: off
VARIANTS: list[dict[str, Any]] = [
    dict(self_condition="soft"), dict(self_condition="commit"), dict(diffusion_passes=2),
    dict(self_condition="soft", diffusion_passes=2),
    dict(self_condition="commit", diffusion_passes=2),
    *(dict(diffusion_loss=name) for name in tg.LOSSES
      if name != "sedd_uniform"),
    dict(diffusion_loss="sedd_uniform", diffusion_corruption_mode="uniform"),
    dict(diffusion_anneal_frac=0.6),
    *(dict(diffusion_corruption_mode=mode) for mode in ("mask", "uniform", "hybrid", "gaussian")),
    *(dict(diffusion_regions=name) for name in ("iid", "spans", "continuation", "infill")),
    *(dict(mercury_task_mode=mode) for mode in ("mixed", "continuation", "infill")),
    *(dict(diffusion_rate="fixed", diffusion_ramp=ramp) for ramp in ("run", "iterations")),
    dict(look_ahead=0), dict(time_embed_dim=0), dict(look_ahead=0, time_embed_dim=0),
    dict(num_layers=1),
    dict(num_layers=3), dict(num_kv_heads=2), dict(diffusion_row_frac=0.3),
    dict(mercury_clean_loss_weight=0.0),
    dict(diffusion_causal=True), dict(diffusion_shift=False), dict(diffusion_start_frac=0.5),
    dict(muon_weight_decay=0.1), dict(ema_decay=0.9), dict(grad_clip_norm=0.1),
    dict(muon_momentum_warmup_steps=0),
    dict(tie_embeddings=False), dict(value_residual=True), dict(bigram_vocab_size=50),
]
# fmt: on


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items())
)
def test_every_setting_trains(variant: dict[str, Any], synthetic: dict[str, Any]) -> None:
    _, steps = trained(tiny(**synthetic, **{"iterations": 2} | variant))
    assert len(steps) == 2
    for step in steps:
        assert math.isfinite(step["train_loss"])
        assert math.isfinite(step["denoise_loss"])
    assert steps[-1]["denoise_loss"] > 0


def test_windows_join_in_at_their_step_and_share(synthetic: dict[str, Any]) -> None:
    _, by_step = trained(tiny(**synthetic, diffusion_start_step=3))
    assert [step["denoise_loss"] > 0 for step in by_step] == [False] * 3 + [True] * 5
    _, by_share = trained(tiny(**synthetic, diffusion_start_frac=0.5))
    assert [step["denoise_loss"] > 0 for step in by_share] == [False] * 4 + [True] * 4
    _, alone = trained(tiny("ar", **synthetic))
    assert curve(by_step)[:3] == curve(alone)[:3]  # until then it is the baseline, to the bit


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_parts_and_ranks_of_a_step_have_one_window_size(
    ranks: int, synthetic: dict[str, Any]
) -> None:
    """The all-reduce waits for the slowest rank; over steps, sizes keep their shares."""
    cfg = tiny(**synthetic, micro_batches=4, diffusion_windows="4:1,8:3")
    sizes: dict[int, list[int]] = {}
    for rank in range(ranks):
        run = make_run(cfg, rank)
        run.world_size = ranks
        run.sum = lambda values: values  # type: ignore[method-assign]
        state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
        objective = tg.Objective(cfg, run, state.model)

        def seen(rows: Tensor, part: int, size: int, now: tg.ScheduleState) -> tg.Pair:
            sizes.setdefault(now.step, []).append(size)
            loss = sum(p.sum() for p in state.model.parameters())  # noqa: B023
            return loss, torch.zeros(2)  # type: ignore[return-value]

        for step in range(8):
            now = tg.ScheduleState(step, 0.5, 0.0)
            tg.train_step(state, seen, now)  # type: ignore[arg-type]
        assert objective.masks.keys() == {4, 8}
    assert [len(found) for found in sizes.values()] == [4] * 8
    assert all(len(set(found)) == 1 for found in sizes.values())
    drawn = [tg.window_size(cfg, tg.ScheduleState(step, 0.5, 1.0)) for step in range(400)]
    assert drawn[:8] == [found[0] for found in sizes.values()]
    assert drawn.count(8) / 400 == pytest.approx(0.75, abs=0.1)


def test_a_step_computes_no_rotary_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph it would be computed again in every layer."""
    objective, _ = objective_of()

    def rotary(*_: Any) -> Tensor:
        raise AssertionError("computed in a step")

    monkeypatch.setattr(tg, "rotary", rotary)
    for size in (0, *objective.masks):
        objective(random_rows(4, 17, 64), 0, size, tg.ScheduleState(0, 0.5, 1.0))


def test_replicas_that_differ_are_named_with_rank_and_step(
    synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(**synthetic, run_id="r")
    states = [
        tg.TrainState(cfg, make_run(cfg, rank), tg.TokenLoader(cfg, "train")) for rank in (0, 1)
    ]
    facts = list[Any]()

    def gather(everyone: list[Any], ours: Any, group: Any) -> None:
        facts.append(ours)
        everyone[:] = [facts[0], ours]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for state in states:
        state.step, state.run.world_size = 7, 2
        state.run.control = object()  # type: ignore[assignment]
        state.save()  # the same weights
    with torch.no_grad():  # the last bit of one number
        flat = states[1].model.blocks[0].fc.weight.view(-1)  # type: ignore[union-attr, index]
        flat[3] = torch.nextafter(flat[3], torch.tensor(2.0))
    cfg.checkpoints[0].unlink()
    rule = "rank 1 differs from rank 0: CHECKSUM OF WEIGHTS AT STEP 7 "
    with pytest.raises(tg.UserError, match=rule):
        states[1].save()
    facts[0] = facts[-1]
    with pytest.raises(tg.UserError, match="rank 1 differs from rank 0"):
        states[0].save()
    assert cfg.checkpoints[0].exists()  # what rank 0 has is kept


def objective_of(**overrides: Any) -> tuple[tg.Objective, tg.Config]:
    cfg = tiny(**overrides)
    return tg.Objective(cfg, make_run(cfg), randomise(tg.GPT(cfg))), cfg


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    rows, now = random_rows(4, 17, 64), tg.ScheduleState(3, 0.5, 1.0)
    objective, _ = objective_of(mercury_clean_loss_weight=0.3, diffusion_loss_weight=0.7)
    loss, (ar_loss, window_loss) = objective(rows, 1, 4, now)
    assert loss.item() == pytest.approx(0.3 * ar_loss.item() + 0.7 * window_loss.item(), rel=1e-5)
    assert ar_loss.item() == pytest.approx(
        tg.token_nll_causal(objective.model, rows).mean().item(), rel=1e-5
    )
    assert objective(rows, 1, 4, now)[0].equal(loss)
    # Noise belongs to a place in the global batch.
    assert not objective(rows, 2, 4, now)[0].equal(loss)
    assert not objective(rows, 1, 4, tg.ScheduleState(4, 0.5, 1.0))[0].equal(loss)  # and to a step


def test_gradients_and_losses_of_ranks_add_up(synthetic: dict[str, Any]) -> None:
    """Optimizers that ignore the gradient's scale would hide a wrong weight."""
    cfg = tiny(**synthetic, micro_batches=4)

    class Alone(tg.Run):
        def sum(self, values: Tensor) -> Tensor:
            return values

    totals = []
    for world_size in (1, 2, 4):
        grads, losses = list[Tensor](), list[Tensor]()
        for rank in range(world_size):
            run = Alone(**vars(make_run(cfg, rank, world_size)))
            state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
            params = list(randomise(state.model).parameters())

            def update(_: tg.ScheduleState, params: Any = params, grads: Any = grads) -> None:
                grads.append(torch.cat([p.grad.flatten() for p in params]))

            state.update = update  # type: ignore[method-assign]
            losses.append(
                tg.train_step(
                    state, tg.Objective(cfg, run, state.model), tg.ScheduleState(0, 0.0, 1.0)
                )
            )
        totals.append((torch.stack(grads).sum(0), torch.stack(losses).sum(0)))
    assert totals[0][0].abs().sum() > 0
    for grad, loss in totals[1:]:
        torch.testing.assert_close(grad, totals[0][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loss, totals[0][1])


def test_only_a_share_of_rows_carries_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = list[tuple[int, ...]](), tg.GPT.forward_denoise

    def forward_denoise(self: tg.GPT, window: tg.WindowInput, cache: tg.Cache) -> Tensor:
        seen.append(tuple(window.noisy.xt.shape))
        assert {len(x) for x in [*cache.keys, *cache.values]} == {len(window.noisy.xt)}
        return plain(self, window, cache)

    monkeypatch.setattr(tg.GPT, "forward_denoise", forward_denoise)
    for share, count in ((1.0, 8), (0.25, 2), (0.01, 1)):
        objective, _ = objective_of(diffusion_row_frac=share)
        objective(random_rows(8, 17, 64), 0, 4, tg.ScheduleState(0, 0.0, 1.0))
        assert seen.pop() == (count, 4, 4)


def test_the_noise_levels_of_a_batch_are_stratified(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = list[Tensor](), tg.corrupt

    def corrupt(x0: Tensor, t: Tensor, keys: Tensor, cfg: tg.Config) -> tg.Corruption:
        seen.append(t)
        return plain(x0, t, keys, cfg)

    monkeypatch.setattr(tg, "corrupt", corrupt)
    objective, _ = objective_of(diffusion_full_prob=0.0)
    for step in (0, 7):
        for part in range(4):  # four parts of one batch, as several ranks would take them
            objective(random_rows(4, 17, 64), part, 4, tg.ScheduleState(step, 0.0, 1.0))
        t = torch.cat(seen).flatten().sort().values
        assert len(t) == 64
        assert (t - (torch.arange(64) + 0.5) / 64).abs().max() < 3 / 64
        seen.clear()


def test_a_prediction_is_fed_back_as_trained() -> None:
    for self_condition in ("soft", "commit", "none"):
        objective, cfg = objective_of(
            self_condition=self_condition,
            mercury_self_condition_prob=0.5,
            mercury_self_condition_fraction=0.25,
        )
        tokens, positions = tg.split_into_windows(random_rows(500, 17, 64), 4)
        keys = tg.split_key(torch.arange(500)[:, None], torch.arange(4))
        noisy = tg.corrupt(tokens[..., 1:], torch.full((500, 4), 0.6), keys, cfg)
        mask = objective.masks[4]
        window = tg.WindowInput(tokens[..., :1], noisy, positions, mask)
        logits = torch.randn(500, 4, 4, 64)
        fed = tg.feed_back(objective.model, window, logits, keys)
        assert fed.noisy.corrupted.equal(noisy.corrupted)
        assert fed.noisy.possibly_corrupted.equal(noisy.possibly_corrupted)
        if self_condition == "soft":
            assert fed.noisy.xt.equal(noisy.xt)
            assert fed.previous is not None
            given = fed.previous.abs().sum((-1, -2)) > 0
            assert given.float().mean().item() == pytest.approx(0.5, abs=0.06)
            expected = tg.expected_embedding(objective.model, logits)
            torch.testing.assert_close(fed.previous[given], expected[given])
        else:
            replaced = fed.noisy.xt != noisy.xt
            assert not (replaced & ~noisy.corrupted).any()
            assert fed.noisy.xt[replaced].equal(logits.argmax(-1)[replaced])
            share = 0.25 * (1.0 if self_condition == "none" else 0.5)
            assert (replaced.sum() / noisy.corrupted.sum()).item() == pytest.approx(share, abs=0.04)


def test_self_conditioning_trains_with_one_pass_first() -> None:
    """Its first pass carries no gradient and no loss; unrolled passes carry both."""
    rows, now = random_rows(4, 17, 64), tg.ScheduleState(0, 0.0, 1.0)
    for self_condition, passes, expected in (
        ("none", 1, 1),
        ("soft", 1, 2),
        ("none", 3, 3),
        ("commit", 2, 3),
    ):
        objective, _ = objective_of(self_condition=self_condition, diffusion_passes=passes)
        graded, plain = list[bool](), objective.model.forward_denoise

        def forward_denoise(
            window: tg.WindowInput, cache: Any, graded: list[bool] = graded, plain: Any = plain
        ) -> Tensor:
            graded.append(torch.is_grad_enabled())
            return plain(window, cache)

        objective.model.forward_denoise = forward_denoise  # type: ignore[assignment, method-assign]
        objective(rows, 0, 4, now)[0].backward()  # type: ignore[no-untyped-call]
        assert graded == [False] * (expected - passes) + [True] * passes


@pytest.mark.parametrize(
    ("checkpoint_seconds", "found"),
    [(1e-9, "tok_emb is not finite at step 4"), (0.0, "loss is not finite at step 5")],
)
def test_a_run_that_is_no_longer_finite_stops(
    checkpoint_seconds: float, found: str, synthetic: dict[str, Any]
) -> None:
    cfg = tiny(**synthetic, run_id="r", checkpoint_seconds=checkpoint_seconds)
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"))
    plain = state.update

    def update(now: tg.ScheduleState) -> None:
        plain(now)
        if state.step == 4:
            with torch.no_grad():
                state.model.tok_emb.fill_(math.nan)

    state.update = update  # type: ignore[method-assign]
    with pytest.raises(tg.UserError) as caught:
        tg.train(state, tg.TokenLoader(cfg, "val"), CountTokens())
    for named in (found, "MATRIX_LR", str(cfg.checkpoints[0])):
        assert named in str(caught.value)
    assert cfg.checkpoints[0].exists() == (checkpoint_seconds > 0)
    if checkpoint_seconds > 0:  # the last good one is kept
        about, saved = tg.unpack_tensors(cfg.checkpoints[0].read_bytes())
        assert about["step"] == 3
        assert not tg.first_not_finite(saved)


def test_a_run_that_explodes_keeps_a_usable_checkpoint(
    synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(
        **synthetic,
        run_id="r",
        checkpoint_seconds=1e-9,
        tied_embed_lr=1000.0,
        iterations=30,
        beta2=0.0,
        adam_eps=1e-20,
    )
    plain = tg.Objective.__call__

    def explode(self: tg.Objective, rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        loss, terms = plain(self, rows, *rest)
        return loss * 1e36, terms * 1e36

    monkeypatch.setattr(tg.Objective, "__call__", explode)
    with pytest.raises(tg.UserError, match=r"TIED_EMBED_LR=1000.0 \(default 0.03\) is furthest"):
        trained(cfg)
    if cfg.checkpoints[0].exists():
        assert not tg.first_not_finite(tg.unpack_tensors(cfg.checkpoints[0].read_bytes())[1])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("matrix_lr", 900.0), ("tied_embed_lr", 0.9), ("qk_gain_init", 200.0), ("scalar_lr", 1e-9)],
)
def test_the_setting_furthest_from_its_default_is_named(setting: str, value: float) -> None:
    advice = tg.furthest(tiny(preset="cpu", **{setting: value}))
    assert advice.startswith(f"{setting.upper()}={value} (default ")
    assert "GRAD_CLIP_NORM=1" in advice


def test_a_loss_that_is_not_finite_is_named_with_its_step() -> None:
    cfg = tiny()
    state = tg.TrainState.__new__(tg.TrainState)
    state.cfg = cfg
    state.run = make_run(cfg)
    state.step = 17
    assert tg.check_finite(state, torch.tensor([2.0, 3.0])) == {
        "train_loss": 2.0,
        "denoise_loss": 3.0,
    }
    for sums in ([math.nan, 1.0], [math.inf, 1.0], [1.0, math.nan], [1.0, -math.inf]):
        with pytest.raises(tg.UserError) as caught:
            tg.check_finite(state, torch.tensor(sums))
        assert f"not finite at step 17 ({sums[0]}, denoising {sums[1]})" in str(caught.value)
        assert "MATRIX_LR=0.04 (default 0.02)" in str(caught.value)


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_a_step: float) -> None:
        self.now, plain = 100.0, tg.train_step
        monkeypatch.setattr(tg.time, "perf_counter", lambda: self.now)

        def train_step(*args: Any) -> Tensor:
            self.now += seconds_a_step
            return plain(*args)

        monkeypatch.setattr(tg, "train_step", train_step)
        evaluate = tg.evaluate_exact

        def evaluate_exact(*args: Any) -> dict[str, Any]:
            self.now += 1000  # which must not count
            return evaluate(*args)

        monkeypatch.setattr(tg, "evaluate_exact", evaluate_exact)


def test_the_cap_stops_a_run_and_time_counts_on(
    synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, 2.0)
    base = dict(
        **synthetic, run_id="r", iterations=1000, max_wallclock_seconds=15.0, warmdown_iters=1000
    )
    state, steps = trained(tiny(**base, val_loss_every=3))
    assert state.step == len(steps) == 8  # the first step boundary at or past 15 s
    assert state.seconds == pytest.approx(16.0)
    assert [step["train_ms"] for step in steps] == pytest.approx(
        [2000.0 * (i + 1) for i in range(8)]
    )
    about, saved = tg.unpack_tensors(state.cfg.checkpoints[0].read_bytes())
    assert (about["step"], about["seconds"]) == (8, pytest.approx(16.0))
    about |= {"step": 5, "seconds": 10.0}  # as if it had been stopped there
    state.cfg.checkpoints[0].write_bytes(tg.pack_tensors(about, saved))
    resumed, more = trained(tiny(**base, resume="auto"))
    assert resumed.step == 8
    assert [step["step"] for step in more] == [6, 7, 8]
    assert more[0]["train_ms"] == pytest.approx(12_000.0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["direct", "ar"])
def test_kernels_are_compiled_before_the_clock_starts(
    recipe: str, synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, graphs = Clock(monkeypatch, 2.0), set[Any]()

    def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            numbers = tuple(arg for arg in args if isinstance(arg, int))
            graph = (function.__name__, args[0].shape, numbers)
            if graph not in graphs:
                clock.now += 500
            graphs.add(graph)
            return function(*args)

        return compiled

    monkeypatch.setattr("torch.compile", compile)
    cfg = tiny(recipe, **synthetic, warmup_steps=1, self_condition="soft", diffusion_start_frac=0.5)
    run = make_run(cfg)
    run.compile = True
    state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
    tg.train(state, tg.TokenLoader(cfg, "val"), CountTokens())
    steps = recorded(run, "train")
    # A clean stream that keeps what windows read or does not; three window sizes.
    assert len(graphs) == (2 + 3 if cfg.diffusion else 1)
    assert [step["train_ms"] for step in steps] == pytest.approx(
        [2000.0 * (i + 1) for i in range(8)]
    )
    _, plain = trained(dataclasses.replace(cfg, warmup_steps=0))
    assert curve(steps) == curve(plain)  # it moved neither weights nor data


def test_checkpoints_are_written_when_they_are_due(
    synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, 2.0)
    saved, plain = list[int](), tg.TrainState.save

    def save(state: tg.TrainState) -> None:
        saved.append(state.step)
        plain(state)

    monkeypatch.setattr(tg.TrainState, "save", save)
    trained(tiny(**synthetic, checkpoint_seconds=5.0))
    assert saved == [3, 6, 8]  # every 5 s at a step boundary, and at the end
    saved.clear()
    trained(tiny(**synthetic, checkpoint_seconds=0.0))
    assert saved == [8]


def test_another_configuration_cannot_resume(synthetic: dict[str, Any]) -> None:
    cfg = tiny(**synthetic, run_id="r")
    trained(cfg)
    with pytest.raises(tg.UserError) as caught:
        trained(dataclasses.replace(cfg, resume="auto", matrix_lr=0.07, model_dim=32))
    for named in (
        "MATRIX_LR 0.04 -> 0.07",
        "MODEL_DIM 16 -> 32",
        str(cfg.checkpoints[0]),
        "RUN_ID",
    ):
        assert named in str(caught.value)
    assert "SEED" not in str(caught.value)
    free = dataclasses.replace(
        cfg, resume="auto", train_log_every=5, nelbo_samples=9, val_batch_size=64
    )
    assert trained(free)[0].step == 8  # what moves no training step may differ
    cfg.checkpoints[0].write_bytes(cfg.checkpoints[0].read_bytes()[:-100])
    with pytest.raises(tg.UserError, match=r"checkpoint .*r\.ckpt is damaged"):
        trained(dataclasses.replace(cfg, resume="auto"))
    # Without RESUME it is not even read.
    assert trained(dataclasses.replace(cfg, resume="no"))[0].step == 8


def logged(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in e.items() if k not in ("train_ms", "step_ms", "tok_per_sec")}
        for e in read_events(folder)
    ]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(
    launch: Callable[..., subprocess.Popen[str]],
    run_main: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    steps = 40
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    same = dict(
        iterations=steps, ema_decay=0.9, self_condition="soft", checkpoint_seconds=0.01, run_id="r"
    )
    process = launch(out_dir=killed, **same)
    wait_for(lambda: train_lines(killed) >= 6, process)
    process.kill()
    process.wait(timeout=30)
    assert train_lines(killed) < steps
    assert not (killed / "final_model.int8.ptz").exists()
    assert run_main(out_dir=killed, resume="auto", **same).returncode == 0
    assert run_main(out_dir=whole, **same).returncode == 0
    broken, smooth = logged(killed), logged(whole)
    (resume,) = [event for event in broken if event["event"] == "resume"]
    assert 0 < resume["step"] < steps
    expected = {event["step"]: event for event in smooth if event["event"] == "train"}
    found = [event for event in broken if event["event"] == "train"]
    assert {event["step"] for event in found} == expected.keys() == set(range(1, steps + 1))
    for event in found:  # those that were lost and done again are there twice
        assert event == expected[event["step"]]
    for name in ("val", "final", "nelbo"):
        a, b = (
            [event for event in events if event["event"] == name] for events in (broken, smooth)
        )
        assert a == b
        assert len(a) > 0
    a, b = (
        dict(tg.load_artifact(folder / "final_model.int8.ptz", CPU)[0].named_parameters())
        for folder in (killed, whole)
    )
    for name, w in a.items():
        assert w.equal(b[name]), name


@pytest.mark.slow
def test_sigterm_ends_a_run_and_says_how_to_go_on(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = launch(iterations=10_000, checkpoint_seconds=0.01, run_id="r")
    wait_for(lambda: train_lines(tmp_path / "out") >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == (
        "error: rank 0: ended by SIGTERM; the last checkpoint is kept: "
        "rerun the command with RESUME=auto\n"
    )
    saved = (tmp_path / "out" / "checkpoints" / "r.ckpt").read_bytes()
    assert tg.unpack_tensors(saved)[0]["step"] > 0


@pytest.mark.slow
def test_the_log_tells_people_and_programs_the_same(
    run_main: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run_main(iterations=3, run_id="r", env={"NUM_LAYER": "7", "MODEL_DIR": "x"})
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "out" / "logs"
    assert sorted(path.name for path in folder.glob("r*")) == ["r.jsonl", "r.txt"]
    text, code = (
        (folder / "r.txt").read_text(encoding="utf-8"),
        (ROOT / "train_gpt.py").read_text(encoding="utf-8"),
    )
    assert text.startswith(code)
    told = text.removeprefix(code)
    for line in done.stdout.splitlines():  # what a person sees is in the file
        assert line in told
    events = read_events(tmp_path / "out")
    names = [event["event"] for event in events]
    expected = [
        "header",
        "config",
        "warning",
        "warning",
        "data",
        "model",
        "train",
        "train",
        "train",
        "val",
        "size",
        "final",
        "val_bpb_sliding",
    ]
    assert names == [*expected, "nelbo", "nelbo", *["parallel_eval"] * 5, "timing", "done"]
    for event in events:  # both are made from the same values
        values = {k: v for k, v in event.items() if k != "event"}
        line = tg.LINES.get(
            event["event"], event["event"] + "".join(f" {k}:{{{k}}}" for k in values)
        )
        assert line.format(**values) in told
    warnings = [event["reason"] for event in events if event["event"] == "warning"]
    assert warnings == [
        "MODEL_DIR is not a setting; did you mean MODEL_DIM?",
        "NUM_LAYER is not a setting; did you mean NUM_LAYERS?",
    ]
    config = events[1]
    assert config["values"]["num_layers"] == 2
    assert config["source"]["num_layers"] == "env"
    assert (
        config["values"].keys() == config["source"].keys() == tg.Config.__dataclass_fields__.keys()
    )
    final, val = (next(e for e in events if e["event"] == name) for name in ("final", "val"))
    assert (
        f"final_int8_zlib_roundtrip_exact val_loss:{final['loss']:.8f} val_bpb:{final['bpb']:.8f}"
        in told
    )
    assert f"step:3/3 val_loss:{val['loss']:.4f} val_bpb:{val['bpb']:.4f} train_time:" in told
    assert final["bpb"] == pytest.approx(val["bpb"], rel=1e-3)  # the artifact is what was trained
    assert (tmp_path / "out" / "final_model.int8.ptz").stat().st_size == events[10]["model_bytes"]


def test_a_second_run_overwrites_no_log(
    synthetic: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny(**synthetic, run_id="r")
    for text in ("first", "second"):
        tg.Log(cfg, 0, continued=False).event("note", text=text)
    tg.Log(cfg, 1, continued=False).event("note", text="another rank's")
    tg.Log(cfg, 0, continued=True).event("note", text="resumed", loss=math.nan)
    folder = Path(cfg.out_dir) / "logs"
    assert (folder / "r.txt").read_text() == "note text:second\nnote text:resumed loss:nan\n"
    lines = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    assert lines[1] == {"event": "note", "text": "resumed", "loss": None}  # NaN is no JSON
    kept = sorted(path for path in folder.iterdir() if path.name.count(".") == 2)
    assert [path.suffix for path in kept] == [".jsonl", ".txt"]
    assert kept[1].read_text() == "note text:first\n"
    assert "another rank's" not in capsys.readouterr().out


def test_main_names_a_wrong_setting_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "os.environ", env_of(settings(out_dir=str(tmp_path / "out"), num_heads=3, seed=-1))
    )
    assert tg.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert len(err.splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_a_missing_device_is_named(
    synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with (
        pytest.raises(tg.UserError, match=r"DEVICE=cuda: 0 CUDA devices"),
        tg.Run.start(tiny(**synthetic, device="cuda")),
    ):
        pass
    assert os.environ.get("WORLD_SIZE") is None


@pytest.mark.parametrize(("devices", "compiled"), [(0, "auto"), (0, "0"), (0, "1"), (1, "0")])
def test_flex_attention_needs_a_compiled_program_on_cuda(
    devices: int, compiled: str, synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has no gradient of it, and uncompiled it makes dense scores."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    own = dict(window_attention="flex", model_dim=32, device="auto", compile=compiled)
    cfg = tiny(**synthetic, **own)
    rule = "WINDOW_ATTENTION=flex needs CUDA, and not COMPILE=0; set it to groups"
    with pytest.raises(tg.UserError, match=rule), tg.Run.start(cfg):
        pass
    assert not Path(cfg.out_dir).exists()
    assert tg.choose_device(dataclasses.replace(cfg, window_attention="groups"), 0) is not None
    if devices:
        assert tg.choose_device(dataclasses.replace(cfg, compile="auto"), 0).type == "cuda"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch warns that attention is not compiled
def test_a_run_with_flex_attention_has_the_losses_of_groups(
    synthetic: dict[str, Any], flex_on_cpu: list[int]
) -> None:
    curves, calls = [], list[int]()
    for kind in ("groups", "flex"):
        own = dict(window_attention=kind, run_id=kind, model_dim=32, iterations=5)
        cfg = tiny(**synthetic, **own)
        state, steps = trained(cfg)
        curves.append(curve(steps))
        calls.append(len(flex_on_cpu))
    assert calls == [0, 5 * cfg.micro_batches * cfg.num_layers]
    assert len(curves[0]) == 5
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    # What such a run leaves behind is continued and scored where it is not to be had.
    other = dataclasses.replace(cfg, resume="auto", window_attention="groups")
    assert trained(other)[0].step == 5
    assert other.checkpoints == cfg.checkpoints
    tg.save_artifact(cfg.artifact, state.weights(), state.run)
    model, _ = tg.load_artifact(cfg.artifact, CPU)
    assert model.cfg.window_attention == "flex"
    val, run = tg.TokenLoader(cfg, "val"), make_run(model.cfg)
    bounds = [tg.evaluate_bound(model, run, val, CountTokens(), size) for size in (1, 4)]
    assert all(0 < bound["bpb"] < 10 for bound in bounds)
    assert len(flex_on_cpu) == calls[1]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # of recipes: each traces other code
    "ar": ("ar", {}),
    "retrograde": ("retrograde", {}),  # hybrid noise, fixed rate, commit
    "mdlm_30_70": ("mdlm_30_70", dict(diffusion_regions="spans:1,continuation:1")),
    "direct": ("direct", dict(value_residual=True, bigram_vocab_size=50)),
    "gaussian": ("direct", dict(diffusion_corruption_mode="gaussian", diffusion_anneal_frac=0.9)),
    "sedd": ("direct", dict(diffusion_loss="score_entropy", diffusion_passes=2)),
    "sedd_uniform": (
        "direct",
        dict(diffusion_corruption_mode="uniform", diffusion_loss="sedd_uniform"),
    ),
    "soft": ("direct", dict(self_condition="soft", diffusion_loss="consistency")),
}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore"
)  # the tracer hides a warning of its own, which turning it into an error defeats
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_loss_is_one_whole_graph_and_loses_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA runs compile by default: a construct that the tracer refuses would end them at the first
    # step
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    recipe, overrides = KINDS[kind]
    start: dict[str, Any] = dict(diffusion_start_frac=0.0, diffusion_start_step=0)
    size = "T" if recipe in ("retrograde", "mdlm_30_70") else "8"
    layers = 2 if kind == "direct" else 1  # 2 have a skip connection, which no setting changes
    sizes = dict(diffusion_windows=size, num_layers=layers)
    cfg = tiny(recipe, **start | sizes | overrides)
    rows = torch.arange(2 * (cfg.train_seq_len + 1)).remainder(cfg.vocab_size).view(2, -1)
    totals = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        torch._dynamo.reset()
        run, model = make_run(cfg), tg.GPT(cfg)
        run.compile = compiled
        objective = tg.Objective(cfg, run, model)
        for size in (0, *objective.masks):
            loss, terms = objective(rows, 0, size, tg.ScheduleState(5, 0.5, 1.0))
            assert terms[1].item() > 0 or not size
            loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        # Places count, too.
        totals.append([(g @ torch.linspace(1, 2, len(g))).item() for g in grads])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5, abs=1e-7)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("recipe", ["direct", "retrograde"])
def test_a_step_reads_nothing_back_from_the_device(
    recipe: str, synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these waits until a GPU has done all that it was given."""
    cfg = tiny(
        recipe, **synthetic, diffusion_start_frac=0.0, diffusion_start_step=0, bigram_vocab_size=50
    )
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"))
    objective = tg.Objective(cfg, state.run, state.model)
    # Torch's own; on CUDA it is the fused one.
    monkeypatch.setattr(state.adam, "step", lambda: None)
    waits = list[str]()
    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    ):
        plain = getattr(Tensor, name)

        def waiting(self: Tensor, *args: Any, name: str = name, plain: Any = plain) -> Any:
            waits.append(name)
            return plain(self, *args)

        monkeypatch.setattr(Tensor, name, waiting)
    assert bool(torch.ones(1))
    assert waits == ["__bool__"]
    for step in range(3):
        sums = tg.train_step(state, objective, tg.ScheduleState(step, 0.5, 1.0))
    assert waits == ["__bool__"]
    monkeypatch.undo()
    assert sums.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_compiled_after_the_warm_up(
    synthetic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    cfg = tiny(**synthetic, warmup_steps=1, diffusion_start_frac=0.5, bigram_vocab_size=50)
    run = make_run(cfg)
    counted = list[int]()
    plain = tg.train_step
    run.compile = True
    torch._dynamo.utils.counters.clear()
    stats = torch._dynamo.utils.counters["stats"]

    def counting(*args: Any) -> Tensor:
        before = stats["unique_graphs"]
        sums = plain(*args)
        counted.append(stats["unique_graphs"] - before)
        return sums

    monkeypatch.setattr(tg, "train_step", counting)
    state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
    tg.train(state, tg.TokenLoader(cfg, "val"), CountTokens())
    assert counted[-8:] == [0] * 8  # before and after the windows begin
    assert sum(counted[:-8]) == stats["unique_graphs"]  # of whole steps, before the clock
    assert stats["unique_graphs"] >= 4  # the clean stream, and windows of three sizes
