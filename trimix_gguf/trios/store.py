"""The trios of this machine: where they live, what a name means, and which could be pulled."""

import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.files import ByteProgress, advancing, put_in_place
from trimix_gguf.machine.folders import home_folder
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.machine.parts import is_here, n_bytes_of
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import NANO, trio_paths
from trimix_gguf.trios.names import check_name
from trimix_gguf.trios.triofile import FILENAME, ModelEntry, TrioFile

SHIPPED = "nano"
PRESETS = Path(__file__).parent / "presets.toml"
_TEMPORARY = re.compile(r"\.(?:import|remove)-(\d+)-(\d+)-")


def trios_folder() -> Path:
    """The folder of pulled and imported trios, below $TRIMIX_HOME; it need not exist yet.

    Raises TrioFileError where there is no home folder.
    """
    try:
        return home_folder() / "trios"
    except RuntimeError:
        raise TrioFileError("there is no home folder; set TRIMIX_HOME to one for trios") from None


def installed() -> list[str]:
    """Names of the trios that were pulled or imported, in order; not the shipped one."""
    return sorted(file.parent.name for file in trios_folder().glob(f"[!.]*/{FILENAME}"))


def installed_folder(name: str) -> Path:
    """Where a trio of that name is, or would be; raises TrioFileError for what cannot be a name."""
    return trios_folder() / check_name(name)


def resolve(text: str) -> TrioFile:
    """The trio that a user means: one by name, a trio file, or a folder of one.

    A name goes before a folder here that is called the same; ./NAME is the folder. Raises
    TrioFileError, with the nearest name where nothing fits; ModelFileError for a folder of none.
    """
    if text == SHIPPED:
        return TrioFile.read(NANO / FILENAME)
    if text in installed():
        return TrioFile.read(installed_folder(text) / FILENAME)
    path = Path(text)
    if text and path.is_dir():
        return read_folder(path)
    if text and path.exists():
        return TrioFile.read(path)
    known = presets()
    if text in known:
        raise TrioFileError(f"trio {text} is not here yet; `trimix pull {text}` fetches it")
    hint = nearest_trio(text, [SHIPPED, *installed(), *known])
    raise TrioFileError(
        f"{text or 'no name'}: no trio of that name, and no such file or folder; {hint}"
    )


def nearest_trio(text: str, known: Sequence[str], n: int = 1) -> str:
    """What to try where no trio is called `text`: at most `n` names like it, or the list."""
    near = get_close_matches(text, known, n)
    return f"did you mean {' or '.join(near)}?" if near else "`trimix list` names what there is"


def read_folder(folder: Path) -> TrioFile:
    """The trio of a folder: by its trio.toml, or three GGUF files named after their roles."""
    if (folder / FILENAME).is_file():
        return TrioFile.read(folder / FILENAME)
    models: dict[str, ModelEntry] = {
        role: ModelEntry(path=path.name) for role, path in trio_paths(folder).items()
    }
    try:
        name = check_name(folder.resolve().name)
    except TrioFileError:
        name = "trio"
    return TrioFile(folder=folder, name=name, models=models)


def remove(name: str) -> None:
    """Delete an installed trio, at once for all who look; raises TrioFileError, OSError."""
    if name == SHIPPED:
        raise TrioFileError(f"{SHIPPED} ships in the package and cannot be removed")
    folder = installed_folder(name)
    if not folder.is_dir():
        hint = nearest_trio(name, installed())
        raise TrioFileError(f"trio {name} is not installed; {hint}")
    clear_leftovers()
    if folder.is_symlink():
        folder.unlink()
        return
    hidden = temporary_folder("remove", name)
    put_in_place(folder, hidden)
    shutil.rmtree(hidden)


# -- what is being made or taken away ---------------------------------------------------------


def temporary_folder(kind: str, name: str) -> Path:
    """A path in the store, only for this process, for a trio that is not there yet or any more.

    `kind` is 'import' or 'remove'. It is a hidden name, so no trio has it.
    """
    return trios_folder() / f".{kind}-{os.getpid()}-{_started(os.getpid())}-{name}"


@contextmanager
def arriving(name: str) -> Iterator[Path]:
    """Yield a hidden folder for a trio, which gets its name at the end of the block, or is gone."""
    clear_leftovers()
    hidden = temporary_folder("import", name)
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield hidden
        put_in_place(hidden, installed_folder(name))
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers() -> None:
    """Delete what processes left that were killed at work in the store."""
    for path in trios_folder().glob(".*-*"):
        match = _TEMPORARY.match(path.name)
        if match is not None and not _alive(int(match[1]), int(match[2])):
            shutil.rmtree(path, ignore_errors=True)  # another process may be at it as well


def _started(pid: int) -> int:
    return int(psutil.Process(pid).create_time())


def _alive(pid: int, started: int) -> bool:
    """Whether that process still runs, and is not another one with its number."""
    try:
        return pid != os.getpid() and abs(_started(pid) - started) <= 2  # the clock may be set
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's, on Windows
        return True


# -- whether files are what they were ---------------------------------------------------------


def verify(trio: TrioFile, progress: ByteProgress | None = None) -> dict[str, str]:
    """Each model's state: 'whole', 'altered', 'missing', or 'no sha256' to compare with."""
    states = dict.fromkeys(trio.models, "missing")
    here = {role: path for role in trio.models if is_here(path := trio.path(role))}
    for role, path in here.items():
        entry = trio.models[role]
        same_size = entry.n_bytes in (None, n_bytes_of(path))
        states[role] = "to read" if same_size and entry.sha256 else "no sha256"
        if not same_size:
            states[role] = "altered"
    to_read = [role for role, state in states.items() if state == "to read"]
    advance = advancing(progress, sum(n_bytes_of(here[role]) for role in to_read))
    for role in to_read:
        same = sha256_of(here[role], partial(advance, role)) == trio.models[role].sha256
        states[role] = "whole" if same else "altered"
    return states


# -- what could be pulled ---------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """A trio that can be pulled, as it will be installed; `sizes` are about the models' bytes."""

    trio: TrioFile
    sizes: dict[str, int]

    @property
    def n_bytes(self) -> int:
        """About what all of it takes."""
        return sum(self.sizes.values())

    @property
    def whole(self) -> bool:
        """Whether all of its models are published; else small_cpt must be one's own."""
        return self.trio.models["small_cpt"].repo is not None

    @property
    def licences(self) -> list[str]:
        """Of its models, each once."""
        return sorted({e.licence for e in self.trio.models.values() if e.licence is not None})


def presets() -> dict[str, Preset]:
    """Every pair of models in every language, by name; those that are whole come first."""
    table = tomllib.loads(PRESETS.read_text(encoding="utf-8"))
    made = [
        _preset(table, pair, code)
        for pair in table["pairs"]
        for code in table["languages"]
    ]  # fmt: skip
    return {p.trio.name: p for p in sorted(made, key=lambda p: not p.whole)}


def preset_to_pull(text: str) -> Preset | None:
    """The preset that a user means by this name; None where resolve() finds something here."""
    if text in installed() or (text and Path(text).exists()):
        return None
    return presets().get(text)


def _preset(table: dict[str, Any], pair: str, code: str) -> Preset:
    small, large = table["pairs"][pair]
    language, models = table["languages"][code], table["models"]
    repo = table["cpt"].get(small, {}).get(code)
    published = {
        "large_ins": {**models[large]},
        # Trained further from small_base: its licence and its size.
        "small_cpt": {**models[small], "repo": repo},
        "small_base": {**models[small]},
    }
    sizes = {role: int(entry.pop("gb") * 1e9) for role, entry in published.items()}
    if repo is None:
        base = models[small]["repo"]
        description = f"{language}; needs your own small_cpt: {base} trained further on {language}"
    else:
        description = " ".join([language, table["scripts"].get(code, "")]).strip()
    trio = TrioFile(
        folder=installed_folder(f"{pair}-{code}"),
        name=f"{pair}-{code}",
        languages=(code,),
        description=description,
        n_ctx=table["n_ctx"],
        models={role: ModelEntry(path=f"{role}.gguf", **published[role]) for role in ROLES},
    )
    return Preset(trio, sizes)
