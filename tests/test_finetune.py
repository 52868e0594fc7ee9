"""finetune.py: only low-rank updates train, their file is small and belongs to one artifact, and
bad input is named.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as tg
from scripts import common, decoding, finetune, sample
from scripts.bench import likelihood
from tests.bench import artifacts
from tests.conftest import (
    CPU,
    Called,
    Tokenizers,
    env_of,
    facts,
    make_run,
    outcome,
    random_rows,
    randomise,
    settings,
    tiny,
)

MARK = ".parametrizations.weight."


def export(
    path: Path, data: dict[str, Any], recipe: str = "direct", seed: int = 0, **overrides: Any
) -> Path:
    cfg = tiny(recipe, **data, **{"train_seq_len": 64, "train_batch_tokens": 256, **overrides})
    artifacts.save(path, dict(randomise(tg.GPT(cfg), seed, 0.1).named_parameters()), cfg)
    return path


@pytest.fixture(scope="module")
def artifact(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("artifact") / "model.ptz", data)


@pytest.fixture
def call(
    artifact: Path,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Called]:
    """Run the command in a folder of its own; settings by keyword, None leaves one out."""

    def run(*argv: str, artifact: Path = artifact, **values: Any) -> Called:
        # The artifact's, and not the environment's.
        taken = {name for name in finetune.MODEL if name not in values}
        usual = settings(
            train_batch_tokens=256, out_dir=str(tmp_path / "out"), nelbo_sequences=4, **data
        )
        merged = {
            k: v
            for k, v in (usual | {"recipe": None} | values).items()
            if v is not None and k not in taken
        }
        monkeypatch.setattr("os.environ", env_of(merged))
        monkeypatch.chdir(tmp_path)
        return outcome(finetune.main, [str(artifact), *argv], capsys)

    return run


def scored(model: tg.GPT, data: dict[str, Any], size: int = 0) -> float:
    cfg = tiny(**data, train_seq_len=64, train_batch_tokens=256, nelbo_sequences=4)
    split = make_run(cfg), tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg)
    scores = tg.evaluate_bound(model, *split, size) if size else tg.evaluate_exact(model, *split)
    return float(scores["bpb"])


def updated(artifact: Path, rank: int = 3, seed: int = 5) -> tg.GPT:
    """A model with random updates."""
    model, _ = tg.load_artifact(artifact, CPU)
    finetune.add_updates(model, rank, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if MARK in name and name.endswith("lora_b"):
                p.normal_(0, 1.0, generator=generator)
    return model


def save(path: Path, model: tg.GPT, artifact: Path) -> Path:
    about = {"artifact_sha256": finetune.sha256_of(artifact), "rank": 3, "config": {}}
    finetune.save_adapter(path, dict(model.named_parameters()), about)
    return path


# ---- training ----


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "ar", "retrograde"])
def test_it_lowers_the_loss_of_new_text_and_leaves_the_artifact(
    call: Callable[..., Called],
    artifact: Path,
    data: dict[str, Any],
    tmp_path: Path,
    recipe: str | None,
) -> None:
    bytes_before = artifact.read_bytes()
    more = dict(recipe=recipe, iterations=30, adapter_lr=0.02, diffusion_start_frac=None)
    called = call("--rank", "4", "--out", "a.ptz", **more)
    found = facts(called)
    base, _ = tg.load_artifact(artifact, CPU)
    assert found["before"]["val_bpb"] == scored(base, data)  # the updates begin at zero
    assert found["before"]["bound"] == scored(base, data, 16)
    assert found["after"]["val_bpb"] < found["before"]["val_bpb"] - 0.05
    assert (found["steps"], found["rank"], found["recipe"]) == (30, 4, recipe or "direct")
    assert artifact.read_bytes() == bytes_before
    about = finetune.load_adapter(tmp_path / "a.ptz", base, artifact)
    assert found["after"]["val_bpb"] == scored(base, data)  # what was scored is the file
    assert found["after"]["bound"] == scored(base, data, 16)
    assert (about["rank"], about["config"]["adapter_lr"]) == (4, 0.02)
    assert found["adapter_bytes"] == (tmp_path / "a.ptz").stat().st_size < len(bytes_before)
    lines = called[1].splitlines()
    assert len(lines) == 4  # a table and one object; the log is progress
    (first,) = (line for line in called[2].splitlines() if line.startswith("step:1/30 "))
    assert ("denoise_loss:0.0000" in first) == (recipe == "ar")  # windows are not left out at first
    assert "step:30/30" in called[2]
    assert f"{found['before']['val_bpb']:.4f} -> {found['after']['val_bpb']:.4f}" in lines[0]


def test_an_artifact_without_a_denoiser_is_tuned_as_what_it_is(
    call: Callable[..., Called], data: dict[str, Any], tmp_path: Path
) -> None:
    plain = export(tmp_path / "ar.ptz", data, "ar")
    found = facts(call(artifact=plain, iterations=10))
    assert found["recipe"] == "ar"
    assert found["after"]["val_bpb"] < found["before"]["val_bpb"]
    assert found["before"]["bound"] is None
    status, _, err = call(artifact=plain, recipe="direct")
    assert status == 2
    assert "RECIPE='direct' trains windows, and this artifact has no denoiser" in err
    assert "use RECIPE=ar" in err


def test_nothing_but_the_updates_trains(
    artifact: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    cfg = tiny(
        **data, train_seq_len=64, train_batch_tokens=256, ema_decay=0.5, out_dir=str(tmp_path)
    )
    model, _ = tg.load_artifact(artifact, CPU)
    names = [name for name, _ in finetune.matrices(model)]
    assert len(names) == 6 * cfg.num_layers
    finetune.add_updates(model, 3, 0)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    state = tg.TrainState(cfg, make_run(cfg), tg.TokenLoader(cfg, "train"), model)
    objective = tg.Objective(cfg, state.run, state.model)
    for step in range(3):
        tg.train_step(state, objective, tg.ScheduleState(step, 0.9, 1.0))
    moved = {name for name, w in model.state_dict().items() if not w.equal(before[name])}
    assert moved == {f"{name}{MARK}0.{part}" for name in names for part in ("lora_a", "lora_b")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
    assert sum(len(group["params"]) for group in state.adam.param_groups) == len(moved)
    assert [group["base_lr"] for group in state.adam.param_groups] == [cfg.adapter_lr]
    assert not state.matrices  # Muon has nothing to do


def test_an_update_is_b_times_a(artifact: Path) -> None:
    base, _ = tg.load_artifact(artifact, CPU)
    weights = {name: module.weight.detach().clone() for name, module in finetune.matrices(base)}
    finetune.add_updates(base, 3, 0)
    own = dict(finetune.matrices(base))
    assert all(module.weight.equal(weights[name]) for name, module in own.items())
    model = updated(artifact)
    for name, module in finetune.matrices(model):
        parts = dict(module.named_parameters())
        a, b = parts["parametrizations.weight.0.lora_a"], parts["parametrizations.weight.0.lora_b"]
        assert a.shape == (3, weights[name].shape[1])
        assert b.shape == (weights[name].shape[0], 3)
        torch.testing.assert_close(module.weight, weights[name] + b @ a)


@pytest.mark.slow
def test_it_goes_on_from_its_checkpoint(call: Callable[..., Called], tmp_path: Path) -> None:
    whole = facts(call("--rank", "2", "--out", "whole.ptz", iterations=6))
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    about, _ = tg.unpack_tensors(checkpoint.read_bytes())
    assert about["step"] == 6
    assert {name: about[name] for name in tg.IDENTITY} == {n: whole[n] for n in tg.IDENTITY}
    called = call("--rank", "2", "--out", "again.ptz", iterations=6, resume="auto")
    again = facts(called)
    assert f"resume checkpoint:{checkpoint} step:6" in called[2]
    assert "train_loss" not in called[2]
    assert again["after"] == whole["after"]
    other = facts(call("--rank", "3", iterations=6, resume="auto"))  # another rank is another run
    assert other["log"] != whole["log"]
    assert len(list((tmp_path / "out" / "checkpoints").glob("*_r?.ckpt"))) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore"
)  # the tracer hides a warning of its own, which turning it into an error defeats
def test_a_compiled_stream_is_one_whole_graph(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    cfg = tiny(vocab_size=400, train_seq_len=64, train_batch_tokens=256)
    totals = []
    for compiled in (False, True):
        run, model = make_run(cfg), updated(artifact)
        run.compile = compiled
        loss, _ = tg.Objective(cfg, run, model)(
            random_rows(2, 65, 400), 0, 8, tg.ScheduleState(5, 0.9, 1.0)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        totals.append([p.grad.sum().item() for p in model.parameters() if p.grad is not None])
    assert len(totals[0]) == 2 * 6 * cfg.num_layers
    assert totals[0] == pytest.approx(totals[1], rel=1e-4, abs=1e-6)


# ---- the file ----


def test_what_is_loaded_is_what_was_trained(artifact: Path, tmp_path: Path) -> None:
    model = updated(artifact)
    path = save(tmp_path / "a.ptz", model, artifact)
    loaded, _ = tg.load_artifact(artifact, CPU)
    rows = random_rows(2, 64, 400)
    plain = tg.token_nll_causal(loaded, rows)
    finetune.load_adapter(path, loaded, artifact)
    found, expected = (tg.token_nll_causal(each, rows) for each in (loaded, model))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)  # of fp16
    assert (found - plain).abs().max() > 0.05
    # Added to the weights: decoding costs nothing more.
    assert not any(MARK in name for name in loaded.state_dict())


def fault_of(path: Path, artifact: Path) -> str:
    model, _ = tg.load_artifact(artifact, CPU)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(tg.UserError) as caught:
        finetune.load_adapter(path, model, artifact)
    assert all(w.equal(before[name]) for name, w in model.state_dict().items())
    assert f"python scripts/finetune.py {artifact}" in str(caught.value)
    return str(caught.value)


def test_an_adapter_of_another_artifact_is_refused(
    artifact: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    other = export(tmp_path / "other.ptz", data, seed=1)
    path = save(tmp_path / "a.ptz", updated(artifact), artifact)
    message = fault_of(path, other)
    for named in (
        "belongs to another artifact",
        finetune.sha256_of(artifact)[:12],
        finetune.sha256_of(other)[:12],
    ):
        assert named in message
    wide = export(tmp_path / "wide.ptz", data, model_dim=32)
    assert "belongs to another artifact" in fault_of(path, wide)


def test_a_damaged_adapter_is_refused(artifact: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ptz", updated(artifact), artifact)
    whole = path.read_bytes()
    about, tensors = tg.unpack_tensors(tg.decompress(whole))

    def packed(changed: dict[str, torch.Tensor] = tensors, **more: Any) -> bytes:
        return zlib.compress(tg.pack_tensors(about | more, changed))

    def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
        return packed({name: change(w) if part in name else w for name, w in tensors.items()})

    path.write_bytes(packed())
    finetune.load_adapter(path, tg.load_artifact(artifact, CPU)[0], artifact)  # as it was
    lacking = {name: w for name, w in tensors.items() if "c_q" not in name}
    contents: dict[bytes, str] = {
        whole[:-2]: "truncated",
        whole[: len(whole) // 2]: "truncated",
        whole + b"x": "followed by other bytes",
        b"": "truncated",
        b"hello": "",
        zlib.compress(b"hello"): "truncated",
        zlib.compress(tg.pack_tensors({}, {})): "format",
        packed(format="text-diffusion-adapter-1"): FORMAT_RULE,
        artifact.read_bytes(): FORMAT_RULE,
        packed(rank=10**12): "updates of rank 1000000000000 do not fit",
        packed(rank=-1): "",
        packed(rank="3"): "",
        packed(artifact_sha256=None): "",
        packed(lacking): "c_q.lora_a",
        packed(tensors | {"x.lora_a": torch.zeros(2)}): "do not fit this model: x.lora_a",
        changed("lora_b", lambda w: w[:-1]): "do not fit",
        changed("lora_b", lambda w: w.float()): "do not fit",
        changed(
            "1.attn.c_q.lora_a", lambda w: w / 0
        ): "1.attn.c_q.lora_a holds numbers that are not finite",
    }
    for content, named in contents.items():
        path.write_bytes(content)
        message = fault_of(path, artifact)
        assert f"adapter {path} is missing, damaged or not ours" in message
        assert named in message
    assert "No such file" in fault_of(tmp_path / "none.ptz", artifact)


FORMAT_RULE = "its format is not 'text-diffusion-adapter-2'"


def test_a_flipped_bit_of_an_adapter_is_refused(artifact: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.ptz", updated(artifact), artifact)
    content = tg.decompress(path.read_bytes())
    for at in range(0, len(content), 101):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(zlib.compress(flipped))
        # The size comes first, and ends the decompression.
        why = "truncated, followed by other bytes" if at < 8 else "its checksum does not fit"
        assert why in fault_of(path, artifact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_an_update_that_fp16_cannot_hold_is_named(
    artifact: Path, tmp_path: Path, value: float
) -> None:
    model = updated(artifact)
    with torch.no_grad():
        named = dict(model.named_parameters())
        named[f"blocks.1.attn.c_q{MARK}0.lora_b"][2, 1] = value
    with pytest.raises(tg.UserError, match=r"blocks\.1\.attn\.c_q\.lora_b .* lower ADAPTER_LR"):
        save(tmp_path / "a.ptz", model, artifact)
    assert not list(tmp_path.iterdir())


# ---- what is refused before training ----


@pytest.mark.parametrize("rank", [0, -3, 9])
def test_a_rank_that_is_none_is_named(
    call: Callable[..., Called], rank: int, tmp_path: Path
) -> None:
    status, out, err = call("--rank", str(rank))
    assert (status, out) == (2, "")
    assert (
        f"error: --rank={rank} (or LORA_RANK) must be in [1, 8], the smallest dimension of this "
        "model's" in err
    )
    assert not list(tmp_path.iterdir())


def test_bad_input_is_named_with_a_remedy(
    call: Callable[..., Called], tokenizers: Tokenizers, data: dict[str, Any], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[dict[str, Any], list[str], list[str]]] = [
        ({"data_path": None}, [], ["DATA_PATH is not set", "prepare_data.py"]),
        (
            {"data_path": str(empty)},
            [],
            [f"DATA_PATH={str(empty)!r} holds no *_train_*.bin", "prepare_data.py"],
        ),
        (
            {"tokenizer_path": str(tokenizers.nmt_nfkc)},
            [],
            ["nmt_nfkc.model", "is not the tokenizer", "name that one"],
        ),
        ({"model_dim": 32}, [], ["MODEL_DIM='32' is the artifact's, 16; leave it out"]),
        (
            {"model_dim": "x", "init_from": "y"},
            [],
            ["MODEL_DIM='x' is the artifact's", "INIT_FROM='y' is the artifact"],
        ),
        ({"num_layers": 9, "train_seq_len": 8}, [], ["NUM_LAYERS='9'", "TRAIN_SEQ_LEN='8'"]),
        ({"adapter_lr": -1}, [], ["ADAPTER_LR=-1.0 must be in [0, 1000]"]),
        ({}, ["--window", "7"], ["--window=7 must divide the 64 tokens"]),
        ({"recipe": "dirct"}, [], ["RECIPE='dirct' is", "closest: direct"]),
    ]
    for values, argv, named in cases:
        status, out, err = call(*argv, **values)
        assert (status, out) == (2, ""), values
        for part in named:
            assert part in err, (part, err)
    status, _, err = call(artifact=tmp_path / "none.ptz")
    assert status == 2
    assert "none.ptz is missing" in err
    assert list(tmp_path.iterdir()) == [empty]  # nothing was written
    assert facts(call(model_dim=16, iterations=1))["steps"] == 1  # what is the same may be said


def other_text(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same shards with one token changed."""
    shutil.copytree(data["data_path"], folder)
    path = folder / "tiny_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\x05\x00"
    path.write_bytes(content)
    return {**data, "data_path": str(folder)}


def test_a_checkpoint_of_other_text_is_not_resumed(
    call: Callable[..., Called], data: dict[str, Any], tmp_path: Path
) -> None:
    first = facts(call("--out", "a.ptz", iterations=2))
    other = other_text(data, tmp_path / "other")
    more = dict(iterations=2, resume="auto", run_id=Path(first["log"]).stem.split("_finetune")[0])
    status, _, err = call("--out", "b.ptz", **more, **other)
    assert status == 2
    for named in ("does not fit", "DATA_SHA256", first["data_sha256"], "RUN_ID"):
        assert named in err
    assert not (tmp_path / "b.ptz").exists()
    assert facts(call("--out", "b.ptz", **more, **data))["after"] == first["after"]


def test_an_adapter_says_what_made_it(
    call: Callable[..., Called], artifact: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    found = facts(call("--rank", "2", "--out", "a.ptz", iterations=1))
    about = finetune.load_adapter(tmp_path / "a.ptz", tg.load_artifact(artifact, CPU)[0], artifact)
    assert about["artifact_sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
    tokenizer = Path(data["tokenizer_path"]).read_bytes()
    assert about["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert about["program_sha256"] == common.program_sha256()
    assert about["data_sha256"] == found["data_sha256"] != ""
    facts(call("--out", "b.ptz", iterations=1, **other_text(data, tmp_path / "other")))
    other = finetune.load_adapter(tmp_path / "b.ptz", tg.load_artifact(artifact, CPU)[0], artifact)
    assert other["data_sha256"] != about["data_sha256"]


def with_manifest(
    data: dict[str, Any], folder: Path, tokenizer: str = "", num_bytes: int = 0
) -> str:
    """Copy a folder of shards, with a manifest as prepare_data.py writes it."""
    shutil.copytree(data["data_path"], folder)
    sha256 = tokenizer or finetune.sha256_of(Path(data["tokenizer_path"]))
    files = {p.name: {"sha256": finetune.sha256_of(p)} for p in folder.glob("*.bin")}
    about = {"settings": {}, "files": files, "tokenizer": {"sha256": sha256}}
    about["splits"] = {"val": {"bytes": num_bytes}}
    (folder / "manifest.json").write_text(json.dumps(about), encoding="utf-8")
    return str(folder)


def test_text_of_another_tokenizer_is_refused_before_anything_is_written(
    call: Callable[..., Called], artifact: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    folder = with_manifest(data, tmp_path / "foreign", "e" * 64)
    status, out, err = call(data_path=folder)
    assert (status, out) == (2, "")
    for named in (f"DATA_PATH={folder!r}", "another tokenizer", "e" * 12, str(artifact)):
        assert named in err
    assert list(tmp_path.iterdir()) == [tmp_path / "foreign"]


def test_bytes_that_differ_from_the_source_are_a_warning_and_a_second_score(
    call: Callable[..., Called], data: dict[str, Any], tmp_path: Path
) -> None:
    called = call(iterations=1)
    usual = facts(called)["before"]
    assert "warning" not in called[2]
    assert usual["val_bpb_source_bytes"] == usual["val_bpb"]
    (event,) = (line for line in called[2].splitlines() if line.startswith("data "))
    source = 2 * int(event.split("val_bytes:")[1].split()[0])
    called = call(iterations=1, data_path=with_manifest(data, tmp_path / "ours", "", source))
    assert f"the source text has {source:,}" in called[2]
    found = facts(called)["before"]
    assert found["val_bpb"] == usual["val_bpb"]
    assert found["val_bpb_source_bytes"] == pytest.approx(usual["val_bpb"] / 2)


def test_neither_a_folder_nor_the_artifact_is_overwritten(
    call: Callable[..., Called], artifact: Path, tmp_path: Path
) -> None:
    before = artifact.read_bytes()
    (tmp_path / "link.ptz").symlink_to(artifact)
    for out in (str(tmp_path), str(artifact), "link.ptz"):
        status, _, err = call("--out", out)
        assert status == 2
        assert f"--out={out} must be neither a folder nor the artifact" in err
    assert artifact.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["link.ptz"]


# ---- the other commands ----


def test_sample_decodes_with_an_adapter(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = updated(artifact)
    path = save(tmp_path / "a.ptz", model, artifact)
    argv = [
        "--artifact",
        str(artifact),
        "--device",
        "cpu",
        "--prompt",
        "def f",
        "--tokens",
        "24",
        "--temperature",
        "1",
    ]
    texts = []
    for more in ([], ["--adapter", str(path)]):
        assert sample.main([*argv, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["text"])
    assert texts[0] != texts[1]
    at = sample.load(artifact, None, CPU, path)
    ids = [at.tokenizer.bos_id(), *at.tokenizer.encode("def f")]
    sampling = decoding.Sampling(temperature=1.0, end=at.tokenizer.bos_id())
    padded = torch.tensor([ids + [0] * 24])
    mode = decoding.MODES["ar"]._replace(sampling=sampling)
    expected = decoding.decode(at.model, padded, len(ids), len(ids) + 24, mode)
    assert texts[1] == at.tokenizer.decode(expected.ids[0].tolist())
    assert sample.main([*argv, "--adapter", str(tmp_path / "none.ptz")]) == 2
    assert "none.ptz is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_likelihood_scores_with_an_adapter(
    artifact: Path, tmp_path: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a.ptz", updated(artifact), artifact)
    argv = [
        "--artifact",
        str(artifact),
        "--device",
        "cpu",
        "--rows",
        "4",
        "--windows",
        "16",
        "--samples",
        "2",
    ]
    found = []
    for more in ([], ["--adapter", str(path)]):
        assert likelihood.main([*argv, *more]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [result["adapter"] for result in found] == [None, str(path)]
    assert abs(found[0]["causal_bpb"] - found[1]["causal_bpb"]) > 1e-3
    model, _ = tg.load_artifact(artifact, CPU)
    finetune.load_adapter(path, model, artifact)
    assert found[1]["causal_bpb"] == likelihood.causal(
        likelihood.load(likelihood.parse_args([*argv, "--adapter", str(path)])), lambda: None
    )


def test_the_rank_comes_from_the_environment_too(
    call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert facts(call(iterations=1, lora_rank=2))["rank"] == 2
    # The command line says more.
    assert facts(call("--rank", "3", iterations=1, lora_rank=2))["rank"] == 3
    monkeypatch.setenv("LORA_RANK", "two")
    with pytest.raises(SystemExit, match="2"):
        finetune.parse_args(["final_model.int8.ptz"])
