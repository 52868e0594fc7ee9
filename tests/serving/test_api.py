"""scripts/serve.py by real clients: OpenAI's, and bodies as editors and lm-eval send them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

import train_gpt as tg
from tests.conftest import BOS, random_rows
from tests.serving.conftest import LENGTH, Running, running

KEY = "a-key-of-at-least-16-bytes"
PROMPT = "def value(self, token):\n    return "


def sdk(server: Running, key: str = "none", **options: Any) -> openai.OpenAI:
    client = httpx.Client(trust_env=False, verify=False)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, http_client=client, **options)


def asynchronous(server: Running, **options: Any) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(trust_env=False, verify=False)
    base = f"{server.url}/v1"
    return openai.AsyncOpenAI(base_url=base, api_key="none", http_client=http, **options)


def events(response: httpx.Response) -> list[Any]:
    """Parse server-sent events; the mark at the end is None."""
    lines = [
        line.removeprefix("data: ") for line in response.text.splitlines() if line[:5] == "data:"
    ]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]


# ---- OpenAI's client ----


def test_the_client_of_openai_completes_and_streams(server: Running) -> None:
    with sdk(server) as client:
        name = client.models.list().data[0].id
        wish: dict[str, Any] = dict(
            model=name, prompt=PROMPT, max_tokens=12, temperature=0.9, seed=5
        )
        whole = client.completions.create(**wish)
        chunks = list(
            client.completions.create(**wish, stream=True, stream_options={"include_usage": True})
        )
    assert whole.object == "text_completion"
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert sum(bool(chunk.choices and chunk.choices[0].text) for chunk in chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_the_client_of_openai_chats(server: Running) -> None:
    message: Any = [{"role": "user", "content": "if not value:"}]
    with sdk(server) as client:
        whole = client.chat.completions.create(model="tiny", messages=message, max_tokens=9)
        parts = list(
            client.chat.completions.create(
                model="tiny", messages=message, max_tokens=9, stream=True
            )
        )
        plain = client.completions.create(model="tiny", prompt="if not value:\n\n", max_tokens=9)
    text = whole.choices[0].message.content
    assert text == plain.choices[0].text  # messages are plain text
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert parts[0].choices[0].delta.role == "assistant"


def test_the_asynchronous_client_gets_each_answer(server: Running) -> None:
    async def ask() -> list[str]:
        http = httpx.AsyncClient(trust_env=False, verify=False)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="x", http_client=http
        ) as client:
            wishes = [
                client.completions.create(model="tiny", prompt=f"{PROMPT}{i}", max_tokens=6)
                for i in range(12)
            ]
            found = await asyncio.gather(*wishes)
            stream = await client.completions.create(
                model="tiny", prompt=f"{PROMPT}3", max_tokens=6, stream=True
            )
            streamed = "".join([chunk.choices[0].text async for chunk in stream])
        assert streamed == found[3].choices[0].text
        return [each.choices[0].text for each in found]

    texts = asyncio.run(ask())
    alone = [server.post("/v1/completions", prompt=f"{PROMPT}{i}", max_tokens=6) for i in range(12)]
    assert texts == [each.json()["choices"][0]["text"] for each in alone]
    assert len(set(texts)) > 6


@pytest.mark.slow
def test_a_full_queue_is_429_and_the_client_tries_again(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(artifact, "--slots", "1", "--queue", "1") as server:
        engine = server.service.engine
        tick, pause = engine.tick, [0.3]  # long enough for all to come before one is done

        def slowly() -> None:
            time.sleep(pause[0])
            tick()

        monkeypatch.setattr(engine, "tick", slowly)

        async def ask(retries: int) -> list[Any]:
            async with asynchronous(server, max_retries=retries) as client:
                wishes = [
                    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8)
                    for _ in range(4)
                ]
                return await asyncio.gather(*wishes, return_exceptions=True)

        refused = [each for each in asyncio.run(ask(0)) if isinstance(each, Exception)]
        assert 1 <= len(refused) <= 3
        for error in refused:
            assert isinstance(error, openai.RateLimitError)
            assert error.code == "queue_full"
            assert 1 <= int(error.response.headers["retry-after"]) <= 30
        pause[0] = 0.05
        server.wait_idle()
        done = asyncio.run(ask(8))
        assert [each for each in done if isinstance(each, Exception)] == []


def test_keys_are_checked(artifact: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"another-key-of-16-bytes\n{KEY}\n")
    with running(artifact, "--api-key-file", str(keys)) as server:
        with (
            sdk(server, "wrong-key-of-16-bytes") as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert caught.value.code == "invalid_api_key"
        with sdk(server, KEY) as client:
            assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        with server.client() as http:
            for path in ("/v1/models", "/metrics", "/slots", "/tokenizer_info"):
                assert http.get(path).status_code == 401
            assert (
                http.get("/v1/models", headers={"Authorization": f"Basic {KEY}"}).status_code == 401
            )
            for path in ("/health", "/", "/page.js"):
                assert http.get(path).status_code == 200


# ---- editors ----

EDITOR = {"input_prefix": "def f(x):\n    ", "input_suffix": "\n    return x\n"}


def test_llama_vscode_fills_in(server: Running) -> None:
    """The body that it sends, and one with n_predict 0 to warm the cache before."""
    extra = [{"filename": "other.py", "text": "value = 3\n"}]
    body = {
        **EDITOR, "input_extra": extra, "prompt": "if x", "n_predict": 16, "top_k": 40,
        "top_p": 0.99, "stream": False, "n_indent": 4, "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 60_000,
    }  # fmt: skip
    warm = server.post("/infill", **{**body, "n_predict": 0}).json()
    assert (warm["content"], warm["tokens_predicted"]) == ("", 0)
    found = server.post("/infill", **body).json()
    assert found["stop"] is True
    assert found["truncated"] is False
    assert found["stop_type"] in ("limit", "word", "eos")
    assert found["tokens_cached"] > 10  # the warm cache
    assert found["decoding"]["hole"]["length"] in (2, 4, 8, 16)
    assert found["tokens_predicted"] == found["decoding"]["hole"]["length"]
    assert found["decoding"]["deadline_kept"] is True
    assert {"prompt_n", "prompt_ms", "predicted_n", "predicted_per_second"} <= found[
        "timings"
    ].keys()


def test_llama_vim_chooses_fields(server: Running) -> None:
    fields = ["content", "timings/predicted_n", "nothing/here"]
    found = server.post("/infill", **EDITOR, prompt="", n_predict=4, response_fields=fields).json()
    assert found.keys() == {"content", "timings/predicted_n"}


def test_llama_completion_streams(server: Running) -> None:
    body = dict(prompt=PROMPT, n_predict=10, n_probs=2, temperature=0)
    whole = server.post("/completion", **body).json()
    assert len(whole["completion_probabilities"]) == 10
    first = whole["completion_probabilities"][0]
    assert first["logprob"] == max(each["logprob"] for each in first["top_logprobs"])
    streamed = events(server.post("/completion", **body, stream=True))
    assert None not in streamed
    assert "".join(each["content"] for each in streamed) == whole["content"]
    assert [each["stop"] for each in streamed] == [False] * (len(streamed) - 1) + [True]


def test_minuet_fills_in(server: Running) -> None:
    """Its openai_fim_compatible backend: streams, and reads choices[0].text."""
    body = dict(
        model="tiny", prompt=PROMPT, suffix="\n    pass", max_tokens=24, stop=["\n\n"], top_p=0.9
    )
    found = events(server.post("/v1/completions", **body, stream=True))
    assert found[-1] is None
    text = "".join(each["choices"][0]["text"] for each in found[:-1])
    assert text
    assert "\n\n" not in text
    assert text == server.post("/v1/completions", **body).json()["choices"][0]["text"]


def test_continue_fills_in_as_mistral_does(server: Running) -> None:
    """It reads choices[0].delta.content of a stream."""
    body = dict(
        model="tiny", prompt=PROMPT, suffix="\n", max_tokens=64, temperature=0.01,
        stop=["\n\n", "/src/"], stream=True, random_seed=1,
    )  # fmt: skip
    found = events(server.post("/v1/fim/completions", **body))
    text = "".join(each["choices"][0]["delta"]["content"] for each in found[:-1])
    whole = server.post("/v1/fim/completions", **{**body, "stream": False}).json()
    assert text == whole["choices"][0]["text"] == whole["choices"][0]["message"]["content"]


def test_a_long_file_is_cut_and_said_so(server: Running) -> None:
    long = {"input_prefix": "x = value\n" * 200, "input_suffix": "y = token\n" * 100}
    found = server.post("/infill", **long, n_predict=8).json()
    assert found["truncated"] is True
    assert found["tokens_evaluated"] + 8 <= LENGTH
    assert found["tokens_predicted"] > 0
    huge = server.post("/infill", input_prefix="value = 1\n" * 80_000, n_predict=2)
    assert huge.json()["truncated"] is True


# ---- lm-eval's local-completions ----


def test_token_lists_are_scored_as_lm_eval_asks(server: Running, artifact: Path) -> None:
    rows = [[BOS, *row] for row in random_rows(3, 30, 390, 9).tolist()]
    rows += [rows[0][:12], [BOS]]
    wish = dict(
        prompt=rows, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234, model="tiny"
    )
    found = server.post("/v1/completions", **wish).json()
    model = tg.load_artifact(artifact, torch.device("cpu"))[0]
    for row, choice in zip(rows, found["choices"], strict=True):
        got = choice["logprobs"]
        assert len(got["tokens"]) == len(row) + 1  # one is generated after the echo
        assert got["token_logprobs"][0] is got["top_logprobs"][0] is None
        logits = model.forward_causal(torch.tensor([row]))[0][0].detach()
        best = logits.argmax(-1).tolist()
        nexts = [*row[1:], best[-1]]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(nexts)[:, None])[:, 0].tolist()
        assert got["token_logprobs"][1:] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        pairs = zip(got["token_logprobs"][1:], got["top_logprobs"][1:], strict=True)
        greedy = [log_p == max(top.values()) for log_p, top in pairs]  # as floats
        assert greedy == [token == choice for token, choice in zip(nexts, best, strict=True)]
        assert got["token_logprobs"][-1] == max(got["top_logprobs"][-1].values())
    offsets = found["choices"][0]["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)


def test_the_remote_tokenizer_of_lm_eval_works(server: Running) -> None:
    with server.client() as client:
        info = client.get("/tokenizer_info").json()
        eos = client.post(
            "/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}
        )
        assert eos.json()["tokens"] == [BOS]
        tokens = client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == PROMPT
        same = client.post(
            "/tokenize", json={"content": PROMPT, "add_special": True, "with_pieces": True}
        )
        assert [each["id"] for each in same.json()["tokens"]] == [BOS, *tokens]
        by_text = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8}).json()
        by_token = client.post("/v1/completions", json={"prompt": tokens, "max_tokens": 8}).json()
    assert by_text["choices"][0]["text"] == by_token["choices"][0]["text"]


# ---- what is native ----


def test_diffusing_streams_the_whole_text_at_each_pass(server: Running) -> None:
    body = dict(prompt=PROMPT, suffix="\nreturn", max_tokens=16, hole=16, steps=5, guard=False)
    found = events(server.post("/v1/completions", **body, stream=True, diffusing=True))
    whole = server.post("/v1/completions", **body).json()["choices"][0]["text"]
    frames = [each for each in found[:-1] if "diffusion" in each]
    # A frame that was not sent in time is left out, but never the last one.
    passes = [frame["diffusion"]["pass"] for frame in frames]
    assert passes == sorted(set(passes))
    assert passes[-1] == 5
    still = [sum(frame["diffusion"]["open"]) for frame in frames]
    assert still == sorted(set(still), reverse=True)
    assert still[-1] == 0
    for frame in frames:
        facts, text = frame["diffusion"], frame["choices"][0]["text"]
        assert sum(facts["lengths"]) == len(text)
        assert len(facts["lengths"]) == len(facts["open"]) == len(facts["p"])
        assert all(0 <= p <= 1 for p in facts["p"])
    assert frames[-1]["choices"][0]["text"] == whole
    assert found[-2]["choices"][0]["text"] == whole
    assert found[-2]["choices"][0]["finish_reason"] == "length"


def test_the_length_of_a_span_is_chosen_by_the_exact_score(server: Running, artifact: Path) -> None:
    body = dict(prompt=PROMPT, suffix="\n    return token", max_tokens=20, seed=1, guard=False)
    chosen = server.post("/v1/completions", **body).json()["choices"][0]
    facts = chosen["decoding"]["hole"]
    assert facts["corrected_nats"].keys() == {"2", "4", "8", "16"}  # 32 are more than max_tokens
    best = min(facts["corrected_nats"], key=facts["corrected_nats"].get)
    assert facts["length"] == int(best)
    model = tg.load_artifact(artifact, torch.device("cpu"))[0]
    vocabulary = server.service.model.vocabulary
    for length, nats in facts["corrected_nats"].items():
        alone = server.post("/v1/completions", **body, hole=int(length), logprobs=0).json()
        if length == best:
            assert alone["choices"][0]["text"] == chosen["text"]
        prompt = [BOS, *vocabulary.encode(PROMPT)]
        editor = dict(input_prefix=PROMPT, input_suffix=body["suffix"], n_predict=20)
        row = server.post("/infill", **editor, hole=int(length), seed=1, guard=False).json()
        ids = torch.tensor([[*prompt, *row["tokens"], *vocabulary.encode(body["suffix"], True)]])
        exact = float(tg.token_nll_causal(model, ids)[0, len(prompt) - 1 :].sum())
        correction = server.service.options.correction[int(length)]
        assert nats == pytest.approx(exact + correction, abs=0.01)


def test_an_edit_keeps_the_number_of_tokens(server: Running) -> None:
    text = "def state(path):\n    return share and place\n"
    none = server.post("/v1/edit/completions", input=text, redo=0.0000001).json()["choices"][0]
    some = server.post("/v1/edit/completions", input=text, redo=0.01, seed=1).json()
    choice = some["choices"][0]
    assert none["text"] == text
    never = server.post("/v1/edit/completions", input=text, redo=0).json()["choices"][0]
    assert (never["text"], never["decoding"]["remasked"]) == (text, 0)
    assert choice["text"] != text
    assert choice["decoding"]["remasked"] >= choice["decoding"]["changed"] > 0
    assert some["usage"]["completion_tokens"] == len(server.service.model.vocabulary.encode(text))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ar", "refine", "block", "threshold", "speculative"])
def test_modes_and_efforts(server: Running, mode: str) -> None:
    body: dict[str, Any] = dict(prompt=PROMPT, max_tokens=16, mode=mode, guard=False)
    passes = set[int]()
    for effort in ("instant", "low", "medium", "high"):
        found = server.post("/v1/completions", **body, reasoning_effort=effort).json()
        passes.add(found["choices"][0]["decoding"]["passes"])
    fixed = {"ar": {16}, "refine": {1, 4, 12, 16}, "block": {2, 8, 16}}
    if mode in fixed:
        assert passes == fixed[mode]
    assert max(passes) <= 16


def test_choices_differ_by_their_key_and_repeat_by_their_seed(server: Running) -> None:
    body: dict[str, Any] = dict(prompt=[PROMPT, "x"], n=3, max_tokens=8, temperature=1, seed=9)
    one, two = (server.post("/v1/completions", **body).json()["choices"] for _ in range(2))
    assert [each["index"] for each in one] == list(range(6))
    assert [each["text"] for each in one] == [each["text"] for each in two]
    assert len({each["text"] for each in one}) == 6
    free = {server.post("/v1/completions", **{**body, "n": 1, "seed": None}).text for _ in range(2)}
    assert len(free) == 2


def test_a_deadline_is_reported_and_kept(server: Running) -> None:
    body = dict(prompt=PROMPT, suffix="\nreturn", max_tokens=16, hole=16, guard=False)
    found = server.post("/v1/completions", **body, deadline_ms=60_000).json()["choices"][0][
        "decoding"
    ]
    assert (found["deadline_kept"], found["passes"]) == (True, 16)
    late = server.post("/v1/completions", **body, deadline_ms=0.01).json()["choices"][0]["decoding"]
    assert (late["deadline_kept"], late["passes"]) == (False, 1)


def test_metrics_slots_and_health_tell_what_happens(server: Running) -> None:
    with server.client() as client:
        before = client.get("/metrics").text
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5})
        client.get("/nowhere")
        after = client.get("/metrics").text
        slots = client.get("/slots").json()
        assert client.get("/health").json() == {"status": "ok"}

    def value(text: str, name: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return float(lines[0].split()[-1]) if lines else 0.0

    for name, more in {
        'serve_tokens_total{mode="ar"}': 5,
        'serve_requests_total{route="/v1/completions",status="200"}': 1,
        'serve_requests_total{route="other",status="404"}': 1,
    }.items():
        assert value(after, name) - value(before, name) == more
    assert [slot["is_processing"] for slot in slots] == [False] * 8


# ---- what is refused ----

SAID = {"role": "user", "content": "a"}
BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", b"\xff\xfe", 400, "UTF-8"),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "JSON"),
    ("/v1/completions", b'{"prompt": "a\\u0000b"}', 400, "NUL"),
    ("/v1/completions", b"[" * 5000, 400, "JSON"),
    ("/v1/completions", b"", 400, "JSON"),
    ("/v1/completions", b"[]", 400, ""),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    ("/v1/completions", b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {"prompt": "a", "n": 33}, 400, "32"),
    ("/v1/completions", {"prompt": "a", "steps": 0}, 400, "steps"),
    ("/v1/completions", {"prompt": "a", "steps": 4, "mode": "ar"}, 400, "steps"),
    ("/v1/completions", {"prompt": "a", "redo": 0.1, "mode": "speculative"}, 400, "redo"),
    ("/v1/completions", {"prompt": "a", "deadline_ms": -5}, 400, "deadline_ms"),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, 400, "seed"),
    ("/v1/completions", {"prompt": "a", "mode": "magic"}, 400, "mode"),
    ("/v1/completions", {"prompt": "a", "suffix": "b", "mode": "ar"}, 400, "mode=ar"),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 3}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "messages": []}, 400, "not both"),
    ("/v1/completions", {"max_tokens": 3}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "empty"),
    ("/v1/completions", {"prompt": [[1], []]}, 400, "empty"),
    ("/v1/completions", {"prompt": [399, 400]}, 400, "vocabulary"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "x = 1\n" * 80}, 400, "context of 96"),
    ("/v1/completions", {"prompt": "x" * 100_000}, 400, "context of 96"),
    ("/v1/completions", {"prompt": "a", "model": "gpt-5"}, 404, "tiny"),
    ("/completion", {"prompt": "x = 1\n" * 80}, 400, "context of 96"),
    ("/v1/chat/completions", {"messages": [SAID], "prompt": "b"}, 400, "prompt"),
    ("/v1/chat/completions", {"messages": [SAID], "tools": [1]}, 400, "tools"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/edit/completions", {"input": ""}, 400, "empty"),
    ("/v1/edit/completions", {"input": "x = 1\n" * 80}, 400, "context of 96"),
    ("/detokenize", {"tokens": [400]}, 400, "400"),
    ("/tokenize", {}, 400, "content"),
    ("/v1/nothing", {}, 404, "no such route"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "word"), BAD)
def test_bad_input_is_an_error_that_says_why(
    server: Running, path: str, body: Any, status: int, word: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.client() as client:
        found = client.post(path, content=content)
    error = found.json()["error"]
    assert found.status_code == status, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert word in error["message"]
    assert server.service.engine.idle


def test_a_body_that_is_too_large_is_413(server: Running) -> None:
    def parts() -> Iterator[bytes]:  # without a Content-Length
        yield from [b" " * 65536] * 40

    with server.client() as client:
        assert client.post("/v1/completions", content=b" " * (1 << 20) + b"x").status_code == 413
        chunked = client.post("/v1/completions", content=parts())
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "body_too_large")


def test_other_hosts_origins_and_methods_are_refused(server: Running) -> None:
    with server.client() as client:
        foreign = client.get("/v1/models", headers={"Host": "evil.example:8000"})
        page = client.post(
            "/tokenize", json={"content": "a"}, headers={"Origin": "https://evil.example"}
        )
        odd = client.post("/tokenize", json={"content": "a"}, headers={"Origin": "http://["})
        own = client.post("/tokenize", json={"content": "a"}, headers={"Origin": server.url})
        local = client.get("/health", headers={"Host": "localhost:1"})
        method = client.get("/v1/completions")
    assert (foreign.status_code, page.status_code, odd.status_code) == (403, 403, 403)
    assert (own.status_code, local.status_code) == (200, 200)
    assert "access-control-allow-origin" not in own.headers  # CORS is off
    assert (method.status_code, method.json()["error"]["type"]) == (405, "invalid_request_error")


def test_a_host_is_allowed_in_any_case(artifact: Path) -> None:
    with running(artifact, "--allowed-host", "My-Machine") as server, server.client() as client:
        for name in ("my-machine", "MY-MACHINE"):
            assert client.get("/health", headers={"Host": f"{name}:8000"}).status_code == 200


def test_windows_end_inside_the_context(server: Running) -> None:
    tokens = [1, *[5] * (LENGTH - 11)]
    for mode, room in (("ar", 11), ("speculative", 11), ("block", 10), ("refine", 10)):
        body = {"prompt": tokens, "max_tokens": 50, "mode": mode, "guard": False}
        found = server.post("/v1/completions", **body).json()
        assert found["usage"]["completion_tokens"] <= room
        if found["choices"][0]["finish_reason"] == "length":
            assert found["usage"]["completion_tokens"] == room


def test_many_prompts_are_refused_before_they_are_read(server: Running) -> None:
    found = server.post("/v1/completions", prompt=["a"] * 100_000)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "too_many_rows")


def test_a_model_without_a_denoiser_says_so(causal_artifact: Path) -> None:
    with running(causal_artifact) as server:
        assert server.post("/v1/completions", prompt=PROMPT, max_tokens=4).status_code == 200
        assert server.post("/infill", input_prefix="x", n_predict=4).status_code == 200
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": PROMPT, "suffix": "\n"}),
            ("/v1/completions", {"prompt": PROMPT, "mode": "block"}),
            ("/infill", EDITOR),
            ("/v1/fim/completions", {"prompt": PROMPT, "suffix": "\n"}),
            ("/v1/edit/completions", {"input": PROMPT}),
        ]
        for path, body in bodies:
            found = server.post(path, **body)
            assert (found.status_code, found.json()["error"]["code"]) == (400, "no_denoiser")
            assert "without one" in found.json()["error"]["message"]


def test_half_a_character_is_not_streamed(server: Running) -> None:
    """The random model gives many byte tokens; only ends of texts may be cut."""
    body = dict(prompt="é", max_tokens=40, temperature=3, n=6, seed=4)
    found = events(server.post("/v1/completions", **body, stream=True))
    streamed = [""] * 6
    for each in found[:-1]:
        choice = each["choices"][0]
        streamed[choice["index"]] += choice["text"]
    whole = server.post("/v1/completions", **body).json()["choices"]
    assert streamed == [choice["text"] for choice in whole]
