"""Answers every request with status 503 while no engine lives: what a supervisor does meanwhile."""

import json
import select
import socket
import threading
import time
from contextlib import suppress

from trimix_gguf.server.errors import RequestError, error_json

RETRY_S = 5
_MOST_HEAD, _WAITS_S, _LINGER_S, _LOOKS_S = 1 << 16, 5.0, 2.0, 0.2


def lost_worker(message: str) -> RequestError:
    """What a client is told."""
    wait = {"Retry-After": str(RETRY_S)}
    return RequestError(message, status=503, code="worker_lost", headers=wait)


class StandIn:
    """Takes connections at `listener`, which others may use too, from a thread."""

    def __init__(self, listener: socket.socket, message: str) -> None:
        self.message = message
        self._listener, self._ended = listener, threading.Event()
        listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            if not select.select([self._listener], [], [], _LOOKS_S)[0]:
                continue
            with suppress(OSError):  # another process may have taken it
                link, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        error = lost_worker(self.message)
        body = json.dumps(error_json(error), ensure_ascii=False).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
            f"retry-after: {RETRY_S}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with link, suppress(OSError):
            link.settimeout(_WAITS_S)
            asked = b""
            while b"\r\n\r\n" not in asked and len(asked) < _MOST_HEAD:
                part = link.recv(4096)
                if not part:
                    return
                asked += part
            link.sendall(head.encode() + body)
            link.shutdown(socket.SHUT_WR)
            # To close with unread bytes would reset the connection, and hide the answer.
            deadline = time.monotonic() + _LINGER_S
            while time.monotonic() < deadline and link.recv(1 << 16):
                pass

    def end(self) -> None:
        """Take no more connections."""
        self._ended.set()
        self._thread.join()
