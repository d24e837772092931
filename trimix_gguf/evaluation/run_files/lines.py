"""The lines of a run's files: what is complete stays, a line cut off by a kill is written again."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypedDict

import numpy as np

from trimix_gguf.errors import DataError
from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.mixing.scoring import Float64

Nested = list[Any]  # lists of numbers, as deep as an array has dimensions


class MethodOutput(TypedDict, total=False):
    """What a method answered, and its weights; `n_filled` of the tokens were not decoded."""

    alpha: float
    beta: float
    gamma: float
    text: str
    n_tokens: int
    n_filled: int


class LineExtras(TypedDict, total=False):
    """What a line has for some tasks and methods only: choices, sums over a prompt, the grid."""

    choices: list[str]
    n_prompt_tokens: int
    n_scored: int
    n_answers: int
    nll: Nested
    answers_nll: Nested
    entropy: Nested
    choice_nll: Nested
    grid: list[list[str | None]]  # the oracle's texts; None for points that a race left


class AnswerLine(LineExtras):
    """One example, and its answers by method."""

    id: str
    references: list[str]
    outputs: dict[str, MethodOutput]


class SampleLine(TypedDict):
    """A prompt of the sample for TASK: its mean nats over AXIS²."""

    id: str
    nll: Nested


def append_line(lines: IO[str], line: AnswerLine | SampleLine) -> None:
    """Write the JSON line of one example."""
    lines.write(_json_line(line))


def _json_line(line: AnswerLine | SampleLine) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def finished(file: Path) -> dict[str, AnswerLine]:
    """The complete lines of `file` by their ids; cuts off what a kill left of the last one.

    Raises DataError for lines that are not a run's.
    """
    if not file.exists():
        return {}
    raw = file.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(file, len(whole))
    try:
        # Not splitlines(): an answer may contain other line ends, such as U+2028.
        lines = [parse(line, object) for line in whole.split(b"\n")[:-1]]
        return {line["id"]: line for line in lines}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file} holds lines that are not a run's; give another folder") from None


def put_in_order(file: Path, lines: Mapping[str, AnswerLine], ids: Sequence[str]) -> None:
    """Write the lines of `file`, by their ids, in the order of `ids`, if they have another."""
    rank = {id: at for at, id in enumerate(ids)}
    ordered = sorted(lines, key=lambda id: rank.get(id, len(rank)))
    if ordered != list(lines):
        write_text(file, "".join(_json_line(lines[id]) for id in ordered))


def write_json(file: Path, value: object) -> None:
    """Write all of `file`, or nothing."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(file: Path) -> Any:
    """Read what write_json wrote. Raises DataError."""
    try:
        return parse(file.read_text(encoding="utf-8"), object)
    except (OSError, ValueError):
        raise DataError(f"{file} is damaged; give another folder") from None


def finite(value: object, shape: tuple[int, ...]) -> Float64 | None:
    """Numbers of that shape, from JSON; None if the shape differs or a number is not finite."""
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == shape and np.isfinite(numbers).all() else None


def has_grid(line: Mapping[str, object], n: int, *, race: bool) -> bool:
    """Whether a line has a text for each of n × n points; a race may have None for some.

    A race leaves points only where answers are free text, not where there are choices.
    """
    grid = line.get("grid")
    if not isinstance(grid, list) or [type(row) is list and len(row) for row in grid] != [n] * n:
        return False
    allowed = {str, type(None)} if race and not line.get("choices") else {str}
    return {type(text) for row in grid for text in row} <= allowed
