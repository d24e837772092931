"""What was measured during training, on disk, and which model of it to keep."""

import json
from collections.abc import Sequence
from pathlib import Path

from trimix_gguf.adapting.judging import Judgement
from trimix_gguf.errors import DataError
from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.typed_json import parse

PATIENCE = 2  # measurements in a row that answer worse, before training ends
# Errors by which answers must be worse: to end training, and to keep another model.
ENDS, LEFT = 2.0, 1.0


class History:
    """The judgements of a run, in the file `history.jsonl` of its folder."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self._file, self._writes = folder / "history.jsonl", writes
        self.all: list[Judgement] = []
        if self._file.is_file():
            try:
                lines = self._file.read_text(encoding="utf-8").splitlines()
                self.all = [Judgement(**parse(line, {str: object})) for line in lines]
            except (ValueError, TypeError):
                mend = f"remove {folder} to begin again"
                raise DataError(f"{self._file} is damaged; {mend}") from None

    def add(self, one: Judgement) -> None:
        """Write one more down; the file is whole at any moment."""
        self.all.append(one)
        self._write()

    def forget_after(self, step: int) -> None:
        """Take back what a run measured beyond the state that it goes on from."""
        self.all = [one for one in self.all if one.step <= step]
        self._write()

    def _write(self) -> None:
        if self._writes:
            write_text(self._file, "".join(json.dumps(one.to_json()) + "\n" for one in self.all))

    @property
    def falls(self) -> bool:
        """Whether the last PATIENCE answer clearly worse than the best before them."""
        if not self.all:
            return False
        best = surest(self.all)
        return all(one.falls_below(best, ENDS) for one in self.all[-PATIENCE:])


def surest(judgements: Sequence[Judgement]) -> Judgement:
    """The one that gives the right answers the highest probability on average."""
    return max(judgements, key=lambda one: sum(one.answers) / max(len(one.answers), 1))


def best_of(judgements: Sequence[Judgement]) -> Judgement:
    """The one with the lowest perplexity of those that answer as well as the best, ± one error.

    What answers is the mix, where large_ins was there to mix with.
    """
    best = surest(judgements)
    able = [one for one in judgements if not one.falls_below(best, LEFT)]
    return min(able, key=lambda one: one.perplexity)
