"""Answers the lines of a file, group by group, with the batch engine.

Rounding depends on what shares a batch. So lines that begin alike form groups, and each group gets
an engine of its own: a run that goes on after a kill has the groups, and the answers, of one that
was not stopped, and so has one whose groups are answered by several machines. Within a group an
answer that ends makes room for the next.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from trimix_gguf.answering.chat import close_renderer
from trimix_gguf.errors import DataError
from trimix_gguf.machine import typed_json
from trimix_gguf.runs.answers import Answers, Settings, refused
from trimix_gguf.runs.journal import Journal
from trimix_gguf.runs.lines import Line
from trimix_gguf.server.errors import RequestError

_ROUNDS = 4  # a group has so many answers for each at a time; a kill may lose one group

Progress = Callable[[int, int], None]  # lines done, lines in all
Bar = Callable[[str], AbstractContextManager[Progress]]


def shard_of(lines: Sequence[Line], i: int, n: int) -> Sequence[Line]:
    """The `i`-th (from 1) of `n` blocks of lines that are about equally long."""
    return lines[(i - 1) * len(lines) // n : i * len(lines) // n]


def group_lines(lines: Sequence[Line], n_answers: int) -> list[list[Line]]:
    """Groups of about `n_answers`, in which lines that begin alike are next to each other."""
    groups: list[list[Line]] = []
    n = n_answers
    for line in sorted(lines, key=lambda line: (line.beginning, line.number)):
        if n + line.n_answers > n_answers:
            groups.append([])
            n = 0
        groups[-1].append(line)
        n += line.n_answers
    return groups


def refuse_wrong(lines: Sequence[Line], source: str) -> None:
    """Raise DataError for the first line that was wrong as it was read: no model is needed."""
    for line in lines:
        if line.error is not None:
            raise DataError(f"{source}, line {line.number}: {line.error}")


class Workers(Protocol):
    """Who answers lines: the trio of this process, or those of several machines."""

    def header(self) -> dict[str, Any]:
        """What of the trio the answers depend on."""

    def flaws(self, lines: Sequence[Line]) -> Iterator[RequestError | None]:
        """What is wrong with each line, in their order."""

    def answers(self, groups: Sequence[Sequence[Line]]) -> Iterator[tuple[int, int, str]]:
        """(index of the group, number of the line, answer), as they come."""


class Here:
    """The trio of this process, which answers one group after another."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def header(self) -> dict[str, Any]:
        """What of the trio the answers depend on."""
        return self._answers.header()

    def flaws(self, lines: Sequence[Line]) -> Iterator[RequestError | None]:
        """What is wrong with each line."""
        return map(self._answers.flaw, lines)

    def answers(self, groups: Sequence[Sequence[Line]]) -> Iterator[tuple[int, int, str]]:
        """(index of the group, number of the line, answer), as they end."""
        try:
            for i, group in enumerate(groups):
                for number, text in self._answers.to(group):
                    yield i, number, text
        finally:
            close_renderer()


class Run:
    """The lines of a file, which messages call `source`, and who answers them how."""

    def __init__(
        self, workers: Workers, lines: Sequence[Line], settings: Settings, *, source: str, bar: Bar
    ) -> None:
        self._workers, self._settings, self._source, self._bar = workers, settings, source, bar
        self._lines = lines

    def to_file(self, out: Path, header: Mapping[str, Any]) -> int:
        """Answer into a file; continues an earlier run. Returns how many lines were wrong."""
        with closing(Journal(out, header)) as journal:
            for answers in self._answers(journal):
                journal.add(answers)
            return journal.finish()

    def to_stream(self, stream: BinaryIO) -> int:
        """Print each answer once those before it are printed; returns how many lines were wrong."""
        waiting: dict[int, str] = {}
        numbers = iter([line.number for line in self._lines])
        newest, n_wrong = next(numbers, None), 0
        for answers in self._answers(()):
            waiting |= answers
            while newest in waiting:
                text = waiting.pop(newest)
                n_wrong += typed_json.parse(text.encode(), {}).get("error") is not None
                stream.write(text.encode())
                newest = next(numbers, None)
            stream.flush()
        return n_wrong

    def _answers(self, done: "Journal | tuple[()]") -> Iterator[dict[int, str]]:
        """Answers by number, a group at a time, of the groups that are not `done`."""
        groups = group_lines(self._lines, _ROUNDS * self._settings.n_parallel)
        n_done = len(done)
        left = [group for group in groups if group[0].number not in done]
        checked = self._checked([line for group in left for line in group])
        left = [[checked[line.number] for line in group] for group in left]
        with self._bar("Answering") as progress:
            progress(n_done, len(self._lines))
            come: defaultdict[int, dict[int, str]] = defaultdict(dict)
            for i, number, text in self._workers.answers(left):
                come[i][number] = text
                n_done += 1
                progress(n_done, len(self._lines))
                if len(come[i]) == len(left[i]):
                    yield come.pop(i)

    def _checked(self, lines: Sequence[Line]) -> dict[int, Line]:
        """Lines by number, with what is wrong; raises DataError for the first that may not be."""
        ordered, checked = sorted(lines, key=lambda line: line.number), {}
        with self._bar("Checking") as progress:
            flaws = self._workers.flaws(ordered)
            for i, (line, flaw) in enumerate(zip(ordered, flaws, strict=True), 1):
                if flaw is not None:
                    line = refused(line, flaw, self._settings, source=self._source)
                checked[line.number] = line
                progress(i, len(lines))
        return checked
