"""An object's fields, taken out one by one, by type."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from trimix_gguf.server.errors import RequestError


def describe(value: Any) -> str:
    """A value as it was sent, cut short, for an error's message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Fields:
    """An object's fields: each is taken once, null counts as absent, and the rest is unknown.

    `at` is the object's place in the body, for messages. The names of fields that are not used go
    to `ignored`; without that list they are refused. Every method raises RequestError.
    """

    def __init__(self, value: Any, at: str = "", *, ignored: list[str] | None = None) -> None:
        if not isinstance(value, dict):
            raise RequestError(
                f"{at or 'the body'} is {describe(value)}; expected a JSON object",
                param=at or None,
                code="invalid_type",
            )
        self._left = dict(value)
        self._at = f"{at}." if at else ""
        self._known: list[str] = []
        self._ignored = ignored

    def within(self, value: Any, name: str) -> "Fields":
        """The fields of an object inside this one."""
        return Fields(value, self.place(name), ignored=self._ignored)

    def place(self, name: str) -> str:
        """A field's place in the body, for messages."""
        return f"{self._at}{name}"

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

    def boolean(self, name: str, *, absent: bool = False) -> bool:
        """true or false; `absent` where it is absent."""
        value = self.take(name)
        if value is None:
            return absent
        if type(value) is bool:
            return value
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
            raise self._unsupported(name, why)

    def leave_out(self, name: str, why: str, *, harmless: Sequence[Any] = ()) -> None:
        """Ignore what the server does not have, and say so; where nothing is ignored, refuse it."""
        value = self.take(name)
        if value is not None and value not in harmless:
            self.left_out(name, why)

    def left_out(self, name: str, why: str) -> None:
        """Say that a field which was taken is not used; where nothing is ignored, refuse it."""
        if self._ignored is None:
            raise self._unsupported(name, why)
        self._ignored.append(self.place(name))

    def _unsupported(self, name: str, why: str) -> RequestError:
        return RequestError(
            f"{self.place(name)} is not supported: {why}",
            param=self.place(name),
            code="unsupported_parameter",
        )

    def wrong(self, name: str, value: Any, expected: str) -> NoReturn:
        """Raise, saying what was expected."""
        raise RequestError(
            f"{self.place(name)} is {describe(value)}; expected {expected}",
            param=self.place(name),
            code="invalid_value",
        )

    def done(self) -> None:
        """Ignore the fields that were not taken; raise for the first where nothing is ignored."""
        if self._ignored is not None:
            left = (name for name, value in self._left.items() if value is not None)
            self._ignored += [self.place(name) for name in left]
            return
        for name in self._left:
            near = get_close_matches(name[:80], self._known, n=1)
            raise RequestError(
                f"unknown field {describe(self.place(name))}"
                + (f"; did you mean {near[0]!r}?" if near else "; leave it out"),
                param=self.place(name)[:80],
                code="unknown_parameter",
            )
