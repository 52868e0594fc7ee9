"""The artifact: what it loses is bounded, what it weighs is what is said, and nothing damaged or
foreign gets in.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import re
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as tg
from tests.bench import artifacts
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

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    name: scheme.compress for name, scheme in tg.SCHEMES.items()
}


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
    return artifacts.save(path, weights_of(model), model.cfg, "abc")


def fault_of(path: Path) -> str:
    with pytest.raises(tg.UserError) as caught:
        tg.load_artifact(path, CPU)
    message = str(caught.value)
    assert message.startswith(f"artifact {path} ")
    assert "export it again" in message
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
    loaded, identity = tg.load_artifact(tmp_path / "a.ptz", CPU)
    assert loaded.cfg == model.cfg
    assert identity == {"tokenizer_sha256": "abc", "data_sha256": "", "program_sha256": ""}
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

model, _ = tg.load_artifact(tg.Path("a.ptz"), tg.CPU)
run = tg.Run(model.cfg, 1, 2, tg.CPU, tg.Log(model.cfg, 1, False))  # rank 1 logs nothing
run.world_size, run.rank = 1, 0
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


# ---- the container: tensors with what JSON can say about them ----


def seal(header: Any, data: bytes) -> bytes:
    """A container with a right size and checksum, whatever it says: written by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + data
    return len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body


def one(dtype: Any, shape: Any, data: bytes = b"abcdefgh") -> bytes:
    return seal({"about": {}, "tensors": [["w", dtype, shape]]}, data)


def is_refused(packed: bytes) -> bool:
    try:
        tg.unpack_tensors(packed)
    except Exception:  # its readers turn every kind into a UserError
        return True
    return False


KINDS: dict[str, Tensor] = {
    "float32": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "float16": torch.tensor([1.5, -(2.0**-24), 65504.0]).half(),
    "int8": torch.arange(-128, 128).to(torch.int8).view(16, 16),
    "int64": torch.tensor([2**62, -1]),
    "bool": torch.tensor([True, False]),
    "number": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
    "columns": torch.arange(12.0).view(3, 4).t(),
    "not finite": torch.tensor([math.nan, math.inf, -0.0]),
    "naïve name": torch.ones(1, 1, 1),
}
ABOUT = {"step": 3, "seconds": 0.1, "text": "naïve", "config": {"a": [1, None, True]}}


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether dtype, shape and bits are the same."""
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    return alike and first.numpy().tobytes() == second.numpy().tobytes()


@pytest.mark.parametrize("scheme", [None, *COMPRESSORS])
def test_tensors_of_any_kind_come_back_to_the_bit(scheme: str | None) -> None:
    packed = tg.pack_tensors(ABOUT, KINDS)
    if scheme:
        packed = tg.decompress(COMPRESSORS[scheme](packed))
    about, tensors = tg.unpack_tensors(packed)
    assert about == ABOUT
    assert list(tensors) == list(KINDS)
    assert all(equal(w, KINDS[name]) for name, w in tensors.items())
    assert tensors["float32"].add_(1).is_contiguous()  # it may be written to
    assert equal(tg.unpack_tensors(packed)[1]["float32"], KINDS["float32"])
    assert tg.unpack_tensors(tg.pack_tensors({}, {})) == ({}, {})


SMALL = tg.pack_tensors({"step": 3}, {"a": torch.arange(3.0), "b": torch.ones(2, 2).half()})


def test_a_container_with_any_bit_flipped_is_refused() -> None:
    assert not is_refused(SMALL)
    for bit in range(8 * len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[bit // 8] ^= 1 << bit % 8
        assert is_refused(bytes(damaged)), bit


def test_a_container_that_is_cut_or_longer_is_refused() -> None:
    assert all(is_refused(SMALL[:length]) for length in range(len(SMALL)))
    assert all(is_refused(SMALL + extra) for extra in (b"\0", b"x", bytes(64), SMALL))
    with pytest.raises(ValueError, match="checksum"):
        tg.unpack_tensors(SMALL[:-1])


def test_what_a_sealed_container_says_of_its_tensors_must_hold() -> None:
    about, tensors = tg.unpack_tensors(one("<f4", [2]))
    assert (about, tensors["w"].shape) == ({}, (2,))
    row, data = ["w", "<f4", [2]], b"abcdefgh"
    assert is_refused(seal({"about": {}, "tensors": [row, row]}, data + data)), "named twice"
    assert is_refused(one("<f4", [2], data + b"x")), "more data than tensors"
    assert is_refused(one("<f4", [2], data[:-1])), "less data than tensors"
    assert is_refused(seal({"about": {}, "tensors": []}, data)), "data of no tensor"


@pytest.mark.parametrize("dtype", ["|O", "O", "<U2", "S8", "V8", "<M8[s]", "<f4,<f4", "x", "", 7])
def test_a_dtype_that_no_tensor_has_is_refused(dtype: Any) -> None:
    assert is_refused(one(dtype, [1]))
    assert is_refused(one(dtype, [2]))


@pytest.mark.parametrize(
    "shape",
    [
        [-1], [-1, 2], [2, -1], [-2, -1], [2**40], [2**62, 2**62], [2**63, 2], [10**30], [1] * 99,
        [2.0], ["2"], [[2]], [None], None, "2", {"2": 1}, [3], [1], [1, 3], [0],
    ],
)  # fmt: skip
def test_a_shape_that_its_data_does_not_have_is_refused(shape: Any) -> None:
    assert is_refused(one("<f4", shape))


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"nope", b"\xff\xfe", b"null", b"[]", b"7", b"{}", b'{"about": {}}',
        b'{"tensors": []}', b'{"about": 7, "tensors": []}', b'{"about": {}, "tensors": 7}',
        b'{"about": {}, "tensors": [7]}', b'{"about": {}, "tensors": [["w"]]}',
        b"[" * 200_000, b'{"a":' * 200_000, b'{"about": ' + b"9" * 5000 + b', "tensors": []}',
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    assert is_refused(seal(header, b""))


def test_a_header_that_is_longer_than_the_file_is_refused() -> None:
    for size in (10**6, 2**63, 2**64 - 1):
        body = size.to_bytes(8, "little") + SMALL[48:]
        head = len(body).to_bytes(8, "little") + hashlib.sha256(body).digest()
        assert is_refused(head + body)


# ---- compressed files: damage, bytes after the end, and bombs ----


@pytest.mark.slow
@pytest.mark.parametrize("scheme", COMPRESSORS)
@pytest.mark.parametrize("size", [0, 1, 500, 1016, 1024, 5000, 300_000])
def test_every_compressor_gives_its_bytes_back(scheme: str, size: int) -> None:
    noise = bytes(torch.randint(256, (size,), dtype=torch.uint8).numpy())
    for content in (noise, bytes(size)):
        packed = seal(b"{}", content)
        assert tg.decompress(COMPRESSORS[scheme](packed)) == packed


@pytest.mark.parametrize("scheme", COMPRESSORS)
def test_a_compressed_file_that_is_cut_or_longer_is_refused(scheme: str) -> None:
    for content in (SMALL, seal(b"{}", os.urandom(3000))):
        data = COMPRESSORS[scheme](content)
        for length in range(len(data)):
            with pytest.raises(Exception):  # noqa: B017, PT011 -- every library has its own kinds
                tg.decompress(data[:length])
        for extra in (b"\0", b"x", bytes(4), bytes(5000), data):
            with pytest.raises(ValueError, match="followed by other bytes"):
                tg.decompress(data + extra)


def test_bytes_after_the_end_are_refused_wherever_the_end_is() -> None:
    lengths = set[int]()
    for size in range(900, 1100):
        data = zlib.compress(seal(b"{}", os.urandom(size)))
        lengths.add(len(data) % 1024)
        with pytest.raises(ValueError, match="followed by other bytes"):
            tg.decompress(data + b"x")
    assert 0 in lengths  # where a chunk that is read ends, too


@pytest.mark.parametrize("scheme", COMPRESSORS)
def test_a_compressed_file_with_a_flipped_bit_is_refused(scheme: str) -> None:
    data = COMPRESSORS[scheme](SMALL)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            raw = tg.decompress(bytes(damaged))
        except Exception:
            continue
        assert raw == SMALL or is_refused(raw)  # a bit that means nothing to the library


def deflate_bomb(start: bytes) -> bytes:
    """A gigabyte of zeros after `start`: one block again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + first + block * 1024 + packer.flush(zlib.Z_FINISH) + bytes(4)


def xz_bomb(start: bytes) -> bytes:
    """A gigabyte of zeros after `start`: chunks of LZMA2 that reset all, again and again."""
    first, zeros = (lzma_chunks(data) for data in (start, bytes(1 << 24)))
    head = lzma.compress(b"", lzma.FORMAT_XZ, lzma.CHECK_NONE)[:12]
    whole = lzma.compress(bytes(10), lzma.FORMAT_XZ, lzma.CHECK_NONE)
    block = whole[12 : 12 + 4 * (whole[12] + 1)]
    return head + block + first + zeros * 64 + b"\0"


def lzma_chunks(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
    return lzma.compress(data, lzma.FORMAT_RAW, filters=filters)[:-1]  # without the end


BOMBS = {"zlib": deflate_bomb, "xz": xz_bomb}
STARTS = {
    "zeros": bytes(8),
    "a small size": (1000).to_bytes(8, "little"),
    "a gigabyte": (1 << 30).to_bytes(8, "little"),
    "the largest size": b"\xff" * 8,
    "a container": SMALL,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("start", STARTS)
def test_a_bomb_is_refused_in_little_memory(kind: str, start: str, tmp_path: Path) -> None:
    data = BOMBS[kind](STARTS[start])
    assert len(data) < 2 << 20
    (tmp_path / "a.ptz").write_bytes(data)
    tracemalloc.start()
    try:
        message = fault_of(tmp_path / "a.ptz")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "too large" in message
    # Where the file does not say that it is small, 64 MiB and 64 times its size, twice.
    most = 80 << 20 if start in ("zeros", "a small size", "a container") else 288 << 20
    assert peak < most


@pytest.mark.slow
def test_bombs_are_what_they_seem() -> None:
    unpackers: dict[str, Any] = {
        "zlib": zlib.decompressobj(),
        "xz": lzma.LZMADecompressor(),
    }
    for kind, unpacker in unpackers.items():
        data, count = BOMBS[kind](SMALL), 0
        for at in range(0, len(data) // 8, 1024):
            part = unpacker.decompress(data[at : at + 1024])
            assert part.startswith(SMALL) if at == 0 else not any(part[:100])
            count += len(part)
        assert count > 100 << 20


# ---- artifacts that are damaged, foreign or made to harm ----


@pytest.mark.slow
@pytest.mark.parametrize("scheme", COMPRESSORS)
def test_an_artifact_with_a_flipped_bit_is_refused(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg, "KEEP_FLOAT_NUMEL", 100)
    path = tmp_path / "a.ptz"
    save(path, randomise(tg.GPT(tiny("ar", num_layers=1, export_scheme=scheme))))
    data, same = path.read_bytes(), tg.decompress(path.read_bytes())
    unnoticed, last = 0, len(data) - 200
    for at in (*range(200), *range(200, last, 13), *range(last, len(data))):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            tg.load_artifact(path, CPU)
        except tg.UserError:
            continue
        unnoticed += 1  # a bit that means nothing to the library
        assert tg.decompress(bytes(damaged)) == same
    assert unnoticed <= 4


@pytest.mark.parametrize("keep", [0, 1, 2, 0.1, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, model: tg.GPT, keep: float) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    assert "truncated" in fault_of(path)


class Evil:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path, mark, buffer = tmp_path / "a.ptz", tmp_path / "ran", io.BytesIO()
    torch.save({"format": tg.ARTIFACT_FORMAT, "tensors": {"tok_emb": Evil(mark)}}, buffer)
    plain = pickle.dumps(Evil(mark))
    for load in (pickle.loads, lambda _: torch.load(buffer, weights_only=False)):
        buffer.seek(0)
        load(plain)
        assert mark.is_dir()  # they are armed
        mark.rmdir()
    sealed = seal({"about": {}, "tensors": [["tok_emb", "|O", [1]]]}, plain)
    for content in (plain, buffer.getvalue(), seal(plain, b""), seal(b"{}", plain), sealed):
        for data in (content, *(compress(content) for compress in COMPRESSORS.values())):
            path.write_bytes(data)
            fault_of(path)
            assert not mark.exists()


Payload = dict[str, Any]  # about, and tensors


def payload_of(path: Path) -> Payload:
    about, tensors = tg.unpack_tensors(tg.decompress(path.read_bytes()))
    return {"about": about, "tensors": tensors, "config": about["config"]}


def write_payload(path: Path, payload: Payload) -> None:
    path.write_bytes(zlib.compress(tg.pack_tensors(payload["about"], payload["tensors"])))


def change(kind: str, name: str, value: Any) -> Callable[[Payload], None]:
    """Give one entry another value; of a callable, what it makes of the old one; None: drop it."""

    def apply(payload: Payload) -> None:
        old = payload[kind].pop(name)
        if value is not None:
            payload[kind][name] = value(old) if callable(value) else value

    return apply


def rename(payload: Payload) -> None:
    payload["tensors"]["gain"] = payload["tensors"].pop("skip_weights")


def add_setting(payload: Payload) -> None:
    payload["config"]["num_experts"] = 3


def add_scale(payload: Payload) -> None:
    payload["tensors"]["lone:scale"] = torch.ones(1).half()


def swap(payload: Payload) -> None:
    """Two tensors of as many numbers."""
    tensors = payload["tensors"]
    tensors["mask_emb"], tensors["skip_weights"] = tensors["skip_weights"], tensors["mask_emb"]


# fmt: off
FOREIGN: list[tuple[Callable[[Payload], None], str]] = [
    (change("about", "format", "text-diffusion-int8-zlib-2"), "format is not 'text-diffusion-4'"),
    (change("about", "format", None), "format"),
    (change("about", "config", None), "config"),
    (change("about", "config", [1]), ""),
    (change("config", "model_dim", 32), "it lacks or has other tensors"),
    (change("config", "diffusion_loss_weight", 0.0), "it lacks or has other tensors"),
    (change("config", "num_heads", 3), "NUM_HEADS=3"),
    (change("config", "matrix_lr", math.nan), "MATRIX_LR"),
    (add_setting, "num_experts"),
    (change("tensors", "skip_weights", None), "it lacks or has other tensors"),
    (change("tensors", "tok_emb:scale", lambda w: w[:5]), ""),
    (change("tensors", "tok_emb:scale", lambda w: w[:1]), ""),
    (change("tensors", "tok_emb:scale", lambda w: w[0]), ""),
    (change("tensors", "tok_emb:scale", lambda w: w.int()), "tok_emb"),
    (change("tensors", "tok_emb:scale", None), "tok_emb"),
    (add_scale, ""),
    (rename, "skip_weights"),
    (swap, "mask_emb"),
    (change("tensors", "skip_weights", lambda w: w.view(-1)), "skip_weights"),
    (change("tensors", "skip_weights", lambda w: w.double()), "skip_weights"),
    (change("tensors", "skip_weights", lambda w: w.to(torch.complex64)), "skip_weights"),
    (change("tensors", "skip_weights", lambda w: w.view(torch.int16)), "skip_weights"),
    (change("tensors", "skip_weights", lambda w: w.to(torch.int8)), "skip_weights"),
    (change("tensors", "skip_weights", lambda w: w > 0), "skip_weights"),
]
# fmt: on


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("case", range(len(FOREIGN)))
def test_a_foreign_artifact_is_refused(tmp_path: Path, model: tg.GPT, case: int) -> None:
    path, (apply, named) = tmp_path / "a.ptz", FOREIGN[case]
    save(path, model)
    payload = payload_of(path)
    write_payload(path, payload)
    tg.load_artifact(path, CPU)  # packed again as it was
    apply(payload)
    write_payload(path, payload)
    assert named in fault_of(path)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ptz"
    assert "No such file" in fault_of(path)
    raws = [b"", b"hello", zlib.compress(b"hello"), SMALL, os.urandom(5000), lzma.compress(b"")]
    for raw in (*raws, zlib.compress(SMALL), zlib.compress(tg.pack_tensors({}, {}))):
        path.write_bytes(raw)
        fault_of(path)
    fault_of(tmp_path)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_layers": 10**6}, {"model_dim": 32768}, {"bigram_vocab_size": 10**7},
        {"vocab_size": 65535}, {"mlp_mult": 10**6}, {"look_ahead": 10**9},
        {"time_embed_dim": 10**9}, {"num_heads": 8, "model_dim": 10**9},
        {"num_layers": 2**63}, {"model_dim": 2**70}, {"tie_embeddings": False},
    ],
)  # fmt: skip
def test_settings_of_a_larger_model_are_refused_before_it_is_built(
    asked: dict[str, Any], tmp_path: Path, model: tg.GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    payload = payload_of(path)
    payload["config"] |= asked
    write_payload(path, payload)
    plain, places = tg.GPT, set[str]()

    def build(cfg: tg.Config) -> tg.GPT:
        model = plain(cfg)
        places.update(p.device.type for p in model.parameters())
        return model

    monkeypatch.setattr(tg, "GPT", build)
    began = time.perf_counter()
    fault_of(path)
    assert places <= {"meta"}  # where tensors take no memory
    assert time.perf_counter() - began < 30


# fmt: off
WRONG_TYPES: dict[str, Sequence[Any]] = {
    "vocab_size": (64.0, "64", None, [64]), "num_layers": (2.0, "2", True), "model_dim": (16.0,),
    "num_heads": (2.0, {}), "num_kv_heads": (True, 1.0), "mlp_mult": (2.0,), "seed": (1.0, True),
    "look_ahead": (8.0,), "time_embed_dim": (4.0,), "train_seq_len": (16.0, "16"),
    "tie_embeddings": (1.0, "1", None), "diffusion_causal": ("", None, []),
    "diffusion_shift": ("0", 2.0, None), "logit_softcap": ("30", None, True),
    "diffusion_loss": (7, None, []), "diffusion_windows": (8, None), "recipe": (7, None),
    "tokenizer_path": (7, None, []), "rope_base": ([1], False), "qk_gain_init": (True, "1.5"),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_setting_of_another_type_is_refused(name: str, tmp_path: Path, model: tg.GPT) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    payload = payload_of(path)
    assert payload["config"].keys() == vars(model.cfg).keys()
    for value in WRONG_TYPES[name]:
        changed = payload["about"] | {"config": payload["config"] | {name: value}}
        write_payload(path, payload | {"about": changed})
        fault_of(path)


def test_a_whole_number_may_stand_for_a_real_one(tmp_path: Path, model: tg.GPT) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    payload = payload_of(path)
    payload["config"] |= {"rope_base": 10000, "qk_gain_init": 1, "logit_softcap": 30}
    write_payload(path, payload)
    assert tg.load_artifact(path, CPU)[0].cfg.rope_base == 10000


# ---- numbers that are not finite ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["skip_weights", "tok_emb", "blocks.0.attn.c_q.weight"])
def test_a_weight_that_is_not_finite_is_not_exported(
    name: str, value: float, tmp_path: Path, model: tg.GPT
) -> None:
    weights = {key: w.detach().clone() for key, w in weights_of(model).items()}
    weights[name].view(-1)[5] = value
    with pytest.raises(tg.UserError, match=name.replace(".", r"\.")):
        tg.save_artifact(tmp_path / "a.ptz", weights, make_run(model.cfg))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", COMPRESSORS)
def test_a_weight_beyond_fp16_is_not_exported(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg, "KEEP_FLOAT_NUMEL", 100)
    model, path = randomise(tg.GPT(tiny(export_scheme=scheme))), tmp_path / "a.ptz"
    for name, value in (("skip_weights", 1e6), ("tok_emb", 1e8), ("mask_emb", -65520.0)):
        weights = {key: w.detach().clone() for key, w in weights_of(model).items()}
        weights[name].view(-1)[5] = value
        with pytest.raises(tg.UserError, match=f"{name}.* is not finite in fp16"):
            tg.save_artifact(path, weights, make_run(model.cfg))
        assert not path.exists()
    weights = weights_of(model) | {"tok_emb": torch.full((64, 16), 1e6)}
    artifacts.save(path, weights, model.cfg, "abc")  # integers times a scale that fp16 holds
    found = tg.load_artifact(path, CPU)[0].tok_emb
    torch.testing.assert_close(found, torch.full((64, 16), 1e6), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["skip_weights", "tok_emb:scale", "blocks.1.fc.weight:scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_on_loading(
    name: str, value: float, tmp_path: Path, model: tg.GPT
) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    payload = payload_of(path)
    payload["tensors"][name].view(-1)[3] = value
    write_payload(path, payload)
    message = fault_of(path)
    assert f"{name} holds numbers that are not finite" in message


@pytest.mark.parametrize("name", ["skip_weights", "tok_emb:scale"])
def test_a_number_that_becomes_infinite_is_refused_on_loading(
    name: str, tmp_path: Path, model: tg.GPT
) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    payload = payload_of(path)
    payload["tensors"][name] = payload["tensors"][name].double().fill_(1e300)
    write_payload(path, payload)
    assert name.removesuffix(tg.SCALE) in fault_of(path)


# ---- settings of an artifact ----


def test_an_artifact_of_other_settings_is_refused_before_anything_is_built(
    tmp_path: Path, model: tg.GPT
) -> None:
    path = tmp_path / "a.ptz"
    save(path, model)
    payload = payload_of(path)
    for name, value, why in (
        ("num_layers", 10_000, "its settings ask for 10,000 layers, it holds fewer"),
        ("num_layers", 3, "it lacks or has other tensors: .*blocks.2"),
        ("model_dim", 1 << 20, "it lacks or has other tensors: tok_emb"),
        ("bigram_vocab_size", 10**12, "it lacks or has other tensors: bigram_embedding"),
    ):
        config = payload["about"]["config"] | {name: value}
        write_payload(path, payload | {"about": payload["about"] | {"config": config}})
        assert re.search(why, fault_of(path)), fault_of(path)


def test_the_baseline_has_as_many_parameters_as_the_challenge_says() -> None:
    with torch.device("meta"):
        model = tg.GPT(tg.Config(diffusion_loss_weight=0.0))
    assert sum(p.numel() for p in model.parameters()) == 17_059_912


# ---- what is written, and how large it is ----


@functools.cache
def by_hand(scheme: str, seed: int = 0) -> dict[str, Tensor]:
    """What remains of the weights of `big` under a scheme, tensor by tensor."""
    row, found = tg.SCHEMES[scheme], dict[str, Tensor]()
    for name, w in weights_of(big(export_scheme=scheme)).items():
        if w.ndim == 2 and w.numel() > tg.KEEP_FLOAT_NUMEL:
            embedding = name == "tok_emb" and row.embedding_levels
            q, scale = tg.quantize_rows(w.detach(), embedding or row.levels[0])
            found[name] = q.float() * scale.float()[:, None]
        else:
            found[name] = w.detach().half().float()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", COMPRESSORS)
def test_every_scheme_loses_nothing_but_what_is_rounded(scheme: str, tmp_path: Path) -> None:
    save(tmp_path / "a.ptz", big(export_scheme=scheme))
    loaded = weights_of(tg.load_artifact(tmp_path / "a.ptz", CPU)[0])
    assert loaded.keys() == by_hand(scheme).keys()
    assert all(w.equal(by_hand(scheme)[name]) for name, w in loaded.items())


def test_over_the_limit_is_an_error_and_the_file_is_there(
    tmp_path: Path, model: tg.GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "a.ptz", make_run(model.cfg)
    monkeypatch.setattr(tg, "SIZE_LIMIT", 1000)
    with pytest.raises(tg.UserError) as caught:
        tg.save_artifact(path, weights_of(model), run)
    code_bytes, model_bytes = (ROOT / "train_gpt.py").stat().st_size, path.stat().st_size
    (size,) = recorded(run, "size")
    assert (size["scheme"], size["levels"]) == ("int8+zlib", tg.SCHEMES["int8+zlib"][0][-1])
    assert (size["code_bytes"], size["model_bytes"]) == (code_bytes, model_bytes)
    total = f"submission of {code_bytes + model_bytes:,} bytes exceeds 1,000"
    for named in (total, f"{code_bytes:,}", "levels 63", "EXPORT_SCHEME=int6+lzma", "NUM_LAYERS"):
        assert named in str(caught.value)
    tg.load_artifact(path, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", list(tg.SCHEMES))
def test_levels_are_coarsened_only_as_far_as_it_takes(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_bytes, model = (ROOT / "train_gpt.py").stat().st_size, big(export_scheme=scheme)
    row, sizes = tg.SCHEMES[scheme], dict[int, int]()
    for levels in row.levels:
        about = {"config": vars(model.cfg), "tokenizer_sha256": "abc"}
        data = tg.pack(weights_of(model), about, row, levels)
        sizes[levels] = code_bytes + len(data)
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert len(set(sizes.values())) == len(sizes)
    for levels in (*row.levels[:2], row.levels[-1]):
        total = sizes[levels]
        monkeypatch.setattr(tg, "SIZE_LIMIT", total)
        (size,) = save(tmp_path / "a.ptz", model).of("size")
        assert (size["scheme"], size["levels"], size["total_bytes"]) == (scheme, levels, total)


@pytest.mark.slow
def test_six_bits_are_fewer_bytes_and_spare_the_embedding(tmp_path: Path) -> None:
    found = {}
    for scheme in tg.SCHEMES:
        model, path = big(export_scheme=scheme), tmp_path / scheme
        save(path, model)
        again, identity = tg.load_artifact(path, CPU)
        assert (identity["tokenizer_sha256"], again.cfg.export_scheme) == ("abc", scheme)
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


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_continues(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(**data, out_dir=str(tmp_path), run_id="r")
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"))
    state.save()
    path, _ = cfg.checkpoints
    old = path.read_bytes()
    state.step = 5
    monkeypatch.setattr("os.fsync", full_disk)
    state.save()
    (warning,) = recorded(state.run, "warning")
    assert f"checkpoint {path}" in warning["reason"]
    assert "No space left on device" in warning["reason"]
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == ["r.ckpt"]
    monkeypatch.undo()
    state.save()
    assert [tg.unpack_tensors(p.read_bytes())[0]["step"] for p in cfg.checkpoints] == [5, 0]
    assert cfg.checkpoints[1].read_bytes() == old


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
        tg.lock_folder(tg.Config(**settings(out_dir=str(tmp_path / "file"))))
