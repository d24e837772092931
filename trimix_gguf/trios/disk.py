"""What uses space: trios, files elsewhere, work folders, caches; each file counts once."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimix_gguf.errors import TrioFileError
from trimix_gguf.machine.folders import cache_folder, home_folder
from trimix_gguf.machine.parts import parts_of
from trimix_gguf.trios.store import installed, trios_folder
from trimix_gguf.trios.triofile import FILENAME, TrioFile

_ADAPT = "adapt"  # in the home folder: runs of `trimix adapt`


@dataclass(frozen=True)
class Use:
    """What something takes; `frees` is less where other links lead to its files."""

    kind: str
    name: str
    path: Path
    n_bytes: int
    frees: int
    how: str


class Counting:
    """Counts files; one that was counted, under whatever name, takes nothing more."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def use(self, kind: str, name: str, path: Path, how: str, files: Iterable[Path]) -> Use:
        """What these files take that no earlier ones took."""
        links: Counter[tuple[int, int]] = Counter()
        facts = {}
        for file in files:
            try:
                fact = file.lstat()
            except OSError:
                continue  # gone meanwhile
            links[fact.st_dev, fact.st_ino] += 1
            facts[fact.st_dev, fact.st_ino] = fact
        n_bytes = sum(fact.st_size for key, fact in facts.items() if key not in self._seen)
        frees = sum(f.st_size for key, f in facts.items() if f.st_nlink <= links[key])
        self._seen |= facts.keys()
        return Use(kind, name, path, n_bytes, frees, how)


def disk_use(folders: Sequence[Path] = ()) -> list[Use]:
    """What this program's files take, and those in `folders`, such as of --prompt-cache."""
    count = Counting()
    uses = [*_trios(count), *_work(count), *_caches(count)]
    for folder in folders:
        how = f"delete {folder}"
        uses.append(count.use("folder", folder.name, folder, how, _files(folder)))
    return [use for use in uses if use.n_bytes or use.frees]


def _trios(count: Counting) -> Iterator[Use]:
    names = installed()
    for name in names:
        folder = trios_folder() / name
        yield count.use("trio", name, folder, f"trimix remove {name}", _files(folder))
    for name in names:  # after all that is ours, so that a link to it counts there
        how = "it lies elsewhere; delete it there"
        for role, file in _elsewhere(trios_folder() / name):
            use = count.use("model", f"{role} of {name}", file, how, parts_of(file))
            yield Use(use.kind, use.name, use.path, use.n_bytes, 0, use.how)
    for folder in _folders(trios_folder()):
        if folder.name not in names:
            how = f"`trimix pull {folder.name}` goes on, or delete {folder}"
            how = f"delete {folder}" if folder.name.startswith(".") else how
            yield count.use("unfinished", folder.name, folder, how, _files(folder))


def _elsewhere(folder: Path) -> Iterator[tuple[str, Path]]:
    """The models of a trio that are not in its folder."""
    try:
        trio = TrioFile.read(folder / FILENAME)
    except TrioFileError:
        return
    for role in trio.models:
        file = trio.path(role).resolve()
        if not file.is_relative_to(folder.resolve()):
            yield role, file


def _work(count: Counting) -> Iterator[Use]:
    for folder in _folders(home_folder() / _ADAPT):
        how = f"delete {folder}; the run would begin again"
        yield count.use("adapt", folder.name, folder, how, _files(folder))


def _caches(count: Counting) -> Iterator[Use]:
    """One for each folder of the cache, and one for the files beside them."""
    try:
        root = cache_folder()
    except RuntimeError:  # without a home folder nothing is kept
        return
    ours = trios_folder(), home_folder() / _ADAPT  # Windows has them and the cache in one folder
    for folder in _folders(root):
        if folder in ours:
            continue
        yield count.use("cache", folder.name, folder, f"delete {folder}", _files(folder))
    if root.is_dir():
        files = [file for file in root.iterdir() if file.is_file()]
        how = "small notes, made again when they are needed"
        yield count.use("cache", "notes", root, how, files)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _files(folder: Path) -> Iterator[Path]:
    """Every file below; a link to a folder is not followed."""
    for at, _, names in os.walk(folder):
        yield from (Path(at) / name for name in names)
