"""The files of a trio on their way: read, compared and written whole, where there is room."""

import errno
import hashlib
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import psutil

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.files import ByteProgress, whole_file
from trimix_gguf.trios.store import CHUNK
from trimix_gguf.trios.triofile import FILENAME

TAR = ".tar"
FAT32_LIMIT = 1 << 32  # a file there has fewer bytes
_FAT32 = ("vfat", "msdos", "fat32", "fat")  # as systems call it
# What tarfile raises on bytes that are not a tar, or a damaged one.
FLAWS = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError)

Advance = Callable[[str, int], None]  # what is read, bytes just read


@dataclass(frozen=True)
class BundleFile:
    """One model's file on its way: `name` is what it is called there, `source` where it is here."""

    role: str
    name: str
    n_bytes: int
    sha256: str
    source: Path
    open: Callable[[], IO[bytes]]


class Reader:
    """A file as it is read, with what its bytes come to; as much of a file as tarfile asks for."""

    def __init__(self, file: BundleFile, source: IO[bytes], advance: Advance) -> None:
        self._file, self._source, self._advance = file, source, advance
        self._digest = hashlib.sha256()
        self._left = file.n_bytes

    @classmethod
    @contextmanager
    def of(cls, file: BundleFile, advance: Advance) -> Iterator["Reader"]:
        """Open a file, and close it at the end of the block; raises TrioFileError."""
        try:
            source = file.open()
        except FLAWS as error:
            raise TrioFileError(f"{file.source} cannot be read: {error}") from None
        with source:
            yield cls(file, source, advance)

    def read(self, n: int = CHUNK) -> bytes:
        """At most n bytes more, none after the last; raises TrioFileError where it ends early."""
        n = min(n, self._left)
        try:
            chunk = self._source.read(n)
        except FLAWS as error:
            raise TrioFileError(f"{self._file.source} cannot be read: {error}") from None
        if n and not chunk:
            raise TrioFileError(f"{self._file.source} ends early; copy it again")
        self._left -= len(chunk)
        self._digest.update(chunk)
        self._advance(self._file.role, len(chunk))
        return chunk

    def check(self) -> None:
        """Raise TrioFileError where what was read is not what the trio file says."""
        if self._digest.hexdigest() != self._file.sha256:
            refuse_altered(self._file.source)


def write_file(file: BundleFile, out: Path, advance: Advance) -> None:
    """Write and compare one file; it is at `out` whole or not at all."""
    with (
        whole_file(out) as unfinished,
        Reader.of(file, advance) as reader,
        open(unfinished, "wb") as written,
    ):
        while chunk := reader.read():
            written.write(chunk)
        reader.check()


def advancing(progress: ByteProgress | None, total: int) -> Advance:
    """What gets the bytes just read, and tells `progress` how many of `total` they make."""
    done = 0

    def advance(what: str, n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(what, done, total)

    return advance


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


def check_file_system(target: Path, sizes: dict[str, int], is_tar: bool) -> None:
    """Raise TrioFileError where FAT32 would refuse a file, after 4 GiB of it were written."""
    largest = sum(sizes.values()) if is_tar else max(sizes.values())
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
