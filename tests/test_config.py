"""Settings: where each comes from, that every fault is named at once, and that importing does
nothing.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from tests.conftest import MAIN, ROOT, TINY, env_of, make_run, tiny

# The environment that the predecessor published for its best run.
LEGACY = {
    "DIFFUSION_TRAIN_MODE": "mercury",
    "DIFFUSION_CORRUPTION_MODE": "hybrid",
    "DIFFUSION_HYBRID_MASK_PROB": "0.5",
    "DIFFUSION_LOSS_WEIGHT": "1.0",
    "DIFFUSION_PROGRESSIVE": "1",
    "DIFFUSION_MIN_MASK_RATIO": "0.25",
    "DIFFUSION_MAX_MASK_RATIO": "0.35",
    "DIFFUSION_SPAN_LEN": "64",
    "DIFFUSION_SPANS_PER_SEQ": "8",
    "MERCURY_TASK_MODE": "mixed",
    "MERCURY_CONTINUATION_PROB": "0.75",
    "MERCURY_CLEAN_LOSS_WEIGHT": "0.10",
    "MERCURY_SELF_CONDITION_PROB": "1.0",
    "MERCURY_SELF_CONDITION_FRACTION": "0.75",
}


def faults_of(**env: str) -> list[str]:
    with pytest.raises(tg.UserError) as caught:
        tg.Config.from_env(env)
    return str(caught.value).splitlines()


def test_default_is_overridden_by_recipe_then_preset_then_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        tg.RECIPES, "r", {"num_layers": 2, "model_dim": 64, "seed": 5, "num_heads": 4}
    )
    monkeypatch.setitem(tg.PRESETS, "p", {"model_dim": 128, "seed": 6})
    cfg, source = tg.Config.from_env({"RECIPE": "r", "PRESET": "p", "SEED": "7"})
    assert (cfg.num_layers, cfg.model_dim, cfg.seed, cfg.mlp_mult) == (2, 128, 7, 2)
    assert [source[n] for n in ("num_layers", "model_dim", "seed", "mlp_mult")] == [
        "recipe r",
        "preset p",
        "env",
        "default",
    ]
    assert (cfg.recipe, cfg.preset) == ("r", "p")
    table = cfg.table(source)
    assert len(table.splitlines()) == len(dataclasses.fields(cfg))
    assert "preset p" in next(line for line in table.splitlines() if line.startswith("MODEL_DIM "))


@pytest.mark.parametrize("preset", tg.PRESETS)
@pytest.mark.parametrize("recipe", MAIN)
def test_every_recipe_and_preset_is_consistent(recipe: str, preset: str) -> None:
    cfg, source = tg.Config.from_env({"RECIPE": recipe, "PRESET": preset})
    for name, value in MAIN[recipe].items():
        assert getattr(cfg, name) == value
        assert source[name] == f"recipe {recipe}"
    assert not MAIN[recipe].keys() & tg.PRESETS[preset].keys()  # a size is no objective


def test_presets_hold_sizes_and_recipes_do_not() -> None:
    objective = {name for row in MAIN.values() for name in row}
    assert not objective & {name for row in tg.PRESETS.values() for name in row}
    clock = {name: row.get("checkpoint_seconds", 60.0) for name, row in tg.PRESETS.items()}
    assert clock == {"8xh100": 0.0, "1xgpu": 0.0, "cpu": 60.0}  # writing takes time of a record


def test_auto_preset_looks_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tg.Config.from_env({})[0].preset == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert tg.Config.from_env({})[0].preset == "1xgpu"
    assert tg.Config.from_env({"WORLD_SIZE": "8"})[0].preset == "8xh100"
    assert tg.Config.from_env({"DEVICE": "cpu"})[0].preset == "cpu"


@pytest.mark.parametrize(("text", "value"), [("0", False), ("1", True)])
def test_booleans_are_0_and_1(text: str, value: bool) -> None:
    assert tg.Config.from_env({"DIFFUSION_CAUSAL": text})[0].diffusion_causal is value


@pytest.mark.parametrize("text", ["true", "True", "yes", "", "2", "-1", "0.0", "on"])
def test_booleans_are_nothing_else(text: str) -> None:
    (fault,) = faults_of(DIFFUSION_CAUSAL=text)
    assert fault == f"DIFFUSION_CAUSAL={text!r} must be 0 or 1"


def test_all_faults_are_reported_at_once() -> None:
    faults = faults_of(
        RECIPE="diret",
        SEED="1.5",
        MATRIX_LR="nan",
        DIFFUSION_CAUSAL="maybe",
        NUM_LAYERS="0",
        DIFFUSION_LOSS="elbow",
        DIFFUSION_WINDOWS="7",
        NUM_HEADS="3",
        BETA1="1.5",
    )
    for expected in (
        "RECIPE='diret' is unknown; closest: direct",
        "SEED='1.5' must be a whole number",
        "MATRIX_LR='nan' must be a finite number",
        "DIFFUSION_CAUSAL='maybe' must be 0 or 1",
        "NUM_LAYERS=0 must be in [1, 10000]",
        f"DIFFUSION_LOSS='elbow' must be one of: {', '.join(tg.LOSS_NAMES.split())}",
        "DIFFUSION_WINDOWS='7' must be sizes (or T) that divide TRAIN_SEQ_LEN=256",
        "MODEL_DIM=160 must be a multiple of 2 x NUM_HEADS=3",
        "NUM_HEADS=3 must be a multiple of NUM_KV_HEADS=2",
        "BETA1=1.5 must be in [0, 0.999999]",
    ):
        assert sum(fault.startswith(expected) for fault in faults) == 1, expected
    assert len(faults) == 10


@pytest.mark.parametrize("key", ["RECIPE", "PRESET"])
def test_an_unknown_row_names_the_closest_and_all(key: str) -> None:
    rows = tg.RECIPES if key == "RECIPE" else tg.PRESETS
    for row in rows:
        (fault,) = faults_of(**{key: row + "x"})
        assert f"{key}={row + 'x'!r}" in fault
        assert row in fault.split("closest: ")[1].split(";")[0]
        assert all(name in fault.split("known: ")[1] for name in rows)
    assert "closest: none" in faults_of(**{key: "~~~~"})[0]


@pytest.mark.parametrize(
    ("wrong", "meant"), [("NUM_HEAD", "NUM_HEADS"), ("MODEL_DIR", "MODEL_DIM"), ("SEEDS", "SEED")]
)
def test_a_near_miss_is_warned_about(wrong: str, meant: str) -> None:
    env = {wrong: "4", "HOME": "/", "PATH": "/bin", "OMP_NUM_THREADS": "1"}
    assert [*tg.near_misses(env)] == [f"{wrong} is not a setting; did you mean {meant}?"]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        (f.name, f.metadata["low"], f.metadata["high"])
        for f in dataclasses.fields(tg.Config)
        if f.metadata["low"] is not None
    ],
)
def test_every_limit_holds(name: str, low: float, high: float) -> None:
    step = 1 if isinstance(getattr(tiny(), name), int) else 0.5
    for bad in (low - step, high + step, float("nan")):
        with pytest.raises(tg.UserError) as caught:
            tiny(**{name: bad})
        assert f"{name.upper()}={bad} must be in [{low}, {high}]" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"num_heads": 3}, ("MODEL_DIM=16", "NUM_HEADS=3")),
        (
            {"model_dim": 18},
            ("MODEL_DIM=18", "NUM_HEADS=2"),
        ),  # an odd head: rotary pairs need two channels
        ({"num_heads": 4, "num_kv_heads": 3}, ("NUM_HEADS=4", "NUM_KV_HEADS=3")),
        (
            {"train_batch_tokens": 100},
            ("TRAIN_BATCH_TOKENS=100", "MICRO_BATCHES=2", "TRAIN_SEQ_LEN=16"),
        ),
        ({"diffusion_windows": "5"}, ("DIFFUSION_WINDOWS='5'", "TRAIN_SEQ_LEN=16")),
        ({"diffusion_windows": "0"}, ("DIFFUSION_WINDOWS='0'", "TRAIN_SEQ_LEN=16")),
        ({"diffusion_windows": "-4"}, ("DIFFUSION_WINDOWS='-4'", "TRAIN_SEQ_LEN=16")),
        ({"diffusion_windows": ""}, ("DIFFUSION_WINDOWS=''",)),
        ({"diffusion_windows": "4:-1"}, ("DIFFUSION_WINDOWS='4:-1'",)),
        ({"diffusion_windows": "4:x"}, ("DIFFUSION_WINDOWS='4:x'",)),
        ({"nelbo_windows": "3"}, ("NELBO_WINDOWS='3'", "TRAIN_SEQ_LEN=16")),
        ({"nelbo_windows": "0"}, ("NELBO_WINDOWS='0'", "TRAIN_SEQ_LEN=16")),
        ({"nelbo_windows": "-1"}, ("NELBO_WINDOWS='-1'", "TRAIN_SEQ_LEN=16")),
        ({"diffusion_regions": "iid:1,everywhere:1"}, ("DIFFUSION_REGIONS=", "iid", "spans")),
        (
            {"diffusion_min_mask_ratio": 0.9, "diffusion_max_mask_ratio": 0.5},
            ("DIFFUSION_MIN_MASK_RATIO=0.9",),
        ),
        (
            {"diffusion_loss_weight": 0.0, "mercury_clean_loss_weight": 0.0},
            ("MERCURY_CLEAN_LOSS_WEIGHT", "DIFFUSION_LOSS_WEIGHT"),
        ),
        (
            {"window_attention": "flex", "model_dim": 32, "diffusion_anneal_frac": 0.5},
            ("WINDOW_ATTENTION='flex'", "DIFFUSION_ANNEAL_FRAC=0.5", "set groups"),
        ),
        (  # the kernel reads 16 channels a head or more
            {"window_attention": "flex", "model_dim": 28},
            ("WINDOW_ATTENTION='flex'", "MODEL_DIM=28", "NUM_HEADS=2", "set groups"),
        ),
        ({"parallel_eval_steps": "1,0"}, ("PARALLEL_EVAL_STEPS='1,0'",)),
        ({"parallel_eval_span_len": "9"}, ("PARALLEL_EVAL_PREFIX_LEN=4", "TRAIN_SEQ_LEN=16")),
        ({"run_id": "../x"}, ("RUN_ID='../x'",)),
        ({"run_id": "x" * 101}, ("RUN_ID='xxx", "at most 100")),
    ],
)
def test_settings_that_do_not_fit_together_are_named(
    overrides: dict[str, Any], names: tuple[str, ...]
) -> None:
    with pytest.raises(tg.UserError) as caught:
        tiny(**overrides)
    assert len(str(caught.value).splitlines()) == 1
    for name in names:
        assert name in str(caught.value)


def test_a_misspelt_setting_in_code_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="num_layer"):
        tiny(num_layer=2)


def test_the_predecessors_commands_run_its_recipe() -> None:
    for preset in tg.PRESETS:
        legacy, _ = tg.Config.from_env(LEGACY | {"PRESET": preset})
        recipe, _ = tg.Config.from_env({"RECIPE": "retrograde", "PRESET": preset})
        # Which its objective never reads.
        spans = {
            "diffusion_span_len": 64,
            "diffusion_spans_per_seq": 8,
        }
        assert legacy == dataclasses.replace(recipe, **spans)
    assert [*tg.near_misses(LEGACY)] == []
    assert [*tg.near_misses({"seed": "42"})] == ["seed is not a setting; did you mean SEED?"]
    (fault,) = faults_of(DIFFUSION_TRAIN_MODE="mercuri")
    assert fault.startswith(
        "DIFFUSION_TRAIN_MODE='mercuri' is unknown; closest: mercury; known: none"
    )
    assert tg.Config.from_env({"DIFFUSION_TRAIN_MODE": "none"})[0].recipe == "ar"


def test_shares_and_tasks_are_read_as_written() -> None:
    assert tg.parse_shares("a:3, b:1,") == [("a", 0.75), ("b", 0.25)]
    assert tg.parse_shares("a,b,c:2,d:0") == [("a", 0.25), ("b", 0.25), ("c", 0.5)]
    assert tg.parse_shares("") == []
    assert tiny(diffusion_windows="4:1,T:3").sizes("4:1,T:3") == [(4, 0.25), (16, 0.75)]
    mixed = tiny(mercury_task_mode="mixed", mercury_continuation_prob=0.75)
    assert mixed.regions() == [("continuation", 0.75), ("infill", 0.25)]
    assert tiny(mercury_task_mode="infill").regions() == [("infill", 1.0)]
    for text in ("a:0", "a:-1,b:2", "a:nan", "a:inf"):
        with pytest.raises(ValueError, match="shares"):
            tg.parse_shares(text)


def test_the_name_of_a_run_follows_what_it_trains() -> None:
    cfg = tiny()
    free = {"nelbo_samples": 5, "out_dir": "elsewhere", "train_log_every": 7, "preset": "cpu"}
    # Which a resumed run may change.
    assert (
        dataclasses.replace(cfg, **free).path("checkpoints", ".pt").name
        == cfg.path("checkpoints", ".pt").name
    )
    assert (
        dataclasses.replace(cfg, matrix_lr=0.5).path("checkpoints", ".pt").name
        != cfg.path("checkpoints", ".pt").name
    )
    assert dataclasses.replace(cfg, run_id="mine").path("checkpoints", ".pt") == Path(
        "checkpoints/mine.pt"
    )


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that this test's rows are read from; nothing is there yet."""
    monkeypatch.setattr(tg, "LADDER_FILE", tmp_path / "ladder.toml")
    return tmp_path / "ladder.toml"


def test_a_row_of_the_ladder_is_a_recipe(rows: Path) -> None:
    rows.write_text(
        """
[rows.middle]
base = "ar"
mercury_clean_loss_weight = 0.1
diffusion_loss_weight = 0.25
diffusion_windows = "8"
[rows.top]
base = "middle"
note = "what it is"
published = { "1" = 2.0 }
diffusion_causal = true
diffusion_loss_weight = 0.5
""",
        encoding="utf-8",
    )
    cfg, source = tg.Config.from_env({"RECIPE": "top", "PRESET": "cpu", "DIFFUSION_SPAN_LEN": "16"})
    assert (cfg.recipe, cfg.diffusion_causal, cfg.diffusion_loss_weight) == ("top", True, 0.5)
    assert (cfg.diffusion_windows, cfg.diffusion_span_len) == ("8", 16)
    named = (
        "diffusion_causal",
        "mercury_clean_loss_weight",
        "diffusion_windows",
        "diffusion_span_len",
    )
    assert [source[name] for name in named] == ["recipe top"] * 3 + ["env"]
    assert cfg.path("logs", ".txt").name.startswith("top_seed1337_")
    env = {"RECIPE": "ar", "PRESET": "cpu", "DIFFUSION_SPAN_LEN": "16", "DIFFUSION_WINDOWS": "8"}
    env |= {"MERCURY_CLEAN_LOSS_WEIGHT": "0.1", "DIFFUSION_CAUSAL": "1"}
    same = dataclasses.replace(cfg, recipe="ar", diffusion_loss_weight=0.0)
    assert same == tg.Config.from_env(env)[0]
    assert tg.all_recipes().keys() == tg.RECIPES.keys() | {"top", "middle"}


FAULTY = {  # rows, and what is said where the row called `x` is asked for
    "[rows.x": "{file}: rows: ",
    "rows = 5": "{file}: rows: ",
    "[rows]\nx = 5": "{file}: x: ",
    "[rows.direct]\nmatrix_lr = 0.5": "{file}: direct: the recipe is built in; rename the row",
    "[rows.x]\nseed = 5": "{file}: x: no base 'base' above it",
    "[rows.x]\nbase = 5": "{file}: x: no base 5 above it",
    "[rows.x]\nbase = [5]": "{file}: x: ",
    "[rows.x]\nbase = 'dirct'": "{file}: x: no base 'dirct' above it",
    "[rows.x]\nbase = 'x'": "{file}: x: no base 'x' above it",
    "[rows.x]\nbase = 'y'\n[rows.y]\nbase = 'ar'": "{file}: x: no base 'y' above it",
    "[rows.x]\nbase = 'ar'\nmatrixlr = 0.5": "{file}: x: matrixlr is not a setting; closest: m",
    "[rows.x]\nbase = 'ar'\n[rows.y]\nbase = 'ar'\nwat = 1": "{file}: y: wat is not a setting",
    "[rows.x]\nbase = 'ar'\nseed = 0.5": "{file}: x: SEED='0.5' must be a whole number",
    "[rows.x]\nbase = 'ar'\ndiffusion_causal = 'yes'": "x: DIFFUSION_CAUSAL='yes' must be 0 or 1",
    "[rows.x]\nbase = 'ar'\nnelbo_windows = [1]": "NELBO_WINDOWS='[1]' must be sizes",
    "[rows.x]\nbase = 'ar'\nadam_eps = inf": "ADAM_EPS='inf' must be a finite number",
    "[rows.x]\nbase = 'ar'\nadam_eps = nan": "ADAM_EPS='nan' must be a finite number",
    "[rows.y]\nbase = 'ar'": ("RECIPE='x' is unknown; closest: none; known: record, "),
}


@pytest.mark.parametrize("text", FAULTY)
def test_a_faulty_ladder_is_named_with_its_row_and_a_remedy(text: str, rows: Path) -> None:
    rows.write_text(text, encoding="utf-8")
    (fault,) = faults_of(RECIPE="x")
    assert FAULTY[text].format(file=rows) in fault
    tg.Config.from_env({"RECIPE": "direct"})  # what is built in does not need the file


def test_all_faults_of_a_row_are_named_at_once(rows: Path) -> None:
    rows.write_text("[rows.x]\nbase = 'ar'\nwat = 1\nbeta1 = 'a'\n", encoding="utf-8")
    (fault,) = faults_of(RECIPE="x")
    assert "wat is not a setting" in fault
    assert "BETA1='a' must be a finite number" in fault


def test_strength_adds_the_row_of_the_preset() -> None:
    for preset, row in tg.STRENGTHS.items():
        for recipe in ("record", "ar_record", "record_bound"):
            cfg, source = tg.Config.from_env({"RECIPE": recipe, "PRESET": preset})
            assert {name: getattr(cfg, name) for name in row} == row
            assert {source[name] for name in row} == {f"strength {preset}"}
        plain, _ = tg.Config.from_env({"RECIPE": "direct", "PRESET": preset})
        strong, _ = tg.Config.from_env({"RECIPE": "direct", "PRESET": preset, "STRENGTH": "1"})
        record, _ = tg.Config.from_env({"RECIPE": "record", "PRESET": preset})
        assert strong == dataclasses.replace(record, recipe="direct")
        assert not plain.strength
        weaker, source = tg.Config.from_env(
            {"RECIPE": "record", "PRESET": preset, "VALUE_RESIDUAL": "0"}
        )
        assert (weaker.value_residual, source["value_residual"]) == (False, "env")
    assert tg.STRENGTHS.keys() == tg.PRESETS.keys()


def test_the_plain_command_runs_the_record() -> None:
    cfg, _ = tg.Config.from_env({"PRESET": "8xh100"})
    assert (cfg.recipe, cfg.strength, cfg.num_layers, cfg.export_scheme) == (
        "record",
        True,
        10,
        "int6+lzma",
    )
    assert tg.Config.from_env({"PRESET": "cpu"})[0].compile == "1"


@pytest.mark.slow
def test_the_program_runs_a_row_by_its_name(tmp_path: Path) -> None:
    env = {"RECIPE": "td_late05", "DATA_PATH": "nowhere", "PATH": "/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.startswith("error: DATA_PATH='nowhere' holds no")


def test_a_recipe_is_a_row(monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]) -> None:
    row = dict(diffusion_windows="8", diffusion_full_prob=1.0, diffusion_loss="mean")
    monkeypatch.setitem(tg.RECIPES, "tidar_8", row)
    env = {k: v for k, v in env_of(TINY | data).items() if k.lower() not in row}
    cfg, _ = tg.Config.from_env(env | {"RECIPE": "tidar_8", "PRESET": "cpu"})
    assert {name: getattr(cfg, name) for name in row} == row
    run, before = make_run(cfg), tg.GPT(cfg).state_dict()
    state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
    for step in range(2):
        sums = tg.train_step(
            state, tg.Objective(cfg, run, state.model), tg.ScheduleState.at(cfg, step, 0.0)
        )
        assert bool(sums.isfinite().all())
        assert bool((sums > 0).all())  # both streams were trained
    after = state.model.state_dict()
    assert all(
        not after[name].equal(before[name])
        for name in ("tok_emb", "mask_emb", "blocks.0.fc.weight")
    )


@pytest.mark.slow
def test_import_starts_nothing(tmp_path: Path) -> None:
    check = f"""
import os, random, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
sys.dont_write_bytecode = True
import numpy, sentencepiece, torch, torch.distributed, torch._dynamo, tqdm

def forbidden(*args):
    raise SystemExit("the environment was read")

class Watched:
    __getitem__ = __contains__ = __iter__ = __len__ = forbidden
    __setitem__ = __delitem__ = __getattr__ = forbidden

def audit(event, args):
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    writes = event == "open" and (set(args[1] or "") & set("wax+") or args[2] & flags)
    writes = writes or (event == "open" and os.path.basename(str(args[0])).startswith("ladder"))
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen",
                           "socket.connect", "socket.bind"):
        raise SystemExit(f"{{event}} {{args}}")

def state():
    seeds = random.getstate(), torch.get_rng_state().tolist()
    return *seeds, torch.get_num_threads(), signal.getsignal(signal.SIGTERM),
    threading.active_count()

before, environ = state(), os.environ
sys.addaudithook(audit)
os.environ = Watched()
import train_gpt
os.environ = environ
assert state() == before
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert not torch.are_deterministic_algorithms_enabled()
print("quiet")
"""
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("quiet\n", "")
    assert list(tmp_path.iterdir()) == []
