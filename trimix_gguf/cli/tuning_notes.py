"""What is said of a trio's tuning before it answers by `auto`."""

import sys
from typing import Any

from trimix_gguf.cli.options import named_trio


def say_tuning(options: dict[str, Any]) -> None:
    """A line on stderr where the named trio's tuning does not hold, or, once, where it has none."""
    trio_file = named_trio(options)
    if trio_file is None:
        return
    changed = trio_file.changed_since_tuning()
    if changed is not None:
        _say(f"{changed} is not the file that was tuned; run `trimix tune` again")
    elif trio_file.tuning is None and _first_time(str(trio_file.file.resolve())):
        _say(
            "this trio was never tuned, so answers to questions stay close to large_ins; "
            "`trimix tune` measures which mix answers best"
        )


def tuning_words(trio_file: Any) -> str:
    """The verdict of a trio's tuning, or why there is none."""
    if trio_file.tuning is None:
        return "none; `trimix tune` measures which mix answers best"
    changed = trio_file.changed_since_tuning()
    return f"void, {changed} was changed" if changed else str(trio_file.tuning.words)


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _first_time(name: str) -> bool:
    """Whether `name` is not yet in the list of those that were told, which it then joins."""
    from trimix_gguf.machine.notes import read_note, write_note

    told = read_note("untuned.txt")
    if name in told.splitlines():
        return False
    write_note("untuned.txt", f"{told}{name}\n")
    return True
