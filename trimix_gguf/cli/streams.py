"""The edge of the process: its standard streams and its arguments, as each system gives them."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from unicodedata import category

from trimix_gguf.errors import PromptError

_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn the text around


def open_all() -> None:
    """Have all three streams, in UTF-8; one that was closed is empty, or takes all and keeps none.

    A service or a desktop starts programs with closed streams; Python then has None there.
    """
    # Each gets the number that was closed: else a later file would, and with it what is printed.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where another program has put its own
            # File names may hold what is no text; to show it is better than to fail.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise PromptError where an argument is not UTF-8, so that no command has to ask."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            raise PromptError(
                f"argument '{shown}' is not UTF-8; set the terminal to UTF-8, or rename the file"
            ) from None


def printable(text: str) -> str:
    """A line without control characters: what a file or a template says may hold a terminal's."""
    return "".join(
        c.encode("unicode_escape").decode() if category(c) in ("Cc", "Cs") or c in _TURNS else c
        for c in text
    )


def write_answer(text: str) -> None:
    """Part of an answer; control characters, which a terminal would obey, stay out of one."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or category(c) != "Cc")
    sys.stdout.write(text)
    sys.stdout.flush()


def reader_is_gone(error: OSError) -> bool:
    """Whether the program that reads our output has ended, as `head` does; Windows says EINVAL."""
    windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or windows


def let_go() -> None:
    """Give up output that cannot be written: at its exit, Python would print a traceback of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
