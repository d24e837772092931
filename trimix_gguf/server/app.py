"""The routes: from a request body to the engine, and back to a reply."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from trimix_gguf.answering.chat import close_renderer
from trimix_gguf.errors import QueueFull, TrimixError
from trimix_gguf.server.anthropic import MessageReply, parse_counted, parse_message
from trimix_gguf.server.bodies import read_json
from trimix_gguf.server.document import document
from trimix_gguf.server.errors import INVALID_SCHEMA, RequestError, as_request_error, error_response
from trimix_gguf.server.events import Events, stopping
from trimix_gguf.server.fields import Fields
from trimix_gguf.server.guard import Access, Guard
from trimix_gguf.server.limits import Limits
from trimix_gguf.server.log import Log
from trimix_gguf.server.metrics import CONTENT_TYPE, Metrics
from trimix_gguf.server.models import Models
from trimix_gguf.server.ollama import (
    NOT_HERE,
    GenerateReply,
    OllamaReply,
    parse_generate,
    parse_ollama_chat,
)
from trimix_gguf.server.openai import Call, parse_chat, parse_completion
from trimix_gguf.server.prompts import count_prompt, make_requests, prompt_texts, with_usable_tools
from trimix_gguf.server.records import Record, Recorded, record_of
from trimix_gguf.server.replies import Reply, Said
from trimix_gguf.server.responses import ResponseReply, parse_response
from trimix_gguf.server.streaming import Stream
from trimix_gguf.server.trios import Engine, Entry, Trios

_POLL_S = 0.02
Parse = Callable[[object, list[str] | None], Call]
Door = Callable[[HttpRequest], Awaitable[Response]]
_DOORS: dict[str, tuple[Parse, type[Reply]]] = {
    "/v1/chat/completions": (parse_chat, Reply),
    "/v1/completions": (parse_completion, Reply),
    "/v1/responses": (parse_response, ResponseReply),
    "/v1/messages": (parse_message, MessageReply),
    "/api/chat": (parse_ollama_chat, OllamaReply),
    "/api/generate": (parse_generate, GenerateReply),
}


class Api:
    """Trios and their engines behind the routes of OpenAI, Anthropic and Ollama.

    `limits` are those of each trio's Batcher too. Fields that are not known are ignored, and named
    in a header, and so is the name of a model where there is one trio; `strict` refuses them.
    """

    def __init__(self, trios: Trios, *, limits: Limits, strict: bool = False) -> None:
        self._trios, self._limits, self._strict = trios, limits, strict
        self._models = Models(trios, limits)
        self._metrics = Metrics()
        self._open: set[Events] = set()
        self._n_inside = 0  # requests that were taken on, and have no reply yet
        self._is_draining = False
        self._failure: RequestError | None = None
        # Few threads: each takes turns with the engine's for Python's lock.
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="prepare")
        self._n_answers: Counter[str] = Counter()  # that are not finished, by client

    def application(self, access: Access, log: Log | None = None) -> ASGIApp:
        """The ASGI application for those who have access; it writes a line per request to `log`."""
        routes = [
            Route("/", self.page),
            *(Route(path, self._door(*d), methods=["POST"]) for path, d in _DOORS.items()),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/api/tags", self.tags),
            Route("/api/ps", self.loaded),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/version", self.version),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        application = Starlette(
            routes=routes,
            middleware=[Middleware(Guard, access=access)],
            exception_handlers={
                TrimixError: _refused,
                HTTPException: _no_such_route,
                ClientDisconnect: _left,
                500: _broken,
            },
        )
        application.router.redirect_slashes = False
        paths = [route.path for route in routes]
        proxies = access.proxies
        return Recorded(application, metrics=self._metrics, paths=paths, log=log, proxies=proxies)

    async def drain(self) -> None:
        """Take on no more requests, and wait until those that were are answered."""
        self._is_draining = True
        while self._n_inside or self._open:
            await asyncio.sleep(_POLL_S)

    def stop(self) -> None:
        """End every answer that is not finished, and say why."""
        for events in self._open:
            events.end(stopping())
        close_renderer()

    def fail(self, error: RequestError) -> None:
        """Answer all requests with this error, those included that are not finished."""
        self._failure = error
        for events in self._open:
            events.end(error)

    @property
    def n_open(self) -> int:
        """Requests that have an answer to come."""
        return len(self._open) + self._n_inside

    # -- replies ----------------------------------------------------------------------------

    def _door(self, parse: Parse, kind: type[Reply]) -> Door:
        """What answers a path: bodies that `parse` reads, in the form of a kind of reply."""

        async def answer(request: HttpRequest) -> Response:
            ignored, record = self._ignored(request), record_of(request.scope)
            call = parse(await self._read(request), ignored)
            self._check_number(call)
            async with self._inside(), self._engine(call, ignored) as (engine, taken):
                call = with_usable_tools(engine.trio, call, ignored)
                echoes = prompt_texts(engine.trio, call)
                said = Said(model=engine.name, echoes=echoes, taken=taken, began=record.began)
                reply = kind(call, engine.trio, **said)
                if call.is_empty:
                    return JSONResponse(reply.body())
                return await self._reply(request, engine, call, reply)

        return answer

    @asynccontextmanager
    async def _inside(self) -> AsyncIterator[None]:
        """While a request is taken on; raises RequestError where the server is to end."""
        if self._is_draining:
            raise stopping()
        self._n_inside += 1
        try:
            yield
        finally:
            self._n_inside -= 1

    @asynccontextmanager
    async def _engine(
        self, call: Call, ignored: list[str] | None
    ) -> AsyncIterator[tuple[Engine, dict[str, str]]]:
        """The engine that a call asks for, and what the reply says of that choice."""
        entry = self._trios.asked(call.model, call.question, ignored)
        async with self._trios.use(entry) as engine:
            yield engine, {} if self._trios.is_single else {"trio": entry.name}

    def _ignored(self, request: HttpRequest) -> list[str] | None:
        """Where the names of fields go that are not used; None where they are refused."""
        return None if self._strict else record_of(request.scope).ignored

    async def _read(self, request: HttpRequest) -> object:
        if self._failure is not None:
            raise self._failure
        most_bytes, timeout_s = self._limits.body_limit, self._limits.read_timeout_s
        return await read_json(request, most_bytes=most_bytes, timeout_s=timeout_s)

    def _check_number(self, call: Call) -> int:
        """How many answers a call asks for; raises RequestError where that is too many."""
        n, most = call.n * max(1, len(call.prompts)), self._limits.parallel + self._limits.queue
        if n > most:
            raise RequestError(
                f"{n} answers are asked for; this server takes {most} at once",
                param="n",
                code="invalid_value",
            )
        return n

    async def _reply(
        self, request: HttpRequest, engine: Engine, call: Call, reply: Reply
    ) -> Response:
        n, record = self._check_number(call), record_of(request.scope)
        self._check_share(n, record)
        events = Events(
            engine.batcher,
            lambda: make_requests(engine.trio, call, defaults=engine.defaults, tasks=engine.tasks),
            n=n,
            executor=self._executor,
            receive=request.receive,
            timeout_s=self._limits.timeout_s,
            whole=not call.stream,
        )
        if call.stream:
            chunks = self._stream(engine, events, reply, record)
            # Headers are sent with the first chunk: a failure before it has its own status.
            first = await anext(chunks)
            stall_s = self._limits.read_timeout_s
            return Stream(first, chunks, media_type=reply.media_type, stall_s=stall_s)
        async for _ in self._chunks(engine, events, reply, record):
            pass
        return JSONResponse(reply.body())

    def _check_share(self, n: int, record: Record) -> None:
        most = self._limits.per_client
        if most and self._n_answers[record.holder] + n > most:
            raise QueueFull(f"one client has at most {most} answers at once; try again later")

    async def _chunks(
        self, engine: Engine, events: Events, reply: Reply, record: Record
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a reply as its events come; cancels its jobs however it ends."""
        started, seen, n = time.perf_counter(), set(), len(reply.choices)
        self._open.add(events)
        engine.hold()  # a stream goes on after its route has returned
        self._n_answers[record.holder] += n
        try:
            async for index, event in events:
                if event.tokens and index not in seen:
                    seen.add(index)
                    self._metrics.observe_first_token(time.perf_counter() - started)
                for chunk in reply.take(index, event):
                    yield chunk
        except RequestError as error:
            if error.code == INVALID_SCHEMA:
                error.param = reply.schema_at
            raise
        finally:
            self._open.discard(events)
            self._n_answers[record.holder] -= n
            self._n_answers += Counter()  # leaves out who has none
            record.n_prompt, record.n_tokens = reply.n_tokens()
            events.close()
            engine.release()

    async def _stream(
        self, engine: Engine, events: Events, reply: Reply, record: Record
    ) -> AsyncGenerator[bytes, None]:
        """The parts of a stream; an error after the first one is the last of them."""
        begun = False
        try:
            async with aclosing(self._chunks(engine, events, reply, record)) as chunks:
                async for chunk in chunks:
                    yield reply.encode(chunk)
                    begun = True
            if ending := reply.ending():
                yield ending
        except RequestError as error:
            if not begun:
                raise
            yield reply.failure(error)
        except ClientDisconnect:
            if not begun:
                raise

    # -- the rest ---------------------------------------------------------------------------

    async def models(self, _: HttpRequest) -> Response:
        """The list of models: the trios."""
        return JSONResponse(self._models.openai())

    async def model(self, request: HttpRequest) -> Response:
        """One model of the list."""
        name = request.path_params["id"]
        if not name:
            raise HTTPException(404)
        # An unknown name is refused here also where a chat would ignore it.
        return JSONResponse(self._models.openai_model(self._trios.asked(name, "", None)))

    async def tags(self, _: HttpRequest) -> Response:
        """Ollama's list of models."""
        return JSONResponse(self._models.tags())

    async def loaded(self, _: HttpRequest) -> Response:
        """Ollama's list of models in memory."""
        return JSONResponse(self._models.loaded())

    async def show(self, request: HttpRequest) -> Response:
        """What Ollama's clients ask about a model."""
        fields, entry = await self._fields(request)
        fields.ignore("verbose")
        fields.done()
        async with self._trios.use(entry) as engine:
            return JSONResponse(self._models.shown(entry, engine))

    async def version(self, _: HttpRequest) -> Response:
        """The version of this program, where Ollama's clients ask for Ollama's."""
        return JSONResponse({"version": version("trimix-gguf")})

    async def count_tokens(self, request: HttpRequest) -> Response:
        """How many tokens a body of /v1/messages would have as a prompt."""
        ignored = self._ignored(request)
        call = parse_counted(await self._read(request), ignored)
        async with self._engine(call, ignored) as (engine, _):
            call = with_usable_tools(engine.trio, call, ignored)
            n = await engine.tokens.aside(lambda: count_prompt(engine.trio, call))
            return JSONResponse({"input_tokens": n})

    async def tokenize(self, request: HttpRequest) -> Response:
        """Text to token ids."""
        fields, entry = await self._fields(request)
        async with self._trios.use(entry) as engine:
            return JSONResponse(await engine.tokens.tokenize(fields))

    async def detokenize(self, request: HttpRequest) -> Response:
        """Token ids to text."""
        fields, entry = await self._fields(request)
        async with self._trios.use(entry) as engine:
            return JSONResponse(await engine.tokens.detokenize(fields))

    async def tokenizer_info(self, _: HttpRequest) -> Response:
        """What the tokenizer is: that of the first trio."""
        async with self._trios.use(self._trios.entries[0]) as engine:
            return JSONResponse(engine.tokens.info())

    async def _fields(self, request: HttpRequest) -> tuple[Fields, Entry]:
        """The fields of a body, and the trio whose tokenizer they ask for."""
        ignored, body = self._ignored(request), await self._read(request)
        fields = Fields(body, ignored=ignored)
        texts = [body.get(name) for name in ("content", "prompt")] if isinstance(body, dict) else []
        text = "".join(text for text in texts if isinstance(text, str))
        name = fields.text("model")
        return fields, self._trios.asked(name and name.removesuffix(":latest"), text, ignored)

    async def health(self, _: HttpRequest) -> Response:
        """Whether the engines run, and take more requests."""
        if self._is_draining:
            raise stopping()
        if self._failure is not None:
            raise self._failure
        if not self._trios.is_alive:
            raise RequestError("the engine has stopped", status=503, code="engine_stopped")
        return JSONResponse({"status": "busy" if self._trios.is_busy else "ok"})

    async def metrics(self, _: HttpRequest) -> Response:
        """Counts for Prometheus."""
        text = self._metrics.render(self._trios.statistics())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def page(self, request: HttpRequest) -> Response:
        """The chat page."""
        try:
            page, policy = document()
        except OSError:
            return await _no_such_route(request, HTTPException(404))
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return Response(page, headers=headers, media_type="text/html")


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, TrimixError)
    return error_response(as_request_error(error), request.scope["path"])


async def _no_such_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.scope["path"], request.method
    shown = repr(path[:80])
    message = {
        404: f"there is nothing at {shown}; the API is under /v1",
        405: f"{shown} does not take {method}; it takes {(error.headers or {}).get('Allow')}",
    }.get(error.status_code, error.detail)
    if error.status_code == 404 and path in NOT_HERE:
        message = f"{path} is not supported: {NOT_HERE[path]}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    refusal = RequestError(
        message, status=error.status_code, code=code, headers=error.headers, is_read=False
    )
    return error_response(refusal, path)


async def _left(_: HttpRequest, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it, but it is counted


async def _broken(request: HttpRequest, __: Exception) -> Response:
    """For mistakes of this program: the trace goes to stderr, and no client sees it."""
    error = RequestError("the server made a mistake", status=500, code="internal")
    return error_response(error, request.scope["path"])
