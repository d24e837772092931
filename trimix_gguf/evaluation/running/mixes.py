"""The mix by which each compared method continues a prompt that was read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trimix_gguf.choosing.methods import (
    ANSWERS,
    CONTINUOUS,
    DECOUPLED,
    ENT,
    TOKEN,
    reading_methods,
)
from trimix_gguf.errors import WeightsError
from trimix_gguf.evaluation.names.axis import lowest_on_grid, on_grid
from trimix_gguf.evaluation.running.continuing import Continuation
from trimix_gguf.evaluation.running.reading import Reading
from trimix_gguf.mixing.fusion import METHODS, Mix, Rows, Weights
from trimix_gguf.mixing.scoring import GRID, Float64, continuous_optimum, lowest

_KEEP = 0.97  # for token-level weights: how much of a token's evidence counts one token later

Score = Callable[[Rows, int], Float64]  # rows [n_vocab], the id that followed -> nats over AXIS²


def continuations(
    names: tuple[str, ...],
    reading: Reading | None,
    task_weights: Mapping[str, Weights],
    score: Score,
) -> Mapping[str, Continuation]:
    """The continuation of a prompt for each method; methods that select need a reading.

    `task_weights` are those of the methods that choose one pair per task. ORACLE and DECOUPLED
    have no continuation here.
    """
    made: dict[str, Continuation] = {}
    for name in names:
        if name in METHODS:
            made[name] = Continuation(METHODS[name])
        elif name in task_weights:
            made[name] = Continuation(Mix(task_weights[name]))
        elif name in reading_methods() and name != DECOUPLED and reading is not None:
            made[name] = _selecting(name, reading, score)
    return made


@dataclass(frozen=True)
class Decoupled:
    """The weights of a mix of four models (decoupled.py)."""

    weights: Weights
    gamma: float


def lowest_decoupled(nll: Float64) -> Decoupled:
    """The point of GRID³ with the lowest of `nll` [n_grid, n_axis, n_axis]; in a tie, the first."""
    at = int(np.argmin([on_grid(one).min() for one in nll]))
    return Decoupled(lowest_on_grid(nll[at]), GRID[at])


def grid_continuations() -> list[Continuation]:
    """A continuation for each point of GRID², alpha by alpha."""
    return [Continuation(Mix(Weights(alpha, beta))) for alpha in GRID for beta in GRID]


def _selecting(name: str, reading: Reading, score: Score) -> Continuation:
    if name == TOKEN:
        return _token_level(reading, score)
    return Continuation(Mix(_selected(name, reading)))


def _selected(name: str, reading: Reading) -> Weights:
    if name == ENT:
        return lowest(reading.entropy, GRID, GRID)
    if name == CONTINUOUS:
        if reading.continuous is None:
            raise ValueError(f"{CONTINUOUS} needs a reading over chebyshev_nodes()")
        return continuous_optimum(reading.continuous)
    if name == ANSWERS:
        if not reading.answers.any():
            raise WeightsError(f"{ANSWERS} needs exemplars; give --exemplars 1 or more")
        return lowest_on_grid(reading.nlls[reading.answers].sum(axis=0))
    return lowest_on_grid(reading.nlls.sum(axis=0))


def _token_level(reading: Reading, score: Score) -> Continuation:
    """Weights that follow the text: lowest NLL of prompt and output, old tokens counting less."""
    ages = np.arange(len(reading.nlls))[::-1]
    recent = np.tensordot(_KEEP**ages, reading.nlls, axes=1)

    def adapt(rows: Rows, token: int) -> Weights:
        nonlocal recent
        recent = _KEEP * recent + score(rows, token)
        return lowest_on_grid(recent)

    return Continuation(Mix(lowest_on_grid(recent)), adapt=adapt)
