"""The members of a tar that holds nothing but plain files, by its headers alone.

tarfile also reads links, sparse files, headers that call for further headers, and sizes below
zero; a bundle has none of these. Source: POSIX.1-2008, pax, "ustar Interchange Format".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from trimix_gguf.errors import TrioFileError

_BLOCK = 512
_MOST_MEMBERS = 100_000  # parts of models
_MOST_PAX = 1 << 16  # bytes of a header that only says what is too large for the plain one
_PAX_KEYS = ("path", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment")


@dataclass(frozen=True)
class Member:
    """A plain file in a tar: its name, and where its bytes are."""

    file: Path
    name: str
    offset: int
    n_bytes: int

    def opener(self) -> IO[bytes]:
        """The tar, at this file's first byte; it does not end where the file does."""
        opened = open(self.file, "rb")  # noqa: SIM115  # the caller's
        opened.seek(self.offset)
        return opened


def read_members(file: Path) -> list[Member]:
    """All members of a tar. Raises TrioFileError for one that holds more than plain files."""
    try:
        with open(file, "rb") as opened:
            return list(_members(file, opened))
    except OSError as error:
        raise TrioFileError(f"{file} cannot be read: {error.strerror or error}") from None


def _members(file: Path, opened: IO[bytes]) -> Iterator[Member]:
    total, at, n = opened.seek(0, 2), 0, 0
    extended: dict[str, str] = {}
    while True:
        opened.seek(at)
        header = opened.read(_BLOCK)
        if len(header) < _BLOCK or not _is_header(header):
            if header and header.strip(b"\0") == b"" and n and not extended:
                return
            if n == 0:
                _refuse(file, "is not a plain tar; was it copied completely?")
            _refuse(file, "is truncated or altered; copy it again")
        kind, name = header[156:157], _text(header[345:500], header[:100])
        size = extended.get("size")
        n_bytes = _number(header[124:136]) if size is None else int(size)
        name = extended.get("path", name)
        at += _BLOCK
        if n_bytes is None or at + n_bytes > total or (n := n + 1) > _MOST_MEMBERS:
            _refuse(file, "is truncated or altered; copy it again")
        if kind == b"x" and not extended and n_bytes <= _MOST_PAX:
            extended = _pax(opened.read(n_bytes))
            if extended.keys() - set(_PAX_KEYS) or not _is_size(extended.get("size", "0")):
                _refuse(file, f"{name!r} is not a plain file; refused", colon=True)
        elif kind not in (b"0", b"\0") or name.endswith("/"):
            _refuse(file, f"{name!r} is not a plain file; refused", colon=True)
        else:
            yield Member(file, name, at, n_bytes)
            extended = {}
        at += -(-n_bytes // _BLOCK) * _BLOCK


def first_name(file: Path) -> str | None:
    """What the first file of a tar is called; None for what is no tar."""
    try:
        with open(file, "rb") as opened:
            return next(_members(file, opened)).name
    except (OSError, TrioFileError, StopIteration):
        return None


def _is_size(text: str) -> bool:
    return text.isdecimal() and len(text) < 20


def _is_header(header: bytes) -> bool:
    """Whether the sum of its bytes is what it says, its own place counted as spaces."""
    found = _number(header[148:156])
    return found == sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")


def _number(field: bytes) -> int | None:
    """An octal number, or GNU's 256-based one for large files; None for another."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and digits.strip(b"01234567") == b"" else None


def _text(prefix: bytes, name: bytes) -> str:
    parts = [part.split(b"\0")[0] for part in (prefix, name)]
    return b"/".join(part for part in parts if part).decode("utf-8", "backslashreplace")


def _pax(raw: bytes) -> dict[str, str]:
    """Records of 'LENGTH KEY=VALUE\\n'; a key "" stands for what is no record."""
    records: dict[str, str] = {}
    while raw:
        digits, _, _ = raw.partition(b" ")
        n = int(digits) if digits.isdigit() and len(digits) < 6 else 0
        key, equals, value = raw[len(digits) + 1 : n].partition(b"=")
        if not (equals and value.endswith(b"\n")):
            return {"": ""}
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "backslashreplace")
        raw = raw[n:]
    return records


def _refuse(file: Path, flaw: str, *, colon: bool = False) -> NoReturn:
    raise TrioFileError(f"{file}{':' if colon else ''} {flaw}")
