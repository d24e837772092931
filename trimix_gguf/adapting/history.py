"""What was measured during training, on disk, and which model of it to keep."""

import json
from collections.abc import Sequence
from pathlib import Path

from trimix_gguf.adapting.judging import Judgement
from trimix_gguf.errors import DataError
from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.typed_json import parse

PATIENCE = 2  # measurements in a row that answer worse, before training ends


class History:
    """The judgements of a run, in the file `history.jsonl` of its folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "history.jsonl"
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
        write_text(self._file, "".join(json.dumps(one.to_json()) + "\n" for one in self.all))

    @property
    def falls(self) -> bool:
        """Whether the last PATIENCE answer clearly worse than the best before them."""
        if not self.all:
            return False
        best = surest(self.all)
        return all(one.falls_below(best) for one in self.all[-PATIENCE:])


def surest(judgements: Sequence[Judgement]) -> Judgement:
    """The one that gives the right answers the highest probability on average."""
    return max(judgements, key=lambda one: sum(one.sure) / max(len(one.sure), 1))


def best_of(judgements: Sequence[Judgement]) -> Judgement:
    """The one with the lowest perplexity of those that do not answer clearly worse than others."""
    best = surest(judgements)
    able = [one for one in judgements if not one.falls_below(best)]
    return min(able, key=lambda one: one.perplexity)
