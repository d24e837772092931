"""How a Batcher ends: nobody uses the trio afterwards, and nobody waits for ever."""

import os
import queue
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trimix_gguf import Trio, Weights
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.request import Request
from trimix_gguf.errors import ModelError, QueueFull

REQUEST = Request("Қазақ", max_tokens=40, weights=Weights(0.1, 0.9))
REQUEST = Request.of(REQUEST, logit_bias={0: -100, 3: -100})


@pytest.fixture(scope="module")
def trio():
    with Trio.nano(n_threads=1) as opened:
        yield opened


def mistake(*_):
    raise RuntimeError("a mistake")


def closing(batcher):
    thread = threading.Thread(target=batcher.close, daemon=True)
    thread.start()
    return thread


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_a_second_ctrl_c_does_not_free_what_a_step_uses(trio, monkeypatch):
    """Bug: `trimix run` died of a segmentation fault."""
    batcher, steps, main = Batcher(trio), set(), threading.main_thread().ident

    def long_step():
        steps.add(1)
        for _ in range(3):
            time.sleep(0.1)
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        steps.discard(1)

    monkeypatch.setattr(batcher, "_step", long_step)
    batcher.submit(REQUEST, lambda event: None)
    with pytest.raises(KeyboardInterrupt):
        try:
            time.sleep(60)
        finally:
            batcher.close()
    assert not steps and not batcher.is_alive


def test_it_waits_for_who_prepares_with_the_trio(trio):
    """Bug: a server freed the tokenizer while it read a long prompt."""
    batcher = Batcher(trio)
    batcher.reserve(2)
    thread = closing(batcher)
    thread.join(0.2)
    assert thread.is_alive()
    with pytest.raises(QueueFull):
        batcher.submit(REQUEST, lambda event: None, reserved=True)
    batcher.release(2)
    thread.join(60)
    assert not thread.is_alive()


def test_a_mistake_that_comes_again_as_it_is_told_does_not_hold_up_the_end(trio, capsys):
    """Bug: close() waited for ever."""
    batcher = Batcher(trio)
    batcher.submit(REQUEST, mistake)
    while batcher.is_alive:
        time.sleep(0.01)
    thread = closing(batcher)
    thread.join(60)
    assert not thread.is_alive()
    assert "a mistake" in capsys.readouterr().err
    trio.forget()


def test_a_mistake_ends_one_of_two_batchers_which_says_so(trio, monkeypatch, capsys):
    """Bug: it said that the server was shutting down, and to try again later."""
    events, others = queue.SimpleQueue(), queue.SimpleQueue()
    with ThreadPoolExecutor(1) as thread, Trio.nano(n_threads=1, beside=trio) as beside:
        one, other = (Batcher(t, drafts=False, thread=thread) for t in (trio, beside))
        other.submit(REQUEST, others.put)
        monkeypatch.setattr(one, "_step", mistake)
        one.submit(REQUEST, events.put)
        assert str(events.get(timeout=60).error) == "the server has stopped"
        with pytest.raises(ModelError, match="has stopped"):
            one.submit(REQUEST, events.put)
        while (reason := others.get(timeout=60).finish_reason) is None:
            pass
        assert reason == "length" and other.is_alive and not one.is_alive
        for batcher in (one, other):
            batcher.close()
    assert "a mistake" in capsys.readouterr().err


def test_more_than_may_wait_are_refused(trio):
    batcher = Batcher(trio, n_parallel=1, n_queue=2)
    request = Request.of(REQUEST, max_tokens=400)
    jobs = [batcher.submit(request, lambda event: None) for _ in range(2)]
    with pytest.raises(QueueFull):
        jobs += [batcher.submit(request, lambda event: None) for _ in range(3)]
    for job in jobs:
        job.cancel()
    batcher.close()
    with pytest.raises(QueueFull, match="shutting down"):
        batcher.submit(request, lambda event: None)
