"""sweep.py: no finished run is made twice, lost, or passed off as another."""

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
from scripts.study import runlog, sweep
from tests.conftest import ROOT, TINY, env_of

# ==============================================================================
# 1  RUNS -- against a stand-in that trains nothing and does as its orders say
# ==============================================================================

STAND_IN = """
import hashlib, json, os, pathlib, sys, time
name, seed, out = os.environ["RUN_ID"], int(os.environ["SEED"]), pathlib.Path(os.environ["OUT_DIR"])
here = pathlib.Path(__file__)
with open(here.with_name("calls"), "a") as calls:
    print(name[:-9], os.environ["RESUME"], file=calls)
orders = json.loads(here.with_name("orders").read_text())
order = orders.get(name[:-9], "finish")
if order == "locked":
    print("error: OUT_DIR is in use by process 7", file=sys.stderr)
    sys.exit(2)
if order == "crash":
    sys.exit("ValueError: no memory")
(out / "logs").mkdir(parents=True, exist_ok=True)
log = open(out / "logs" / (name + ".jsonl"), "a" if os.environ["RESUME"] == "auto" else "w",
           buffering=1)

def event(kind, **values):
    print(json.dumps({"event": kind} | values), file=log)

(out / "logs" / (name + ".txt")).write_text("the log")
(out / "logs" / "recipe").write_text(os.environ["RECIPE"])
event("header", machine="m", world_size=1, time=time.strftime("%FT%TZ", time.gmtime()),
      sha256=hashlib.sha256(here.read_bytes()).hexdigest())
paths = {key: os.environ[key.upper()] for key in ("data_path", "tokenizer_path")}
values = paths | {"nelbo_samples": int(os.environ.get("NELBO_SAMPLES", 8)), "seed": seed}
values |= {"recipe": os.environ["RECIPE"], "preset": "cpu"}
if order == "other seed":
    values["seed"] = seed + 1
event("config", values=values, source={})
digests = here.with_name("digests")
event("data", **(json.loads(digests.read_text()) if digests.exists() else {}))
event("train", step=3)
if order in ("die", "hang", "killed"):
    if order == "killed":
        os.kill(os.getpid(), 9)
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "checkpoints" / (name + "SUFFIX")).touch()
    here.with_name("running").write_text(str(os.getpid()))
    if order == "hang":
        time.sleep(60)
    os._exit(3)
if order == "error":
    print("error: loss is not finite\\nerror: another rank was lost", file=sys.stderr)
    event("error", reason="loss is not finite")
    sys.exit(2)
event("size", total_bytes=1000 + seed, code_bytes=10, model_bytes=990 + seed)
event("final", val_loss=1.0, val_bpb=float(os.environ["RECIPE"] == "ar") + seed / 100)
if order == "stale":
    text = open(out / "logs" / (name + ".jsonl")).read()
    (out / "logs" / (name + ".jsonl")).write_text(text.replace('"time": "20', '"time": "10'))
event("nelbo", window=16, bpb=3.0 + seed / 100, standard_error=0.1)
event("nelbo", window=1, bpb=2.5, standard_error=0.0)
event("parallel_eval", task="infill", steps=1, span=8, mode="refine", token_acc=0.25,
      tok_per_sec=9.0)
if order != "no result":
    event("done", steps=7, train_seconds=1.5, peak_memory_mib=30)
"""


SUFFIX = tg.Config().checkpoints[0].suffix
STAND_IN = STAND_IN.replace("SUFFIX", SUFFIX)


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
    bench.order(ar_1337="killed")  # before its first checkpoint: the other's is none of its own
    bench.run("ar", code=1)
    bench.order()
    bench.run("ar")
    assert bench.calls() == ["ar_1337 no", "ar_1337 no", "ar_1337 no"]
    (kept,) = (bench.folder("ar") / "checkpoints").iterdir()
    assert kept.name.endswith(f"{SUFFIX}.before")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("error", "loss is not finite (exit status 2"),
        ("crash", "ValueError: no memory (exit status 1"),
        ("no result", "nothing printed (log "),
        ("killed", "nothing printed (ended by SIGKILL"),
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


def test_a_log_of_another_run_is_never_credited_to_a_run(bench: Bench) -> None:
    bench.order(ar_1="other seed")
    end, out = bench.run(*PAIR, code=1)
    assert "SEED=2, not 1" in end["failed"][0]["error"]
    assert end["rows"]["ar"] == {"val_bpb": 1.02, "std": None, "n": 1}
    bench.calls()
    _, out = bench.run(*PAIR, code=2)  # nor is it by the next sweep, which starts nothing
    (log,) = bench.folder("ar_1").glob("logs/*.jsonl")
    assert f"error: log {log} is of another run (SEED=2, not 1); move its folder away" in out
    assert bench.calls() == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "zeros", "header"])
def test_a_run_whose_log_is_damaged_is_run_again(bench: Bench, damage: str) -> None:
    bench.run(*PAIR)
    bench.calls()
    (log,) = bench.folder("ar_1").glob("logs/*.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    lines[3:4] = {"cut": [lines[3][:-9]], "zeros": [bytes(40), lines[3]]}.get(damage, lines[3:4])
    log.write_bytes(b"".join(lines[damage == "header" :]))
    end, out = bench.run(*PAIR)
    assert bench.calls() == ["ar_1 no"]
    assert f"warning: log {log}, line " in out
    assert (end["skipped"], end["rows"]["ar"]["n"]) == (3, 2)


def test_a_log_that_is_older_than_the_run_is_never_its_result(bench: Bench) -> None:
    bench.order(ar_1="stale")
    end, _ = bench.run("ar", "--seeds", "1", code=1)
    assert "is older than this run" in end["failed"][0]["error"]
    assert end["rows"] == {}


def test_what_a_leftover_trainer_prints_is_kept_and_its_lock_is_reported(bench: Bench) -> None:
    bench.order(ar_1="locked")
    _, out = bench.run("ar", "--seeds", "1", code=1)
    folder = bench.folder("ar_1")
    assert "ar seed 1: OUT_DIR is in use by process 7 (exit status 2" in out
    with open(folder / "printed.txt", "a", encoding="utf-8") as leftover:
        print("error: of an earlier run", file=leftover, flush=True)
        _, out = bench.run("ar", "--seeds", "1", code=1)
        assert "ar seed 1: OUT_DIR is in use by process 7 (exit status 2" in out
        print("still at work", file=leftover)
    said = ["error: OUT_DIR is in use by process 7", "error: of an earlier run"]
    printed = (folder / "printed.txt").read_text(encoding="utf-8").splitlines()
    assert printed == [*said, said[0], "still at work"]


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
    (checkpoints / f"{checkpoints.parent.name}{SUFFIX}").touch()
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


@pytest.mark.parametrize("name", ["data", "tokenizer"])
def test_runs_on_data_that_was_made_again_are_not_mixed(bench: Bench, name: str) -> None:
    cfg = tg.Config.from_env(os.environ)[0]
    ours = sweep.check_text(cfg)
    (bench.root / "digests").write_text(json.dumps({f"{name}_sha256": ours[name]}))
    bench.run("ar")
    assert bench.run("ar")[0]["skipped"] == 1
    (bench.root / "digests").write_text(json.dumps({f"{name}_sha256": "0" * 64}))
    end, _ = bench.run("ar", "--seeds", "2", code=1)  # changed while the run read it
    assert f"{name} of SHA-256 {'0' * 12}, not {ours[name][:12]}" in end["failed"][0]["error"]
    (log,) = bench.folder("ar_1337").glob("logs/*.jsonl")
    log.write_text(log.read_text().replace(ours[name], "f" * 64), encoding="utf-8")
    bench.calls()
    _, out = bench.run("ar", code=2)
    assert f"error: log {log} is of another run ({name} of SHA-256 {'f' * 12}, not " in out
    assert bench.calls() == []


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


@pytest.mark.slow
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
# 2  FAULTS -- all named before anything starts
# ==============================================================================


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["defect_caus"],
         "NAME='defect_caus' is unknown; closest: defect_causal, defects"),
        (["ar", "~~~"], "NAME='~~~' is unknown; closest: none"),
        (["defect_nocache"], "NAME='defect_nocache' is left out: it concerns"),
        (["ar", "--set", "NUM_LAYER=2"], "--set='NUM_LAYER' is unknown; closest: NUM_LAYERS"),
        (["ar", "--set", "MATRIX_LR"], "--set MATRIX_LR: must be NAME=VALUE"),
        (["ar", "--seconds", "9", "--set", "MAX_WALLCLOCK_SECONDS=5"],
         "--set MAX_WALLCLOCK_SECONDS=5: --seconds, --steps or another --set sets "
         "MAX_WALLCLOCK_SECONDS=9.0; leave one of them out"),
        (["ar", "--set", "SEED=3"],
         "--set SEED=3: a sweep sets SEED itself; use rows, --seeds and --out"),
        (["ar", "--set", "MODEL_DIM=7"], "MODEL_DIM=7 must be a multiple of 2 x NUM_HEADS=4"),
        (["ar", "--seeds", "1,x"], "SEED='x' must be a whole number (rows: ar)"),
        (["ar", "--steps", "0"], "ITERATIONS=0 must be in [1, "),
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


def test_a_row_that_is_not_known_is_told_with_the_file_of_rows(bench: Bench) -> None:
    _, out = bench.run("~~~", code=2)
    assert out.rstrip().endswith(f"(rows: {tg.LADDER_FILE})")


def test_a_damaged_ladder_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.root / "ladder.toml"
    monkeypatch.setattr(tg, "LADDER_FILE", path)
    for text, said in (
        ("[rows.td_control\n", f"{path} is damaged ("),
        ("rows = 5\n", f"{path} is damaged ("),
        ("ladders = 5\n", f"{path} is damaged (ladders must be a table, not 5); repair it"),
        ("[rows.ar]\nbeta1 = 0.5\n", f"{path}: ar: the recipe is built in; rename the row"),
        ("[rows.x]\nbase = 'ar'\nbeta = 0.5\n[ladders]\nar = ['x']\n",
         f"{path}: x: beta is not a setting; closest: beta2"),
    ):  # fmt: skip
        path.write_text(text, encoding="utf-8")
        assert f"error: {said}" in bench.run("ar", code=2)[1]
    path.write_text("[rows.x]\nbase = 'ar'\nbeta1 = 0.5\n", encoding="utf-8")
    assert bench.run("x")[0]["ran"] == 1  # the other tables may be missing


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


@pytest.mark.slow
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
# 3  THE PROGRAM ITSELF
# ==============================================================================


@pytest.mark.slow
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
