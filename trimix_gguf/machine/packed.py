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
_FEW = 1 << 12  # bytes unpacked at once: of zstandard each may become 32 KiB


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
        return stack.enter_context(io.BufferedReader(_Frames(raw, _zstandard(file))))
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


class _Frames(io.RawIOBase):
    """Frames of zstandard as a stream; EOFError where one is cut, which its own reader hides."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw, self._unpacker = raw, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = b""
            if self._frame is not None and self._frame.eof:
                packed, self._frame = self._frame.unused_data, None
            packed = packed or self._raw.read(_FEW)
            if not packed and self._frame is None:
                return 0
            if not packed:
                raise EOFError("it ends within a frame of zstandard")
            self._frame = self._frame or self._unpacker.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(packed))
        n = min(len(buffer), len(self._unpacked))
        buffer[:n], self._unpacked = self._unpacked[:n], self._unpacked[n:]
        return n


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
