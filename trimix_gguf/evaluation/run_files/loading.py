"""Reads a run's folder back; one that is damaged, unfinished or not a run's gets a clear error."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from trimix_gguf.choosing.methods import ORACLE
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.run_files.answers import GridTexts, RunAnswers, TaskAnswers
from trimix_gguf.evaluation.run_files.lines import MethodOutput, finite, has_grid
from trimix_gguf.evaluation.run_files.record import FORMAT, RunRecord, kept_task
from trimix_gguf.evaluation.tasks import custom_task, find_task
from trimix_gguf.evaluation.tasks.rows import Fields, Row, check_type, read_jsonl, read_lines
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.mixing.scoring import Float64

_UNFINISHED = "give the run's command again to finish it"
_DAMAGED = "the file is damaged, or not a run's"
_RECORD: Fields = {
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


def load_run(folder: Path, *, so_far: bool = False) -> RunAnswers:
    """Read a run's folder; raises DataError if it is not a run's, unfinished or damaged.

    `so_far` reads what an unfinished run has: the tasks that were begun, and the single models that
    have answered as many questions.
    """
    record = _record(folder / "run.json")
    if so_far:
        return _begun(folder, record)
    tasks = {name: _task_answers(folder, name, record) for name in record["tasks"]}
    for name, wanted in record.get("n_questions", {}).items():
        if len(tasks[name].ids) != wanted:
            raise DataError(
                f"{folder} is unfinished: {name} has {len(tasks[name].ids)} of {wanted} answers; "
                "give the same trimix eval command again"
            )
    return RunAnswers(folder, record, tasks)


def _begun(folder: Path, record: RunRecord) -> RunAnswers:
    @cache
    def ids(name: str) -> set[str]:
        file = folder / f"{name}.jsonl"
        whole = file.is_file() and b"\n" in file.read_bytes()
        return {line["id"] for _, line in _lines(file, ended=True)} if whole else set()

    begun = [name for name in record["tasks"] if ids(name)]
    if not begun:
        raise DataError(f"{folder} has no answers yet; give the run's command again")
    singles = record.get("singles") or {}
    level = [s for s in singles if all(ids(t) == ids(f"{t}.{s}") for t in begun)]
    record["tasks"], record["singles"] = begun, {s: singles[s] for s in level}
    tasks = {name: _task_answers(folder, name, record, ended=True) for name in begun}
    return RunAnswers(folder, record, tasks)


def _record(file: Path) -> RunRecord:
    if not file.is_file():
        raise DataError(f"{file.parent} has no run: run.json is missing")
    try:
        record: RunRecord = parse("\n".join(read_lines(file)), object)
    except ValueError:
        raise DataError(f"{file} is not JSON: {_DAMAGED}") from None
    _check(str(file), record, _RECORD)
    if record["format"] != FORMAT:
        raise DataError(
            f"{file} has format {record['format']}, expected {FORMAT}: another version wrote it"
        )
    for field, names in (("tasks", record["tasks"]), ("methods", record["methods"])):
        if not names or any(type(name) is not str for name in names):
            raise DataError(f"{file}: {field!r} should be names, one or more; {_DAMAGED}")
    axis = record["axis"]
    numbers = all(type(weight) in (int, float) for weight in axis)
    if not (numbers and axis == sorted(set(axis)) and {0, 1} <= set(axis)):
        raise DataError(f"{file}: 'axis' should be rising numbers from 0 to 1; {_DAMAGED}")
    return record


def _task_answers(
    folder: Path, name: str, record: RunRecord, *, ended: bool = False
) -> TaskAnswers:
    task_files = record.get("task_files") or {}
    if name in task_files:
        kept = kept_task(folder, name)  # runs of earlier versions have none
        task = custom_task(kept if kept.exists() else Path(task_files[name]))
    else:
        task = find_task(name, record["lang"])
    file = folder / f"{name}.jsonl"
    rows = _lines(file, ended=ended)
    ids = [line["id"] for _, line in rows]
    asked = [method for method in record["methods"] if method != ORACLE]
    outputs = {method: _outputs(rows, method) for method in asked}
    texts = {method: [o["text"] for o in outputs[method]] for method in asked}
    weights = {
        method: np.array([(o["alpha"], o["beta"]) for o in outputs[method]], np.float64)
        for method in asked
    }
    for single in record.get("singles") or {}:
        other = folder / f"{name}.{single}.jsonl"
        answers = {line["id"]: (where, line) for where, line in _lines(other, ended=ended)}
        _check_ids(other, ids, list(answers))
        _check_ids(file, list(answers), ids)
        texts[single] = [o["text"] for o in _outputs([answers[i] for i in ids], single)]
    n = len(record["axis"])
    choices = [line.get("choices", []) for _, line in rows]
    grid_texts = None
    if ORACLE in record["methods"]:
        grid_texts = _grid_texts(rows, n - 1, race=bool(record.get("race")))
    return TaskAnswers(
        task=task,
        axis=tuple(float(weight) for weight in record["axis"]),
        ids=ids,
        references=[line["references"] for _, line in rows],
        choices=choices,
        texts=texts,
        weights=weights,
        grid_texts=grid_texts,
        n_scored=_numbers(rows, "n_scored", [()] * len(rows)),
        nll=_numbers(rows, "nll", [(n, n)] * len(rows)),
        choice_nll=_numbers(rows, "choice_nll", [(len(c), n, n) for c in choices]),
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


def _check(where: str, record: object, fields: Fields) -> None:
    if not isinstance(record, dict):
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


def _outputs(rows: Sequence[Row], name: str) -> list[MethodOutput]:
    found: list[MethodOutput] = []
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
    """A field of all lines, padded with nan to the largest shape; None if no line has it."""
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
