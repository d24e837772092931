"""A chat template over messages, in the sandbox and with the helpers that transformers gives it.

The template sees the messages as they are, so what it says about their contents holds. Each
content is a text that knows which message it is from, through what a template does to texts; in
the rendering, marks show what is a message's and what is the template's own.
Source: transformers, utils/chat_template_utils.py.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trimix_gguf.machine.worker import answer_calls

Piece = tuple[int, str]  # of which message, or OWN; its text
OWN = -1  # the template's own text
_CONTENTS = ("content", "reasoning_content")
_MOST_CHARACTERS = 1 << 24  # of a rendering
_FIRST, _MOST_MESSAGES = 0xF0000, 1 << 15  # planes of characters that no text has
_MARK = "".join(chr(0x100000 + secrets.randbelow(0xFFF0)) for _ in range(4))
_clock = {"now": datetime.now()}  # of one rendering
_MARKS = re.compile(f"{_MARK}([\U000f0000-\U000fffff])")


def main() -> None:
    """Render what the parent process asks for."""
    answer_calls(_answer)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"pieces": render(**request)}
    except TemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it needs too much memory"}


def render(
    *, template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[Piece]:
    """Pieces in the order of the rendering; raises TemplateError for any failure in the template.

    `variables` are what the template can name beside the messages.
    """
    if len(messages) > _MOST_MESSAGES:
        raise TemplateError(f"there are more than {_MOST_MESSAGES} of them")
    marked = [
        {k: _Text._of(v, i) if k in _CONTENTS and isinstance(v, str) else v for k, v in m.items()}
        for i, m in enumerate(messages)
    ]
    known = {"tools": None, "documents": None, **variables}
    _clock["now"] = datetime.now()
    pieces = list(_pieces(_rendered(template, {**known, "messages": marked})))
    plain = _rendered(template, {**known, "messages": [dict(m) for m in messages]})
    if "".join(text for _, text in pieces) != plain:
        raise _lost()
    said = dict.fromkeys(range(OWN, len(messages)), 0)
    for index, piece in pieces:
        said[index] += len(piece)
    for i, message in enumerate(messages):
        if said[i] > sum(len(message.get(name) or "") for name in _CONTENTS):
            raise TemplateError("it says a message twice")
    return pieces


def _rendered(template: str, known: Mapping[str, Any]) -> str:
    try:
        text = str(_compile(template).render(known))
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise TemplateError(str(error)) from error
    if len(text) > _MOST_CHARACTERS:
        raise TemplateError(f"it writes more than {_MOST_CHARACTERS} characters")
    return text


def _pieces(text: str) -> Iterator[Piece]:
    """A rendering with marks, cut at them."""
    parts = _MARKS.split(text)  # text, mark, text, mark, …, text
    inside = OWN
    yield OWN, parts[0]
    for mark, part in zip(parts[1::2], parts[2::2], strict=True):
        index, ends = divmod(ord(mark) - _FIRST, 2)
        if ends != (inside != OWN) or (ends and index != inside):
            raise _lost()
        inside = OWN if ends else index
        yield inside, part
    if inside != OWN or any(character in "".join(parts[::2]) for character in _MARK):
        raise _lost()


def _lost() -> TemplateError:
    return TemplateError("it changes a message in a way that cannot be followed")


# -- texts that know where they are from ------------------------------------------------------


class _Text(str):
    """A text some parts of which (start, end, index) are of messages; str() writes marks."""

    _parts: tuple[tuple[int, int, int], ...]

    @classmethod
    def _of(cls, text: str, index: int) -> "_Text":
        """A text that is a message's."""
        return cls._with(text, ((0, len(text), index),))

    @classmethod
    def _with(cls, text: str, parts: tuple[tuple[int, int, int], ...]) -> "_Text":
        made = cls(text)
        made._parts = parts
        return made

    def __str__(self) -> str:
        out, at, plain = [], 0, str.__str__(self)
        for start, end, index in self._parts:
            begin, stop = (_MARK + chr(_FIRST + 2 * index + i) for i in (0, 1))
            out += [plain[at:start], begin, plain[start:end], stop]
            at = end
        return "".join([*out, plain[at:]])

    def __format__(self, form: str) -> str:
        return format(str(self), form) if form else str(self)

    def __mod__(self, values: Any) -> str:
        return str(str(self) % values)

    def __add__(self, other: str) -> "_Text":
        if not isinstance(other, str):
            return NotImplemented
        moved = ((s + len(self), e + len(self), i) for s, e, i in getattr(other, "_parts", ()))
        return _Text._with(str.__add__(self, other), (*self._parts, *moved))

    def __radd__(self, other: str) -> "_Text":
        return _Text._with(other, ()) + self if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: Any) -> "_Text":
        if not isinstance(key, slice):
            at = range(len(self))[key]
            key = slice(at, at + 1)
        start, end, step = key.indices(len(self))
        if step != 1:
            raise _lost()
        return self._cut(start, max(start, end))

    def __iter__(self) -> Iterator[str]:
        return (self._cut(at, at + 1) for at in range(len(self)))

    def _cut(self, start: int, end: int) -> "_Text":
        clipped = ((max(s, start), min(e, end), i) for s, e, i in self._parts)
        parts = tuple((s - start, e - start, i) for s, e, i in clipped if s <= e)
        return _Text._with(str.__getitem__(self, slice(start, end)), parts)

    def lstrip(self, characters: str | None = None, /) -> "_Text":
        return self._cut(len(self) - len(str.lstrip(self, characters)), len(self))

    def rstrip(self, characters: str | None = None, /) -> "_Text":
        return self._cut(0, len(str.rstrip(self, characters)))

    def strip(self, characters: str | None = None, /) -> "_Text":
        return self.lstrip(characters).rstrip(characters)

    def removeprefix(self, prefix: str, /) -> "_Text":
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> "_Text":
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def _located(self, texts: Sequence[str]) -> list[Any]:
        """Parts of this text, which stand in it in this order."""
        at, found = 0, []
        for text in texts:
            at = self.index(text, at)
            found.append(self._cut(at, at + len(text)))
            at += len(text)
        return found

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:
        return self._split(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:
        return self._split(str.rsplit(self, sep, maxsplit), sep)

    def _split(self, texts: list[str], sep: str | None) -> list[Any]:
        if sep is None:
            return self._located(texts)
        at, found = 0, []
        for text in texts:
            found.append(self._cut(at, at + len(text)))
            at += len(text) + len(sep)
        return found

    def splitlines(self, keepends: Any = False) -> list[Any]:
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> Any:
        return tuple(self._located(str.partition(self, sep)))

    def rpartition(self, sep: str, /) -> Any:
        return tuple(self._located(str.rpartition(self, sep)))

    def replace(self, old: str, new: str, count: Any = -1, /) -> "_Text":
        whole = _Text._with("", ())
        for n, part in enumerate(self.split(old, count) if old else [self]):
            whole = whole + new + part if n else part
        return whole

    def _cased(self, text: str) -> Any:
        if len(text) == len(self):
            return _Text._with(text, self._parts)
        if len(self._parts) == 1 and self._parts[0][:2] == (0, len(self)):
            return _Text._of(text, self._parts[0][2])
        raise _lost()

    def lower(self) -> Any:
        return self._cased(str.lower(self))

    def upper(self) -> Any:
        return self._cased(str.upper(self))

    def capitalize(self) -> Any:
        return self._cased(str.capitalize(self))

    def title(self) -> Any:
        return self._cased(str.title(self))


# -- the sandbox ------------------------------------------------------------------------------


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where joining keeps the marks."""

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if getattr(called, "__name__", "") == "join" and args:
            args = ([str(x) if isinstance(x, _Text) else x for x in args[0]], *args[1:])
        return super().call(context, called, *args, **kwargs)


class _Generation(Extension):
    """{% generation %} marks what to train on; it has no effect here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(16)
def _compile(template: str) -> Any:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.filters["replace"] = _replace  # jinja's own would replace in the marks
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: _clock["now"].strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # jinja's own escapes HTML


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = text if isinstance(text, str) else str(text)
    return str(text.replace(str(old), str(new), -1 if count is None else count))


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
