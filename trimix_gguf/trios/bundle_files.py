"""The files of a trio on their way: read, compared and written whole, where there is room."""

import errno
import hashlib
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import psutil

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.files import Advance, whole_file
from trimix_gguf.machine.hashes import CHUNK
from trimix_gguf.trios.triofile import FILENAME

TAR = ".tar"
FAT32_LIMIT = 1 << 32  # a file there has fewer bytes
_FAT32 = ("vfat", "msdos", "fat32", "fat")  # as systems call it
# What tarfile raises on bytes that are not a tar, or a damaged one.
FLAWS = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Piece:
    """One file on its way: `name` is what it is called there, `source` where it is here."""

    name: str
    n_bytes: int
    source: Path
    opener: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class BundleModel:
    """One model on its way: its file, or the parts of a split one; `sha256` is of all bytes."""

    role: str
    sha256: str
    pieces: Sequence[Piece]

    @property
    def n_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.n_bytes for piece in self.pieces)


class Reader:
    """A model's pieces as they are read one after another, and what their bytes come to."""

    def __init__(self, model: BundleModel, advance: Advance) -> None:
        self._model, self._advance = model, advance
        self._digest = hashlib.sha256()

    @contextmanager
    def opened(self, piece: Piece) -> Iterator["PieceReader"]:
        """Open a piece, and close it at the end of the block; raises TrioFileError."""
        try:
            source = piece.opener()
        except FLAWS as error:
            raise TrioFileError(f"{piece.source} cannot be read: {error}") from None
        with source:
            yield PieceReader(piece, source, self._take)

    def _take(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._advance(self._model.role, len(chunk))

    def check(self) -> None:
        """Raise TrioFileError where what was read is not what the trio file says."""
        if self._digest.hexdigest() != self._model.sha256:
            refuse_altered(self._model.pieces[0].source)


class PieceReader:
    """One piece as it is read; as much of a file as tarfile asks for."""

    def __init__(self, piece: Piece, source: IO[bytes], take: Callable[[bytes], None]) -> None:
        self._piece, self._source, self._take = piece, source, take
        self._left = piece.n_bytes

    def read(self, n: int = CHUNK) -> bytes:
        """At most n bytes more, none after the last; raises TrioFileError where it ends early."""
        n = min(n, self._left)
        try:
            chunk = self._source.read(n)
        except FLAWS as error:
            raise TrioFileError(f"{self._piece.source} cannot be read: {error}") from None
        if n and not chunk:
            raise TrioFileError(f"{self._piece.source} ends early; copy it again")
        self._left -= len(chunk)
        self._take(chunk)
        return chunk


def write_model(model: BundleModel, folder: Path, advance: Advance) -> None:
    """Write and compare one model's files; they are in `folder` all of them or none."""
    reader = Reader(model, advance)
    with ExitStack() as stack:
        for piece in model.pieces:
            unfinished = stack.enter_context(whole_file(folder / piece.name))
            with reader.opened(piece) as source, open(unfinished, "wb") as written:
                while chunk := source.read():
                    written.write(chunk)
        reader.check()


def refuse_altered(path: Path) -> NoReturn:
    """Raise TrioFileError: a file differs from what the trio file says of it."""
    raise TrioFileError(f"{path} is not what {FILENAME} says: altered or cut short; copy it again")


def check_space(folder: Path, n_bytes: int) -> None:
    """Raise TrioFileError where the disk has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise TrioFileError(
            f"the trio needs {n_bytes / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free; "
            "make room, or choose another disk"
        )


def check_file_system(target: Path, sizes: Iterable[int], is_tar: bool) -> None:
    """Raise TrioFileError where FAT32 would refuse a file, after 4 GiB of it were written."""
    largest = sum(sizes) if is_tar else max(sizes)
    if largest < FAT32_LIMIT:
        return
    here = target.resolve()
    mounts = [m for m in psutil.disk_partitions() if here.is_relative_to(m.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    if nearest is not None and nearest.fstype.lower() in _FAT32:
        raise _too_large(target)


def _too_large(target: Path) -> TrioFileError:
    mend = "format it as exFAT"
    if target.suffix.lower() == TAR:
        mend = f"export to a folder, where files are smaller, or {mend}"
    return TrioFileError(f"{target}: its disk takes no file this large (FAT32: 4 GiB); {mend}")


def cannot_write(target: Path, error: OSError) -> TrioFileError:
    """The error that says why `target` could not be written, and how to repair it."""
    if error.errno == errno.EFBIG:
        return _too_large(target)
    if error.errno == errno.ENOSPC:
        return TrioFileError(f"{target}: its disk is full; make room and run this again")
    return TrioFileError(f"cannot write {target}: {error.strerror or error}")
