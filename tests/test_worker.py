"""A child process for what may cost anything: it answers, or it is ended and replaced."""

import threading

import pytest

from trimix_gguf.machine.worker import TooCostly, Worker


@pytest.fixture
def worker():
    made = Worker("worker_target", most=2)
    yield made
    made.close()


def test_one_child_answers_call_after_call(worker):
    answers = [worker.call(n) for n in ("a", "б", 3)]
    assert [said for said, _ in answers] == ["a", "б", 3]
    assert len({pid for _, pid in answers}) == 1


@pytest.mark.parametrize("how", ["die", "spin"])
def test_a_child_that_ends_is_replaced(worker, how):
    _, before = worker.call("a")
    with pytest.raises(TooCostly):
        worker.call(how)
    said, after = worker.call("b")
    assert said == "b" and after != before


def test_a_call_at_work_keeps_none_of_the_others_and_ends_with_the_worker(worker):
    """Bug: the server's one thread for templates hung, and with it all requests and SIGTERM."""
    failed = threading.Event()

    def hang():
        with pytest.raises(TooCostly):
            worker.call("sleep")
        failed.set()

    thread = threading.Thread(target=hang)
    thread.start()
    assert worker.call("a")[0] == "a"
    worker.close()
    thread.join()
    assert failed.is_set()
