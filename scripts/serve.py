"""Serve one artifact over HTTP: completions, infill, edits, and a page to watch them.

    python scripts/serve.py --artifact final_model.int8.ptz
    python scripts/serve.py --port 8080 --slots 8 --deterministic
    python scripts/serve.py --host 0.0.0.0 --api-key-file keys.txt --allowed-host my-machine

It speaks the interfaces of OpenAI (completions, chat), Mistral and Mercury (fill-in-the-middle) and
llama.cpp (/infill, /completion), so that their clients and editors work with it: docs/serving.md.
Many requests are decoded at once. SIGTERM or Ctrl-C finishes what has begun, then ends.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(abspath(__file__))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import importlib.util
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.common import (
    Parser,
    autocast,
    default_artifact,
    fail,
    load_artifact,
    open_tokenizer,
    pick_device,
    run_command,
)
from scripts.process import report_errors

if TYPE_CHECKING:
    import torch
    import uvicorn

    from scripts.serving.api import Service

FINISHED = "what had begun was answered"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    default = "models/python.ptz, else the newest final_model.*.ptz of this folder"
    parser.artifact(default, "beside it, or the one it names")
    lengths = "of spans, by bench/serving.py (default: FILE.lengths.json beside it, or ours)"
    add("--length-correction", type=Path, metavar="FILE", help=lengths)
    head = "of scripts/chain.py: a pass decides left to right (default: FILE.head beside it)"
    add("--head", type=Path, metavar="FILE", help=head)
    add("--model-name", metavar="NAME", help="name for clients (default: that of the file)")
    add("--host", default="127.0.0.1", help="address; another than %(default)s needs a key file")
    parser.whole("--port", 8000, "0: any that is free", low=0, high=65535)
    add("--allowed-host", action="append", default=[], metavar="NAME", help="of the Host header")
    add("--api-key-file", type=Path, metavar="FILE", help="one key a line; clients need one")
    add_limits(parser)
    add("--deterministic", action="store_true", help="output does not depend on other requests")
    parser.whole("--threads", None, "of a CPU (default: torch's choice)")
    parser.device()
    return parser.parse_args(argv)


def add_limits(parser: Parser) -> None:
    """Add limits of the server and of requests."""
    parser.whole("--slots", 16, "rows that are decoded at once", high=1024)
    parser.whole("--queue", 64, "rows that wait; more are answered with 429", low=0, high=100_000)
    rows = "rows of one request: prompts x n x span lengths; at most --slots + --queue"
    parser.whole("--max-rows", 32, rows)
    parser.whole("--max-body", 1 << 20, "bytes of a request")
    parser.real("--max-seconds", 120.0, "of a request, its wait included", 0.1, 86400)
    parser.real("--drain-seconds", 30.0, "to finish requests after SIGTERM", 0, 86400)
    parser.whole("--suffix-tokens", 64, "text after a span that its window reads")


def check_packages() -> None:
    """Raise UserError if a package of the server is not installed."""
    needed = ("starlette", "uvicorn", "pydantic", "sse_starlette", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install -r requirements-serve.txt"
        fail(f"scripts/serve.py needs {', '.join(missing)}: {remedy}")


def read_keys(path: Path | None) -> list[bytes]:
    """Read API keys, one a line; UserError: the file cannot be read, or a key is too short."""
    if path is None:
        return []
    try:
        lines = path.read_bytes().split()
    except OSError as error:
        fail(f"--api-key-file={path} cannot be read ({error.strerror}); name a file of keys")
    if not lines or min(map(len, lines)) < 16:
        fail(f"--api-key-file={path} must hold keys of 16 bytes or more, one a line")
    return lines


def check_host(args: argparse.Namespace) -> list[str]:
    """Return the names in Host headers; UserError: another address than this machine's, no key."""
    from scripts.serving.gate import LOCAL

    if args.host in LOCAL:
        return [*LOCAL, *args.allowed_host]
    if args.api_key_file is None:
        rule = "is reachable from other machines; name keys by --api-key-file, or use 127.0.0.1"
        fail(f"--host={args.host} {rule}")
    try:
        unspecified = ipaddress.ip_address(args.host).is_unspecified
    except ValueError:
        unspecified = False
    own = [socket.gethostname()] if unspecified else [args.host]
    return [*LOCAL, *own, *args.allowed_host]


def bind(host: str, port: int) -> socket.socket:
    """Take a port; UserError: it is in use, or the address is not this machine's.

    Nobody can connect before the server listens, when the model has been read.
    """
    made: socket.socket | None = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        if made is not None:
            made.close()
        remedy = "stop the other server, or name another --port or --host"
        fail(f"--host={host} --port={port} cannot be used ({error.strerror or error}); {remedy}")
    return made


def length_file(args: argparse.Namespace, artifact: Path) -> Path | None:
    """Find the correction of span lengths: named, beside the artifact, or the packaged one."""
    if args.length_correction is not None:
        return Path(args.length_correction)
    beside = artifact.with_suffix(".lengths.json")
    return beside if beside.is_file() else None


def make_service(args: argparse.Namespace, device: torch.device) -> Service:
    """Load the model and its tokenizer; UserError: one is missing or not the other's."""
    from scripts.chain import find_head
    from scripts.serving import hole
    from scripts.serving.api import Access, Service
    from scripts.serving.engine import Engine, Limits
    from scripts.serving.jobs import Model, Options
    from scripts.serving.metrics import Metrics
    from scripts.serving.passes import check_deterministic
    from scripts.serving.text import Vocabulary

    hosts, keys = check_host(args), read_keys(args.api_key_file)
    path = args.artifact or default_artifact()
    artifact = load_artifact(path, device)
    cfg = artifact.model.cfg
    file = args.tokenizer or Path(cfg.tokenizer_path)
    counter = open_tokenizer(artifact, file, "tokenizer ", "name that one: --tokenizer MODEL")
    vocabulary, name = Vocabulary(counter.tokenizer), args.model_name or path.stem
    model = Model(name, vocabulary, cfg.train_seq_len, artifact.model.mask_emb is not None)
    limits, metrics = Limits(args.slots, args.queue, args.max_seconds), Metrics()
    head = find_head(args.head, artifact.model, path)
    with autocast(device):  # as the engine computes
        same = not args.deterministic or check_deterministic(artifact.model, args.slots, head)
    if not same:
        rule = "finds that results on this machine depend on the slot; leave it out"
        fail(f"--deterministic --slots={args.slots} {rule}, or try another number of --slots")
    try:
        engine = Engine(artifact.model, limits, metrics, args.deterministic, head)
        engine.warm_up()
    except (RuntimeError, MemoryError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"--slots={args.slots}: no pass can be taken ({why}); use fewer, or another --device")
    most = min(args.max_rows, args.slots + args.queue)  # more would never be admitted
    correction = hole.read_correction(length_file(args, path))
    options = Options(most, args.suffix_tokens, correction)
    return Service(model, engine, metrics, options, Access(hosts, keys, args.max_body))


def make_server(service: Service, drain_seconds: float) -> uvicorn.Server:
    """Make the HTTP server, which drains on a signal before it ends."""
    import asyncio
    import time

    import uvicorn

    class Server(uvicorn.Server):
        """Answers 503 while it drains; a second signal ends it at once."""

        def handle_exit(self, sig: int, frame: object) -> None:
            if service.engine.draining:
                report_errors("interrupted again; what had begun was cut off")
                os._exit(128 + sig)  # an orderly end would wait for the model's thread
            self._captured_signals.append(sig)  # raised again at the end: the exit status
            service.engine.draining = True
            self.drained = time.monotonic() + drain_seconds
            # Held, for the loop holds tasks weakly.
            self.draining = asyncio.get_running_loop().create_task(self.drain())

        async def drain(self) -> None:
            """Exit when all rows are done and told, or after the time for it."""
            while not service.engine.idle and time.monotonic() < self.drained:
                await asyncio.sleep(0.02)
            self.should_exit = True

    config = uvicorn.Config(
        service.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    return Server(config)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    check_packages()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    listening = bind(args.host, args.port)
    try:
        service = make_service(args, pick_device(args.device))
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        listening.listen(1024)  # who reads the address can connect
        print(f"{service.model.name}: {url} (process {os.getpid()})", flush=True)
        make_server(service, args.drain_seconds).run(sockets=[listening])
    finally:
        listening.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args), resume=FINISHED)


if __name__ == "__main__":
    sys.exit(main())
