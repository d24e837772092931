"""Text as it should have been: one form of each character, mended encodings, no page furniture."""

import re
from collections import Counter
from functools import cache
from typing import Any

from trimix_gguf.adapting.extras import need
from trimix_gguf.adapting.grams import digest

OFTEN = 10  # documents: a line in so many belongs to the pages, not to the text
_MOST_COUNTED = 2_000_000  # lines, above which those seen once are forgotten
_SPACES = re.compile(r"[^\S\n]+")
_GAPS = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """NFC, broken encodings mended, control characters and runs of spaces gone."""
    fixed = str(need("ftfy").fix_text(text, _settings()))
    lines = (_SPACES.sub(" ", line).strip() for line in fixed.splitlines())
    return _GAPS.sub("\n\n", "\n".join(lines)).strip()


@cache
def _settings() -> Any:
    """Only what repairs: quotation marks, wide letters and ligatures stay as they were written."""
    return need("ftfy").TextFixerConfig(
        normalization="NFC",
        uncurl_quotes=False,
        fix_character_width=False,
        fix_latin_ligatures=False,
    )


def line_key(line: str) -> int:
    """A number for a line that differs only in spaces, case and digits from others."""
    normal = re.sub(r"\d+", "0", " ".join(line.lower().split()))
    return digest(normal)


class Boilerplate:
    """Counts in how many documents each line stands; those in many are boilerplate."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def count(self, text: str) -> None:
        """Take in a document."""
        self._counts.update({line_key(line) for line in text.splitlines() if line})
        if len(self._counts) > _MOST_COUNTED:
            self._counts = Counter({key: n for key, n in self._counts.items() if n > 1})

    def split(self, text: str) -> tuple[str, list[str]]:
        """The text without boilerplate, and the lines that were."""
        kept: list[str] = []
        gone: list[str] = []
        for line in text.splitlines():
            often = bool(line) and self._counts[line_key(line)] >= OFTEN
            (gone if often else kept).append(line)
        return "\n".join(kept).strip(), gone
