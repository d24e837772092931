"""The messages of a chat, as clients send them, to those that the models read."""

import json
from collections.abc import Sequence

from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields, describe
from trimix_gguf.server.tools import call_text, result_text

# role, content; perhaps reasoning_content, and `called`: the content as a chat template writes it
# that has a section for tools.
Message = dict[str, str]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def messages_of(fields: Fields) -> tuple[Message, ...]:
    """The field `messages`; raises RequestError."""
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        fields.wrong("messages", value, "a list of messages, one at least")
    messages: list[Message] = []
    called = False  # only then may a tool's result come
    for i, item in enumerate(value):
        message = fields.within(item, f"messages[{i}]")
        called |= isinstance(item, dict) and bool(item.get("tool_calls"))
        messages.append(_message(message, [*_ROLES, *(["tool"] if called else [])]))
    return tuple(messages)


def _message(fields: Fields, roles: Sequence[str]) -> Message:
    role = role_of(fields, roles)
    content = fields.take("content")
    if isinstance(content, list):
        content = text_of(fields, content, ("text",))
    if content is None and role == "assistant":  # as clients send an answer without text
        content = ""
    if not isinstance(content, str):
        fields.wrong("content", content, "a string, or a list of text parts")
    reasoning = fields.text("reasoning_content")
    calls = _calls(fields) if role == "assistant" else []
    for name in ("tool_calls", "function_call", "audio", "images"):
        fields.refuse(name, "the models read only text", harmless=([],))
    fields.ignore("name", "refusal", "annotations", "cache_control", "tool_call_id", "tool_name")
    fields.done()
    message = {"role": _ROLES.get(role, "user"), "content": content}
    if calls:
        message = with_calls(message, calls)
    elif role == "tool":
        message["called"] = result_text(content)
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def with_calls(message: Message, calls: Sequence[tuple[str, str]]) -> Message:
    """An assistant's message that also called functions: (name, arguments as JSON)."""
    plain = "\n".join(arguments for _, arguments in calls)
    written = "\n".join(call_text(name, arguments) for name, arguments in calls)
    text = message["content"]
    called = f"{text}\n{written}" if text else written
    return {**message, "content": text + plain, "called": called}


def as_read(messages: Sequence[Message], *, with_calls: bool) -> list[Message]:
    """Messages for the chat template; `with_calls` where it is offered tools."""
    read: list[Message] = []
    results = False  # whether the last one holds only those of functions
    for message in messages:
        message = dict(message)
        called = message.pop("called", None)
        if called is not None and with_calls:
            message["content"] = called
        is_result = called is not None and message["role"] == "user"
        if is_result and results and with_calls:  # templates put them into one turn
            read[-1]["content"] += "\n" + message["content"]
        else:
            read.append(message)
        results = is_result
    return read


def with_system(system: str | None, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages after a system's text; templates take one message of it, at the beginning."""
    if not system:
        return tuple(messages)
    if messages[0]["role"] == "system":
        first, *messages = messages
        system = f"{system}\n\n{first['content']}"
    return ({"role": "system", "content": system}, *messages)


def role_of(fields: Fields, roles: Sequence[str] = tuple(_ROLES)) -> str:
    """The role of a message, as it was sent."""
    role = fields.one_of("role", roles)
    if role is None:
        fields.wrong("role", None, f"one of {', '.join(roles)}")
    return role


def plain_role(role: str) -> str:
    """A role as the chat template knows it."""
    return _ROLES[role]


def _calls(fields: Fields) -> list[tuple[str, str]]:
    """Earlier function calls: their names, and the arguments that the models wrote."""
    value = fields.take("tool_calls")
    if not isinstance(value, list | None):
        fields.wrong("tool_calls", value, "a list of calls")
    calls = []
    for i, item in enumerate(value or []):
        call = fields.within(item, f"tool_calls[{i}]")
        call.one_of("type", ("function",))
        function = call.within(call.take("function"), "function")
        name, arguments = function.text("name") or "", function.take("arguments")
        if isinstance(arguments, dict):  # Ollama's clients
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str):
            function.wrong("arguments", arguments, "JSON as a string, or an object")
        calls.append((name, arguments))
    return calls


def text_of(fields: Fields, parts: Sequence[object], kinds: Sequence[str]) -> str:
    """A content's parts as one text; each is of one of the `kinds`."""
    return "".join(part_text(fields, i, value, kinds) for i, value in enumerate(parts))


def part_text(fields: Fields, i: int, value: object, kinds: Sequence[str]) -> str:
    """The text of one part, which is of one of the `kinds`."""
    part, at = fields.within(value, f"content[{i}]"), fields.place(f"content[{i}]")
    kind = part.take("type")
    if kind not in kinds:
        raise RequestError(
            f"{at} is of type {describe(kind)}; the models read only text",
            param=at,
            code="unsupported_parameter",
        )
    text = part.text("text")
    if text is None:
        part.wrong("text", None, "a string")
    # What was read is kept anyway; the rest says where a text came from.
    part.ignore("cache_control", "annotations", "citations", "logprobs")
    part.done()
    return text
