"""A Ray cluster answers the groups of a run: each of its processes loads the trio once.

A process that is lost is replaced, and its group is answered again by another one. Groups, and so
their answers, are the same as without Ray.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trimix_gguf.errors import TrimixError
from trimix_gguf.runs.answers import Answers, Settings
from trimix_gguf.runs.lines import Line
from trimix_gguf.server.errors import RequestError
from trimix_gguf.trio.trio import Trio

_POLL_S = 2.0  # how often it is seen whether the head node lives
_PATIENCE_S = 10.0  # for a connection to it
_MOST_LOSSES = 3  # of processes, by one task
_CHECKED = 256  # lines of one task


class RayError(TrimixError):
    """A Ray cluster that cannot be used, or has ended."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """This process as a part of a Ray cluster: one at an address, 'auto' or 'local'."""
    ray = _library()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would ask, and tell others
    if address not in ("auto", "local"):
        _look_at(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RayError(f"--ray {address}: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


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
        self._ray = ray = _library()
        self._head = ray.get_runtime_context().gcs_address
        machines = [node for node in ray.nodes() if node["Alive"]]
        # How many threads they use is for --threads to say; Ray only counts them.
        self._actor = ray.remote(_Worker).options(num_cpus=1, scheduling_strategy="SPREAD")
        self._given = load, settings, source
        self._free = [self._new() for _ in range(n_workers or len(machines))]
        self._header: dict[str, Any] | None = None

    def header(self) -> dict[str, Any]:
        """What of the trio the answers depend on."""
        list(self._done("nothing", [()]))
        assert self._header is not None
        return self._header

    def flaws(self, lines: Sequence[Line]) -> Iterator[RequestError | None]:
        """What is wrong with each line, in their order."""
        tasks = [lines[i : i + _CHECKED] for i in range(0, len(lines), _CHECKED)]
        come: dict[int, list[RequestError | None]] = {}
        at = 0
        for i, flaws in self._done("flaws", tasks):
            come[i] = flaws
            while at in come:
                yield from come.pop(at)
                at += 1

    def answers(self, groups: Sequence[Sequence[Line]]) -> Iterator[tuple[int, int, str]]:
        """(index of the group, number of the line, answer), as groups are done."""
        for i, answers in self._done("answers", groups):
            for number, text in answers:
                yield i, number, text

    def _new(self) -> Any:
        return self._actor.remote(*self._given)

    def _done(self, what: str, tasks: Sequence[Sequence[Line]]) -> Iterator[tuple[int, list[Any]]]:
        """(index, results) of tasks as they are done; what a lost process had is done again."""
        ray, waiting = self._ray, deque(range(len(tasks)))
        running: dict[Any, tuple[int, Any]] = {}
        losses: Counter[int] = Counter()
        while waiting or running:
            while waiting and self._free:
                i, worker = waiting.popleft(), self._free.pop()
                running[worker.work.remote(what, list(tasks[i]))] = i, worker
            done, _ = ray.wait(list(running), timeout=_POLL_S)
            if not done:
                _look_at(self._head, is_known=True)
            for task in done:
                i, worker = running.pop(task)
                try:
                    header, results = ray.get(task)
                except ray.exceptions.RayActorError:
                    _look_at(self._head, is_known=True)
                    losses[i] += 1
                    if losses[i] == _MOST_LOSSES:
                        raise RayError(
                            f"{_MOST_LOSSES} processes ended while they had {_named(tasks[i])}; "
                            "see Ray's logs"
                        ) from None
                    waiting.appendleft(i)
                    self._free.append(self._new())
                    continue
                self._free.append(worker)
                self._compare(header)
                if isinstance(results, TrimixError):
                    raise results
                yield i, results

    def _compare(self, header: dict[str, Any] | None) -> None:
        """Raise where a worker has another trio than the others."""
        if header is None:  # it could not be loaded, and the results say why
            return
        self._header = self._header or header
        if names := [name for name in header if header[name] != self._header[name]]:
            raise RayError(f"machines of the cluster have other {', '.join(names)} than others")


class _Worker:
    """What runs in a process of the cluster."""

    def __init__(self, load: Callable[[], Trio], settings: Settings, source: str) -> None:
        self._load, self._settings, self._source = load, settings, source
        self._answers: Answers | None = None
        self._header: dict[str, Any] | None = None

    def work(self, what: str, lines: list[Line]) -> tuple[dict[str, Any] | None, Any]:
        """What the answers depend on, and the results of a task, or the error that ended it."""
        try:
            if self._answers is None:
                self._answers = Answers(self._load(), self._settings, source=self._source)
                self._header = self._answers.header()
            if what == "flaws":
                return self._header, [self._answers.flaw(line) for line in lines]
            return self._header, list(self._answers.to(lines))
        except TrimixError as error:
            return self._header, error


def _named(lines: Sequence[Line]) -> str:
    numbers = [line.number for line in lines]
    return f"lines {min(numbers)} to {max(numbers)}" if numbers else "to load the trio"


def _look_at(head: str, *, is_known: bool = False) -> None:
    """Raise where no head node of Ray answers at an address; one `is_known` had answered before."""
    host, _, port = head.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise RayError(f"--ray {head} is not a HOST:PORT, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if is_known:
            raise RayError(
                f"the head node of Ray at {head} has ended ({reason}); once it is back, the same "
                "command goes on where this run was"
            ) from None
        raise RayError(f"no head node of Ray answers at {head} ({reason})") from None


def _library() -> Any:
    try:
        import ray
    except ImportError:
        raise RayError("--ray needs ray: pip install 'trimix-gguf[ray]'") from None
    return ray
