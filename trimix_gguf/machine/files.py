"""Files that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_file(out: Path, suffix: str) -> Iterator[Path]:
    """Yield a path for `out`'s sake in the same folder, so that renaming is atomic; then gone."""
    path = out.with_name(f".{out.name}.{suffix}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
