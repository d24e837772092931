"""Regular expressions of JSON schemas, in the dialect of llguidance (Rust's regex).

The dialects differ. A pattern is written so that what it matches, Python's `re` matches too, and
JavaScript's where its classes are narrower. What has no such form is refused.
"""

import re
from collections.abc import Iterator

MOST_CHARACTERS = 4096
# What a class matches in every dialect, and what it matches in any of them, as parts of [...].
_EVERY = {
    "d": "0-9", "w": "A-Za-z0-9_", "s": r"\t\n\x0b\x0c\r\x20",
    "D": r"\P{Nd}", "W": r"[^\p{Alphabetic}\p{L}\p{M}\p{N}\p{Pc}\p{Join_Control}]",
    "S": r"[^\s\x1c-\x1f\x{feff}]",
}  # fmt: skip
_ANY = {
    "d": r"\p{Nd}", "w": r"\p{Alphabetic}\p{L}\p{M}\p{N}\p{Pc}\p{Join_Control}",
    "s": r"\s\x1c-\x1f\x{feff}",
    "D": "[^0-9]", "W": "[^A-Za-z0-9_]", "S": r"[^\t\n\x0b\x0c\r\x20]",
}  # fmt: skip


def portable(pattern: str) -> str:
    """`pattern` for llguidance; raises ValueError with the reason where it cannot be used."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS} characters")
    pieces = list(_pieces(pattern))
    try:
        re.compile("".join(checked for checked, _ in pieces))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return "".join(native for _, native in pieces)


def _pieces(pattern: str) -> Iterator[tuple[str, str]]:
    """Parts of a pattern: for Python's check, and for llguidance."""
    at, repeated = 0, False
    while at < len(pattern):
        character, following = pattern[at], pattern[at + 1 : at + 2]
        if character == "[":
            end = _end_of_class(pattern, at)
            yield from _class(pattern[at + 1 : end - 1])
            at, repeated = end, False
            continue
        if character == "\\":
            native = _escaped(following, _EVERY)
            whole = f"[{native}]" if following in _EVERY else native
            yield character + following, whole
            at, repeated = at + 2, False
            continue
        if character == "(" and following == "?" and pattern[at : at + 3] != "(?:":
            raise ValueError("groups that begin with (? are not supported, except for (?:")
        if character == "+" and repeated:
            raise ValueError("a quantifier follows a quantifier")
        yield character, character
        repeated = character in "*+?}" and not (character == "?" and repeated)
        at += 1


def _end_of_class(pattern: str, at: int) -> int:
    """Where the class that begins at `at` is over; a ] that comes first belongs to it."""
    found = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(pattern, at)
    if found is None:
        raise ValueError("a [ has no ]")
    return found.end()


def _class(inner: str) -> Iterator[tuple[str, str]]:
    """The parts of a class, whose text between the brackets is `inner`."""
    negated = inner.startswith("^")
    inner = inner[negated:]
    if "--" in inner:
        raise ValueError("-- in a class is not supported; escape the hyphens")
    yield "[^"[: 1 + negated], "[^"[: 1 + negated]
    at = 0
    while at < len(inner):
        if inner[at] == "\\":
            following = inner[at + 1 : at + 2]
            yield inner[at : at + 2], _escaped(following, _ANY if negated else _EVERY)
            at += 2
        else:  # Rust gives [, & and ~ a meaning here
            plain = inner[at].isalnum() or inner[at] == "-" or ord(inner[at]) > 127
            escape = "\\" if inner[at] in "[]&~|^" else ""
            yield escape + inner[at], inner[at] if plain else _hex(inner[at])
            at += 1
    yield "]", "]"


def _escaped(character: str, classes: dict[str, str]) -> str:
    """What follows a backslash, for llguidance."""
    if character in classes:
        return classes[character]
    return f"\\{character}" if character.isalnum() and character.isascii() else _hex(character)


def _hex(character: str) -> str:
    return f"\\x{{{ord(character):x}}}" if character else "\\"
