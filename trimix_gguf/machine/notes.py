"""Small notes in the cache folder: what they hold can be found again, so a lost one is no error."""

from contextlib import suppress
from typing import Any

from trimix_gguf.machine.folders import cache_folder

# No such file or no room; not UTF-8, or not JSON; no home folder.
_UNUSABLE = (OSError, ValueError, RuntimeError)


def read_note(name: str) -> str:
    """The text of a note; empty where it cannot be read."""
    try:
        return (cache_folder() / name).read_text(encoding="utf-8")
    except _UNUSABLE:
        return ""


def read_table(name: str) -> dict[str, Any]:
    """The JSON object of a note; empty where it cannot be read, or holds something else."""
    from trimix_gguf.machine.typed_json import parse

    try:
        table: dict[str, Any] = parse(read_note(name), {})
    except ValueError:
        return {}
    return table


def write_note(name: str, text: str) -> None:
    """Write a note whole, or leave it as it was where that cannot be done."""
    from trimix_gguf.machine.files import write_text  # psutil, which most starts do not need

    with suppress(*_UNUSABLE):
        note = cache_folder() / name
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, text)
