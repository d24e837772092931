"""The files of a run: what a kill cuts off of them is written anew, what is whole is kept."""

import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import DataError
from trimix_gguf.machine.files import write_text


def append_line(lines: IO[str], line: dict[str, Any]) -> None:
    """One example's line of JSON."""
    lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def finished(file: Path) -> dict[str, dict[str, Any]]:
    """The whole lines of `file` by their ids; cuts off what a kill left of the last one.

    Raises DataError for lines that are no run's.
    """
    if not file.exists():
        return {}
    raw = file.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(file, len(whole))
    try:
        # Not splitlines(): an answer may hold other line ends, such as U+2028.
        lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        return {line["id"]: line for line in lines}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file} holds lines that are not a run's; give another folder") from None


def write_json(file: Path, value: Any) -> None:
    """The whole of `file`, or nothing."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False))


def finite(value: Any, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Numbers of that shape which JSON held; None where it held others, or one is not finite."""
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == shape and np.isfinite(numbers).all() else None


def has_grid(line: dict[str, Any], n: int, *, race: bool) -> bool:
    """Whether a line has a text for each of n × n points; after a race, None for those left.

    Points are left where answers are free, not where there are choices.
    """
    grid = line.get("grid")
    if type(grid) is not list or [type(row) is list and len(row) for row in grid] != [n] * n:
        return False
    allowed = {str, type(None)} if race and not line.get("choices") else {str}
    return {type(text) for row in grid for text in row} <= allowed


def read_json(file: Path) -> Any:
    """What write_json wrote. Raises DataError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{file} is damaged; give another folder") from None
