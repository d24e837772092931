"""SHA-256 of files; of large ones kept, as long as the file is not written again.

A model in several files has one: that of their bytes, one file after another.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.folders import cache_folder
from trimix_gguf.machine.parts import n_bytes_of, parts_of
from trimix_gguf.machine.typed_json import parse

CHUNK = 1 << 20  # bytes read at once
_MOST_KEPT = 200


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


def kept_sha256(path: Path) -> str:
    """The same, read again only when a file's size or time of writing has changed.

    Raises OSError where the file cannot be read. Where nothing can be kept, it is read each time.
    """
    facts = [part.stat() for part in parts_of(path)]
    state = [number for f in facts for number in (f.st_size, f.st_mtime_ns, f.st_ino)]
    kept, name = _read(), str(path.resolve())
    known = kept.get(name)
    if isinstance(known, list) and known[:-1] == state and isinstance(known[-1], str):
        return known[-1]
    digest = sha256_of(path)
    kept = {**{k: v for k, v in kept.items() if k != name}, name: [*state, digest]}
    with suppress(OSError, RuntimeError):
        file = _path()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(dict(list(kept.items())[-_MOST_KEPT:]), indent=1))
    return digest


def same_content(one: Path, other: Path) -> bool:
    """Whether two models are one, or hold the same bytes. Raises OSError where one is not there."""
    parts, others = parts_of(one), parts_of(other)
    pairs = zip(parts, others, strict=False)
    if len(parts) == len(others) and all(a.samefile(b) for a, b in pairs):
        return True
    return n_bytes_of(one) == n_bytes_of(other) and kept_sha256(one) == kept_sha256(other)


def _path() -> Path:
    return cache_folder() / "hashes.json"


def _read() -> dict[str, Any]:
    try:
        kept = parse(_path().read_text(encoding="utf-8"), object)
    except (OSError, ValueError, RuntimeError):
        return {}
    return kept if isinstance(kept, dict) else {}
