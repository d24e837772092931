"""Work on several threads, all of which end before the caller goes on."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cache
from threading import Condition
from typing import TypeVar

from trimix_gguf.machine import container

MOST_THREADS = 4096  # for one model; far beyond it llama.cpp ends the process
T = TypeVar("T")
R = TypeVar("R")


def run_all(
    pool: ThreadPoolExecutor, work: Callable[[T], R], parts: Sequence[T], *, aside: bool = False
) -> list[R]:
    """`work` of each part, in order; on a failure or Ctrl-C too, returns when no thread works.

    The caller may then free what they used: llama.cpp's caches, or its rows of logits. The last
    part is worked on by the caller's own thread, the others by the pool's; `aside`: all by these.
    """
    gate, closed, n_working = Condition(), False, 0

    def end() -> None:
        nonlocal closed
        with gate:
            closed = True
            gate.wait_for(lambda: n_working == 0)

    # Counted here: Ctrl-C may come while a part is handed over, before anyone holds its future.
    def counted(part: T) -> R:
        nonlocal n_working
        with gate:
            if closed:
                raise CancelledError
            n_working += 1
        try:
            return work(part)
        finally:
            with gate:
                n_working -= 1
                gate.notify_all()

    try:
        n_others = len(parts) if aside else len(parts) - 1
        others = pool.map(counted, parts[:n_others])
        own = [work(part) for part in parts[n_others:]]
        return [*others, *own]
    finally:
        past_ctrl_c(end)


def past_ctrl_c(wait: Callable[[], None]) -> None:
    """Wait for what uses memory that the caller frees next: Ctrl-C is raised only afterwards.

    It makes `wait` begin again.
    """
    pressed = None
    while True:
        try:
            wait()
            break
        except KeyboardInterrupt as error:
            pressed = error
    if pressed is not None:
        raise pressed


def available_cores() -> int:
    """Cores that this process may run on, or whose time a container gives it."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = _processors()
    return n if given is None else min(n, given)


# Asked at each window of a prompt, and files are slow; a container keeps its share as it runs.
_processors = cache(container.processors)
