"""scripts/export/harness.py: scores are those of train_gpt.py, computed by hand or by itself."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch

import train_gpt as tg
from scripts.export import harness
from tests.bench.artifacts import save
from tests.conftest import (
    BOS,
    CPU,
    HARD_TEXTS,
    Called,
    Tokenizers,
    facts,
    make_run,
    outcome,
    random_rows,
    randomise,
    tiny,
    write_shard,
)

pytestmark = pytest.mark.slow

T = 32
TASK = """task: documents
dataset_path: json
dataset_kwargs: {{cache_dir: {cache}, data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests what lm_eval asks pip and the machine, for four seconds each time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


@pytest.fixture(scope="module")
def artifacts(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return the path of the artifact of a recipe."""
    folder = tmp_path_factory.mktemp("artifacts")

    def path(recipe: str = "direct") -> Path:
        found = folder / f"{recipe}.ptz"
        if not found.exists():
            cfg = tiny(recipe, **data, train_seq_len=T, train_batch_tokens=2 * T)
            save(found, randomise(tg.GPT(cfg)).state_dict(), cfg)
        return found

    return path


@pytest.fixture
def lm(artifacts: Callable[..., Path]) -> Any:
    from scripts.export.lm_eval_model import TextDiffusionLM

    return TextDiffusionLM(artifacts(), device="cpu", batch_size=3)


@pytest.fixture
def processor(tokenizers: Tokenizers) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(tokenizers.identity))


def write_task(folder: Path, texts: list[str]) -> Path:
    """Write documents as JSON, and the rolling task over them."""
    file, task = folder / "documents.jsonl", folder / "documents.yaml"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    task.write_text(TASK.format(cache=folder / "cache", file=file), "utf-8")
    return task


def whole_rows(sp: spm.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    """Cut texts to documents whose tokens are a multiple of T, and come back when encoded."""
    found = []
    for text in texts:
        ids = sp.encode(text)
        for count in range(len(ids) // T * T, 0, -T):
            if sp.encode(sp.decode(ids[:count])) == ids[:count]:
                found.append(ids[:count])
                break
    return found


@dataclasses.dataclass
class Scored:
    """What train_gpt.py finds for one document as a validation split."""

    nats: float
    num_bytes: int
    bound: dict[str, Any]


def score(model: tg.GPT, folder: Path, ids: list[int], window: int) -> Scored:
    write_shard(folder / "one_val_000000.bin", [BOS, *ids])
    cfg = dataclasses.replace(model.cfg, data_path=str(folder), nelbo_sequences=0, nelbo_samples=4)
    split = make_run(cfg), tg.TokenLoader(cfg, "val"), tg.ByteCounter(cfg)
    exact = tg.evaluate_exact(model, *split)
    assert exact["tokens"] == len(ids)
    bound = tg.evaluate_bound(model, *split, window)
    return Scored(exact["loss"] * exact["tokens"], exact["bytes"], bound)


def test_the_tokenizer_beside_an_artifact_is_taken(
    artifacts: Callable[..., Path], data: dict[str, Any], tmp_path: Path
) -> None:
    from scripts.export.lm_eval_model import TextDiffusionLM

    artifact = tmp_path / "model.ptz"
    artifact.write_bytes(artifacts().read_bytes())
    beside = artifact.with_suffix(".model")
    beside.write_bytes(b"another")
    with pytest.raises(tg.UserError, match=r"model\.model .*is not the tokenizer .*model\.ptz"):
        TextDiffusionLM(artifact, device="cpu")
    beside.write_bytes(Path(data["tokenizer_path"]).read_bytes())
    assert TextDiffusionLM(artifact, device="cpu").model.cfg.tokenizer_path == str(beside)


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> Called:
    return outcome(harness.main, ["--device", "cpu", *(str(part) for part in argv)], capsys)


def test_bits_per_byte_of_a_rolling_task_is_val_bpb(
    artifacts: Callable[..., Path],
    processor: spm.SentencePieceProcessor,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    documents = whole_rows(processor, [*texts[:4], *HARD_TEXTS])
    model = tg.load_artifact(artifacts(), CPU)[0]
    scored = [score(model, tmp_path / str(i), ids, 8) for i, ids in enumerate(documents)]
    assert len(scored) > 5
    task = write_task(tmp_path, [processor.decode(ids) for ids in documents])
    found = facts(call(capsys, "--artifact", artifacts(), "--tasks", task))
    expected = tg.bits_per_byte(sum(s.nats for s in scored), sum(s.num_bytes for s in scored))
    assert found["results"]["documents"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)
    assert found["documents"] == {"documents": len(documents)}
    assert "bounds" not in found


def test_the_bound_has_a_name_of_its_own_and_is_that_of_train_gpt(
    artifacts: Callable[..., Path],
    processor: spm.SentencePieceProcessor,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (ids,) = whole_rows(processor, texts[:1])
    model = tg.load_artifact(artifacts(), CPU)[0]
    expected = score(model, tmp_path / "one", ids, 8).bound
    task = write_task(tmp_path, [processor.decode(ids)])
    out = tmp_path / "o.json"
    argv = ("--tasks", task, "--out", out, "--bound-window", 8, "--bound-samples", 4)
    found = facts(call(capsys, "--artifact", artifacts(), *argv))
    bound = found["bounds"]["documents"]
    assert bound["nelbo_bits_per_byte"] == pytest.approx(expected["bpb"], rel=1e-6)
    assert bound["standard_error"] == pytest.approx(expected["standard_error"], rel=1e-4)
    assert (bound["window"], bound["samples"]) == (8, 4)
    assert set(found["results"]["documents"]) == {"bits_per_byte,none"}
    assert json.loads(out.read_text("utf-8")) == found


def sampled(model: tg.GPT, row: torch.Tensor, size: int, samples: int) -> torch.Tensor:
    """Bounds (K, W) of the windows of a document's first row."""
    num = row.shape[1] - 1
    keys = tg.split_key(torch.zeros(1, 1, dtype=torch.int64), 0, torch.arange(num // size))
    mask = tg.window_mask(num, size, False, CPU)
    return tg.window_bounds(model, row, keys, size, samples, mask)[:, 0]


def test_the_bound_covers_every_token_of_a_ragged_document(lm: Any) -> None:
    ids = [BOS, *random_rows(1, 20, 400, seed=5)[0].tolist()]
    text = lm.processor.decode(ids)
    row = torch.tensor([lm.tok_encode(text)[:22]])
    (whole,) = {(row.shape[1] - 1) // 8 * 8}
    lm.tok_encode = lambda *_, **__: row[0].tolist()
    assert whole == 16
    assert row.shape[1] - 1 > whole
    windows, tokens = sampled(lm.model, row[:, : whole + 1], 8, 4), sampled(lm.model, row, 1, 1)
    found = lm.bound([text], 8, 4)
    expected = windows.sum(1).mean() + tokens[0, whole:].sum()
    assert found.nats == pytest.approx(expected.item(), rel=1e-6)
    assert found.variance == pytest.approx((windows.sum(1).var() / 4).item(), rel=1e-6)
    assert found.num_bytes == len(text.encode())
    exact = lm.bound([text], T, 4)  # no whole window
    assert (exact.nats, exact.variance) == (pytest.approx(tokens.sum().item(), rel=1e-6), 0)
    assert lm.bound([text, text], T, 4).nats == pytest.approx(2 * exact.nats, rel=1e-6)


def by_hand(model: tg.GPT, context: list[int], token: int) -> float:
    """Log-probability of a token, from a pass over its context alone."""
    with torch.no_grad():
        logits = model.forward_causal(torch.tensor([context]))[0]
    return float(logits[0, -1].double().log_softmax(-1)[token])


def test_a_document_of_any_length_is_scored_in_windows(
    lm: Any, processor: spm.SentencePieceProcessor, texts: list[str]
) -> None:
    documents = ["", *HARD_TEXTS, texts[0][:150]]
    requests = [SimpleNamespace(args=(text,), task_name="documents") for text in documents]
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    ragged = 0
    for text, nats in zip(documents, found, strict=True):
        ids = [BOS, *processor.encode(text)]
        ragged += len(ids) > T + 1 and len(ids) % T != 1
        expected = 0.0
        for i in range(1, len(ids)):
            first = (i - 1) // T * T  # of the window's context
            if first + T >= len(ids) > T:  # the last window reads T tokens, however few it scores
                first = len(ids) - 1 - T
            expected += by_hand(lm.model, ids[first:i], ids[i])
        assert nats == pytest.approx(expected, rel=1e-5, abs=0)
    assert ragged >= 1
    assert found[0] == 0.0
    assert lm.rolled == {"documents": documents}


def single_tokens(sp: spm.SentencePieceProcessor, context: str) -> list[str]:
    """Continuations that are one token after a context."""
    before = sp.encode(context)
    pieces = [sp.decode([*before, i])[len(context) :] for i in range(300, sp.vocab_size())]
    return [text for text in pieces if len(sp.encode(context + text)) == len(before) + 1 and text]


@pytest.mark.parametrize("context", ["def f(x):\n    return", "x" * 90, "é", ""])
def test_loglikelihood_of_one_token_is_its_log_softmax(
    lm: Any, processor: spm.SentencePieceProcessor, context: str
) -> None:
    chosen = single_tokens(processor, context)[:7]
    assert len(chosen) == 7
    requests = [SimpleNamespace(args=(context, text)) for text in chosen]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    before = [BOS, *processor.encode(context)][-T:]
    assert len(before) == T or len(before) < 30
    for text, (nats, greedy) in zip(chosen, found, strict=True):
        (token,) = processor.encode(context + text)[len(processor.encode(context)) :]
        assert nats == pytest.approx(by_hand(lm.model, before, token), rel=1e-5)
        best = int(lm.model.forward_causal(torch.tensor([before]))[0][0, -1].argmax())
        assert greedy == (token == best)


CHOICE = """task: choice
dataset_path: json
dataset_kwargs: {{cache_dir: {cache}, data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_a_multiple_choice_task_picks_the_highest_likelihood_choice(
    artifacts: Callable[..., Path],
    lm: Any,
    processor: spm.SentencePieceProcessor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    question = "def f(x):\n    return"
    choices = single_tokens(processor, question)[:3]
    before = [BOS, *processor.encode(question)]
    tokens = [processor.encode(question + choice)[-1] for choice in choices]
    scores = [by_hand(lm.model, before, token) for token in tokens]
    best = scores.index(max(scores))
    rows = [dict(question=question, choices=choices, answer=i) for i in (best, best, 0, 1, 2)]
    file, task = tmp_path / "choice.jsonl", tmp_path / "choice.yaml"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task.write_text(CHOICE.format(cache=tmp_path / "cache", file=file), "utf-8")
    found = facts(call(capsys, "--artifact", artifacts(), "--tasks", task))
    assert found["results"]["choice"]["acc,none"] == pytest.approx(3 / 5)


def test_results_are_numbers_or_null() -> None:
    metrics = {"a,none": np.float32(0.5), "b,none": np.int64(2), "c,none": math.nan}
    others = {"a_stderr,none": "N/A", "alias": "task", "sample_len": 3}
    expected = {"a,none": 0.5, "b,none": 2.0, "c,none": None}
    assert harness.numbers_of(metrics | others) == expected


def test_a_greedy_continuation_is_named_so(lm: Any) -> None:
    context = [BOS, 300, 301]
    rows = torch.tensor([context + [0] * 3])
    out = tg.decode_autoregressive(lm.model, rows, 3, 6)[0, 3:].tolist()
    other = [*out[:2], (out[2] + 1) % 400]
    texts = ("", "")
    found = lm._loglikelihood_tokens([(texts, context, ids) for ids in (out, other, [])])
    assert [greedy for _, greedy in found] == [True, False, True]
    summed = [by_hand(lm.model, context + out[:i], out[i]) for i in range(3)]
    assert found[0][0] == pytest.approx(math.fsum(summed), rel=1e-5)
    assert found[2][0] == 0


def test_a_batch_changes_no_score(artifacts: Callable[..., Path], texts: list[str]) -> None:
    from scripts.export.lm_eval_model import TextDiffusionLM

    requests = [SimpleNamespace(args=(text[:9], text[9:25])) for text in texts[:12]]
    found = [
        TextDiffusionLM(artifacts(), batch_size=size).loglikelihood(requests, disable_tqdm=True)
        for size in (1, 5)
    ]
    for one, many in zip(*found, strict=True):
        assert one[0] == pytest.approx(many[0], rel=1e-5)
        assert one[1] == many[1]


def continued(lm: Any, text: str, **options: Any) -> str:
    request = SimpleNamespace(args=(text, {"until": [], **options}))
    (found,) = lm.generate_until([request], disable_tqdm=True)
    return str(found)


def test_generation_is_greedy_and_ends_where_the_task_says(
    lm: Any, processor: spm.SentencePieceProcessor
) -> None:
    text = "def f("
    ids = [BOS, *processor.encode(text)]
    rows = torch.tensor([ids + [0] * 8])
    out = tg.decode_autoregressive(lm.model, rows, len(ids), len(ids) + 8)[0].tolist()
    end = out.index(BOS, len(ids)) if BOS in out[len(ids) :] else len(out)
    whole = processor.decode(out[:end])
    assert whole.startswith(text)
    expected = whole[len(text) :]
    assert len(expected) > 3
    assert continued(lm, text, max_gen_toks=8) == expected
    stop = expected[2:4]
    assert continued(lm, text, max_gen_toks=8, until=[stop]) == expected.split(stop)[0]
    assert continued(lm, text, max_gen_toks=8, until=stop) == expected.split(stop)[0]


def test_generation_makes_room_and_samples(artifacts: Callable[..., Path], lm: Any) -> None:
    from scripts.export.lm_eval_model import TextDiffusionLM

    text = "return x + y\n" * 20
    found = continued(lm, text, max_gen_toks=500)
    assert len(lm.processor.encode(found)) <= T
    request = SimpleNamespace(args=("x = ", {"do_sample": True, "temperature": 5.0, "top_k": 50}))
    first, second = lm.generate_until([request, request], disable_tqdm=True)
    assert first != second
    assert [first, second] == lm.generate_until([request, request], disable_tqdm=True)
    other = TextDiffusionLM(artifacts(), mode="speculative")
    assert continued(other, "x = ", max_gen_toks=9) == continued(lm, "x = ", max_gen_toks=9)


def test_the_model_has_a_name_in_lm_eval(artifacts: Callable[..., Path]) -> None:
    from lm_eval.api.registry import get_model

    from scripts.export.lm_eval_model import TextDiffusionLM

    assert get_model("text_diffusion") is TextDiffusionLM
    made = TextDiffusionLM.create_from_arg_string(f"artifact={artifacts()}", {"batch_size": 2})
    assert (made.batch_size, made.max_length, made.eot_token_id) == (2, T, BOS)
    assert made.prefix_token_id == BOS
    assert made.tok_encode("x = 1") == [BOS, *made.processor.encode("x = 1")]


def test_a_continuation_that_cannot_be_read_is_refused(lm: Any) -> None:
    with pytest.raises(tg.UserError, match=f"of {T + 1} tokens exceeds the {T} this model"):
        lm._loglikelihood_tokens([(("", ""), [BOS], [300] * (T + 1))])


@pytest.mark.parametrize(
    ("recipe", "argv", "message"),
    [
        ("direct", ["--tasks", "no.yaml"], "--tasks=no.yaml is neither a task of lm_eval nor"),
        ("direct", ["--tasks", "damaged.yaml"], "--tasks=damaged.yaml cannot be loaded ("),
        ("direct", ["--tasks", "lost.yaml"], "no_such_file.jsonl"),
        ("direct", ["--mode", "no"], "--mode=no is unknown; name one of ar, "),
        (
            "direct",
            ["--bound-window", "5"],
            "--bound-window=5 must divide 32 (TRAIN_SEQ_LEN",
        ),
        ("ar", ["--bound-window", "8"], "--bound-window=8 needs a denoiser, and this model"),
        ("direct", ["--tasks", "empty.yaml"], "hold no text"),
        ("ar", ["--mode", "block"], "has no trained denoiser"),
        ("direct", ["--out", "no/folder/x.json"], "must be a file in a folder that exists"),
        ("direct", ["--artifact", "no.ptz"], "artifact no.ptz is missing, damaged or not ours"),
        ("direct", ["--tokenizer", "no.model"], "tokenizer no.model cannot be read"),
        ("direct", ["--limit", "0"], "0 must be 1 or more"),
    ],
)
def test_faults_of_the_user_are_named(
    artifacts: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_its_own_tasks())
    task = write_task(tmp_path, ["x = 1\n" * 9])
    Path("damaged.yaml").write_text("task: [", "utf-8")
    lost = task.read_text("utf-8").replace("documents.jsonl", "no_such_file.jsonl")
    (tmp_path / "empty").mkdir()
    empty = write_task(tmp_path / "empty", ["", ""])
    empty.rename("empty.yaml")
    Path("lost.yaml").write_text(lost, "utf-8")
    given = ["--artifact", str(artifacts(recipe)), "--tasks", str(task), *argv]
    status, printed, complaint = call(capsys, *given)
    assert (status, printed) == (2, "")
    assert message in complaint
    assert "error: " in complaint
    assert "Traceback" not in complaint


def without_its_own_tasks() -> type:
    """Spare the tests the half minute in which lm_eval reads the names of its own tasks."""
    from lm_eval.tasks import TaskManager

    class Quick(TaskManager):  # type: ignore[misc]
        def __init__(self, include_defaults: bool = True) -> None:
            super().__init__(include_defaults=False)

    return Quick
