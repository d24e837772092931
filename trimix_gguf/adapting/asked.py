"""What is asked of a run, and to whom it tells how it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trimix_gguf.adapting.documents import list_files
from trimix_gguf.adapting.outlook import RANK
from trimix_gguf.adapting.training import Standing
from trimix_gguf.errors import DataError, TrioFileError
from trimix_gguf.trios.names import check_name
from trimix_gguf.trios.store import SHIPPED, installed_folder


@dataclass(frozen=True)
class Asked:
    """What a user asks for; all of it stays the same when a run goes on."""

    name: str
    texts: Sequence[Path]
    trio: str = SHIPPED
    base: Path | None = None
    instruct: Path | None = None
    pairs: Path | None = None
    replay: Sequence[Path] = ()
    keep_out: Sequence[Path] = ()
    lang: str | None = None
    script: str | None = None
    tokens: int | None = None
    minutes: float | None = None
    rank: int = RANK
    learning_rate: float | None = None
    exercises: float | None = None
    full: bool = False
    train_embeddings: bool = False
    merge: bool = False
    output: Path | None = None
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What is compared when a run goes on; files are compared by their content as well."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "texts"}
        # What stands beside the text by name: the same file may be given as something else.
        beside = {"pairs": self._pairs, "replay": self.replay, "keep_out": self.keep_out}
        return {
            **found,
            **{n: found[n] and str(found[n]) for n in ("base", "instruct", "output")},
            **{n: [str(f.resolve()) for f in list_files(paths)] for n, paths in beside.items()},
        }

    @property
    def _pairs(self) -> list[Path]:
        return [] if self.pairs is None else [self.pairs]

    def files(self) -> list[Path]:
        """All that is read."""
        return list_files([*self.texts, *self.replay, *self._pairs, *self.keep_out])

    def check_free(self, work: Path) -> None:
        """Raise TrioFileError or DataError where the result's name is taken, or would be deleted.

        `work` is the run's folder.
        """
        check_name(self.name)
        if self.output is not None:
            if self.output.resolve().is_relative_to(work.resolve()):
                raise DataError(
                    f"{self.output} is in {work}, which is deleted at the end; name a file "
                    "elsewhere"
                )
            if self.output.exists():
                raise DataError(f"{self.output} is there already; remove it, or name another file")
            if not self.output.absolute().parent.is_dir():
                raise DataError(f"folder {self.output.parent} does not exist; create it first")
        elif self.name == SHIPPED or _holds_any(installed_folder(self.name)):
            raise TrioFileError(
                f"trio {self.name}, or a part of one, is here already; take another name, or "
                "`trimix remove` it"
            )


def _holds_any(folder: Path) -> bool:
    """Whether no trio could be put there: a pull that was stopped leaves no trio, but files."""
    return folder.exists() and any(folder.iterdir())


@dataclass(frozen=True)
class Shown:
    """What a run tells while it works."""

    say: Callable[[str], None]
    read: Callable[[str, int], None]
    step: Callable[[Standing], None]

    @staticmethod
    def nothing() -> Shown:
        """For a process beside the one that tells."""
        return Shown(lambda _: None, lambda *_: None, lambda _: None)
