"""Files that are complete or absent."""

import glob
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ByteProgress = Callable[[str, int, int], None]  # what is worked at, bytes done, bytes in all

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


def place_flushed(source: Path, target: Path) -> None:
    """As put_in_place, for a file: readers see the old or the new one, after a power cut too."""
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    put_in_place(source, target)


@contextmanager
def temporary_file(out: Path, suffix: str) -> Iterator[Path]:
    """Yield a path beside `out`, of this process only, so that renaming is atomic; then gone.

    What processes left there that were killed is removed first.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.{suffix}"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)
    path = out.with_name(f".{out.name}.{os.getpid()}.{suffix}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `out` once the block is done, or is gone.

    Readers see the old file or the new one. Raises OSError.
    """
    with temporary_file(out, "part") as unfinished:
        yield unfinished
        place_flushed(unfinished, out)


def write_bytes(out: Path, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    with whole_file(out) as unfinished:
        unfinished.write_bytes(content)


def write_text(out: Path, text: str) -> None:
    """Write a small file in UTF-8, whole or not at all, with the same line ends everywhere."""
    write_bytes(out, text.encode())
