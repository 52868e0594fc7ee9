"""Many clients at once, some of which leave; a server in a process of its own, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import train_gpt as tg
from scripts import common, serve
from scripts.serving.engine import Engine
from scripts.serving.passes import Passes
from tests.conftest import CPU, ROOT
from tests.serving.conftest import make, running

CLIENTS = 200
LOCAL: dict[str, Any] = {"trust_env": False, "verify": False}  # of httpx: no proxy, no certificates
PATIENT = ("--max-seconds", "1000")  # a busy machine of two cores is slow
SUFFIX = "\n    return token\n"


def wishes(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds; each has its own answer."""
    draw, found = random.Random(11), list[dict[str, Any]]()
    for i in range(count):
        prompt = f"def name_{i}(self, value):\n    "
        body: dict[str, Any] = dict(prompt=prompt, max_tokens=draw.randint(1, 12), seed=i)
        body["temperature"] = draw.choice([0, 0.8])
        kind = draw.choice(["ar", "speculative", "refine", "block", "infill", "hole"])
        if kind in ("infill", "hole"):
            body |= dict(suffix=SUFFIX, guard=False)
            body |= {"hole": body["max_tokens"]} if kind == "infill" else {}
        else:
            body |= dict(mode=kind, guard=draw.random() < 0.5)
        found.append(body)
    return found


def text_of(response: httpx.Response) -> str:
    choice = response.json()["choices"][0]
    return json.dumps([choice["text"], choice["finish_reason"], choice["decoding"]["passes"]])


@pytest.mark.slow
def test_50_mixed_requests_equal_their_solo_runs(artifact: Path) -> None:
    bodies = wishes(50)
    options = ("--slots", "8", "--queue", "300", "--deterministic", *PATIENT)
    with running(artifact, *options) as server:
        alone = [text_of(server.post("/v1/completions", **body)) for body in bodies]

        async def together() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=1000, **LOCAL) as http:
                posts = [http.post("/v1/completions", json=body) for body in bodies]
                return await asyncio.gather(*posts)

        found = [text_of(each) for each in asyncio.run(together())]
    assert found == alone
    assert len(set(alone)) > 30


def memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


async def client(http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> tuple[int, str]:
    """Send a request as a stream or not; the status, and the text that came."""
    if leaves:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(http.post("/v1/completions", json=body), 0.15)
        return 0, ""
    if body["seed"] % 2:
        found = await http.post("/v1/completions", json=body)
        whole = found.json()
        return found.status_code, whole["choices"][0]["text"] if found.status_code == 200 else ""
    text = ""
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return response.status_code, text


async def crowd(url: str, bodies: list[dict[str, Any]]) -> list[tuple[int, str]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=1000, limits=limits, **LOCAL) as http:
        return await asyncio.gather(
            *(client(http, body, leaves=i % 5 == 0) for i, body in enumerate(bodies))
        )


@pytest.mark.slow
def test_200_clients_of_whom_a_fifth_leave(artifact: Path) -> None:
    bodies = wishes(CLIENTS)
    with running(artifact, "--slots", "16", "--queue", "150", *PATIENT) as server:
        alone = dict[int, str]()
        slow_down(
            server.service.engine, 0.01
        )  # so that the queue is full, however slow clients are

        def solo(i: int) -> str:
            if i not in alone:
                found = server.post("/v1/completions", **bodies[i]).json()
                alone[i] = found["choices"][0]["text"]
            return alone[i]

        sizes, statuses = list[int](), list[int]()
        for _ in range(2):
            found = asyncio.run(crowd(server.url, bodies))
            assert server.wait_idle()
            assert all(slot.row is None for slot in server.service.engine.slots)
            sizes.append(memory())
            statuses += [status for status, _ in found]
            served = [i for i, (status, _) in enumerate(found) if status == 200]
            # No answer is lost, and none is another client's. Ties within rounding may turn.
            different = [i for i in served[::6] if found[i][1] != solo(i)]
            assert len(different) <= 1
        assert set(statuses) <= {0, 200, 429, 503}
        assert statuses.count(200) > CLIENTS // 2  # twice the slots and the queue, at least
        assert 429 in statuses
        assert server.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200
    assert sizes[1] - sizes[0] < 30e6


@pytest.mark.slow
def test_clients_that_leave_free_their_slots(artifact: Path) -> None:
    with running(artifact, "--slots", "4") as server:
        engine = server.service.engine
        slow_down(engine, 0.2)
        for stream in (True, False):
            body = dict(prompt="def f", max_tokens=80, stream=stream)
            assert asyncio.run(leave(server.url, body)) == stream
            assert server.wait_idle(8)  # 80 tokens would take 16 s


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_its_answer_begins(artifact: Path, stream: bool) -> None:
    service = make(artifact)  # its engine is not started: no row ends by itself
    body = json.dumps(dict(prompt="def f", max_tokens=80, stream=stream)).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = dict(type="http", method="POST", path="/v1/completions", query_string=b"")
    news = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return news.pop(0)

    async def send(message: Any) -> None:
        if message.get("status") == 200:
            await asyncio.Event().wait()  # as where nobody reads

    asyncio.run(asyncio.wait_for(service.app()(scope | {"headers": headers}, receive, send), 30))
    rows = service.engine.waiting
    assert [row.cancelled for row in rows] == [True]
    assert "cancelled_total 1.0" in service.metrics.text().decode()


async def leave(url: str, body: dict[str, Any]) -> bool:
    """Leave when something has come, or after a third of a second; say which it was."""
    async with httpx.AsyncClient(base_url=url, timeout=60, **LOCAL) as http:
        await http.get("/health")  # opens the connection
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60 if body["stream"] else 0.3):
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    async for _ in response.aiter_lines():
                        return True
    return False


def slow_down(
    engine: Engine, seconds: float, monkeypatch: pytest.MonkeyPatch | None = None
) -> None:
    """Let every tick take longer, for ever or for one test."""
    tick = engine.tick

    def slowly() -> None:
        time.sleep(seconds)
        tick()

    if monkeypatch is None:
        engine.tick = slowly  # type: ignore[method-assign]
    else:
        monkeypatch.setattr(engine, "tick", slowly)


@pytest.mark.slow
def test_clients_that_send_slowly_or_half_are_given_up(artifact: Path) -> None:
    with running(artifact) as server:
        service = server.service
        service.access = service.access._replace(body_seconds=0.3)
        port = int(server.url.rsplit(":", 1)[1])
        lines = ("POST /v1/completions HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Length: 999")
        head = "\r\n".join((*lines, "", ""))
        with socket.create_connection(("127.0.0.1", port), timeout=10) as half:
            half.sendall(head.encode() + b'{"prompt"')
            answer = half.recv(4096)
        assert b" 408 " in answer.splitlines()[0]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as gone:
            gone.sendall(head.encode() + b'{"prompt"')
        assert server.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200
        assert service.engine.idle


@contextlib.contextmanager
def process(artifact: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--artifact", str(artifact)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    made = subprocess.Popen(
        [*argv, "--device", "cpu", *options], stdout=pipe, stderr=pipe, text=True, env=env
    )
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def wait_ready(url: str) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", **LOCAL).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail("the server did not start")


@pytest.mark.slow
def test_sigterm_answers_what_has_begun_and_ends_with_143(artifact: Path) -> None:
    options = ("--port", "0", "--slots", "1", "--drain-seconds", "120")
    with process(artifact, *options) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[1]
        wait_ready(url)
        answers = list[int]()
        body = dict(prompt=["def f(x):"] * 16, max_tokens=60, temperature=1, seed=3)

        def ask() -> None:
            found = httpx.post(f"{url}/v1/completions", json=body, timeout=180, **LOCAL)
            answers.append(found.status_code)
            assert len(found.json()["choices"]) == 16

        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive():
            if any(s["is_processing"] for s in httpx.get(f"{url}/slots", **LOCAL).json()):
                break
            time.sleep(0.005)
        # A second server cannot have the port.
        with process(artifact, "--port", url.rsplit(":", 1)[1]) as second:
            err = second.communicate(timeout=180)[1]
            assert second.returncode == 2
            assert "cannot be used" in err
            assert err.count("\n") == 1
        server.send_signal(signal.SIGTERM)
        while asking.is_alive():  # until it has noticed the signal, or has ended
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", **LOCAL).status_code == 503:
                    late = httpx.post(f"{url}/v1/completions", json=body, **LOCAL)
                    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
                    break
            time.sleep(0.01)
        asking.join(180)
        assert answers == [200]
        assert server.wait(60) == 143
        assert server.stderr is not None
        assert server.stderr.read() == f"error: interrupted; {serve.FINISHED}\n"


@pytest.mark.slow
def test_a_second_signal_ends_at_once(artifact: Path) -> None:
    with process(artifact, "--port", "0", "--slots", "1") as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[1]
        body = dict(prompt=["def f(x):"] * 32, max_tokens=80, stream=True)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, **LOCAL) as answer:
            next(answer.iter_lines())
            server.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health", **LOCAL).status_code == 200:
                time.sleep(0.005)
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 143
        assert server.stderr is not None
        assert server.stderr.read() == "error: interrupted again; what had begun was cut off\n"


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nmore"), MemoryError()])
def test_a_model_that_takes_no_pass_is_one_line(
    error: Exception,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def take(*_: object) -> None:
        raise error

    monkeypatch.setattr(Passes, "take", take)
    assert serve.main(["--artifact", str(artifact), "--device", "cpu", "--port", "0"]) == 2
    why = (str(error).splitlines() or ["MemoryError"])[0]
    rule = f"--slots=16: no pass can be taken ({why}); use fewer, or another --device"
    assert capsys.readouterr().err == f"error: {rule}\n"


def test_what_cannot_be_served_is_one_line(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, other = tmp_path / "short", tmp_path / "other.model"
    short.write_text("secret\n")
    other.write_bytes(b"no tokenizer")
    busy = serve.bind("127.0.0.1", 0)
    busy.listen()
    port = str(busy.getsockname()[1])
    cases = {
        ("--host", "0.0.0.0"): "--host=0.0.0.0 is reachable from other machines",
        ("--api-key-file", str(short)): "keys of 16 bytes or more",
        ("--api-key-file", str(tmp_path / "none")): "cannot be read",
        ("--tokenizer", str(other)): "is not the tokenizer",
        ("--port", port): "cannot be used (Address already in use)",
    }
    for options, message in cases.items():
        argv = ["--artifact", str(artifact), "--device", "cpu", "--port", "0", *options]
        assert serve.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    busy.close()


def test_missing_packages_are_named(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if "u" in name else 1)
    assert serve.main(["--artifact", str(artifact)]) == 2
    assert "uvicorn, prometheus_client: pip install -r requirements-serve.txt" in (
        capsys.readouterr().err
    )


def test_the_packaged_model_is_served_by_default(
    artifact: Path, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer and its correction of span lengths stand beside it."""
    packaged = tmp_path / "models" / "python.ptz"
    packaged.parent.mkdir()
    monkeypatch.setattr(common, "PACKAGED", packaged)
    monkeypatch.chdir(tmp_path)
    args = serve.parse_args(["--device", "cpu"])
    with pytest.raises(
        tg.UserError, match=r"models/python.ptz is not there, .*--artifact FILE, or train"
    ):
        serve.make_service(args, CPU)
    shutil.copy(artifact, tmp_path / "final_model.int8.ptz")
    assert serve.make_service(args, CPU).model.name == "final_model.int8"
    shutil.copy(artifact, packaged)
    shutil.copy(data["tokenizer_path"], packaged.with_suffix(".model"))
    packaged.with_suffix(".lengths.json").write_text('{"correction_nats": {"2": 5}}')
    service = serve.make_service(args, CPU)
    assert service.model.name == "python"
    assert service.options.correction == {2: 5.0}
    packaged.with_suffix(".model").write_bytes(b"another")
    with pytest.raises(tg.UserError, match="is not the tokenizer"):
        serve.make_service(args, CPU)
