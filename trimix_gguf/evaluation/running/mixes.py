"""What each compared method makes of a prompt's reading."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trimix_gguf.choosing.methods import (
    ANSWERS,
    CONTINUOUS,
    DECOUPLED,
    ENT,
    TOKEN,
    evaluated_methods,
    reading_methods,
)
from trimix_gguf.errors import WeightsError
from trimix_gguf.evaluation.running.continuing import Continuation
from trimix_gguf.evaluation.running.reading import AXIS, Reading
from trimix_gguf.mixing.fusion import METHODS, Mix, Rows, Weights
from trimix_gguf.mixing.scoring import GRID, Float64, continuous_optimum, lowest

_KEEP = 0.97  # what a token's evidence is worth one token later, for token-level weights

Score = Callable[[Rows, int], Float64]  # rows [n_vocab], the id that followed -> nats over AXIS²


def check_methods(names: tuple[str, ...]) -> None:
    """Raises WeightsError, naming those that there are."""
    known = evaluated_methods()
    for name in names:
        if name not in known:
            raise WeightsError(f"there is no method {name!r}; the methods are {', '.join(known)}")


def continuations(
    names: tuple[str, ...],
    reading: Reading | None,
    task_weights: Mapping[str, Weights],
    score: Score,
) -> Mapping[str, Continuation]:
    """What is to continue a prompt for each method of the trio; those that select need a reading.

    `task_weights` are those of the methods that choose one pair per task. There is none for
    ORACLE and DECOUPLED.
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
    """Weights of the four models' mix (decoupled.py)."""

    weights: Weights
    gamma: float


def lowest_decoupled(nll: Float64) -> Decoupled:
    """The point of GRID³ with the lowest of `nll` [n_grid, n, n]; of equal ones the first gamma."""
    at = int(np.argmin([_inner(one).min() for one in nll]))
    return Decoupled(lowest_on_grid(nll[at]), GRID[at])


def grid_continuations() -> list[Continuation]:
    """One for each point of GRID², alpha by alpha."""
    return [Continuation(Mix(Weights(alpha, beta))) for alpha in GRID for beta in GRID]


def lowest_on_grid(nll: Float64) -> Weights:
    """The point of GRID² with the lowest of `nll` [n, n] over AXIS²."""
    return lowest(_inner(nll), GRID, GRID)


def _inner(nll: Float64) -> Float64:
    at = [AXIS.index(w) for w in GRID]
    return nll[np.ix_(at, at)]


def _selecting(name: str, reading: Reading, score: Score) -> Continuation:
    if name == TOKEN:
        return _token_level(reading, score)
    return Continuation(Mix(_selected(name, reading)))


def _selected(name: str, reading: Reading) -> Weights:
    if name == ENT:
        return lowest(reading.entropy, GRID, GRID)
    if name == CONTINUOUS:
        if reading.continuous is None:
            raise ValueError(f"{CONTINUOUS} needs a prompt that was read for it")
        return continuous_optimum(reading.continuous)
    if name == ANSWERS:
        if not reading.answers.any():
            raise WeightsError(f"{ANSWERS} needs exemplars; give --exemplars 1 or more")
        return lowest_on_grid(reading.nlls[reading.answers].sum(axis=0))
    return lowest_on_grid(reading.nlls.sum(axis=0))


def _token_level(reading: Reading, score: Score) -> Continuation:
    """Weights that follow the text: the lowest NLL of prompt and output, old tokens fading."""
    ages = np.arange(len(reading.nlls))[::-1]
    recent = np.tensordot(_KEEP**ages, reading.nlls, axes=1)

    def adapt(rows: Rows, token: int) -> Weights:
        nonlocal recent
        recent = _KEEP * recent + score(rows, token)
        return lowest_on_grid(recent)

    return Continuation(Mix(lowest_on_grid(recent)), adapt=adapt)
