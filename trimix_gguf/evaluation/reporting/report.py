"""The report of a run: every method's scores with their intervals, and what they show.

Scores are taken anew from the texts of the run, so that no model is needed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.choosing.methods import (
    ANSWERS,
    INFORMATIVE,
    ORACLE,
    PPL,
    reading_methods,
    selecting_methods,
)
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.reporting.findings import chosen, gap_closed, guidance, surface
from trimix_gguf.evaluation.reporting.predictions import CALIBRATED, Run, TaskRun, join, predict
from trimix_gguf.evaluation.reporting.statistics import (
    Difference,
    bootstrap_interval,
    paired_difference,
    resampled_totals,
)
from trimix_gguf.evaluation.reporting.tables import to_csv, to_markdown
from trimix_gguf.evaluation.run_files.loading import load_run
from trimix_gguf.evaluation.tasks.metrics import METRICS
from trimix_gguf.roles import ROLES

__all__ = ["Run", "join", "load_run", "summarize", "to_csv", "to_markdown"]

Float64 = NDArray[np.float64]

LEVEL = 0.95  # of the intervals
OURS = PPL
_CRITERIA = (OURS, ANSWERS, INFORMATIVE)  # whose gains over others are asked


@dataclass(frozen=True)
class _Judged:
    """A task's answers as statistics: of each method by metric [n, n_stats].

    `surfaces` are the main metric at each grid point, for each oracle, nan where one was left in a
    race; `points` [n, 2] where each method's weights lie on the axes, `weights` [n, 2] what they
    are.
    """

    answers: TaskRun
    stats: Mapping[str, Mapping[str, Float64]]
    surfaces: Mapping[str, Float64]
    points: Mapping[str, NDArray[np.int64]]
    weights: Mapping[str, Float64]
    seed: int
    by_choice: bool

    @property
    def main(self) -> str:
        return self.answers.task.metrics[0]

    def value(self, name: str) -> float:
        """The main metric of a method."""
        return METRICS[self.main].value(self.stats[name][self.main].sum(axis=0))

    def counted(self, name: str) -> str:
        """What counts as `name` in a mean: without choices, calibrated answers are the answers."""
        return name if self.by_choice else name.removesuffix(CALIBRATED)


def summarize(run: Run, *, choice_scoring: bool = False, n_resamples: int = 1000) -> dict[str, Any]:
    """All that the report says, as JSON holds it; what cannot be said is null or absent.

    With `choice_scoring`, tasks with choices are judged by the likeliest one instead of the text;
    raises DataError where the run scored none.
    """
    if choice_scoring and all(answers.choice_nll is None for answers in run.tasks.values()):
        raise DataError(
            f"{run.folder} has no scores of choices: they need a task with choices, and a method"
            f" that selects by a prompt's reading ({', '.join(reading_methods())})"
        )
    seed = run.settings["seed"]
    judged = {
        name: _judge(answers, seed + at, choice_scoring)
        for at, (name, answers) in enumerate(run.tasks.items())
    }
    tasks = {name: _task_summary(task, n_resamples) for name, task in judged.items()}
    names = _order([name for task in judged.values() for name in task.stats])
    return {
        "runs": [dict(one.settings) for one in run.joined or (run,)],
        "grid": [weight for weight in run.settings["axis"] if weight != 0],
        "choice_scoring": choice_scoring,
        "n_resamples": n_resamples,
        "level": LEVEL,
        "methods": names,
        "oracles": [name for name in names if _is_oracle(name)],
        "tasks": tasks,
        "mean": _mean_summary(list(judged.values()), n_resamples),
    }


def _order(names: Sequence[str]) -> list[str]:
    """Each once: as they are, then calibrated ones, then oracles."""
    return sorted(
        dict.fromkeys(names), key=lambda name: (_is_oracle(name), name.endswith(CALIBRATED))
    )


def _is_oracle(name: str) -> bool:
    return name.removesuffix(CALIBRATED) == ORACLE


def _judge(answers: TaskRun, seed: int, choice_scoring: bool) -> _Judged:
    @cache  # most of the 36 grid points say the same
    def one(metric: str, prediction: str, at: int) -> Float64:
        return METRICS[metric].statistics(prediction, answers.references[at])

    def judge(metric: str, predictions: Sequence[str]) -> Float64:
        return np.stack([one(metric, text, at) for at, text in enumerate(predictions)])

    def value(predictions: Sequence[str] | None) -> float:
        if predictions is None:
            return math.nan
        return METRICS[metrics[0]].value(judge(metrics[0], predictions).sum(axis=0))

    metrics, said = answers.task.metrics, predict(answers, choice_scoring=choice_scoring)
    predictions = dict(said.methods)
    names = {name: name.removesuffix(CALIBRATED) for name in predictions}
    weights = {n: answers.weights[b] for n, b in names.items() if b in answers.weights}
    points = {n: p for n, b in names.items() if (p := answers.points(b)) is not None}
    surfaces = {}
    for oracle, grid in said.grids.items():
        values = np.array([[value(texts) for texts in row] for row in grid])
        a, b = divmod(int(np.nanargmax(values)), values.shape[1])
        surfaces[oracle], predictions[oracle] = values, grid[a][b] or ()
        point = np.array([answers.on_grid[a], answers.on_grid[b]])
        points[oracle] = np.tile(point, (len(answers.ids), 1))
        weights[oracle] = np.array(answers.axis)[points[oracle]]
    stats = {n: {m: judge(m, texts) for m in metrics} for n, texts in predictions.items()}
    by_choice = choice_scoring and answers.choice_nll is not None
    return _Judged(answers, stats, surfaces, points, weights, seed, by_choice)


def _task_summary(task: _Judged, n_resamples: int) -> dict[str, Any]:
    answers, metrics = task.answers, task.answers.task.metrics
    methods = {
        name: {
            "metrics": {
                m: _scored(stats[m], METRICS[m].value, task.seed, n_resamples) for m in metrics
            },
            **_mixed(task, name),
        }
        for name, stats in task.stats.items()
    }
    values = {name: task.value(name) for name in task.stats}

    def against(*pair: str) -> Difference:
        ours, theirs = (task.stats[name][task.main] for name in pair)
        value, seed = METRICS[task.main].value, task.seed
        return paired_difference(
            ours, theirs, value, seed=seed, n_resamples=n_resamples, level=LEVEL
        )

    return {
        "n": len(answers.ids),
        "metrics": list(metrics),
        "by_choice": task.by_choice,
        "methods": {name: methods[name] for name in _order(list(methods))},
        "gains": _gains(values, against),
        "findings": _findings(task) | {"gap_closed": _gap_closed(values)},
    }


def _scored(
    stats: Float64, value: Callable[[Float64], float], seed: int, n_resamples: int
) -> dict[str, float]:
    low, high = bootstrap_interval(stats, value, seed=seed, n_resamples=n_resamples, level=LEVEL)
    return {"value": value(stats.sum(axis=0)), "low": low, "high": high}


def _mixed(task: _Judged, name: str) -> dict[str, Any]:
    """A method's mean weights, and the prompts' perplexity at them where it was scored."""
    mixed: dict[str, Any] = {"alpha": None, "beta": None, "perplexity": None}
    if name in task.weights:
        mixed["alpha"], mixed["beta"] = task.weights[name].mean(axis=0).tolist()
    nll, n_scored = task.answers.nll, task.answers.n_scored
    if name in task.points and nll is not None and n_scored is not None:
        a, b = task.points[name].T
        nats = nll[np.arange(len(nll)), a, b]
        micro, macro = nats.sum() / n_scored.sum(), (nats / n_scored).mean()
        mixed["perplexity"] = {"micro": math.exp(micro), "macro": math.exp(macro)}
    return mixed


def _gains(
    values: Mapping[str, float], against: Callable[[str, str], Difference]
) -> dict[str, dict[str, Any]]:
    """Criteria against the best single model on these examples, and proxy tuning.

    Calibrated choices are compared with what is best of theirs, calibrated or not.
    """
    gains: dict[str, dict[str, Any]] = {}
    for ours in (name + form for form in ("", CALIBRATED) for name in _CRITERIA):
        forms = ("", CALIBRATED) if ours.endswith(CALIBRATED) else ("",)
        if ours not in values:
            continue
        gains[ours] = {}
        for why, names in (("best_single", ROLES), ("proxy-tuning", ("proxy-tuning",))):
            there = [name + form for form in forms for name in names if name + form in values]
            if there:
                rival = max(there, key=lambda name: values[name])
                gains[ours][why] = {"against": rival, **asdict(against(ours, rival))}
    return gains


def _gap_closed(values: Mapping[str, float]) -> dict[str, float]:
    compared = {n: v for n, v in values.items() if n == ORACLE or not _is_oracle(n)}
    return gap_closed(compared, OURS, ORACLE)


def _findings(task: _Judged) -> dict[str, Any]:
    answers, inner = task.answers, task.answers.on_grid
    grid = [answers.axis[at] for at in inner]
    nll, n_scored = answers.nll, answers.n_scored
    selecting = selecting_methods()
    found: dict[str, Any] = {
        "surface": None,
        "chosen": {n: chosen(w, grid) for n, w in answers.weights.items() if n in selecting},
        "guidance": None,
    }
    if nll is not None and n_scored is not None:
        if ORACLE in task.surfaces and not np.isnan(task.surfaces[ORACLE]).any():
            on_grid = nll[np.ix_(range(len(nll)), inner, inner)]
            found["surface"] = surface(on_grid, n_scored, task.surfaces[ORACLE])
        if OURS in answers.weights:
            beta = answers.weights[OURS][:, 1]
            found["guidance"] = guidance(nll, n_scored, beta, answers.axis)
    return found


def _mean_summary(tasks: Sequence[_Judged], n_resamples: int) -> dict[str, Any]:
    """The main metric's mean over tasks, of methods that all of them have.

    A resample draws each task's examples, independently of the other tasks'.
    """
    named = dict.fromkeys(name for task in tasks for name in task.stats)
    names = _order([name for name in named if all(t.counted(name) in t.stats for t in tasks)])
    values = {
        name: float(np.mean([task.value(task.counted(name)) for task in tasks])) for name in names
    }
    drawn = {name: _resampled_mean(tasks, name, n_resamples) for name in names}
    quantiles = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    methods = {}
    for name in names:
        low, high = np.quantile(drawn[name], quantiles).tolist()
        methods[name] = {"value": values[name], "low": low, "high": high}

    def against(ours: str, theirs: str) -> Difference:  # drawn with the same seeds: paired
        gain = values[ours] - values[theirs]
        return Difference.of(gain, drawn[ours] - drawn[theirs], level=LEVEL)

    return {
        "methods": methods,
        "gains": _gains(values, against),
        "findings": {"gap_closed": _gap_closed(values)},
    }


def _resampled_mean(tasks: Sequence[_Judged], name: str, n_resamples: int) -> Float64:
    """[n_resamples]: the mean over tasks of a method's main metric, on the tasks' own draws."""
    means = np.zeros(n_resamples)
    for task in tasks:
        stats, value = task.stats[task.counted(name)][task.main], METRICS[task.main].value
        totals = resampled_totals(stats, seed=task.seed, n_resamples=n_resamples)
        means += [value(total) for total in totals]
    return means / len(tasks)
