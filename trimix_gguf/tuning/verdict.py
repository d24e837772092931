"""From answered exercises to weights and a verdict in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import DataError
from trimix_gguf.mixing.fusion import METHODS, Weights
from trimix_gguf.mixing.scoring import WITH_CORNERS, Float64
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.tuned import Kind
from trimix_gguf.tuning.probe import Answered

FEWEST = 12  # exercises of a kind, below which it says nothing
_CLEAR = 2.0  # standard errors of the mean: of so many mixes, one is often better by one

Point = tuple[int, int]  # of WITH_CORNERS, for alpha and for beta
CORNERS: Mapping[str, Point] = {
    role: tuple(WITH_CORNERS.index(w) for w in (m.weights.alpha, m.weights.beta))  # type: ignore[misc]
    for role, m in METHODS.items()
    if role in ROLES
}

CLOSE = Weights(1.0, 0.1)  # what auto takes for most questions of a trio that nobody tuned


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

    def gain(self, over: Point) -> tuple[Float64, Float64]:
        """How much better each mix answers than the one at `over`: mean and standard error.

        Both scores count alike, each in units of what chance leaves to win. The differences are
        paired, exercise by exercise.
        """
        worth = (self.right + self.sure) / 2 / (1 - self.chance)
        difference = worth - worth[:, over[0], over[1]][:, None, None]
        return difference.mean(axis=0), difference.std(axis=0, ddof=1) / np.sqrt(self.n)

    def answers(self) -> bool:
        """Whether a single model is clearly better than chance: three standard errors."""
        best = max(self.right[:, i, j].mean() for i, j in CORNERS.values())
        return bool(best - self.chance > 3 * np.sqrt(self.chance * (1 - self.chance) / self.n))


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
    scores = {kind: _score(asked) for kind, asked in found.items() if len(asked) >= FEWEST}
    if not scores:
        raise DataError(
            f"too few exercises were answered: {FEWEST} of a kind are needed; raise --minutes"
        )
    return scores


def judge(scores: Mapping[str, Scores]) -> Verdict:
    """Choose the mix that answers best in the mean of the kinds, if it costs none of them.

    It must be better than the best single model by more than two standard errors in the mean and
    by more than one in most kinds, since what helps in one says little about questions of another;
    and in no kind worse by more than one. Of mixes that are about as good, it is the one closest to
    that model. A small model has to be as much better than large_ins to be the best one: of models
    that are level, other exercises would name another. Kinds that no model answers better than
    chance say nothing.

    Where no mix is so much better, the best model answers by itself; but where that is large_ins,
    it hears a little of small_cpt, as without a tuning, if it answers a little better so.
    """
    telling = {kind: one for kind, one in scores.items() if one.answers()}
    if not telling:
        text = "none of the models answers better than chance; auto goes by perplexity"
        return Verdict(None, text, _kinds(scores, CORNERS[ROLES[0]]))
    best: Role = ROLES[0]
    over = _over(telling, CORNERS[best])
    if able := [role for role in ROLES if over.is_better[CORNERS[role]]]:
        best = max(able, key=lambda role: over.mean[CORNERS[role]])
        over = _over(telling, CORNERS[best])
    if not over.is_better.any():
        return _without_better_mix(scores, over, best)
    smooth = np.where(over.is_better, _smoothed(over.mean), -np.inf)
    point = _nearest_good(smooth, over.error, CORNERS[best])
    weights = Weights(WITH_CORNERS[point[0]], WITH_CORNERS[point[1]])
    n_better = sum(bool(gain[point] > 0) for gain in over.gains)
    text = (
        f"the mix answers better than {best} on {n_better} of {len(telling)} kinds; auto answers "
        f"with ({weights.alpha:g}, {weights.beta:g})"
    )
    return Verdict(weights, text, _kinds(scores, point))


@dataclass(frozen=True)
class _Over:
    """How much better than one model each mix is [n_axis, n_axis], and where that is clear."""

    gains: Sequence[Float64]  # by kind
    mean: Float64
    error: Float64
    is_better: NDArray[np.bool_]


def _over(scores: Mapping[str, Scores], model: Point) -> _Over:
    gains, errors = zip(*(one.gain(model) for one in scores.values()), strict=True)
    mean = np.mean(gains, axis=0)
    error = np.sqrt(np.sum([e**2 for e in errors], axis=0)) / len(gains)
    costs = [gain < -e for gain, e in zip(gains, errors, strict=True)]
    helps = [gain > e for gain, e in zip(gains, errors, strict=True)]
    most = np.sum(helps, axis=0) > len(gains) / 2
    clear = mean > _CLEAR * error
    return _Over(gains, mean, error, clear & most & ~np.any(costs, axis=0))


def _without_better_mix(scores: Mapping[str, Scores], over: _Over, best: Role) -> Verdict:
    text = f"no mix answers clearly better than {best}; auto stays "
    close = WITH_CORNERS.index(CLOSE.alpha), WITH_CORNERS.index(CLOSE.beta)
    if best == ROLES[0] and over.mean[close] > 0:
        text += f"close to it, with ({CLOSE.alpha:g}, {CLOSE.beta:g})"
        return Verdict(CLOSE, text, _kinds(scores, close))
    return Verdict(METHODS[best].weights, f"{text}with it", _kinds(scores, CORNERS[best]))


def _score(answers: Sequence[Answered]) -> Scores:
    right, sure = [], []
    for one in answers:
        p = np.exp(one.nll.min(axis=0) - one.nll)
        sure.append((p / p.sum(axis=0))[one.right])
        right.append(one.nll.argmin(axis=0) == one.right)
    chance = float(np.mean([1 / len(one.nll) for one in answers]))
    return Scores(np.array(right, float), np.array(sure), chance)


def _nearest_good(gain: Float64, error: Float64, model: Point) -> Point:
    """The mix closest to `model` of those that are within one standard error of the best mix.

    Exercises cannot tell these apart. What they do not ask for changes least with the closest.
    """
    best = np.unravel_index(int(gain.argmax()), gain.shape)
    good = np.argwhere(gain >= gain[best] - error[best])
    axis = np.asarray(WITH_CORNERS)
    far = np.abs(axis[good] - axis[np.asarray(model)]).sum(axis=1)
    order = np.lexsort((-gain[tuple(good.T)], np.round(far, 6)))
    return int(good[order[0]][0]), int(good[order[0]][1])


def _smoothed(grid: Float64) -> Float64:
    """The mean of each point and its neighbours, up to eight: single points stand out by chance."""
    padded = np.pad(grid, 1, constant_values=np.nan)
    n, m = grid.shape
    parts = [padded[i : i + n, j : j + m] for i in range(3) for j in range(3)]
    smooth: Float64 = np.nanmean(parts, axis=0)
    return smooth


def _kinds(scores: Mapping[str, Scores], mix: Point) -> dict[str, Kind]:
    points = {**CORNERS, "mix": mix}
    return {
        name: Kind(
            one.n,
            {role: float(one.right[:, at[0], at[1]].mean()) for role, at in points.items()},
        )
        for name, one in scores.items()
    }
