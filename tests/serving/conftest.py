"""A server in this process, on a port of its own, over a tiny model with random weights."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

import train_gpt as tg
from scripts import serve
from scripts.serving.api import Service
from scripts.serving.rows import Row
from tests.conftest import CPU, make_run, randomise, tiny

LENGTH = 96  # tokens of context


class Running(NamedTuple):
    """A server that is being tested."""

    url: str
    service: Service

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, timeout=300, trust_env=False, verify=False, **options
        )

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def wait_idle(self, seconds: float = 120.0) -> bool:
        """Wait until no row is left; say whether that came."""
        end = time.monotonic() + seconds
        while not self.service.engine.idle and time.monotonic() < end:
            time.sleep(0.01)
        return self.service.engine.idle


def export(data: dict[str, Any], path: Path, recipe: str = "direct", **settings: Any) -> Path:
    values = {**data, "train_seq_len": LENGTH, "train_batch_tokens": 4 * LENGTH, **settings}
    values = {"diffusion_windows": "8:1,T:1", "parallel_eval_examples": 0} | values
    cfg = tiny(recipe, **values)
    run = make_run(cfg)
    run.identity = {"tokenizer_sha256": tg.ByteCounter(cfg).sha256}
    tg.save_artifact(path, randomise(tg.GPT(cfg)).state_dict(), run)
    return path


@pytest.fixture(scope="session")
def artifact(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(data, tmp_path_factory.mktemp("served") / "tiny.ptz")


@pytest.fixture(scope="session")
def causal_artifact(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a denoiser."""
    return export(data, tmp_path_factory.mktemp("served") / "causal.ptz", "ar")


def make(artifact: Path, *options: str) -> Service:
    torch.set_num_threads(1)
    args = serve.parse_args(["--artifact", str(artifact), "--device", "cpu", *options])
    return serve.make_service(args, CPU)


@contextlib.contextmanager
def running(artifact: Path, *options: str) -> Iterator[Running]:
    """Serve in a thread; the model's thread has one more."""
    service = make(artifact, *options)
    server = serve.make_server(service, 1.0)
    listening = serve.bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    try:
        end = time.monotonic() + 120
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        assert server.started
        yield Running(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Running]:
    with running(artifact, "--slots", "8") as found:
        yield found


@pytest.fixture(scope="module")
def service(artifact: Path) -> Service:
    """A service whose engine is not started: its rows are decoded in the test's thread."""
    return make(artifact, "--slots", "4")


def decode(service: Service, rows: list[Row]) -> list[Row]:
    """Decode rows in this thread; fails if that does not end."""
    service.engine.submit(rows)
    with torch.inference_mode():
        for _ in range(5000):
            if service.engine.idle:
                break
            service.engine.tick()
    assert service.engine.idle
    for row in rows:
        assert row.error is None, row.error
    return rows


@pytest.fixture
def new_row(service: Service) -> Callable[..., Row]:
    return lambda *args, **options: make_row(service, *args, **options)


def make_row(service: Service, prompt: list[int], num: int, decoding: Any, **options: Any) -> Row:
    vocabulary = service.model.vocabulary
    options = {"notify": lambda event: None, "guard": False} | options
    return Row(vocabulary, prompt, num, decoding, **options)
