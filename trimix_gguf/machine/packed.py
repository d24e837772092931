"""Packed files: .gz, .zst and .bz2, read and written as a stream."""

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from trimix_gguf.errors import DataError

PACKED = (".gz", ".zst", ".bz2")


def open_unpacked(file: Path, stack: ExitStack) -> io.BufferedReader:
    """A file's bytes, unpacked where its name says that it is packed; `stack` closes it.

    Raises OSError, and DataError where zstandard is needed and absent.
    """
    raw = stack.enter_context(file.open("rb"))
    packing = file.suffix.lower()
    if packing == ".gz":
        return io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=raw)))
    if packing == ".bz2":
        return io.BufferedReader(stack.enter_context(bz2.BZ2File(raw)))
    if packing == ".zst":
        unpacker = _zstandard(file).ZstdDecompressor()
        reader = unpacker.stream_reader(raw, read_across_frames=True)
        return stack.enter_context(io.BufferedReader(reader))
    return raw


@contextmanager
def packing_writer(path: Path, name: Path) -> Iterator[BinaryIO]:
    """Write `path`, packed as the ending of `name` says. The same bytes give the same file."""
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("wb"))
        packing = name.suffix.lower()
        writer: object = raw
        if packing == ".gz":
            writer = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        elif packing == ".bz2":
            writer = stack.enter_context(bz2.BZ2File(raw, "wb"))
        elif packing == ".zst":
            packer = _zstandard(name).ZstdCompressor()
            writer = stack.enter_context(packer.stream_writer(raw, closefd=False))
        yield cast(BinaryIO, writer)


def damage(file: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    packed = [_zstandard(file).ZstdError] if file.suffix.lower() == ".zst" else []
    return (OSError, EOFError, zlib.error, *packed)


def _zstandard(file: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{file.name} needs zstandard: pip install zstandard, or pack it as .gz"
        ) from None
    return zstandard
