"""What a run answered, as its folder has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.choosing.methods import DECOUPLED, TOKEN
from trimix_gguf.evaluation.run_files.record import RunRecord
from trimix_gguf.evaluation.tasks.task import Task
from trimix_gguf.mixing.scoring import Float64

# [n_grid][n_grid][n]: alpha, beta, example; None for a point that a race left.
GridTexts = Sequence[Sequence[Sequence[str] | None]]


@dataclass(frozen=True)
class TaskAnswers:
    """The answers to the n examples of one task, in the run's order.

    `texts` are those of each method, `weights` [n, 2] its (alpha, beta); single GGUFs have no
    weights. `grid_texts` is None unless the run had the oracle. `nll` [n, n_axis, n_axis] sums nats
    over the `n_scored` [n] tokens of a prompt, `choice_nll` [n, n_choices, n_axis, n_axis] over
    the tokens of a choice (nan where an example has fewer choices); None if nothing was scored.
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
        """The positions of the published grid on the axis, which has 0 too."""
        return [at for at, weight in enumerate(self.axis) if weight != 0]

    def points(self, name: str) -> NDArray[np.int64] | None:
        """The positions of a method's weights on the axes [n, 2]; None if one is not on them.

        TOKEN has none: its weights change after the first token. A mix of four models has none.
        """
        if name in (TOKEN, DECOUPLED) or name not in self.weights:
            return None
        off = np.abs(self.weights[name][..., None] - np.array(self.axis))
        return off.argmin(axis=-1) if bool((off.min(axis=-1) < 1e-6).all()) else None


@dataclass(frozen=True)
class RunAnswers:
    """A run: its run.json, and the answers of each task by name.

    `joined` are the runs that were joined into it; `record` is that of the first one.
    """

    folder: Path
    record: RunRecord
    tasks: Mapping[str, TaskAnswers]
    joined: "tuple[RunAnswers, ...]" = ()
