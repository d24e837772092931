"""Carry a trio to another machine: its trio.toml and its files, as a folder or a plain tar.

A bundle's trio.toml holds the SHA-256 of every file, and they lie beside it. In an exported folder
it is written last, a tar gets its name last, and an imported trio is seen once all was compared:
a run that was killed leaves no half trio, and the next one completes it.
"""

import io
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.files import Advance, ByteProgress, advancing, whole_file
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.machine.parts import is_here, n_bytes_of, part_names, parts_of
from trimix_gguf.trios.bundle_files import (
    TAR,
    BundleModel,
    Piece,
    Reader,
    cannot_write,
    check_file_system,
    check_space,
    refuse_altered,
    write_model,
)
from trimix_gguf.trios.plain_tar import Member, first_name, read_members
from trimix_gguf.trios.store import (
    SHIPPED,
    arriving,
    installed_folder,
    resolve,
    trios_folder,
    verify,
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
    _check_inside(trio)
    sizes = {role: n_bytes_of(trio.path(role)) for role in trio.models}
    is_tar = target.suffix.lower() == TAR
    folder = target.parent if is_tar else target
    (_check_tar if is_tar else _check_folder)(trio, target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pieces = (part.stat().st_size for r in trio.models for part in parts_of(trio.path(r)))
        check_file_system(target, pieces, is_tar)
        there = 0 if is_tar else sum(n for role, n in sizes.items() if _has(trio, target, role, n))
        check_space(folder, sum(sizes.values()) - there)
        unread = sum(n for role, n in sizes.items() if trio.models[role].sha256 is None)
        advance = advancing(progress, sum(sizes.values()) + unread)
        models = [_leaving(trio, role, n, advance) for role, n in sizes.items()]
        (_write_tar if is_tar else _write_folder)(_carried(trio, models), models, target, advance)
    except OSError as error:
        raise cannot_write(target, error) from None


def _check_inside(trio: TrioFile) -> None:
    """Raise TrioFileError where a model is not in the trio's folder.

    A trio file may come from others: what it names elsewhere could be any file of the user's.
    """
    folder = trio.folder.resolve()
    for role in trio.models:
        for part in parts_of(trio.path(role)):
            if not part.resolve().is_relative_to(folder):
                raise TrioFileError(
                    f"{trio.file}: models.{role}: {part} is not in the trio's folder, or leads out "
                    "of it by a link; copy the file there (a hard link will do), and name it so"
                )


def _leaving(trio: TrioFile, role: str, n_bytes: int, advance: Advance) -> BundleModel:
    entry, path = trio.models[role], trio.path(role)
    if entry.n_bytes not in (None, n_bytes):
        refuse_altered(path)
    sha256 = entry.sha256 or sha256_of(path, partial(advance, role))
    parts = parts_of(path)
    names = _names(trio, role)
    pieces = [
        Piece(name, part.stat().st_size, part, _opener(part))
        for name, part in zip(names, parts, strict=True)
    ]
    return BundleModel(role, sha256, pieces)


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: open(path, "rb")


def _names(trio: TrioFile, role: str) -> Sequence[str]:
    """A model's files in a bundle, and where one was imported."""
    stem = f"{role}_lora" if trio.models[role].adapter_of else role
    n_parts = len(parts_of(trio.path(role)))
    return [f"{stem}.gguf"] if n_parts == 1 else part_names(stem, n_parts)


def _has(trio: TrioFile, folder: Path, role: str, n_bytes: int) -> bool:
    """Whether an export that was cut off has left this model, by its size."""
    path = folder / _names(trio, role)[0]
    return is_here(path) and n_bytes_of(path) == n_bytes


def _carried(trio: TrioFile, models: Sequence[BundleModel]) -> TrioFile:
    """The trio file that goes with the models."""
    for model in models:
        changes = {"path": model.pieces[0].name, "sha256": model.sha256, "n_bytes": model.n_bytes}
        trio = trio.with_model(model.role, **changes)
    return replace(trio, filename=FILENAME)


def _check_tar(trio: TrioFile, target: Path) -> None:
    """Raise TrioFileError where `target` is anything but an older bundle."""
    if target.is_dir():
        raise TrioFileError(f"{target} is a folder; name a file, or a folder without {TAR}")
    if target.exists() and target.stat().st_size and first_name(target) != FILENAME:
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
    trio: TrioFile, models: Sequence[BundleModel], folder: Path, advance: Advance
) -> None:
    (folder / _MARK).touch()
    (folder / FILENAME).unlink(missing_ok=True)  # no bundle until all of it is there
    for model in models:
        if _has(trio, folder, model.role, model.n_bytes) and (
            sha256_of(folder / model.pieces[0].name) == model.sha256
        ):
            advance(model.role, model.n_bytes)
        else:
            write_model(model, folder, advance)
    replace(trio, folder=folder).write()
    (folder / _MARK).unlink()


def _write_tar(
    trio: TrioFile, models: Sequence[BundleModel], target: Path, advance: Advance
) -> None:
    text = to_toml(trio).encode()
    with whole_file(target) as unfinished, tarfile.open(unfinished, mode="w") as tar:
        tar.addfile(_member(FILENAME, len(text)), io.BytesIO(text))
        for model in models:
            reader = Reader(model, advance)
            for piece in model.pieces:
                with reader.opened(piece) as source:
                    tar.addfile(_member(piece.name, piece.n_bytes), source)
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
    with (_open_folder if source.is_dir() else _open_tar)(source) as (trio, models):
        name = trio.name if name is None else name
        target = installed_folder(name)
        if name == SHIPPED:
            return _shipped(models)
        if target.exists():
            return _installed_already(target, trio, models, progress)
        n_bytes = sum(model.n_bytes for model in models)
        advance = advancing(progress, n_bytes)
        try:
            with arriving(name) as hidden:
                check_space(trios_folder(), n_bytes)
                for model in models:
                    write_model(model, hidden, advance)
                trio = replace(_carried(trio, models), name=name, folder=hidden)
                trio.write()
        except OSError as error:
            raise cannot_write(target, error) from None
    return replace(trio, folder=target)


def _shipped(models: Sequence[BundleModel]) -> TrioFile:
    """The shipped trio, where its models are these; else raises TrioFileError."""
    there = resolve(SHIPPED)
    if _hashes(there) != {model.role: model.sha256 for model in models}:
        raise TrioFileError(f"{SHIPPED} ships in the package; choose another --name")
    return there


def _other_settings(one: TrioFile, other: TrioFile) -> list[str]:
    """Keys of a trio file in which two differ, whatever their names and folders."""
    same = {"folder", "name", "filename"}
    keys = (field.name for field in fields(TrioFile) if field.name not in same)
    return [key for key in keys if getattr(one, key) != getattr(other, key)]


def _hashes(trio: TrioFile) -> dict[str, str | None]:
    return {role: entry.sha256 for role, entry in trio.models.items()}


def _installed_already(
    target: Path, trio: TrioFile, models: Sequence[BundleModel], progress: ByteProgress | None
) -> TrioFile:
    """The trio in `target`, where it is `trio`, with these models on the disk; or TrioFileError."""
    if (target / FILENAME).is_file():
        there = TrioFile.read(target / FILENAME)
        same = _hashes(there) == {model.role: model.sha256 for model in models}
        if same and set(verify(there, progress).values()) == {"whole"}:
            if changed := _other_settings(there, _carried(trio, models)):
                raise TrioFileError(
                    f"{target.name} is here with the same models and other settings "
                    f"({', '.join(changed)}); to take those of the export, "
                    f"`trimix remove {target.name}` first, or give --name"
                )
            return there
    raise TrioFileError(
        f"another trio {target.name} is here, a part of one, or an altered one; give --name, or "
        f"`trimix remove {target.name}` first"
    )


@contextmanager
def _open_folder(folder: Path) -> Iterator[tuple[TrioFile, list[BundleModel]]]:
    """The trio of a bundle's folder, and its models; raises TrioFileError."""
    trio = TrioFile.read(folder / FILENAME, inside=True)

    def find(name: str) -> tuple[int, Callable[[], IO[bytes]]]:
        path = folder
        for step in Path(name).parts:
            path /= step
            if path.is_symlink():
                raise TrioFileError(f"{path} is a link; an export has only plain files")
        if not path.exists():
            raise TrioFileError(f"{path} is missing; export the trio again")
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise TrioFileError(f"{path} is not a plain file; an export has only plain files")
        return path.stat().st_size, _opener(path)

    yield trio, _arriving(trio, find)


@contextmanager
def _open_tar(file: Path) -> Iterator[tuple[TrioFile, list[BundleModel]]]:
    """The trio of a bundle's tar, and its models; raises TrioFileError."""
    if not file.is_file():
        what = "neither a plain file nor a folder" if file.exists() else "no such file or folder"
        raise TrioFileError(f"{file}: {what}")
    members = _members_by_name(file)
    manifest = members.get(FILENAME)
    if manifest is None or manifest.n_bytes > MOST_BYTES:
        raise TrioFileError(f"{file} has no {FILENAME}, so it is not a trio")
    try:
        with manifest.opener() as opened:
            text = opened.read(manifest.n_bytes).decode()
    except (OSError, ValueError) as error:
        raise TrioFileError(f"{file}: {FILENAME} cannot be read: {error}") from None
    trio = parse_trio(text, file / FILENAME, inside=True)
    named = {FILENAME}

    def find(name: str) -> tuple[int, Callable[[], IO[bytes]]]:
        member = members.get(name)
        if member is None:
            raise TrioFileError(f"{file} ends before {name}; copy or export it again")
        named.add(name)
        return member.n_bytes, member.opener

    models = _arriving(trio, find)
    if unknown := members.keys() - named:
        raise TrioFileError(f"{file} holds {min(unknown)!r}, which its {FILENAME} does not name")
    yield trio, models


def _members_by_name(file: Path) -> dict[str, Member]:
    """What a tar holds: plain files inside it, each once; raises TrioFileError."""
    members: dict[str, Member] = {}
    for member in read_members(file):
        if not is_inside(member.name):
            raise TrioFileError(f"{file}: {member.name!r} leads out of the bundle; refused")
        if member.name in members:
            raise TrioFileError(f"{file} holds {member.name!r} twice; refused")
        members[member.name] = member
    return members


def _arriving(
    trio: TrioFile, find: Callable[[str], tuple[int, Callable[[], IO[bytes]]]]
) -> list[BundleModel]:
    """The models of a bundle by its trio file; raises TrioFileError where they are not those.

    `find` gives the size of a file of the bundle, and what opens it.
    """
    models = []
    for role, entry in trio.models.items():
        if entry.sha256 is None:
            raise TrioFileError(
                f"{trio.file}: models.{role}.sha256 is missing; `trimix export` makes a bundle "
                "with all of them"
            )
        pieces = []
        folder = PurePosixPath(entry.path).parent
        for name, part in zip(_names(trio, role), parts_of(trio.path(role)), strict=True):
            n_bytes, opener = find(str(folder / part.name))
            pieces.append(Piece(name, n_bytes, part, opener))
        model = BundleModel(role, entry.sha256, pieces)
        if entry.n_bytes not in (None, model.n_bytes):
            refuse_altered(trio.path(role))
        models.append(model)
    return models
