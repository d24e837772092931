"""trimix serve --rpc: the server is a child, started again when a worker it lost is back.

The parent opens the listening socket, and the child has it too: no connection is ever refused.
While no child lives, the parent answers with status 503 and the name of the worker. The two tell
each other what happens over two pipes: `ready` and `aborted`, and `lost`.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any

from trimix_gguf.cli import supervising
from trimix_gguf.errors import TrimixError
from trimix_gguf.machine import rpc
from trimix_gguf.machine.borrowing import Link, open_links
from trimix_gguf.server.standing_in import StandIn, lost_worker

_FDS = "TRIMIX_SERVER_FDS"  # in the child's environment: the listener and the two pipes
_TRIES_S = 1.0  # between attempts to have the workers back
_LAST_WORDS_S = 3.0  # for answers that are cut off to say so
_ENDS_S = 6.0  # after this the parent ends the child


# -- the parent ---------------------------------------------------------------------------------


def run_server(endpoints: Sequence[str], listener: socket.socket) -> int:
    """Keep a server on these workers alive until it is told to end; its exit code.

    Raises WorkerError, BuildError where it cannot begin.
    """
    rpc.require_library()
    links: list[Link] | None = open_links(endpoints, rpc.build())
    heard: list[int] = []
    children: list[subprocess.Popen[bytes]] = []
    stand_in: StandIn | None = None
    with supervising.signals_for(children, heard), ExitStack() as at_end:
        while links is not None:
            child = _Child(links, listener, stand_in)
            supervising.pass_on_to(child.process, children, heard)
            code = child.wait()
            was_ready, stand_in = child.was_ready, child.stand_in
            for link in links:
                link.close()
            if heard or not (child.lost or was_ready or stand_in):
                return code
            message = child.lost or "the engine has ended, and is started again"
            print(f"trimix: {message}", file=sys.stderr, flush=True)
            if stand_in is None:
                stand_in = StandIn(listener, message)
                at_end.callback(stand_in.end)
            stand_in.message = message
            links = _back(endpoints, heard)
    return 130 if signal.SIGINT in heard else 0


def _back(endpoints: Sequence[str], heard: list[int]) -> list[Link] | None:
    """Links to all workers once they are there again; None where a signal came first."""
    while not heard:
        time.sleep(_TRIES_S)
        with suppress(TrimixError):
            links = open_links(endpoints, rpc.build())
            if not heard:
                return links
            for link in links:
                link.close()
    return None


class _Child:
    """A server in a child process; `stand_in` answers until it is ready."""

    def __init__(
        self, links: Sequence[Link], listener: socket.socket, stand_in: StandIn | None
    ) -> None:
        self._links, self.stand_in = links, stand_in
        self.was_ready, self.lost = False, ""
        self._lock = threading.Lock()
        up, up_end = os.pipe()
        down_end, down = os.pipe()
        fds = (listener.fileno(), up_end, down_end)
        self.process = supervising.start_engine(
            links, pass_fds=fds, env={_FDS: ",".join(map(str, fds))}
        )
        for fd in (up_end, down_end):
            os.close(fd)
        self._up, self._down = os.fdopen(up, "rb"), os.fdopen(down, "wb")
        threading.Thread(target=self._listen, daemon=True).start()
        for link in links:
            link.watch(lambda lost: self._tell(str(lost.lost)))

    def _listen(self) -> None:
        with self._up:
            for line in self._up:
                if line == b"ready\n":
                    self.was_ready = True
                    if self.stand_in is not None:
                        self.stand_in.end()
                        self.stand_in = None
                else:  # llama.cpp would have ended it
                    self._tell(supervising.what_was_lost(self._links))

    def _tell(self, lost: str) -> None:
        """Tell the child that a worker is lost: it ends. Only the first time."""
        with self._lock:
            if self.lost:
                return
            self.lost = lost
        with suppress(OSError):
            self._down.write(f"{lost}\n".encode())
            self._down.flush()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_ENDS_S)
            return
        self.process.kill()

    def wait(self) -> int:
        """The child's exit code."""
        code = self.process.wait()
        if code == supervising.LOST and not self.lost:
            self.lost = supervising.what_was_lost(self._links)
        with suppress(OSError):
            self._down.close()
        return code


# -- the child ----------------------------------------------------------------------------------


def is_supervised() -> bool:
    """Whether this process is the server that run_server started."""
    return _FDS in os.environ


class Supervised:
    """What the child has of its parent."""

    def __init__(self) -> None:
        listener, up, down = map(int, os.environ.pop(_FDS).split(","))
        self.listener = socket.socket(fileno=listener)
        for fd in (listener, up, down):
            os.set_inheritable(fd, False)
        self._up = up
        self._down: IO[bytes] = os.fdopen(down, "rb")
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self, api: Any) -> None:
        """From now on, have the server's requests fail where a worker is lost, and then end."""
        rpc.on_abort(self._tell_and_wait)
        threading.Thread(target=self._listen, args=(api,), daemon=True).start()

    def is_ready(self) -> None:
        """Say that requests are taken; called from the event loop."""
        self._loop = asyncio.get_running_loop()
        os.write(self._up, b"ready\n")

    def _tell_and_wait(self, reason: str) -> None:
        if not supervising.is_of_a_worker(reason):
            print(f"trimix: llama.cpp ended: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
        os.write(self._up, b"aborted\n")
        while True:  # this thread must not return to llama.cpp, which ends the process
            time.sleep(60)

    def _listen(self, api: Any) -> None:
        line = self._down.readline().decode().strip()
        if not line:  # the parent has died
            os._exit(1)
        if self._loop is not None:
            # New connections wait for the parent: one taken now could be cut off at the end.
            self._loop.call_soon_threadsafe(self._loop.remove_reader, self.listener.fileno())
            _fail(api, line, self._loop.call_soon_threadsafe)
        os._exit(supervising.LOST)


def _fail(api: Any, line: str, call: Callable[..., Any]) -> None:
    """Have the server tell its clients; returns when it has, or could not."""
    with suppress(RuntimeError):  # the loop has ended
        call(api.fail, lost_worker(line))
    deadline = time.monotonic() + _LAST_WORDS_S
    time.sleep(0.2)
    while api.n_open and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # for the last bytes
