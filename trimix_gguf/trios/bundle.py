"""Carry a trio to another machine: its trio.toml and its files, as a folder or a plain tar.

A bundle's trio.toml holds the SHA-256 of every file, and they lie beside it. In an exported folder
it is written last, a tar gets its name last, and an imported trio is seen once all was compared:
a run that was killed leaves no half trio, and the next one completes it.
"""

import io
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.files import ByteProgress, put_in_place, whole_file
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.trios.bundle_files import (
    FLAWS,
    TAR,
    Advance,
    BundleFile,
    Reader,
    advancing,
    cannot_write,
    check_file_system,
    check_space,
    refuse_altered,
    write_file,
)
from trimix_gguf.trios.store import (
    SHIPPED,
    clear_leftovers,
    installed_folder,
    resolve,
    temporary_folder,
    trios_folder,
)
from trimix_gguf.trios.triofile import (
    FILENAME,
    MOST_BYTES,
    TrioFile,
    is_inside,
    parse_trio,
    to_toml,
)

_MARK = ".trio-export"  # in a folder: an export to it is under way, or was cut off


# -- export -----------------------------------------------------------------------------------


def export_trio(trio: TrioFile, target: Path, *, progress: ByteProgress | None = None) -> None:
    """Write a trio to `target`: a tar where it is called FILE.tar, else a folder of its own.

    An older or unfinished export of the trio there is brought up to date. Raises TrioFileError
    where a file is missing or altered, or where `target` holds other things or has no room.
    """
    trio.check_files()
    sizes = {role: trio.path(role).stat().st_size for role in trio.models}
    is_tar = target.suffix.lower() == TAR
    folder = target.parent if is_tar else target
    (_check_tar if is_tar else _check_folder)(trio, target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_file_system(target, sizes, is_tar)
        there = 0 if is_tar else sum(n for role, n in sizes.items() if _has(trio, target, role, n))
        check_space(folder, sum(sizes.values()) - there)
        unread = sum(n for role, n in sizes.items() if trio.models[role].sha256 is None)
        advance = advancing(progress, sum(sizes.values()) + unread)
        files = [_leaving(trio, role, n, advance) for role, n in sizes.items()]
        (_write_tar if is_tar else _write_folder)(_carried(trio, files), files, target, advance)
    except OSError as error:
        raise cannot_write(target, error) from None


def _leaving(trio: TrioFile, role: str, n_bytes: int, advance: Advance) -> BundleFile:
    entry, path = trio.models[role], trio.path(role)
    if entry.n_bytes not in (None, n_bytes):
        refuse_altered(path)
    sha256 = entry.sha256 or sha256_of(path, partial(advance, role))
    return BundleFile(role, _name(trio, role), n_bytes, sha256, path, _opener(path))


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: open(path, "rb")


def _name(trio: TrioFile, role: str) -> str:
    """A model's file in a bundle, and where one was imported."""
    return f"{role}_lora.gguf" if trio.models[role].adapter_of else f"{role}.gguf"


def _has(trio: TrioFile, folder: Path, role: str, n_bytes: int) -> bool:
    """Whether an export that was cut off has left this file, by its size."""
    path = folder / _name(trio, role)
    return path.is_file() and path.stat().st_size == n_bytes


def _carried(trio: TrioFile, files: Sequence[BundleFile]) -> TrioFile:
    """The trio file that goes with the files."""
    for file in files:
        changes = {"path": file.name, "sha256": file.sha256, "n_bytes": file.n_bytes}
        trio = trio.with_model(file.role, **changes)
    return replace(trio, filename=FILENAME)


def _check_tar(trio: TrioFile, target: Path) -> None:
    """Raise TrioFileError where `target` is anything but an older bundle."""
    if target.is_dir():
        raise TrioFileError(f"{target} is a folder; name a file, or a folder without {TAR}")
    if target.exists() and target.stat().st_size:
        try:
            with tarfile.open(target, "r:") as tar:
                first = tar.next()
        except FLAWS:
            first = None
        if first is None or first.name != FILENAME:
            raise TrioFileError(f"{target} exists and is not an exported trio; choose another name")


def _check_folder(trio: TrioFile, target: Path) -> None:
    """Raise TrioFileError where `target` holds anything but an export of this trio."""
    if not target.is_dir():
        if target.exists():
            raise TrioFileError(f"{target} is a file; name a folder, or a FILE{TAR}")
        return
    if target.samefile(trio.folder):
        raise TrioFileError(f"{target} is where the trio is; name another folder")
    if (target / FILENAME).is_file():
        other = TrioFile.read(target / FILENAME).name
        if other != trio.name:
            raise TrioFileError(f"{target} holds the trio {other}; name another folder")
    elif any(target.iterdir()) and not (target / _MARK).exists():
        example = target / trio.name
        raise TrioFileError(f"{target} holds other files; name an empty folder, such as {example}")


def _write_folder(
    trio: TrioFile, files: Sequence[BundleFile], folder: Path, advance: Advance
) -> None:
    (folder / _MARK).touch()
    (folder / FILENAME).unlink(missing_ok=True)  # no bundle until all of it is there
    for file in files:
        if _has(trio, folder, file.role, file.n_bytes) and (
            sha256_of(folder / file.name) == file.sha256
        ):
            advance(file.role, file.n_bytes)
        else:
            write_file(file, folder / file.name, advance)
    replace(trio, folder=folder).write()
    (folder / _MARK).unlink()


def _write_tar(trio: TrioFile, files: Sequence[BundleFile], target: Path, advance: Advance) -> None:
    text = to_toml(trio).encode()
    with whole_file(target) as unfinished, tarfile.open(unfinished, mode="w") as tar:
        tar.addfile(_member(FILENAME, len(text)), io.BytesIO(text))
        for file in files:
            with Reader.of(file, advance) as reader:
                tar.addfile(_member(file.name, file.n_bytes), reader)
                reader.check()


def _member(name: str, n_bytes: int) -> tarfile.TarInfo:
    """A plain file of nobody's, of no time: the same trio gives the same tar."""
    member = tarfile.TarInfo(name)
    member.size = n_bytes
    return member


# -- import -----------------------------------------------------------------------------------


def import_trio(
    source: Path, *, name: str | None = None, progress: ByteProgress | None = None
) -> TrioFile:
    """Install the trio of a bundle, under `name` or its own; the installed one's trio file.

    Where just this trio is installed already, it stays as it is. Raises TrioFileError where the
    bundle is incomplete, altered or unsafe, the name is taken, or the disk is too small.
    """
    with (_open_folder if source.is_dir() else _open_tar)(source) as (trio, files):
        name = trio.name if name is None else name
        target = installed_folder(name)
        if name == SHIPPED:
            return _shipped(files)
        if target.exists():
            return _installed_already(target, files)
        clear_leftovers()
        temporary = temporary_folder("import", name)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            n_bytes = sum(file.n_bytes for file in files)
            check_space(trios_folder(), n_bytes)
            advance = advancing(progress, n_bytes)
            for file in files:
                write_file(file, temporary / file.name, advance)
            trio = replace(_carried(trio, files), name=name, folder=temporary)
            trio.write()
            put_in_place(temporary, target)
        except OSError as error:
            raise cannot_write(target, error) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return replace(trio, folder=target)


def _shipped(files: Sequence[BundleFile]) -> TrioFile:
    """The shipped trio, where its files are these; else raises TrioFileError."""
    there = resolve(SHIPPED)
    if _hashes(there) != {file.role: file.sha256 for file in files}:
        raise TrioFileError(f"{SHIPPED} ships in the package; choose another --name")
    return there


def _hashes(trio: TrioFile) -> dict[str, str | None]:
    return {role: entry.sha256 for role, entry in trio.models.items()}


def _installed_already(target: Path, files: Sequence[BundleFile]) -> TrioFile:
    """The trio in `target`, where its files are these; else raises TrioFileError."""
    if (target / FILENAME).is_file():
        there = TrioFile.read(target / FILENAME)
        if _hashes(there) == {file.role: file.sha256 for file in files} and not there.missing():
            return there
    raise TrioFileError(
        f"another trio {target.name} is here, or a part of one; give --name, or "
        f"`trimix remove {target.name}` first"
    )


@contextmanager
def _open_folder(folder: Path) -> Iterator[tuple[TrioFile, list[BundleFile]]]:
    """The trio of a bundle's folder, and its files; raises TrioFileError."""
    trio = TrioFile.read(folder / FILENAME, inside=True)
    sizes, openers = {}, {}
    for role, entry in trio.models.items():
        path = folder
        for step in Path(entry.path).parts:
            path /= step
            if path.is_symlink():
                raise TrioFileError(f"{path} is a link; an export has only plain files")
        if not path.exists():
            raise TrioFileError(f"{path} is missing; export the trio again")
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise TrioFileError(f"{path} is not a plain file; an export has only plain files")
        sizes[role], openers[role] = path.stat().st_size, _opener(path)
    yield trio, _arriving(trio, sizes, openers)


@contextmanager
def _open_tar(file: Path) -> Iterator[tuple[TrioFile, list[BundleFile]]]:
    """The trio of a bundle's tar, and its files; raises TrioFileError."""
    if not file.is_file():
        raise TrioFileError(f"{file}: no such file or folder")
    try:
        tar = tarfile.open(file, "r:")  # noqa: SIM115  # closed below
    except FLAWS as error:
        raise TrioFileError(
            f"{file} is not a plain tar ({error}); was it copied completely?"
        ) from None
    with tar:
        members = _plain_members(tar, file)
        trio = _read_manifest(tar, members, file)
        sizes, openers = {}, {}
        for role, entry in trio.models.items():
            member = members.get(entry.path)
            if member is None:
                raise TrioFileError(f"{file} ends before {entry.path}; copy or export it again")
            sizes[role], openers[role] = member.size, partial(_extract, tar, member)
        named = {FILENAME, *(entry.path for entry in trio.models.values())}
        if unknown := members.keys() - named:
            raise TrioFileError(
                f"{file} holds {min(unknown)!r}, which its {FILENAME} does not name"
            )
        yield trio, _arriving(trio, sizes, openers)


def _plain_members(tar: tarfile.TarFile, file: Path) -> dict[str, tarfile.TarInfo]:
    """What a tar holds, by name: plain files inside it, each once; raises TrioFileError."""
    try:
        listed = tar.getmembers()
    except FLAWS as error:
        raise TrioFileError(f"{file} is truncated or altered ({error}); copy it again") from None
    members: dict[str, tarfile.TarInfo] = {}
    for member in listed:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
            raise TrioFileError(f"{file}: {member.name!r} is not a plain file; refused")
        if not is_inside(member.name):
            raise TrioFileError(f"{file}: {member.name!r} leads out of the bundle; refused")
        if member.name in members:
            raise TrioFileError(f"{file} holds {member.name!r} twice; refused")
        members[member.name] = member
    return members


def _read_manifest(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], file: Path
) -> TrioFile:
    member = members.get(FILENAME)
    if member is None or member.size > MOST_BYTES:
        raise TrioFileError(f"{file} has no {FILENAME}, so it is not a trio")
    try:
        text = _extract(tar, member).read().decode()
    except FLAWS as error:
        raise TrioFileError(f"{file}: {FILENAME} cannot be read: {error}") from None
    return parse_trio(text, file / FILENAME, inside=True)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    opened = tar.extractfile(member)
    assert opened is not None  # a plain file
    return opened


def _arriving(
    trio: TrioFile, sizes: Mapping[str, int], openers: Mapping[str, Callable[[], IO[bytes]]]
) -> list[BundleFile]:
    """The files of a bundle by its trio file; raises TrioFileError where they are not those."""
    files = []
    for role, entry in trio.models.items():
        if entry.sha256 is None:
            raise TrioFileError(
                f"{trio.file}: models.{role}.sha256 is missing; `trimix export` makes a bundle "
                "with all of them"
            )
        source = trio.folder / entry.path
        if entry.n_bytes not in (None, sizes[role]):
            refuse_altered(source)
        name, n_bytes = _name(trio, role), sizes[role]
        files.append(BundleFile(role, name, n_bytes, entry.sha256, source, openers[role]))
    return files
