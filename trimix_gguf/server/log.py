"""Lines of a log, written by a thread of its own."""

import os
import queue
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

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
        self._file: IO[Any] = sys.stderr if path is None else _open(path)
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
                # Past Python's buffers: their locks would hold up the end of the process.
                os.write(self._file.fileno(), f"{line}\n".encode("utf-8", "backslashreplace"))
        if self._path is not None:
            self._file.close()

    def _follow(self) -> None:
        """Open the file again where its name no longer leads to what is open."""
        if self._path is None:
            return
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            newer = _open(self._path)
            self._file.close()
            self._file = newer


def _open(path: Path) -> IO[bytes]:
    return path.open("ab", buffering=0)
