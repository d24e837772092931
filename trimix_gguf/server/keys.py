"""The keys of a server: one, or a file with one for each person."""

import hashlib
import hmac
import os
import re
from collections.abc import Callable
from pathlib import Path

from trimix_gguf.errors import TrimixError

_NAME = re.compile(r"[\w.@+-]{1,64}")
_KEY = re.compile(r"[!-~]+")


class KeyFileError(TrimixError):
    """A file of keys that cannot be used."""


class Keys:
    """Who holds which key.

    `given` is a key without a name. `file` has a line for each person: NAME KEY, or only KEY.
    Empty lines and those that begin with # are left out. It is read again when it changes; where
    it cannot be used then, the earlier keys stay, and `say` is told why. At first it raises
    KeyFileError.
    """

    def __init__(
        self, given: str | None, file: Path | None = None, *, say: Callable[[str], None] = print
    ) -> None:
        self._given = [] if given is None else [("-", _digest(given.encode()))]
        self._file, self._say = file, say
        self._seen: object = None
        self._named: list[tuple[str, bytes]] = []
        if file is not None:
            self._seen, self._named = _stamp(file), _read(file)

    def name_of(self, key: bytes) -> str | None:
        """The name of who holds a key; None for a wrong one."""
        self._read_again()
        digest, found = _digest(key), None
        # All are compared, each in constant time: the time tells nothing about the keys.
        for name, known in (*self._given, *self._named):
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _read_again(self) -> None:
        if self._file is None:
            return
        stamp = _stamp(self._file)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._named = _read(self._file)
        except KeyFileError as error:
            self._say(f"{error}; the earlier keys stay")


def _stamp(file: Path) -> object:
    try:
        found = os.stat(file)
    except OSError as error:
        return str(error)
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(file: Path) -> list[tuple[str, bytes]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise KeyFileError(f"{file}: {reason.lower()}") from None
    named = []
    for n, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, key = words if len(words) == 2 else (f"key-{n}", words[0])
        if len(words) > 2 or not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
            # The line itself is not shown: it may hold a key.
            raise KeyFileError(f"{file}, line {n}: expected NAME KEY, or only KEY")
        named.append((name, _digest(key.encode())))
    if not named:
        raise KeyFileError(f"{file} has no key; write lines of NAME KEY")
    return named


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
