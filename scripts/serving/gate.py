"""What every request has to pass: Host, Origin and key."""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.serving.errors import ApiError

if TYPE_CHECKING:
    from scripts.serving.metrics import Metrics

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/health", "/page.js", "/page.css")  # without a key: they tell nothing of requests


def host_name(value: str) -> str:
    """Return the name in a Host header, without its port; empty: not valid."""
    try:
        return urlsplit(f"//{value}").hostname or ""
    except ValueError:
        return ""


def origin_host(value: str) -> str:
    """Return host and port in an Origin header; empty: not valid."""
    try:
        return urlsplit(value).netloc
    except ValueError:
        return ""


class Gate:
    """ASGI middleware; what it refuses is a JSON error.

    Args:
        app: what is behind it.
        hosts: names by which clients may call the server. Checking them stops a web page that
            makes its own name resolve to this machine (DNS rebinding).
        keys: any one is needed, as `Authorization: Bearer KEY`; empty: none.
        metrics: counts responses.
        routes: paths that are counted by name.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str],
        keys: Sequence[bytes],
        metrics: Metrics,
        routes: Collection[str],
    ) -> None:
        self.app, self.hosts, self.keys = app, frozenset(map(str.lower, hosts)), keys
        self.metrics, self.routes = metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, began = scope["path"], time.monotonic()
        scope.setdefault("state", {})["arrived"] = began
        route = path if path in self.routes else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.metrics.request.labels(route).observe(time.monotonic() - began)

        try:
            self.check(path, Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def check(self, path: str, headers: Headers) -> None:
        """Raise ApiError for a request that must not pass."""
        host = host_name(headers.get("host", ""))
        if host not in self.hosts:
            rule = (
                f"Host {host!r} is not a name of this server; use {', '.join(sorted(self.hosts))}"
            )
            raise ApiError(403, f"{rule}, or start it with --allowed-host", "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin_host(origin) != headers.get("host"):
            rule = "pages of other sites may not use this server"
            raise ApiError(403, f"Origin {origin!r}: {rule}", "origin_not_allowed")
        if path not in OPEN and self.keys:
            self.check_key(headers.get("authorization", ""))

    def check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        given = key.strip().encode()
        # All are compared, each in constant time, so that time tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            word = "missing" if not header else "wrong"
            rule = f"the API key is {word}; send Authorization: Bearer KEY"
            raise ApiError(401, rule, "invalid_api_key")
