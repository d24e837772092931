"""The mix by which each compared method continues a prompt that was read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trimix_gguf.answering.steering import Following, steering_of
from trimix_gguf.choosing.auto import on_a_leash
from trimix_gguf.choosing.methods import (
    ANSWERS,
    AUTO,
    CONTINUOUS,
    DECOUPLED,
    ENT,
    TOKEN,
    reading_methods,
)
from trimix_gguf.choosing.score import Score
from trimix_gguf.choosing.selection import TOKEN_KEEP, Selection
from trimix_gguf.errors import WeightsError
from trimix_gguf.evaluation.names.axis import AXIS, lowest_on_grid, on_grid
from trimix_gguf.evaluation.running.continuing import Continuation
from trimix_gguf.evaluation.running.reading import Reading
from trimix_gguf.mixing.fusion import METHODS, Mix, Weights
from trimix_gguf.mixing.scoring import GRID, Float64, continuous_optimum, lowest
from trimix_gguf.trio.sums import Points
from trimix_gguf.trio.trio import Trio


def continuations(
    names: tuple[str, ...],
    reading: Reading | None,
    task_weights: Mapping[str, Weights],
    trio: Trio,
    *,
    with_choices: bool,
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
            made[name] = _selecting(name, reading, trio, with_choices)
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


def _selecting(name: str, reading: Reading, trio: Trio, with_choices: bool) -> Continuation:
    if name == TOKEN:
        return _token_level(reading, trio)
    if name == AUTO:
        mix = Mix(_automatic(reading, trio, with_choices))
        return Continuation(mix, steering_of(Selection(mix, AUTO), trio.unused))
    return Continuation(Mix(_selected(name, reading)))


def _automatic(reading: Reading, trio: Trio, with_choices: bool) -> Weights:
    """A task's prompts are questions: what a tuning measured, or a choice on a leash."""
    nll, tuning = reading.nlls.sum(axis=0), trio.tuning
    found = None if tuning is None else tuning.of(with_choices=with_choices)
    if found is not None:
        return found.weights or lowest(nll, AXIS, AXIS)
    if reading.slopes is None:
        raise ValueError(f"{AUTO} needs a reading with slopes")
    return on_a_leash(nll, reading.slopes, AXIS, AXIS)


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


def _token_level(reading: Reading, trio: Trio) -> Continuation:
    """Weights that follow the text: lowest NLL of prompt and output, old tokens counting less."""
    ages = np.arange(len(reading.nlls))[::-1]
    recent: Float64 = np.tensordot(TOKEN_KEEP**ages, reading.nlls, axes=1)
    mix = Mix(lowest_on_grid(recent))
    score = Score(Points(AXIS, AXIS, keep=TOKEN_KEEP), (GRID, GRID))
    return Continuation(mix, Following(mix, score, recent, trio.unused))
