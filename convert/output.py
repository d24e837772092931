"""Outputs of a conversion: complete or absent, and refused early where they cannot be written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.files import whole_file, writer_of
from trimix_gguf.machine.parts import parts_of


@contextmanager
def whole_output(out: Path, *, n_bytes: int, force: bool) -> Iterator[Path]:
    """Yield a temporary path beside `out`, and rename it to `out` once the block is done.

    `n_bytes` is the most that will be written. On any failure, Ctrl-C included, nothing is left;
    after a kill the temporary file is, and the next run for the same `out` removes it.
    Raises ConversionError where `out` exists without `force`, another process is writing it, or
    the disk is too small.
    """
    refuse_existing(out, force)
    check_free_space(out.parent, n_bytes)
    try:
        with whole_file(out) as partial:
            partial.touch()  # others see that it is being written
            refuse_second(out)
            yield partial
            refuse_existing(out, force)  # it may have come while this one was written
    except OSError as error:
        raise ConversionError(f"cannot write {out}: {error.strerror or error}") from error


def refuse_existing(out: Path, force: bool) -> None:
    """Raise ConversionError where `out` is a folder, or a file that may not be replaced."""
    if out.is_dir():
        raise ConversionError(f"{out} is a folder; name a file")
    if out.exists() and not force:
        raise ConversionError(f"{out} exists; choose another name, or --force to replace it")


def refuse_input(out: Path, *sources: Path) -> None:
    """Raise ConversionError where `out` is a file to be read: `force` would end in its loss.

    `sources` are files, or folders of a checkpoint; a GGUF in these is no part of one.
    """
    read = (file for source in sources for file in _files_of(source) if file.is_file())
    if out.is_file() and any(out.samefile(file) for file in read):
        raise ConversionError(f"{out} is the file to be read; choose another name")


def _files_of(source: Path) -> list[Path]:
    if source.is_dir():
        return [file for file in source.iterdir() if file.suffix != ".gguf"]
    return parts_of(source)


def refuse_second(out: Path) -> None:
    """Raise ConversionError where another process is writing `out`."""
    if (pid := writer_of(out)) is not None:
        raise ConversionError(
            f"process {pid} is writing {out} at this moment; wait for it, or choose another name"
        )


def check_free_space(folder: Path, n_bytes: int) -> None:
    """Raise ConversionError where `folder` is missing or has not `n_bytes` free."""
    if not folder.is_dir():
        raise ConversionError(f"folder {folder} does not exist; create it first")
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise ConversionError(
            f"the output needs {n_bytes / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free; "
            "free some space, or choose a smaller type"
        )
