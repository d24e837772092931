"""Files that are complete or absent."""

import glob
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ByteProgress = Callable[[str, int, int], None]  # what is worked at, bytes done, bytes in all
Advance = Callable[[str, int], None]  # what is worked at, bytes just done

_numbers = itertools.count()
_PAUSES = (0.05, 0.1, 0.2, 0.4)  # seconds: a virus scanner is done by then


def advancing(progress: ByteProgress | None, total: int) -> Advance:
    """What gets the bytes just done, and tells `progress` how many of `total` they make."""
    done = 0

    def advance(what: str, n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(what, done, total)

    return advance


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
def temporary_path(out: Path, suffix: str) -> Iterator[Path]:
    """Yield a path beside `out`, only for this block, so that renaming is atomic; then gone.

    It is for a file or a folder. What processes left there that were killed is removed first.
    """
    for left, pid in _unfinished(out):
        if left.name.endswith(f".{suffix}") and not psutil.pid_exists(pid):
            _discard(left)
    # A number for each: threads of one process may write the same file.
    path = out.with_name(f".{out.name}.{os.getpid()}-{next(_numbers)}.{suffix}")
    try:
        yield path
    finally:
        _discard(path)


def writer_of(out: Path) -> int | None:
    """The process, other than this one, that is writing `out` at this moment; None for none."""
    others = {pid for _, pid in _unfinished(out)} - {os.getpid()}
    return next((pid for pid in sorted(others) if psutil.pid_exists(pid)), None)


def _unfinished(out: Path) -> Iterator[tuple[Path, int]]:
    """What temporary_path has given for `out`, to any process, and which one that was."""
    form = re.compile(rf"\.{re.escape(out.name)}\.(\d+)(-\d+)?\.\w+")
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.*"):
        if (match := form.fullmatch(path.name)) is not None:
            yield path, int(match[1])


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `out` once the block is done, or is gone.

    Readers see the old file or the new one. Raises OSError.
    """
    with temporary_path(out, "part") as unfinished:
        yield unfinished
        place_flushed(unfinished, out)


def write_bytes(out: Path, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    with whole_file(out) as unfinished:
        unfinished.write_bytes(content)


def write_text(out: Path, text: str) -> None:
    """Write a small file in UTF-8, whole or not at all, with the same line ends everywhere."""
    write_bytes(out, text.encode())
