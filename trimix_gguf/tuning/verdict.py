"""From answered exercises to weights and a verdict in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimix_gguf.errors import DataError
from trimix_gguf.mixing.fusion import METHODS, Weights
from trimix_gguf.mixing.scoring import WITH_CORNERS, Float64
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.tuning import Kind
from trimix_gguf.tuning.probe import Answered

FEWEST = 12  # exercises of a kind, below which it says nothing

Point = tuple[int, int]  # of WITH_CORNERS, for alpha and for beta
CORNERS: Mapping[str, Point] = {
    role: tuple(WITH_CORNERS.index(w) for w in (m.weights.alpha, m.weights.beta))  # type: ignore[misc]
    for role, m in METHODS.items()
    if role in ROLES
}


@dataclass(frozen=True)
class Scores:
    """One kind: what each exercise [n] is worth under each mix [n_axis, n_axis], and by chance.

    `right` is 1 where the likeliest choice is the right one; `sure` is the right one's
    probability among the choices, which tells small differences with fewer exercises.
    """

    right: Float64
    sure: Float64
    chance: float

    @property
    def n(self) -> int:
        """Exercises."""
        return len(self.right)


@dataclass(frozen=True)
class Verdict:
    """The mix that `auto` answers questions with, in words, and the figures behind it.

    `weights` is None where no model answers better than chance: then perplexity decides.
    """

    weights: Weights | None
    text: str
    kinds: Mapping[str, Kind]


def scores_of(answers: Sequence[Answered]) -> dict[str, Scores]:
    """Each kind's scores; raises DataError where there are too few to say anything."""
    found: dict[str, list[Answered]] = {}
    for answer in answers:
        found.setdefault(answer.kind, []).append(answer)
    scores = {kind: _score(own) for kind, own in found.items() if len(own) >= FEWEST}
    if not scores:
        raise DataError(
            f"too few exercises were answered: {FEWEST} of a kind are needed; raise --minutes"
        )
    return scores


def _score(answers: Sequence[Answered]) -> Scores:
    right, sure = [], []
    for one in answers:
        p = np.exp(one.nll.min(axis=0) - one.nll)
        sure.append((p / p.sum(axis=0))[one.right])
        right.append(one.nll.argmin(axis=0) == one.right)
    chance = float(np.mean([1 / len(one.nll) for one in answers]))
    return Scores(np.array(right, float), np.array(sure), chance)
