"""Chat: messages -> prompt, by the chat template of a GGUF.

large_ins reads its own template around each message. The small models never saw its control
tokens, so they read a plain template. The messages are the same ids for all three. They never pass
through a template: it is rendered with placeholders for them, and cut there.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trimix_gguf.errors import PromptError
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

Message = dict[str, str]  # role, content
_HERE = "<the message goes on here>"
# A line for each role: the space of "User: " would be a token that texts do not have there.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize }}:{{ '\n' }}{{ message.content }}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
)
PLAIN_STOPS = ("\n\nUser:", "\nUser:")  # where a model begins to write the next question


def chat_prompt(
    trio: Trio,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    answers: Mapping[int, Sequence[int] | None] | None = None,
) -> Prompt:
    """Messages {"role": system | user | assistant, "content": text} as a prompt for three models.

    The text around a message is each role's own and not scored: large_ins reads `template`, or its
    model's, or the plain one, which the small models always read. Each content is shared and
    scored; control tokens in it are only text. `answers` are contents that were generated, by the
    message's index: they are not scored, and keep these ids, if any. Without the generation prompt
    the last message stays open, to be continued. A system message that the template does not take
    is put before the first user message. Raises PromptError where the template refuses them.
    """
    model = trio.models[ROLES[0]]
    turns = _checked(messages, answers or {}, model)
    own = template or model.chat_template or PLAIN_TEMPLATE

    def cut(turns: list[_Turn], template: str) -> _Layout:
        return _cut(turns, _renderer(template, add_generation_prompt, _tokens(model)), is_open)

    def lay_out(turns: list[_Turn]) -> _Layout:
        return cut(_stripped(turns, _renderer(own, add_generation_prompt, _tokens(model))), own)

    is_open = not add_generation_prompt
    try:
        try:
            layout = lay_out(turns)
        except TemplateError:
            if turns[0].role != "system":
                raise
            layout = lay_out(_fold_system(turns))
        plain = cut(layout.turns, PLAIN_TEMPLATE)
    except TemplateError as error:
        raise PromptError(_refusal(model, error)) from None
    return Prompt(tuple(_segments(model, layout, plain)))


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
    try:
        return render_chat(
            template_of(model),
            list(messages),
            add_generation_prompt=add_generation_prompt,
            **_tokens(model),
        )
    except TemplateError as error:
        raise PromptError(_refusal(model, error)) from None


def around_message(model: Model) -> tuple[list[int], list[int]]:
    """Ids that the template puts before a user message (without BOS) and after it."""
    text = apply_template(model, [{"role": "user", "content": _HERE}])
    before, _, after = text.partition(_HERE)
    begin = model.tokenize(before, special=True)
    return begin[len(model.bos) :] if begin[:1] == model.bos else begin, model.tokenize(
        after, special=True
    )


def render_chat(
    template: str, messages: list[Message], *, add_generation_prompt: bool, **tokens: str
) -> str:
    """Messages by a chat template, in the sandbox and with the helpers that transformers gives it.

    Without the generation prompt the last message is left open, for its continuation. Raises
    jinja2.TemplateError. Source: transformers, utils/chat_template_utils.py.
    """
    messages = [dict(m) for m in messages]
    end = "" if add_generation_prompt else f"{_HERE} "
    messages[-1]["content"] += end
    text = _render(template, messages, add_generation_prompt, tokens)
    if not end:
        return text
    before, mark, after = text.rpartition(end.strip())
    if not mark:
        raise TemplateError("it leaves the last message out")
    # A template that strips its messages has taken the space after the mark.
    return before if after.startswith(" ") else before.rstrip()


# -- messages -> segments -------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """A message, and the ids of its content where they are known."""

    role: str
    text: str
    ids: tuple[int, ...] | None = None
    scored: bool = True


@dataclass(frozen=True)
class _Layout:
    """Messages in a template's order, those that have a content, and the texts around these."""

    turns: list[_Turn]
    contents: list[_Turn]
    around: list[str]  # one more than there are contents


_Render = Callable[[Sequence[_Turn]], str]


def _checked(
    messages: Sequence[Message], answers: Mapping[int, Sequence[int] | None], model: Model
) -> list[_Turn]:
    turns = []
    for i, message in enumerate(messages):
        role, text = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise PromptError(
                f"message {i + 1} has role {role!r} and {type(text).__name__} content; "
                "expected system, user or assistant, and text"
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise PromptError(f"message {i + 1} holds half a surrogate pair; send it as UTF-8")
        known = answers.get(i)
        ids = None if known is None else tuple(known)
        text = model.normalize(text) if ids is None else text
        turns.append(_Turn(role, text, ids, scored=i not in answers))
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


def _renderer(template: str, add_generation_prompt: bool, tokens: Mapping[str, str]) -> _Render:
    def render(turns: Sequence[_Turn]) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return _render(template, messages, add_generation_prompt, tokens)

    return render


def _stripped(turns: list[_Turn], render: _Render) -> list[_Turn]:
    """The messages without the outer white space that a template takes off them.

    A placeholder with the same white space around it shows what the template leaves of it.
    """
    outer = [_outer_space(turn) for turn in turns]
    if not any(before or after for before, after in outer):
        return turns
    marks = [secrets.token_hex(12) if turn.text or turn.ids else "" for turn in turns]

    def around(befores: Sequence[str], afters: Sequence[str]) -> tuple[list[int], list[str]]:
        texts = [b + m + a for b, m, a in zip(befores, marks, afters, strict=True)]
        return _split(
            render([replace(t, text=x) for t, x in zip(turns, texts, strict=True)]), marks
        )

    none = [""] * len(turns)
    order, bare = around(none, none)
    _, begun = around([before for before, _ in outer], none)
    _, ended = around(none, [after for _, after in outer])
    kept = list(turns)
    for at, i in enumerate(order):
        before = begun[at][len(bare[at]) :]
        after = ended[at + 1][: len(ended[at + 1]) - len(bare[at + 1])]
        core = turns[i].text.strip()
        if turns[i].ids is None:
            text = before + core + after if core else min(before, after, key=len)
            kept[i] = replace(turns[i], text=text)
    return kept


def _outer_space(turn: _Turn) -> tuple[str, str]:
    """White space before and after a message; an empty one has it on both sides."""
    text, core = turn.text, turn.text.strip()
    if turn.ids is not None or not core:
        return ("", "") if turn.ids is not None else (text, text)
    at = text.index(core)
    return text[:at], text[at + len(core) :]


def _cut(turns: list[_Turn], render: _Render, is_open: bool) -> _Layout:
    """Where a template puts the messages; it gets empty ones as they are."""
    last = turns[-1]
    marks = [
        secrets.token_hex(12) if turn.text or turn.ids or (is_open and turn is last) else ""
        for turn in turns
    ]
    text = render([replace(t, text=mark) for t, mark in zip(turns, marks, strict=True)])
    order, around = _split(text, marks)
    contents = [turns[i] for i in order]
    if is_open:
        if contents[-1] is not last:
            raise TemplateError("it does not end with the last message, which is to stay open")
        around[-1] = ""
    return _Layout(turns if order == sorted(order) else contents, contents, around)


def _split(text: str, marks: Sequence[str]) -> tuple[list[int], list[str]]:
    """Indices of the marks in the order of the text, and the texts around them."""
    if any(mark and text.count(mark) != 1 for mark in marks):
        raise TemplateError("it leaves a message out, or says one twice")
    order = sorted((i for i, m in enumerate(marks) if m), key=lambda i: text.index(marks[i]))
    around = []
    for i in order:
        before, _, text = text.partition(marks[i])
        around.append(before)
    return order, [*around, text]


def _segments(model: Model, layout: _Layout, plain: _Layout) -> Iterator[Segment]:
    begin = model.bos

    def around(own: str, small: str) -> Iterator[Segment]:
        nonlocal begin
        ids, small_ids = inner_ids(model, own, special=True), inner_ids(model, small)
        ids = ids if ids[: len(begin)] == begin else begin + ids
        by_role = {role: ids if role == ROLES[0] else begin + small_ids for role in ROLES}
        begin = []
        if any(by_role.values()):
            yield Segment.per_role(by_role)

    for turn, own, small in zip(layout.contents, layout.around, plain.around, strict=False):
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
    yield from around(layout.around[-1], plain.around[-1])


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


# -- templates ------------------------------------------------------------------------------


def _render(
    template: str, messages: list[Message], add_generation_prompt: bool, tokens: Mapping[str, str]
) -> str:
    """Raises TemplateError for any failure in the template."""
    try:
        text = _compile(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise TemplateError(str(error)) from error
    return str(text)


def _tokens(model: Model) -> dict[str, str]:
    """The control tokens that templates name: bos_token and so on."""
    found = model.special_tokens().items()
    pieces = {name: model.piece(token, special=True) for name, token in found}
    return {f"{name}_token": piece.decode("utf-8", "replace") for name, piece in pieces.items()}


def _refusal(model: Model, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"the chat template of {model.path.name} refuses the messages: {reason}"


class _Generation(Extension):
    """{% generation %} marks what to train on; it has no effect here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # jinja's own escapes HTML


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
