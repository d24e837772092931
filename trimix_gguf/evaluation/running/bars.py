"""How a run shows how far it is."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# The name of a piece of work -> a function that is called with (done, total).
OpenBar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextmanager
def no_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """An OpenBar that shows nothing."""
    yield lambda done, total: None
