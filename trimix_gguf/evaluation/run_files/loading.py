"""Reads a run's folder back; what is damaged, unfinished or no run's is said in one line."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trimix_gguf.choosing.methods import ORACLE
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.reporting.predictions import Float64, GridTexts, Run, TaskRun, informed
from trimix_gguf.evaluation.run_files.lines import finite, has_grid
from trimix_gguf.evaluation.running.comparing import FORMAT
from trimix_gguf.evaluation.tasks import custom_task, find_task
from trimix_gguf.evaluation.tasks.rows import Fields, Row, check_type, read_jsonl, read_lines

_UNFINISHED = "give the run's command again to finish it"
_DAMAGED = "the file is damaged, or not a run's"
_SETTINGS: Fields = {
    "format": int,
    "lang": str,
    "tasks": list,
    "methods": list,
    "seed": int,
    "axis": list,
    "models": dict,
}
_LINE: Fields = {"id": str, "references": list, "outputs": dict}
_OUTPUT: Fields = {"text": str, "alpha": int | float, "beta": int | float}


def load_run(folder: Path, *, so_far: bool = False) -> Run:
    """Read a run's folder; raises DataError where it is none, unfinished or damaged.

    `so_far` takes what an unfinished one has: tasks that were begun, singles that are as far.
    """
    settings = _settings(folder / "run.json")
    if so_far:
        return _begun(folder, settings)
    tasks = {name: _task_run(folder, name, settings) for name in settings["tasks"]}
    for name, wanted in settings.get("n_questions", {}).items():
        if len(tasks[name].ids) != wanted:
            raise DataError(
                f"{folder} is unfinished: {name} has {len(tasks[name].ids)} of {wanted} answers; "
                "give the same trimix eval command again"
            )
    return Run(folder, settings, tasks)


def _begun(folder: Path, settings: dict[str, Any]) -> Run:
    @cache
    def ids(name: str) -> set[str]:
        file = folder / f"{name}.jsonl"
        whole = file.is_file() and b"\n" in file.read_bytes()
        return {line["id"] for _, line in _lines(file, ended=True)} if whole else set()

    begun = [name for name in settings["tasks"] if ids(name)]
    if not begun:
        raise DataError(f"{folder} has no answers yet; give the run's command again")
    singles = settings.get("singles") or {}
    level = [s for s in singles if all(ids(t) == ids(f"{t}.{s}") for t in begun)]
    settings |= {"tasks": begun, "singles": {s: singles[s] for s in level}}
    tasks = {name: _task_run(folder, name, settings, ended=True) for name in begun}
    return Run(folder, settings, tasks)


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"{file.parent} has no run: run.json is missing")
    try:
        settings = json.loads("\n".join(read_lines(file)))
    except ValueError:
        raise DataError(f"{file} is not JSON: {_DAMAGED}") from None
    _check(str(file), settings, _SETTINGS)
    if settings["format"] != FORMAT:
        raise DataError(
            f"{file} has format {settings['format']}, expected {FORMAT}: another version wrote it"
        )
    for field in ("tasks", "methods"):
        if not settings[field] or any(type(name) is not str for name in settings[field]):
            raise DataError(f"{file}: {field!r} should be names, one or more; {_DAMAGED}")
    axis = settings["axis"]
    numbers = all(type(weight) in (int, float) for weight in axis)
    if not (numbers and axis == sorted(set(axis)) and {0, 1} <= set(axis)):
        raise DataError(f"{file}: 'axis' should be rising numbers from 0 to 1; {_DAMAGED}")
    return dict(settings)


def _task_run(
    folder: Path, name: str, settings: Mapping[str, Any], *, ended: bool = False
) -> TaskRun:
    own = settings.get("task_files") or {}
    task = custom_task(Path(own[name])) if name in own else find_task(name, settings["lang"])
    file = folder / f"{name}.jsonl"
    rows = _lines(file, ended=ended)
    ids = [line["id"] for _, line in rows]
    asked = [method for method in settings["methods"] if method != ORACLE]
    outputs = {method: _outputs(rows, method) for method in asked}
    texts = {method: [o["text"] for o in outputs[method]] for method in asked}
    weights = {
        method: np.array([(o["alpha"], o["beta"]) for o in outputs[method]], np.float64)
        for method in asked
    }
    for single in settings.get("singles") or {}:
        other = folder / f"{name}.{single}.jsonl"
        answers = {line["id"]: (where, line) for where, line in _lines(other, ended=ended)}
        _check_ids(other, ids, list(answers))
        _check_ids(file, list(answers), ids)
        texts[single] = [o["text"] for o in _outputs([answers[i] for i in ids], single)]
    n = len(settings["axis"])
    choices = [line.get("choices", []) for _, line in rows]
    return informed(
        TaskRun(
            task=task,
            axis=tuple(float(weight) for weight in settings["axis"]),
            ids=ids,
            references=[line["references"] for _, line in rows],
            choices=choices,
            texts=texts,
            weights=weights,
            grid_texts=(
                _grid_texts(rows, n - 1, race=bool(settings.get("race")))
                if ORACLE in settings["methods"]
                else None
            ),
            n_scored=_numbers(rows, "n_scored", [()] * len(rows)),
            nll=_numbers(rows, "nll", [(n, n)] * len(rows)),
            choice_nll=_numbers(rows, "choice_nll", [(len(c), n, n) for c in choices]),
        )
    )


def _lines(file: Path, *, ended: bool = False) -> list[Row]:
    if not file.is_file() or file.stat().st_size == 0:
        raise DataError(f"{file} is missing or empty; {_UNFINISHED}")
    if not ended and not file.read_bytes().endswith(b"\n"):
        raise DataError(f"{file} ends in an incomplete line; {_UNFINISHED}")
    rows = read_jsonl(file, {}, ended=ended)
    seen: set[str] = set()
    for where, line in rows:
        _check(where, line, _LINE)
        if line["id"] in seen:
            raise DataError(f"{where}: example {line['id']!r} occurs twice; {_DAMAGED}")
        seen.add(line["id"])
        for field in ("references", "choices"):
            if any(type(text) is not str for text in line.get(field, [])):
                raise DataError(f"{where}: field {field!r} should be texts; {_DAMAGED}")
        if not line["references"]:
            raise DataError(f"{where}: the reference is missing; {_DAMAGED}")
    return rows


def _check(where: str, record: Any, fields: Fields) -> None:
    if type(record) is not dict:
        raise DataError(f"{where}: expected a JSON object; {_DAMAGED}")
    for name, kind in fields.items():
        check_type(where, name, record.get(name), kind)


def _check_ids(file: Path, expected: Sequence[str], got: Sequence[str]) -> None:
    known = set(got)
    missing = [i for i in expected if i not in known]
    if missing:
        raise DataError(
            f"{file} lacks {len(missing)} of {len(expected)} examples, {missing[0]!r} first;"
            f" {_UNFINISHED}"
        )


def _outputs(rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    found = []
    for where, line in rows:
        output = line["outputs"].get(name)
        if output is None:
            raise DataError(f"{where}: the answer of {name!r} is missing; {_DAMAGED}")
        _check(where, output, _OUTPUT)
        found.append(output)
    return found


def _grid_texts(rows: Sequence[Row], n: int, *, race: bool) -> GridTexts:
    for where, line in rows:
        if not has_grid(line, n, race=race):
            raise DataError(f"{where}: 'grid' should be {n} × {n} texts; {_DAMAGED}")
    points = [[[line["grid"][a][b] for _, line in rows] for b in range(n)] for a in range(n)]
    texts = [[None if None in point else point for point in row] for row in points]
    if not any(any(row) for row in texts):
        raise DataError(f"{where}: no point of 'grid' has all answers; {_DAMAGED}")
    return texts


def _numbers(rows: Sequence[Row], name: str, shapes: Sequence[tuple[int, ...]]) -> Float64 | None:
    """A field of all lines, padded with nan to the largest shape; None where no line has it."""
    if not any(name in line for _, line in rows):
        return None
    widest = tuple(max(lengths) for lengths in zip(*shapes, strict=True))
    values = np.full((len(rows), *widest), np.nan)
    for at, ((where, line), shape) in enumerate(zip(rows, shapes, strict=True)):
        one = finite(line.get(name), shape)
        if one is None:
            size = " × ".join(map(str, shape)) or "a number"
            raise DataError(f"{where}: {name!r} should be {size}, finite; {_DAMAGED}")
        values[at, ...][tuple(slice(length) for length in shape)] = one
    return values
