"""A file of requests, one on each line, and the lines of their answers.

A line is a body of the server's /v1/completions or /v1/chat/completions with an `id`, or a line of
OpenAI's batches: {"custom_id", "method": "POST", "url", "body"}.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from trimix_gguf.errors import DataError
from trimix_gguf.machine import typed_json
from trimix_gguf.server.bodies import check_values
from trimix_gguf.server.errors import RequestError, error_json
from trimix_gguf.server.fields import Fields
from trimix_gguf.server.openai import Call, parse_chat, parse_completion

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_OF_A_BATCH = {"method", "url", "body"}  # what only a line of OpenAI's batches has


@dataclass(frozen=True)
class Line:
    """A line with its number in the file, from 1; either what it asks for, or what is wrong."""

    number: int
    id: str | int
    of_a_batch: bool = False
    call: Call | None = None
    error: RequestError | None = None

    @property
    def n_answers(self) -> int:
        """How many answers it asks for; one where it is wrong."""
        return 1 if self.call is None else self.call.n * max(1, len(self.call.prompts))

    @property
    def beginning(self) -> str:
        """Sorted by it, lines that share a long prefix stand next to each other."""
        if self.call is None:
            return ""
        if self.call.kind == "chat":
            return "\n".join(f"{m['role']}\n{m['content']}" for m in self.call.messages)
        first = self.call.prompts[0]
        return first if isinstance(first, str) else " ".join(map(str, first))


def read_lines(raw: Iterable[bytes]) -> tuple[list[Line], str]:
    """The lines that are not empty, and the SHA-256 of all; raises DataError for an id twice."""
    digest, lines, seen = hashlib.sha256(), [], dict[str, int]()
    for number, text in enumerate(raw, 1):
        digest.update(text)
        text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
        if not text.strip():
            continue
        line = _read(number, text)
        other = seen.setdefault(str(line.id), number)
        if other != number:
            raise DataError(
                f"lines {other} and {number} have the same id {line.id!r}; give each its own"
            )
        lines.append(line)
    return lines, digest.hexdigest()


def _read(number: int, text: bytes) -> Line:
    line = Line(number, number)
    try:
        value = _json(text)
        line = replace(line, of_a_batch=bool(_OF_A_BATCH & value.keys()))
        given = [name for name in ("id", "custom_id") if value.get(name) is not None]
        if len(given) > 1:
            raise RequestError("give id or custom_id, not both", param="id")
        if given:
            line = replace(line, id=_id(value[given[0]], given[0]))
        value = {name: v for name, v in value.items() if name not in ("id", "custom_id")}
        return replace(line, call=_batch_call(value) if line.of_a_batch else _call(value))
    except RequestError as error:
        return replace(line, error=error)


def _json(text: bytes) -> dict[str, Any]:
    """The object on a line, as strict as the server's parse_json."""
    try:
        value: dict[str, Any] = typed_json.parse(text.decode(), {})
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise RequestError(f"not a JSON object: {error}") from None
    check_values(value)
    return value


def _id(value: object, name: str) -> str | int:
    if (isinstance(value, str) and value) or type(value) is int:
        return value
    raise RequestError(f"{name} is not a text or a whole number", param=name)


def _batch_call(value: dict[str, Any]) -> Call:
    fields = Fields(value)
    if fields.one_of("method", ("POST",)) is None:
        fields.wrong("method", None, "POST")
    url = fields.one_of("url", (_CHAT, _COMPLETION))
    if url is None:
        fields.wrong("url", None, f"{_CHAT} or {_COMPLETION}")
    body = fields.take("body")
    fields.done()
    return _whole(parse_chat(body) if url == _CHAT else parse_completion(body))


def _call(value: dict[str, Any]) -> Call:
    return _whole(parse_chat(value) if "messages" in value else parse_completion(value))


def _whole(call: Call) -> Call:
    if call.stream:
        raise RequestError("stream is for the server; leave it out", param="stream")
    return call


# -- answers --------------------------------------------------------------------------------


def answer_text(line: Line, body: dict[str, Any]) -> str:
    """The line of an answer; `body` is the server's. What would differ in the next run is fixed."""
    kind, _, _ = body["id"].partition("-")
    usage = {k: v for k, v in body["usage"].items() if k != "prompt_tokens_details"}
    body = {**body, "id": f"{kind}-{line.id}", "created": 0, "usage": usage}
    if line.of_a_batch:
        response = {"status_code": 200, "body": body}
        return _text({**_batch_head(line), "response": response, "error": None})
    return _text({"id": line.id, "response": body})


def error_text(line: Line, error: RequestError) -> str:
    """The line of a request that is wrong."""
    told = error_json(error)["error"]
    if line.of_a_batch:
        return _text({**_batch_head(line), "response": None, "error": told})
    return _text({"id": line.id, "error": told})


def _batch_head(line: Line) -> dict[str, Any]:
    return {"id": f"batch_req_{line.id}", "custom_id": line.id}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
