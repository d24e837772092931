"""The error object of each API, for requests that are refused or fail."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trimix_gguf.errors import (
    PromptError,
    QueueFull,
    SamplerError,
    SchemaError,
    TrimixError,
    WeightsError,
)

_LINGER_S = 2.0  # how long a client's bytes are read and dropped
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Anthropic's names; other statuses are invalid_request_error, or api_error from 500 on.
_ANTHROPIC_TYPES = {
    **_TYPES,
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}
RETRY = {"Retry-After": "5"}  # seconds
INVALID_SCHEMA = "invalid_schema"


class RequestError(TrimixError):
    """A request that is refused: HTTP `status`, the wrong field `param`, and a `code`.

    `is_read` says whether its whole body has come.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        is_read: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.is_read = status, param, code, is_read
        self.headers = dict(headers or {})


def as_request_error(error: TrimixError) -> RequestError:
    """An error of the engine, with the HTTP status that says whose fault it is."""
    if isinstance(error, RequestError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, QueueFull):
        return RequestError(text, status=429, code="queue_full", headers=RETRY)
    if isinstance(error, PromptError):
        return RequestError(text, code="invalid_prompt")
    if isinstance(error, SchemaError):
        return RequestError(text, code=INVALID_SCHEMA)
    if isinstance(error, SamplerError | WeightsError):
        return RequestError(text, code="invalid_value")
    return RequestError(text, status=500, code="engine_error")


def error_json(error: RequestError, path: str = "") -> dict[str, Any]:
    """{"error": {message, type, param, code}}; for a path of another API, as that API has it."""
    if path.startswith("/api/"):  # Ollama
        return {"error": str(error)}
    ours = error.status >= 500
    if path.startswith("/v1/messages"):
        kind = "api_error" if ours else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(error.status, kind)
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    kind = _TYPES.get(error.status, "server_error" if ours else "invalid_request_error")
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def error_response(error: RequestError, path: str = "") -> Response:
    """The response to a request for a path that is refused."""
    kind = Response if error.is_read else _LastWords
    headers = dict(error.headers)
    if error.status in (408, 413):  # the rest is not waited for
        headers["Connection"] = "close"
    return kind(
        json.dumps(error_json(error, path), ensure_ascii=False),
        status_code=error.status,
        headers=headers,
        media_type="application/json",
    )


class _LastWords(Response):
    """A response while the client still sends.

    What it sends is read and dropped for a moment: closing with unread bytes would reset the
    connection, and the client would not see why.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                more = True
                while more:
                    message = await receive()
                    more = message["type"] == "http.request" and message["more_body"]
        await send({"type": "http.response.body", "body": b""})
