"""Processes of a Ray cluster: each loads models once, then does one task after another.

A process that is lost is replaced, and its task is done again by another one.
"""

import logging
import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol, TypeVar

from trimix_gguf.errors import TrimixError

_POLL_S = 2.0  # how often it is seen whether the head node lives
_PATIENCE_S = 10.0  # for a connection to it
_MOST_LOSSES = 3  # of processes, by one task

T = TypeVar("T")


class RayError(TrimixError):
    """A Ray cluster that cannot be used, or has ended."""


class Loaded(Protocol):
    """What a process of the cluster has loaded."""

    def header(self) -> dict[str, Any]:
        """What of it the results depend on, by the words that name it."""

    def work(self, task: Any) -> Any:
        """The result of a task; raises TrimixError."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """This process as a part of a Ray cluster: one at an address, 'auto' or 'local'.

    Meanwhile what is printed goes to stderr.
    """
    ray = _library()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would ask, and tell others
    if address not in ("auto", "local"):
        _look_at(address)
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    with redirect_stdout(sys.stderr):  # Ray prints there which process was lost, also at its end
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise RayError(f"--ray {address}: {reason}") from None
        try:
            yield
        finally:
            ray.shutdown()


class Pool:
    """Processes of the cluster that each `load` once: one per machine with CPUs, or `n_workers`.

    `named` says which task it is, for a message. Processes may differ in `may_differ` of their
    headers; other differences are refused.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        *,
        named: Callable[[Any], str],
        n_workers: int | None = None,
        may_differ: Sequence[str] = (),
    ) -> None:
        self._ray = ray = _library()
        self._load, self._named, self._may_differ = load, named, may_differ
        self._head = ray.get_runtime_context().gcs_address
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        n = n_workers or max(1, sum(map(bool, cpus)))
        if n > sum(cpus):  # Ray would wait for ever
            raise RayError(
                f"the cluster has {sum(cpus)} CPUs for {n} processes; give a lower --ray-workers"
            )
        # How many threads they use is for --threads to say; Ray only counts them.
        self._actor = ray.remote(_Worker).options(num_cpus=1, scheduling_strategy="SPREAD")
        self._free = [self._new() for _ in range(n)]
        self._header: dict[str, Any] | None = None

    def header(self) -> dict[str, Any]:
        """The header of the processes."""
        list(self.done([None]))
        assert self._header is not None
        return self._header

    def done(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(index, result) of tasks as they are done; what a lost process had is done again."""
        ray, tasks = self._ray, list(tasks)
        waiting = deque(range(len(tasks)))
        running: dict[Any, tuple[int, Any]] = {}
        losses: Counter[int] = Counter()
        while waiting or running:
            while waiting and self._free:
                i, worker = waiting.popleft(), self._free.pop()
                running[worker.work.remote(tasks[i])] = i, worker
            done, _ = ray.wait(list(running), timeout=_POLL_S)
            if not done:
                _look_at(self._head, is_known=True)
            for reference in done:
                i, worker = running.pop(reference)
                try:
                    header, result = ray.get(reference)
                except ray.exceptions.RayActorError:
                    _look_at(self._head, is_known=True)
                    losses[i] += 1
                    if losses[i] == _MOST_LOSSES:
                        what = "to load the trio" if tasks[i] is None else self._named(tasks[i])
                        raise RayError(
                            f"{_MOST_LOSSES} processes ended while they had {what}; see Ray's logs"
                        ) from None
                    waiting.appendleft(i)
                    self._free.append(self._new())
                    continue
                self._free.append(worker)
                self._compare(header)
                if isinstance(result, TrimixError):
                    raise result
                yield i, result

    def close(self) -> None:
        """End the processes, and with them their models."""
        for worker in self._free:
            self._ray.kill(worker)

    def _new(self) -> Any:
        return self._actor.remote(self._load)

    def _compare(self, header: dict[str, Any] | None) -> None:
        """Raise where a worker has loaded something else than the others."""
        if header is None:  # it could not be loaded, and the result says why
            return
        known = self._header = self._header or header
        names = [name for name in header if header[name] != known[name]]
        if names := [name for name in names if name not in self._may_differ]:
            raise RayError(f"machines of the cluster have other {', '.join(names)} than others")


class _Worker:
    """What runs in a process of the cluster."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._loaded: Loaded | None = None
        self._header: dict[str, Any] | None = None

    def work(self, task: Any) -> tuple[dict[str, Any] | None, Any]:
        """What results depend on, and the result of a task, or the error that ended it."""
        try:
            if self._loaded is None:
                self._loaded = self._load()
                self._header = self._loaded.header()
            return self._header, None if task is None else self._loaded.work(task)
        except TrimixError as error:
            return self._header, error


def in_order(done: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Results in the order of their tasks, each as soon as those before it have come."""
    come: dict[int, T] = {}
    at = 0
    for i, result in done:
        come[i] = result
        while at in come:
            yield come.pop(at)
            at += 1


def _look_at(head: str, *, is_known: bool = False) -> None:
    """Raise where no head node of Ray answers at an address; one `is_known` had answered before."""
    host, _, port = head.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal() and int(port[:6]) < 1 << 16):
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
