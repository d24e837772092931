"""A model in several files: X-00001-of-00003.gguf and those beside it, as llama.cpp names them.

The first stands for all. What is said here goes by names; read_gguf looks inside.
"""

import re
from collections.abc import Sequence
from pathlib import Path

_FIRST = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """Every file of a model, the first one first; of a model in one file just that."""
    found = _FIRST.fullmatch(path.name)
    if found is None or int(found[2]) == 0:
        return [path]
    return [path.with_name(name) for name in part_names(found[1], int(found[2]))]


def part_names(stem: str, n: int) -> Sequence[str]:
    """What the `n` files of a model are called."""
    return [f"{stem}-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]


def is_here(path: Path) -> bool:
    """Whether each of a model's files is there."""
    return all(part.is_file() for part in parts_of(path))


def n_bytes_of(path: Path) -> int:
    """Bytes of all of a model's files. Raises OSError where one is not there."""
    return sum(part.stat().st_size for part in parts_of(path))
