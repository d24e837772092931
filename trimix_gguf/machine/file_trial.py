"""A new file is loaded first in a child process: llama.cpp ends the process on many damaged ones.

The child of machine/self_test.py opens it as it will be opened, cuts a text into tokens, and
decodes them. What passed is kept in the cache folder, with the library that it passed with, and
is tried again once the file or the library is another.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trimix_gguf import errors
from trimix_gguf.errors import ModelFileError
from trimix_gguf.machine import self_test
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.notes import read_note, write_note
from trimix_gguf.machine.parts import parts_of
from trimix_gguf.machine.rpc import is_remote

REFUSED = 4  # the child's exit code for an error of ours; its last line is the class and the text
_N_CTX = 128
_PER_SECOND = 20 << 20  # bytes that the slowest disk reads
_MOST_KEPT = 500
_NOTE = "tried.txt"  # the library, then the fingerprints that passed with it
_SHIPPED = Path(__file__).parent.parent / "nano"  # self_test has read with these
_passed: set[str] = set()


@dataclass(frozen=True)
class FileTrial:
    """A file as it is about to be loaded; with `decode` False, only its tokenizer."""

    path: Path
    loading: Loading = Loading()  # noqa: RUF009  # frozen
    lora: Path | None = None
    tokenizer: bool = True
    decode: bool = True

    @property
    def files(self) -> list[Path]:
        """All files that it reads."""
        return [*parts_of(self.path), *([] if self.lora is None else [self.lora])]

    def fingerprint(self) -> str:
        """The files as the file system knows them, and how they are used."""
        seen = [(str(path.resolve()), path.stat()) for path in self.files]
        facts = [
            f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}" for name, s in seen
        ]
        used = [str(self.tokenizer), str(self.decode), self.lora is not None]
        return hashlib.sha256(ascii([*facts, *used]).encode()).hexdigest()

    def as_json(self) -> dict[str, object]:
        """What the child is to do, in a short context."""
        loading = replace(self.loading, n_ctx=min(self.loading.n_ctx, _N_CTX), mlock=False)
        return {
            "path": str(self.path.absolute()),
            "lora": None if self.lora is None else str(self.lora.absolute()),
            "loading": asdict(loading),
            "tokenizer": self.tokenizer,
            "decode": self.decode,
        }


def require(trials: Iterable[FileTrial]) -> None:
    """Have a child load what was not tried before; raises ModelFileError where it fails there.

    Another error of this package that the child meets is raised here as it is. Costs nothing for
    files that passed before.
    """
    if self_test.is_skipped():
        return
    # On workers only the tokenizer: the child has none, and may not have room for the weights.
    here = [replace(t, decode=False) if is_remote(t.loading.device) else t for t in trials]
    new = {trial.fingerprint(): trial for trial in here if not _ships(trial)}
    new = {key: trial for key, trial in new.items() if key not in _passed}
    if new:
        kept = _kept()
        new = {key: trial for key, trial in new.items() if key not in kept}
    if not new:
        return
    asked = list(new.values())
    n_bytes = sum(path.stat().st_size for trial in asked for path in trial.files)
    outcome = self_test.try_in_child(
        json.dumps([trial.as_json() for trial in asked]),
        seconds=self_test.SECONDS + n_bytes // _PER_SECOND,
    )
    if outcome.code == 0 and outcome.said == "passed":
        _passed.update(new)
        keep = [*_kept() - set(new), *new][-_MOST_KEPT:]
        write_note(_NOTE, "\n".join([_library(), *keep, ""]))
        return
    if outcome.code == REFUSED:
        name, _, text = outcome.said.partition(" ")
        raise getattr(errors, name, ModelFileError)(text)
    number, _, stage = outcome.said.partition(" ")
    tried = asked[int(number) if number.isdecimal() else 0]
    raise ModelFileError(
        f"{tried.lora or tried.path}: tried first in another process, llama.cpp {outcome.cause} "
        f"while {stage or 'starting'}; the file is damaged, or not for this llama.cpp"
    )


def _ships(trial: FileTrial) -> bool:
    return all(path.resolve().parent == _SHIPPED for path in trial.files)


def _library() -> str:
    return hashlib.sha256(self_test.fingerprint().encode()).hexdigest()


def _kept() -> set[str]:
    """Fingerprints that passed with this library; empty where nothing can be kept."""
    noted = read_note(_NOTE).split()
    return set(noted[1:]) if noted[:1] == [_library()] else set()
