"""The report of a run: the scores of every method with their intervals, and what they show.

Scores are computed from the texts of the run, so no model is needed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

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
from trimix_gguf.evaluation.names.compared import CALIBRATED, is_oracle
from trimix_gguf.evaluation.reporting.conclusion import conclude
from trimix_gguf.evaluation.reporting.findings import chosen, gap_closed, guidance, surface
from trimix_gguf.evaluation.reporting.predictions import informed, predict
from trimix_gguf.evaluation.reporting.statistics import (
    Difference,
    bootstrap_interval,
    paired_difference,
    resampled_totals,
)
from trimix_gguf.evaluation.reporting.summary import (
    Findings,
    Gains,
    MeanSummary,
    MethodSummary,
    Score,
    Summary,
    TaskSummary,
)
from trimix_gguf.evaluation.run_files.answers import RunAnswers, TaskAnswers
from trimix_gguf.evaluation.tasks.metrics import METRICS
from trimix_gguf.mixing.scoring import Float64, perplexity_of
from trimix_gguf.roles import ROLES

LEVEL = 0.95  # of the intervals
OURS = PPL
_CRITERIA = (OURS, ANSWERS, INFORMATIVE)  # methods whose gains over others are tested


@dataclass(frozen=True)
class _Judged:
    """A task's answers as statistics: by method, then by metric [n, n_stats].

    `surfaces` are the main metric at each grid point, per oracle; nan where a race left a point.
    `points` [n, 2] are the positions of each method's weights on the axes, `weights` [n, 2] their
    values.
    """

    answers: TaskAnswers
    stats: Mapping[str, Mapping[str, Float64]]
    surfaces: Mapping[str, Float64]
    points: Mapping[str, NDArray[np.int64]]
    weights: Mapping[str, Float64]
    seed: int
    by_choice: bool

    @property
    def main(self) -> str:
        """The main metric's name."""
        return self.answers.task.metrics[0]

    def value(self, name: str) -> float:
        """A method's main metric."""
        return METRICS[self.main].value(self.stats[name][self.main].sum(axis=0))

    def counted(self, name: str) -> str:
        """What counts as `name` in a mean: for a task without choices, the method uncalibrated."""
        return name if self.by_choice else name.removesuffix(CALIBRATED)


def summarize(run: RunAnswers, *, choice_scoring: bool = False, n_resamples: int = 1000) -> Summary:
    """All that the report says; what is not known is None or absent.

    With `choice_scoring`, tasks with choices are judged by the likeliest choice, not by the text;
    raises DataError if the run scored no choices.
    """
    if choice_scoring and all(answers.choice_nll is None for answers in run.tasks.values()):
        raise DataError(
            f"{run.folder} has no scores of choices: they need a task with choices, and a method"
            f" that scores the prompt ({', '.join(reading_methods())})"
        )
    seed = run.record["seed"]
    judged = {
        name: _judge(informed(answers), seed + at, choice_scoring)
        for at, (name, answers) in enumerate(run.tasks.items())
    }
    tasks = {name: _task_summary(task, n_resamples) for name, task in judged.items()}
    names = _order([name for task in judged.values() for name in task.stats])
    return {
        "runs": [one.record for one in run.joined or (run,)],
        "grid": [weight for weight in run.record["axis"] if weight != 0],
        "choice_scoring": choice_scoring,
        "n_resamples": n_resamples,
        "level": LEVEL,
        "methods": names,
        "oracles": [name for name in names if is_oracle(name)],
        "tasks": tasks,
        "mean": _mean_summary(list(judged.values()), n_resamples),
    }


def _order(names: Sequence[str]) -> list[str]:
    """Each name once: first the others in their order, then calibrated ones, then oracles."""
    return sorted(
        dict.fromkeys(names), key=lambda name: (is_oracle(name), name.endswith(CALIBRATED))
    )


def _judge(answers: TaskAnswers, seed: int, choice_scoring: bool) -> _Judged:
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


def _task_summary(task: _Judged, n_resamples: int) -> TaskSummary:
    methods = {name: _method_summary(task, name, n_resamples) for name in task.stats}
    values = {name: task.value(name) for name in task.stats}

    def against(*pair: str) -> Difference:
        ours, theirs = (task.stats[name][task.main] for name in pair)
        value, seed = METRICS[task.main].value, task.seed
        return paired_difference(
            ours, theirs, value, seed=seed, n_resamples=n_resamples, level=LEVEL
        )

    return {
        "n": len(task.answers.ids),
        "metrics": list(task.answers.task.metrics),
        "by_choice": task.by_choice,
        "methods": {name: methods[name] for name in _order(list(methods))},
        "gains": _gains(values, against),
        "findings": _findings(task, values),
    }


def _scored(
    stats: Float64, value: Callable[[Float64], float], seed: int, n_resamples: int
) -> Score:
    low, high = bootstrap_interval(stats, value, seed=seed, n_resamples=n_resamples, level=LEVEL)
    return {"value": value(stats.sum(axis=0)), "low": low, "high": high}


def _method_summary(task: _Judged, name: str, n_resamples: int) -> MethodSummary:
    """A method's scores, mean weights, and the prompts' perplexity there if it was scored."""
    summary: MethodSummary = {
        "metrics": {
            metric: _scored(stats, METRICS[metric].value, task.seed, n_resamples)
            for metric, stats in task.stats[name].items()
        },
        "alpha": None,
        "beta": None,
        "perplexity": None,
    }
    if name in task.weights:
        summary["alpha"], summary["beta"] = task.weights[name].mean(axis=0).tolist()
    nll, n_scored = task.answers.nll, task.answers.n_scored
    if name in task.points and nll is not None and n_scored is not None:
        a, b = task.points[name].T
        nats = nll[np.arange(len(nll)), a, b]
        micro, macro = nats.sum() / n_scored.sum(), (nats / n_scored).mean()
        summary["perplexity"] = {"micro": perplexity_of(micro), "macro": perplexity_of(macro)}
    return summary


def _gains(values: Mapping[str, float], against: Callable[[str, str], Difference]) -> Gains:
    """_CRITERIA against the best single model on these examples, and against proxy tuning.

    Calibrated choices are compared with the best of the others, calibrated or not.
    """
    gains: Gains = {}
    for ours in (name + form for form in ("", CALIBRATED) for name in _CRITERIA):
        forms = ("", CALIBRATED) if ours.endswith(CALIBRATED) else ("",)
        if ours not in values:
            continue
        gains[ours] = {}
        for why, names in (("best_single", ROLES), ("proxy-tuning", ("proxy-tuning",))):
            there = [name + form for form in forms for name in names if name + form in values]
            if there:
                rival = max(there, key=lambda name: values[name])
                found = against(ours, rival)
                gains[ours][why] = {
                    "against": rival,
                    "difference": found.difference,
                    "low": found.low,
                    "high": found.high,
                    "p": found.p,
                }
    return gains


def _gap_closed(values: Mapping[str, float]) -> dict[str, float]:
    compared = {n: v for n, v in values.items() if n == ORACLE or not is_oracle(n)}
    return gap_closed(compared, OURS, ORACLE)


def _findings(task: _Judged, values: Mapping[str, float]) -> Findings:
    answers, inner = task.answers, task.answers.on_grid
    grid = [answers.axis[at] for at in inner]
    nll, n_scored = answers.nll, answers.n_scored
    selecting = selecting_methods()
    found: Findings = {
        "surface": None,
        "chosen": {n: chosen(w, grid) for n, w in answers.weights.items() if n in selecting},
        "guidance": None,
        "gap_closed": _gap_closed(values),
    }
    if nll is not None and n_scored is not None:
        if ORACLE in task.surfaces and not np.isnan(task.surfaces[ORACLE]).any():
            on_grid = nll[np.ix_(range(len(nll)), inner, inner)]
            found["surface"] = surface(on_grid, n_scored, task.surfaces[ORACLE])
        if OURS in answers.weights:
            beta = answers.weights[OURS][:, 1]
            found["guidance"] = guidance(nll, n_scored, beta, answers.axis)
    return found


def _mean_summary(tasks: Sequence[_Judged], n_resamples: int) -> MeanSummary:
    """The mean of the main metric over tasks, for methods that all of them have.

    A resample draws the examples of each task independently of the other tasks.
    """
    named = dict.fromkeys(name for task in tasks for name in task.stats)
    names = _order([name for name in named if all(t.counted(name) in t.stats for t in tasks)])
    values = {
        name: float(np.mean([task.value(task.counted(name)) for task in tasks])) for name in names
    }
    drawn = {name: _resampled_mean(tasks, name, n_resamples) for name in names}
    quantiles = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    methods: dict[str, Score] = {}
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
        "conclusion": conclude(
            values, against, n=sum(len(task.answers.ids) for task in tasks), level=LEVEL
        ),
    }


def _resampled_mean(tasks: Sequence[_Judged], name: str, n_resamples: int) -> Float64:
    """[n_resamples]: the mean over tasks of a method's main metric, each task with its draws."""
    means = np.zeros(n_resamples)
    for task in tasks:
        stats, value = task.stats[task.counted(name)][task.main], METRICS[task.main].value
        totals = resampled_totals(stats, seed=task.seed, n_resamples=n_resamples)
        means += [value(total) for total in totals]
    return means / len(tasks)
