"""What a run answered: its folder read back, and what each method so predicts.

Models are not needed: a finished run can be judged anew as often as one likes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.information import most_informative
from trimix_gguf.evaluation.methods import DECOUPLED, INFORMATIVE, MI_ANSWERS, ORACLE
from trimix_gguf.evaluation.run import FORMAT
from trimix_gguf.evaluation.sources import Fields, Row, check_type, read_jsonl, read_lines
from trimix_gguf.evaluation.task import Task
from trimix_gguf.evaluation.tasks import custom_task, find_task
from trimix_gguf.scoring import GRID

Float64 = NDArray[np.float64]
GridTexts = list[list[list[str]]]  # [n_grid][n_grid][n]: alpha, beta, example

_FEWEST = 10  # examples that mutual information is told from
CALIBRATED = "+cal"  # after the name of a method whose choices are less what they get anyway
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
_ALIKE = ("lang", "seed", "n_exemplars", "chat", "axis", "models")  # in runs that are joined
_LINE: Fields = {"id": str, "references": list, "outputs": dict}
_OUTPUT: Fields = {"text": str, "alpha": int | float, "beta": int | float}


@dataclass(frozen=True)
class TaskRun:
    """The answers to one task's n examples, in the run's order.

    `texts` are each method's, `weights` [n, 2] its (alpha, beta); extra single GGUFs have none.
    `grid_texts` are there where the upper bound was asked for. `nll` [n, n_axis, n_axis] sums
    nats over the `n_scored` [n] tokens of a prompt, `choice_nll` [n, n_choices, n_axis, n_axis]
    over those of a choice, nan where an example has fewer of them; None where nothing was scored.
    """

    task: Task
    axis: tuple[float, ...]
    ids: Sequence[str]
    references: Sequence[Sequence[str]]
    choices: Sequence[Sequence[str]]
    texts: Mapping[str, Sequence[str]]
    weights: Mapping[str, Float64]
    grid_texts: GridTexts | None
    n_scored: Float64 | None
    nll: Float64 | None
    choice_nll: Float64 | None

    @property
    def on_grid(self) -> list[int]:
        """Where the published grid lies on the axis, which has 0 too."""
        return [at for at, weight in enumerate(self.axis) if weight != 0]

    def points(self, name: str) -> NDArray[np.int64] | None:
        """Where a method's weights lie on the axes [n, 2]; None if one of them does not.

        `token` has none, what it gives are the weights that it starts with; nor has a mix of four.
        """
        if name in ("token", DECOUPLED) or name not in self.weights:
            return None
        off = np.abs(self.weights[name][..., None] - np.array(self.axis))
        return off.argmin(axis=-1) if bool((off.min(axis=-1) < 1e-6).all()) else None


@dataclass(frozen=True)
class Run:
    """A run: its run.json, and each task's answers by its name; `joined` are those it is made of.

    What joined ones share is in the settings of the first.
    """

    folder: Path
    settings: Mapping[str, Any]
    tasks: Mapping[str, TaskRun]
    joined: "tuple[Run, ...]" = ()


@dataclass(frozen=True)
class Predictions:
    """What is compared with the references: of each method, and at each point for an oracle."""

    methods: Mapping[str, Sequence[str]]
    grids: Mapping[str, GridTexts]


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
        raise DataError(f"{folder} has no answer yet; give the run's command again")
    singles = settings.get("singles") or {}
    level = [s for s in singles if all(ids(t) == ids(f"{t}.{s}") for t in begun)]
    settings |= {"tasks": begun, "singles": {s: singles[s] for s in level}}
    tasks = {name: _task_run(folder, name, settings, ended=True) for name in begun}
    return Run(folder, settings, tasks)


def join(runs: Sequence[Run]) -> Run:
    """Runs of other tasks, or of other methods on the same questions, as one.

    Of what two of them have the first one's stands. Raises DataError where they cannot stand in
    one table.
    """
    first, *others = runs
    tasks = dict(first.tasks)
    for other in others:
        pair = f"{first.folder} and {other.folder}"
        for key in _ALIKE:
            if other.settings.get(key) != first.settings.get(key):
                raise DataError(f"{pair} differ in {key}; report each by itself")
        for name, answers in other.tasks.items():
            known = tasks.setdefault(name, answers)
            if (known.ids, known.references) != (answers.ids, answers.references):
                raise DataError(f"{pair} answer other questions of {name}; report each by itself")
            tasks[name] = _merged(known, answers)
    return Run(first.folder, first.settings, tasks, tuple(runs))


def _merged(first: TaskRun, other: TaskRun) -> TaskRun:
    """What `first` has, and what only `other`, of the same examples, has."""
    lacking = {
        name: getattr(other, name)
        for name in ("grid_texts", "n_scored", "nll", "choice_nll")
        if getattr(first, name) is None
    }
    texts = {**first.texts, **other.texts, **first.texts}  # in the first's order
    weights = {**first.weights, **other.weights, **first.weights}
    return _informed(replace(first, texts=texts, weights=weights, **lacking))


def _informed(answers: TaskRun) -> TaskRun:
    """With INFORMATIVE, as far as these answers tell it."""
    texts, weights = dict(answers.texts), dict(answers.weights)
    for of in (texts, weights):
        of.pop(INFORMATIVE, None)
    nll, grid = answers.choice_nll, answers.grid_texts
    if nll is not None and len(nll) >= _FEWEST:
        pair = most_informative(nll)
        weights[INFORMATIVE] = np.tile((pair.alpha, pair.beta), (len(nll), 1))
        if grid is not None:
            texts[INFORMATIVE] = grid[GRID.index(pair.alpha)][GRID.index(pair.beta)]
    elif nll is None and MI_ANSWERS in texts:
        texts[INFORMATIVE], weights[INFORMATIVE] = texts[MI_ANSWERS], weights[MI_ANSWERS]
    return replace(answers, texts=texts, weights=weights)


def predict(answers: TaskRun, *, choice_scoring: bool = False) -> Predictions:
    """The answer in each text; with `choice_scoring` the choice of fewest nats, where known.

    Nats are not divided by a choice's length. CALIBRATED ones are less the mean of that choice
    over the task's examples (batch calibration, Zhou et al. 2024), for which no label is looked at.
    """
    if choice_scoring and answers.choice_nll is not None:
        return _by_choice(answers, answers.choice_nll)

    def read(texts: Sequence[str]) -> list[str]:
        return [answers.task.prediction(*pair) for pair in zip(texts, answers.choices, strict=True)]

    methods = {name: read(texts) for name, texts in answers.texts.items()}
    if answers.grid_texts is None:
        return Predictions(methods, {})
    return Predictions(methods, {ORACLE: [[read(t) for t in row] for row in answers.grid_texts]})


def _by_choice(answers: TaskRun, nll: Float64) -> Predictions:
    methods: dict[str, list[str]] = {}
    grids: dict[str, GridTexts] = {}
    everyone = np.arange(len(nll))

    def pick(nats: Float64) -> list[str]:  # nats [n, n_choices]
        lowest = np.nanargmin(nats, axis=1)
        return [choices[at] for choices, at in zip(answers.choices, lowest, strict=True)]

    for suffix, nats in (("", nll), (CALIBRATED, nll - np.nanmean(nll, axis=0))):
        for name in answers.weights:
            points = answers.points(name)
            if points is not None:
                methods[name + suffix] = pick(nats[everyone, :, points[:, 0], points[:, 1]])
        grids[ORACLE + suffix] = [
            [pick(nats[:, :, a, b]) for b in answers.on_grid] for a in answers.on_grid
        ]
    return Predictions(methods, grids)


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"{file.parent} holds no run: there is no run.json in it")
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
    return _informed(
        TaskRun(
            task=task,
            axis=tuple(float(weight) for weight in settings["axis"]),
            ids=ids,
            references=[line["references"] for _, line in rows],
            choices=choices,
            texts=texts,
            weights=weights,
            grid_texts=_grid_texts(rows, n - 1) if ORACLE in settings["methods"] else None,
            n_scored=_numbers(rows, "n_scored", [()] * len(rows)),
            nll=_numbers(rows, "nll", [(n, n)] * len(rows)),
            choice_nll=_numbers(rows, "choice_nll", [(len(c), n, n) for c in choices]),
        )
    )


def _lines(file: Path, *, ended: bool = False) -> list[Row]:
    if not file.is_file() or file.stat().st_size == 0:
        raise DataError(f"{file} is missing or empty; {_UNFINISHED}")
    if not ended and not file.read_bytes().endswith(b"\n"):
        raise DataError(f"{file} ends in half a line; {_UNFINISHED}")
    rows = read_jsonl(file, {}, ended=ended)
    seen: set[str] = set()
    for where, line in rows:
        _check(where, line, _LINE)
        if line["id"] in seen:
            raise DataError(f"{where}: example {line['id']!r} comes a second time; {_DAMAGED}")
        seen.add(line["id"])
        for field in ("references", "choices"):
            if any(type(text) is not str for text in line.get(field, [])):
                raise DataError(f"{where}: field {field!r} should be texts; {_DAMAGED}")
        if not line["references"]:
            raise DataError(f"{where}: there is no reference to judge by; {_DAMAGED}")
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
            raise DataError(f"{where}: there is no answer of {name!r}; {_DAMAGED}")
        _check(where, output, _OUTPUT)
        found.append(output)
    return found


def _grid_texts(rows: Sequence[Row], n: int) -> GridTexts:
    for where, line in rows:
        grid = line.get("grid")
        texts = np.array(grid, dtype=object) if _is_square(grid, n) else np.array([None])
        if any(type(text) is not str for text in texts.ravel()):
            raise DataError(f"{where}: 'grid' should be {n} × {n} texts; {_DAMAGED}")
    return [[[line["grid"][a][b] for _, line in rows] for b in range(n)] for a in range(n)]


def _is_square(grid: Any, n: int) -> bool:
    return type(grid) is list and [type(r) is list and len(r) for r in grid] == [n] * n


def _numbers(rows: Sequence[Row], name: str, shapes: Sequence[tuple[int, ...]]) -> Float64 | None:
    """A field of all lines, padded with nan to the largest shape; None where no line has it."""
    if not any(name in line for _, line in rows):
        return None
    widest = tuple(max(lengths) for lengths in zip(*shapes, strict=True))
    values = np.full((len(rows), *widest), np.nan)
    for at, ((where, line), shape) in enumerate(zip(rows, shapes, strict=True)):
        try:
            one = np.array(line[name], np.float64)
        except (KeyError, TypeError, ValueError):
            one = np.array(np.nan)
        if one.shape != shape or not np.isfinite(one).all():
            size = " × ".join(map(str, shape)) or "a number"
            raise DataError(f"{where}: {name!r} should be {size}, finite; {_DAMAGED}")
        values[at, ...][tuple(slice(length) for length in shape)] = one
    return values
