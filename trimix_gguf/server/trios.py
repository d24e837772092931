"""The trios of a server: which one a request means, and which are loaded.

Trios that share large_ins and small_base are a group: it is loaded and dropped whole. They share
only weights. Each has caches and a Batcher of its own, and the Batchers take turns, step by step,
in one thread: one Batcher over shared caches would have to know the small_cpt of each sequence.
"""

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from trimix_gguf.answering.batching import Batcher, Statistics
from trimix_gguf.answering.request import Options, Request
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.errors import ModelError, QueueFull, TrimixError
from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.letters import closest
from trimix_gguf.server.limits import Limits, share_of_context
from trimix_gguf.server.prompts import no_model
from trimix_gguf.server.tokens import Tokens
from trimix_gguf.trio.trio import Trio
from trimix_gguf.trio.tuned import Tuning

BY_LETTERS = "auto"  # the model's name that leaves the choice to the letters of the question
_POLL_S = 0.02


@dataclass(frozen=True)
class ServedTask:
    """A task that calls can name; `choose` finds its weights with a loaded trio, once.

    It calls what it is given beside the trio now and then, which may raise.
    """

    name: str
    choose: Callable[[Trio, Callable[[], None]], Selection]


@dataclass(frozen=True)
class Entry:
    """What is known of a trio before it is loaded; `mix` is for calls that do not say how to."""

    name: str
    n_ctx: int
    description: str = ""
    languages: tuple[str, ...] = ()
    mix: Options = field(default_factory=Options)
    tuning: Tuning | None = None
    n_bytes: int = 0  # of its files
    task: ServedTask | None = None


class Engine:
    """A loaded trio, and what answers from it."""

    def __init__(
        self,
        trio: Trio,
        entry: Entry,
        *,
        limits: Limits,
        thread: ThreadPoolExecutor,
        left: threading.Event,
        context_shift: bool = False,
    ) -> None:
        self.trio, self.name = trio, entry.name
        self.tasks: dict[str, Selection] = {}
        if entry.task is not None:
            self.tasks[entry.task.name] = _chosen(entry.task, trio, thread, left)
        self.batcher = Batcher(
            trio,
            n_parallel=limits.parallel,
            n_queue=limits.queue,
            context_shift=context_shift,
            thread=thread,
        )
        self.tokens = Tokens(trio, most=limits.queue)
        self.defaults = defaults_of(entry, limits)
        self._n_users = 0

    def hold(self) -> None:
        """Keep it loaded until release()."""
        self._n_users += 1

    def release(self) -> None:
        """Undo one hold()."""
        self._n_users -= 1

    @property
    def is_unused(self) -> bool:
        """Whether nobody holds it, and nothing is in its Batcher."""
        return self._n_users == 0 and self.batcher.is_idle

    def close(self) -> None:
        """End its answers, and free the caches and what weights no other trio reads."""
        self.batcher.close()
        self.tokens.close()
        self.trio.close()


class Group:
    """Trios that share weights: `load` opens them all, `fits` says whether there is room now."""

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        load: Callable[[], Sequence[Trio]],
        fits: Callable[[], bool] = lambda: True,
    ) -> None:
        self.entries, self.load, self.fits = entries, load, fits
        self.engines: dict[str, Engine] = {}
        self.n_waiting = 0  # requests, for it to be loaded
        self.is_leaving = False
        self.last_used = 0.0
        self.loading: asyncio.Task[None] | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is loaded, and is to stay so."""
        return bool(self.engines) and not self.is_leaving


class Trios:
    """All trios of a server. The first group is loaded at once; others when they are asked for.

    `max_loaded` groups are in memory at most; None: as many as fit. The group that was not used for
    the longest time makes room, once its answers have ended. `context_shift`: see Batcher.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        limits: Limits,
        max_loaded: int | None = None,
        context_shift: bool = False,
    ) -> None:
        self._groups, self._limits, self._max_loaded = groups, limits, max_loaded
        self._context_shift = context_shift
        self._group_of = {entry.name: group for group in groups for entry in group.entries}
        self._lock = asyncio.Lock()
        self._aside = ThreadPoolExecutor(1, "load")
        self._thread = ThreadPoolExecutor(1, "decode")  # see Batcher
        self._left = threading.Event()  # nobody waits for a task's weights any more
        self._past = Statistics()  # of engines that are gone
        groups[0].engines = self._opened(groups[0])

    @property
    def entries(self) -> list[Entry]:
        """The trios, in their order."""
        return [entry for group in self._groups for entry in group.entries]

    @property
    def is_single(self) -> bool:
        """Whether there is one trio only, which then answers to any name."""
        return len(self._group_of) == 1

    def named(self, model: str | None) -> Entry | None:
        """The trio of that name or language; the first one by default. None where there is none."""
        if model in (None, "", "default"):
            return self.entries[0]
        of_language = (entry for entry in self.entries if model in entry.languages)
        own = (entry for entry in self.entries if entry.name == model)
        return next(own, None if self.is_single else next(of_language, None))

    def asked(self, model: str | None, text: str, ignored: list[str] | None) -> Entry:
        """The trio that a call names, or that `text` asks for; RequestError where there is none.

        Where there is one trio it answers to any name, which then goes to `ignored`.
        """
        found = self.named(model)
        if found is not None:
            return found
        if self.is_single and ignored is not None:
            ignored.append("model")
            return self.entries[0]
        if not self.is_single and model == BY_LETTERS:
            return self.entries[closest(text, [entry.languages for entry in self.entries])]
        raise no_model(str(model), *(entry.name for entry in self.entries))

    def is_loaded(self, entry: Entry) -> bool:
        """Whether a trio is in memory, to stay."""
        return self._group_of[entry.name].is_here

    # -- which are loaded -------------------------------------------------------------------

    @asynccontextmanager
    async def use(self, entry: Entry) -> AsyncIterator[Engine]:
        """The trio's engine, loaded first where it is not; raises QueueFull, RequestError."""
        group = self._group_of[entry.name]
        if not group.is_here:
            await self._wait(group)
        group.last_used = time.monotonic()
        engine = group.engines[entry.name]
        engine.hold()
        try:
            yield engine
        finally:
            engine.release()

    async def _wait(self, group: Group) -> None:
        limits = self._limits
        if group.n_waiting >= limits.parallel + limits.queue:
            raise QueueFull(f"{group.n_waiting} requests wait already; try again later")
        group.n_waiting += 1
        try:
            async with asyncio.timeout(limits.timeout_s):
                while not group.is_here:
                    if group.loading is None or group.loading.done():
                        group.loading = asyncio.create_task(self._load(group))
                        group.loading.add_done_callback(_look_at)
                    await asyncio.shield(group.loading)  # others may wait for it too
        except TimeoutError:
            raise RequestError(
                f"the trio was not loaded within {limits.timeout_s:g} seconds; try again later, "
                "or raise --timeout or --max-loaded",
                status=504,
                code="timeout",
            ) from None
        finally:
            group.n_waiting -= 1

    async def _load(self, group: Group) -> None:
        async with self._lock:
            try:
                await self._make_room(group)
                group.engines = await self._in_thread(lambda: self._opened(group))
            except TrimixError as error:  # it may name files, which are not for clients
                names = ", ".join(entry.name for entry in group.entries)
                print(f"trimix: {names}: {error}", file=sys.stderr, flush=True)
                raise RequestError(
                    f"{names} cannot be loaded now; the server's standard error says why",
                    status=503,
                    code="not_loaded",
                ) from error
            group.last_used = time.monotonic()

    async def _make_room(self, group: Group) -> None:
        while loaded := [other for other in self._groups if other.engines]:
            enough = self._max_loaded is None or len(loaded) < self._max_loaded
            if enough and await self._in_thread(group.fits):
                return
            # One that was loaded this moment is first used by those who waited for it.
            if free := [other for other in loaded if not other.n_waiting]:
                await self._drop(min(free, key=lambda other: other.last_used))
            else:
                await asyncio.sleep(_POLL_S)

    async def _drop(self, group: Group) -> None:
        group.is_leaving = True  # new requests wait, so that it becomes unused
        while not all(engine.is_unused for engine in group.engines.values()):
            await asyncio.sleep(_POLL_S)
        self._past = sum((e.batcher.statistics() for e in group.engines.values()), self._past)
        engines, group.engines, group.is_leaving = group.engines, {}, False
        await self._in_thread(lambda: _close(engines))

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._aside, call)

    def _opened(self, group: Group) -> dict[str, Engine]:
        trios, engines = group.load(), dict[str, Engine]()
        try:
            for trio, entry in zip(trios, group.entries, strict=True):
                engines[entry.name] = Engine(
                    trio,
                    entry,
                    limits=self._limits,
                    thread=self._thread,
                    left=self._left,
                    context_shift=self._context_shift,
                )
        except TrimixError:  # of a task
            _close(engines)
            for trio in trios[len(engines) :]:
                trio.close()
            raise
        return engines

    def close(self) -> None:
        """Free everything; running answers are ended."""
        self._left.set()
        self._aside.shutdown()
        for group in self._groups:
            _close(group.engines)
            group.engines = {}
        self._thread.shutdown()

    # -- all of them ------------------------------------------------------------------------

    @property
    def _engines(self) -> list[Engine]:
        return [engine for group in self._groups for engine in group.engines.values()]

    def statistics(self) -> Statistics:
        """The sum over all trios, those included that are no longer loaded."""
        return sum((engine.batcher.statistics() for engine in self._engines), self._past)

    @property
    def is_alive(self) -> bool:
        """Whether no engine has stopped."""
        return all(engine.batcher.is_alive for engine in self._engines)

    @property
    def is_busy(self) -> bool:
        """Whether one of them would refuse one more request, or works long."""
        return any(engine.batcher.is_busy for engine in self._engines)


def _chosen(
    task: ServedTask, trio: Trio, thread: ThreadPoolExecutor, left: threading.Event
) -> Selection:
    """A task's weights, found in the thread that decodes; Ctrl-C here, or `left`, ends it there."""

    def watch() -> None:
        if left.is_set():
            raise ModelError("the server is shutting down")

    try:
        return thread.submit(task.choose, trio, watch).result()
    except KeyboardInterrupt:
        left.set()
        raise


def _close(engines: Mapping[str, Engine]) -> None:
    for engine in engines.values():
        engine.close()


def _look_at(task: asyncio.Task[None]) -> None:
    """Take a failure out of a task, as nobody may wait for it any more."""
    if not task.cancelled():
        task.exception()


def defaults_of(entry: Entry, limits: Limits) -> Request:
    """How a call is answered that says nothing of it: the trio's own mix, and a fair length."""
    n_tokens = share_of_context(entry.n_ctx, limits.parallel)
    return Request.of(Request("", max_tokens=n_tokens), **entry.mix)
