"""The methods that are compared: what each makes of a prompt's reading."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trimix_gguf.errors import WeightsError
from trimix_gguf.evaluation.continuing import Mix
from trimix_gguf.evaluation.reading import AXIS, Reading
from trimix_gguf.mixing.fusion import METHODS as FIXED
from trimix_gguf.mixing.fusion import Rows, Weights
from trimix_gguf.mixing.scoring import GRID, Float64, lowest

_FINE = np.linspace(0, 1, 101)  # where the continuous optimum is looked for
_KEEP = 0.97  # what a token's evidence is worth one token later, for token-level weights

ANSWERS = "ppl-answers"
MI_ANSWERS = "mi-answers"
DECOUPLED = "decoupled"
Score = Callable[[Rows, int], Float64]  # rows [n_vocab], the id that followed -> nats over AXIS²

# Those that choose weights, what by: of these each prompt is read to the end.
READING = {
    "ppl": "lowest perplexity of the prompt (TriMix-PPL)",
    ANSWERS: "lowest perplexity of the exemplars' answers",
    "ppl-task": "one pair a task, lowest macro perplexity of 50 prompts",
    "ent": "lowest entropy of the first token (TriMix-ENT)",
    "continuous": "lowest perplexity of the prompt, between the grid's points too",
    DECOUPLED: "lowest perplexity of the prompt over (alpha, beta, gamma), by four models",
    "token": "chosen anew at each token, by the perplexity of what lies just before it",
}
SELECTING = READING | {
    MI_ANSWERS: "one pair a task, most mutual information of the exemplars' answers and questions",
}
ORACLE = "upper-bound"  # the best fixed grid point on the labelled set: needs all 36 answers
# One pair a task, chosen by the report: the most mutual information between questions and choices;
# MI_ANSWERS where a task has no choices.
INFORMATIVE = "mi"
METHODS = (*FIXED, *SELECTING, ORACLE)


def check_methods(names: tuple[str, ...]) -> None:
    """Raises WeightsError, naming those that there are."""
    for name in names:
        if name not in METHODS:
            raise WeightsError(f"there is no method {name!r}; the methods are {', '.join(METHODS)}")


def mixes(
    names: tuple[str, ...],
    reading: Reading | None,
    task_weights: Mapping[str, Weights],
    score: Score,
) -> Mapping[str, Mix]:
    """A Mix of the trio for each method; those that select need a reading. ORACLE has none.

    `task_weights` are those of the methods that choose one pair a task.
    """
    made: dict[str, Mix] = {}
    for name in names:
        if name in FIXED:
            made[name] = fixed_mix(name)
        elif name in task_weights:
            made[name] = Mix(task_weights[name])
        elif name in READING and name != DECOUPLED and reading is not None:
            made[name] = _selecting(name, reading, score)
    return made


def fixed_mix(name: str) -> Mix:
    """The Mix of a method whose weights are given."""
    return Mix(FIXED[name].weights, FIXED[name].plausibility_threshold)


@dataclass(frozen=True)
class Decoupled:
    """Weights of the four models' mix (decoupled.py)."""

    weights: Weights
    gamma: float


def lowest_decoupled(nll: Float64) -> Decoupled:
    """The point of GRID³ with the lowest of `nll` [n_grid, n, n]; of equal ones the first gamma."""
    at = int(np.argmin([_inner(one).min() for one in nll]))
    return Decoupled(lowest_on_grid(nll[at]), GRID[at])


def grid_mixes() -> list[Mix]:
    """One for each point of GRID², alpha by alpha."""
    return [Mix(Weights(alpha, beta)) for alpha in GRID for beta in GRID]


def lowest_on_grid(nll: Float64) -> Weights:
    """The point of GRID² with the lowest of `nll` [n, n] over AXIS²."""
    return lowest(_inner(nll), GRID, GRID)


def _inner(nll: Float64) -> Float64:
    at = [AXIS.index(w) for w in GRID]
    return nll[np.ix_(at, at)]


def _selecting(name: str, reading: Reading, score: Score) -> Mix:
    if name == "ent":
        return Mix(lowest(reading.entropy, GRID, GRID))
    if name == "continuous":
        return Mix(_continuous(reading.nlls.sum(axis=0)))
    if name == ANSWERS:
        if not reading.answers.any():
            raise WeightsError(f"{ANSWERS} needs exemplars; give --exemplars 1 or more")
        return Mix(lowest_on_grid(reading.nlls[reading.answers].sum(axis=0)))
    if name == "token":
        return _token_level(reading, score)
    return Mix(lowest_on_grid(reading.nlls.sum(axis=0)))


def _continuous(nll: Float64) -> Weights:
    """The lowest point of the polynomial through `nll` over AXIS², which is smooth and convex."""
    from scipy.interpolate import BarycentricInterpolator

    rows = BarycentricInterpolator(AXIS, nll)(_FINE)
    return lowest(BarycentricInterpolator(AXIS, rows.T)(_FINE).T, tuple(_FINE), tuple(_FINE))


def _token_level(reading: Reading, score: Score) -> Mix:
    """Weights that follow the text: the lowest NLL of prompt and output, old tokens fading."""
    ages = np.arange(len(reading.nlls))[::-1]
    recent = np.tensordot(_KEEP**ages, reading.nlls, axes=1)

    def adapt(rows: Rows, token: int) -> Weights:
        nonlocal recent
        recent = _KEEP * recent + score(rows, token)
        return lowest_on_grid(recent)

    return Mix(lowest_on_grid(recent), adapt=adapt)
