"""How a run shows how far it is."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Shown = Callable[[int, int], None]  # (done, total)
OpenBar = Callable[[str], AbstractContextManager[Shown]]  # the name of a piece of work -> its bar


@contextmanager
def no_bar(name: str) -> Iterator[Shown]:
    """An OpenBar that shows nothing."""
    yield lambda done, total: None
