"""Progress of long work: a bar for people, a line now and then for a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def count_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal; in a log, a line per tenth. On stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    if not sys.stderr.isatty():
        told = -1  # tenths that were printed

        def log(done: int, total: int) -> None:
            nonlocal told
            if (tenths := 10 * done // max(1, total)) != told:
                told = tenths
                print(f"{name}: {done}/{total}", file=sys.stderr)

        yield log
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(name, total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)
