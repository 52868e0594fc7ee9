"""INIT_FROM: a run starts from an artifact's weights; DIFFUSION_ANNEAL_FRAC: attention turns both
ways on the way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from tests.bench import artifacts
from tests.conftest import (
    CPU,
    make_run,
    random_rows,
    randomise,
    read_events,
    tiny,
    write_shard,
)

SHA = "f" * 64


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """Settings that name shards of a text of which most tokens can be told from one neighbour."""
    tokens = [(5 * i + i // 40) % 64 for i in range(3000)]
    write_shard(tmp_path / "data" / "s_train_0.bin", tokens[:2000])
    write_shard(tmp_path / "data" / "s_val_0.bin", tokens[2000:])
    return {"data_path": str(tmp_path / "data"), "out_dir": str(tmp_path / "out")}


def export(path: Path, cfg: tg.Config, sha256: str = SHA) -> tg.GPT:
    """Write a model of random weights; returned as it is read back."""
    artifacts.save(path, dict(randomise(tg.GPT(cfg)).named_parameters()), cfg, sha256)
    return tg.load_artifact(path, CPU)[0]


def begin(cfg: tg.Config) -> tg.TrainState:
    run = make_run(cfg)
    run.identity = {"tokenizer_sha256": SHA}
    state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
    state.resume()
    return state


def fault_of(cfg: tg.Config) -> str:
    with pytest.raises(tg.UserError) as caught:
        begin(cfg)
    return str(caught.value)


# ---- INIT_FROM ----


@pytest.mark.parametrize(
    ("source", "target"), [("ar", "direct"), ("direct", "direct"), ("direct", "ar")]
)
def test_weights_are_taken_by_name_and_the_rest_is_fresh(
    source: str, target: str, text: dict[str, Any], tmp_path: Path
) -> None:
    given = dict(export(tmp_path / "a.ptz", tiny(source)).named_parameters())
    cfg = tiny(target, **text, init_from=str(tmp_path / "a.ptz"), ema_decay=0.9)
    state, fresh = begin(cfg), dict(tg.GPT(cfg).named_parameters())
    own = dict(state.model.named_parameters())
    assert own.keys() == fresh.keys()
    for name, w in own.items():
        assert w.equal(given.get(name, fresh[name])), name
    # The average starts there, too.
    assert all(average.equal(own[name]) for name, average in state.weights().items())
    (event,) = state.run.log.of("init_from")  # type: ignore[attr-defined]
    lacking = {name for name in own if name not in given}
    assert event["fresh"] == len(lacking)
    assert bool(lacking) == (source == "ar")
    if lacking:
        assert {
            "mask_emb",
            "next_visible_gain",
            "next_visible_proj",
            "blocks.0.time_proj",
        } <= lacking


def test_the_clean_stream_of_an_adapted_model_is_the_artifacts(
    text: dict[str, Any], tmp_path: Path
) -> None:
    given, ids = export(tmp_path / "a.ptz", tiny("ar")), random_rows(3, 16, 64)
    state = begin(tiny(**text, init_from=str(tmp_path / "a.ptz")))
    assert tg.token_nll_causal(state.model, ids).equal(tg.token_nll_causal(given, ids))
    tg.train_step(
        state, tg.Objective(state.cfg, state.run, state.model), tg.ScheduleState(0, 0.5, 1.0)
    )
    # What was taken is what the optimizers move.
    assert not tg.token_nll_causal(state.model, ids).equal(tg.token_nll_causal(given, ids))


# fmt: off
SHAPES: list[tuple[dict[str, Any], list[str]]] = [
    (dict(model_dim=32), ["MODEL_DIM 32 -> 16"]),
    (dict(num_layers=3), ["NUM_LAYERS 3 -> 2"]),
    (dict(num_heads=4, num_kv_heads=2), ["NUM_HEADS 4 -> 2", "NUM_KV_HEADS 2 -> 1"]),
    (dict(mlp_mult=3, vocab_size=60), ["MLP_MULT 3 -> 2", "VOCAB_SIZE 60 -> 64"]),
    (dict(tie_embeddings=False), ["TIE_EMBEDDINGS False -> True"]),
    (dict(value_residual=True), ["VALUE_RESIDUAL True -> False"]),
    (dict(bigram_vocab_size=50), ["BIGRAM_VOCAB_SIZE 50 -> 0"]),
]
# fmt: on


@pytest.mark.parametrize(("there", "named"), SHAPES)
def test_another_shape_is_named(
    there: dict[str, Any], named: list[str], text: dict[str, Any], tmp_path: Path
) -> None:
    export(tmp_path / "a.ptz", tiny(**there))
    message = fault_of(tiny(**text, init_from=str(tmp_path / "a.ptz")))
    first = f"{tmp_path / 'a.ptz'} does not fit: "
    for part in [first, "what holds there", *named]:
        assert part in message
    assert message.count(" -> ") == len(there)


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (dict(time_embed_dim=6), "blocks.0.time_proj"),
        (dict(look_ahead=3), "next_visible_gain"),
        (dict(look_ahead=3, time_embed_dim=6), "next_visible_gain"),
    ],
)
def test_another_shape_of_what_windows_add_is_named(
    there: dict[str, Any], named: str, text: dict[str, Any], tmp_path: Path
) -> None:
    export(tmp_path / "a.ptz", tiny(**there))
    cfg = tiny(**text, init_from=str(tmp_path / "a.ptz"))
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"))
    state.run.identity = {"tokenizer_sha256": SHA}
    before = {name: w.clone() for name, w in state.tensors.items()}
    with pytest.raises(tg.UserError, match=f"does not fit: .*{named}.*; set .*what holds there"):
        state.resume()
    assert all(w.equal(before[name]) for name, w in state.tensors.items())  # none was taken


def test_a_refusal_of_an_artifact_names_a_remedy_for_it(
    text: dict[str, Any], tmp_path: Path
) -> None:
    export(tmp_path / "a.ptz", tiny(model_dim=32))
    message = fault_of(tiny(**text, init_from=str(tmp_path / "a.ptz")))
    assert "INIT_FROM" in message.rpartition("; ")[2]  # another RUN_ID does not help


def test_parts_that_one_of_both_is_without_may_differ(text: dict[str, Any], tmp_path: Path) -> None:
    export(tmp_path / "a.ptz", tiny(time_embed_dim=0, look_ahead=0))
    begin(tiny(**text, init_from=str(tmp_path / "a.ptz")))
    # Settings without weights.
    export(tmp_path / "b.ptz", tiny("ar", look_ahead=5, time_embed_dim=5))
    begin(tiny(**text, init_from=str(tmp_path / "b.ptz")))


def test_another_tokenizer_is_named(text: dict[str, Any], tmp_path: Path) -> None:
    export(tmp_path / "a.ptz", tiny(), "e" * 64)
    message = fault_of(tiny(**text, init_from=str(tmp_path / "a.ptz")))
    assert f"does not fit: TOKENIZER_SHA256 {'e' * 64!r} -> {SHA!r}" in message


def test_an_artifact_that_does_not_name_its_tokenizer_is_refused(
    text: dict[str, Any], tmp_path: Path
) -> None:
    export(tmp_path / "a.ptz", tiny())
    about, tensors = tg.unpack_tensors(tg.decompress((tmp_path / "a.ptz").read_bytes()))
    del about["tokenizer_sha256"]
    (tmp_path / "a.ptz").write_bytes(zlib.compress(tg.pack_tensors(about, tensors)))
    assert "TOKENIZER_SHA256 ''" in fault_of(tiny(**text, init_from=str(tmp_path / "a.ptz")))


def test_a_missing_or_damaged_artifact_is_named_with_a_remedy(
    text: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(**text, init_from=str(tmp_path / "a.ptz"))
    export(tmp_path / "whole.ptz", tiny())
    whole = (tmp_path / "whole.ptz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for content in (None, b"hello", b"", whole[:-1], whole + b"x", bytes(flipped)):
        if content is not None:
            (tmp_path / "a.ptz").write_bytes(content)
        message = fault_of(cfg)
        for part in ("INIT_FROM", f"artifact {tmp_path / 'a.ptz'} is missing, damaged", "copy or"):
            assert part in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_no_start(
    value: float, text: dict[str, Any], tmp_path: Path
) -> None:
    export(tmp_path / "a.ptz", tiny())
    about, tensors = tg.unpack_tensors(tg.decompress((tmp_path / "a.ptz").read_bytes()))
    tensors["blocks.1.attn.c_q.weight"][3, 1] = value
    (tmp_path / "a.ptz").write_bytes(zlib.compress(tg.pack_tensors(about, tensors)))
    message = fault_of(tiny(**text, init_from=str(tmp_path / "a.ptz")))
    assert "blocks.1.attn.c_q.weight holds numbers that are not finite" in message


def test_an_artifact_of_a_larger_model_is_refused_without_its_memory(
    text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "a.ptz", tiny())
    about, tensors = tg.unpack_tensors(tg.decompress((tmp_path / "a.ptz").read_bytes()))
    about["config"]["num_layers"] = 10**4
    (tmp_path / "a.ptz").write_bytes(zlib.compress(tg.pack_tensors(about, tensors)))
    cfg, own = tiny(**text, init_from=str(tmp_path / "a.ptz")), list[tg.GPT]()
    own.append(tg.GPT(cfg))
    monkeypatch.setattr(tg, "GPT", lambda _: own.pop())  # the run's own model, and no other
    assert "its settings ask for" in fault_of(cfg)


def test_a_checkpoint_goes_before_the_artifact_and_does_not_need_it(
    text: dict[str, Any], tmp_path: Path
) -> None:
    export(tmp_path / "a.ptz", tiny("ar"))
    cfg = tiny(**text, init_from=str(tmp_path / "a.ptz"), run_id="r", resume="auto")
    state = begin(cfg)  # there is no checkpoint yet
    tg.train_step(state, tg.Objective(cfg, state.run, state.model), tg.ScheduleState(0, 0.5, 1.0))
    state.save()
    (tmp_path / "a.ptz").unlink()
    again = begin(cfg)
    assert again.step == 1
    assert all(w.equal(state.weights()[name]) for name, w in again.weights().items())
    assert "is missing" in fault_of(dataclasses.replace(cfg, resume="no"))


def test_ranks_may_have_their_artifact_elsewhere_but_not_another(
    text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[dict[str, Any]]()

    def gather(everyone: list[Any], ours: dict[str, Any], group: object) -> None:
        given.append(ours)
        everyone[:] = [given[0], ours]

    def start(path: Path) -> None:
        cfg = tiny(**text, init_from=str(path))
        run = make_run(cfg)
        state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
        run.identity, run.control = {"tokenizer_sha256": SHA}, object()  # type: ignore[assignment]
        run.world_size = 2
        state.resume()

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for name, std in (("a", 0.3), ("b", 0.3), ("c", 0.4)):
        weights = dict(randomise(tg.GPT(tiny()), std=std).named_parameters())
        artifacts.save(tmp_path / f"{name}.ptz", weights, tiny(), SHA)
    for name in ("a", "b"):  # the first is rank 0's
        start(tmp_path / f"{name}.ptz")
    digests = [hashlib.sha256((tmp_path / f"{n}.ptz").read_bytes()).hexdigest() for n in "ac"]
    with pytest.raises(tg.UserError) as caught:
        start(tmp_path / "c.ptz")
    rule = "rank 1 differs from rank 0: INIT_FROM {!r} -> {!r}; start all ranks alike"
    assert str(caught.value) == rule.format(*digests)


@pytest.mark.slow
def test_the_program_starts_from_an_artifact(
    run_main: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    small = dict(iterations=40, nelbo_windows="", parallel_eval_examples=0)
    first = run_main(recipe="ar", out_dir=tmp_path / "ar", **small)
    assert first.returncode == 0, first.stderr
    artifact = tmp_path / "ar" / "final_model.int8.ptz"
    second = run_main(
        out_dir=tmp_path / "next", init_from=artifact, diffusion_anneal_frac=0.9, **small
    )
    assert second.returncode == 0, second.stderr
    events = {
        name: [e for e in read_events(tmp_path / "next") if e["event"] == name]
        for name in ("init_from", "train")
    }
    assert events["init_from"][0]["artifact"] == str(artifact)
    before = next(e["train_loss"] for e in read_events(tmp_path / "ar") if e["event"] == "train")
    assert events["train"][0]["train_loss"] < before - 1  # of the same tokens
    lost = run_main(out_dir=tmp_path / "lost", init_from=tmp_path / "none.ptz", **small)
    assert lost.returncode == 2
    assert "none.ptz is missing" in lost.stderr


# ---- DIFFUSION_ANNEAL_FRAC ----


def objective_of(**overrides: Any) -> tg.Objective:
    cfg = tiny(**overrides)
    return tg.Objective(cfg, make_run(cfg), randomise(tg.GPT(cfg)))


def mask_of(objective: tg.Objective, size: int, now: tg.ScheduleState) -> Any:
    """By what mask windows are read at a moment of a run."""
    seen, plain = list[Any](), objective.windows

    def windows(*args: Any) -> torch.Tensor:
        seen.append(args[4])
        found: torch.Tensor = plain(*args)
        return found

    objective.windows = windows
    objective(random_rows(1, 17, 64), 0, size, now)
    return seen[-1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8, 16])
def test_attention_turns_from_causal_to_both_ways(size: int) -> None:
    objective = objective_of(diffusion_anneal_frac=0.5)
    causal, both = (tg.window_mask(16, size, causal, CPU) for causal in (True, False))
    assert isinstance(causal, torch.Tensor)
    assert isinstance(both, torch.Tensor)
    later = both & ~causal
    for progress, share in ((0.0, 0.0), (0.1, 0.2), (0.4, 0.8), (0.5, 1.0), (0.8, 1.0), (1.0, 1.0)):
        masks = [
            mask_of(objective, size, tg.ScheduleState(step, progress, 1.0)) for step in range(60)
        ]
        opened = torch.stack([mask for mask in masks if isinstance(mask, torch.Tensor)])
        assert opened.shape == (60, *both.shape)
        assert (opened & ~later == causal).all()  # all else is always as it was
        drawn = opened[:, later].double()
        assert abs(drawn.mean().item() - share) <= 5 * (share * (1 - share) / drawn.numel()) ** 0.5
        if 0 < share < 1:
            assert len({tuple(row.tolist()) for row in drawn}) > 50  # another draw at each step
            spread = drawn.mean(0).std().item()  # and every pair of its own
            assert spread == pytest.approx((share * (1 - share) / 60) ** 0.5, rel=0.35)


def test_annealed_attention_is_a_function_of_seed_and_step() -> None:
    now = tg.ScheduleState(7, 0.2, 1.0)
    first, again, other = (
        mask_of(objective_of(diffusion_anneal_frac=0.5, **more), 8, now)
        for more in ({}, {}, {"seed": 3})
    )
    assert isinstance(first, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    assert first.equal(again)
    assert not first.equal(other)


def test_windows_are_read_by_the_annealed_mask() -> None:
    rows, losses = random_rows(4, 17, 64), {}
    for name, overrides in (
        ("causal", dict(diffusion_causal=True)),
        ("both", {}),
        ("annealed", dict(diffusion_anneal_frac=0.5)),
    ):
        objective = objective_of(look_ahead=0, **overrides)
        losses[name] = [
            objective(rows, 0, 8, tg.ScheduleState(3, progress, 1.0))[1][1].item()
            for progress in (0, 0.25, 0.5)
        ]
    assert losses["annealed"][0] == losses["causal"][0]
    assert losses["annealed"][2] == losses["both"][2]
    assert losses["annealed"][1] not in (losses["causal"][1], losses["both"][1])


def test_evaluation_reads_both_ways_whatever_was_annealed(text: dict[str, Any]) -> None:
    ids = random_rows(2, 16, 64)
    keys, outputs = tg.split_key(torch.arange(2)[:, None], torch.arange(2)), list[torch.Tensor]()
    for frac in (0.0, 0.9):
        cfg = tiny(**text, diffusion_anneal_frac=frac)
        model = randomise(tg.GPT(cfg))
        mask = tg.window_mask(16, 8, cfg.diffusion_causal, CPU)
        outputs.append(tg.window_bounds(model, random_rows(2, 17, 64), keys, 8, 2, mask))
        outputs.append(tg.decode_refine(model, ids, 8, 12))
    assert outputs[0].equal(outputs[2])
    assert outputs[1].equal(outputs[3])


@pytest.mark.slow
def test_an_annealed_run_resumes_to_the_bit(text: dict[str, Any]) -> None:
    cfg = tiny(**text, run_id="r", diffusion_anneal_frac=0.9)

    def steps(state: tg.TrainState, count: int) -> list[list[float]]:
        objective = tg.Objective(cfg, state.run, state.model)
        moments = (tg.ScheduleState.at(cfg, state.step, 0.0) for _ in range(count))
        return [tg.train_step(state, objective, now).tolist() for now in moments]

    whole = begin(cfg)
    smooth = steps(whole, 8)
    part = begin(cfg)
    broken = steps(part, 3)
    part.save()
    rest = begin(dataclasses.replace(cfg, resume="auto"))
    assert smooth == broken + steps(rest, 5)
    assert all(w.equal(rest.weights()[name]) for name, w in whole.weights().items())


def test_settings_that_leave_nothing_to_anneal_are_refused() -> None:
    cases: list[dict[str, Any]] = [dict(diffusion_start_frac=0.5), dict(diffusion_causal=True)]
    for overrides in cases:
        with pytest.raises(tg.UserError, match=r"ANNEAL_FRAC=0\.4.*START_FRAC="):
            tiny(**{"diffusion_start_frac": 0.0, **overrides}, diffusion_anneal_frac=0.4)
    tiny(diffusion_anneal_frac=0.6, diffusion_start_frac=0.5)


# ---- both as recipes ----

# fmt: off
PURE = dict(mercury_clean_loss_weight=0.0, diffusion_loss_weight=1.0)
ROWS: dict[str, dict[str, Any]] = {
    "sedd_uniform": dict(PURE, diffusion_loss="sedd_uniform", diffusion_corruption_mode="uniform",
                         time_embed_dim=4),
    "adapt_ar": dict(PURE, diffusion_anneal_frac=0.5, diffusion_shift=True),
}
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_recipes_made_of_these_settings_train(
    name: str, text: dict[str, Any], tmp_path: Path
) -> None:
    start = {"init_from": str(tmp_path / "a.ptz")} if name == "adapt_ar" else {}
    if start:
        export(tmp_path / "a.ptz", tiny("ar"))
    cfg = tiny(
        "mdlm_30_70",
        **text,
        **ROWS[name],
        **start,
        iterations=120,
        warmdown_iters=0,
        train_batch_tokens=256,
    )
    state = begin(cfg)
    objective, losses = tg.Objective(cfg, state.run, state.model), list[float]()
    for _ in range(cfg.iterations):
        losses.append(
            tg.train_step(state, objective, tg.ScheduleState.at(cfg, state.step, 0.0))[1].item()
        )
    assert all(loss < float("inf") for loss in losses)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
