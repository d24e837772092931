"""OpenAI's /v1/responses, for text: a body to a chat, and its answer in the form of that route."""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

from trimix_gguf.answering.request import Event
from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields
from trimix_gguf.server.messages import Message, plain_role, role_of, text_of, with_system
from trimix_gguf.server.openai import IGNORED, Call, seed_of, token_limit
from trimix_gguf.server.replies import Reply, Said, sent_event
from trimix_gguf.server.settings import (
    JSON_OBJECT,
    CallOptions,
    form_in,
    form_kind,
    options_of,
    schema_of,
)
from trimix_gguf.trio.trio import Trio

_STATELESS = "the server keeps no answers; send the whole conversation as input"
_PARTS = ("input_text", "output_text", "text")


def parse_response(body: object, ignored: list[str] | None = None) -> Call:
    """The body of /v1/responses as a chat; raises RequestError."""
    fields = Fields(body, ignored=ignored)
    messages = with_system(fields.text("instructions"), _input(fields))
    options = options_of(fields)
    options.update(_form(fields))
    limit = token_limit(fields, "max_output_tokens")
    if limit is not None:
        options["max_tokens"] = limit
    for name in ("previous_response_id", "conversation"):
        fields.refuse(name, _STATELESS)
    fields.refuse("background", "the answer comes with the request", harmless=(False,))
    fields.refuse("truncation", "shorten the input", harmless=("disabled",))
    fields.refuse("prompt", "there are no stored prompts; send input")
    fields.refuse("top_logprobs", "/v1/chat/completions has logprobs", harmless=(0,))
    fields.refuse("tool_choice", "/v1/chat/completions has it", harmless=("none", "auto"))
    fields.leave_out("tools", "/v1/chat/completions has those that must be called", harmless=([],))
    stream, model, seed = fields.boolean("stream"), fields.text("model"), seed_of(fields)
    fields.ignore("reasoning", "stream_options", "max_tool_calls", *IGNORED)
    fields.done()
    call = Call("chat", messages=messages, model=model, stream=stream, options=options)
    return replace(call, seed=seed, schema_at="text.format.schema")


def _input(fields: Fields) -> list[Message]:
    value = fields.take("input")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        fields.wrong("input", value, "a string, or a list of messages, one at least")
    return [_message(fields.within(item, f"input[{i}]")) for i, item in enumerate(value)]


def _message(fields: Fields) -> Message:
    kind = fields.take("type")
    if kind not in (None, "message"):
        raise RequestError(
            f"{fields.place('type')} is {str(kind)[:40]!r}; the models read only messages",
            param=fields.place("type"),
            code="unsupported_parameter",
        )
    role, content = role_of(fields), fields.take("content")
    if isinstance(content, list):
        content = text_of(fields, content, _PARTS)
    if not isinstance(content, str):
        fields.wrong("content", content, "a string, or a list of text parts")
    fields.ignore("id", "status")
    fields.done()
    return {"role": plain_role(role), "content": content}


def _form(fields: Fields) -> CallOptions:
    """{"format": {"type": …}} of the field `text`."""
    form = form_in(fields, "text", "verbosity")
    if form is None:
        return {}
    kind = form_kind(form)
    if kind == "json_schema":
        return {"json_schema": schema_of(form)}
    form.done()
    return {"json_schema": JSON_OBJECT} if kind == "json_object" else {}


class ResponseReply(Reply):
    """What a client of /v1/responses gets: one message, whole or in events with names."""

    def __init__(self, call: Call, trio: Trio, **said: Unpack[Said]) -> None:
        super().__init__(call, trio, **said)
        self._max_tokens = call.options.get("max_tokens")
        self._id, self._item_id = (f"{kind}_{secrets.token_hex(16)}" for kind in ("resp", "msg"))
        self._n_sent = 0

    def _tell(self, index: int, event: Event, begins: bool) -> Iterator[dict[str, Any]]:
        choice = self.choices[index]
        if begins:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
            item = {**self._item("in_progress"), "content": []}
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._part("response.content_part.added", part=_text(""))
        if event.text:
            yield self._part("response.output_text.delta", delta=event.text, logprobs=[])
        if event.finish_reason is not None:
            status = self._status()
            yield self._part("response.output_text.done", text=choice.text, logprobs=[])
            yield self._part("response.content_part.done", part=_text(choice.text))
            item = self._item(status)
            yield self._event("response.output_item.done", output_index=0, item=item)
            yield self._event(f"response.{status}", response=self._response(status))

    def body(self) -> dict[str, Any]:
        """The whole response."""
        return self._response(self._status())

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """An event as it is sent: with its name."""
        return sent_event(chunk, chunk["type"])

    def ending(self) -> bytes:
        """Nothing: the last event tells the end."""
        return b""

    def failure(self, error: RequestError) -> bytes:
        """The event that ends a stream which fails."""
        said = {"code": error.code, "message": str(error), "param": error.param}
        return self.encode(self._event("error", **said))

    def _event(self, kind: str, **said: object) -> dict[str, Any]:
        self._n_sent += 1
        return {"type": kind, "sequence_number": self._n_sent - 1, **said}

    def _part(self, kind: str, **said: object) -> dict[str, Any]:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **said)

    def _status(self) -> str:
        reason = self.choices[0].newest.finish_reason
        return "completed" if reason == "stop" else "incomplete"

    def _item(self, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_text(self.choices[0].text)],
        }

    def _response(self, status: str) -> dict[str, Any]:
        begun = status == "in_progress"
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        choice = self.choices[0]
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._head["created"],
            "status": status,
            "model": self._head["model"],
            "output": [] if begun else [self._item(status)],
            "usage": None if begun else self._response_usage(),
            "error": None,
            "incomplete_details": cut,
            "instructions": None,
            "max_output_tokens": self._max_tokens,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "temperature": self._call.options.get("temperature"),
            "top_p": self._call.options.get("top_p"),
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "trimix": {
                **self.mix(choice),
                **self.extension(choice, () if begun else choice.tokens),
            },
        }

    def _response_usage(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
