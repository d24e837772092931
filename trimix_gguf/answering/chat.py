"""Chat: messages -> prompt, by the chat template of a GGUF.

large_ins reads its own template around each message. The small models never saw its control
tokens, so they read a plain template. The messages are the same ids for all three, as the
template of large_ins has them: it may strip white space, or the reasoning of earlier answers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from trimix_gguf.errors import PromptError
from trimix_gguf.machine.worker import CPU_S, TooCostly, Worker
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

Message = dict[str, str]  # role, content; of an assistant also reasoning_content
_HERE = "<the message goes on here>"
# A line for each role: the space of "User: " would be a token that texts do not have there.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize }}:{{ '\n' }}{{ message.content }}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
)
PLAIN_STOPS = ("\n\nUser:", "\nUser:")  # where a model begins to write the next question
_renderer = Worker("trimix_gguf.answering.templates")


class _Refused(Exception):
    """A template refuses the messages; says why."""


def chat_prompt(
    trio: Trio,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    answers: Mapping[int, Sequence[int] | None] | None = None,
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Prompt:
    """Messages {"role": system | user | assistant, "content": text} as a prompt for three models.

    The text around a message is each role's own and not scored: large_ins reads `template`, or its
    model's, or the plain one, which the small models always read. Each content is shared and
    scored; control tokens in it are only text. `answers` are contents that were generated, by the
    message's index: they are not scored, and keep these ids, if any. Without the generation prompt
    the last message stays open, to be continued. `variables` are for the template, such as
    enable_thinking, and `tools` are the functions that it offers. A system message that the
    template does not take is put before the first user message. Raises PromptError where the
    template refuses them.
    """
    model = trio.models[ROLES[0]]
    turns = _checked(messages, answers or {}, model, trio.n_ctx)
    own = template or model.chat_template or PLAIN_TEMPLATE
    known = {**(variables or {}), **_tokens(model), "add_generation_prompt": add_generation_prompt}
    known |= {"tools": list(tools) or None, "documents": None}
    try:
        try:
            layout = _lay_out(turns, own, known)
        except _Refused:
            if turns[0].role != "system":
                raise
            layout = _lay_out(_fold_system(turns), own, known)
    except _Refused as error:
        raise PromptError(_refusal(model, error)) from None
    return Prompt(tuple(_segments(model, layout, _plain_around(layout, add_generation_prompt))))


def template_of(model: Model) -> str:
    """A model's chat template; raises PromptError where it has none."""
    if model.chat_template is None:
        raise PromptError(f"{model.path.name} has no chat template; use plain prompts")
    return model.chat_template


def apply_template(
    model: Model, messages: Sequence[Message], add_generation_prompt: bool = True
) -> str:
    """Messages by the model's own template; without the generation prompt the last stays open.

    Raises PromptError where the template refuses them.
    """
    template = template_of(model)
    try:
        return render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=_tokens(model),
        )
    except PromptError as error:
        raise PromptError(_refusal(model, error)) from None


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Messages by a chat template; raises PromptError where it refuses them.

    Without the generation prompt the last message is left open, for its continuation.
    """
    turns = [_Turn(m["role"], m["content"], reasoning=m.get("reasoning_content")) for m in messages]
    known = {**(variables or {}), "add_generation_prompt": add_generation_prompt}
    try:
        pieces = _render(template, turns, known)
        if not add_generation_prompt:
            pieces = _opened(pieces, turns)
    except _Refused as error:
        raise PromptError(str(error)) from None
    return "".join(text for _, text in pieces)


def around_message(model: Model) -> tuple[list[int], list[int]]:
    """Ids that the template puts before a user message (without BOS) and after it."""
    text = apply_template(model, [{"role": "user", "content": _HERE}])
    before, _, after = text.partition(_HERE)
    begin = model.tokenize(before, special=True)
    return begin[len(model.bos) :] if begin[:1] == model.bos else begin, model.tokenize(
        after, special=True
    )


def close_renderer() -> None:
    """End the processes that render templates, also where one is at work."""
    _renderer.close()


# -- messages -> segments -------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """A message, and the ids of its content where they are known."""

    role: str
    text: str
    ids: tuple[int, ...] | None = None
    scored: bool = True
    reasoning: str | None = None


@dataclass(frozen=True)
class _Layout:
    """The messages, what the template wrote of them, and its texts around these parts."""

    turns: list[_Turn]
    contents: list[tuple[int, _Turn]]  # the index of the message it is from
    around: list[str]  # one more than there are contents


def _checked(
    messages: Sequence[Message],
    answers: Mapping[int, Sequence[int] | None],
    model: Model,
    n_ctx: int,
) -> list[_Turn]:
    if sum(bool(message.get("content")) for message in messages) > n_ctx:  # a token each, at least
        raise PromptError(f"{len(messages)} messages do not fit a context of {n_ctx} tokens")
    turns = []
    for i, message in enumerate(messages):
        role, text = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise PromptError(
                f"message {i + 1} has role {role!r} and {type(text).__name__} content; "
                "expected system, user or assistant, and text"
            )
        reasoning = message.get("reasoning_content")
        if not isinstance(reasoning, str | None):
            kind = type(reasoning).__name__
            raise PromptError(f"message {i + 1} has {kind} reasoning_content; expected text")
        if any("\ud800" <= c <= "\udfff" for c in text + (reasoning or "")):
            raise PromptError(f"message {i + 1} holds half a surrogate pair; send it as UTF-8")
        known = answers.get(i)
        ids = None if known is None else tuple(known)
        text = model.normalize(text) if ids is None else text
        reasoning = reasoning and model.normalize(reasoning)
        turns.append(_Turn(role, text, ids, scored=i not in answers, reasoning=reasoning))
    if not turns:
        raise PromptError("the chat has no message; give one of a user")
    return turns


def _fold_system(turns: list[_Turn]) -> list[_Turn]:
    """The system's text before the first user's, for templates without a system role."""
    system, *rest = turns
    if rest and rest[0].role == "user":
        text = "\n\n".join(t for t in (system.text, rest[0].text) if t)
        return [replace(rest[0], text=text), *rest[1:]]
    return [replace(system, role="user"), *rest]


def _lay_out(turns: list[_Turn], template: str, variables: Mapping[str, Any]) -> _Layout:
    """What a template makes of the messages; raises _Refused."""
    pieces = _render(template, turns, variables)
    if not variables["add_generation_prompt"]:
        pieces = _opened(pieces, turns)
    written = {i for i, _ in pieces}
    if any(turn.text.strip() and i not in written for i, turn in enumerate(turns)):
        raise _Refused("it leaves a message out")
    contents: list[tuple[int, _Turn]] = []
    around = [""]
    for i, text in pieces:
        if i < 0:
            around[-1] += text
        elif text or turns[i].ids:
            contents.append((i, _written(turns[i], text)))
            around.append("")
    return _Layout(turns, contents, around)


def _written(turn: _Turn, text: str) -> _Turn:
    """A part of a message as the template has it; it keeps its ids if it is the whole."""
    whole = text.strip() == turn.text.strip()
    return turn if turn.ids and whole else replace(turn, text=text, ids=None)


def _opened(pieces: list[tuple[int, str]], turns: Sequence[_Turn]) -> list[tuple[int, str]]:
    """The rendering up to the end of the last message, which is to be continued."""
    last = max((n for n, (i, _) in enumerate(pieces) if i >= 0), default=-1)
    if last < 0 or pieces[last][0] != len(turns) - 1:
        raise _Refused("it does not end with the last message, which is to stay open")
    return pieces[: last + 1]


def _render(
    template: str, turns: Sequence[_Turn], variables: Mapping[str, Any]
) -> list[tuple[int, str]]:
    """Pieces of the rendering, by the message they are of (-1: the template's own text).

    A process of its own renders it, within limits. Raises _Refused.
    """
    messages = []
    for turn in turns:
        message = {"role": turn.role, "content": turn.text}
        if turn.reasoning is not None:
            message["reasoning_content"] = turn.reasoning
        messages.append(message)
    try:
        answer = _renderer.call(
            {"template": template, "messages": messages, "variables": dict(variables)}
        )
    except TooCostly:
        raise _Refused(f"it took more than {CPU_S:g} s, or too much memory") from None
    if "error" in answer:
        raise _Refused(answer["error"])
    return [(i, text) for i, text in answer["pieces"]]


def _plain_around(layout: _Layout, add_generation_prompt: bool) -> list[str]:
    """What the small models read around the contents: PLAIN_TEMPLATE, in the same order."""
    order = [i for i, _ in layout.contents]
    counts = Counter(order)
    groups = [(i, counts[i]) for i in range(len(layout.turns))]
    if order != sorted(order):
        groups = [(i, len(list(parts))) for i, parts in groupby(order)]
    around, between = [""], ""
    for i, n_parts in groups:
        around[-1] += f"{between}{layout.turns[i].role.capitalize()}:\n"
        for part in range(n_parts):
            around[-1] += "\n\n" if part else ""
            around.append("")
        between = "\n\n"
    around[-1] += f"{between}Assistant:\n" if add_generation_prompt else ""
    return around


def _segments(model: Model, layout: _Layout, plain: list[str]) -> Iterator[Segment]:
    begin = model.bos

    def around(own: str, small: str) -> Iterator[Segment]:
        nonlocal begin
        ids, small_ids = inner_ids(model, own, special=True), inner_ids(model, small)
        ids = ids if ids[: len(begin)] == begin else begin + ids
        by_role = {role: ids if role == ROLES[0] else begin + small_ids for role in ROLES}
        begin = []
        if any(by_role.values()):
            yield Segment.per_role(by_role)

    for (_, turn), own, small in zip(layout.contents, layout.around, plain, strict=False):
        text = turn.text if turn.ids is None else _text(model, turn.ids[:1])
        space = ""
        if own.endswith(" ") and text and (turn.ids is None or text.startswith(" ")):
            # Tokenizers have a space in one token with the word after it.
            own, small, space = own[:-1], small.removesuffix("\n"), " "
        yield from around(own, small)
        if turn.ids:
            yield Segment.of(turn.ids, scored=False)
        elif turn.text and turn.ids is None:
            yield Segment.of(inner_ids(model, space + turn.text), scored=turn.scored)
    yield from around(layout.around[-1], plain[-1])


def inner_ids(model: Model, text: str, *, special: bool = False) -> list[int]:
    """Ids of text that stands inside another: SentencePiece puts a space before a whole one."""
    if text and _text(model, model.tokenize("a")) == " a":
        line = model.tokenize("\n")
        ids = model.tokenize("\n" + text, special=special)
        if ids[: len(line)] == line:
            return ids[len(line) :]
    return model.tokenize(text, special=special)


def _text(model: Model, ids: Sequence[int]) -> str:
    return b"".join(model.piece(i) for i in ids).decode("utf-8", "replace")


def _tokens(model: Model) -> dict[str, str]:
    """The control tokens that templates name: bos_token and so on."""
    found = model.special_tokens().items()
    pieces = {name: model.piece(token, special=True) for name, token in found}
    return {f"{name}_token": piece.decode("utf-8", "replace") for name, piece in pieces.items()}


def _refusal(model: Model, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"the chat template of {model.path.name} refuses the messages: {reason}"
