"""Answers the lines of a file, group by group, with the batch engine.

Rounding depends on what shares a batch. So lines that begin alike form groups, and each group gets
an engine of its own: a run that goes on after a kill has the groups, and the answers, of one that
was not stopped. Within a group an answer that ends makes room for the next.
"""

import hashlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.chat import close_renderer
from trimix_gguf.answering.job import Job
from trimix_gguf.answering.request import Event, Options, Request
from trimix_gguf.errors import DataError, ModelError, TrimixError
from trimix_gguf.mixing.sampling import N_SEEDS
from trimix_gguf.runs.journal import Journal
from trimix_gguf.runs.lines import Line, answer_text, error_text
from trimix_gguf.server.errors import RequestError, as_request_error
from trimix_gguf.server.limits import share_of_context
from trimix_gguf.server.prompts import check_model, make_requests, prompt_texts
from trimix_gguf.server.replies import Reply
from trimix_gguf.trio.trio import Trio

_ROUNDS = 4  # a group has so many answers for each at a time; a kill may lose one group

Progress = Callable[[int, int], None]  # lines done, lines in all
Bar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Settings:
    """How a run answers: the model's name, its mix, a seed; whether wrong lines are skipped."""

    name: str
    mix: Options | None = None
    seed: int = 0
    n_parallel: int = 8
    skip_bad: bool = False


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


class Run:
    """The lines of a file, which messages call `source`, and how they are answered."""

    def __init__(
        self, trio: Trio, lines: Sequence[Line], settings: Settings, *, source: str, bar: Bar
    ) -> None:
        self._trio, self._settings, self._source, self._bar = trio, settings, source, bar
        self._lines = {line.number: line for line in lines}
        most = share_of_context(trio.n_ctx, settings.n_parallel)
        self._defaults = Request.of(Request("", max_tokens=most), **(settings.mix or {}))

    def to_file(self, out: Path, header: Mapping[str, Any]) -> int:
        """Answer into a file; continues an earlier run. Returns how many lines were wrong."""
        journal = Journal(out, header)
        try:
            for answers in self._answers(journal):
                journal.add(answers)
            return journal.finish()
        finally:
            journal.close()

    def to_stream(self, stream: BinaryIO) -> int:
        """Print each answer once those before it are printed; returns how many lines were wrong."""
        waiting: dict[int, str] = {}
        numbers = iter(self._lines)
        newest = next(numbers, None)
        for answers in self._answers(()):
            waiting |= answers
            while newest in waiting:
                stream.write(waiting.pop(newest).encode())
                newest = next(numbers, None)
            stream.flush()
        return sum(line.error is not None for line in self._lines.values())

    def _answers(self, done: "Journal | tuple[()]") -> Iterator[dict[int, str]]:
        """Answers by number, group by group, of the groups that are not `done`."""
        groups = group_lines(list(self._lines.values()), _ROUNDS * self._settings.n_parallel)
        n_done = len(done)
        left = [group for group in groups if group[0].number not in done]
        self._check([line for group in left for line in group])
        try:
            with self._bar("Answering") as progress:
                progress(n_done, len(self._lines))
                for group in left:
                    answers: dict[int, str] = {}
                    for number, text in self._answer([self._lines[x.number] for x in group]):
                        answers[number] = text
                        progress(n_done + len(answers), len(self._lines))
                    n_done += len(answers)
                    yield answers
        finally:
            close_renderer()

    # -- lines ------------------------------------------------------------------------------

    def _check(self, lines: Sequence[Line]) -> None:
        """Find the lines that cannot be answered, in their order; raises DataError for the first.

        Where wrong ones are skipped, it notes what is wrong.
        """
        with self._bar("Checking") as progress:
            for i, line in enumerate(sorted(lines, key=lambda line: line.number), 1):
                error = line.error or self._flaw(line)
                if error is not None:
                    self._wrong(line, error)
                progress(i, len(lines))

    def _flaw(self, line: Line) -> RequestError | None:
        """Why a line cannot be answered, as far as can be told before."""
        try:
            requests = self._requests(line)
            for at, request in enumerate(requests):
                if at == 0 or request.prompt is not requests[at - 1].prompt:
                    Job(self._trio, request, lambda event: None)
        except TrimixError as error:
            return as_request_error(error)
        return None

    def _wrong(self, line: Line, error: RequestError) -> None:
        """Note that a line is wrong; raises where that ends the run."""
        told = f"{self._source}, line {line.number}: {error}"
        if error.status >= 500:  # not the line's fault
            raise ModelError(told)
        if not self._settings.skip_bad:
            raise DataError(told)
        self._lines[line.number] = replace(line, error=error)

    def _requests(self, line: Line) -> list[Request]:
        """What a line asks of the engine; raises TrimixError."""
        call = line.call
        assert call is not None
        check_model(call.model, self._settings.name)
        if call.seed is None:
            call = replace(call, seed=_seed(self._settings.seed, line.id))
        return make_requests(self._trio, call, defaults=self._defaults)

    # -- answers ----------------------------------------------------------------------------

    def _answer(self, group: Sequence[Line]) -> Iterator[tuple[int, str]]:
        """(number, answer) of each line of a group, as they end."""
        requests: list[Request] = []
        places: list[tuple[Line, int]] = []  # by request: whose answer, and which one
        replies: dict[int, Reply] = {}
        for line in group:
            if line.error is not None or line.call is None:
                yield line.number, self._refused(line)
                continue
            own = self._requests(line)
            requests += own
            places += [(line, i) for i in range(len(own))]
            echoes = prompt_texts(self._trio, line.call)
            name = self._settings.name
            replies[line.number] = Reply(line.call, self._trio, model=name, echoes=echoes)
        if not requests:
            return
        left = {line.number: line.n_answers for line in group if line.number in replies}
        for at, event in self._events(requests):
            line, i = places[at]
            if line.number not in left:  # another of its answers failed
                continue
            if event.error is not None:
                self._wrong(line, as_request_error(event.error))
                del left[line.number]
                yield line.number, self._refused(self._lines[line.number])
                continue
            for _ in replies[line.number].take(i, event):
                pass
            left[line.number] -= event.finish_reason is not None
            if left[line.number] == 0:
                del left[line.number]
                yield line.number, answer_text(line, replies.pop(line.number).body())

    def _events(self, requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
        """(index, event) of requests, as they come, until each has ended."""
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        n_parallel = self._settings.n_parallel
        batcher = Batcher(
            self._trio, n_parallel=n_parallel, n_queue=len(requests), all_known=True, drafts=False
        )
        try:
            batcher.submit_all(requests, lambda i, event: events.put((i, event)))
            n_left = len(requests)
            while n_left:
                at, event = events.get()
                n_left -= event.error is not None or event.finish_reason is not None
                yield at, event
        finally:
            batcher.close()

    def _refused(self, line: Line) -> str:
        assert line.error is not None
        return error_text(line, line.error)


def _seed(seed: int, id: str | int) -> int:
    """The seed of a line that gives none: the same one in each run."""
    digest = hashlib.sha256(f"{seed} {id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % N_SEEDS
