"""Routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from scripts.decoding import LOSSLESS
from scripts.serving import bodies
from scripts.serving.engine import Engine
from scripts.serving.errors import ApiError, json_response, of_validation
from scripts.serving.gate import Gate
from scripts.serving.jobs import (
    Choice,
    Job,
    Model,
    Options,
    Wish,
    choose_mode,
    deadline_kept,
)
from scripts.serving.metrics import Metrics
from scripts.serving.shapes import ChatShape, Edited, FimShape, Json, LlamaShape, Shape

STATIC = Path(__file__).with_name("static")
DEFAULT_TOKENS = 16  # of OpenAI's completions
SEND_SECONDS = 30.0  # a client that takes longer to read a chunk is given up
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
SAFE |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

Parsed = TypeVar("Parsed", bound=BaseModel)


class Access(NamedTuple):
    """Who may call the server, and with how much."""

    hosts: Sequence[str]
    keys: Sequence[bytes] = ()
    body_bytes: int = 1 << 20
    body_seconds: float = 20.0  # to send it


class Service:
    """One model behind HTTP."""

    def __init__(
        self, model: Model, engine: Engine, metrics: Metrics, options: Options, access: Access
    ) -> None:
        self.model, self.engine, self.metrics = model, engine, metrics
        self.options, self.access = options, access

    # --- requests ---

    async def read(self, request: Request, kind: type[Parsed]) -> Parsed:
        """Read and check a body; ApiError: it is too large, too slow or not valid."""
        limit, parts, size = self.access.body_bytes, list[bytes](), 0
        rule = f"the body exceeds {limit:,} bytes; send less text"
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise ApiError(413, rule, "body_too_large")
        try:
            async with asyncio.timeout(self.access.body_seconds):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise ApiError(413, rule, "body_too_large")
        except TimeoutError as error:
            seconds = f"{self.access.body_seconds:g} s"
            raise ApiError(408, f"the body took longer than {seconds}", "body_timeout") from error
        body = b"".join(parts)
        try:
            body.decode("utf-8")
            return kind.model_validate_json(body)
        except UnicodeDecodeError as error:
            where = f"the body is not UTF-8 (byte {error.start}); convert it"
            raise ApiError(400, where, "invalid_encoding") from error
        except ValidationError as error:
            raise of_validation(error) from error

    def check_model(self, name: str | None) -> None:
        if name not in (None, "", self.model.name):
            rule = f"model {name!r} is not served here; leave it out, or send {self.model.name!r}"
            raise ApiError(404, rule, "model_not_found", "model")

    def encode(self, text: str, param: str, continues: bool = False) -> list[int]:
        """Turn text into tokens; ApiError: it cannot fit the context."""
        longest = self.model.vocabulary.longest
        if len(text) > longest * self.model.length:
            tokens = f"more than {len(text) // longest} tokens"
            raise self.too_long(tokens, param)
        return self.model.vocabulary.encode(text, continues)

    def too_long(self, tokens: str, param: str) -> ApiError:
        rule = f"exceed the context of {self.model.length} tokens (TRAIN_SEQ_LEN), with one to fill"
        code = "context_length_exceeded"
        return ApiError(400, f"{param}: {tokens} {rule}; shorten the text", code, param)

    def prompts(self, prompt: Any, param: str = "prompt") -> tuple[list[list[int]], list[int]]:
        """Turn a prompt of any form into rows of tokens, each after the token that opens a text.

        Returns the rows, and how many tokens at the beginning of each were added.
        """
        one = isinstance(prompt, str) or (prompt[:1] and isinstance(prompt[0], int))
        given = [prompt] if one else prompt
        if not given or any(part == [] for part in given):
            raise ApiError(400, f"{param} is empty; send text or tokens", "invalid_value", param)
        if len(given) > self.options.max_rows:  # before any is encoded
            rule = f"{len(given)} prompts exceed {self.options.max_rows}; send fewer at a time"
            raise ApiError(400, f"{param}: {rule}", "too_many_rows", param)
        bos, rows, hidden = self.model.vocabulary.bos, list[list[int]](), list[int]()
        for part in given:
            tokens = self.encode(part, param) if isinstance(part, str) else list(part)
            if max(tokens, default=0) >= len(self.model.vocabulary):
                rule = f"tokens must be below {len(self.model.vocabulary)}, the vocabulary"
                raise ApiError(400, f"{param}: {rule}", "invalid_value", param)
            opened = tokens[:1] == [bos] and not isinstance(part, str)
            rows.append(tokens if opened else [bos, *tokens])
            hidden.append(0 if opened else 1)
        return rows, hidden

    def fit(self, wish: Wish, param: str = "prompt") -> Wish:
        """Bound the number of tokens by the context; ApiError: there is no room for one."""
        longest = max(map(len, wish.prompts)) + len(wish.suffix)
        room = self.model.length - longest
        if wish.num > 0 and choose_mode(wish.body, wish, self.model) in LOSSLESS:
            room += 1  # the last token is not read itself, so it may lie one further
        if room < min(wish.num, 1):
            raise self.too_long(f"{longest} tokens", param)
        return wish._replace(num=min(wish.num, room))

    async def completions(self, request: Request) -> Response:
        body = await self.read(request, bodies.Completion)
        self.check_model(body.model)
        if body.messages is not None:
            rule = "send prompt here, or messages to /v1/chat/completions, not both"
            raise ApiError(400, rule, "invalid_value", "messages")
        if body.prompt is None:
            raise ApiError(
                400, "prompt is missing; it may be empty text", "invalid_value", "prompt"
            )
        rows, hidden = self.prompts(body.prompt)
        wish = Wish(body, rows, hidden, self.suffix(body.suffix), self.wanted(body, DEFAULT_TOKENS))
        wish = wish._replace(n=body.n or 1, echo=bool(body.echo), top=body.logprobs)
        return await self.answer(request, wish, Shape)

    def suffix(self, text: str | None, spare: int = 0) -> list[int]:
        """Return the tokens after a span that its window reads, and up to `spare` more."""
        limit = self.options.suffix_tokens
        cut = (text or "")[: self.model.vocabulary.longest * (limit + 1)]
        return self.model.vocabulary.encode(cut, True)[: limit + spare]

    @staticmethod
    def wanted(body: bodies.OpenAI, default: int) -> int:
        return default if body.max_tokens is None else body.max_tokens

    async def fim(self, request: Request) -> Response:
        body = await self.read(request, bodies.Fim)
        self.check_model(body.model)
        rows, hidden = self.prompts(body.prompt)
        if body.seed is None and body.random_seed is not None:
            body.seed = body.random_seed
        wish = Wish(body, rows, hidden, self.suffix(body.suffix), self.wanted(body, 32))
        return await self.answer(request, wish._replace(n=body.n or 1), FimShape)

    async def chat(self, request: Request) -> Response:
        body = await self.read(request, bodies.Chat)
        self.check_model(body.model)
        refused = {
            "prompt": body.prompt is not None,
            "suffix": body.suffix is not None,
            "tools": bool(body.tools),
            "functions": bool(body.functions),
            "logprobs": bool(body.logprobs),
            "response_format": (body.response_format or {}).get("type", "text") != "text",
        }
        for name in [name for name, given in refused.items() if given]:
            rule = "is not supported: messages are plain text for an untuned model; leave it out"
            raise ApiError(400, f"{name} {rule}", "invalid_value", name)
        text = "\n\n".join(message.text() for message in body.messages)
        rows, hidden = self.prompts(f"{text}\n\n", "messages")
        wish = Wish(body, rows, hidden, [], self.wanted(body, 64), n=body.n or 1)
        return await self.answer(request, self.fit(wish, "messages"), ChatShape)

    async def edit(self, request: Request) -> Response:
        body = await self.read(request, bodies.Edit)
        self.check_model(body.model)
        draft = self.encode(body.input, "input")
        if not draft:
            raise ApiError(400, "input is empty; send text to revise", "invalid_value", "input")
        bos, suffix = self.model.vocabulary.bos, self.suffix(body.suffix)
        if 1 + len(draft) + len(suffix) > self.model.length:
            raise self.too_long(f"{1 + len(draft) + len(suffix)} tokens", "input")
        wish = Wish(body, [[bos]], [1], suffix, len(draft), n=body.n or 1, draft=draft)
        return await self.answer(request, wish, Edited)

    async def completion(self, request: Request) -> Response:
        body = await self.read(request, bodies.Llama)
        self.check_model(body.model)
        rows, hidden = self.prompts("" if body.prompt is None else body.prompt)
        num = 128 if body.n_predict is None or body.n_predict < 0 else body.n_predict
        return await self.answer(request, self.llama(body, rows[0], hidden[0], [], num), LlamaShape)

    async def infill(self, request: Request) -> Response:
        body = await self.read(request, bodies.Infill)
        self.check_model(body.model)
        given = 32 if body.n_predict is None or body.n_predict < 0 else body.n_predict
        extra = "".join(f"{each.filename}\n{each.text}\n\n" for each in body.input_extra or [])
        text = extra + body.input_prefix + (body.prompt or "")
        # No more characters can matter; cutting them first bounds the time of encoding.
        most = self.model.vocabulary.longest * self.model.length
        prefix = self.model.vocabulary.encode(text[-most:])
        after, num = self.suffix(body.input_suffix, 1), min(given, self.model.length // 4)
        suffix = after[: min(self.options.suffix_tokens, self.model.length // 4)]
        cut = len(text) > most or len(suffix) < len(after)
        room = self.model.length - 1 - num - len(suffix)
        rows = [self.model.vocabulary.bos, *prefix[max(len(prefix) - room, 0) :]]
        wish = self.llama(body, rows, 1, suffix, num)
        return await self.answer(
            request, wish._replace(truncated=cut or len(prefix) > room), LlamaShape
        )

    @staticmethod
    def llama(
        body: bodies.Llama, prompt: list[int], hidden: int, suffix: list[int], num: int
    ) -> Wish:
        wish = Wish(body, [prompt], [hidden], suffix, num, top=body.n_probs or None)
        limit = body.t_max_predict_ms
        return wish if limit is None or limit <= 0 else wish._replace(deadline_ms=limit)

    # --- answers ---

    async def answer(self, request: Request, wish: Wish, shape: type[Shape]) -> Response:
        """Decode what is wished and answer in a shape."""
        if wish.body.deadline_ms is not None:
            wish = wish._replace(deadline_ms=wish.body.deadline_ms)
        if not wish.draft:
            wish = self.fit(wish)
        job = Job(wish, self.model, self.engine, self.options, request.state.arrived)
        made = shape(job)
        job.submit()
        if wish.body.stream:
            return Stream(job, self.stream(job, made), self.metrics)
        finished = asyncio.ensure_future(job.finish())
        gone = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({finished, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not finished.done():
                self.metrics.cancelled.inc()
                return Response(status_code=499)  # nobody reads it
            self.count(await finished)
            return json_response(made.whole())
        finally:
            for task in (finished, gone):
                task.cancel()
            job.cancel()

    async def stream(self, job: Job, shape: Shape) -> AsyncIterator[Json]:
        """Yield server-sent events; an error after the first byte is one of them."""
        try:
            for chunk in shape.opening():
                yield event(chunk)
            async for update in job.updates():
                if job.wish.body.diffusing and update.text:
                    continue  # frames show it already
                yield event(shape.update(update))
            self.count(job.choices)
            for chunk in shape.closing():
                yield event(chunk)
        except ApiError as error:
            job.cancel()
            yield event(error.body())
        if shape.ends:
            yield {"data": "[DONE]"}

    def count(self, choices: Sequence[Choice]) -> None:
        """Add finished choices to the metrics."""
        for choice in choices:
            row = choice.row
            self.metrics.tokens.labels(row.decoding.mode).inc(len(row.span))
            self.metrics.prompt_tokens.inc(len(row.prompt))
            if row.fell_back:
                self.metrics.fallbacks.labels(row.fell_back).inc()
            if (kept := deadline_kept(row)) is not None:
                self.metrics.deadlines.labels(str(kept).lower()).inc()

    # --- facts ---

    async def models(self, _: Request) -> Response:
        cfg = self.engine.model.cfg
        meta = {"n_ctx_train": self.model.length, "n_vocab": len(self.model.vocabulary)}
        meta |= {"n_embd": cfg.model_dim, "denoiser": self.model.denoiser}
        entry = {"id": self.model.name, "object": "model", "created": 0, "owned_by": "local"}
        return json_response({"object": "list", "data": [{**entry, "meta": meta}]})

    async def health(self, _: Request) -> Response:
        if self.engine.draining:
            raise ApiError(503, "the server is about to end", "draining", None, 5)
        return json_response({"status": "ok"})

    async def slots(self, _: Request) -> Response:
        found: list[Json] = []
        for i, slot in enumerate(self.engine.slots):
            row = slot.row
            facts: Json = {"id": i, "is_processing": row is not None, "n_ctx": self.model.length}
            facts["n_cached"] = len(slot.tokens)
            if row is not None:
                facts |= {"mode": row.decoding.mode, "passes": row.passes, "n_prompt": row.start}
                facts["n_decoded"] = len(row.span)
            found.append(facts)
        return json_response(found)

    async def metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def tokenizer_info(self, _: Request) -> Response:
        vocabulary = self.model.vocabulary
        piece = vocabulary.pieces[vocabulary.bos]
        # One token opens a document and so ends the one before.
        names = {"bos_token": piece, "eos_token": piece, "pad_token": None, "chat_template": None}
        size = len(vocabulary)
        return json_response({**names, "vocab_size": size, "model_max_length": self.model.length})

    async def tokenize(self, request: Request) -> Response:
        body = await self.read(request, bodies.Tokenize)
        text = body.content if body.content is not None else body.prompt
        if text is None:
            rule = "send the text as content or prompt"
            raise ApiError(400, rule, "invalid_value", "content")
        vocabulary = self.model.vocabulary
        special = text == vocabulary.pieces[vocabulary.bos]  # how clients ask for its number
        ids = [vocabulary.bos] if special else await asyncio.to_thread(vocabulary.encode, text)
        if (body.add_special or body.add_special_tokens) and not special:
            ids = [vocabulary.bos, *ids]
        tokens: list[Any] = list(ids)
        if body.with_pieces:
            tokens = [{"id": i, "piece": vocabulary.label(i)} for i in ids]
        facts = {"count": len(ids), "max_model_len": self.model.length}
        return json_response({"tokens": tokens, **facts})

    async def detokenize(self, request: Request) -> Response:
        body = await self.read(request, bodies.Detokenize)
        if max(body.tokens, default=0) >= len(self.model.vocabulary):
            rule = f"tokens must be below {len(self.model.vocabulary)}"
            raise ApiError(400, rule, "invalid_value", "tokens")
        text = self.model.vocabulary.decode(body.tokens, opens=True)
        return json_response({"content": text, "prompt": text})

    def routes(self) -> list[Route]:
        post: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/completions": self.completions,
            "/v1/fim/completions": self.fim,
            "/v1/chat/completions": self.chat,
            "/v1/edit/completions": self.edit,
            "/infill": self.infill,
            "/completion": self.completion,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/models": self.models,
            "/health": self.health,
            "/metrics": self.metrics_text,
            "/slots": self.slots,
            "/tokenizer_info": self.tokenizer_info,
            "/": static("page.html", "text/html"),
            "/page.css": static("page.css", "text/css"),
            "/page.js": static("page.js", "text/javascript"),
        }
        posts = [Route(path, handler, methods=["POST"]) for path, handler in post.items()]
        return posts + [Route(path, handler, methods=["GET"]) for path, handler in get.items()]

    def app(self) -> Starlette:
        """Make the ASGI application; its life is that of the engine's thread."""
        routes = self.routes()
        paths = [route.path for route in routes]
        access = self.access

        @contextlib.asynccontextmanager
        async def life(_: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.engine.stop)

        gate = Middleware(
            Gate,
            hosts=access.hosts,
            keys=access.keys,
            metrics=self.metrics,
            routes=paths,
        )
        handlers: Any = {ApiError: on_api_error, HTTPException: on_http_error}
        handlers |= {ClientDisconnect: on_disconnect, Exception: on_crash}
        return Starlette(
            routes=routes, middleware=[gate], exception_handlers=handlers, lifespan=life
        )


class Stream(EventSourceResponse):
    """Events of a job, which is given up when its client leaves, be it before the first of them."""

    def __init__(self, job: Job, events: AsyncIterator[Json], metrics: Metrics) -> None:
        super().__init__(events, sep="\n", send_timeout=SEND_SECONDS)
        self.job, self.metrics = job, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self.job.cancel():
                self.metrics.cancelled.inc()


def event(value: Json) -> Json:
    """Make a server-sent event of a JSON value."""
    return {"data": json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))}


async def disconnected(request: Request) -> None:
    """Wait until the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def static(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """Serve a file of the page."""
    content = (STATIC / name).read_bytes()

    async def handler(_: Request) -> Response:
        return Response(content, 200, SAFE, media_type)

    return handler


async def on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "no such route", 405: "another method is needed"}
    what = f"{request.method} {request.url.path}: {words.get(error.status_code, error.detail)}"
    made = ApiError(error.status_code, what, "not_found" if error.status_code == 404 else "http")
    made.headers = dict(error.headers or {})
    return made.response()


async def on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def on_crash(_: Request, error: Exception) -> Response:
    return ApiError(500, f"internal error ({type(error).__name__})", "internal_error").response()
