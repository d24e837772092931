"""What runs answered, one or several together, and what each method so predicts.

Models are not needed: a finished run can be judged anew as often as one likes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.choosing.methods import DECOUPLED, INFORMATIVE, MI_ANSWERS, ORACLE, TOKEN
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.running.information import most_informative
from trimix_gguf.evaluation.tasks.task import Task
from trimix_gguf.mixing.scoring import GRID

Float64 = NDArray[np.float64]
# [n_grid][n_grid][n]: alpha, beta, example; None for a point that was left in a race.
GridTexts = Sequence[Sequence[Sequence[str] | None]]

_FEWEST = 10  # examples that mutual information is told from
CALIBRATED = "+cal"  # after the name of a method whose choices are less what they get anyway
_ALIKE = ("lang", "seed", "n_exemplars", "chat", "axis", "models")  # in runs that are joined


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

        TOKEN has none, what it gives are the weights that it starts with; nor has a mix of four.
        """
        if name in (TOKEN, DECOUPLED) or name not in self.weights:
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
    return informed(replace(first, texts=texts, weights=weights, **lacking))


def informed(answers: TaskRun) -> TaskRun:
    """With INFORMATIVE, as far as these answers tell it."""
    texts, weights = dict(answers.texts), dict(answers.weights)
    for of in (texts, weights):
        of.pop(INFORMATIVE, None)
    nll, grid = answers.choice_nll, answers.grid_texts
    if nll is not None and len(nll) >= _FEWEST:
        pair = most_informative(nll)
        weights[INFORMATIVE] = np.tile((pair.alpha, pair.beta), (len(nll), 1))
        if grid and (said := grid[GRID.index(pair.alpha)][GRID.index(pair.beta)]):
            texts[INFORMATIVE] = said
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
    grid = [[texts and read(texts) for texts in row] for row in answers.grid_texts]
    return Predictions(methods, {ORACLE: grid})


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
