"""Raw text -> sentences and passages, in any script."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimix_gguf.errors import DataError

# A sentence ends after these: Latin and Cyrillic, Arabic, Devanagari, Tibetan, Burmese, Ethiopic,
# Chinese and Japanese.
_ENDS = ".!?…؟۔।॥།༎။።。！？"
_SENTENCE = re.compile(rf"[^{_ENDS}]+[{_ENDS}]+[\"'»”’)\]]*\s*|[^{_ENDS}]+$")
_SYLLABLE_MARK = "་"  # Tibetan writes it where others write a space
_PIECES, _PIECE = 64, 1 << 16  # of a large file: 4 MiB are enough for any number of exercises
_FEWEST_WORDS, _MOST_WORDS = 5, 14  # long ones cost time and tell no more


@dataclass(frozen=True)
class Sentence:
    """A sentence as its words; `joint` stood between them."""

    words: tuple[str, ...]
    joint: str = " "

    @property
    def text(self) -> str:
        """As it was written."""
        return self.joint.join(self.words)

    def part(self, first: int, last: int) -> str:
        """Words `first` … `last` − 1 as text."""
        return self.joint.join(self.words[first:last])


def read_passages(files: Sequence[Path]) -> list[list[Sentence]]:
    """The sentences of each line or paragraph; raises DataError where a file is not UTF-8 text."""
    passages: list[list[Sentence]] = []
    for file in files:
        try:
            lines = _lines(file)
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
        passages += passages_of(lines)
    return passages


def _lines(file: Path) -> list[str]:
    """All lines of a file; of a large one, pieces from all over it."""
    size = file.stat().st_size
    if size <= _PIECES * _PIECE:
        return file.read_text(encoding="utf-8-sig").splitlines()
    lines: list[str] = []
    with file.open("rb") as opened:
        for at in range(0, size, size // _PIECES):
            opened.seek(at)
            # The first and the last line of a piece may be cut.
            whole = opened.read(_PIECE).split(b"\n")[1:-1]
            lines += [line.decode("utf-8") for line in whole]
    return lines


def passages_of(lines: Iterable[str]) -> list[list[Sentence]]:
    """The usable sentences of each line; those too short, too long or seen before are left out."""
    seen: set[str] = set()
    passages = []
    for line in lines:
        found = []
        for text in (match.group().strip() for match in _SENTENCE.finditer(line)):
            sentence = _sentence(text)
            if _FEWEST_WORDS <= len(sentence.words) <= _MOST_WORDS and text not in seen:
                seen.add(text)
                found.append(sentence)
        if found:
            passages.append(found)
    return passages


def _sentence(text: str) -> Sentence:
    words = tuple(text.split())
    if text.count(_SYLLABLE_MARK) > 2 * len(words):
        return Sentence(tuple(text.split(_SYLLABLE_MARK)), _SYLLABLE_MARK)
    return Sentence(words)
