"""train_gpt.py copied alone into an empty folder runs every kind of recipe.

It trains, exports, reloads, scores and decodes, eager and compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from tests.conftest import ROOT, THREADS, env_of, settings
from tests.test_config import LEGACY

STEPS = 4
ALL = dict(diffusion_row_frac=1.0, diffusion_start_frac=0.0, nelbo_windows="1,4", eval_stride=0)
# One kind per setting that selects code.
REGIONS = ("iid", "spans", "continuation", "infill")
# fmt: off
KINDS: dict[str, dict[str, Any]] = {
    **{f"loss_{name}": dict(diffusion_loss=name) for name in tg.LOSSES if name != "sedd_uniform"},
    "loss_sedd_uniform": dict(diffusion_loss="sedd_uniform", diffusion_corruption_mode="uniform"),
    **{f"noise_{mode}": dict(diffusion_corruption_mode=mode)
       for mode in ("uniform", "hybrid", "gaussian")},
    **{f"region_{name}": dict(diffusion_regions=name) for name in REGIONS},
    "tasks_mixed": dict(mercury_task_mode="mixed"),
    "self_condition_soft": dict(self_condition="soft", time_embed_dim=4),
    "self_condition_commit": dict(self_condition="commit"),
    "two_passes": dict(diffusion_passes=2),
    "annealed": dict(diffusion_anneal_frac=0.9),
    "causal": dict(diffusion_causal=True, diffusion_shift=False),
    "fixed_ramp": dict(diffusion_rate="fixed", diffusion_ramp="iterations"),
    "strong_parts": dict(
        value_residual=True, bigram_vocab_size=64, ema_decay=0.9, export_scheme="int6+lzma"),
    "gaussian_bigrams": dict(diffusion_corruption_mode="gaussian", bigram_vocab_size=64),
    "no_denoiser": dict(diffusion_loss_weight=0.0),
    "untied": dict(tie_embeddings=False, export_scheme="int6+lzma"),
    "lzma": dict(export_scheme="int6+lzma"),
}
# fmt: on
# Of those compiled; tests/cuda_trace and tests/test_train.py trace every kind of recipe.
COMPILED = ("loss_elbo", "noise_gaussian", "self_condition_soft", "two_passes", "strong_parts")

DRIVER = """
import json, os, sys, traceback
folder, jobs, backend = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
sys.path.insert(0, folder)
import torch
if backend != "none":
    import functools
    torch.compile = functools.partial(torch.compile, backend=backend)
import train_gpt
assert os.path.dirname(train_gpt.__file__) == folder
for name, env in jobs.items():
    before = dict(os.environ)
    os.environ.update(env)
    try:
        status = train_gpt.main()
    except BaseException:
        status = traceback.format_exc()
    os.environ.clear()
    os.environ.update(before)
    print(json.dumps({"kind": name, "status": status}), file=sys.stderr, flush=True)
"""


def clean_env() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k.lower() not in tg.Config.__dataclass_fields__}
    return kept | {"OMP_NUM_THREADS": str(THREADS)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the program."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "train_gpt.py", folder)
    return folder


def run_jobs(
    alone: Path, work: Path, jobs: dict[str, dict[str, str]], backend: str = "none"
) -> None:
    """Run main() for every job in one process; fail with what went wrong."""
    (work / "driver.py").write_text(DRIVER)
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = [
        sys.executable,
        str(work / "driver.py"),
        str(alone),
        str(work / "jobs.json"),
        backend,
    ]
    env = clean_env() | {"TORCHINDUCTOR_CACHE_DIR": str(work / "kernels")}
    if backend == "inductor":  # with `default` it writes code that torch's headers do not declare
        env.pop("ATEN_CPU_CAPABILITY", None)
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"kind"')]
    assert {row["kind"] for row in found} == set(jobs), done.stderr[-2000:]
    assert [row for row in found if row["status"] != 0] == [], done.stderr[-2000:]


def job(work: Path, name: str, data: dict[str, Any], **overrides: Any) -> dict[str, str]:
    values = settings(
        "direct", iterations=STEPS, warmdown_iters=2, **{**ALL, **KINDS[name], **overrides}
    )
    return env_of(values | {"out_dir": work / name, "run_id": name} | data)


def events_of(work: Path, name: str) -> list[dict[str, Any]]:
    lines = (work / name / "logs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_run(work: Path, name: str, windows: Sequence[int] = (1, 4)) -> None:
    """All steps were taken, and the reloaded artifact was scored and decoded both ways."""
    events = events_of(work, name)
    losses = [e["train_loss"] + e["denoise_loss"] for e in events if e["event"] == "train"]
    assert len(losses) == STEPS
    assert all(0 < loss < 50 for loss in losses)
    final, done = (next(e for e in events if e["event"] == kind) for kind in ("final", "done"))
    assert 0 < final["bpb"] < 20
    assert Path(done["artifact"]).is_file()
    modes = {e["mode"] for e in events if e["event"] == "parallel_eval"}
    bounds = tuple(e["window"] for e in events if e["event"] == "nelbo")
    denoises = name != "no_denoiser"
    assert modes == ({"ar_cached", "refine"} if denoises else {"ar_cached"})
    assert bounds == (windows if denoises else ())
    timing = next(e for e in events if e["event"] == "timing")
    parts = [
        v
        for k, v in timing.items()
        if k.endswith("_seconds") and k.split("_")[0] in ("val", "nelbo", "parallel")
    ]
    assert timing["evaluation_seconds"] == pytest.approx(sum(parts), abs=0.1)
    assert timing["evaluation_limit_seconds"] == 600


@pytest.mark.slow
def test_every_kind_of_recipe_runs_in_an_empty_folder(
    alone: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    run_jobs(alone, tmp_path, {name: job(tmp_path, name, data) for name in KINDS})
    for name in KINDS:
        check_run(tmp_path, name)
    assert sorted(path.name for path in alone.iterdir() if path.name != "__pycache__") == [
        "train_gpt.py"
    ]
    start = {"init_from": tmp_path / "no_denoiser" / "final_model.int8.ptz"}
    name = "loss_elbo"
    run_jobs(alone, tmp_path, {name: job(tmp_path, name, data, **start)})
    (start_event,) = [e for e in events_of(tmp_path, name) if e["event"] == "init_from"]
    assert start_event["fresh"] > 0


@pytest.mark.slow
def test_compiled_runs_are_whole_graphs_from_training_to_decoding(
    alone: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    small = dict(compile="1", num_layers=2, diffusion_windows="4")
    jobs = {name: job(tmp_path, name, data, **small) for name in COMPILED}
    run_jobs(alone, tmp_path, jobs, backend="eager")
    for name in COMPILED:
        check_run(tmp_path, name)


@pytest.mark.slow
def test_compiled_kernels_train(alone: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    small = dict(compile="1", num_layers=1, diffusion_windows="4", micro_batches=1)
    small |= dict(nelbo_windows="4")  # one bound: each kernel takes two seconds
    names = COMPILED[:1]
    run_jobs(
        alone,
        tmp_path,
        {name: job(tmp_path, name, data, **small) for name in names},
        backend="inductor",
    )
    for name in names:
        check_run(tmp_path, name, windows=(4,))


@pytest.mark.slow
def test_the_predecessors_variables_select_its_recipe(
    alone: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    sizes = {
        k: v
        for k, v in settings("direct").items()
        if not k.startswith(("diffusion", "recipe", "mercury"))
    }
    sizes |= {
        "iterations": STEPS,
        "preset": "cpu",
        "out_dir": tmp_path / "run",
        "run_id": "run",
    } | data
    del sizes["time_embed_dim"]
    run_jobs(alone, tmp_path, {"run": env_of(sizes) | LEGACY})
    events = events_of(tmp_path, "run")
    values = next(e["values"] for e in events if e["event"] == "config")
    built_in = tg.RECIPES["retrograde"]
    assert values["recipe"] == "retrograde"
    assert {name: values[name] for name in built_in} == built_in
    assert any(e["event"] == "final" for e in events)


@pytest.mark.slow
def test_an_unknown_recipe_says_where_it_looked(
    alone: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    env = clean_env() | env_of(data) | {"RECIPE": "td_late05", "OUT_DIR": str(tmp_path)}
    program = [sys.executable, str(alone / "train_gpt.py")]
    done = subprocess.run(
        program, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "RECIPE='td_late05'" in done.stderr
    assert f"{alone}/scripts/study/ladder.toml (is not there)" in done.stderr
    assert (
        "known: record, ar_record, record_bound, direct, ar, retrograde, mdlm_30_70" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_importing_the_program_does_nothing(alone: Path, tmp_path: Path) -> None:
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); import train_gpt; print(os.listdir())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(alone)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
