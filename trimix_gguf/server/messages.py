"""The messages of a chat, as clients send them, to those that the models read."""

from collections.abc import Sequence

from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields, describe

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
    content += _called(fields) if role == "assistant" else ""
    for name in ("tool_calls", "function_call", "audio"):
        fields.refuse(name, "the models read only text", harmless=([],))
    fields.ignore("name", "refusal", "annotations", "cache_control", "tool_call_id")
    fields.done()
    message = {"role": _ROLES.get(role, "user"), "content": content}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def role_of(fields: Fields, roles: Sequence[str] = tuple(_ROLES)) -> str:
    """The role of a message, as it was sent."""
    role = fields.one_of("role", roles)
    if role is None:
        fields.wrong("role", None, f"one of {', '.join(roles)}")
    return role


def plain_role(role: str) -> str:
    """A role as the chat template knows it."""
    return _ROLES[role]


def _called(fields: Fields) -> str:
    """The arguments of an earlier function call: the text that the models wrote."""
    calls = fields.take("tool_calls")
    if calls in (None, []):
        return ""
    if not isinstance(calls, list) or len(calls) != 1:
        fields.wrong("tool_calls", calls, "a list of one call")
    call = fields.within(calls[0], "tool_calls[0]")
    call.one_of("type", ("function",))
    function = call.within(call.take("function"), "function")
    arguments = function.text("arguments")
    if arguments is None:
        function.wrong("arguments", None, "a string")
    return arguments


def text_of(fields: Fields, parts: list[object], kinds: Sequence[str]) -> str:
    """A content's parts as one text; each is of one of the `kinds`."""
    texts = []
    for i, value in enumerate(parts):
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
        part.ignore("cache_control", "annotations", "logprobs")
        part.done()
        texts.append(text)
    return "".join(texts)
