"""scripts/study/record.py: the plan is what a user would type; tests/smoke.sh rehearses it on two
processes.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train_gpt as tg
from scripts.study import package, record
from tests.conftest import ROOT, facts, outcome
from tests.study.test_sweep import started


def planned(argv: list[str], env: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    steps = record.steps_of(record.parse_args(argv), env)
    return [
        (" ".join(step.command).replace(f"{record.SCRIPTS}/", ""), step.settings) for step in steps
    ]


def test_the_record_is_data_three_seeds_the_split_of_bytes_and_a_report() -> None:
    data, sweep, export, table = planned(["8xh100"], {})
    assert data[0].endswith("prepare_data.py --source fineweb --train-shards 80 --out data/fineweb")
    assert sweep[0].endswith(
        "sweep.py record --seeds 1337,42,2026 --seconds 600.0 --nproc 8 --out out/record_8xh100"
    )
    levels = "--levels 31,27,23,19 --out out/record_8xh100/export.json"
    assert f"bench/export.py CHECKPOINT:record:1337 {levels}" in export[0]
    assert "--submission out/record_8xh100/submission.json --write" in table[0]
    settings = {
        "PRESET": "8xh100",
        "DATA_PATH": "data/fineweb",
        "TOKENIZER_PATH": "data/fineweb/tokenizer.model",
    }
    assert data[1] == settings
    assert sweep[1] == settings


def test_source_and_variant_are_handed_to_the_data_and_set_the_vocabulary() -> None:
    data, sweep, *_ = planned(["8xh100", "--variant", "sp8192", "--repo", "a/b"], {})
    source = "--source fineweb --train-shards 80 --variant sp8192 --repo a/b"
    assert data[0].endswith(f"prepare_data.py {source} --out data/fineweb_sp8192")
    paths = {
        "DATA_PATH": "data/fineweb_sp8192",
        "TOKENIZER_PATH": "data/fineweb_sp8192/tokenizer.model",
    }
    assert (paths | {"VOCAB_SIZE": "8192"}).items() <= sweep[1].items()
    data, *_ = planned(["cpu", "--source", "fineweb", "--variant", "sp4096"], {})
    assert (
        "--source fineweb --train-shards 80 --variant sp4096 --out data/fineweb_sp4096" in data[0]
    )
    data, sweep, *_ = planned(["1xgpu", "--source", "files 'my books/*.txt' --val-percent 5"], {})
    assert data[0].endswith(
        "prepare_data.py --source files my books/*.txt --val-percent 5 --out data/files"
    )
    assert "VOCAB_SIZE" not in sweep[1]
    with pytest.raises(
        tg.UserError, match=r"--variant=sp8192: DATA_PATH=mine names the data already; unset one"
    ):
        planned(["8xh100", "--variant", "sp8192"], {"DATA_PATH": "mine"})


@pytest.mark.parametrize(
    ("argv", "track", "tiny"),
    [
        (["8xh100"], package.TEN_MINUTES, False),
        (["8xh100", "--seconds", "900"], package.NON_RECORD, False),
        (["8xh100", "--rehearse"], package.NON_RECORD, True),
        (["cpu"], package.NON_RECORD, True),
    ],
)
def test_a_package_is_made_of_the_record_runs(
    argv: list[str],
    track: str,
    tiny: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = list[package.Request]()
    monkeypatch.setattr(record, "steps_of", lambda *_: [])
    monkeypatch.setattr(record, "check", lambda *_: None)
    monkeypatch.setattr(
        package, "write_package", lambda request: asked.append(request) or {"made": 1}
    )
    (tmp_path / "submission.json").write_text('{"val_bpb": 1.5}', encoding="utf-8")
    options = ["--out", str(tmp_path), "--seeds", "3,4", "--package", str(tmp_path / "p")]
    found = facts(outcome(record.main, [*argv, *options], capsys))
    assert (found["val_bpb"], found["package"]) == (1.5, {"made": 1})
    (request,) = asked
    assert request == package.Request(
        tmp_path / "logs", tmp_path / "p", (3, 4), track=track, recipe=record.RECIPE, tiny=tiny
    )


def test_a_package_that_is_refused_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "steps_of", lambda *_: [])
    (tmp_path / "submission.json").write_text("{}", encoding="utf-8")
    (tmp_path / "logs").mkdir()
    argv = ["cpu", "--out", str(tmp_path), "--seeds", "3,4", "--package", str(tmp_path / "p")]
    status, out, err = outcome(record.main, argv, capsys)
    assert (status, out) == (2, "")
    assert "error: --seeds=3,4: " in err
    assert "with seed 3, 4 (it has seeds none)" in err


def test_baselines_go_first() -> None:
    steps = planned(
        ["1xgpu", "--seconds", "600", "--seeds", "1", "--out", "x"], {"DATA_PATH": "mine"}
    )
    assert len(steps) == 4  # nothing is downloaded
    (naive, plain), (strong, same), *_ = steps
    assert "sweep.py ar retrograde direct --seeds 1 --seconds 600.0 --nproc 1 --out x" in naive
    assert "sweep.py record --seeds 1 --seconds 600.0 --nproc 1 --out x" in strong
    assert plain == same == {"PRESET": "1xgpu"}
    assert len(planned(["1xgpu", "--baselines", ""], {"DATA_PATH": "mine"})) == 3


def test_a_rehearsal_needs_no_compiler_and_can_be_shared_by_two_processes() -> None:
    data, sweep, export, _ = planned(["8xh100", "--rehearse"], {})
    assert "--source stdlib" in data[0]
    assert "sweep.py record --seeds 1337,42,2026 --steps 4 --nproc 2" in sweep[0]
    assert "--levels 31,27,23,19" in export[0]
    cpu = {"PRESET": "cpu", "DEVICE": "cpu"}
    assert cpu.items() | {("COMPILE", "0"), ("MICRO_BATCHES", "2")} <= sweep[1].items()
    mine = {"DATA_PATH": "mine", "COMPILE": "1", "MICRO_BATCHES": "4"}
    assert planned(["8xh100", "--rehearse"], mine)[0][1] == cpu  # the environment's stand


def test_the_levels_of_the_export_are_those_of_the_scheme_of_the_environment() -> None:
    export = planned(["cpu"], {"DATA_PATH": "mine", "EXPORT_SCHEME": "int8+zlib"})[2]
    assert "--levels 127,111,95,79 " in export[0]


@pytest.mark.parametrize(
    ("protocol", "env", "rows"),
    [("cpu", {}, "256"), ("8xh100", {}, "4096"), ("cpu", {"NELBO_SEQUENCES": "7"}, "7")],
)
def test_the_bounds_of_the_export_have_the_rows_that_the_preset_has_time_for(
    protocol: str, env: dict[str, str], rows: str
) -> None:
    steps = planned([protocol], env | {"DATA_PATH": "mine"})
    (export,) = (settings for command, settings in steps if "bench/export.py" in command)
    assert export["NELBO_SEQUENCES"] == rows


def test_the_checkpoint_is_that_of_a_finished_run_of_this_protocol(tmp_path: Path) -> None:
    args = record.parse_args(["cpu", "--out", str(tmp_path), "--seconds", "7", "--seeds", "42,1"])
    env = {"PRESET": "cpu"}
    budget = {"MAX_WALLCLOCK_SECONDS": "7"}
    made = {}
    for name, changes in (
        ("plain", {"VALUE_RESIDUAL": "0"}),
        ("longer", {"MAX_WALLCLOCK_SECONDS": "8"}),
        ("mine", {}),
    ):
        cfg, source = tg.Config.from_env(
            env | budget | {"SEED": "42", "RECIPE": "record"} | changes
        )
        run_id = f"record_42_{cfg.path('', '').name[-8:]}"
        cfg = dataclasses.replace(cfg, run_id=run_id, out_dir=str(tmp_path))
        log = tg.Log(cfg, 0, continued=False)
        log.event("config", table="", values=dataclasses.asdict(cfg), source=source)
        made[name] = tmp_path / run_id / "checkpoints" / cfg.checkpoints[0].name
        made[name].parent.mkdir(parents=True)
        made[name].touch()
    assert len(set(made.values())) == 3
    with pytest.raises(tg.UserError, match="holds no checkpoint"):
        record.file_of("CHECKPOINT:record:42", args, env)  # it is not finished
    logged = sorted((tmp_path / "logs").glob("*.jsonl"))
    assert len(logged) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "read_log", lambda path: SimpleNamespace(why_left_out=""))
        assert record.file_of("CHECKPOINT:record:42", args, env) == str(made["mine"])
        artifact = made["mine"].parents[1] / "final_model.int6.ptz"
        assert record.file_of("ARTIFACT:record:42", args, env) == str(artifact)
        assert record.file_of("HEAD:record:42", args, env) == str(artifact.with_suffix(".head"))
        result = tmp_path / "logs" / f"{made['mine'].stem}_x.json"
        assert record.file_of("RESULT:record:42:x", args, env) == str(result)
        assert record.file_of("--rows", args, env) == "--rows"
        with pytest.raises(tg.UserError, match="holds no checkpoint"):
            record.file_of("HEAD:record:1", args, env)  # a seed that was not run


def test_on_a_cpu_every_seed_gets_a_head_and_scores_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["cpu", "--seeds", "7,8", "--out", str(tmp_path)]
    steps = planned(argv, {"DATA_PATH": "mine"})
    heads = [command for command, _ in steps if ":record:" in command and "export" not in command]
    assert [command.split()[1].split("/")[-1] for command in heads] == [
        *("chain.py", "passes.py", "decode.py", "decode.py")
    ] * 2
    last = "--steps 600 --device cpu --out HEAD:record:7"
    assert heads[0].endswith(f"chain.py ARTIFACT:record:7 {last}")
    assert ["HEAD:record:7" in c for c in heads] == [True] * 4 + [False] * 4
    assert [c.split()[-1].removeprefix("RESULT:record:8:") for c in heads[4:]] == [
        *("HEAD:record:8", "parallel_bpb", "decode_0.0", "decode_0.8")
    ]
    steps = planned([*argv, "--baselines", "ar,record_bound,gidd_20"], {"DATA_PATH": "mine"})
    fits = [command.split()[2] for command, _ in steps if "chain.py" in command]
    assert fits == [f"ARTIFACT:{name}:{n}" for name in ("record_bound", "record") for n in (7, 8)]
    assert not any("HEAD" in c for c, _ in planned(["1xgpu"], {"DATA_PATH": "mine"}))
    args, called = record.parse_args(["cpu", "--out", str(tmp_path)]), list[Any]()
    monkeypatch.setattr(record, "file_of", lambda part, *_: part)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: called.append(command))
    made, out = tmp_path / "model.ptz", tmp_path / "there.json"
    made.touch()
    out.touch()
    os.utime(made, (1, 1))
    step = record.Step(["python", "a", str(made), "--out", str(out)], {}, once=True)
    record.run_step(step, args, {})
    assert not called  # what is done is kept
    os.utime(out, (0, 0))  # older than what it is made of
    for again in (step, step._replace(once=False), step._replace(command=["python", "--out", "x"])):
        with pytest.raises(AttributeError):  # there is no process to wait for
            record.run_step(again, args, {})
    assert len(called) == 3


def test_a_plan_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_PATH", raising=False)
    called = outcome(record.main, ["8xh100", "--plan"], capsys)
    expected = {"protocol": "8xh100", "out": "out/record_8xh100", "planned": True, "val_bpb": None}
    assert facts(called) == expected
    assert called[2].count("PRESET=8xh100") == 4
    assert not list(tmp_path.iterdir())


def test_a_machine_without_the_devices_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    status, out, err = outcome(record.main, ["8xh100"], capsys)
    assert (status, out) == (2, "")
    assert (
        "PROTOCOL=8xh100 needs 8 CUDA devices, 2 found; run it there, or try the path with "
        "--rehearse" in err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_step_that_fails_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    argv = ["8xh100", "--rehearse", "--baselines", "", "--out", str(tmp_path / "out")]
    status, out, err = outcome(record.main, argv, capsys)
    assert (status, out) == (2, "")
    assert "sweep.py: exit status 2, see above" in err
    assert not (tmp_path / "out" / "README.md").exists()  # the steps after it are not taken
    assert {how.preset for how in record.PROTOCOLS.values()} <= set(tg.PRESETS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_and_says_what_is_done(tmp_path: Path, number: int) -> None:
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))"
    steps = [["-c", "pass"], ["-c", f"{child}; import time; time.sleep(60)"], ["-c", "pass"]]
    code = f"""
import signal, sys
from types import SimpleNamespace
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from scripts.common import run_command
from scripts.study import record
def body():
    steps = [record.Step([sys.executable, *step], {{}}) for step in {steps!r}]
    args = SimpleNamespace(out=Path({str(tmp_path)!r}), plan=False, protocol="cpu")
    with record.interruptible():
        record.run_steps(steps, args, {{}})
sys.exit(run_command(body, resume=record.RESUME))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        pid = started(tmp_path / "pid")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (130, 128 + number)
    assert "-c was ended; 1 of 3 steps are done\n" in err
    assert "error: interrupted; what is done is kept: rerun the command to resume\n" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
