"""Who may use the server: the key, a browser's Host and Origin, and pages of other origins."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimix_gguf.server.clients import Network
from trimix_gguf.server.errors import RequestError, error_response
from trimix_gguf.server.keys import Keys
from trimix_gguf.server.records import IGNORED, record_of

_OPEN = ("/", "/health")  # the page asks for the key itself; a watchdog has none


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """Who may ask: see Guard. `keys` None is everyone; `proxies` may say whom they ask for."""

    local: bool = True
    keys: Keys | None = None
    cors: Sequence[str] = ()
    hosts: Sequence[str] = ()
    proxies: Sequence[Network] = ()


class Guard:
    """ASGI middleware that refuses with 401 or 403, and tells browsers what `cors` allows.

    With `local`, a Host that is neither this machine's nor one of `hosts` is refused: else a web
    page whose name leads here (DNS rebinding) would count as ours. A page of another origin is
    refused unless `cors` or `hosts` name it, as it could make the machine work even if it cannot
    read the answer. Behind a proxy its origin is the proxy's name, and Host often another.
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app, self._local, self._cors = app, access.local, access.cors
        self._keys, self._hosts = access.keys, frozenset(access.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        shared = origin is not None and self._is_allowed(origin)

        async def tell(message: Message) -> None:
            if shared and message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                own["Access-Control-Allow-Origin"] = origin or ""
                own["Access-Control-Expose-Headers"] = f"Retry-After, {IGNORED}"
                own.add_vary_header("Origin")
            await send(message)

        try:
            self._check_browser(headers, shared)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, tell)
                return
            if scope["path"] not in _OPEN:
                record_of(scope).key = self._check_key(headers)
        except RequestError as error:
            await error_response(error, scope["path"])(scope, receive, tell)
        else:
            await self._app(scope, receive, tell)

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._cors or origin in self._cors

    def _check_browser(self, headers: Headers, shared: bool) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._local and host and not self._is_here(host):
            raise RequestError(
                f"this server answers to localhost, not to {host[:80]!r}; --allowed-host adds a "
                "name",
                status=403,
                code="host_not_allowed",
                is_read=False,
            )
        asking = (origin or "").partition("://")[2]
        ours = asking == host or _name_of(asking) in self._hosts
        if origin is not None and not shared and not ours:
            raise RequestError(
                f"pages of {origin[:80]!r} may not use this server; --cors allows an origin",
                status=403,
                code="origin_not_allowed",
                is_read=False,
            )

    def _is_here(self, host: str) -> bool:
        name = _name_of(host)
        return is_loopback(name) or name in self._hosts

    def _check_key(self, headers: Headers) -> str:
        """The name of the key's holder."""
        if self._keys is None:
            return "-"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")  # as Anthropic's clients send it
        name = self._keys.name_of(key.strip().encode("latin-1", "replace"))
        if name is None:
            raise RequestError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as "
                "X-Api-Key: KEY",
                status=401,
                code="invalid_api_key",
                is_read=False,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name


def _preflight(headers: Headers) -> Response:
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", ""),
            "Access-Control-Max-Age": "600",
        },
    )


def _name_of(host: str) -> str:
    """The Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".").lower()
