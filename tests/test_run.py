"""What surrounds a run: its log, its lock, its data's identity, memory, signals and streams."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch

import train_gpt as tg
from scripts import common
from tests.conftest import (
    BOS,
    CPU,
    ROOT,
    VOCAB,
    Recorder,
    Tokenizers,
    env_of,
    make_run,
    read_events,
    settings,
    tiny,
    train_lines,
    train_tokenizer,
    wait_for,
    write_shard,
)

Done = subprocess.CompletedProcess[str]
RunMain = Callable[..., Done]
Launch = Callable[..., "subprocess.Popen[str]"]


# ---- log ----


def test_a_lost_or_cut_log_is_written_anew(tmp_path: Path) -> None:
    log = tg.Log(tiny(out_dir=str(tmp_path), run_id="r"), 0, continued=False)
    log.event("note", text="first")
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.rename(path.with_suffix(".moved")),
    ):
        for suffix in (".txt", ".jsonl"):
            damage(log.path.with_suffix(suffix))
        log.event("note", text="next")
    expected = ["note text:first"] + ["note text:next"] * 3
    assert log.path.read_text(encoding="utf-8").splitlines() == expected
    lines = log.path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["first", "next", "next", "next"]


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path) -> None:
    cfg = tiny(out_dir=str(tmp_path / "out"), run_id="r")
    log = tg.Log(cfg, 0, continued=False)
    log.event("note", text="first")
    (tmp_path / "out").rename(tmp_path / "away")
    log.event("note", text="second")
    assert log.path.read_text(encoding="utf-8") == "note text:first\nnote text:second\n"


def test_a_continued_log_never_joins_lines(tmp_path: Path) -> None:
    cfg = tiny(out_dir=str(tmp_path), run_id="r")
    tg.Log(cfg, 0, continued=False).event("note", text="first")
    path = cfg.path("logs", ".jsonl")
    path.write_bytes(path.read_bytes()[:-5])  # as a full disk leaves it
    tg.Log(cfg, 0, continued=True).event("note", text="second")
    cut, whole = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(whole) == {"event": "note", "text": "second"}
    assert '"second"' not in cut


def test_older_logs_of_one_second_are_all_kept(tmp_path: Path) -> None:
    cfg = tiny(out_dir=str(tmp_path), run_id="r")
    for text in ("first", "second", "third", "fourth"):
        tg.Log(cfg, 0, continued=False).event("note", text=text)
        for path in cfg.path("logs", "").parent.glob("r.*"):
            os.utime(path, (1_000_000_000, 1_000_000_000))
    texts = sorted(path.read_text(encoding="utf-8") for path in (tmp_path / "logs").glob("*.txt"))
    assert texts == sorted(f"note text:{text}\n" for text in ("first", "second", "third", "fourth"))


@pytest.mark.slow
@pytest.mark.parametrize("sink", ["closed", "head", "full", "both"])
def test_a_run_outlives_its_standard_output(
    sink: str, data: dict[str, Any], tmp_path: Path
) -> None:
    values = env_of(settings() | data | {"out_dir": tmp_path / "out", "run_id": "r"})
    redirects = {"closed": ">&-", "head": "| head -n 1", "full": ">/dev/full"}
    redirect = (redirects | {"both": "2>&1 | head -n 1"})[sink]
    command = f"{sys.executable} {ROOT / 'train_gpt.py'} {redirect}"
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **values}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert read_events(tmp_path / "out")[-1]["event"] == "done"
    assert (tmp_path / "out" / "checkpoints" / "r.ckpt").exists()


@pytest.mark.slow
def test_a_narrow_encoding_and_a_wide_path_do_not_end_a_run(
    data: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "späte Läufe 日本"
    folder.mkdir()
    tokenizer = folder / "モデル.model"
    tokenizer.write_bytes(Path(data["tokenizer_path"]).read_bytes())
    values = settings() | data | {"out_dir": folder / "out", "tokenizer_path": tokenizer}
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONUTF8": "0"}
    env |= {"PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", **env_of(values)}
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert read_events(folder / "out")[-1]["event"] == "done"


# ---- lock ----


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    cfg = tiny(out_dir=str(tmp_path / "out"), run_id="r")
    with tg.lock_folder(cfg):
        with pytest.raises(tg.UserError) as caught:
            tg.lock_folder(dataclasses.replace(cfg, run_id="another"))
        assert f"OUT_DIR={cfg.out_dir!r} is in use by another run" in str(caught.value)
        assert "stop that run, or set another OUT_DIR" in str(caught.value)
        shutil.rmtree(cfg.path("logs", "").parent, ignore_errors=True)
        with pytest.raises(tg.UserError, match="is in use by another run"):
            tg.lock_folder(cfg)
    with tg.lock_folder(cfg):  # it is free again
        pass


def test_a_file_system_without_locks_is_a_word_not_an_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    cfg = tiny(out_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="flock not supported"), tg.lock_folder(cfg):
        pass


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    cfg = tiny(out_dir=str(tmp_path))
    (tmp_path / ".lock").mkdir()
    with pytest.raises(tg.UserError, match="cannot be written or locked"):
        tg.lock_folder(cfg)


def test_two_runs_do_not_share_a_checkpoint() -> None:
    with pytest.raises(tg.UserError, match=r"RUN_ID='r\.previous' names files"):
        tiny(run_id="r.previous")
    names = {path for run_id in ("r", "r.previous.x") for path in tiny(run_id=run_id).checkpoints}
    assert len(names) == 4


@pytest.mark.slow
def test_a_second_run_in_a_folder_changes_nothing(
    launch: Launch, run_main: RunMain, tmp_path: Path
) -> None:
    first = launch(iterations=100_000, run_id="r", checkpoint_seconds=0.05)
    wait_for(lambda: train_lines(tmp_path / "out") >= 3, first)
    for run_id in ("r", "s"):
        second = run_main(iterations=3, run_id=run_id, resume="auto")
        assert second.returncode == 2
        assert "is in use by another run" in second.stderr
    assert first.poll() is None
    first.kill()  # which releases the lock
    first.wait(timeout=30)
    assert run_main(iterations=3, run_id="s").returncode == 0
    names = {path.name for path in (tmp_path / "out" / "logs").iterdir()}
    assert names == {"r.txt", "r.jsonl", "s.txt", "s.jsonl"}


# ---- identity ----


def test_shards_that_change_while_a_run_reads_them_are_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x_train_0.bin", list(range(60)))
    loader = tg.TokenLoader(tiny(data_path=str(tmp_path)), "train")
    assert loader.rows(0, 1, 16, CPU).tolist() == [list(range(17))]
    for change in (
        lambda: write_shard(path, list(range(60))[::-1]),  # as many bytes, later
        lambda: path.write_bytes(path.read_bytes()[:-10]),
    ):
        change()
        os.utime(path, (time.time() + 5, time.time() + 5))
        with pytest.raises(tg.UserError, match=r"x_train_0\.bin changed while .*RESUME=auto"):
            loader.rows(0, 1, 16, CPU)
    path.unlink()
    with pytest.raises(OSError, match=r"x_train_0\.bin"):
        loader.rows(0, 1, 16, CPU)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)  # which would block
        with pytest.raises(tg.UserError, match=r"x_train_0\.bin changed while"):
            loader.rows(0, 1, 16, CPU)


@pytest.mark.slow
def test_many_shards_need_few_file_handles(tmp_path: Path) -> None:
    for i in range(300):
        write_shard(tmp_path / f"x_train_{i:03d}.bin", [i % 60] * 10)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        f"sys.path.insert(0, {str(ROOT)!r}); import train_gpt as tg;"
        f"cfg = tg.Config(data_path={str(tmp_path)!r}, preset='cpu', train_seq_len=256,"
        " train_batch_tokens=2048, eval_stride=0);"
        "loader = tg.TokenLoader(cfg, 'train'); print(loader.rows(0, 1, 2999).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{sum(i % 60 * 10 for i in range(300))}\n", done.stderr


def make_data(
    folder: Path, tokenizer: Path, texts: list[str], manifest: bool = True
) -> dict[str, Any]:
    """Write shards of some texts and, as prepare_data.py does, their manifest."""
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = [token for text in texts for token in [BOS, *sp.encode(text)]]
    for split in ("train", "val"):
        write_shard(folder / f"x_{split}_0.bin", tokens)
    if manifest:
        files = {}
        for path in sorted(folder.glob("*.bin")):
            files[path.name] = {"tokens": len(tokens), "sha256": sha256(path)}
        num_bytes = sum(len(text.encode()) for text in texts)
        found = {"settings": {}, "files": files, "tokenizer": {"sha256": sha256(tokenizer)}}
        found["splits"] = {"val": {"bytes": num_bytes}}
        (folder / "manifest.json").write_text(json.dumps(found), encoding="utf-8")
    size = sp.vocab_size()
    return {"data_path": str(folder), "tokenizer_path": str(tokenizer), "vocab_size": size}


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def checked(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    cfg = tiny(**values)
    loaders = (tg.TokenLoader(cfg, "train"), tg.TokenLoader(cfg, "val"))
    return tg.check_data(cfg, *loaders, tg.ByteCounter(cfg))


def test_data_and_tokenizer_have_an_identity(
    tmp_path: Path, tokenizers: Tokenizers, texts: list[str]
) -> None:
    values = make_data(tmp_path, tokenizers.identity, texts)
    facts, warnings = checked(values)
    assert warnings == []
    assert facts["tokenizer_sha256"] == sha256(tokenizers.identity)
    assert facts["val_bytes"] == facts["source_bytes"] == sum(len(t.encode()) for t in texts)
    again, _ = checked(values)
    assert again == facts
    make_data(tmp_path, tokenizers.identity, [*texts, "one more"])
    assert checked(values)[0]["data_sha256"] != facts["data_sha256"]


@pytest.fixture
def other_tokenizer(tmp_path: Path, texts: list[str]) -> Path:
    """A tokenizer of the same size, trained on the same texts read backwards."""
    train_tokenizer(tmp_path / "other.model", [text[::-1] for text in texts])
    return tmp_path / "other.model"


def test_shards_of_another_tokenizer_are_refused_by_the_manifest(
    tmp_path: Path, tokenizers: Tokenizers, other_tokenizer: Path, texts: list[str]
) -> None:
    values = make_data(tmp_path / "shards", tokenizers.identity, texts)
    with pytest.raises(tg.UserError) as caught:
        checked(values | {"tokenizer_path": str(other_tokenizer)})
    theirs, ours = sha256(tokenizers.identity)[:12], sha256(other_tokenizer)[:12]
    for named in (f"SHA-256 {theirs}, not {ours}", str(other_tokenizer), "DATA_PATH="):
        assert named in str(caught.value)


def test_shards_of_another_tokenizer_are_suspected_without_a_manifest(
    tmp_path: Path, tokenizers: Tokenizers, other_tokenizer: Path, texts: list[str]
) -> None:
    for tokenizer in tokenizers:
        folder = tmp_path / tokenizer.stem
        values = make_data(folder, tokenizer, texts, manifest=False)
        assert checked(values)[1] == []
        (warning,) = checked(values | {"tokenizer_path": str(other_tokenizer)})[1]
        assert "may be of another tokenizer" in warning


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("change", ["replaced", "missing", "more"])
def test_shards_that_are_not_the_manifests_are_named(
    change: str,
    scanned: bool,
    tmp_path: Path,
    tokenizers: Tokenizers,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not scanned:  # of a large split names and ends are known
        monkeypatch.setattr(tg, "SCAN_TOKENS", 10)
    values = make_data(tmp_path, tokenizers.identity, texts)
    path = tmp_path / ("x_train_1.bin" if change == "more" else "x_train_0.bin")
    if change == "missing":
        path.rename(tmp_path / "y_train_0.bin")
    else:
        write_shard(path, [5] * 500)
    if change == "replaced" and not scanned:
        checked(values)
        return
    with pytest.raises(tg.UserError, match=rf"{path.name}.* not as its manifest\.json says"):
        checked(values)


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", '{"settings": {}}', "[" * 100_000, '{"settings": 1, "files": 2}']
)
def test_a_damaged_manifest_is_named(
    text: str, tmp_path: Path, tokenizers: Tokenizers, texts: list[str]
) -> None:
    values = make_data(tmp_path, tokenizers.identity, texts, manifest=False)
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    if text == "[]":  # another program's
        assert checked(values)[1] == []
        return
    with pytest.raises(tg.UserError, match=r"manifest\.json is damaged .*prepare_data"):
        checked(values)


def test_bytes_beside_those_of_the_source_are_said_before_training(
    tmp_path: Path, texts: list[str]
) -> None:
    """A normalising tokenizer writes a fraction in three characters: both counts are logged."""
    tokenizer = tmp_path / "nfkc.model"
    train_tokenizer(tokenizer, texts, normalization_rule_name="nmt_nfkc")
    signs = ["take ½ cup of this and Ⅷ of that " * 20] * 4
    facts, (warning,) = checked(make_data(tmp_path, tokenizer, signs))
    source = sum(len(text.encode()) for text in signs)
    assert facts["source_bytes"] == source
    assert facts["val_bytes"] != source
    for count in (facts["val_bytes"], source):
        assert f"{count:,}" in warning


def test_a_split_without_text_is_refused(tmp_path: Path, tokenizers: Tokenizers) -> None:
    values = make_data(tmp_path, tokenizers.identity, ["some text"] * 20, manifest=False)
    write_shard(tmp_path / "x_val_0.bin", [BOS] * 50)
    with pytest.raises(tg.UserError, match="no byte of text in its validation split"):
        checked(values)


def without_pieces(path: Path, *pieces: str, **options: Any) -> Path:
    """Write a tokenizer whose pieces of these spellings are renamed."""
    model = path.read_bytes()
    for piece in pieces:
        data = piece.encode()
        assert model.count(b"\x0a" + bytes([len(data)]) + data) == 1
        model = model.replace(b"\x0a" + bytes([len(data)]) + data, b"\x0a\x03\xe1\x9a\x80")
    found = path.with_suffix(".changed")
    found.write_bytes(model)
    return found


def test_a_tokenizer_without_a_space_would_count_three_bytes_for_it(
    tmp_path: Path, texts: list[str]
) -> None:
    train_tokenizer(tmp_path / "a.model", texts)
    path = without_pieces(tmp_path / "a.model", "\u2581")
    with pytest.raises(tg.UserError, match="no piece for a space: it counts three bytes for one"):
        tg.ByteCounter(tiny(vocab_size=VOCAB, tokenizer_path=str(path)))


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path, texts: list[str]) -> None:
    train_tokenizer(tmp_path / "a.model", texts, bos_id=-1)
    with pytest.raises(tg.UserError, match="no BOS piece, which opens documents"):
        tg.ByteCounter(tiny(vocab_size=VOCAB, tokenizer_path=str(tmp_path / "a.model")))


def trained(cfg: tg.Config, **identity: str) -> tg.TrainState:
    run = make_run(cfg)
    run.identity = {"data_sha256": "d", "tokenizer_sha256": "t", "program_sha256": "p"} | identity
    state = tg.TrainState(cfg, run, tg.TokenLoader(cfg, "train"))
    state.resume()
    return state


def test_a_checkpoint_knows_data_tokenizer_and_program(
    data: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r", resume="auto")
    trained(cfg).save()
    assert trained(cfg).run.log.of("warning") == []  # type: ignore[attr-defined]
    for name in ("data_sha256", "tokenizer_sha256"):
        with pytest.raises(tg.UserError, match=f"does not fit: {name.upper()} '.' -> 'x'"):
            trained(cfg, **{name: "x"})
    (warning,) = trained(cfg, program_sha256="x").run.log.of("warning")  # type: ignore[attr-defined]
    assert "written by another train_gpt.py" in warning["reason"]


def test_the_checkpoint_before_the_last_is_kept_and_offered(
    data: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r", resume="auto")
    state = trained(cfg)
    for step in (1, 2, 3):
        state.step = step
        state.save()
    last, before = cfg.checkpoints
    assert trained(cfg).step == 3
    saved = bytearray(last.read_bytes())
    saved[len(saved) // 2] ^= 1
    last.write_bytes(saved)
    with pytest.raises(tg.UserError, match=r"r\.ckpt is damaged \(its checksum .* the one before"):
        trained(cfg)
    last.unlink()
    assert trained(cfg).step == 2
    before.write_bytes(before.read_bytes()[:-1])
    with pytest.raises(tg.UserError, match=r"r\.previous\.ckpt is damaged .* begin anew"):
        trained(cfg)


@pytest.mark.parametrize(
    "change",
    [
        dict(step=-1), dict(step=9), dict(step=2**70), dict(step=True), dict(step="1"),
        dict(step=1.0), dict(seconds=-1.0), dict(seconds="1"), dict(seconds=1), dict(step=None),
        dict(seconds=float("nan")), dict(config=5),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_a_checkpoint_are_checked(
    change: dict[str, Any], data: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r", resume="auto")
    trained(cfg).save()
    about, tensors = tg.unpack_tensors(cfg.checkpoints[0].read_bytes())
    cfg.checkpoints[0].write_bytes(tg.pack_tensors(about | change, tensors))
    with pytest.raises(tg.UserError, match=r"checkpoint .*r\.ckpt is damaged"):
        trained(cfg)


def test_tensors_of_a_checkpoint_are_checked(data: dict[str, Any], tmp_path: Path) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r", resume="auto")
    trained(cfg).save()
    about, tensors = tg.unpack_tensors(cfg.checkpoints[0].read_bytes())
    assert {name.split(":")[1] for name in tensors if ":" in name} == {
        "step", "exp_avg", "exp_avg_sq", "momentum",
    }  # fmt: skip
    for name in ("tok_emb", "tok_emb:exp_avg", "tok_emb:step", "blocks.0.fc.weight:momentum"):
        w = tensors[name]
        for changed in (None, w.double(), w.flatten()[:0], torch.full_like(w, torch.inf)):
            others = {key: v for key, v in tensors.items() if key != name}
            others |= {} if changed is None else {name: changed}
            cfg.checkpoints[0].write_bytes(tg.pack_tensors(about, others))
            with pytest.raises(tg.UserError, match=name):
                trained(cfg)
    cfg.checkpoints[0].write_bytes(tg.pack_tensors(about, tensors | {"more": w}))
    with pytest.raises(tg.UserError, match="more"):
        trained(cfg)


# ---- memory, scores, command line, signals ----


@pytest.mark.parametrize(
    "values",
    [
        dict(model_dim=2**17), dict(num_layers=10_000, model_dim=4096), dict(mlp_mult=10**9),
        dict(bigram_vocab_size=10**11), dict(look_ahead=10**12), dict(time_embed_dim=10**11),
        dict(train_batch_tokens=2**38), dict(parallel_eval_examples=10**11),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_fit_is_named_before_it_is_allocated(values: dict[str, Any]) -> None:
    cfg = tiny(**values)
    with pytest.raises(
        tg.UserError, match=r"out of memory: at least [\d,.]+ GiB, cpu has"
    ) as caught:
        tg.check_memory(cfg, make_run(cfg), 1000)
    for name, value in values.items():
        assert f"{name.upper()}={value}" in str(caught.value)


def test_tiny_and_published_sizes_fit() -> None:
    tg.check_memory(tiny(), make_run(tiny()), 1000)
    small = tg.Config.from_env({"PRESET": "cpu"})[0]
    tg.check_memory(small, make_run(small), 10**6)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    for nats in (float("nan"), float("inf")):
        with pytest.raises(tg.UserError, match="score is not finite"):
            tg.bits_per_byte(nats, 10.0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA out of memory); lower"),
        (MemoryError(), "out of memory ()"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "TRAIN_BATCH_TOKENS=64"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_ends_a_run_is_explained(
    error: Exception, text: str, data: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path / "new"), run_id="r")
    with pytest.raises(tg.UserError, match="no checkpoint yet"), tg.Run.start(cfg):
        raise error
    cfg = dataclasses.replace(cfg, out_dir=str(tmp_path))
    tg.atomic_write(cfg.checkpoints[0], b"", "checkpoint")
    with pytest.raises(tg.UserError) as caught, tg.Run.start(cfg):
        raise error
    assert text in str(caught.value)
    assert "RESUME=auto" in str(caught.value)
    (event,) = [e for e in read_events(tmp_path) if e["event"] == "error"]
    assert event["reason"] == str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compiled_names_the_way_out(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(*_: Any) -> Any:
        raise RuntimeError("no kernel")

    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r")
    tg.atomic_write(cfg.checkpoints[0], b"", "checkpoint")
    function = torch.compile(lambda x: x + 1, backend=backend)
    monkeypatch.setattr(tg.Run, "compile", True)
    with pytest.raises(tg.UserError) as caught, tg.Run.start(cfg):
        function(torch.ones(2))
    assert "no kernel" in str(caught.value)
    assert "set COMPILE=0; the last checkpoint is kept" in str(caught.value)


def test_a_fault_of_the_program_is_not_explained_away(data: dict[str, Any], tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="shapes differ"),
        tg.Run.start(tiny(**data, out_dir=str(tmp_path))),
    ):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("argument", ["--iterations=3", "SEED=42", "x", "-s"])
def test_an_argument_is_an_error(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tg.main([argument]) == 2
    assert f"error: {argument!r}: settings are environment variables" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_lists_every_setting(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tg.main([argument]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{f.name.upper()} " in out for f in dataclasses.fields(tg.Config))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_line(
    number: signal.Signals, data: dict[str, Any], tmp_path: Path
) -> None:
    before = signal.getsignal(number)

    def run() -> None:
        with tg.Run.start(tiny(**data, out_dir=str(tmp_path))):
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(tg.UserError, match=f"ended by {number.name}; no checkpoint yet") as caught:
        run()
    assert caught.value.status == 128 + number
    assert signal.getsignal(number) == before


class Interrupting:
    """Gets a signal while it is destroyed, where Python drops exceptions."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_a_signal_that_python_drops_ends_a_run_at_the_next_batch(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, evaluated = list[object](), list[tg.Pair]()
    hook = shown.append
    monkeypatch.setattr(sys, "unraisablehook", hook)
    cfg = tiny(**data, out_dir=str(tmp_path))
    val, starts = tg.TokenLoader(cfg, "val"), torch.arange(2) * cfg.train_seq_len

    def run() -> None:
        with tg.Run.start(cfg) as run:
            interrupting = [Interrupting()]
            interrupting.clear()
            evaluated.extend(tg.validation_batches(run, val, starts))

    with pytest.raises(tg.UserError, match="ended by SIGTERM") as caught:
        run()
    assert caught.value.status == 128 + signal.SIGTERM
    assert (shown, evaluated) == ([], [])
    assert sys.unraisablehook is hook


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_an_interrupt_while_libraries_load_ends_in_silence(launch: Launch) -> None:
    process = launch()
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "numpy" in maps.read_text(encoding="utf-8"), process)  # torch comes next
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_nothing_is_imported_before_an_interrupt_is_expected() -> None:
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    before = source[: source.index("signal.SIG_DFL")]
    assert re.findall(r"^(?:import|from) (\w+)", before, re.MULTILINE) == ["__future__", "signal"]


def test_an_interrupt_before_training_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("TokenLoader", "near_misses"):
        with monkeypatch.context() as patch:
            patch.setattr(tg, name, interrupted)
            patch.setattr("os.environ", env_of(settings()))
            assert tg.main() == 130
        assert capsys.readouterr().err == "error: interrupted before training\n"


def test_names_close_to_a_setting_are_told_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = env_of(settings(data_path="nowhere")) | {"DATA_PAHT": "data", "SEEED": "1"}
    monkeypatch.setattr("os.environ", env)
    assert tg.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "warning: DATA_PAHT is not a setting; did you mean DATA_PATH?",
        "warning: SEEED is not a setting; did you mean SEED?",
    ]
    assert lines[2].startswith("error: DATA_PATH='nowhere' holds no")


def test_names_close_to_a_setting_are_told_once(
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(*_: object) -> None:
        raise tg.UserError("it ends")

    env = env_of(settings() | data | {"out_dir": tmp_path}) | {"SEEED": "1"}
    monkeypatch.setattr("os.environ", env)
    monkeypatch.setattr(tg, "execute", end)
    assert tg.main() == 2
    told, error = capsys.readouterr()
    assert told.count("SEEED is not a setting; did you mean SEED?") == 1
    assert error == "error: it ends\n"


def test_a_gpu_without_bf16_computes_in_fp32_and_says_so(
    monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r")
    monkeypatch.setattr(tg, "machine_name", lambda _: "old")
    for supported in (False, True):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, s=supported, **__: s)
        assert tg.has_bf16(torch.device("cuda")) == supported
        log = Recorder()
        identity = {"program_sha256": ""}
        tg.Run(cfg, 0, 1, torch.device("cuda"), log, identity=identity).header({})
        assert log.of("header")[0]["precision"] == ("bf16" if supported else "fp32")
        reasons = [event["reason"] for event in log.of("warning")]
        assert any("no bf16" in reason for reason in reasons) == (not supported)
    assert not tg.has_bf16(torch.device("cpu"))


def test_attention_never_runs_on_cudnn(data: dict[str, Any], tmp_path: Path) -> None:
    """Its masked backward pass may give NaN, and it plans a kernel for every new shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    with tg.Run.start(tiny(**data, out_dir=str(tmp_path))):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    common.pick_device("auto")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_missing_compiler_is_a_word_not_an_end(
    monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.setattr(tg.shutil, "which", lambda _: None)
    cfg = tiny(**data, compile="1", out_dir=str(tmp_path), run_id="r")
    with tg.Run.start(cfg) as run:
        assert not run.compile
        run.header({})
    reasons = [e["reason"] for e in read_events(tmp_path) if e["event"] == "warning"]
    assert any("COMPILE=1 finds no C++ compiler" in reason for reason in reasons)


def test_spans_are_drawn_alike_however_many_are_allowed() -> None:
    """More spans than tokens change nothing and take no memory."""
    t, keys = torch.tensor([[0.5, 1.0]]), tg.split_key(torch.arange(2)[None], 7)
    few = tiny(diffusion_span_len=2, diffusion_spans_per_seq=16)
    many = dataclasses.replace(few, diffusion_spans_per_seq=10**12)
    assert tg.region_mask("spans", t, keys, 16, few).equal(
        tg.region_mask("spans", t, keys, 16, many)
    )


def test_numpy_reads_what_a_container_says(tmp_path: Path) -> None:
    """The layout is what its description says: two sizes, a digest, JSON, raw numbers."""
    w = torch.arange(6.0).view(2, 3)
    packed = tg.pack_tensors({"a": 1}, {"w": w})
    header = int.from_bytes(packed[40:48], "little")
    found = json.loads(packed[48 : 48 + header])
    assert found == {"about": {"a": 1}, "tensors": [["w", "<f4", [2, 3]]]}
    numbers = np.frombuffer(packed, "<f4", offset=48 + header)
    assert numbers.tolist() == w.flatten().tolist()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "t.model", "a.ptz"])
def test_a_pipe_in_place_of_a_file_does_not_block(
    name: str, data: dict[str, Any], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / name)
    if name == "manifest.json":
        assert tg.read_manifest(tiny(data_path=str(tmp_path))) == {}
    elif name == "t.model":
        with pytest.raises(tg.UserError, match=r"t\.model.* is no SentencePiece model"):
            tg.ByteCounter(tiny(**data | {"tokenizer_path": str(tmp_path / name)}))
    else:
        with pytest.raises(tg.UserError, match=r"a\.ptz is missing, damaged or not ours"):
            tg.load_artifact(tmp_path / name, CPU)


def test_what_a_signal_turns_into_is_still_its_end(data: dict[str, Any], tmp_path: Path) -> None:
    """np.fromfile, for one, makes a TypeError of the exception that a signal raises in it."""

    def run() -> None:
        with tg.Run.start(tiny(**data, out_dir=str(tmp_path))):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except KeyboardInterrupt:
                raise TypeError("expected str") from None

    with pytest.raises(tg.UserError, match="rank 0: ended by SIGTERM") as caught:
        run()
    assert caught.value.status == 143


def test_a_folder_in_place_of_a_checkpoint_is_an_error(
    data: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r", resume="auto")
    cfg.checkpoints[0].mkdir(parents=True)
    with pytest.raises(tg.UserError, match=r"r\.ckpt is damaged"):
        trained(cfg)


def test_a_checkpoint_stands_in_its_place_at_every_instant(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r", resume="auto")
    state, plain = trained(cfg), os.replace
    state.save()

    def replace(*paths: Any) -> None:
        assert cfg.checkpoints[0].exists()
        plain(*paths)
        assert cfg.checkpoints[0].exists()

    monkeypatch.setattr("os.replace", replace)
    state.save()
    assert all(path.exists() for path in cfg.checkpoints)
