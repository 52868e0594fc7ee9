"""package.py: a right record becomes a folder that works alone, and a wrong one is refused by name.

    pytest tests/study/test_package.py

Records of a toy program show each refusal; one record of real runs shows the whole path.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts.study import package
from tests.conftest import ROOT, env_of, facts, outcome, settings, write_shard

SEEDS = (1337, 42, 2026)
MACHINE = "NVIDIA H100 80GB HBM3"
RULE = "=" * 100
FINAL = "final_int8_zlib_roundtrip_exact val_loss:3.00000000 val_bpb:2.00000000"
FIELDS = [
    *("author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb"),
    *("val_bpb_std", "seeds", "seed_results", "bytes_total", "bytes_code", "hardware"),
    "pytorch_version",
]
GIVEN = ("value_residual", "seed", "data_path", "tokenizer_path")  # settings of the environment
SEED_FIELDS = ["val_loss", "val_bpb", "artifact_bytes", "steps", "train_seconds", "eval_seconds"]

# Writes what the real program writes, and what it saw of its environment.
TOY = f"""\
import hashlib, json, os, pathlib
source = pathlib.Path(__file__).read_text()
out = pathlib.Path(os.environ["OUT_DIR"])
(out / "logs").mkdir(parents=True)
heads = sorted(path.name for path in pathlib.Path(os.environ["DATA_PATH"]).iterdir())
events = [
    dict(event="header", sha256=hashlib.sha256(source.encode()).hexdigest(), machine="m", time="t"),
    dict(event="config", source={{}},
         values=dict(recipe="direct", preset="cpu", seed=1, data_path="x")),
    dict(event="size", total_bytes=2, code_bytes=1, model_bytes=1),
    dict(event="final", loss=3.0, bpb=2.0),
    dict(event="done", steps=int(os.environ["ITERATIONS"])),
]
text = "".join(json.dumps(event) + "\\n" for event in events)
(out / "logs" / "four_steps.jsonl").write_text(text)
(out / "logs" / "four_steps.txt").write_text(source + "=" * 100 + "\\n{FINAL}\\n")
seen = pathlib.Path(os.environ["TOKENIZER_PATH"]).with_name("seen.json")
seen.write_text(json.dumps(dict(os.environ) | dict(heads=heads, beside=sorted(os.listdir(".")))))
"""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Record:
    """The files that three runs of a program leave, and the package that is requested."""

    def __init__(self, root: Path, program: str = TOY) -> None:
        self.root, self.program = root, root / "project" / "train_gpt.py"
        self.program.parent.mkdir()
        self.program.write_text(program, encoding="utf-8")
        self.program.with_name("requirements.txt").write_text("torch\n", encoding="utf-8")
        self.data, self.logs = root / "data", root / "logs"
        self.logs.mkdir()
        write_shard(self.data / "x_train_000000.bin", range(1, 200))
        write_shard(self.data / "x_train_000001.bin", range(3, 202))
        write_shard(self.data / "x_val_000000.bin", range(2, 100))
        (root / "tokenizer.model").write_bytes(b"model")
        for number, seed in enumerate(SEEDS):
            self.write(seed, self.events(seed, 1.2 + number / 100))

    def events(self, seed: int, bpb: float = 1.2) -> dict[str, dict[str, Any]]:
        """The events of one finished run, by name."""
        folder, code = self.root / f"direct_{seed}", len(self.program.read_bytes())
        values: dict[str, Any] = {"recipe": "direct", "preset": "8xh100", "seed": seed}
        values |= {"run_id": folder.name, "out_dir": str(folder), "resume": "no", "matrix_lr": 0.02}
        values |= {"value_residual": True, "diffusion_loss_weight": 0.1, "bigram_vocab_size": 2048}
        values |= {
            "data_path": str(self.data),
            "tokenizer_path": str(self.root / "tokenizer.model"),
        }
        folder.mkdir(exist_ok=True)
        (folder / "final_model.int6.ptz").write_bytes(b"x" * 1000)
        source = dict.fromkeys(values, "default") | dict.fromkeys(GIVEN, "env")
        digest = sha256(self.program.read_text(encoding="utf-8"))
        return {
            "header": {
                **{"time": "2026-03-04T05:06:07Z", "machine": MACHINE, "world_size": 8},
                **{"torch": "2.13.0", "sha256": digest},
            },
            "config": {"values": values, "source": source},
            "size": {"total_bytes": code + 1000, "code_bytes": code, "model_bytes": 1000},
            "final": {"loss": bpb * 1.7, "bpb": bpb, "scheme": "int6+lzma", "seconds": 12.5},
            "timing": {"train_seconds": 600.04, "evaluation_seconds": 123.4},
            "done": {
                **{"steps": 9000, "train_seconds": 600.04, "peak_memory_mib": 300},
                **{"artifact": str(folder / "final_model.int6.ptz")},
            },
        }

    def write(self, seed: int, events: dict[str, dict[str, Any]]) -> None:
        lines = [json.dumps({"event": name, **values}) for name, values in events.items()]
        path = self.logs / f"direct_{seed}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        text = f"{self.program.read_text(encoding='utf-8')}{RULE}\n{FINAL}\n"
        path.with_suffix(".txt").write_text(text, encoding="utf-8")

    def change(self, seed: int, event: str, **values: Any) -> None:
        """Write the log of a seed anew with other values of one event."""
        events = self.events(seed)
        events[event] |= values
        self.write(seed, events)

    def request(self, **changes: Any) -> package.Request:
        fixed: dict[str, Any] = dict(logs=self.logs, out=self.root / "out", seeds=SEEDS)
        return package.Request(**fixed | {"recipe": "direct", "program": self.program} | changes)

    def refused(self, **changes: Any) -> str:
        """Require a refusal that leaves nothing behind; return what it says."""
        out = self.root / "out"
        before = sorted(out.rglob("*")) if out.exists() else []
        with pytest.raises(tg.UserError) as raised:
            package.write_package(self.request(**changes))
        assert (sorted(out.rglob("*")) if out.exists() else []) == before
        return str(raised.value)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path)


def test_a_right_record_becomes_exactly_the_expected_folder(record: Record) -> None:
    found = package.write_package(record.request())
    folder = record.root / "out" / "2026-03-04_Text_diffusion_exactly_autoregressive"
    assert found["package"] == str(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    logs = [f"train_seed{seed}.log" for seed in SEEDS]
    names = ["README.md", "requirements.txt", "submission.json", "train_gpt.py", *logs]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names) == found["files"]
    assert (folder / "train_gpt.py").read_bytes() == record.program.read_bytes()
    for seed in SEEDS:
        log = (folder / f"train_seed{seed}.log").read_bytes()
        assert log == (record.logs / f"direct_{seed}.txt").read_bytes()
    assert found["four_steps"]["steps"] == 4
    assert found["four_steps"]["final_line"] == FINAL


def test_submission_has_the_fields_of_the_challenge_and_no_other(record: Record) -> None:
    folder = Path(package.write_package(record.request())["package"])
    entry = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert list(entry) == FIELDS
    assert entry["seeds"] == list(SEEDS)
    assert entry["val_bpb"] == pytest.approx(1.21)
    assert entry["val_bpb_std"] == pytest.approx(0.01)
    assert entry["val_loss"] == pytest.approx(1.21 * 1.7)
    code = len(record.program.read_bytes())
    assert (entry["bytes_total"], entry["bytes_code"]) == (code + 1000, code)
    assert (entry["hardware"], entry["pytorch_version"]) == (f"8 x {MACHINE}", "2.13.0")
    assert (entry["date"], entry["track"]) == ("2026-03-04", "10min_16mb")
    assert list(entry["seed_results"]) == [str(seed) for seed in SEEDS]
    for result in entry["seed_results"].values():
        assert list(result) == SEED_FIELDS
    first = entry["seed_results"]["1337"]
    values = {"val_loss": 2.04, "val_bpb": 1.2, "artifact_bytes": code + 1000, "steps": 9000}
    assert first == values | {"train_seconds": 600.04, "eval_seconds": 123.4}


def test_the_submission_of_the_repository_has_these_fields_too() -> None:
    entry = json.loads((ROOT / "submission.json").read_text(encoding="utf-8"))
    assert list(entry) == FIELDS


def test_readme_has_the_table_of_seeds_and_the_compliance_statement(record: Record) -> None:
    folder = Path(package.write_package(record.request())["package"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    size = f"{len(record.program.read_bytes()) + 1000:,}"
    assert f"| 42 | 2.057000 | 1.210000 | {size} | 9,000 | 600.0 | 123.4 |" in text
    assert f"| mean | 2.057000 | 1.210000 | {size} | 9,000 | 600.0 | 123.4 |" in text
    assert "| std | 0.017000 | 0.010000 | 0 | 0 | 0.0 | 0.0 |" in text
    assert "RECIPE=direct" in text
    assert str(record.root) not in text
    assert "VALUE_RESIDUAL=1" in text
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in text
    for rule in ("Strict causal prefix", "*input* tokens only", "Single pass", "16,000,000"):
        assert rule in text
    assert "at most 123.4 seconds, all scores together (limit 600)" in text
    assert "No training on validation data" in text
    assert f"8 x {MACHINE}, PyTorch 2.13.0" in text


def test_four_steps_see_the_folder_alone(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NUM_LAYERS", "77")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    package.write_package(record.request(tiny=True))
    seen = json.loads((record.root / "seen.json").read_text(encoding="utf-8"))
    assert not {"PYTHONPATH", "SOME_TOKEN"} & seen.keys()
    assert (seen["NUM_LAYERS"], seen["BIGRAM_VOCAB_SIZE"], seen["DEVICE"]) == ("2", "64", "cpu")
    assert (seen["RECIPE"], seen["VALUE_RESIDUAL"], seen["ITERATIONS"]) == ("direct", "1", "4")
    assert "MATRIX_LR" not in seen  # a default of the recipe or preset
    assert seen["heads"] == ["head_train_000000.bin", "head_val_000000.bin"]
    assert len(seen["beside"]) == 4 + len(SEEDS)
    assert not Path(seen["OUT_DIR"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import helper_of_scripts\n", "No module named 'helper_of_scripts'"),
        (TOY.replace('"logs" / "four_steps.txt"', '"logs" / "x.txt"'), "four_steps.txt"),
        (TOY.replace(FINAL, "nothing"), "no final_ line"),
        (TOY.replace("bpb=2.0", "bpb=None"), "its score is not a finite number"),
        (TOY + 'pathlib.Path("left.bin").touch()\n', "four steps left ['left.bin'] inside"),
        (TOY.replace("source.encode()", "b''"), f"ran a program of sha256 {sha256('')}, not"),
        ("import os, time\nos.fork()\ntime.sleep(60)\n", "took more than --timeout=2 s"),
    ],
)
def test_a_folder_that_does_not_work_alone_is_refused(
    tmp_path: Path, source: str, said: str
) -> None:
    began = time.monotonic()
    assert said in Record(tmp_path, source).refused(timeout=2.0)
    assert time.monotonic() - began < 30  # what sleeps is ended


def test_missing_and_repeated_seeds_are_refused(record: Record) -> None:
    (record.logs / "direct_42.jsonl").unlink()
    said = record.refused()
    assert "--seeds=1337,42,2026" in said
    assert "no log of recipe 'direct' with seed 42 (it has seeds 1337,2026)" in said
    for suffix in (".jsonl", ".txt"):
        shutil.copyfile(record.logs / f"direct_1337{suffix}", record.logs / f"again{suffix}")
    said = record.refused(seeds=(1337, 2026))
    assert "seed 1337 has 2 logs (again.jsonl, direct_1337.jsonl); only one may count" in said
    assert "has no log of recipe 'ar' with seed 1337" in record.refused(recipe="ar")
    assert "is not a folder" in record.refused(logs=record.root / "nowhere")


def test_an_unfinished_log_is_refused(record: Record) -> None:
    events = record.events(42)
    del events["done"]
    record.write(42, events)
    said = record.refused()
    assert "direct_42.jsonl: unfinished, last logged step 0; only a finished run" in said


@pytest.mark.parametrize("name", ["bpb", "loss"])
def test_a_score_that_is_not_finite_is_refused(record: Record, name: str) -> None:
    record.change(42, "final", **{name: None})
    said = record.refused()
    assert "direct_42.jsonl" in said
    assert "not a finite number" in said


def test_a_stale_log_is_refused_with_both_hashes(record: Record) -> None:
    old = sha256(TOY)
    changed = TOY + "# changed\n"
    record.program.write_text(changed, encoding="utf-8")
    said = record.refused()
    assert said.count("stale log") == len(SEEDS)
    log = record.logs / "direct_42.txt"
    assert f"stale log {log}: it embeds a program of sha256 {old}" in said
    assert f"{record.program} has {sha256(changed)}" in said


def test_a_log_that_embeds_another_program_than_its_header_says_is_refused(record: Record) -> None:
    log = record.logs / "direct_42.txt"
    other = TOY.replace("ITERATIONS", "OTHER")
    log.write_text(f"{other}{RULE}\n", encoding="utf-8")
    said = record.refused()
    assert f"{log}: it embeds a program of sha256 {sha256(other)}, its header says" in said
    log.write_text(TOY, encoding="utf-8")
    assert f"log {log} embeds no program" in record.refused()
    log.unlink()
    assert f"log {log} cannot be read" in record.refused()


def test_a_run_that_was_resumed_by_another_program_is_refused(record: Record) -> None:
    path = record.logs / "direct_42.jsonl"
    first = json.dumps({"event": "header", "sha256": "0" * 64, "time": "x", "machine": "m"})
    path.write_text(f"{first}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    assert f"its header says {'0' * 64}; both must be one program" in record.refused()


def test_mixed_seeds_are_refused_and_the_settings_named(record: Record) -> None:
    values = record.events(42)["config"]["values"]
    record.change(42, "config", values=values | {"matrix_lr": 0.03, "resume": "auto"})
    said = record.refused()
    row = "MATRIX_LR is 0.02 (seed 1337), 0.03 (seed 42), 0.02 (seed 2026)"
    assert f"mixed settings: {row}; seeds of one record share all but seed, run_id" in said
    assert len(said.splitlines()) == 1  # RESUME may differ


def test_mixed_machines_are_refused(record: Record) -> None:
    record.change(42, "header", torch="2.9.0")
    assert "mixed settings: header torch is '2.13.0' (seed 1337), '2.9.0'" in record.refused()


@pytest.mark.parametrize("name", ["data", "tokenizer"])
def test_seeds_of_other_data_or_another_tokenizer_are_refused(record: Record, name: str) -> None:
    for seed, digest in zip(SEEDS, ("aa", "aa", "bb"), strict=True):
        events = record.events(seed)
        record.write(seed, events | {"data": {f"{name}_sha256": digest}})
    row = f"SHA-256 of {name} is 'aa' (seed 1337), 'aa' (seed 42), 'bb' (seed 2026)"
    assert f"mixed settings: {row}" in record.refused()
    record.write(2026, record.events(2026))
    assert "'unknown' (seed 2026)" in record.refused()


def test_data_or_a_tokenizer_that_is_not_the_logs_is_refused(
    record: Record, data: dict[str, Any], tokenizers: Any
) -> None:
    cfg = tg.Config(**settings(**data))
    splits = tg.TokenLoader(cfg, "train"), tg.TokenLoader(cfg, "val")
    facts = tg.check_data(cfg, *splits, tg.ByteCounter(cfg))[0]
    for seed in SEEDS:
        events = record.events(seed)
        events["config"]["values"] |= settings(**data, seed=seed)
        digests = {f"{name}_sha256": facts[f"{name}_sha256"] for name in ("data", "tokenizer")}
        record.write(seed, events | {"data": digests})
    assert package.checked_runs(record.request())
    said = record.refused(tokenizer=tokenizers.nmt_nfkc)
    assert f"{tokenizers.nmt_nfkc} has SHA-256 " in said
    assert f"the logs say {digests['tokenizer_sha256']} of their tokenizer" in said
    other = record.root / "other"
    for split, tokens in (("train", range(5, 99)), ("val", range(4, 99))):
        write_shard(other / f"x_{split}_0.bin", tokens)
    said = record.refused(data=other)
    assert f"{other} has SHA-256 " in said
    assert f"the logs say {digests['data_sha256']} of their data" in said
    assert "data of the logs must be checked" in record.refused(tokenizer=record.program)


@pytest.mark.parametrize("text", ["", "x", "[]", '{"files": 3}', '{"files": {"a": 1}}', "[" * 9999])
def test_a_damaged_manifest_is_named(record: Record, text: str) -> None:
    (record.data / "manifest.json").write_text(text, encoding="utf-8")
    assert f"{record.data / 'manifest.json'} is damaged (" in record.refused()


def test_too_many_bytes_are_refused(record: Record) -> None:
    record.change(42, "size", total_bytes=16_000_001)
    said = record.refused()
    assert "direct_42.jsonl: submission of 16,000,001 bytes" in said
    assert "exceeds 16,000,000" in said


def test_an_artifact_that_is_missing_or_of_another_run_is_refused(record: Record) -> None:
    artifact = record.root / "direct_42" / "final_model.int6.ptz"
    artifact.write_bytes(b"x")
    assert f"artifact {artifact} has 1 bytes, not the 1,000 of the log" in record.refused()
    artifact.unlink()
    assert f"artifact {artifact} is missing" in record.refused()


def test_code_bytes_of_another_program_are_refused(record: Record) -> None:
    record.change(42, "size", code_bytes=5)
    assert "direct_42.jsonl: code_bytes=5, but its program has" in record.refused()


def test_a_long_evaluation_is_refused(record: Record) -> None:
    record.change(42, "timing", evaluation_seconds=600.5)
    said = record.refused()
    assert "direct_42.jsonl: evaluation took 600.5 s, more than 600" in said
    assert "evaluation took 600.5" in record.refused(track=package.NON_RECORD)
    events = record.events(42)
    del events["timing"]
    record.write(42, events)
    assert "evaluation_seconds of its timing event is None" in record.refused()


def test_a_long_training_is_refused_on_the_ten_minute_track(record: Record) -> None:
    for seed in SEEDS:
        record.change(seed, "done", train_seconds=600.2)  # 9,000 steps: 0.067 s each
    said = record.refused()
    assert said.count("training took 600.2 s, more than the 600 of track 10min_16mb") == 3
    assert package.write_package(record.request(track=package.NON_RECORD))["seeds"] == list(SEEDS)


def test_other_hardware_is_refused_on_the_ten_minute_track(record: Record) -> None:
    for seed in SEEDS:
        record.change(seed, "header", world_size=4)
    said = record.refused()
    assert f"it ran on 4 x {MACHINE}, track 10min_16mb needs 8 x H100" in said
    for seed in SEEDS:
        record.change(seed, "header", machine="NVIDIA H200")
    assert "it ran on 8 x NVIDIA H200, track 10min_16mb needs 8 x H100" in record.refused()
    assert package.write_package(record.request(track=package.NON_RECORD))["seeds"] == list(SEEDS)


def test_overlap_of_train_and_validation_data_is_refused(record: Record) -> None:
    val, train = record.data / "x_val_000000.bin", record.data / "x_train_000002.bin"
    train.symlink_to(val)
    said = "x_train_000002.bin and x_val_000000.bin hold the same tokens"
    assert f"DATA_PATH={record.data}: train and validation data overlap: {said}" in record.refused()
    train.unlink()
    shutil.copyfile(val, train)
    assert said in record.refused()
    train.unlink()
    both = record.data / "x_train_val_0.bin"
    write_shard(both, range(5, 90))
    assert f"overlap: {both.name} is read as both" in record.refused()
    both.unlink()
    rows = {"x_train_000000.bin": {"sha256": "aa"}, "x_val_000000.bin": {"sha256": "aa"}}
    manifest = record.data / "manifest.json"
    manifest.write_text(json.dumps({"files": rows}), encoding="utf-8")
    assert f"{manifest}: train and validation data overlap: both list sha256 aa" in record.refused()
    manifest.unlink()
    val.unlink()
    assert f"DATA_PATH={record.data} holds no *_val_*.bin" in record.refused()


def test_a_damaged_log_is_named(record: Record) -> None:
    path = record.logs / "direct_42.jsonl"
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace('"event": "size"', '"event": size'), encoding="utf-8")
    assert f"log {path}, line 3: not JSON from character 11 on" in record.refused()
    path.write_text(good.replace('"code_bytes"', '"code"'), encoding="utf-8")
    assert "no code_bytes in a size event" in record.refused()
    path.write_text(good + '{"event": "tr', encoding="utf-8")  # cut off after `done`: nothing lost
    assert package.write_package(record.request())["seeds"] == list(SEEDS)


def test_the_head_of_a_shard_is_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_shard(tmp_path / "whole.bin", range(100))
    package.write_head(whole, tmp_path / "all.bin")
    assert (tmp_path / "all.bin").read_bytes() == whole.read_bytes()
    monkeypatch.setattr(package, "HEAD_TOKENS", 30)
    package.write_head(whole, tmp_path / "head.bin")
    expected = write_shard(tmp_path / "expected.bin", range(30))
    assert (tmp_path / "head.bin").read_bytes() == expected.read_bytes()


def test_a_package_is_never_overwritten(record: Record) -> None:
    folder = Path(package.write_package(record.request())["package"])
    (folder / "README.md").write_text("mine", encoding="utf-8")
    assert f"{folder} exists; a package is never overwritten" in record.refused()
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert package.write_package(record.request(date="2026-03-05"))["package"] != str(folder)
    assert "--date='soon' must be a date" in record.refused(date="soon")


def test_all_faults_are_said_at_once(record: Record) -> None:
    record.change(42, "size", total_bytes=16_000_001)
    record.change(2026, "timing", evaluation_seconds=601.0)
    shutil.copyfile(record.data / "x_val_000000.bin", record.data / "x_train_9.bin")
    assert len(record.refused().splitlines()) == 3


def test_the_command_names_faults_and_ends_with_2(
    record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"--logs={record.logs}", f"--out={record.root / 'out'}", "--recipe=direct"]
    argv = [*paths, f"--program={record.program}", "--author=A", "--github-id=b", "--name=C d"]
    found = facts(outcome(package.main, argv, capsys))
    entry = json.loads((Path(found["package"]) / "submission.json").read_text(encoding="utf-8"))
    assert (entry["author"], entry["github_id"], entry["name"]) == ("A", "b", "C d")
    assert found["package"].endswith("2026-03-04_C_d")
    called = outcome(package.main, [*argv, "--seeds=1,42"], capsys)
    assert called[:2] == (2, "")
    assert called[2].startswith("error: --seeds=1,42: ")
    assert outcome(package.main, [*argv, "--seeds=x"], capsys)[0] == 2


# ==============================================================================
# REAL RUNS -- the program itself, three seeds of four steps
# ==============================================================================


@pytest.mark.slow
def test_real_runs_become_a_package_that_trains_reloads_and_scores_alone(
    tmp_path: Path, data: dict[str, Any], launch: Callable[..., subprocess.Popen[str]]
) -> None:
    fixed = {
        "iterations": 4,
        "eval_stride": 0,
        "parallel_eval_examples": 0,
        "bigram_vocab_size": 64,
    }
    started = {}
    for seed in SEEDS:
        own = {"seed": seed, "run_id": f"seed{seed}", "out_dir": tmp_path / str(seed)}
        started[seed] = launch(env={"RECIPE": "record"}, **own, **fixed)
    for seed, run in started.items():
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        for log in (tmp_path / str(seed) / "logs").iterdir():
            (tmp_path / "logs").mkdir(exist_ok=True)
            shutil.copyfile(log, tmp_path / "logs" / log.name)
    logs, out = tmp_path / "logs", tmp_path / "out"
    request = package.Request(logs, out, SEEDS, track=package.NON_RECORD)
    found = package.write_package(request)
    folder = Path(found["package"])
    assert (folder / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    tried = found["four_steps"]
    assert tried["steps"] == 4
    assert f"val_bpb:{tried['val_bpb']:.8f}" in tried["final_line"]
    assert tried["final_line"].startswith("final_int6_")  # the strength of the recipe
    entry = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert list(entry) == FIELDS
    assert all(value is not None for name, value in entry.items() if name != "github_id")
    assert {result["steps"] for result in entry["seed_results"].values()} == {4}
    text = (folder / "README.md").read_text(encoding="utf-8")
    given = env_of(settings(**fixed))
    assert f"NUM_LAYERS={given['NUM_LAYERS']}" in text
