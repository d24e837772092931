"""What is known of one HTTP request: who asks, what comes of it, and a line that says so."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimix_gguf.server.clients import Network, client_of
from trimix_gguf.server.log import Log
from trimix_gguf.server.metrics import Metrics

IGNORED = "X-Trimix-Ignored"
_MOST_IGNORED = 16  # names that are told
_QUIET = ("/health", "/metrics")  # programs ask for these all day


@dataclass
class Record:
    """One request: its client's address, the name of its key, its tokens, fields not used.

    `began` is when it came, by time.perf_counter().
    """

    client: str = "-"
    key: str = "-"
    n_prompt: int = 0
    n_tokens: int = 0
    ignored: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @property
    def holder(self) -> str:
        """Who asks: the key's holder, or whoever is at an address."""
        return self.client if self.key == "-" else f"key {self.key}"

    @property
    def ignored_text(self) -> str:
        """The fields that were not used: visible ASCII, of a limited length."""
        names = [re.sub(r"[^\w.\[\]-]", "?", n, flags=re.A)[:64] for n in self.ignored]
        names = list(dict.fromkeys(names[: _MOST_IGNORED + 1]))
        more = [f"and {len(self.ignored) - _MOST_IGNORED} more"]
        return ", ".join(names if len(names) <= _MOST_IGNORED else names[:_MOST_IGNORED] + more)


def record_of(scope: Scope) -> Record:
    """The record of a request that came through Recorded."""
    found: Record = scope["trimix"]
    return found


class Recorded:
    """An ASGI application that keeps a record of each request to another.

    It counts the responses in `metrics`, by path (one of `paths`) and status, and writes a line of
    each to `log`. Paths lose a slash at their end. `proxies` may say whom they ask for.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Sequence[str],
        log: Log | None,
        proxies: Sequence[Network],
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._log, self._proxies = log, proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, status = Record(client_of(scope, self._proxies)), 0
        path = scope["path"]
        path = path[:-1] if path.endswith("/") and len(path) > 1 else path

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                known = path if path in self._paths else "other"
                self._metrics.count_response(known, status)
                if record.ignored:
                    MutableHeaders(scope=message)[IGNORED] = record.ignored_text
            await send(message)

        try:
            await self._app({**scope, "path": path, "trimix": record}, receive, tell)
        finally:
            self._metrics.count_tokens(record.key, record.n_prompt, record.n_tokens)
            if self._log is not None and not (path in _QUIET and status == 200):
                ms = round(1000 * (time.perf_counter() - record.began))
                self._log.write(_line(record, scope["method"], path, status, ms))


def _line(record: Record, method: str, path: str, status: int, ms: int) -> str:
    """No control characters, as none of it can hold any, and no text of a prompt."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    what = f"{now} {record.client} {record.key} {quote(method)} {quote(path[:200])} {status}"
    line = f"{what} {ms} ms {record.n_prompt}+{record.n_tokens} tokens"
    return f"{line} ignored: {record.ignored_text}" if record.ignored else line
