"""The routes: from a request body to the engine, and back to a reply."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trimix_gguf.answering.chat import close_renderer
from trimix_gguf.errors import QueueFull, TrimixError
from trimix_gguf.server.bodies import read_json
from trimix_gguf.server.errors import INVALID_SCHEMA, RequestError, as_request_error, error_response
from trimix_gguf.server.events import Events, stopping
from trimix_gguf.server.fields import Fields
from trimix_gguf.server.guard import Access, Guard
from trimix_gguf.server.limits import Limits
from trimix_gguf.server.log import Log
from trimix_gguf.server.metrics import CONTENT_TYPE, Metrics
from trimix_gguf.server.openai import Call, parse_chat, parse_completion
from trimix_gguf.server.prompts import make_requests, no_model, prompt_texts
from trimix_gguf.server.records import Record, Recorded, record_of
from trimix_gguf.server.replies import Reply
from trimix_gguf.server.responses import ResponseReply, parse_response
from trimix_gguf.server.trios import BY_LETTERS, Engine, Entry, Trios, defaults_of

PAGE = Path(__file__).parent / "page.html"
# The page is one file that asks only this server, and no other page may show it in a frame.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Parse = Callable[[object, list[str] | None], Call]


class Api:
    """Trios and their engines behind OpenAI's routes, under the names of the trios.

    `limits` are those of each trio's Batcher too. Fields that are not known are ignored, and named
    in a header, and so is the name of a model where there is one trio; `strict` refuses them.
    """

    def __init__(self, trios: Trios, *, limits: Limits, strict: bool = False) -> None:
        self._trios, self._limits, self._strict = trios, limits, strict
        self._created = int(time.time())
        self._metrics = Metrics()
        self._open: set[Events] = set()
        # Few threads: each takes turns with the engine's for Python's lock.
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="prepare")
        self._n_answers: Counter[str] = Counter()  # that are not finished, by client

    def application(self, access: Access, log: Log | None = None) -> ASGIApp:
        """The ASGI application for those who have access; it writes a line per request to `log`."""
        routes = [
            Route("/", self.page),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
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

    def stop(self) -> None:
        """End every answer that is not finished, and say why."""
        for events in self._open:
            events.end(stopping())
        close_renderer()

    # -- replies ----------------------------------------------------------------------------

    async def chat(self, request: HttpRequest) -> Response:
        """Answer a chat."""
        call = await self._call(request, parse_chat)
        async with self._engine(request, call) as (engine, taken):
            reply = Reply(call, engine.trio, model=engine.name, taken=taken)
            return await self._reply(request, engine, call, reply)

    async def responses(self, request: HttpRequest) -> Response:
        """Answer a chat, in the form of OpenAI's newer route."""
        call = await self._call(request, parse_response)
        async with self._engine(request, call) as (engine, taken):
            reply = ResponseReply(call, engine.trio, model=engine.name, taken=taken)
            return await self._reply(request, engine, call, reply)

    async def completions(self, request: HttpRequest) -> Response:
        """Continue one or more texts."""
        call = await self._call(request, parse_completion)
        self._check_number(call)
        async with self._engine(request, call) as (engine, taken):
            echoes = prompt_texts(engine.trio, call)
            reply = Reply(call, engine.trio, model=engine.name, echoes=echoes, taken=taken)
            return await self._reply(request, engine, call, reply)

    async def _call(self, request: HttpRequest, parse: Parse) -> Call:
        return parse(await self._read(request), self._ignored(request))

    @asynccontextmanager
    async def _engine(
        self, request: HttpRequest, call: Call
    ) -> AsyncIterator[tuple[Engine, dict[str, str]]]:
        """The engine that a call asks for, and what the reply says of that choice."""
        entry = self._entry(call.model, call.question, self._ignored(request))
        async with self._trios.use(entry) as engine:
            yield engine, {} if self._trios.is_single else {"trio": entry.name}

    def _ignored(self, request: HttpRequest) -> list[str] | None:
        """Where the names of fields go that are not used; None where they are refused."""
        return None if self._strict else record_of(request.scope).ignored

    async def _read(self, request: HttpRequest) -> object:
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
            lambda: make_requests(engine.trio, call, defaults=engine.defaults),
            n=n,
            executor=self._executor,
            receive=request.receive,
            timeout_s=self._limits.timeout_s,
        )
        if call.stream:
            chunks = self._stream(engine, events, reply, record)
            # Headers are sent with the first chunk: a failure before it has its own status.
            first = await anext(chunks)
            return _EventStream(first, chunks, stall_s=self._limits.read_timeout_s)
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
        """Server-sent events; an error after the first one is the last of them."""
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

    def _entry(self, model: str | None, text: str, ignored: list[str] | None) -> Entry:
        """The trio that a call names, or that `text` asks for; RequestError where there is none.

        Where there is one trio, it answers to any name.
        """
        found = self._trios.named(model)
        if found is not None:
            return found
        if not self._trios.is_single:
            if model == BY_LETTERS:
                return self._trios.by_letters(text)
            raise self._no_model(str(model))
        if ignored is None:
            raise self._no_model(str(model))
        ignored.append("model")
        return self._trios.entries[0]

    def _no_model(self, name: str) -> RequestError:
        return no_model(name, *(entry.name for entry in self._trios.entries))

    # -- the rest ---------------------------------------------------------------------------

    async def models(self, _: HttpRequest) -> Response:
        """The list of models: the trios."""
        data = [self._model(entry) for entry in self._trios.entries]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: HttpRequest) -> Response:
        """One model of the list."""
        name = request.path_params["id"]
        if not name:
            raise HTTPException(404)
        entry = self._trios.named(name)
        if entry is None:
            raise self._no_model(name)
        return JSONResponse(self._model(entry))

    def _model(self, entry: Entry) -> dict[str, Any]:
        # Of calls that name none; None where each prompt chooses its own.
        fixed, tuning = defaults_of(entry, self._limits).fixed, entry.tuning
        said: dict[str, Any] = {
            "description": entry.description or None,
            "weights": fixed and [fixed.weights.alpha, fixed.weights.beta],
            "tuning": tuning and {"verdict": tuning.verdict, "n_exercises": tuning.n},
        }
        if not self._trios.is_single:
            said["languages"] = entry.languages
        return {
            "id": entry.name,
            "object": "model",
            "created": self._created,
            "owned_by": "trimix",
            "max_model_len": entry.n_ctx,
            "trimix": said,
        }

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
        return fields, self._entry(fields.text("model"), text, ignored)

    async def health(self, _: HttpRequest) -> Response:
        """Whether the engines run, and take more requests."""
        if not self._trios.is_alive:
            raise RequestError("the engine has stopped", status=503, code="engine_stopped")
        return JSONResponse({"status": "busy" if self._trios.is_busy else "ok"})

    async def metrics(self, _: HttpRequest) -> Response:
        """Counts for Prometheus."""
        text = self._metrics.render(self._trios.statistics())
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
