"""Progress of long work: a bar for people, a line now and then for a log. On stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def count_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal; in a log, a line per tenth."""
    if not sys.stderr.isatty():
        told = -1  # tenths that were printed

        def log(done: int, total: int) -> None:
            nonlocal told
            if (tenths := 10 * done // max(1, total)) != told:
                told = tenths
                print(f"{name}: {done}/{total}", file=sys.stderr)

        yield log
        return
    from rich.progress import MofNCompleteColumn

    with _bar(name, MofNCompleteColumn()) as update:
        yield lambda done, total: update(completed=done, total=total)


@contextmanager
def token_progress(
    total: int, what: str, *, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar, drawn only on a terminal; yields progress(n_tokens)."""
    if quiet or not sys.stderr.isatty():
        yield lambda n: None
        return
    tokens = "{task.completed}/{task.total} tokens"
    with _bar(what, tokens, total=total, transient=True) as update:
        yield lambda n: update(advance=n)


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with bytes, rate and time left; yields progress(what, done, total)."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    columns = DownloadColumn(), TransferSpeedColumn()
    with _bar(what, *columns, disable=not sys.stderr.isatty()) as update:
        yield lambda name, done, total: update(completed=done, total=total)


@contextmanager
def _bar(
    what: str, *columns: Any, total: int | None = None, **options: Any
) -> Iterator[Callable[..., None]]:
    """A bar of rich with these columns before the time left; `options` are those of Progress."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), **options) as bar:
        yield partial(bar.update, bar.add_task(what, total=total))
