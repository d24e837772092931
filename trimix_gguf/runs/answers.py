"""What a trio answers to the lines of a file, a group at a time."""

import hashlib
import queue
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.job import Job
from trimix_gguf.answering.request import Event, Options, Request
from trimix_gguf.errors import DataError, ModelError, TrimixError
from trimix_gguf.machine.hashes import kept_sha256
from trimix_gguf.mixing.sampling import N_SEEDS
from trimix_gguf.runs.lines import Line, answer_text, error_text
from trimix_gguf.server.errors import RequestError, as_request_error
from trimix_gguf.server.limits import share_of_context
from trimix_gguf.server.prompts import check_model, make_requests, prompt_texts
from trimix_gguf.server.replies import Reply
from trimix_gguf.trio.trio import Trio


@dataclass(frozen=True)
class Settings:
    """How a run answers: the model's name, its mix, a seed; whether wrong lines are skipped."""

    name: str
    mix: Options | None = None
    seed: int = 0
    n_parallel: int = 8
    skip_bad: bool = False


class Answers:
    """The answers of a trio to lines of a file, which messages call `source`."""

    def __init__(self, trio: Trio, settings: Settings, *, source: str) -> None:
        self._trio, self._settings, self._source = trio, settings, source
        most = share_of_context(trio.n_ctx, settings.n_parallel)
        self._defaults = Request.of(Request("", max_tokens=most), **(settings.mix or {}))

    def header(self) -> dict[str, Any]:
        """What of the trio the answers depend on, by the words that name it."""
        trio = self._trio
        models = {role: kept_sha256(model.path) for role, model in trio.models.items()}
        adapters = [kept_sha256(m.lora) for m in trio.models.values() if m.lora is not None]
        return {
            "models": [models, adapters],
            "weights of the trio": repr((self._settings.mix, trio.tuning)),
            "versions": [version("trimix-gguf"), version("llama-cpp-python")],
            "--n-ctx": trio.n_ctx,
        }

    def flaw(self, line: Line) -> RequestError | None:
        """Why a line cannot be answered, as far as can be told before."""
        if line.error is not None:
            return line.error
        try:
            requests = self._requests(line)
            for at, request in enumerate(requests):
                if at == 0 or request.prompt is not requests[at - 1].prompt:
                    Job(self._trio, request, lambda event: None)
        except TrimixError as error:
            return as_request_error(error)
        return None

    def to(self, group: Sequence[Line]) -> Iterator[tuple[int, str]]:
        """(number, answer) of each line of a group, as they end; an error for each wrong line.

        Raises what `refused` raises for a line that turns out to be wrong.
        """
        requests: list[Request] = []
        places: list[tuple[Line, int]] = []  # by request: whose answer, and which one
        replies: dict[int, Reply] = {}
        for line in group:
            if line.error is not None or line.call is None:
                assert line.error is not None
                yield line.number, error_text(line, line.error)
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
                error = as_request_error(event.error)
                refused(line, error, self._settings, source=self._source)
                del left[line.number]
                yield line.number, error_text(line, error)
                continue
            for _ in replies[line.number].take(i, event):
                pass
            left[line.number] -= event.finish_reason is not None
            if left[line.number] == 0:
                del left[line.number]
                yield line.number, answer_text(line, replies.pop(line.number).body())

    def _requests(self, line: Line) -> list[Request]:
        """What a line asks of the engine; raises TrimixError."""
        call = line.call
        assert call is not None
        check_model(call.model, self._settings.name)
        if call.seed is None:
            call = replace(call, seed=_seed(self._settings.seed, line.id))
        return make_requests(self._trio, call, defaults=self._defaults, tasks={})

    def _events(self, requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
        """(index, event) of requests, as they come, until each has ended."""
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        n_parallel = self._settings.n_parallel
        batcher = Batcher(
            self._trio, n_parallel=n_parallel, n_queue=len(requests), all_known=True, drafts=False
        )
        with closing(batcher):
            batcher.submit_all(requests, lambda i, event: events.put((i, event)))
            n_left = len(requests)
            while n_left:
                at, event = events.get()
                n_left -= event.error is not None or event.finish_reason is not None
                yield at, event


def refused(line: Line, error: RequestError, settings: Settings, *, source: str) -> Line:
    """A line with what is wrong about it; raises TrimixError where that ends the run."""
    told = f"{source}, line {line.number}: {error}"
    if error.status >= 500:  # not the line's fault
        raise ModelError(told)
    if not settings.skip_bad:
        raise DataError(told)
    return replace(line, error=error)


def _seed(seed: int, id: str | int) -> int:
    """The seed of a line that gives none: the same one in each run."""
    digest = hashlib.sha256(f"{seed} {id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % N_SEEDS
