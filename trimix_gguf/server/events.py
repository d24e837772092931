"""From the engine's thread to the event loop: the events of one HTTP request, in one queue."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.job import Job
from trimix_gguf.answering.request import Event, Request
from trimix_gguf.errors import TrimixError
from trimix_gguf.server.errors import RETRY, RequestError, as_request_error


class Events:
    """The events of one client's jobs, until these end, it leaves, or its time is up.

    `prepare` makes the requests, `n` at most; it runs in `executor`, as it tokenizes and renders
    templates. Their places are held before. Of an answer that is sent `whole`, only the first token
    and the end wake the loop: its thread takes a core from llama.cpp's. Raises QueueFull.
    """

    def __init__(
        self,
        batcher: Batcher,
        prepare: Callable[[], Sequence[Request]],
        *,
        n: int,
        executor: Executor,
        receive: Receive,
        timeout_s: float,
        whole: bool = False,
    ) -> None:
        batcher.reserve(n)
        self._batcher, self._prepare, self._n_reserved = batcher, prepare, n
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()
        self._came: deque[tuple[int, Event]] = deque()  # not in the queue yet
        self._whole, self._begun = whole, set[int]()
        self._jobs: list[Job] = []
        self._closed = False
        out_of_time = RequestError(
            f"the answer took longer than {timeout_s:g} seconds; ask for fewer tokens, or raise "
            "--timeout",
            status=504,
            code="timeout",
        )
        self._timer = self._loop.call_later(timeout_s, self.end, out_of_time)
        self._watcher = self._loop.create_task(self._watch(receive))
        submitted = self._loop.run_in_executor(executor, self._submit)
        submitted.add_done_callback(self._on_submitted)

    def _submit(self) -> None:
        try:
            for index, request in enumerate(() if self._closed else self._prepare()):
                job = self._batcher.submit(request, partial(self._listen, index), reserved=True)
                self._n_reserved -= 1
                self._jobs.append(job)
                if self._closed:  # meanwhile, by the event loop's thread
                    job.cancel()
        finally:
            self._batcher.release(self._n_reserved)

    def _on_submitted(self, submitted: asyncio.Future[None]) -> None:
        error = None if submitted.cancelled() else submitted.exception()
        self._queue.put_nowait(error if isinstance(error, Exception) else None)

    def _listen(self, index: int, event: Event) -> None:
        """Called from the engine's thread."""
        self._came.append((index, event))
        goes_on = event.finish_reason is None and event.error is None
        if self._whole and goes_on and index in self._begun:
            return
        if event.tokens:
            self._begun.add(index)
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._came:
            self._queue.put_nowait(self._came.popleft())

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(ClientDisconnect())

    def end(self, error: Exception) -> None:
        """Cancel the jobs; the iteration raises `error` after what has come so far."""
        self._cancel()  # here, as whoever iterates may wait for a client that reads nothing
        self._deliver()
        self._queue.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the request, event) as they come; raises RequestError, ClientDisconnect."""
        is_submitted, n_ended = False, 0
        while not is_submitted or n_ended < len(self._jobs):
            item = await self._queue.get()
            if item is None:
                is_submitted = True
            elif isinstance(item, TrimixError):
                raise as_request_error(item) from item
            elif isinstance(item, Exception):
                raise item
            else:
                _raise_failure(item[1])
                n_ended += item[1].finish_reason is not None
                yield item

    def close(self) -> None:
        """Cancel what has not ended."""
        self._timer.cancel()
        self._watcher.cancel()
        self._cancel()

    def _cancel(self) -> None:
        self._closed = True
        for job in list(self._jobs):
            job.cancel()


def _raise_failure(event: Event) -> None:
    if event.error is not None:
        raise as_request_error(event.error) from event.error
    if event.finish_reason == "cancelled":
        raise stopping()


def stopping() -> RequestError:
    """What a client is told whose answer the server does not finish."""
    return RequestError(
        "the server is shutting down", status=503, code="shutting_down", headers=RETRY
    )
