"""SHA-256 of files; of large ones kept, as long as the file is not written again.

A model in several files has one: that of their bytes, one file after another.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from trimix_gguf.machine.notes import read_table, write_note
from trimix_gguf.machine.parts import n_bytes_of, parts_of

CHUNK = 1 << 20  # bytes read at once
_MOST_KEPT = 200
_NOTE = "hashes.json"


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """A file's SHA-256 in hexadecimal; `progress` gets the number of bytes just read.

    Where `path` is the first part of a split model, all parts are read.
    """
    digest = hashlib.sha256()
    for part in parts_of(path):
        with open(part, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                if progress is not None:
                    progress(len(chunk))
    return digest.hexdigest()


def state_of(path: Path) -> list[int]:
    """Numbers that change when one of a model's files is written again. Raises OSError.

    A copy may bring the time of writing with it; the time of change is the file system's own.
    """
    facts = [part.stat() for part in parts_of(path)]
    return [n for f in facts for n in (f.st_size, f.st_mtime_ns, f.st_ctime_ns, f.st_ino)]


def kept_sha256(path: Path) -> str:
    """The same, read again only when state_of the file has changed.

    Raises OSError where the file cannot be read. Where nothing can be kept, it is read each time.
    """
    state = state_of(path)
    kept, name = read_table(_NOTE), str(path.resolve())
    known = kept.get(name)
    if isinstance(known, list) and known[:-1] == state and isinstance(known[-1], str):
        return known[-1]
    digest = sha256_of(path)
    kept = {**{k: v for k, v in kept.items() if k != name}, name: [*state, digest]}
    write_note(_NOTE, json.dumps(dict(list(kept.items())[-_MOST_KEPT:]), indent=1))
    return digest


def same_content(one: Path, other: Path) -> bool:
    """Whether two models are one, or hold the same bytes. Raises OSError where one is not there."""
    parts, others = parts_of(one), parts_of(other)
    pairs = zip(parts, others, strict=False)
    if len(parts) == len(others) and all(a.samefile(b) for a, b in pairs):
        return True
    return n_bytes_of(one) == n_bytes_of(other) and kept_sha256(one) == kept_sha256(other)
