"""Anthropic's /v1/messages, for text: a body to a chat, and its answer in that form."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from trimix_gguf.answering.request import Event
from trimix_gguf.server.calls import FunctionCall, new_id
from trimix_gguf.server.errors import RequestError, error_json
from trimix_gguf.server.fields import Fields
from trimix_gguf.server.messages import (
    Message,
    part_text,
    role_of,
    text_of,
    with_calls,
    with_system,
)
from trimix_gguf.server.openai import IGNORED, Call, seed_of, token_limit, with_tools
from trimix_gguf.server.replies import Choice, Reply, Said, sent_event
from trimix_gguf.server.settings import CallOptions, form_in, options_of, schema_of
from trimix_gguf.server.tools import anthropic_tools, result_text
from trimix_gguf.trio.trio import Trio

_PATH = "/v1/messages"
_REASONS = {"length": "max_tokens", "context": "model_context_window_exceeded"}


def parse_message(
    body: object, ignored: list[str] | None = None, *, is_counted: bool = False
) -> Call:
    """The body of /v1/messages as a chat, or of /v1/messages/count_tokens, which has no limit.

    Raises RequestError.
    """
    fields = Fields(body, ignored=ignored)
    messages = with_system(_system(fields), _messages(fields))
    options = options_of(fields, stop="stop_sequences")
    options.update(_form(fields))
    tools = anthropic_tools(fields)
    limit = token_limit(fields, "max_tokens")
    if limit is None and not is_counted:
        fields.wrong("max_tokens", None, "the most tokens of the answer")
    options["max_tokens"] = limit or 1
    fields.refuse("thinking", "the answer is all text", harmless=({"type": "disabled"},))
    for name in ("mcp_servers", "container"):
        fields.refuse(name, "the models read and write only text", harmless=([],))
    stream, model, seed = fields.boolean("stream"), fields.text("model"), seed_of(fields)
    fields.ignore("cache_control", "inference_geo", "context_management", "speed", "diagnostics")
    fields.ignore("betas", *IGNORED)
    fields.done()
    call = Call("chat", messages=messages, model=model, stream=stream, seed=seed, options=options)
    return with_tools(replace(call, schema_at="output_config.format.schema"), tools)


parse_counted = partial(parse_message, is_counted=True)


def _system(fields: Fields) -> str | None:
    value = fields.take("system")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        fields.wrong("system", value, "a string, or a list of text blocks")
    return "\n\n".join(
        text_of(fields.within({"content": [block]}, f"system[{i}]"), [block], ("text",))
        for i, block in enumerate(value)
    )


def _messages(fields: Fields) -> list[Message]:
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        fields.wrong("messages", value, "a list of messages, one at least")
    messages = [_message(fields.within(item, f"messages[{i}]")) for i, item in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise RequestError(
            "the last message is the assistant's, and an answer cannot go on from it; end with "
            "one of the user",
            param="messages",
            code="unsupported_parameter",
        )
    return messages


def _message(fields: Fields) -> Message:
    role, content = role_of(fields, ("user", "assistant")), fields.take("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        fields.wrong("content", content, "a string, or a list of blocks")
    plain, called = "", ""  # without and with the marks of what functions gave
    calls: list[tuple[str, str]] = []
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            calls.append(_call(fields.within(block, f"content[{i}]")))
        elif kind == "tool_result" and role == "user":
            text = _result(fields.within(block, f"content[{i}]"))
            plain, called = plain + text, f"{called}{result_text(text)}\n"
        elif kind not in ("thinking", "redacted_thinking") or role == "user":
            text = part_text(fields, i, block, ("text",))
            plain, called = plain + text, called + text
    fields.done()
    message = {"role": role, "content": plain}
    if calls:
        return with_calls(message, calls)
    return message if plain == called else {**message, "called": called.removesuffix("\n")}


def _call(fields: Fields) -> tuple[str, str]:
    """An earlier call: its name, and its arguments as JSON."""
    name, values = fields.text("name"), fields.take("input")
    if not name:
        fields.wrong("name", name, "a function's name")
    fields.ignore("type", "id", "cache_control", "caller")
    fields.done()
    return name, json.dumps({} if values is None else values, ensure_ascii=False)


def _result(fields: Fields) -> str:
    content = fields.take("content")
    if isinstance(content, list):
        content = text_of(fields, content, ("text",))
    if not isinstance(content, str | None):
        fields.wrong("content", content, "a string, or a list of text blocks")
    fields.ignore("type", "tool_use_id", "is_error", "cache_control")
    fields.done()
    return content or ""


def _form(fields: Fields) -> CallOptions:
    """{"format": {"type": "json_schema", "schema": …}} of the field `output_config`."""
    form = form_in(fields, "output_config", "effort")
    if form is None:
        return {}
    if form.one_of("type", ("json_schema",)) is None:
        form.wrong("type", None, "json_schema")
    return {"json_schema": schema_of(form)}


class MessageReply(Reply):
    """What a client of /v1/messages gets: blocks of text and calls, whole or in named events."""

    def __init__(self, call: Call, trio: Trio, **said: Unpack[Said]) -> None:
        super().__init__(call, trio, **said)
        self._id = new_id("msg")

    def _tell(self, index: int, event: Event, begins: bool) -> Iterator[dict[str, Any]]:
        choice, n_blocks = self.choices[index], 1
        if begins:
            message = {**self._message(choice), "content": [], "trimix": self.mix(choice)}
            message |= {"stop_reason": None, "stop_sequence": None}
            yield {"type": "message_start", "message": message}
            forced = self._call.function is not None
            block = _tool_use(choice.calls[0]) | {"input": {}} if forced else _text("")
            yield {"type": "content_block_start", "index": 0, "content_block": block}
            yield {"type": "ping"}
        extension = self.extension(choice, event.tokens)
        if choice.shown or extension.get("tokens"):
            delta = {"type": "text_delta", "text": choice.shown}
            if self._call.function is not None:
                delta = {"type": "input_json_delta", "partial_json": choice.shown}
            told = {"type": "content_block_delta", "index": 0, "delta": delta}
            yield {**told, "trimix": extension} if extension else told
        if event.finish_reason is None:
            return
        yield {"type": "content_block_stop", "index": 0}
        for n_blocks, call in enumerate(() if self._call.function else choice.calls, 1):
            block = {"index": n_blocks, "content_block": _tool_use(call) | {"input": {}}}
            yield {"type": "content_block_start", **block}
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            yield {"type": "content_block_delta", "index": n_blocks, "delta": delta}
            yield {"type": "content_block_stop", "index": n_blocks}
        end = self._message(choice)
        delta = {name: end[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": end["usage"]}
        yield {"type": "message_stop"}

    def body(self) -> dict[str, Any]:
        """The whole message."""
        choice = self.choices[0]
        said = {**self.mix(choice), **self.extension(choice, choice.tokens)}
        return {**self._message(choice), "trimix": said}

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """An event as it is sent: with its name."""
        return sent_event(chunk, chunk["type"])

    def ending(self) -> bytes:
        """Nothing: the last event tells the end."""
        return b""

    def failure(self, error: RequestError) -> bytes:
        """The event that ends a stream which fails."""
        return self.encode(error_json(error, _PATH))

    def _message(self, choice: Choice) -> dict[str, Any]:
        blocks = [_tool_use(call) for call in choice.calls]
        if self._call.function is None and (choice.text or not blocks):
            blocks = [_text(choice.text), *blocks]
        reason, stopped = self._end(choice)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._head["model"],
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": stopped,
            "usage": self._message_usage(),
        }

    def _end(self, choice: Choice) -> tuple[str, str | None]:
        """The reason of an end, and the client's stop string that came."""
        newest = choice.newest
        if newest.finish_reason in _REASONS:
            return _REASONS[newest.finish_reason], None
        if choice.calls:
            return "tool_use", None
        if newest.stopped in self._call.options.get("stop", ()):
            return "stop_sequence", newest.stopped
        return "end_turn", None

    def _message_usage(self) -> dict[str, Any]:
        usage = self.usage()
        n_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - n_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": n_cached,
            "output_tokens": usage["completion_tokens"],
        }


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _tool_use(call: FunctionCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": call.values}
