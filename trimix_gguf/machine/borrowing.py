"""Workers on other machines, as the command sees them that uses them: machine/lending.py answers.

The line of control stays open for as long as the worker is used, and tells when it is lost.
"""

import json
import re
import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any

from trimix_gguf.errors import WorkerError
from trimix_gguf.machine.typed_json import parse

HELLO = "TRIMIX 1 "  # then JSON
_MOST_LINE = 1 << 16
_CONNECTS_S = 10.0
_ANSWERS_S = 150.0  # a worker may have to start its server again
_PING_S = 1.0
_SILENT_S = 30.0  # a busy machine may be late; one that is off does not acknowledge, see keep_alive
_GONE_S = 4  # seconds after which the system gives up on a machine that acknowledges nothing


def parse_workers(text: str) -> list[str]:
    """'HOST:PORT,HOST:PORT' -> endpoints; raises WorkerError."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for endpoint in found:
        match = re.fullmatch(r"[A-Za-z0-9._-]+:(\d{1,5})", endpoint)
        if match is None or not 0 < int(match[1]) < 65536:
            raise WorkerError(f"--rpc {endpoint!r} is not HOST:PORT, such as 192.168.1.20:50052")
        if found.count(endpoint) > 1:
            raise WorkerError(f"--rpc names {endpoint} twice; give each worker once")
    if not found:
        raise WorkerError("--rpc names no worker; give HOST:PORT of each, with commas between them")
    return found


def keep_alive(link: socket.socket) -> None:
    """Have the system ask after the other machine: a cable that is cut says nothing."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {"TCP_KEEPIDLE": 1, "TCP_KEEPALIVE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
    for name, value in {**settings, "TCP_USER_TIMEOUT": 1000 * _GONE_S}.items():
        if hasattr(socket, name):  # each system has some of them
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def read_line(link: socket.socket) -> str:
    """The next line; empty where there is none any more. Raises OSError."""
    held = bytearray()
    while not held.endswith(b"\n"):
        byte = link.recv(1)
        if not byte or len(held) > _MOST_LINE:
            return ""
        held += byte
    return held.decode("utf-8", "replace").rstrip("\n")


class Link:
    """A worker's line of control. `devices` is what it lends."""

    def __init__(self, endpoint: str, build: str) -> None:
        """Open it; raises WorkerError where it cannot be used, with the reason."""
        self.endpoint = endpoint
        self.sent = self.received = 0  # bytes, as the worker counts them
        self._lost: str | None = None
        self._is_closed = False
        host, _, port = endpoint.rpartition(":")
        try:
            self._link = socket.create_connection((host, int(port)), timeout=_CONNECTS_S)
        except OSError as error:
            reason = "it does not answer" if isinstance(error, TimeoutError) else _reason(error)
            raise WorkerError(
                f"worker {endpoint}: {reason}; is `trimix worker` running there?"
            ) from None
        keep_alive(self._link)
        try:
            self.devices = self._greet(build)
        except BaseException:
            self._link.close()
            raise

    def _greet(self, build: str) -> list[dict[str, Any]]:
        self._link.settimeout(_ANSWERS_S)
        try:
            self._link.sendall(f"{HELLO}{json.dumps({'build': build})}\n".encode())
            said = parse(read_line(self._link), {})
            if refused := said.get("refused", said.get("lost")):
                raise WorkerError(f"worker {self.endpoint} refuses: {refused}")
            if said["build"] != build:
                raise WorkerError(
                    f"worker {self.endpoint} has {said['build']}, and this is {build}; use one "
                    "version on both"
                )
            devices: list[dict[str, Any]] = said["devices"]
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            raise WorkerError(
                f"{self.endpoint} does not answer as `trimix worker` does; is it one?"
            ) from None
        return devices

    def watch(self, on_lost: Callable[["Link"], None]) -> None:
        """Ping it from a thread, and call `on_lost` once when it is gone."""

        def work() -> None:
            self._lost = self._wait()
            if not self._is_closed:
                on_lost(self)

        threading.Thread(target=work, daemon=True).start()

    def _wait(self) -> str:
        """Why it was lost, in words."""
        self._link.settimeout(_SILENT_S)
        try:
            while True:
                self._link.sendall(b"ping\n")
                line = read_line(self._link)
                if not line:
                    return "has ended"
                said = parse(line, {})
                if "lost" in said:
                    return f"was lost: {said['lost']}"
                self.sent, self.received = said["sent"], said["received"]
                select.select([self._link], [], [], _PING_S)  # wakes where it is lost
        except TimeoutError as error:
            kernel = error.errno is not None
            return "cannot be reached any more" if kernel else f"is silent for {_SILENT_S:g} s"
        except OSError as error:
            return f"was lost: {_reason(error)}"
        except (ValueError, LookupError, TypeError):
            return "does not answer as before"

    @property
    def lost(self) -> str | None:
        """One line that names the worker and says what happened, once it was lost."""
        if self._lost is None:
            return None
        port = self.endpoint.rpartition(":")[2]
        again = f"start it again there (trimix worker --port {port})"
        return f"worker {self.endpoint} {self._lost}; {again}"

    def close(self) -> None:
        """Let the worker go."""
        self._is_closed = True
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()


def open_links(endpoints: Sequence[str], build: str) -> list[Link]:
    """A link to each worker; none where one of them cannot be used. Raises WorkerError."""
    with ExitStack() as stack:
        links = [stack.enter_context(closing(Link(each, build))) for each in endpoints]
        stack.pop_all()
    return links


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
