"""A Ray cluster answers the groups of a run.

Groups, and so their answers, are the same as without Ray.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from trimix_gguf.machine.cluster import Pool, in_order
from trimix_gguf.runs.answers import Answers, Settings
from trimix_gguf.runs.lines import Line
from trimix_gguf.server.errors import RequestError
from trimix_gguf.trio.trio import Trio

_CHECKED = 256  # lines of one task

_Task = tuple[str, Sequence[Line]]  # 'flaws' or 'answers', of these lines


class RayWorkers:
    """Processes of the cluster, each of which `load`s the trio."""

    def __init__(
        self,
        load: Callable[[], Trio],
        settings: Settings,
        *,
        source: str,
        n_workers: int | None = None,
    ) -> None:
        loaded = partial(_Loaded, load, settings, source)
        self._pool = Pool(loaded, named=_named, n_workers=n_workers)

    def header(self) -> dict[str, Any]:
        """What of the trio the answers depend on."""
        return self._pool.header()

    def flaws(self, lines: Sequence[Line]) -> Iterator[RequestError | None]:
        """What is wrong with each line, in their order."""
        parts = (lines[i : i + _CHECKED] for i in range(0, len(lines), _CHECKED))
        for flaws in in_order(self._pool.done(("flaws", part) for part in parts)):
            yield from flaws

    def answers(self, groups: Sequence[Sequence[Line]]) -> Iterator[tuple[int, int, str]]:
        """(index of the group, number of the line, answer), as groups are done."""
        for i, answers in self._pool.done(("answers", group) for group in groups):
            for number, text in answers:
                yield i, number, text


class _Loaded:
    """The trio of a process."""

    def __init__(self, load: Callable[[], Trio], settings: Settings, source: str) -> None:
        self._answers = Answers(load(), settings, source=source)

    def header(self) -> dict[str, Any]:
        """What of the trio the answers depend on."""
        return self._answers.header()

    def work(self, task: _Task) -> list[Any]:
        """The flaws of lines, or (number, answer) of each."""
        what, lines = task
        if what == "flaws":
            return [self._answers.flaw(line) for line in lines]
        return list(self._answers.to(lines))


def _named(task: _Task) -> str:
    numbers = [line.number for line in task[1]]
    return f"lines {min(numbers)} to {max(numbers)}"
