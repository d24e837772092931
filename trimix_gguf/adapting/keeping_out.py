"""Lines that stand in evaluation sets too, found by word sequences: a model must not learn them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimix_gguf.adapting.grams import PER_WORD, digest, digests, grams, units_of
from trimix_gguf.errors import DataError
from trimix_gguf.machine.typed_json import parse

N_WORDS = 8
FEWEST_WORDS = 4  # a shorter line of an evaluation set says nothing


class KeptOut:
    """What must not be learned: texts of evaluation sets."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._seen: dict[int, set[int]] = {}  # length of the sequences -> their numbers
        for file in files:
            for text in _texts(file):
                self._add(text)

    def _add(self, text: str) -> None:
        units = units_of(text)
        n = min(_length(units), len(units))
        if n * N_WORDS >= FEWEST_WORDS * _length(units):
            self._seen.setdefault(n, set()).update(digests(grams(units, n)))

    def has(self, line: str) -> bool:
        """Whether a line shares N_WORDS words in a row with one of the texts, or all of it."""
        units = units_of(line)
        return any(
            digest(gram) in seen
            for n, seen in self._seen.items()
            if n <= len(units)
            for gram in grams(units, n)
        )

    def split(self, text: str) -> tuple[str, list[str]]:
        """The text without such lines, and the lines."""
        if not self._seen:
            return text, []
        kept: list[str] = []
        gone: list[str] = []
        for line in text.splitlines():
            (gone if self.has(line) else kept).append(line)
        return "\n".join(kept).strip(), gone


def _length(units: Sequence[str]) -> int:
    """N_WORDS, or about as much text in characters where those are the units."""
    is_spaced = any(len(unit) > 1 for unit in units)
    return N_WORDS if is_spaced else N_WORDS * PER_WORD


def _texts(file: Path) -> Iterator[str]:
    """Every text in a file: lines, fields of a table, strings of JSON."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--keep-out {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--keep-out {file} is not UTF-8 (byte {error.start})") from None
    if file.suffix == ".json":
        yield from _strings(_parsed(content, file))
        return
    if file.suffix in (".jsonl", ".ndjson"):
        for line in content.split("\n"):  # not splitlines(): a text may hold U+2028
            if line.strip():
                yield from _strings(_parsed(line, file))
        return
    for line in content.splitlines():
        yield from line.split("\t")


def _parsed(text: str, file: Path) -> Any:
    try:
        return parse(text, object)
    except ValueError:
        raise DataError(f"--keep-out {file} is not JSON; expected what its name says") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from value.splitlines()
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
