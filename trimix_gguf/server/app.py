"""The routes: from a request body to the engine, and back to a reply."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.chat import close_renderer
from trimix_gguf.answering.request import Options, Request
from trimix_gguf.errors import QueueFull, TrimixError
from trimix_gguf.roles import ROLES
from trimix_gguf.server.errors import RequestError, as_request_error, error_json, error_response
from trimix_gguf.server.events import Events, stopping
from trimix_gguf.server.fields import Fields, read_json
from trimix_gguf.server.guard import Guard
from trimix_gguf.server.limits import Limits
from trimix_gguf.server.metrics import CONTENT_TYPE, Metrics
from trimix_gguf.server.openai import Call, parse_chat, parse_completion
from trimix_gguf.server.prompts import check_model, make_requests, prompt_texts
from trimix_gguf.server.replies import Reply
from trimix_gguf.trio.trio import Trio

PAGE = Path(__file__).parent / "page.html"
# The page is one file that asks only this server, and no other page may show it in a frame.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Some clients cut a stream into lines at these too, and JSON does not escape them.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


class Api:
    """A trio and its engine behind OpenAI's routes, under the model name `name`.

    `mix` (openai.mix_settings) is the trio's own, for calls that do not say how to mix. Calls
    without max_tokens get `max_tokens`. `limits` are those of `batcher` too.
    """

    def __init__(
        self,
        trio: Trio,
        batcher: Batcher,
        *,
        name: str,
        limits: Limits,
        mix: Options | None = None,
        max_tokens: int = 128,
    ) -> None:
        self._trio, self._batcher, self._name = trio, batcher, name
        self._limits = limits
        self._defaults = Request.of(Request("", max_tokens=max_tokens), **(mix or {}))
        self._created = int(time.time())
        self._metrics = Metrics()
        self._open: set[Events] = set()
        # Few threads: each takes turns with the engine's for Python's lock.
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="prepare")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._n_aside = 0

    def application(
        self, *, local: bool = True, api_key: str | None = None, cors: Sequence[str] = ()
    ) -> ASGIApp:
        """The ASGI application; `local`, `api_key` and `cors` are Guard's."""
        routes = [
            Route("/", self.page),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        application = Starlette(
            routes=routes,
            middleware=[Middleware(Guard, local=local, api_key=api_key, cors=cors)],
            exception_handlers={
                TrimixError: _refused,
                HTTPException: _no_such_route,
                ClientDisconnect: _left,
                500: _broken,
            },
        )
        application.router.redirect_slashes = False
        return _Count(application, metrics=self._metrics, paths=[r.path for r in routes])

    def stop(self) -> None:
        """End every answer that is not finished, and say why."""
        for events in self._open:
            events.end(stopping())
        close_renderer()

    # -- replies ----------------------------------------------------------------------------

    async def chat(self, request: HttpRequest) -> Response:
        """Answer a chat."""
        return await self._reply(request, parse_chat(await self._read(request)))

    async def completions(self, request: HttpRequest) -> Response:
        """Continue one or more texts."""
        return await self._reply(request, parse_completion(await self._read(request)))

    async def _read(self, request: HttpRequest) -> object:
        most_bytes, timeout_s = self._limits.body_limit, self._limits.read_timeout_s
        return await read_json(request, most_bytes=most_bytes, timeout_s=timeout_s)

    async def _reply(self, request: HttpRequest, call: Call) -> Response:
        check_model(call.model, self._name)
        n, most = call.n * max(1, len(call.prompts)), self._limits.parallel + self._limits.queue
        if n > most:
            raise RequestError(
                f"{n} answers are asked for; this server takes {most} at once",
                param="n",
                code="invalid_value",
            )
        reply = Reply(call, self._trio, model=self._name, echoes=prompt_texts(self._trio, call))
        events = Events(
            self._batcher,
            lambda: make_requests(self._trio, call, defaults=self._defaults),
            n=n,
            executor=self._executor,
            receive=request.receive,
            timeout_s=self._limits.timeout_s,
        )
        if call.stream:
            chunks = self._stream(events, call, reply)
            # Headers are sent with the first chunk: a failure before it has its own status.
            first = await anext(chunks)
            return _EventStream(first, chunks, stall_s=self._limits.read_timeout_s)
        async for _ in self._chunks(events, reply):
            pass
        return JSONResponse(reply.body())

    async def _chunks(self, events: Events, reply: Reply) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a reply as its events come; cancels its jobs however it ends."""
        started, seen = time.perf_counter(), set()
        self._open.add(events)
        try:
            async for index, event in events:
                if event.tokens and index not in seen:
                    seen.add(index)
                    self._metrics.observe_first_token(time.perf_counter() - started)
                for chunk in reply.take(index, event):
                    yield chunk
        finally:
            self._open.discard(events)
            events.close()

    async def _stream(
        self, events: Events, call: Call, reply: Reply
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the first one is the last of them."""
        begun = False
        try:
            async with aclosing(self._chunks(events, reply)) as chunks:
                async for chunk in chunks:
                    yield _sse(chunk)
                    begun = True
            if call.include_usage:
                yield _sse(reply.usage_chunk())
            yield b"data: [DONE]\n\n"
        except RequestError as error:
            if not begun:
                raise
            yield _sse(error_json(error))
        except ClientDisconnect:
            if not begun:
                raise

    # -- the rest ---------------------------------------------------------------------------

    async def models(self, _: HttpRequest) -> Response:
        """The list of models: this trio."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        """One model of the list."""
        name = request.path_params["id"]
        if not name:
            raise HTTPException(404)
        check_model(name, self._name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        # Of calls that name none; None where each prompt chooses its own.
        fixed, tuning = self._defaults.fixed, self._trio.tuning
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "trimix",
            "max_model_len": self._trio.n_ctx,
            "trimix": {
                "weights": fixed and [fixed.weights.alpha, fixed.weights.beta],
                "tuning": tuning and {"verdict": tuning.verdict, "n_exercises": tuning.n},
            },
        }

    async def tokenize(self, request: HttpRequest) -> Response:
        """Text to token ids."""
        fields = Fields(await self._read(request))
        texts = [fields.text(name) for name in ("content", "prompt")]
        begin = [fields.boolean(name) for name in ("add_special", "add_special_tokens")]
        check_model(fields.text("model"), self._name)
        fields.done()
        text = next((text for text in texts if text is not None), None)
        if text is None:
            fields.wrong("content", None, "a string")
        model = self._trio.models[ROLES[0]]
        ids = await self._in_thread(lambda: model.tokenize(model.normalize(text)))
        ids = (model.bos if any(begin) else []) + ids
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self._trio.n_ctx})

    async def detokenize(self, request: HttpRequest) -> Response:
        """Token ids to text."""
        fields = Fields(await self._read(request))
        ids = fields.take("tokens")
        check_model(fields.text("model"), self._name)
        fields.done()
        n_vocab = self._trio.n_vocab
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < n_vocab for i in ids):
            fields.wrong("tokens", ids, f"a list of token ids below {n_vocab}")
        piece = self._trio.models[ROLES[0]].piece
        raw = await self._in_thread(lambda: b"".join(piece(i) for i in ids))
        text = raw.decode("utf-8", "replace")
        return JSONResponse({"content": text, "prompt": text})

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        if self._n_aside > self._limits.queue:
            raise QueueFull(f"{self._n_aside} requests wait already; try again later")
        self._n_aside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._aside, call)
        finally:
            self._n_aside -= 1

    async def health(self, _: HttpRequest) -> Response:
        """Whether the engine runs, and takes more requests."""
        if not self._batcher.is_alive:
            raise RequestError("the engine has stopped", status=503, code="engine_stopped")
        return JSONResponse({"status": "busy" if self._batcher.is_busy else "ok"})

    async def metrics(self, _: HttpRequest) -> Response:
        """Counts for Prometheus."""
        text = self._metrics.render(self._batcher.statistics())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def page(self, request: HttpRequest) -> Response:
        """The chat page."""
        if not PAGE.is_file():
            return await _no_such_route(request, HTTPException(404))
        headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(PAGE.read_bytes(), headers=headers, media_type="text/html")


class _EventStream(Response):
    """A response in parts that come one by one; it ends if a client reads none for `stall_s`."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], *, stall_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._stall_s = first, rest, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(part: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": part, "more_body": more})

        start = {"type": "http.response.start", "status": self.status_code}
        with suppress(TimeoutError):  # uvicorn hangs up where a response ends too early
            async with aclosing(self._rest) as rest:
                await send({**start, "headers": self.raw_headers})
                await tell(self._first)
                async for part in rest:
                    await tell(part)
            await tell(b"", more=False)


class _Count:
    """An ASGI application that counts another's responses, by path (one of `paths`) and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.count_response(path, message["status"])
            await send(message)

        await self._app(scope, receive, tell)


def _sse(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_ENDS)}\n\n".encode()


async def _refused(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, TrimixError)
    return error_response(as_request_error(error))


async def _no_such_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:80], request.method
    message = {
        404: f"there is nothing at {path!r}; the API is under /v1",
        405: f"{path!r} does not take {method}; it takes {(error.headers or {}).get('Allow')}",
    }.get(error.status_code, error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return error_response(
        RequestError(
            message, status=error.status_code, code=code, headers=error.headers, is_read=False
        )
    )


async def _left(_: HttpRequest, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it, but it is counted


async def _broken(_: HttpRequest, __: Exception) -> Response:
    """For mistakes of this program: the trace goes to stderr, and no client sees it."""
    return error_response(RequestError("the server made a mistake", status=500, code="internal"))
