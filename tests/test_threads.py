"""Nobody frees what a thread still uses."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trimix_gguf.machine.threads import run_all


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as opened:
        yield opened


def test_results_come_in_the_order_of_the_parts(pool):
    def late(i):
        time.sleep((3 - i) / 100)
        return i

    assert run_all(pool, late, range(4)) == [0, 1, 2, 3]


def test_a_failure_is_raised_when_no_thread_works(pool):
    working = set()

    def work(i):
        if i == 0:
            raise ValueError("the first")
        working.add(i)
        time.sleep(0.2)
        working.discard(i)

    with pytest.raises(ValueError, match="the first"):
        run_all(pool, work, range(8))
    assert not working


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("n", [1, 2])
def test_ctrl_c_is_raised_when_no_thread_works(pool, n):
    """Bug: the second time it was raised at once."""
    working, begun = set(), []

    def work(i):
        working.add(i)
        begun.append(i)
        try:
            for _ in range(n if i == 0 else 0):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.1)
            time.sleep(0.3)
        finally:
            working.discard(i)

    with pytest.raises(KeyboardInterrupt):
        run_all(pool, work, range(8))
    assert not working
    assert len(begun) < 8  # what had not begun never does
