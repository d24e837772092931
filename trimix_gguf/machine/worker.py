"""A child process that answers calls, one at a time, and is killed where one costs too much.

For what strangers send and nobody can judge beforehand, such as a chat template. The child is
given no environment to read, little memory, and little processor time; it is started again for
the next call.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

CPU_S = 1.0  # per call, of the child's own processor time: a busy machine changes nothing
_WALL_S = 30.0  # where the system has no such limit
_MOST_BYTES = 1 << 30  # of address space; 100 MB are the interpreter's
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "LANG")


class TooCostly(Exception):
    """The child took too long, or died."""


class Worker:
    """Up to `most` child processes that run `module`'s main(); each is started when needed."""

    def __init__(self, module: str, *, most: int = 2) -> None:
        self._module = module
        self._free = threading.Semaphore(most)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def call(self, request: object) -> Any:
        """The child's answer; waits for a free child. Raises TooCostly."""
        line = json.dumps(request).encode() + b"\n"
        with self._free:
            with self._lock:
                child = self._idle.pop() if self._idle else self._start()
                self._busy.add(child)
            timer = threading.Timer(_WALL_S, child.kill)
            timer.start()
            answer = b""
            try:
                assert child.stdin is not None and child.stdout is not None
                with suppress(OSError):  # it has died
                    child.stdin.write(line)
                    child.stdin.flush()
                    answer = child.stdout.readline()
            finally:  # on Ctrl-C too: a child with half a call is of no use
                timer.cancel()
                with self._lock:
                    self._busy.discard(child)
                    if answer.endswith(b"\n"):
                        self._idle.append(child)
                if not answer.endswith(b"\n"):
                    _end(child)
            if not answer.endswith(b"\n"):
                raise TooCostly
            return json.loads(answer)

    def close(self) -> None:
        """End the children, also those that are at work."""
        with self._lock:
            children, self._idle = [*self._idle, *self._busy], []
        for child in children:
            _end(child)

    def _start(self) -> subprocess.Popen[bytes]:
        program = f"import sys; sys.path[:] = {sys.path!r}; from {self._module} import main; main()"
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-c", program],
            env={**environment, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    child.wait()


def answer_calls(answer: Callable[[Any], object]) -> None:
    """What a child runs: `answer` for each line of standard input, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's matter
    if sys.platform != "win32":
        import resource

        os.nice(10)  # whoever waits for the answer of a model goes first
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        if sys.platform != "win32":  # its signal ends the process
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
        reply = json.dumps(answer(json.loads(line))).encode()
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()
