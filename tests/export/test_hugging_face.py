"""scripts/export/hugging_face.py: the folder gives what the artifact gives, to the bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch

import train_gpt as tg
from scripts import common
from scripts.export import harness, hugging_face
from scripts.study import to_tensorboard
from tests.bench.artifacts import save
from tests.conftest import (
    BOS,
    CPU,
    HARD_TEXTS,
    Tokenizers,
    facts,
    outcome,
    random_rows,
    randomise,
    rounding,
    tiny,
)

pytestmark = pytest.mark.slow

# In a process that has transformers, torch, numpy and sentencepiece alone, and no network: load
# every folder of argv and save what it computes.
PROBE = """
import sys
for name in ("zstandard", "lm_eval", "datasets", "accelerate", "train_gpt", "scripts", "tests"):
    sys.modules[name] = None
import socket
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = refuse
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
out, given, *folders = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
given, found = torch.load(given), {}
for folder in folders:
    load = dict(trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **load)
    tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    ids = given["ids"]
    masked = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    here = dict(
        logits=model(ids).logits.detach(),
        loss=model(ids, labels=ids).loss.detach(),
        masked=masked, masked_loss=model(ids, labels=masked).loss.detach(),
        padded=model(ids, attention_mask=mask.bool()).logits.detach(),
        as_tuple=model(ids, return_dict=False)[0].detach(),
        generated=model.generate(ids[:, :9], max_new_tokens=12, eos_token_id=None),
        ended=model.generate(ids[:1, :9], max_new_tokens=40, do_sample=True, temperature=9.0),
        encoded=[tokenizer(text, add_special_tokens=False).input_ids for text in given["texts"]],
        with_bos=[tokenizer(text).input_ids for text in given["texts"]],
        batch=dict(tokenizer(given["texts"][:4], padding=True, return_tensors="pt")),
        decoded=[tokenizer.decode(row) for row in given["rows"]],
        special=[tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        length=tokenizer.model_max_length, vocabulary=len(tokenizer),
        training=model.training, dtype=model.dtype, errors=[],
    )
    def attempt(call):
        try:
            return call()
        except ValueError as error:
            here["errors"].append(str(error))
    here["infilled"] = attempt(lambda: model.infill(ids[:, :9], ids[:, 20:30], 11, num_steps=4))
    here["continued"] = attempt(lambda: model.infill(ids[:, :9], ids[:, :0], 7))
    attempt(lambda: model.infill(ids[:, :9], ids[:, :0], 0))
    attempt(lambda: model.infill(ids[:, :0], ids, 1))
    attempt(lambda: model(ids.repeat(1, 9)))
    attempt(lambda: model(ids, attention_mask=mask.flip(1)))
    model(ids, labels=ids).loss.backward()
    here["gradients"] = [p.grad for p in (model.gpt.tok_emb, model.gpt.blocks[0].attn.proj.weight)]
    if len(found) == 0:  # a model that was loaded can be saved and loaded again
        for part in (model, tokenizer):
            part.save_pretrained("again")
        model = AutoModelForCausalLM.from_pretrained("again", **load)
        tokenizer = AutoTokenizer.from_pretrained("again", **load)
        here["again"] = model(ids).logits.detach()
        here["encoded_again"] = tokenizer(given["texts"][0]).input_ids
    found[folder] = here
torch.save(found, out)
"""


@dataclasses.dataclass
class Exported:
    """A folder, the model it was made from, and what a process of its own computed from it."""

    folder: Path
    model: tg.GPT
    processor: spm.SentencePieceProcessor
    given: dict[str, Any]
    found: dict[str, Any]


VARIANTS: dict[str, dict[str, Any]] = {
    "direct": {},
    "ar": {},  # without a denoiser
    "retrograde": {},
    "folding": {"self_condition": "soft", "bigram_vocab_size": 64, "num_layers": 3},
}


@pytest.fixture(scope="module")
def exports(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], tokenizers: Tokenizers
) -> dict[str, Exported]:
    """Export several models, and let one process load them all."""
    home, made = tmp_path_factory.mktemp("home"), dict[str, Exported]()
    texts = [*HARD_TEXTS, "", " ", "\n", "def f(a, b):\n    return a\u00a0+ b\n", "a" * 300]
    processor = spm.SentencePieceProcessor(model_file=str(tokenizers.identity))
    rows = [row.tolist() for row in random_rows(8, 30, processor.vocab_size(), seed=3)]
    ids = random_rows(3, 32, processor.vocab_size())
    ids[:, 0], ids[:, 4] = BOS, 0  # padding in the middle is a token as others are
    given = {"ids": ids, "texts": texts, "rows": rows}
    torch.save(given, home / "given.pt")
    for name, changes in VARIANTS.items():
        path = tokenizers.nmt_nfkc if name == "folding" else tokenizers.identity
        named = {**data, "tokenizer_path": str(path)}
        recipe = "direct" if name == "folding" else name
        cfg = tiny(recipe, **named, train_seq_len=64, train_batch_tokens=256, **changes)
        artifact = home / f"{name}.ptz"
        save(artifact, randomise(tg.GPT(cfg)).state_dict(), cfg)
        argv = ["--artifact", str(artifact), "--out", str(home / name)]
        assert hugging_face.main(argv) == 0
        model = tg.load_artifact(artifact, CPU)[0]
        processor = spm.SentencePieceProcessor(model_file=str(path))
        made[name] = Exported(home / name, model, processor, given, {})
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_CACHE")}
    env = kept | {"HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    files = [str(home / name) for name in ("found.pt", "given.pt", *made)]
    command = [sys.executable, "-P", "-c", PROBE, *files]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(home / "found.pt")
    for name, each in made.items():
        each.found = found[str(home / name)]
    return made


@pytest.fixture(params=VARIANTS)
def exported(exports: dict[str, Exported], request: pytest.FixtureRequest) -> Exported:
    return exports[request.param]


def test_logits_are_those_of_the_artifact_to_the_bit(exported: Exported) -> None:
    with torch.no_grad():
        logits = exported.model.forward_causal(exported.given["ids"])[0]
    assert logits.std() > 0.1
    assert torch.equal(exported.found["logits"], logits)
    assert torch.equal(exported.found["as_tuple"], logits)
    assert (exported.found["training"], exported.found["dtype"]) == (False, torch.float32)


def test_labels_give_the_exact_loss(exported: Exported) -> None:
    nats = tg.token_nll_causal(exported.model, exported.given["ids"])
    near = {"rel": rounding(nats.numel()), "abs": 0.0}
    assert exported.found["loss"].item() == pytest.approx(nats.mean().item(), **near)
    scored = exported.found["masked"][:, 1:] >= 0
    assert 0 < scored.sum() < scored.numel()
    assert exported.found["masked_loss"].item() == pytest.approx(nats[scored].mean().item(), **near)


def test_the_loss_reaches_the_weights(exported: Exported) -> None:
    for gradient in exported.found["gradients"]:
        assert gradient.abs().max() > 0


def test_a_loaded_model_can_be_saved_again(exports: dict[str, Exported]) -> None:
    found = exports["direct"].found
    assert torch.equal(found["again"], found["logits"])
    assert found["encoded_again"] == found["with_bos"][0]


def test_padding_after_a_row_changes_no_prediction_of_its_tokens(exported: Exported) -> None:
    assert torch.equal(exported.found["padded"][0, :20], exported.found["logits"][0, :20])


def test_generation_is_greedy_decoding(exported: Exported) -> None:
    ids = torch.nn.functional.pad(exported.given["ids"][:, :9], (0, 12))
    assert torch.equal(
        exported.found["generated"], tg.decode_autoregressive(exported.model, ids, 9, 21)
    )


def test_generation_samples_and_ends_with_bos(exported: Exported) -> None:
    row = exported.found["ended"][0].tolist()
    assert len(row) == 49 or row.index(BOS, 9) == len(row) - 1
    assert exported.found["special"] == [BOS, BOS, 0]  # bos, eos, pad


def test_infill_refines_as_the_program_does(exported: Exported) -> None:
    ids = exported.given["ids"]
    if exported.model.mask_emb is None:
        assert exported.found["infilled"] is None
        assert "without a denoiser (DIFFUSION_LOSS_WEIGHT=0)" in exported.found["errors"][0]
        return
    span = torch.zeros_like(ids[:, :11])
    whole = torch.cat((ids[:, :9], span, ids[:, 20:30]), dim=1)
    expected = tg.decode_refine(exported.model, whole, 9, 20, 4)
    assert torch.equal(exported.found["infilled"], expected)
    whole = torch.cat((ids[:, :9], span[:, :7]), dim=1)
    assert torch.equal(exported.found["continued"], tg.decode_refine(exported.model, whole, 9, 16))


def test_tokens_are_those_of_sentencepiece(exported: Exported) -> None:
    encode, texts = exported.processor.encode, exported.given["texts"]
    assert exported.found["encoded"] == [encode(text) for text in texts]
    assert exported.found["with_bos"] == [[BOS, *encode(text)] for text in texts]
    assert exported.found["decoded"] == [
        exported.processor.decode(x) for x in exported.given["rows"]
    ]
    assert exported.found["vocabulary"] == exported.processor.vocab_size()
    assert exported.found["length"] == 64
    batch = exported.found["batch"]
    for i, text in enumerate(texts[:4]):
        ids, kept = batch["input_ids"][i], batch["attention_mask"][i]
        num = 1 + len(encode(text))
        assert ids.tolist() == [BOS, *encode(text)] + [0] * (len(ids) - num)
        assert kept.tolist() == [1] * num + [0] * (len(ids) - num)


def test_wrong_inputs_are_named(exports: dict[str, Exported]) -> None:
    errors = exports["direct"].found["errors"]
    assert len(errors) == 4
    assert errors[0] == "num_tokens=0 must be 1 or more"
    assert errors[1] == "input_ids is empty; begin it with BOS"
    assert errors[2].startswith(
        "input_ids has 288 tokens; this model was trained to read at most 64"
    )
    assert errors[3].startswith("attention_mask hides tokens before others")


def test_the_folder_holds_all_that_it_needs(exports: dict[str, Exported]) -> None:
    folder = exports["direct"].folder
    for name in ("train_gpt.py", "LICENSE"):
        assert (folder / name).read_bytes() == (hugging_face.ROOT / name).read_bytes()
    config = (folder / "config.json").read_text("utf-8")
    assert str(folder.parent) not in config  # no path of the machine that trained it
    assert "window_attention" not in config  # which another machine may not have
    assert exports["direct"].model.cfg.data_path not in config
    card = (folder / "README.md").read_text("utf-8")
    assert "Not stated: the model was exported without the log of its run." in card
    assert "the text that it encoded" in card
    assert "val_bpb" not in card
    other = (exports["folding"].folder / "README.md").read_text("utf-8")
    assert "folded white space" in other
    assert "`infill` raises an error" in (exports["ar"].folder / "README.md").read_text("utf-8")


# ---- model card and errors ----


@pytest.fixture
def run_files(data: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """An artifact of a run, and the run's log."""
    path = tmp_path / "final_model.int8.ptz"
    cfg = dataclasses.replace(tiny(**data), out_dir=str(tmp_path))
    log = save(path, randomise(tg.GPT(cfg)).state_dict(), cfg)
    events: list[dict[str, Any]] = [
        dict(event="header", machine="Test CPU", sha256="ab", time="2026-01-01T00:00:00Z"),
        dict(event="config", values=vars(cfg), source={}),
        dict(event="data", train_tokens=9000, tokenizer_sha256=tg.ByteCounter(cfg).sha256),
        dict(event="size") | log.of("size")[0],
        dict(event="final", val_bpb=2.25, val_loss=3.5, tokens=640, bytes=1999),
        dict(event="nelbo", window=4, nelbo_bpb=2.5, standard_error=0.125, samples=4, tokens=128),
        dict(event="nelbo", window=1, nelbo_bpb=2.4, standard_error=0.0, samples=1, tokens=128),
        dict(event="parallel_eval", task="infill", span=4, steps=2, mode="refine", token_acc=0.375),
        dict(event="done", steps=8, train_seconds=61.0),
    ]
    return path, write_log(tmp_path / "run.jsonl", events)


def test_the_card_says_what_is_not_known(
    run_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, log = run_files
    change(log, "nelbo", nelbo_bpb=None)
    change(log, "parallel_eval", token_acc=None)
    change(log, "data", train_tokens=None)
    out = tmp_path / "folder"
    argv = ["--artifact", str(artifact), "--out", str(out), "--log", str(log)]
    facts(outcome(hugging_face.main, argv, capsys))
    card = (out / "README.md").read_text("utf-8")
    assert "denoising windows of 4 | - | 0.1250 |" in card
    assert "| infill | refine | 4 | 2 | - |" in card
    assert "training split of - tokens" in card
    assert "`program_sha256`: `not known`" in card


@pytest.mark.parametrize(
    ("sha256", "says"),
    [(common.program_sha256(), "is that program"), ("ab" * 32, "is another version of it")],
)
def test_the_card_tells_whether_the_program_is_that_of_training(
    run_files: tuple[Path, Path], sha256: str, says: str
) -> None:
    artifact = common.load_artifact(run_files[0], CPU)
    identity = {**artifact.identity, "program_sha256": sha256}
    card = hugging_face.training(artifact._replace(identity=identity), None)
    assert f"`train_gpt.py` in this folder {says}." in card


def write_log(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(event)}\n" for event in events), "utf-8")
    return path


def test_the_card_states_what_the_log_says(
    run_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, log = run_files
    out = tmp_path / "folder"
    out.mkdir()  # an empty folder is filled
    argv = ["--artifact", str(artifact), "--out", str(out), "--log", str(log)]
    found = facts(outcome(hugging_face.main, argv, capsys))
    assert found["folder"] == str(out)
    assert found["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    card = (out / "README.md").read_text("utf-8")
    assert "| exact, left to right | 2.2500 | - | whole validation split, 640 tokens |" in card
    assert "| exact, denoising windows of 1 | 2.4000 | 0.0000 | 128 tokens, K = 1 |" in card
    bound = "| **upper bound**, denoising windows of 4 | 2.5000 | 0.1250 | 128 tokens, K = 4 |"
    assert bound in card
    assert "| infill | refine | 4 | 2 | 0.375 |" in card
    assert "8 steps in 61 s on Test CPU; training split of 9,000 tokens." in card
    assert "`train_gpt.py` in this folder" not in card  # the artifact does not say which it is of
    assert str(tmp_path) not in card


def change(log: Path, kind: str, **values: Any) -> None:
    events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    write_log(log, [event | values if event["event"] == kind else event for event in events])


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("size", {"model_bytes": 5}, "is not of"),
        ("data", {"tokenizer_sha256": "cd" * 32}, "tokenizer cdcdcdcdcdcd"),
        ("config", {"values": {**vars(tiny()), "seed": 7}}, "SEED=7"),
        ("done", {"event": "other"}, "unfinished, last logged step 0"),
        ("final", {"val_bpb": "x"}, "not a number above 0"),
    ],
)
def test_a_log_of_another_run_is_refused(
    run_files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    values: dict[str, Any],
    message: str,
) -> None:
    artifact, log = run_files
    change(log, kind, **values)
    out = tmp_path / "folder"
    argv = ["--artifact", str(artifact), "--out", str(out), "--log", str(log)]
    status, _, errors = outcome(hugging_face.main, argv, capsys)
    assert (status, out.exists()) == (2, False)
    assert message in errors
    assert errors.startswith("error: ")


def test_a_folder_that_is_not_empty_is_left_alone(
    run_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, log = run_files
    for out, message in (
        (tmp_path, "exists and is not an empty folder"),
        (log, "exists and is not an empty folder"),
        (tmp_path / "no" / "folder", "there is no folder"),
    ):
        before = sorted(tmp_path.iterdir())
        argv = ["--artifact", str(artifact), "--out", str(out)]
        status, _, errors = outcome(hugging_face.main, argv, capsys)
        assert status == 2
        assert message in errors
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--artifact", "no.ptz"], "artifact no.ptz is missing, damaged or not ours"),
        (["--tokenizer", "no.model"], "tokenizer no.model cannot be read"),
        (["--log", "no.jsonl"], "it cannot be read"),
        ([], "--out"),
    ],
)
def test_what_is_missing_is_named(
    run_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--out", "folder", *argv] if argv else []
    status, _, errors = outcome(hugging_face.main, given, capsys)
    assert (status, Path("folder").exists()) == (2, False)
    assert message in errors


def test_another_tokenizer_is_refused(
    run_files: tuple[Path, Path],
    tokenizers: Tokenizers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--artifact", str(run_files[0]), "--tokenizer", str(tokenizers.nmt_nfkc)]
    status, _, errors = outcome(hugging_face.main, [*argv, "--out", str(tmp_path / "x")], capsys)
    assert status == 2
    assert "is not the tokenizer" in errors


@pytest.mark.parametrize(
    ("main", "module"),
    [
        (hugging_face.main, "transformers"),
        (harness.main, "lm_eval"),
        (to_tensorboard.main, "tensorboardX"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    module: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    argv = ["--tasks", "x"] if module == "lm_eval" else ["--out", "x"]
    status, _, errors = outcome(main, argv, capsys)
    assert status == 2
    assert f"needs {module}: pip install {module} (version: see requirements-eval.txt)" in errors
