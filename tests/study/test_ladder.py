"""scripts/study/ladder.toml: rows are what their names say, are written alike, and train."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts.study import sweep
from tests.conftest import TINY, env_of, make_run, read_events

# What was published, copied from the reports a second time; a name that stands for two recipes has
# a row for each.
# fmt: off
PUBLISHED: list[tuple[str, float | None]] = [
    ("td_control", 2.0027), ("td_span15", 2.1725), ("td_span30", 2.1831), ("td_prog15", 2.1752),
    ("td_prog30", 2.1893), ("td_control", 1.9997), ("td_late02", 2.0437), ("td_late05", 2.0485),
    ("td_late05p", 2.0489), ("td_late10", 2.0489), ("td_cons05", 2.0477), ("td_hyb05", 2.0515),
    ("td_hyb05m", 2.0503), ("td_unif05", 2.0601), ("td_unif10", 2.0690),
    ("mercury_mask25", 12.9566), ("mercury_hybrid25", 3.5492), ("mercury_uniform50", 3.5424),
    ("mercury_hybrid50p", 3.5412), ("mercury_auxlate", 2.0131), ("mercury_uniform50_mix", 3.5056),
    ("mercury_hybrid50p_mix", 3.4987), ("mercury_uniform50_suffixsc", 3.5043),
    ("mercury_hybrid50p_mixsc", 3.4980), ("mercury_hybrid50p_mixsc", 2.2261),
    ("mercury_hybrid37p5_mixsc", 2.2168), ("mercury_hybrid50p_cont90", 2.2199),
    ("mercury_hybrid35_mixsc", 3.4973), ("mercury_hybrid37p5_cont85", 3.4980),
    ("mercury_hybrid3125_mixsc", 3.4982), ("mercury_hybrid35_cont85", 3.4983),
    ("mercury_hybrid37p5_mixsc", 3.4984), ("mercury_hybrid37p5_2step", 6.8082),
    ("mercury_hybrid37p5_2step_cont90", 6.7054), ("ab_control", 1.9970),
    ("ab_anchor32late", 2.3869), ("ab_anchor32", 12.2302), ("ab_anchor64", 12.7226),
    ("ab_block32", 12.9688), ("retrograde", 1.4564), ("mdlm_30_70", 3.3801), ("mdlm_50_50", None),
    ("mdlm_70_30", None), ("mdlm_100_0", None), ("mdlm_pure", None), ("bd3_4", None),
    ("bd3_16", None), ("bd3_64", None), ("sedd_absorb", None), ("sedd_uniform", None),
    ("gidd_20", None), ("gaussian_emb", None), ("tidar_8", None), ("adapt_ar", None),
    ("llada", None), ("ar", None), ("direct", None), ("retrograde_bidirectional", None),
    ("record", None), ("ar_record", None), ("record_bound", None),
]

# What a row must hold whatever the defaults of train_gpt become: the meaning of its name.
COMMIT = dict(self_condition="commit", mercury_self_condition_prob=1.0,
              mercury_self_condition_fraction=0.75)
MERCURY = dict(diffusion_loss_weight=1.0, mercury_clean_loss_weight=0.1, diffusion_causal=True,
               diffusion_windows="T",
               diffusion_row_frac=1.0, diffusion_ramp="iterations", diffusion_full_prob=0.0,
               diffusion_loss="mean")
PURE = dict(mercury_clean_loss_weight=0.0, diffusion_causal=False, diffusion_min_mask_ratio=0.0,
            diffusion_max_mask_ratio=1.0, diffusion_rate="uniform", diffusion_passes=1,
            self_condition="none",
            look_ahead=0, diffusion_row_frac=1.0, diffusion_start_frac=0.0, diffusion_start_step=0,
            mercury_task_mode="none", diffusion_regions="iid")
MASKED = dict(PURE, diffusion_corruption_mode="mask", diffusion_loss="elbo")
PROMISES: dict[str, dict[str, Any]] = {
    "record": dict(tg.STRENGTHS["cpu"], diffusion_loss_weight=0.1, diffusion_start_frac=0.6),
    "ar_record": dict(tg.STRENGTHS["cpu"], diffusion_loss_weight=0.0),
    "record_bound": dict(tg.STRENGTHS["cpu"], diffusion_loss_weight=0.3, diffusion_row_frac=1.0),
    "td_control": dict(diffusion_loss_weight=0.0, mercury_clean_loss_weight=1.0),
    "td_span30": dict(diffusion_regions="spans", diffusion_max_mask_ratio=0.3,
                      diffusion_progressive=False,
                      mercury_clean_loss_weight=1.0, diffusion_rate="fixed",
                      mercury_task_mode="none"),
    "td_prog15": dict(diffusion_max_mask_ratio=0.15, diffusion_progressive=True,
                      diffusion_rate="fixed"),
    "td_late02": dict(diffusion_loss_weight=0.02, diffusion_start_frac=0.75,
                      mercury_clean_loss_weight=1.0),
    "td_late05p": dict(diffusion_loss_weight=0.05, diffusion_start_frac=0.75,
                       diffusion_progressive=True),
    "td_late10": dict(diffusion_loss_weight=0.1, diffusion_start_frac=0.75,
                      diffusion_progressive=False),
    "td_cons05": dict(diffusion_loss="consistency", diffusion_loss_weight=0.05,
                      diffusion_start_frac=0.75),
    "td_hyb05m": dict(diffusion_corruption_mode="hybrid", diffusion_hybrid_mask_prob=0.8),
    "td_unif10": dict(diffusion_corruption_mode="uniform", diffusion_max_mask_ratio=0.1,
                      diffusion_loss_weight=0.05),
    "mercury_mask25": dict(MERCURY, mercury_clean_loss_weight=0.0, diffusion_corruption_mode="mask",
                           diffusion_max_mask_ratio=0.25, diffusion_progressive=False,
                           self_condition="none"),
    "mercury_uniform50": dict(MERCURY, diffusion_corruption_mode="uniform",
                              diffusion_max_mask_ratio=0.5,
                              diffusion_progressive=False, self_condition="none",
                              mercury_task_mode="none"),
    "mercury_hybrid50p": dict(MERCURY, diffusion_corruption_mode="hybrid",
                              diffusion_max_mask_ratio=0.5,
                              diffusion_min_mask_ratio=0.25, diffusion_progressive=True,
                              mercury_task_mode="none"),
    "mercury_auxlate": dict(mercury_clean_loss_weight=1.0, diffusion_start_frac=0.75,
                            diffusion_loss_weight=0.05),
    "mercury_uniform50_mix": dict(mercury_task_mode="mixed", self_condition="commit",
                                  mercury_self_condition_prob=0.5),
    "mercury_uniform50_suffixsc": dict(MERCURY, mercury_task_mode="continuation",
                                       diffusion_corruption_mode="uniform",
                                       self_condition="commit", mercury_self_condition_prob=1.0),
    "mercury_hybrid50p_cont90": dict(MERCURY, **COMMIT, mercury_continuation_prob=0.9,
                                     diffusion_max_mask_ratio=0.5, mercury_task_mode="mixed"),
    "mercury_hybrid3125_mixsc": dict(MERCURY, **COMMIT, diffusion_max_mask_ratio=0.3125,
                                     mercury_task_mode="mixed"),
    "mercury_hybrid35_cont85": dict(MERCURY, **COMMIT, mercury_continuation_prob=0.85,
                                    diffusion_max_mask_ratio=0.35),
    "mercury_hybrid35_mixsc": dict(MERCURY, **COMMIT, mercury_continuation_prob=0.75,
                                   diffusion_max_mask_ratio=0.35,
                                   diffusion_progressive=True, diffusion_min_mask_ratio=0.25,
                                   diffusion_start_step=100,
                                   diffusion_hybrid_mask_prob=0.5, diffusion_passes=1),
    "mercury_hybrid37p5_2step_cont90": dict(MERCURY, **COMMIT, diffusion_passes=2,
                                            mercury_continuation_prob=0.9,
                                            diffusion_max_mask_ratio=0.375),
    "ab_block32": dict(diffusion_windows="32", mercury_clean_loss_weight=0.0,
                       diffusion_regions="iid"),
    "ab_anchor32late": dict(diffusion_windows="32", diffusion_regions="continuation",
                            diffusion_start_frac=0.75),
    "ab_anchor64": dict(diffusion_windows="64", diffusion_regions="continuation",
                        diffusion_start_frac=0.0),
    "mdlm_30_70": dict(MASKED, mercury_clean_loss_weight=0.3, diffusion_loss_weight=0.7,
                       diffusion_windows="T"),
    "mdlm_70_30": dict(MASKED, mercury_clean_loss_weight=0.7, diffusion_loss_weight=0.3,
                       diffusion_windows="T"),
    "mdlm_100_0": dict(diffusion_loss_weight=0.0, mercury_clean_loss_weight=1.0),
    "mdlm_pure": dict(MASKED, diffusion_windows="T"),
    "llada": dict(MASKED, diffusion_windows="T", time_embed_dim=0, diffusion_loss_clip=1000.0),
    "bd3_4": dict(MASKED, diffusion_windows="4"),
    "bd3_16": dict(MASKED, diffusion_windows="16"),
    "bd3_64": dict(MASKED, diffusion_windows="64"),
    "sedd_uniform": dict(PURE, diffusion_loss="sedd_uniform", diffusion_corruption_mode="uniform",
                         time_embed_dim=32),
    "adapt_ar": dict(MASKED, diffusion_anneal_frac=0.5, diffusion_shift=True),
    "sedd_absorb": dict(MASKED, diffusion_loss="score_entropy", time_embed_dim=32),
    "gidd_20": dict(PURE, diffusion_corruption_mode="hybrid", diffusion_hybrid_mask_prob=0.8),
    "gaussian_emb": dict(PURE, diffusion_corruption_mode="gaussian", diffusion_loss="mean",
                         time_embed_dim=32),
    "tidar_8": dict(MASKED, diffusion_windows="8", diffusion_full_prob=1.0,
                    mercury_clean_loss_weight=1.0, diffusion_loss="mean"),
    "defect_ramp": dict(diffusion_rate="fixed", diffusion_progressive=True,
                        diffusion_ramp="iterations"),
}
DEFECTS: dict[str, set[str]] = {
    "defect_causal": {"diffusion_causal"},
    "defect_run": {"diffusion_windows", "mercury_task_mode", "diffusion_min_mask_ratio",
                   "diffusion_max_mask_ratio", "diffusion_full_prob"},
    "defect_ramp": {"diffusion_rate", "diffusion_ramp"},
    "defect_weight": {"mercury_clean_loss_weight", "diffusion_loss_weight"},
    "defect_commit": {"self_condition", "mercury_self_condition_prob",
                      "mercury_self_condition_fraction"},
    "time_input": {"time_embed_dim"},
}
# fmt: on


def config(name: str, preset: str = "cpu", **given: str) -> tg.Config:
    return sweep.configure(name, "1337", {"PRESET": preset} | given, 1)[0]


def differing(a: tg.Config, b: tg.Config) -> set[str]:
    left, right = a.training_settings(), b.training_settings()
    return {name for name in left if left[name] != right[name]}


def test_every_row_resolves_and_is_written_like_the_defaults() -> None:
    """A value of another type would give equal runs different names."""
    rows, recipes = sweep.rows(), tg.all_recipes()
    defaults = {field.name: field.default for field in dataclasses.fields(tg.Config)}
    for name, row in rows.items():
        settings = {key: value for key, value in row.items() if key not in sweep.ABOUT}
        assert settings.items() <= recipes[name].items(), name
        for key, value in settings.items():
            assert type(value) is type(defaults[key]), (name, key)
        assert row.keys() <= {"note", "published"} or name not in tg.RECIPES, name
    assert recipes.keys() == rows.keys() >= tg.RECIPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("preset", tg.PRESETS)
def test_every_row_holds_at_every_preset_and_has_no_size(preset: str) -> None:
    sizes = {name for values in tg.PRESETS.values() for name in values} | {"iterations", "seed"}
    recipes = tg.all_recipes()
    for name, row in sweep.rows().items():
        cfg, settings = config(name, preset), recipes[name]
        assert {key: getattr(cfg, key) for key in settings} == settings
        assert (cfg.recipe, cfg.preset) == (name, preset)
        assert not settings.keys() & sizes
        assert row["note"]


def test_every_published_name_is_a_row_with_its_score_or_is_left_out_with_a_reason() -> None:
    left_out = sweep.read_ladder().left_out
    for name, score in PUBLISHED:
        assert (name in sweep.rows()) != (name in left_out), name
        assert score is None or score in sweep.rows()[name]["published"].values(), name
    named = {name for name, _ in PUBLISHED} | DEFECTS.keys()
    assert sweep.rows().keys() | left_out.keys() == named | {"defect_nocache"}


@pytest.mark.parametrize("name", PROMISES)
def test_a_row_is_what_its_name_says(name: str) -> None:
    cfg = config(name)
    assert {key: getattr(cfg, key) for key in PROMISES[name]} == PROMISES[name]


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_put_back_alone(name: str) -> None:
    assert differing(config(name), config("direct")) == DEFECTS[name]


def test_rows_that_are_said_to_be_equal_are() -> None:
    assert differing(config("mercury_hybrid35_mixsc"), config("retrograde")) == set()
    assert differing(config("td_control"), config("ar")) == set()
    assert differing(config("retrograde_bidirectional"), config("retrograde")) == {
        "diffusion_causal"
    }
    assert config("retrograde_bidirectional").diffusion_causal is False


def test_different_rows_differ() -> None:
    rows = dict[str, list[str]]()
    for name in sweep.rows():
        rows.setdefault(config(name).path("", "").name[-8:], []).append(name)
    same = [names for names in rows.values() if len(names) > 1]
    assert same == [
        ["ar", "td_control", "ab_control", "mdlm_100_0"],
        ["retrograde", "mercury_hybrid35_mixsc"],
    ]


def test_ladders_name_rows_and_leave_none_out() -> None:
    rows, ladders = sweep.rows(), sweep.ladders()
    assert all(name in rows for names in ladders.values() for name in names)
    assert set(rows) == {name for key, names in ladders.items() if key != "all" for name in names}
    assert ladders["all"] == list(rows)
    assert not ladders.keys() & rows.keys()  # or a word would mean two things
    assert ladders["defects"][:7] == ["direct", *DEFECTS]


@pytest.mark.slow
def test_every_row_trains(data: dict[str, Any]) -> None:
    sizes = {name for values in tg.PRESETS.values() for name in values} | {"device", "compile"}
    small = {k: v for k, v in TINY.items() if k in sizes} | {
        "train_seq_len": 64,
        "train_batch_tokens": 128,
    }
    rest = {"nelbo_windows": "T", "parallel_eval_examples": 0}
    for name in sweep.rows():
        cfg = config(name, **env_of(small | data | rest))
        run = make_run(cfg)
        state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
        late = tg.ScheduleState(200, 0.9, 1.0)  # past every late start
        sums = tg.train_step(state, tg.Objective(cfg, run, state.model), late)
        assert bool(sums.isfinite().all()), name
        assert bool(sums[0] > 0), name
        assert bool(sums[1] > 0) == cfg.diffusion, name


def run_main(values: dict[str, Any], folder: Path) -> None:
    """Run the program in this process with these settings as its environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env_of(values | {"out_dir": folder}).items():
            patch.setenv(name, value)
        assert tg.main() == 0


@pytest.mark.slow
def test_every_row_runs_from_the_settings_to_the_score(
    data: dict[str, Any], tmp_path: Path
) -> None:
    quick = dict(nelbo_windows="T", nelbo_samples=2, nelbo_sequences=2, eval_stride=0, iterations=2)
    quick |= dict(train_seq_len=64, train_batch_tokens=256, val_batch_size=2048, preset="cpu")
    for name, settings in tg.all_recipes().items():
        row = {key: value for key, value in settings.items() if key != "init_from"}
        if "init_from" in settings:
            row["init_from"] = tmp_path / "ar" / "final_model.int8.ptz"
        run_main({**TINY, **quick, **row, **data, "recipe": name}, tmp_path / name)
        events = read_events(tmp_path / name)
        losses = [e[key] for e in events for key in ("train_loss", "denoise_loss") if key in e]
        assert len(losses) == 4, name
        assert all(map(math.isfinite, losses)), name
        by_name = {event["event"]: event for event in events}
        assert math.isfinite(by_name["final"]["bpb"]), name
        assert by_name["final"]["bpb"] > 0, name
        assert by_name["done"]["steps"] == 2, name
        model = tg.load_artifact(Path(by_name["done"]["artifact"]), tg.CPU)[0]
        assert (model.cfg.recipe, model.cfg.strength) == (name, settings.get("strength", False))
