"""The artifact: what it loses is bounded, what it weighs is what is said, and nothing damaged or
foreign gets in.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from tests.conftest import (
    CPU,
    ROOT,
    THREADS,
    Recorder,
    make_run,
    randomise,
    recorded,
    settings,
    tiny,
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> tg.GPT:
    """A tiny model with the matrices quantised that a model of the real size has quantised."""
    monkeypatch.setattr(tg, "KEEP_FLOAT_NUMEL", 100)
    return randomise(tg.GPT(tiny()))


def big(**overrides: Any) -> tg.GPT:
    """A model with matrices that are quantised."""
    return randomise(tg.GPT(tiny(**{"model_dim": 256, "mlp_mult": 4, **overrides})))


def weights_of(model: tg.GPT) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def save(path: Path, model: tg.GPT) -> Recorder:
    log = Recorder()
    tg.save_artifact(path, weights_of(model), model.cfg, "abc", log)
    return log


def fault_of(path: Path) -> str:
    with pytest.raises(tg.UserError) as caught:
        tg.load_artifact(path, CPU)
    message = str(caught.value)
    assert message.startswith(f"artifact {path} is missing, damaged or not ours")
    assert "copy or export it again" in message
    return message


@pytest.mark.parametrize("levels", [127, 63, 7])
def test_rows_are_rounded_to_half_a_step(levels: int) -> None:
    w = torch.randn(40, 64) * torch.logspace(-6, 3, 40)[:, None]  # small rows keep their own scale
    w[7] = 0
    q, scale = tg.quantize_rows(w, levels)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float16)
    assert q.abs().max() == levels
    assert q[7].eq(0).all()
    error = (q * scale.float()[:, None] - w).abs()
    # Half the distance of subnormal fp16 scales, times the largest level.
    coarse = levels * 2.0**-25
    assert (error <= scale.float()[:, None] * 0.5001 + coarse).all()
    normal = w.abs().amax(1) > levels * 2.0**-14
    assert normal.sum() > 20
    assert (error <= scale.float()[:, None] * 0.5001)[normal].all()
    torch.testing.assert_close(
        scale.float()[normal], w.abs().amax(1)[normal] / levels, rtol=1e-3, atol=0
    )


def test_what_comes_back_is_what_was_saved(tmp_path: Path, model: tg.GPT) -> None:
    log = save(tmp_path / "a.ptz", model)
    loaded, tokenizer_sha256 = tg.load_artifact(tmp_path / "a.ptz", CPU)
    assert loaded.cfg == model.cfg
    assert tokenizer_sha256 == "abc"
    assert not loaded.training
    found, quantized = weights_of(loaded), 0
    assert found.keys() == weights_of(model).keys()
    for name, w in weights_of(model).items():
        error = (found[name] - w).abs()
        assert found[name].dtype == torch.float32
        if w.ndim == 2 and w.numel() > 100:
            assert (error <= w.abs().amax(1, keepdim=True) / 127 * 0.5005).all(), name
            quantized += 1
        else:
            assert (error <= w.abs() * 2.0**-11 + 2.0**-25).all(), name
    assert quantized >= 8
    (size,) = log.of("size")
    code_bytes = (ROOT / "train_gpt.py").stat().st_size
    model_bytes = (tmp_path / "a.ptz").stat().st_size
    assert (size["code_bytes"], size["model_bytes"]) == (code_bytes, model_bytes)
    assert size["total_bytes"] == code_bytes + model_bytes
    assert (size["limit_bytes"], size["levels"]) == (16_000_000, 127)
    save(tmp_path / "b.ptz", loaded)
    again, _ = tg.load_artifact(tmp_path / "b.ptz", CPU)
    for name, w in weights_of(again).items():  # a second trip loses next to nothing more
        torch.testing.assert_close(w, found[name], rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_a_fresh_process_scores_the_artifact_alike(tmp_path: Path, data: dict[str, Any]) -> None:
    cfg = tiny(**data)
    save(tmp_path / "a.ptz", randomise(tg.GPT(cfg)))
    program = f"""
import sys, json, torch
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as tg
torch.set_num_threads({THREADS})

class Quiet(tg.Log):
    def __init__(self):
        self.active = False

model, _ = tg.load_artifact(tg.Path("a.ptz"), torch.device("cpu"))
run = tg.Run(model.cfg, 0, 1, torch.device("cpu"), Quiet())
loader, counter = tg.TokenLoader(model.cfg, "val"), tg.ByteCounter(model.cfg)
found = [tg.evaluate_exact(model, run, loader, counter)]
found += [tg.evaluate_bound(model, run, loader, counter, size) for size in (1, 4)]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded, _ = tg.load_artifact(tmp_path / "a.ptz", CPU)
    loader, counter = tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg)
    run = make_run(cfg)
    here = [tg.evaluate_exact(loaded, run, loader, counter)]
    here += [tg.evaluate_bound(loaded, run, loader, counter, size) for size in (1, 4)]
    assert json.loads(done.stdout) == here  # to the last bit


@pytest.mark.parametrize("keep", [0, 1, 2, 0.1, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, model: tg.GPT, keep: float) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    fault_of(path)


def test_a_flipped_bit_is_refused(tmp_path: Path, model: tg.GPT) -> None:
    path, draw = tmp_path / "a.ptz", random.Random(0)
    save(path, model)
    data, expected = path.read_bytes(), weights_of(tg.load_artifact(path, CPU)[0])
    bits = list(range(8 * len(data)))
    unnoticed = 0
    for bit in {*bits[:128], *bits[-64:], *draw.sample(bits, 300)}:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded, _ = tg.load_artifact(path, CPU)
        except tg.UserError:
            continue
        unnoticed += 1  # a bit that stands for nothing: padding before the checksum
        assert all(w.equal(expected[name]) for name, w in weights_of(loaded).items())
    assert unnoticed <= 8


class Evil:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def packed(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return zlib.compress(buffer.getvalue())


def test_code_in_a_file_does_not_run(tmp_path: Path, model: tg.GPT) -> None:
    path, mark = tmp_path / "a.ptz", tmp_path / "ran"
    save(path, model)
    whole = torch.load(io.BytesIO(zlib.decompress(path.read_bytes())), weights_only=True)
    for payload in (
        Evil(mark),
        whole | {"config": Evil(mark)},
        whole | {"tensors": {"tok_emb": Evil(mark)}},
    ):
        path.write_bytes(packed(payload))
        torch.load(io.BytesIO(zlib.decompress(path.read_bytes())), weights_only=False)
        assert mark.is_dir()  # it is armed
        mark.rmdir()
        fault_of(path)
        assert not mark.exists()
    for raw in (pickle.dumps(Evil(mark)), zlib.compress(pickle.dumps(Evil(mark)))):
        path.write_bytes(raw)
        fault_of(path)
        assert not mark.exists()


def change_format(payload: dict[str, Any]) -> None:
    payload["format"] = "text-diffusion-int8-zlib-0"


def drop_format(payload: dict[str, Any]) -> None:
    del payload["format"]


def change_width(payload: dict[str, Any]) -> None:
    payload["config"]["model_dim"] = 32


def change_recipe(payload: dict[str, Any]) -> None:
    payload["config"]["diffusion_loss_weight"] = 0.0


def change_rule(payload: dict[str, Any]) -> None:
    payload["config"]["num_heads"] = 3


def add_setting(payload: dict[str, Any]) -> None:
    payload["config"]["num_experts"] = 3


def drop_tensor(payload: dict[str, Any]) -> None:
    del payload["tensors"]["skip_weights"]


def drop_scale(payload: dict[str, Any]) -> None:
    payload["scales"]["tok_emb"] = payload["scales"]["tok_emb"][:5]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_format, "its format is not 'text-diffusion-int8-zlib-2'"),
        (drop_format, "format"),
        (change_width, "tok_emb"),
        (change_recipe, "mask_emb"),
        (change_rule, "NUM_HEADS=3"),
        (add_setting, "num_experts"),
        (drop_tensor, "skip_weights"),
        (drop_scale, "size"),
    ],
)
def test_a_foreign_artifact_is_refused(
    tmp_path: Path, model: tg.GPT, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    payload = torch.load(io.BytesIO(zlib.decompress(path.read_bytes())), weights_only=True)
    path.write_bytes(packed(payload))
    tg.load_artifact(path, CPU)  # packed again as it was
    change(payload)
    path.write_bytes(packed(payload))
    assert named in fault_of(path)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ptz"
    assert "No such file" in fault_of(path)
    for raw in (
        b"",
        b"hello",
        zlib.compress(b"hello"),
        packed([1, 2]),
        packed({"format": tg.ARTIFACT_FORMAT}),
    ):
        path.write_bytes(raw)
        fault_of(path)
    fault_of(tmp_path)


def test_over_the_limit_is_an_error_and_the_file_is_there(
    tmp_path: Path, model: tg.GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "a.ptz", Recorder()
    monkeypatch.setattr(tg, "SIZE_LIMIT", 1000)
    with pytest.raises(tg.UserError) as caught:
        tg.save_artifact(path, weights_of(model), model.cfg, "abc", log)
    code_bytes, model_bytes = (ROOT / "train_gpt.py").stat().st_size, path.stat().st_size
    (size,) = log.of("size")
    assert (size["scheme"], size["levels"]) == ("int8+zlib", tg.SCHEMES["int8+zlib"][0][-1])
    assert (size["code_bytes"], size["model_bytes"]) == (code_bytes, model_bytes)
    for named in (
        f"submission of {code_bytes + model_bytes:,} bytes exceeds 1,000",
        f"code {code_bytes:,}",
        f"model {model_bytes:,}",
        "NUM_LAYERS",
    ):
        assert named in str(caught.value)
    tg.load_artifact(path, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", list(tg.SCHEMES))
def test_levels_are_coarsened_only_as_far_as_it_takes(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_bytes, model = (ROOT / "train_gpt.py").stat().st_size, big(export_scheme=scheme)
    row, sizes = tg.SCHEMES[scheme], dict[int, int]()
    for place, levels in enumerate(row.levels):
        data = tg.pack(weights_of(model), model.cfg, "abc", row, place)
        sizes[levels] = code_bytes + len(data)
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert len(set(sizes.values())) == len(sizes)
    for levels, total in sizes.items():
        monkeypatch.setattr(tg, "SIZE_LIMIT", total)
        (size,) = save(tmp_path / "a.ptz", model).of("size")
        assert (size["scheme"], size["levels"], size["total_bytes"]) == (scheme, levels, total)


@pytest.mark.slow
def test_six_bits_are_fewer_bytes_and_spare_the_embedding(tmp_path: Path) -> None:
    found = {}
    for scheme in tg.SCHEMES:
        model, path = big(export_scheme=scheme), tmp_path / scheme
        save(path, model)
        again, sha256 = tg.load_artifact(path, CPU)
        assert (sha256, again.cfg.export_scheme) == ("abc", scheme)
        for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
            if ours.ndim == 2 and ours.numel() > tg.KEEP_FLOAT_NUMEL:
                levels = 127 if scheme == "int8+zlib" or name == "tok_emb" else 31
                step = ours.abs().amax(dim=1, keepdim=True) / levels
                assert ((ours - theirs).abs() <= 0.502 * step).all()  # half a step; scales are fp16
                assert ((ours - theirs).abs() > 0.4 * step).any()  # and of no finer one
        found[scheme] = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-40])
        assert "truncated" in fault_of(path)
    assert found["int6+lzma"] < 0.85 * found["int8+zlib"]


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_artifact(
    tmp_path: Path, model: tg.GPT, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.ptz"
    path.write_bytes(b"old")
    monkeypatch.setattr(call, full_disk)
    with pytest.raises(tg.UserError) as caught:
        save(path, model)
    for named in (
        str(path),
        "artifact",
        "No space left on device",
        "bytes",
        "free space or set OUT_DIR",
    ):
        assert named in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ptz"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r")
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"))
    state.save()
    old = cfg.path("checkpoints", ".pt").read_bytes()
    state.step = 5
    monkeypatch.setattr("os.fsync", full_disk)
    state.save()
    (warning,) = recorded(state.run, "warning")
    assert f"checkpoint {cfg.path('checkpoints', '.pt')}" in warning["reason"]
    assert "No space left on device" in warning["reason"]
    assert cfg.path("checkpoints", ".pt").read_bytes() == old
    assert [p.name for p in cfg.path("checkpoints", ".pt").parent.iterdir()] == ["r.pt"]
    monkeypatch.undo()
    state.save()
    assert torch.load(cfg.path("checkpoints", ".pt"), weights_only=True)["step"] == 5


@pytest.mark.slow
def test_a_limit_on_file_size_is_met_half_way(tmp_path: Path) -> None:
    """A disk that fills up while a file is written, not when it is opened."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as tg
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
tg.atomic_write(tg.Path("new"), b"n" * 5000, "artifact")
try:
    tg.atomic_write(tg.Path("new"), b"m" * 100_000, "artifact")
except tg.UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.startswith("artifact new of 100,000 bytes was not written (File too large)")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new").read_bytes() == b"n" * 5000


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(tg.UserError, match="was not written"):
        tg.atomic_write(tmp_path / "file" / "a.ptz", b"data", "artifact")
    with pytest.raises(tg.UserError, match="OUT_DIR="):
        tg.Log(tg.Config(**settings(out_dir=str(tmp_path / "file"))), 0, False)


@pytest.mark.slow
def test_the_smaller_int6_scheme_is_taken_and_logged(tmp_path: Path) -> None:
    model = big(export_scheme="int6")
    log = save(tmp_path / "a.ptz", model)
    (choice,), (size,) = log.of("export_scheme"), log.of("size")
    assert choice["model_bytes"].keys() == {"int6+zstd", "int6+lzma"}
    assert choice["smallest"] == size["scheme"]
    assert size["model_bytes"] == min(choice["model_bytes"].values())
    assert (tmp_path / "a.ptz").stat().st_size == size["model_bytes"]
    alone = save(tmp_path / "b.ptz", big(export_scheme=size["scheme"])).of("size")[0]
    assert (alone["scheme"], alone["levels"]) == (size["scheme"], size["levels"])


def test_a_missing_library_is_named_before_training_and_on_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = big(export_scheme="int6+zstd")
    save(tmp_path / "a.ptz", model)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(tg.UserError, match=r"a\.ptz needs zstandard .*; pip install it"):
        tg.load_artifact(tmp_path / "a.ptz", CPU)
    for scheme in ("int6", "int6+zstd"):
        with pytest.raises(tg.UserError, match=r"needs zstandard: pip install zstandard, or set"):
            tg.check_libraries(tiny(export_scheme=scheme))
    tg.check_libraries(tiny(export_scheme="int6+lzma"))
    tg.check_libraries(tiny())
