"""Files that are there whole or not at all."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAUSES = (0.05, 0.1, 0.2, 0.4)  # seconds: a virus scanner is done by then


def put_in_place(source: Path, target: Path) -> None:
    """Rename a file or a folder; a file that is `target` is replaced. Raises OSError.

    Windows refuses while another program has one of them open, as scanners do for a moment.
    """
    for pause in _PAUSES:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(pause)
    os.replace(source, target)


@contextmanager
def temporary_file(out: Path, suffix: str) -> Iterator[Path]:
    """Yield a path for `out`'s sake in the same folder, so that renaming is atomic; then gone."""
    path = out.with_name(f".{out.name}.{suffix}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
