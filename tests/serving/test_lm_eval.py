"""lm-eval's local-completions over a server: scores are those of the model in its own process."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import BOS
from tests.serving.conftest import LENGTH, Running, running

pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
pytest.importorskip("tenacity", reason="pip install -r requirements-eval.txt")
pytestmark = pytest.mark.slow

COMMON = """dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
"""
TASKS = {
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
""",
    "choice": """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "generated": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: answer
generation_kwargs: {until: ["@@"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}
QUESTION = "def f(x):\n    return"
CHOICES = [" x", " value + 1", "\n", "(self, path)"]


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to others, and what lm_eval asks pip and the machine."""
    connect = socket.socket.connect

    def check(self: socket.socket, address: Any) -> None:
        assert not isinstance(address, tuple) or address[0] == "127.0.0.1", address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", check)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def served(artifact: Path) -> Iterator[Running]:
    with running(artifact, "--slots", "4") as found:
        yield found


@pytest.fixture
def lm(artifact: Path) -> Any:
    """The model in this process."""
    from scripts.export.lm_eval_model import TextDiffusionLM

    return TextDiffusionLM(artifact, device="cpu")


def evaluate(server: Running, folder: Path, task: str, rows: list[Any], **options: Any) -> Any:
    """Evaluate a task as the command of docs/evaluation.md does; its results and samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    text = f"task: {task}\n{COMMON.format(folder=folder, name=task)}{TASKS[task]}"
    (folder / f"{task}.yaml").write_text(text, "utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{task}.jsonl").write_text(lines, "utf-8")
    given = dict(base_url=f"{server.url}/v1/completions", model="tiny", max_length=LENGTH)
    found = simple_evaluate(
        "local-completions",
        model_args=given | dict(max_retries=1) | options,
        tasks=[str(folder / f"{task}.yaml")],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    return found["results"][task], found["samples"][task]


def nats_of(lm: Any, context: list[int], continuation: list[int]) -> float:
    found = lm._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
    return float(found[0][0])


def test_bits_per_byte_is_the_exact_score(
    served: Running, lm: Any, tmp_path: Path, texts: list[str]
) -> None:
    """Of documents within the context, it is what scripts/export/harness.py finds."""
    documents = ["x = 1\n", *(text[:60] for text in texts[:4]), "naïve café 🙂\n"]
    nats = 0.0
    for text in documents:
        ids = lm.tok_encode(text, add_special_tokens=False)
        assert len(ids) <= LENGTH - 2
        nats -= nats_of(lm, [BOS], ids)
    found, _ = evaluate(served, tmp_path, "rolling", [{"text": text} for text in documents])
    num_bytes = sum(len(text.encode()) for text in documents)
    expected = nats / math.log(2) / num_bytes
    assert found["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_later_windows_of_a_long_document_begin_with_bos(
    served: Running, lm: Any, tmp_path: Path, texts: list[str]
) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = "".join(texts)[:900]
    ids = lm.tok_encode(text, add_special_tokens=False)
    windows = list(get_rolling_token_windows(ids, BOS, LENGTH - 2, 1))
    assert len(windows) > 2
    nats = 0.0
    for context, continuation in map(make_disjoint_window, windows):
        opened = context if context[:1] == [BOS] else [BOS, *context]
        nats -= nats_of(lm, opened, continuation)
    found, _ = evaluate(served, tmp_path, "rolling", [{"text": text}])
    expected = nats / math.log(2) / len(text.encode())
    assert found["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"num_concurrent": 3}, {"batch_size": 4}], ids=["one", "concurrent", "batched"]
)
def test_choices_have_the_scores_and_the_greed_of_the_model(
    served: Running, lm: Any, tmp_path: Path, options: dict[str, int]
) -> None:
    before = lm.tok_encode(QUESTION)
    best = int(lm.model.forward_causal(torch.tensor([before]))[0][0, -1].argmax())
    greedy = lm.processor.decode([*before, best])[len(QUESTION) :]
    choices = [greedy, *CHOICES]
    row = {"text": QUESTION, "choices": choices, "answer": 0}
    _, samples = evaluate(served, tmp_path, "choice", [row], **options)
    for choice, ((nats, is_greedy),) in zip(choices, samples[0]["resps"], strict=True):
        whole = lm.tok_encode(QUESTION + choice)
        assert nats == pytest.approx(nats_of(lm, before, whole[len(before) :]), rel=1e-4)
        assert is_greedy == (whole[len(before) :] == [best])


def test_generated_text_is_that_of_the_model(served: Running, lm: Any, tmp_path: Path) -> None:
    until = {"until": ["@@"], "max_gen_toks": 8}
    expected = lm.generate(QUESTION, until, 0)
    assert expected
    row = {"text": QUESTION, "answer": expected}
    found, samples = evaluate(served, tmp_path, "generated", [row])
    assert samples[0]["resps"] == [[expected]]
    assert found["exact_match,none"] == 1
