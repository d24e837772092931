"""How the server runs: its socket, slow and broken connections, and its end."""

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimix_gguf.server.errors import RETRY, RequestError, error_json

_MOST_HEADERS = 1 << 16  # bytes
_LAST_WORDS_S = 1.0  # for answers that are cut off to say so
_GRACE_S = 20.0  # after these, whatever still runs is ended with the process
_MOST_CONNECTIONS = 256


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; raises OSError."""
    kind = socket.SOCK_STREAM
    family, _, protocol, _, address = socket.getaddrinfo(host, port, type=kind)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:  # else a port stays taken for a minute after its server has ended
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def run(
    application: ASGIApp,
    listener: socket.socket,
    *,
    drain: Callable[[], Awaitable[None]],
    stop: Callable[[], None],
    on_ready: Callable[[], None],
    drain_s: float,
    read_timeout_s: float,
) -> int:
    """Serve until SIGINT or SIGTERM; returns the signal.

    Then `drain` refuses new requests and waits for the end of running ones, at most `drain_s`
    seconds; then connections are refused, and `stop` ends what still runs. A second signal calls
    it at once.
    """
    config = _Config(
        application,
        http=_Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=_MOST_HEADERS,
    )
    config.read_timeout_s = read_timeout_s
    server = _Server(config, drain=drain, stop=stop, on_ready=on_ready, drain_s=drain_s)
    server.run(sockets=[listener])
    return server.signal


class _Config(uvicorn.Config):
    """uvicorn's settings, and one for _Protocol."""

    read_timeout_s: float


class _Server(uvicorn.Server):
    """uvicorn's server, which ends in another way: see run()."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain: Callable[[], Awaitable[None]],
        stop: Callable[[], None],
        on_ready: Callable[[], None],
        drain_s: float,
    ) -> None:
        super().__init__(config)
        self._drain, self._stop, self._on_ready, self._drain_s = drain, stop, on_ready, drain_s
        self.signal = 0
        self._hurry = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end. (uvicorn's own method would raise the signal again afterwards.)"""
        self._hurry = self.should_exit
        seconds = _LAST_WORDS_S + _GRACE_S + (0 if self._hurry else self._drain_s)
        watchdog = threading.Timer(min(seconds, threading.TIMEOUT_MAX), os._exit, (128 + sig,))
        watchdog.daemon = True
        watchdog.start()
        self.signal = self.signal or sig
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers end, within limits."""
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + self._drain_s
        draining = asyncio.ensure_future(self._drain())
        while not draining.done() and self._is_patient(deadline):
            await asyncio.sleep(0.05)
        draining.cancel()
        ending = loop.create_task(self._end_answers(deadline))
        await super().shutdown(sockets)
        ending.cancel()

    def _is_patient(self, deadline: float) -> bool:
        return not self._hurry and time.monotonic() < deadline

    async def _end_answers(self, deadline: float) -> None:
        while self._is_patient(deadline):
            await asyncio.sleep(0.05)
        self._stop()
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # it does not read
        self.force_exit = True  # do not wait for what no client waits for


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with refusals in JSON, and a limit on how long it waits for headers."""

    config: _Config
    _header_timer: asyncio.TimerHandle | None = None
    _is_refused = False
    _idle_since = 0.0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for headers; where there are too many, the one idle longest ends."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._watch_headers()
        if len(self.connections) > _MOST_CONNECTIONS:
            others = [c for c in self.connections if isinstance(c, _Protocol) and c is not self]
            idle = [c for c in others if c.is_idle]
            if not idle:
                message = f"{_MOST_CONNECTIONS} connections are open already; try again later"
                error = RequestError(
                    message, status=503, code="too_many_connections", headers=RETRY
                )
                self._refuse(error)
                return
            min(idle, key=lambda c: c._idle_since).transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether it asks for nothing now, or has not yet said what it asks for."""
        return self.cycle is None or bool(self.cycle.response_complete or self.cycle.more_body)

    def on_response_complete(self) -> None:
        """Begin to be idle."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; nothing after a refusal."""
        if self._is_refused:
            return
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._header_timer is not None:
            self._header_timer.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End after what is being answered."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:  # it would come too late
            self.transport.close()

    def _watch_headers(self) -> None:
        """Start or stop the timer, which runs until the last header of a request has come."""
        waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not waiting and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif waiting and self._header_timer is None:
            self._header_timer = self.loop.call_later(
                self.config.read_timeout_s, self._headers_are_late
            )

    def _headers_are_late(self) -> None:
        self._header_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        if not self.conn.trailing_data[0]:
            self.transport.close()  # it never asked for anything
            return
        self._refuse(
            RequestError(
                f"the headers did not come within {self.config.read_timeout_s:g} seconds",
                status=408,
                code="too_slow",
            )
        )

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP."""
        if len(self.conn.trailing_data[0]) > _MOST_HEADERS:
            message = f"the headers are longer than {_MOST_HEADERS} bytes"
            self._refuse(RequestError(message, status=431, code="headers_too_long"))
        else:
            self._refuse(RequestError("this is not HTTP/1.1", code="invalid_http"))

    def _refuse(self, error: RequestError) -> None:
        """Answer without the application, and close the connection a moment later.

        Closing with unread bytes would reset the connection, and the answer would be lost.
        """
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # no answer of the application is sent
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in _whole_response(error):
                self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LAST_WORDS_S, self.transport.close)


def _whole_response(error: RequestError) -> Iterator[h11.Event]:
    body = json.dumps(error_json(error)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    yield h11.Response(status_code=error.status, headers=list(headers.items()))
    yield h11.Data(data=body)
    yield h11.EndOfMessage()
