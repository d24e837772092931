"""What each method predicts in a run, or in several runs together.

No model is needed: a finished run can be judged again and again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from trimix_gguf.choosing.methods import AUTO, INFORMATIVE, MI_ANSWERS, ORACLE
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.compared import CALIBRATED, LARGE_BASE
from trimix_gguf.evaluation.reporting.informative import most_informative
from trimix_gguf.evaluation.run_files.answers import GridTexts, RunAnswers, TaskAnswers
from trimix_gguf.evaluation.run_files.record import RunRecord, kept_task
from trimix_gguf.mixing.scoring import GRID, Float64

_FEWEST = 10  # examples from which mutual information is computed
_ALIKE = ("lang", "seed", "n_exemplars", "chat", "axis")  # in runs that are joined


@dataclass(frozen=True)
class Predictions:
    """Answers to compare with the references: of each method, and of oracles at each point."""

    methods: Mapping[str, Sequence[str]]
    grids: Mapping[str, GridTexts]


def join(runs: Sequence[RunAnswers]) -> RunAnswers:
    """Runs with different tasks, or with other methods on the same questions, as one run.

    If two of them have the same thing, that of the first one is used. Raises DataError if they do
    not fit into one table.
    """
    for one, other in combinations(runs, 2):
        if (key := _differing(one.record, other.record)) is not None:
            raise DataError(
                f"{one.folder} and {other.folder} differ in {key}; report each by itself"
            )
    first, *others = runs
    tasks, asked = dict(first.tasks), _own_tasks(first)
    for other in others:
        pair = f"{first.folder} and {other.folder}"
        own = _own_tasks(other)
        for name, answers in other.tasks.items():
            known = tasks.setdefault(name, answers)
            alike = (known.ids, known.references) == (answers.ids, answers.references)
            if name in own:  # their instruction may differ
                alike = alike and asked.setdefault(name, own[name]) == own[name]
            if not alike:
                raise DataError(f"{pair} answer other questions of {name}; report each by itself")
            tasks[name] = _merged(known, answers)
    return RunAnswers(first.folder, first.record, tasks, tuple(runs))


def _differing(one: RunRecord, other: RunRecord) -> str | None:
    """What keeps two runs out of one table: there, a name would stand for two different things."""
    for key in _ALIKE:
        if one.get(key) != other.get(key):
            return key
    if (one["models"].keys() ^ other["models"].keys()) - {LARGE_BASE}:  # one method reads that
        return "models"
    files, others = ({**run["models"], **(run.get("singles") or {})} for run in (one, other))
    for name in files:
        if others.get(name, files[name]) != files[name]:
            return "models" if name in one["models"] else f"the file of {name}"
    both_auto = AUTO in one["methods"] and AUTO in other["methods"]
    for key in ("chat_template", *(["tuning"] if both_auto else [])):
        # Runs of earlier versions do not say it: taken as the same one.
        if key in one and key in other and one.get(key) != other.get(key):
            return key
    return None


def _own_tasks(run: RunAnswers) -> dict[str, bytes]:
    """The user's task files that a run kept; runs of earlier versions kept none."""
    files = {name: kept_task(run.folder, name) for name in run.tasks}
    return {name: file.read_bytes() for name, file in files.items() if file.exists()}


def _merged(first: TaskAnswers, other: TaskAnswers) -> TaskAnswers:
    """What `first` has, and what only `other`, with the same examples, has."""
    texts = {**first.texts, **other.texts, **first.texts}  # in the first's order
    weights = {**first.weights, **other.weights, **first.weights}
    return replace(
        first,
        texts=texts,
        weights=weights,
        grid_texts=other.grid_texts if first.grid_texts is None else first.grid_texts,
        n_scored=other.n_scored if first.n_scored is None else first.n_scored,
        nll=other.nll if first.nll is None else first.nll,
        choice_nll=other.choice_nll if first.choice_nll is None else first.choice_nll,
    )


def informed(answers: TaskAnswers) -> TaskAnswers:
    """The answers with those of INFORMATIVE, if the run has what it is computed from."""
    texts, weights = dict(answers.texts), dict(answers.weights)
    nll, grid = answers.choice_nll, answers.grid_texts
    if nll is not None and len(nll) >= _FEWEST:
        pair = most_informative(nll)
        weights[INFORMATIVE] = np.tile((pair.alpha, pair.beta), (len(nll), 1))
        if grid and (said := grid[GRID.index(pair.alpha)][GRID.index(pair.beta)]):
            texts[INFORMATIVE] = said
    elif nll is None and MI_ANSWERS in texts:
        texts[INFORMATIVE], weights[INFORMATIVE] = texts[MI_ANSWERS], weights[MI_ANSWERS]
    return replace(answers, texts=texts, weights=weights)


def predict(answers: TaskAnswers, *, choice_scoring: bool = False) -> Predictions:
    """The answer in each text; with `choice_scoring` the choice with the fewest nats, where known.

    Nats are not divided by a choice's length. CALIBRATED: minus the mean of that choice over the
    task's examples (batch calibration, Zhou et al. 2024), which needs no labels.
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


def _by_choice(answers: TaskAnswers, nll: Float64) -> Predictions:
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
