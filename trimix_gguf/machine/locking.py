"""One process at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimix_gguf.errors import TrimixError


@contextmanager
def alone(lock: Path, busy: TrimixError) -> Iterator[None]:
    """Hold the file `lock`, which stays behind; raises `busy` where another process holds it.

    The operating system lets go of it with the process: a kill leaves nothing to clear.
    """
    from filelock import FileLock, Timeout  # huggingface_hub's own

    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        held.release()
