"""A trio of files that are here already: by links and paths, without copies."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.parts import n_bytes_of, part_names, parts_of
from trimix_gguf.trios.store import SHIPPED, arriving, installed_folder
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

_DIGEST = re.compile(r"(?:sha256-)?([0-9a-f]{64})")  # how Ollama and the hub's cache name files


def create(
    name: str, files: Mapping[str, Path], *, languages: Sequence[str] = (), description: str = ""
) -> tuple[TrioFile, dict[str, Any]]:
    """Install a trio of three files; it, and what convert.check says of them.

    A `small_cpt` that is an adapter is taken as one over `small_base`. A file on the disk of the
    store gets a second name there (a hard link), so that it stays when its owner deletes it; any
    other is named by its path. Raises TrioFileError where the name is taken, ModelFileError and
    VocabularyMismatch where they make no trio.
    """
    from trimix_gguf.convert.check import check_trio

    target = installed_folder(name)
    if name == SHIPPED or target.exists():
        raise TrioFileError(f"a trio {name} is here already; choose another name")
    report = check_trio(
        large_ins=files["large_ins"], small_cpt=files["small_cpt"], small_base=files["small_base"]
    )
    adapter = report["models"]["small_cpt"]["type"] == "adapter"
    try:
        with arriving(name) as hidden:
            models = {role: _entry(path, hidden, role) for role, path in files.items()}
            if adapter:
                models["small_cpt"] = replace(models["small_cpt"], adapter_of="small_base")
            trio = TrioFile(
                hidden, name, models, languages=tuple(languages), description=description
            )
            trio.write()
    except OSError as error:
        reason = error.strerror or error
        raise TrioFileError(f"cannot write {target}: {reason}; mend that and try again") from None
    return TrioFile.read(target / trio.filename), report


def _entry(path: Path, folder: Path, role: str) -> ModelEntry:
    parts = parts_of(path)
    names = [f"{role}.gguf"] if len(parts) == 1 else part_names(role, len(parts))
    named = _DIGEST.fullmatch(path.resolve().name) if len(parts) == 1 else None
    return ModelEntry(
        path=names[0] if _link(parts, folder, names) else str(path.absolute()),
        sha256=None if named is None else named[1],
        n_bytes=n_bytes_of(path),
    )


def _link(parts: Sequence[Path], folder: Path, names: Sequence[str]) -> bool:
    """Give files second names in a folder; False, and none, where the system does not let one."""
    made: list[Path] = []
    try:
        for part, name in zip(parts, names, strict=True):
            os.link(part.resolve(), folder / name)
            made.append(folder / name)
    except (OSError, AttributeError):  # another disk, or a system without links
        for path in made:
            path.unlink()
        return False
    return True
