"""Several processes: the same run as with one, and a clear end when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from tests.conftest import read_events, tiny

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
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
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
        tg.launcher_ranks(tiny())
    for name, value in texts.items():
        assert f"{name}={value!r}" in str(caught.value)


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


def steps_of(log: Path) -> int:
    return log.read_text(encoding="utf-8").count('"train"') if log.exists() else 0


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_message(launch: Launch, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        micro_batches=4, iterations=100_000, checkpoint_seconds=0.05, run_id="r"
    )
    process = launch(torchrun(2), **settings)
    log, deadline = tmp_path / "out" / "logs" / "r.jsonl", time.monotonic() + 60
    while steps_of(log) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    told = [line for line in err.splitlines() if "RESUME=auto" in line]
    assert told, err
    assert any("rank 0: lost rank 1 (process " in line or "rank 0: ended" in line for line in told)
    saved = (tmp_path / "out" / "checkpoints" / "r.ckpt").read_bytes()
    assert tg.unpack_tensors(saved)[0]["step"] > 0
