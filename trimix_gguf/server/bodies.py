"""Request bodies: JSON within limits, plain or packed by gzip."""

import asyncio
import json
import math
import zlib
from typing import Any

from starlette.requests import ClientDisconnect, Request

from trimix_gguf.server.errors import RequestError

MOST_NESTED = 64
_GZIP = 16 + zlib.MAX_WBITS  # zlib's name for the format


async def read_json(request: Request, *, most_bytes: int, timeout_s: float) -> Any:
    """A request's body, parsed; raises RequestError, also where it is too long or too slow.

    At most `most_bytes` of it are kept at any time, packed or unpacked.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise RequestError(
            f"the body's encoding is {encoding[:40]!r}; send it plain, or packed by gzip",
            status=415,
            code="unsupported_encoding",
            is_read=False,
        )
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > most_bytes:
        raise _too_long(most_bytes, is_read=False)
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(timeout_s):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message["body"]
                more = message["more_body"]
                if len(body) > most_bytes:
                    raise _too_long(most_bytes, is_read=not more)
    except TimeoutError:
        raise RequestError(
            f"the body did not come within {timeout_s:g} seconds",
            status=408,
            code="too_slow",
            is_read=False,
        ) from None
    return parse_json(bytes(body) if encoding == "identity" else _unpack(bytes(body), most_bytes))


def _unpack(packed: bytes, most_bytes: int) -> bytes:
    """What gzip packed, never more than `most_bytes` and one of it; raises RequestError."""
    unpacker = zlib.decompressobj(_GZIP)
    try:
        body = unpacker.decompress(packed, most_bytes + 1)
    except zlib.error:
        raise _not_gzip() from None
    if len(body) > most_bytes:
        raise _too_long(most_bytes, is_read=True)
    if not unpacker.eof or unpacker.unused_data:
        raise _not_gzip()
    return body


def _not_gzip() -> RequestError:
    return RequestError("the body is not one whole gzip file, as its Content-Encoding says")


def _too_long(most_bytes: int, *, is_read: bool) -> RequestError:
    return RequestError(
        f"the body is longer than {most_bytes} bytes; shorten it or raise --body-limit",
        status=413,
        code="body_too_long",
        is_read=is_read,
    )


def parse_json(raw: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no lone surrogates, no more than MOST_NESTED levels."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise RequestError(f"the body is nested more than {MOST_NESTED} levels deep") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    check_values(value)
    return value


def check_values(value: Any) -> None:
    """Raise RequestError for what Python's json takes and JSON, UTF-8 or MOST_NESTED does not."""
    level = [value]
    for _ in range(MOST_NESTED + 1):  # and what the innermost holds
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += item.keys()
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise RequestError("there is NaN, or a number too large for a float64")
            elif isinstance(item, str) and not _is_text(item):
                raise RequestError("there is half of a surrogate pair, which is not a character")
        level = deeper
    if level:
        raise RequestError(f"it is nested more than {MOST_NESTED} levels deep")


def _is_text(item: str) -> bool:
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
