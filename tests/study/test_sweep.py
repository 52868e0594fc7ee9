"""sweep.py: rows are what their names say, and no finished run is made twice, lost, or passed off
as another.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts import ladder
from scripts.study import runlog, sweep
from tests.conftest import ROOT, TINY, env_of, make_run

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


# ==============================================================================
# 1  ROWS
# ==============================================================================


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_every_row_holds_at_every_preset_and_has_no_size(preset: str) -> None:
    sizes = {name for values in tg.PRESETS.values() for name in values} | {"iterations", "seed"}
    for name, row in sweep.rows().items():
        cfg, settings = config(name, preset), tg.all_recipes()[name]
        assert {key: getattr(cfg, key) for key in settings} == settings
        assert (cfg.recipe, cfg.preset) == (name, preset)
        assert not settings.keys() & sizes
        assert row["note"]
    assert tg.RECIPES.keys() <= sweep.rows().keys()


def test_every_published_name_is_a_row_with_its_score_or_is_left_out_with_a_reason() -> None:
    left_out = ladder.read(tg.UserError)["left_out"]
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
        late = tg.Moment(200, 0.9, 1.0)  # past every late start
        sums = tg.train_step(state, tg.Objective(cfg, run, state.model), late)
        assert bool(sums.isfinite().all()), name
        assert bool(sums[0] > 0), name
        assert bool(sums[1] > 0) == cfg.diffusion, name


# ==============================================================================
# 2  RUNS -- against a stand-in that trains nothing and does as its orders say
# ==============================================================================

STAND_IN = """
import hashlib, json, os, pathlib, sys, time
name, seed, out = os.environ["RUN_ID"], int(os.environ["SEED"]), pathlib.Path(os.environ["OUT_DIR"])
here = pathlib.Path(__file__)
with open(here.with_name("calls"), "a") as calls:
    print(name[:-9], os.environ["RESUME"], file=calls)
orders = json.loads(here.with_name("orders").read_text())
order = orders.get(name[:-9], "finish")
if order == "crash":
    sys.exit("ValueError: no memory")
(out / "logs").mkdir(parents=True, exist_ok=True)
log = open(out / "logs" / (name + ".jsonl"), "a" if os.environ["RESUME"] == "auto" else "w",
           buffering=1)

def event(kind, **values):
    print(json.dumps({"event": kind} | values), file=log)

(out / "logs" / (name + ".txt")).write_text("the log")
(out / "logs" / "recipe").write_text(os.environ["RECIPE"])
event("header", machine="m", world_size=1, sha256=hashlib.sha256(here.read_bytes()).hexdigest())
paths = {key: os.environ[key.upper()] for key in ("data_path", "tokenizer_path")}
event("config", values=paths | {"nelbo_samples": int(os.environ.get("NELBO_SAMPLES", 8)),
                                "seed": seed})
event("train", step=3)
if order in ("die", "hang"):
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "checkpoints" / (name + ".pt")).touch()
    here.with_name("running").write_text(str(os.getpid()))
    if order == "hang":
        time.sleep(60)
    os._exit(3)
if order == "error":
    print("error: loss is not finite\\nerror: another rank was lost", file=sys.stderr)
    event("error", reason="loss is not finite")
    sys.exit(2)
event("size", total_bytes=1000 + seed)
event("final", val_loss=1.0, val_bpb=float(os.environ["RECIPE"] == "ar") + seed / 100)
event("nelbo", window=16, bpb=3.0 + seed / 100, standard_error=0.1)
event("nelbo", window=1, bpb=2.5, standard_error=0.0)
event("parallel_eval", task="infill", steps=1, span=8, mode="refine", token_acc=0.25,
      tok_per_sec=9.0)
if order != "no result":
    event("done", steps=7, train_seconds=1.5, peak_memory_mib=30)
"""


class Bench:
    """A folder with the stand-in, its orders, and the command."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.out = root / "out"
        self.program, self.calls_path = root / "train_gpt.py", root / "calls"
        self.program.write_text(STAND_IN, encoding="utf-8")
        self.order()

    def order(self, **orders: str) -> None:
        (self.root / "orders").write_text(json.dumps(orders), encoding="utf-8")

    def calls(self) -> list[str]:
        """Which runs were started since the last look, and with which RESUME."""
        made = (
            self.calls_path.read_text(encoding="utf-8").splitlines()
            if self.calls_path.exists()
            else []
        )
        self.calls_path.unlink(missing_ok=True)
        return made

    def run(self, *argv: str, code: int = 0) -> tuple[dict[str, Any], str]:
        """Run the command; return its JSON line and everything it printed."""
        self.capsys.readouterr()
        assert sweep.main([*argv, "--out", str(self.out)]) == code
        captured = self.capsys.readouterr()
        assert (captured.out == "") == (code == 2)
        return json.loads(
            captured.out.splitlines()[-1]
        ) if captured.out else {}, captured.out + captured.err

    def lines(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in (self.out / "sweep.jsonl").read_text(encoding="utf-8").splitlines()
        ]

    def folder(self, name: str) -> Path:
        (path,) = self.out.glob(f"{name}_*")
        return path


@pytest.fixture
def bench(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
) -> Bench:
    for name in tg.Config.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    for key, value in env_of({**data, "preset": "cpu"}).items():
        monkeypatch.setenv(key, value)
    bench = Bench(tmp_path, capsys)
    monkeypatch.setattr(sweep, "PROGRAM", bench.program)
    return bench


PAIR = ("ar", "defect_causal", "--seeds", "1,2")


def test_a_sweep_runs_every_row_and_seed_and_says_what_came_out(bench: Bench) -> None:
    end, out = bench.run(*PAIR, "--steps", "9")
    assert bench.calls() == ["ar_1 no", "defect_causal_1 no", "ar_2 no", "defect_causal_2 no"]
    deviation = statistics.stdev([0.01, 0.02])
    assert "| row | val_bpb | n | published (phase) | bound, window 1 | bound, window 16 |" in out
    assert (
        f"| `ar` | 1.0150 ± {deviation:.4f} | 2 | - | 2.5000 ± 0.0000 | 3.0150 ± {deviation:.4f} |"
        in out
    )
    assert f"| `defect_causal` | 0.0150 ± {deviation:.4f} | 2 |" in out
    assert end["rows"]["ar"] == {
        "val_bpb": pytest.approx(1.015),
        "std": pytest.approx(deviation),
        "n": 2,
    }
    assert (end["ran"], end["failed"], end["interrupted"]) == (4, [], False)
    first = bench.lines()[0]
    assert len(bench.lines()) == 4
    assert (first["row"], first["seed"], first["val_bpb"], first["bytes"]) == ("ar", 1, 1.01, 1001)
    assert (first["steps"], first["train_seconds"], first["peak_memory_mib"]) == (7, 1.5, 30)
    assert first["bounds"] == {"1": 2.5, "16": 3.01}
    assert [decoded["token_acc"] for decoded in first["parallel_eval"]] == [0.25]
    made = bench.folder("ar_1").name
    assert first["run"] == made == f"ar_1_{first['hash']}"
    assert {made + ".txt", made + ".jsonl"} <= {
        path.name for path in (bench.out / "logs").iterdir()
    }


def test_published_scores_stand_beside_ours(bench: Bench) -> None:
    _, out = bench.run("td_control")
    assert "| `td_control` | 13.3700 | 1 | 2.0027 (1), 1.9997 (2), 2.0035 (2, corruption) |" in out


def test_a_finished_run_is_skipped_and_still_counted(bench: Bench) -> None:
    bench.run(*PAIR)
    bench.calls()
    end, out = bench.run(*PAIR, "--seeds", "1,2,3")
    assert bench.calls() == ["ar_3 no", "defect_causal_3 no"]
    assert (end["ran"], end["skipped"], end["rows"]["ar"]["n"]) == (2, 4, 3)
    assert "ar seed 1: skipped, val_bpb 1.0100" in out
    bench.run("direct")  # another sweep into the same folder keeps the lines of this one
    assert sorted({line["row"] for line in bench.lines()}) == ["ar", "defect_causal", "direct"]
    assert len(bench.lines()) == 7


def test_other_settings_are_another_run(bench: Bench) -> None:
    bench.run("ar", "--steps", "9")
    bench.run("ar", "--steps", "10")
    bench.run("ar", "--seconds", "10", "--set", "MATRIX_LR=0.5")
    assert len(bench.calls()) == len(list(bench.out.glob("ar_1337_*"))) == len(bench.lines()) == 3


def test_rows_with_equal_settings_share_a_run_even_across_sweeps(bench: Bench) -> None:
    end, _ = bench.run("retrograde", "mercury_hybrid35_mixsc")
    bench.run("td_control")
    end, _ = bench.run("ar", "ab_control")
    assert bench.calls() == ["retrograde_1337 no", "td_control_1337 no"]
    assert end["rows"]["ar"] == end["rows"]["ab_control"]
    assert len(bench.lines()) == 5


def test_a_run_that_another_row_began_is_resumed_by_one_of_equal_settings(bench: Bench) -> None:
    bench.order(td_control_1337="die")
    bench.run("td_control", code=1)
    bench.order()
    end, _ = bench.run("ab_control")
    assert bench.calls() == ["td_control_1337 no", "td_control_1337 auto"]
    assert (end["resumed"], list(end["rows"])) == (1, ["ab_control"])


def test_every_run_is_told_the_name_of_its_row(bench: Bench) -> None:
    bench.run("td_late05", "retrograde")
    assert [
        Path(bench.folder(name) / "logs" / "recipe").read_text()
        for name in ("td_late05", "retrograde")
    ] == [
        "td_late05",
        "retrograde",
    ]


def test_another_version_of_the_program_is_run_anew_unless_told_otherwise(bench: Bench) -> None:
    bench.run("ar")
    bench.program.write_text(STAND_IN + "# changed\n", encoding="utf-8")
    (log,) = Path(bench.folder("ar"), "logs").glob("*.jsonl")
    log.write_text(
        log.read_text().replace('"eval_seed": 0', '"eval_seed": 0, "export_of_then": 1'),
        encoding="utf-8",
    )
    bench.run("ar", "--any-version")  # a setting that is no more does not matter
    assert len(bench.calls()) == 1
    end, out = bench.run("ar")
    assert bench.calls() == ["ar_1337 no"]
    assert "--any-version keeps them" in out
    assert end["ran"] == 1


def test_a_run_that_died_is_resumed_and_shown_as_such(bench: Bench) -> None:
    bench.order(defect_causal_1="die")
    end, _ = bench.run(*PAIR, code=1)
    assert len(bench.calls()) == 4
    assert "exit status 3" in end["failed"][0]["error"]
    bench.order()
    end, out = bench.run(*PAIR)
    assert bench.calls() == ["defect_causal_1 auto"]
    assert (end["resumed"], end["skipped"]) == (1, 3)
    assert "defect_causal seed 1: resumed, val_bpb 0.0100" in out
    assert all("error" not in line for line in bench.lines())


def test_a_run_that_died_under_another_version_starts_afresh(bench: Bench) -> None:
    bench.order(ar_1337="die")
    bench.run("ar", code=1)
    bench.program.write_text(STAND_IN + "# changed\n", encoding="utf-8")
    bench.order()
    bench.run("ar")
    assert bench.calls() == ["ar_1337 no", "ar_1337 no"]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("error", "loss is not finite (exit status 2"),
        ("crash", "ValueError: no memory (exit status 1"),
        ("no result", "nothing printed (unfinished, last logged step 3"),
    ],
)
def test_a_failure_is_recorded_and_the_next_run_starts(bench: Bench, order: str, said: str) -> None:
    bench.order(ar_1=order)
    end, out = bench.run(*PAIR, code=1)
    assert len(bench.calls()) == 4
    (failed,) = end["failed"]
    assert (failed["row"], failed["seed"]) == ("ar", 1)
    assert failed["error"].startswith(said)
    assert f"failed: ar seed 1: {said}" in out
    assert (end["rows"]["ar"]["n"], end["rows"]["defect_causal"]["n"]) == (1, 2)
    assert [line["error"] for line in bench.lines() if "error" in line] == [failed["error"]]
    bench.order()
    bench.run(*PAIR)
    # A failed run is tried again, others are not.
    assert [call.split()[0] for call in bench.calls()] == ["ar_1"]


def test_a_stale_log_is_never_taken_for_a_result(bench: Bench) -> None:
    bench.run("ar")
    bench.program.write_text(STAND_IN + "# changed\n", encoding="utf-8")
    bench.order(ar_1337="crash")
    end, _ = bench.run("ar", code=1)
    assert end["rows"] == {}


def test_other_scoring_scores_the_finished_weights_again(bench: Bench) -> None:
    bench.run("ar")
    bench.calls()
    checkpoints = bench.folder("ar_1337") / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / f"{checkpoints.parent.name}.pt").touch()
    bench.run("ar", "--set", "NELBO_SAMPLES=9")
    bench.run("ar", "--set", "NELBO_SAMPLES=9")
    assert bench.calls() == ["ar_1337 auto"]


def test_runs_on_other_data_are_not_mixed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run("ar")
    (tmp_path / "copy").symlink_to(os.environ["DATA_PATH"])
    bench.run("ar", "--set", f"DATA_PATH={tmp_path / 'copy'}")  # the same folder by another name
    for path in Path(os.environ["DATA_PATH"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    _, out = bench.run("ar", code=2)
    assert f"error: DATA_PATH='{tmp_path}', but {bench.folder('ar_1337')} was made with" in out
    assert len(bench.calls()) == 1


def test_one_folder_takes_one_sweep_at_a_time(bench: Bench) -> None:
    bench.out.mkdir()
    with open(bench.out / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another sweep" in bench.run("ar", code=2)[1]
    bench.run("ar")


def test_damaged_files_are_named(bench: Bench) -> None:
    bench.run("ar")
    (bench.out / "sweep.jsonl").write_text('{"row": "ar"}\n', encoding="utf-8")
    assert f"{bench.out / 'sweep.jsonl'} is damaged" in bench.run("ar", code=2)[1]
    (bench.out / "sweep.jsonl").unlink()
    (log,) = bench.folder("ar_1337").glob("logs/*.jsonl")
    log.write_text("x\n" + log.read_text(encoding="utf-8"), encoding="utf-8")
    assert f"log {log}, line 1: not an event" in bench.run("ar", code=2)[1]


def started(path: Path) -> int:
    """Wait for the stand-in to write its process id."""
    for _ in range(600):
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text(encoding="utf-8"))
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


@pytest.fixture
def child(bench: Bench) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a process of its own whose second run never ends."""
    bench.order(defect_causal_1="hang")
    code = (  # whoever started the tests may have had these signals ignored, and that is inherited
        "import pathlib, signal\n"
        "from scripts.study import sweep\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"sweep.PROGRAM = pathlib.Path({str(bench.program)!r})\n"
        "raise SystemExit(sweep.main())"
    )
    argv = [sys.executable, "-c", code, *PAIR, "--out", str(bench.out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_sweep_ends_its_run_and_says_how_to_resume(
    bench: Bench, child: subprocess.Popen[str], name: str
) -> None:
    pid = started(bench.root / "running")
    child.send_signal(getattr(signal, name))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert "interrupted with 3 of 4 runs to go; rerun the command to resume" in err
    end = json.loads(out.splitlines()[-1])
    assert (end["interrupted"], end["ran"], list(end["rows"])) == (True, 1, ["ar"])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    bench.order()
    bench.calls()
    bench.run(*PAIR)
    assert bench.calls() == ["defect_causal_1 auto", "ar_2 no", "defect_causal_2 no"]


# ==============================================================================
# 3  FAULTS -- all named before anything starts
# ==============================================================================


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["defect_caus"],
         "NAME='defect_caus' is no row or ladder; closest: defect_causal, defects"),
        (["ar", "~~~"], "NAME='~~~' is no row or ladder; closest: none"),
        (["defect_nocache"], "NAME='defect_nocache' is left out: it concerns"),
        (["ar", "--set", "NUM_LAYER=2"], "--set NUM_LAYER=2: must be NAME=VALUE of a setting"),
        (["ar", "--set", "MATRIX_LR"], "--set MATRIX_LR: must be NAME=VALUE"),
        (["ar", "--set", "SEED=3"],
         "--set SEED=3: a sweep sets SEED itself; use rows, --seeds and --out"),
        (["ar", "--set", "MODEL_DIM=7"], "MODEL_DIM=7 must be a multiple of 2 x NUM_HEADS=4"),
        (["ar", "--seeds", "1,x"], "SEED='x' must be a whole number (rows: ar)"),
        (["ar", "--steps", "0"], "ITERATIONS=0 must be in [1, inf]"),
        (["ar", "--nproc", "3"], "--nproc=3 must divide MICRO_BATCHES=4"),
        (["direct", "bd3_4", "--set", "DIFFUSION_WINDOWS=8"],
         "DIFFUSION_WINDOWS='8' is the row's to set; leave it out of --set and the environment "
         "(rows: bd3_4)"),
        (["direct", "ar", "--set", "DIFFUSION_LOSS_WEIGHT=8"],
         "DIFFUSION_LOSS_WEIGHT='8' is the row's to set"),
        (["ar", "--set", "DATA_PATH=nowhere"], "DATA_PATH='nowhere' holds no *_train_*.bin"),
    ],
)  # fmt: skip
def test_a_fault_is_named_before_any_run(bench: Bench, argv: list[str], said: str) -> None:
    _, out = bench.run(*argv, code=2)
    assert f"error: {said}" in out
    assert bench.calls() == []


def test_a_damaged_ladder_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "FILE", bench.root / "ladder.toml")
    ladder.FILE.write_text("[rows.td_control\n", encoding="utf-8")
    assert f"error: {ladder.FILE} is damaged" in bench.run("ar", code=2)[1]


@pytest.mark.parametrize(
    "argv", [[], ["ar", "--seconds", "0"], ["ar", "--nproc", "0"], ["ar", "--steps", "x"]]
)
def test_a_wrong_command_line_exits_with_2(bench: Bench, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep.main(argv)
    assert caught.value.code == 2


def test_a_setting_in_the_environment_that_is_the_rows_is_a_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSION_CAUSAL", "0")
    assert (
        "error: DIFFUSION_CAUSAL='0' is the row's to set" in bench.run("defect_causal", code=2)[1]
    )
    bench.run("direct")


def test_what_the_environment_and_the_budget_take_away_is_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED", "5")
    monkeypatch.setenv("NUM_LAYER", "5")
    end, _ = bench.run("direct", "defect_ramp", "retrograde", "--steps", "100", "--dry-run")
    ramp = "DIFFUSION_RAMP=iterations falls short only where --seconds ends a run before ITERATIONS"
    assert end["notes"] == [
        "SEED of the environment is not read: a sweep sets it",
        "NUM_LAYER is not a setting; did you mean NUM_LAYERS?",
        f"{ramp} (rows: defect_ramp, retrograde)",
        "no windows before DIFFUSION_START_STEP=100, ITERATIONS=100 (rows: retrograde)",
    ]
    end, _ = bench.run("defect_ramp", "retrograde", "--seconds", "100", "--dry-run")
    assert not any("RAMP" in note or "START" in note for note in end["notes"])


def test_names_of_runs_in_the_environment_do_not_reach_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run("ar")
    made = bench.lines()
    for name, value in {
        "RUN_ID": "mine",
        "OUT_DIR": "mine",
        "RESUME": "auto",
        "RECIPE": "direct",
        "RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    bench.run("ar")
    bench.run("ar", "--seeds", "2")
    assert bench.calls() == ["ar_1337 no", "ar_2 no"]
    assert bench.lines()[0] == made[0]


def test_a_dry_run_shows_all_and_does_nothing(bench: Bench) -> None:
    end, out = bench.run("all", "--seeds", "1,2", "--dry-run")
    assert (end["rows"], end["runs"]) == (len(sweep.rows()), 2 * len(sweep.rows()))
    assert (
        "| `defect_causal` | `direct` | `DIFFUSION_CAUSAL=1` | attention inside a window is causal "
        "| 1 2 | - |" in out
    )
    assert bench.calls() == []
    assert not bench.out.exists()


def test_several_processes_are_started_by_torchrun(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = bench.root / "torch" / "distributed"
    package.mkdir(parents=True)
    (bench.root / "torch" / "__init__.py").touch()
    launched = "pathlib.Path('launched').write_text(' '.join(sys.argv[1:]))"
    (package / "run.py").write_text(
        f"import pathlib, runpy, sys; {launched}; runpy.run_path(sys.argv[-1])"
    )
    monkeypatch.setenv("PYTHONPATH", str(bench.root))
    monkeypatch.chdir(bench.root)
    bench.run("ar", "--nproc", "2")
    assert Path("launched").read_text() == f"--standalone --nproc_per_node=2 {bench.program}"
    assert bench.calls() == ["ar_1337 no"]


# ==============================================================================
# 4  THE PROGRAM ITSELF
# ==============================================================================


def test_one_row_end_to_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PROGRAM", ROOT / "train_gpt.py")
    taken = {*tg.all_recipes()["mdlm_50_50"], "vocab_size", "iterations", "max_wallclock_seconds"}
    for key, value in env_of(
        {k: v for k, v in TINY.items() if k not in taken} | {"OMP_NUM_THREADS": 1}
    ).items():
        monkeypatch.setenv(key, value)
    end, _ = bench.run("mdlm_50_50", "--steps", "4")
    (line,) = bench.lines()
    assert (line["steps"], line["world_size"], sorted(line["bounds"])) == (4, 1, ["1", "4"])
    assert 0 < line["val_bpb"] == end["rows"]["mdlm_50_50"]["val_bpb"]
    assert (bench.folder("mdlm_50_50") / "final_model.int8.ptz").is_file()
    events = [
        json.loads(text)
        for text in (bench.out / "logs" / f"{line['run']}.jsonl").read_text().splitlines()
    ]
    config = next(e for e in events if e["event"] == "config")
    assert (config["values"]["recipe"], config["values"]["diffusion_loss_weight"]) == (
        "mdlm_50_50",
        0.5,
    )
    assert {config["source"][name] for name in tg.all_recipes()["mdlm_50_50"]} == {
        "recipe mdlm_50_50"
    }
    assert (
        runlog.key_of(runlog.read_log(bench.out / "logs" / f"{line['run']}.jsonl")).recipe
        == "mdlm_50_50"
    )
    end, _ = bench.run("mdlm_50_50", "--steps", "4")
    assert end["skipped"] == 1
