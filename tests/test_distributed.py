"""Several processes: the same run as with one, and a clear end when one of them dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from tests.bench import artifacts
from tests.conftest import (
    ROOT,
    env_of,
    randomise,
    read_events,
    settings,
    tiny,
    train_lines,
    wait_for,
)

Launch = Callable[..., subprocess.Popen[str]]


def torchrun(ranks: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]


@pytest.mark.slow
def test_the_number_of_ranks_moves_no_result(
    run_main: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    events = {}
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        done = run_main(
            torchrun(ranks),
            out_dir=out,
            micro_batches=4,
            iterations=6,
            val_loss_every=3,
            nelbo_windows="4",
        )
        assert done.returncode == 0, done.stderr
        events[ranks] = read_events(out)  # one log, written by rank 0

    def values(ranks: int, name: str, *keys: str) -> list[list[float]]:
        return [[event[key] for key in keys] for event in events[ranks] if event["event"] == name]

    assert [event["event"] for event in events[1]] == [event["event"] for event in events[2]]
    for name, *keys in (
        ("train", "step", "train_loss", "denoise_loss"),
        ("val", "step", "loss", "bpb", "tokens", "bytes"),
        ("final", "loss", "bpb", "tokens", "bytes"),
        ("nelbo", "loss", "bpb", "standard_error", "tokens", "bytes"),
    ):
        alone, together = values(1, name, *keys), values(2, name, *keys)
        assert len(alone) == {"train": 6, "val": 2, "final": 1, "nelbo": 1}[name]
        for a, b in zip(alone, together, strict=True):
            assert b == pytest.approx(a, rel=1e-4)
    header = next(event for event in events[2] if event["event"] == "header")
    assert header["world_size"] == 2


def test_ranks_that_do_not_divide_the_batch_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    for name, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    cfg = tiny(micro_batches=4, out_dir=str(tmp_path / "out"))
    with (
        pytest.raises(tg.UserError, match="WORLD_SIZE=3 must divide MICRO_BATCHES=4"),
        tg.Run.start(cfg),
    ):
        pass
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "world_size", "local_rank"),
    [
        ("1", "", ""),
        ("", "2", ""),
        ("0", "1", ""),
        ("1", "1", "1"),
        ("2", "2", "0"),
        ("0", "2", "2"),
        ("0", "two", "0"),
        ("-1", "2", "0"),
        ("0", "0", "0"),
        ("0", "9" * 30, "0"),
        ("\u00b2", "4", "0"),
    ],
)
def test_launcher_variables_that_do_not_fit_are_named(
    rank: str, world_size: str, local_rank: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}
    for name, value in texts.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tg.UserError, match="torchrun sets them") as caught:
        tg.launcher_place(tiny())
    for name, value in texts.items():
        assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("host", "port"), [("", "29500"), ("localhost", ""), ("localhost", "x"), ("localhost", "99999")]
)
def test_a_missing_address_of_rank_0_is_named(
    host: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": host}
    for name, value in (ranks | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tg.UserError, match="port and host of rank 0; torchrun sets them") as caught:
        tg.launcher_place(tiny())
    assert f"MASTER_PORT={port!r}, MASTER_ADDR={host!r}" in str(caught.value)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_launcher_variable_is_named(
    missing: str, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
    for name, value in (given | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    assert tg.launcher_place(tiny()) == {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}
    if empty:
        monkeypatch.setenv(missing, "")
    else:
        monkeypatch.delenv(missing)
    with pytest.raises(tg.UserError, match=f"{missing}=''.* torchrun sets them"):
        tg.launcher_place(tiny())


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:80")  # of a service of that name
    assert tg.launcher_place(tiny()) == {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def run_ranks(folder: Path, data: dict[str, Any], **differ: Any) -> list[tuple[int, str]]:
    """Run two ranks by hand, the second with other settings; their statuses and errors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    own = dict(**data, out_dir=str(folder), run_id="r", micro_batches=4, iterations=2)
    processes = []
    for rank in range(2):
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        env = inherited | env_of(settings(**own | (differ if rank else {})))
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "train_gpt.py")]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
        )
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(p.returncode, text) for p, text in zip(processes, errors, strict=True)]


@pytest.mark.slow
def test_ranks_of_other_settings_or_data_end_with_what_differs(
    data: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(data["data_path"], other)
    (shard, *_) = other.glob("*_train_*.bin")
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    for differ, text in (
        (dict(matrix_lr=0.5), "MATRIX_LR 0.02 -> 0.5"),
        (dict(nelbo_windows="1"), "NELBO_WINDOWS '1,4' -> '1'"),
        (dict(data_path=str(other)), "DATA_SHA256 '"),
    ):
        for status, error in run_ranks(tmp_path / "out", data, **differ):
            assert status == 2, error
            assert "rank 1 differs from rank 0: " in error
            assert text in error
            assert "DATA_PATH" not in error
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_ranks_start_from_copies_of_one_artifact(data: dict[str, Any], tmp_path: Path) -> None:
    cfg = tiny(**data)
    for name, std in (("a", 0.3), ("b", 0.3), ("c", 0.4)):
        weights = dict(randomise(tg.GPT(cfg), std=std).named_parameters())
        artifacts.save(tmp_path / f"{name}.ptz", weights, cfg)
    first = data | {"init_from": str(tmp_path / "a.ptz")}
    same = run_ranks(tmp_path / "same", first, init_from=str(tmp_path / "b.ptz"))
    assert [status for status, _ in same] == [0, 0], same
    for status, error in run_ranks(tmp_path / "out", first, init_from=str(tmp_path / "c.ptz")):
        assert status == 2, error
        assert "rank 1 differs from rank 0: INIT_FROM '" in error


@pytest.mark.slow
def test_ranks_that_do_not_see_one_checkpoint_end(data: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(tmp_path / "one", data, out_dir=str(tmp_path / "one"))
    assert list((tmp_path / "one" / "checkpoints").iterdir())
    ranks = run_ranks(tmp_path / "one", data | {"resume": "auto"}, out_dir=str(tmp_path / "two"))
    for status, error in ranks:
        assert status == 2
        assert "rank 1 differs from rank 0: " in error
        assert "STEP 2 -> 0" in error


def worker(parent: int, rank: int) -> int:
    """Process id of a rank that torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1] == str(parent)
            env = folder.joinpath("environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is not ours to look at
            continue
        if ours and f"LOCAL_RANK={rank}".encode() in env:
            return int(folder.name)
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_message(launch: Launch, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        micro_batches=4, iterations=100_000, checkpoint_seconds=0.05, run_id="r"
    )
    process = launch(torchrun(2), **settings)
    wait_for(lambda: train_lines(tmp_path / "out") >= 5, process)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    told = [line for line in err.splitlines() if "RESUME=auto" in line]
    assert told, err
    assert any("rank 0: lost rank 1 (process " in line or "rank 0: ended" in line for line in told)
    saved = (tmp_path / "out" / "checkpoints" / "r.ckpt").read_bytes()
    assert tg.unpack_tensors(saved)[0]["step"] > 0
