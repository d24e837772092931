"""Files of raw text -> documents, one after another: memory does not grow with a file."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trimix_gguf.adapting.wikipedia import read_pages
from trimix_gguf.errors import DataError
from trimix_gguf.machine.packed import PACKED, damage, open_unpacked
from trimix_gguf.machine.typed_json import HalfPairError, parse

TEXTS, JSON_LINES, DUMPS = (".txt", ".md", ".text"), (".jsonl", ".ndjson"), (".xml",)
_TABLES, _ARCHIVES = (".csv", ".tsv", ".json", ".parquet"), (".zip", ".7z", ".rar", ".tar")
_BOOKS = (".html", ".htm", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".epub", ".fb2", ".djvu")
FEWEST_CHARACTERS = 1000  # of a document, before a blank line ends it
MOST_CHARACTERS = 2000  # a longer text becomes several documents
_LONGEST_LINE = 1 << 20  # characters read at once
_LONGEST_JSON = 1 << 26  # the same of JSON, where a line is read whole: many a book is longer


@dataclass(frozen=True)
class Document:
    """A piece of text, and where it comes from."""

    source: str
    text: str

    @property
    def is_utf8(self) -> bool:
        """Whether it is Unicode text: bytes that were not UTF-8 stand there as lone surrogates."""
        try:
            self.text.encode()
        except UnicodeEncodeError:
            return False
        return True


def list_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders whose kind is known, in order; raises DataError.

    Of a folder no hidden ones: macOS puts a `._a.txt` that is no text beside a.txt.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and _kind(file)
                and not any(name.startswith(".") for name in file.relative_to(path).parts)
            )
            if not inside:
                known = " ".join((*TEXTS, *JSON_LINES, *DUMPS))
                raise DataError(f"{path} holds no text; expected files named {known}, or packed")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def list_texts(paths: Sequence[Path]) -> list[Path]:
    """As list_files; raises DataError at the name of a file whose marks would be learned as text.

    A file with any other ending is taken for text: many an archive has none.
    """
    files = list_files(paths)
    for file in files:
        if _ending(file) in (*_TABLES, *_ARCHIVES, *_BOOKS):
            raise DataError(
                f"{file} is not plain text; save what to learn as .txt in UTF-8, or as .jsonl: "
                'one {"text": "…"} a line'
            )
    return files


def read_documents(file: Path) -> Iterator[Document]:
    """The documents of one file; raises DataError where it cannot be read or unpacked."""
    readers = {JSON_LINES: _json_lines, DUMPS: _dump}
    read = next((r for kinds, r in readers.items() if _kind(file) in kinds), _text)
    try:
        with ExitStack() as stack:
            yield from read(file, open_unpacked(file, stack))
    except damage(file) as error:
        raise DataError(f"{file} cannot be read: {error}; get it again") from None


def _kind(file: Path) -> str:
    """The ending that says how to read a file; '' for none known."""
    ending = _ending(file)
    return ending if ending in (*TEXTS, *JSON_LINES, *DUMPS) else ""


def _ending(file: Path) -> str:
    """The last ending below that of its packing, in small letters; '' for none."""
    # A large dump is in parts, named .xml-p1p41242.bz2 by their pages.
    endings = [re.sub(r"-p\d+p\d+$", "", ending.lower()) for ending in file.suffixes]
    while endings and endings[-1] in PACKED:
        endings.pop()
    return endings[-1] if endings else ""


def _lines(file: Path, raw: io.BufferedReader, longest: int = _LONGEST_LINE) -> Iterator[str]:
    if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file} is UTF-16; save it as UTF-8")
    # Bytes that are not UTF-8 become lone surrogates, which Document.is_utf8 finds.
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape")
    try:
        while line := text.readline(longest):
            yield line
    finally:
        text.detach()  # who opened it closes it


def _text(file: Path, raw: io.BufferedReader) -> Iterator[Document]:
    held: list[str] = []
    n_held = first = 0
    for number, line in _numbered(_lines(file, raw)):
        is_blank = not line.strip()
        if held and (
            n_held + len(line) > MOST_CHARACTERS or (is_blank and n_held >= FEWEST_CHARACTERS)
        ):
            yield Document(f"{file.name}:{first}", "".join(held))
            held, n_held = [], 0
        if held or not is_blank:
            first = first if held else number
            held.append(line)
            n_held += len(line)
    if held:
        yield Document(f"{file.name}:{first}", "".join(held))


def _json_lines(file: Path, raw: io.BufferedReader) -> Iterator[Document]:
    for number, line in enumerate(_lines(file, raw, _LONGEST_JSON), 1):
        if not line.strip():
            continue
        try:
            entry = parse(line, object)
        except HalfPairError as damaged:
            entry = damaged.value  # one such document among many is dropped, and counted
        except ValueError:
            raise DataError(
                f"{file}, line {number}: not JSON; expected one object a line"
            ) from None
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{file}, line {number}: expected {{"text": "…"}}')
        yield from _pieces(f"{file.name}:{number}", text)


def _dump(file: Path, raw: io.BufferedReader) -> Iterator[Document]:
    for title, text in read_pages(raw, file):
        yield from _pieces(f"{file.name}: {title}", text)


def _pieces(source: str, text: str) -> Iterator[Document]:
    """A text as documents that end at the end of a line, unless a line is longer than one."""
    held = ""
    for _, line in _numbered(text.splitlines(keepends=True)):
        if held and len(held) + len(line) > MOST_CHARACTERS:
            yield Document(source, held)
            held = ""
        held += line
    if held.strip():
        yield Document(source, held)


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; a longer one than a document in parts, cut at spaces.

    Else a text without line ends would be one document, which is learned or held out as a whole.
    """
    for number, line in enumerate(lines, 1):
        at = 0
        while len(line) - at > MOST_CHARACTERS:
            most = at + MOST_CHARACTERS
            end = line.rfind(" ", at + MOST_CHARACTERS // 2, most) + 1 or most
            yield number, line[at:end]
            at = end
        yield number, line[at:]
