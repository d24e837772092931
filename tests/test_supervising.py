"""A command with --rpc ends at a signal, whenever it comes: its engine is a child."""

import os
import signal
import socket
import subprocess
import sys
from collections import Counter

import pytest

from trimix_gguf.cli import supervising, supervising_server
from trimix_gguf.errors import WorkerError
from trimix_gguf.machine import rpc

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
ENDLESS = ("sleep", "60")
LOST = ("sh", "-c", f"exit {supervising.LOST}")


class Link:
    """A line of control to a worker that was lost."""

    endpoint, devices, lost = "a:1", (), "worker a:1 has ended"

    def watch(self, on_lost):
        pass

    def close(self):
        pass


def press(name):
    """What is told of each call of a function; during the one that `name` says SIGTERM comes."""
    calls = Counter()

    def called(function):
        calls[function] += 1
        if name == f"{function} {calls[function]}":
            os.kill(os.getpid(), signal.SIGTERM)

    return called


@pytest.fixture
def engines(monkeypatch):
    """The children that were started, of these commands in turn; `called` is told of each call."""
    started = []

    def prepare(commands, called):
        def start(links, *, env=(), **options):
            started.append(subprocess.Popen(commands[len(started)], **options))
            called("start")
            return started[-1]

        def open_links(*_):
            called("open")
            return [Link()]

        for room in (supervising, supervising_server):
            monkeypatch.setattr(room, "open_links", open_links)
        monkeypatch.setattr(supervising, "start_engine", start)
        return started

    for name in ("require_library", "build"):
        monkeypatch.setattr(rpc, name, lambda: "")
    yield prepare
    for child in started:
        child.kill()
        child.wait()


@pytest.mark.parametrize("when", ["open 2", "start 2"])
def test_a_server_ends_at_a_signal_that_comes_as_its_worker_is_back(engines, when):
    """Bug: it was heard, and the server began again all the same."""
    started = engines([LOST, ENDLESS], press(when))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        supervising_server.run_server(["a:1"], listener)
    assert all(child.returncode is not None for child in started)
    assert len(started) == int(when == "start 2") + 1


def test_a_command_ends_at_a_signal_that_comes_as_its_engine_is_started(engines):
    started = engines([ENDLESS], press("start 1"))
    with pytest.raises(WorkerError, match="SIGTERM"):
        supervising.run_command(["a:1"])
    assert started[0].returncode == -signal.SIGTERM
