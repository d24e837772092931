"""JSON of files by others: read within limits, and compared with a shape before it is used.

A shape is a type, or None, or a tuple of shapes (one of them), [shape] (a list of such), a dict of
shapes by key (each key that is there fits; others may be there too; those that NEEDED lists must
be there), or {str: shape} (any keys).
"""

import json
from typing import Any

Shape = Any
NEEDED = ""  # in a shape by key: the keys that must be there


class HalfPairError(ValueError):
    """A text in `value` has half of a surrogate pair: JSON can spell it, but no text has it."""

    def __init__(self, half: str, value: Any) -> None:
        super().__init__(f"{half} is half of a surrogate pair, not a character")
        self.value = value


def parse(text: str | bytes, shape: Shape) -> Any:
    """The value of a JSON text; raises ValueError, in words, where it is none or does not fit.

    Where it is not JSON, that is a json.JSONDecodeError or a UnicodeDecodeError, with the place.
    """
    try:
        value = json.loads(text)
        if ("\\ud" if isinstance(text, str) else b"\\ud") in text.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except UnicodeEncodeError as error:
        raise HalfPairError(ascii(error.object[error.start]), value) from None
    except ValueError:
        raise ValueError("a number has too many digits") from None
    if (flaw := misfit(value, shape)) is not None:
        raise ValueError(flaw)
    return value


def misfit(value: Any, shape: Shape, at: str = "") -> str | None:
    """What does not fit and where, in words; None where all does."""
    if isinstance(shape, tuple):
        flaws = [misfit(value, one, at) for one in shape]
        return None if None in flaws else flaws[-1]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _flaw(value, "a list", at)
        found = (misfit(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value))
        return next((flaw for flaw in found if flaw is not None), None)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _flaw(value, "an object", at)
        for key in shape.get(NEEDED, ()):
            if key not in value:
                return f"{at.lstrip('.') or 'it'} has no {key!r}"
        by_key = {} if str in shape else {k: s for k, s in shape.items() if k != NEEDED}
        shapes = {key: by_key.get(key, shape.get(str, object)) for key in value}
        found = (misfit(value[key], one, f"{at}.{key}"[:80]) for key, one in shapes.items())
        return next((flaw for flaw in found if flaw is not None), None)
    if shape is None:
        return None if value is None else _flaw(value, "null", at)
    fits = isinstance(value, shape) and not (isinstance(value, bool) and shape in (int, float))
    fits = fits or (shape is float and type(value) is int and abs(value) < 1 << 1000)
    return None if fits else _flaw(value, _WORDS.get(shape, shape.__name__), at)


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _flaw(value: Any, expected: str, at: str) -> str:
    return f"{at.lstrip('.') or 'it'} is {repr(value)[:40]}, expected {expected}"
