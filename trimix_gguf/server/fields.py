"""JSON from clients: a body within limits, whose fields are taken out one by one, by type."""

import asyncio
import json
import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from trimix_gguf.server.errors import RequestError

MOST_NESTED = 64


async def read_json(request: Request, *, most_bytes: int, timeout_s: float) -> Any:
    """A request's body, parsed; raises RequestError, also where it is too long or too slow.

    At most `most_bytes` of it are kept at any time.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(
            "the body is compressed; send it uncompressed", status=415, is_read=False
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
    return parse_json(bytes(body))


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


def describe(value: Any) -> str:
    """A value as it was sent, cut short, for an error's message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Fields:
    """An object's fields: each is taken once, null counts as absent, and the rest is unknown.

    `at` is the object's place in the body, for messages. Every method raises RequestError.
    """

    def __init__(self, value: Any, at: str = "") -> None:
        if not isinstance(value, dict):
            raise RequestError(
                f"{at or 'the body'} is {describe(value)}; expected a JSON object",
                param=at or None,
                code="invalid_type",
            )
        self._left = dict(value)
        self._at = f"{at}." if at else ""
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """The value, of any type; None where it is absent."""
        self._known.append(name)
        return self._left.pop(name, None)

    def integer(self, name: str, low: int, high: int, *, but: Sequence[int] = ()) -> int | None:
        """An integer within limits, `but` for some; None where it is absent."""
        value = self.take(name)
        if value is None or (type(value) is int and low <= value <= high and value not in but):
            return value
        without = "".join(f", but not {n}" for n in but)
        self.wrong(name, value, f"an integer from {low} to {high}{without}")

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number within limits, as float; None where it is absent."""
        value = self.take(name)
        if value is None or (type(value) in (int, float) and low <= value <= high):
            return None if value is None else float(value)
        self.wrong(name, value, f"a number from {low:g} to {high:g}")

    def boolean(self, name: str) -> bool:
        """true or false; false where it is absent."""
        value = self.take(name)
        if value is None or type(value) is bool:
            return bool(value)
        self.wrong(name, value, "true or false")

    def text(self, name: str) -> str | None:
        """A string; None where it is absent."""
        value = self.take(name)
        if value is None or isinstance(value, str):
            return value
        self.wrong(name, value, "a string")

    def one_of(self, name: str, choices: Sequence[str]) -> str | None:
        """One of some strings; None where it is absent."""
        value = self.take(name)
        if value is None or (isinstance(value, str) and value in choices):
            return value
        self.wrong(name, value, f"one of {', '.join(choices)}")

    def ignore(self, *names: str) -> None:
        """Take these out, whatever their values: they change nothing here."""
        for name in names:
            self.take(name)

    def refuse(self, name: str, why: str, *, harmless: Sequence[Any] = ()) -> None:
        """Raise where a field asks for what the server does not have; `harmless` values do not."""
        value = self.take(name)
        if value is not None and value not in harmless:
            raise RequestError(
                f"{self._at}{name} is not supported: {why}",
                param=f"{self._at}{name}",
                code="unsupported_parameter",
            )

    def wrong(self, name: str, value: Any, expected: str) -> NoReturn:
        """Raise, saying what was expected."""
        raise RequestError(
            f"{self._at}{name} is {describe(value)}; expected {expected}",
            param=f"{self._at}{name}",
            code="invalid_value",
        )

    def done(self) -> None:
        """Raise for the first field that was not taken."""
        for name in self._left:
            near = get_close_matches(name[:80], self._known, n=1)
            raise RequestError(
                f"unknown field {describe(self._at + name)}"
                + (f"; did you mean {near[0]!r}?" if near else "; leave it out"),
                param=f"{self._at}{name}"[:80],
                code="unknown_parameter",
            )
