"""What `trimix worker` does: lends this machine's memory and devices to one engine at a time.

A child process runs llama.cpp's RPC server at a private port; this process stands in front of it.
An engine opens a line of control first: `TRIMIX 1 {"build": …}`. A worker of the same build answers
with its devices, and then passes on what llama.cpp sends from that address, until that line ends.
On it `ping` is answered at any time, and it says why a session ended.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from trimix_gguf.errors import WorkerError
from trimix_gguf.machine import rpc
from trimix_gguf.machine.borrowing import HELLO, keep_alive, read_line
from trimix_gguf.machine.typed_json import parse

_STARTS_S = 120.0  # for the server to listen
_IDLE_S = 30.0  # for it to end the last session
_SILENT_S = 60.0  # after this an engine that says nothing is gone
_FIRST_S = 20.0  # for the first byte of a connection
_CHUNK = 1 << 20
_RPC_HELLO = bytes([14]) + (24).to_bytes(8, "little") + bytes(24)  # a command, its size, no RDMA


class Server:
    """llama.cpp's RPC server in a child process, started again whenever it has died."""

    def __init__(self, devices: Sequence[str], *, n_threads: int, cache: str | None) -> None:
        self._devices, self._n_threads, self._cache = list(devices), n_threads, cache
        self._child: subprocess.Popen[str] | None = None
        self._port, self._said = 0, ""

    def start(self) -> None:
        """Have the child listen; raises WorkerError where it does not."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        asked = (self._port, self._cache, self._n_threads, self._devices)
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from trimix_gguf.machine import lending; "
            f"lending.serve{asked!r}"
        )
        self._child = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,  # it ends with this process
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        threading.Thread(target=self._listen, args=(self._child,), daemon=True).start()
        deadline = time.monotonic() + _STARTS_S
        while self._child.poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                self.wait_until_idle()
                return
            time.sleep(0.05)
        raise WorkerError(f"llama.cpp's RPC server does not start: {self._said or 'no reason'}")

    def _listen(self, child: "subprocess.Popen[str]") -> None:
        assert child.stderr is not None
        for line in child.stderr:
            self._said = line.strip() or self._said

    def wait_until_idle(self) -> None:
        """Return when the server takes a new session; raises OSError where it does not."""
        with self.connect() as link:
            link.settimeout(_IDLE_S)
            link.sendall(_RPC_HELLO)
            if not link.recv(1):
                raise OSError("no answer")

    def connect(self) -> socket.socket:
        """A connection to the server."""
        link = socket.create_connection(("127.0.0.1", self._port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link

    def why_it_ended(self) -> str:
        """In words, why the server closed a session."""
        child = self._child
        assert child is not None
        with suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
        if child.poll() is None:
            return f"its server refused what it was asked ({self._said or 'no reason given'})"
        code = child.returncode
        with suppress(ValueError):
            return f"its server died of {signal.Signals(-code).name}"
        return f"its server died (exit code {code}; {self._said or 'no reason given'})"

    @property
    def is_alive(self) -> bool:
        """Whether the child runs."""
        return self._child is not None and self._child.poll() is None

    @property
    def n_bytes(self) -> int:
        """Bytes of address space that the child has; 0 where the system does not say."""
        if sys.platform != "linux" or self._child is None:
            return 0
        with open(f"/proc/{self._child.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()


def serve(port: int, cache: str | None, n_threads: int, devices: list[str]) -> None:
    """What the child runs, until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's matter
    rpc.end_with_input()
    rpc.serve(port, cache, n_threads, devices)
    sys.exit("it could not listen")


class Lender:
    """Answers engines at `listener`; `describe` gives what this machine has free now."""

    def __init__(
        self,
        listener: socket.socket,
        server: Server,
        describe: Callable[[], list[dict[str, Any]]],
        say: Callable[[str], None],
    ) -> None:
        self._listener, self._server, self._describe = listener, server, describe
        self._say, self.build = say, rpc.build()
        listener.listen()  # whoever is told the address may ask at once
        self._lock = threading.Lock()
        self._session: _Session | None = None

    def run(self) -> None:
        """Take connections until Ctrl-C."""
        self._listener.settimeout(1.0)  # Windows hands Ctrl-C over between two calls only
        while True:
            try:
                link, address = self._listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=self._take, args=(link, address[0]), daemon=True).start()

    def _take(self, link: socket.socket, host: str) -> None:
        with link, suppress(OSError):
            keep_alive(link)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.settimeout(_FIRST_S)
            first = link.recv(1, socket.MSG_PEEK)
            if first == HELLO[:1].encode():
                self._control(link, host)
            elif first == _RPC_HELLO[:1]:
                self._pass_on(link, host)

    def _control(self, link: socket.socket, host: str) -> None:
        """A line of control: refused, or a session for as long as it is open."""
        refused, session = self._admit(read_line(link), link, host)
        if session is None:
            _send(link, {"refused": refused, "build": self.build})
            return
        try:
            if not self._server.is_alive:
                self._server.start()
            else:
                self._server.wait_until_idle()  # the last engine's memory is free again
            _send(link, {"build": self.build, "devices": self._describe()})
            self._say(f"{host} has begun")
            link.settimeout(_SILENT_S)
            while read_line(link) == "ping":
                session.tell({"sent": session.sent, "received": session.received})
        except (WorkerError, OSError) as error:
            session.tell({"lost": str(error)})
        finally:
            session.close()
            with self._lock:
                self._session = None
            got, sent = (f"{n / 1e6:.3f} MB" for n in (session.received, session.sent))
            self._say(f"{host} has ended; it sent {got} and got {sent}")

    def _admit(
        self, line: str, link: socket.socket, host: str
    ) -> "tuple[str, None] | tuple[None, _Session]":
        word, _, rest = line.partition(" {")
        try:
            build = parse("{" + rest, {})["build"]
        except (ValueError, LookupError, TypeError):
            build = None
        if f"{word} " != HELLO or build != self.build:
            self._say(f"{host} is refused: it has another build")
            return (
                f"it has {self.build}, and this is {str(build)[:80]}; use one version on both",
                None,
            )
        with self._lock:
            if self._session is not None:
                return f"it works for {self._session.host}; a worker has one engine at a time", None
            self._session = _Session(link, host)
            return None, self._session

    def _pass_on(self, link: socket.socket, host: str) -> None:
        """Pass llama.cpp's own connection on to the server; without a session it is refused."""
        session = self._session
        if session is None or session.host != host:
            self._say(f"{host} is refused: it asked without a line of control")
            return
        with self._server.connect() as inner:
            session.links |= {link, inner}
            link.settimeout(None)
            is_leaving = threading.Event()
            back = threading.Thread(target=self._pass_back, args=(session, inner, link, is_leaving))
            back.start()
            if _pump(link, inner, session.count_received):
                is_leaving.set()  # the engine closed it
            with suppress(OSError):
                inner.shutdown(socket.SHUT_RDWR)
            back.join()
            session.links -= {link, inner}

    def _pass_back(
        self,
        session: "_Session",
        inner: socket.socket,
        link: socket.socket,
        is_leaving: threading.Event,
    ) -> None:
        _pump(inner, link, session.count_sent)
        if not is_leaving.is_set() and not session.is_closed:
            session.tell({"lost": self._server.why_it_ended()})  # before the engine notices
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


class _Session:
    """What one engine has of this worker: its line of control, and its other connections."""

    def __init__(self, control: socket.socket, host: str) -> None:
        self._control, self.host = control, host
        self.links: set[socket.socket] = set()
        self.sent = self.received = 0
        self.is_closed = False
        self._lock = threading.Lock()

    def count_received(self, n_bytes: int) -> None:
        """Count what the engine has sent."""
        self.received += n_bytes

    def count_sent(self, n_bytes: int) -> None:
        """Count what it has got."""
        self.sent += n_bytes

    def tell(self, what: dict[str, Any]) -> None:
        """Send a line of control, whole."""
        with self._lock, suppress(OSError):
            _send(self._control, what)

    def close(self) -> None:
        """End what the engine has open."""
        self.is_closed = True
        for link in list(self.links):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


def _send(link: socket.socket, what: dict[str, Any]) -> None:
    link.sendall(json.dumps(what).encode() + b"\n")


def _pump(source: socket.socket, target: socket.socket, count: Callable[[int], None]) -> bool:
    """Pass bytes on until one side closes; whether that was the source."""
    chunk = memoryview(bytearray(_CHUNK))
    while True:
        try:
            n = source.recv_into(chunk)
        except OSError:
            return True
        if n == 0:
            return True
        try:
            target.sendall(chunk[:n])
        except OSError:
            return False
        count(n)
