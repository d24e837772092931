"""Function calls in an answer: one that had to be, or those that a model wrote into its text."""

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from trimix_gguf.answering.answer import overlap
from trimix_gguf.server.bodies import parse_json
from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.tools import CLOSES, OPENS

_CALL = re.compile(rf"{OPENS}(.*?){CLOSES}", re.S)


@dataclass(frozen=True)
class FunctionCall:
    """A call: `arguments` is JSON, or the beginning of it where the answer was cut off."""

    name: str
    arguments: str
    id: str

    @property
    def values(self) -> object:
        """The arguments; none where they were cut off."""
        try:
            values: object = parse_json(self.arguments.encode())
        except RequestError:
            return {}
        return values


def new_id(kind: str) -> str:
    """An id that nothing else has."""
    return f"{kind}_{secrets.token_hex(12)}"


class CallFinder:
    """The text of an answer, and the calls at its end: <tool_call>{…}</tool_call>, once or more.

    Text is held back from where a call may begin. Where it is not one of a function in `names`, it
    is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held = names, ""
        self.calls: list[FunctionCall] = []

    def push(self, text: str, *, ends: bool) -> str:
        """The text that is certain after some more; `ends` says that nothing more comes."""
        self._held += text
        at = self._held.find(OPENS)
        if at < 0:
            at = len(self._held) - overlap(self._held, OPENS)
        if ends:
            self.calls = self._calls_in(self._held[at:])
            at = at if self.calls else len(self._held)
        if self.calls or not ends:
            at = len(self._held[:at].rstrip())  # the space before a call is not text
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def _calls_in(self, text: str) -> list[FunctionCall]:
        # The end first: to search it for each call that does not end costs the square.
        if not text.rstrip().endswith(CLOSES) or _CALL.sub("", text).strip():
            return []
        calls = [self._call(found) for found in _CALL.findall(text)]
        return [] if None in calls else [call for call in calls if call is not None]

    def _call(self, text: str) -> FunctionCall | None:
        try:
            value = parse_json(text.encode())
        except RequestError:
            return None
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get("arguments")
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return FunctionCall(name, json.dumps(arguments, ensure_ascii=False), new_id("call"))
