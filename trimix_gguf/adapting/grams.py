"""Texts as sets of word sequences: what near duplicates and leaked test questions are found by."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

# To Python vowel signs are no part of a word: in Devanagari or Thai each would end one.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M")
_WORD = re.compile(rf"[\w{_MARKS}]+")
_LONG_WORD = 14  # characters: longer on average, the script writes no spaces
PER_WORD = 3  # characters that stand for a word there


def units_of(text: str) -> list[str]:
    """Words in NFC and lower case; characters where the script writes no spaces between them."""
    words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    if sum(map(len, words)) > _LONG_WORD * len(words):
        return list("".join(words))
    return words


def n_words(text: str) -> int:
    """How many words a text has, about so many where no spaces stand between them."""
    words = text.split()
    if len(text) <= _LONG_WORD * len(words):
        return len(words)
    units = units_of(text)
    return len(units) if any(len(unit) > 1 for unit in units) else len(units) // PER_WORD


def grams(units: Sequence[str], n: int) -> Iterator[str]:
    """Every `n` that follow each other; all of them together where there are fewer."""
    for at in range(max(len(units) - n, 0) + 1):
        yield " ".join(units[at : at + n])


def digest(text: str) -> int:
    """A number of 64 bits for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def digests(texts: Iterable[str]) -> set[int]:
    """The numbers of several."""
    return {digest(text) for text in texts}
