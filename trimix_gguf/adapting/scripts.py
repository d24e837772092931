"""Which scripts a text is written in, by Unicode's own table."""

from collections import Counter
from collections.abc import Mapping
from functools import cache

from trimix_gguf.adapting.extras import need
from trimix_gguf.errors import DataError

_TOGETHER = (frozenset({"Hani", "Hira", "Kana"}), frozenset({"Hang", "Hani"}))  # in one text
_NO_SCRIPT = ("Zyyy", "Zinh", "Zzzz")  # digits, signs, marks


def count_scripts(text: str) -> Counter[str]:
    """Letters of each script, by its four-letter code (ISO 15924)."""
    counts: Counter[str] = Counter()
    for character, n in Counter(text).items():
        script = _script(character)
        if script not in _NO_SCRIPT:
            counts[script] += n
    return counts


def share_of(script: str, counts: Mapping[str, int]) -> float:
    """The share of the letters that are of a script, or of one that goes with it."""
    total = sum(counts.values())
    if not total:
        return 0.0
    own = {script}.union(*(group for group in _TOGETHER if script in group))
    return sum(n for name, n in counts.items() if name in own) / total


def main_script(counts: Mapping[str, int]) -> str:
    """That of most letters, of which there are some."""
    return max(counts, key=lambda script: counts[script])


def script_name(code: str) -> str:
    """A script in words: 'Cyrl' -> 'Cyrillic'; raises DataError for one that is not known."""
    try:
        return str(need("fontTools.unicodedata").script_name(code))
    except KeyError:
        raise DataError(
            f"script {code!r} is unknown; give its code as in ISO 15924: Cyrl, Arab, Tibt, Latn"
        ) from None


@cache
def _script(character: str) -> str:
    if not (character.isalpha() or character > "\u0300"):
        return _NO_SCRIPT[0]
    return str(need("fontTools.unicodedata").script(character))
