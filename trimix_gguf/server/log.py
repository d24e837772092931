"""Lines of a log, written by a thread of its own."""

import os
import queue
import sys
import threading
from contextlib import suppress
from pathlib import Path

_MOST_WAITING = 1000  # lines; what comes on top is lost
_LAST_S = 1.0  # for those that wait at the end


class Log:
    """Lines to a file, or to standard error.

    A full disk, or a reader that has stopped reading, holds up no answer. The file is opened again
    where another program has moved it away, as logrotate does. Raises OSError where it cannot be
    opened at first.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._fd = sys.stderr.fileno() if path is None else _open(path)
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Have a line written soon."""
        with suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self) -> None:
        """Write what waits, for a moment."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError):
                self._follow()
                os.write(self._fd, f"{line}\n".encode("utf-8", "backslashreplace"))

    def _follow(self) -> None:
        """Open the file again where its name no longer leads to what is open."""
        if self._path is None:
            return
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            same = False
        if not same:
            newer = _open(self._path)
            os.close(self._fd)
            self._fd = newer


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
