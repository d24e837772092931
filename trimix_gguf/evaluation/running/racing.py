"""A race of the oracle's grid points: points that fell behind answer no more questions.

The oracle needs only the best of 36 points on the labelled set, and the worst ones cost the most:
they write up to the limit. So a point is left when a paired t test over the questions so far says
that it is worse than the leader (Maron & Moore 1993, "Hoeffding Races"; Birattari et al. 2002, "A
Racing Algorithm for Configuring Metaheuristics").
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.settings import RACE_P
from trimix_gguf.evaluation.reporting.statistics import t_quantile
from trimix_gguf.evaluation.run_files.lines import AnswerLine, has_grid
from trimix_gguf.evaluation.tasks.metrics import METRICS
from trimix_gguf.evaluation.tasks.task import Task
from trimix_gguf.mixing.scoring import GRID

Points = NDArray[np.bool_]  # [n_grid, n_grid], alpha by beta

FEWEST = 5  # questions before a point may be left


def still_racing(task: Task, lines: Sequence[AnswerLine]) -> Points:
    """The points of GRID² [n_grid, n_grid] that answer the next question, after these lines.

    The task's main metric judges each question by itself: for a corpus metric this is an
    approximation. Raises DataError for lines that are not a race's, TrimixError if a library of the
    `eval` extra is missing.
    """
    quantile = t_quantile(1 - RACE_P, max(len(lines), FEWEST) - 1)
    if len(lines) < FEWEST:
        return np.ones((len(GRID), len(GRID)), np.bool_)
    for line in lines:
        if not (line.get("references") and has_grid(line, len(GRID), race=True)):
            raise DataError(f"{line['id']!r} has no answers of the grid; give another folder")
    metric = METRICS[task.metrics[0]]

    def score(text: str | None, references: Sequence[str]) -> float:
        if text is None:  # left before this question
            return np.nan
        return metric.value(metric.statistics(task.prediction(text), references))

    scores = np.array(
        [[[score(t, line["references"]) for t in row] for row in line["grid"]] for line in lines]
    )
    means = scores.mean(axis=0)
    a, b = divmod(int(np.nanargmax(means)), means.shape[1])
    behind = scores[:, a, b, None, None] - scores
    error = behind.std(axis=0, ddof=1) / np.sqrt(len(lines))
    racing: Points = behind.mean(axis=0) <= quantile * error  # nan: False
    return racing
