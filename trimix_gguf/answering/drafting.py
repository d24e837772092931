"""Drafts: tokens that are likely to be the mix's own choice, and how many of them are worth it.

The weights with the lowest perplexity are mostly small_cpt's, so its choice is mostly that of the
mix: it drafts a few tokens. Where earlier text repeats, the draft is copied from there. The length
of a draft follows from what the models' decodes cost and from the share of drafted tokens that were
kept. Where several answers share each batch, each one counts its share of what the batch costs.
decoding.py verifies them.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.answering.lookup import LONGEST, Match
from trimix_gguf.mixing.fusion import Rows, probability
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.roles import Role
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.strand import Strand

Need = tuple[tuple[Role, ...], int]  # roles whose rows are wanted, after so many of the last ids
DRAFTER: Role = "small_cpt"
MOST_DRAFTED = 31
_LEAST_STEP = 0.005  # seconds of lockstep: below this, drafting overhead exceeds its gain
_MIN_GAIN = 1.1  # expected over lockstep's speed, or nothing is drafted: costs are estimates
_MEMORY = 0.9  # weight of the old value when a drafted token was accepted or not
_PLAN_EVERY = 8  # rounds
_WATCH_EVERY = 3  # rounds of lockstep
_BANDS = 4  # of the drafter's confidence, each with its own share of accepted tokens
_MATCH_MEMORY, _MATCH_PRIOR = 0.8, 0.6  # of lookups: as _MEMORY, and the first value


@dataclass(frozen=True)
class Draft:
    """Drafted tokens, which the strand then holds.

    small_cpt's own come with its confidence in each and the rows [n_vocab] it picked them from, and
    the next row where it was read too; those that are `looked_up` have neither.
    """

    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    looked_up: bool = False


@dataclass(frozen=True)
class DraftPlan:
    """A length of draft, and the costs behind it; without costs all of it is drafted.

    Seconds: `step` of one drafted token, `verify[k]` of k drafted tokens, `read[k]` of k that no
    model drafted, `token` of one token of the answer. `acceptance` is the chance of each.
    """

    n_draft: int
    step: float = 0.0
    verify: tuple[float, ...] = ()
    read: tuple[float, ...] = ()
    acceptance: float = 1.0
    token: float = math.inf

    def pays(self, n: int, reach: float) -> bool:
        """Whether to draft more than `n` tokens, if the next one is kept with chance `reach`.

        It is worth it if some longer draft pays: some batches cost little more than smaller ones.
        """
        if not self.verify:
            return True
        gain = 0.0
        for k in range(n + 1, self.n_draft + 1):
            gain += reach * self.acceptance ** (k - n - 1)
            cost = (k - n - 1) * self.step + self.verify[k] - self.verify[n]
            if gain * self.token > cost:
                return True
        return False


class Drafting:
    """How many tokens to draft for the most expected tokens per second, and how that went.

    Costs are what the models' decodes of n tokens took so far, prefill included. Acceptance is a
    running share, for each band of the drafter's confidence in its token, and for each length of
    a lookup's match. `n_draft` fixes the length of drafts and rules out lookups; `always` rules out
    lockstep, `never` rules out drafts. `n_together` answers are drafted in the same batches; while
    `is_held`, nothing is drafted.
    """

    def __init__(
        self, *, n_draft: int | None = None, always: bool = False, never: bool = False
    ) -> None:
        self.n_draft = 0 if never else n_draft
        self.always = always
        self.n_together, self.is_held = 1, False
        self.n_rounds = self.n_drafted = self.n_accepted = 0
        self._plan, self._next_plan = DraftPlan(0), 0
        self._planned_for: tuple[int, Sequence[Role]] = (0, ())
        self._idle = False  # the models are too small for any of this
        self._acceptance = 0.8
        self._by_confidence = [0.5 + 0.5 * (i + 0.5) / _BANDS for i in range(_BANDS)]
        self._by_match = [_MATCH_PRIOR] * (LONGEST + 1)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted."""
        return self.n_accepted / self.n_drafted if self.n_drafted else None

    def plan(self, strand: Strand, needed: Sequence[Role], most: int) -> DraftPlan:
        """What is worth drafting now, up to `most` tokens; `needed` are the roles in the mix."""
        if self.is_held:
            return DraftPlan(0)
        if self.n_draft is not None:
            return DraftPlan(min(self.n_draft, most))
        planned_for = (self.n_together, needed)
        if self.n_rounds >= self._next_plan or planned_for != self._planned_for:
            self._plan = self._best(strand, needed, min(MOST_DRAFTED, self.most(strand)))
            # Costs change little; with very small models, planning costs time too.
            is_settled = self._idle or self.n_rounds > _PLAN_EVERY
            self._next_plan = self.n_rounds + is_settled * _PLAN_EVERY
            self._planned_for = planned_for
        return replace(self._plan, n_draft=min(self._plan.n_draft, most))

    def most(self, strand: Strand) -> int:
        """How many tokens each answer may draft, so that one batch verifies those of all."""
        return max(0, strand.n_window // self.n_together - 1)

    def _share(self, model: Model, most: int) -> NDArray[np.float64]:
        """Seconds of 1, 2, … `most` ids [most], where as many of each other answer are decoded."""
        n = self.n_together
        return model.seconds(n * most)[n - 1 :: n] / n

    def _best(self, strand: Strand, needed: Sequence[Role], most: int) -> DraftPlan:
        lockstep = sum(float(self._share(strand.models[role], 1)[0]) for role in needed)
        self._idle = lockstep < _LEAST_STEP and not self.always
        if self._idle:
            return DraftPlan(0)
        costs = {role: self._share(strand.models[role], most + 1) for role in needed}
        none = np.zeros(most + 1)
        read = sum(costs.values(), none).tolist()
        verify = sum((c for r, c in costs.items() if r != DRAFTER), none).tolist()
        step, p = float(self._share(strand.models[DRAFTER], 1)[0]), self._acceptance
        if not math.isfinite(step + read[0]):
            return DraftPlan(0)  # the first step is lockstep's, and measures it
        lead = step if DRAFTER in needed else 0.0  # its own row is then paid for anyway
        best, best_speed, expected = 0, 1 / read[0], 1.0
        for k in range(1, most + 1 if verify[0] else 1):
            expected += p**k
            # The last drafted token is read by the drafter only where all were accepted.
            speed = expected / (k * step + p**k * lead + verify[k])
            if speed > best_speed * (_MIN_GAIN if best == 0 and not self.always else 1):
                best, best_speed = k, speed
        n_draft = max(best, int(self.always and verify[0] > 0))
        return DraftPlan(n_draft, step, tuple(verify), tuple(read), p, 1 / best_speed)

    def n_found(self, plan: DraftPlan, match: Match | None, most: int) -> int:
        """How many tokens after a lookup's match to verify; 0 where `plan` is faster.

        Each accepted token makes the match longer by one.
        """
        if match is None or not plan.read:
            return 0
        best, best_speed = 0, max(1 / plan.token, _MIN_GAIN / plan.read[0])
        reach = expected = 1.0
        for k in range(1, most + 1):
            reach *= self._by_match[min(match.length + k - 1, LONGEST)]
            expected += reach
            if expected / plan.read[k] > best_speed:
                best, best_speed = k, expected / plan.read[k]
        return best

    def chance(self, confidence: float) -> float:
        """The chance that a token with this probability under the drafter is accepted."""
        return self._by_confidence[_band(confidence)]

    def count(self, n_drafted: int, n_accepted: int) -> None:
        """Take in a round of drafts, whoever drafted them."""
        self.n_rounds += 1
        self.n_drafted += n_drafted
        self.n_accepted += n_accepted

    def learn(self, confidences: Sequence[float], n_accepted: int) -> None:
        """Take in a round of drafts: the drafter's confidence in each, and how many were kept."""
        self.count(len(confidences), n_accepted)
        for i, confidence in enumerate(confidences[: n_accepted + 1]):
            self._notice(confidence, i < n_accepted)

    def watch(self, row: NDArray[np.float32] | None, token: int) -> None:
        """Take in a step of lockstep: whether the drafter, if it has a row, would pick `token`.

        Only every few steps: with very small models, looking costs time too.
        """
        self.n_rounds += 1
        looks = self.n_draft is None and not self._idle and self.n_rounds % _WATCH_EVERY == 0
        if row is not None and looks:
            top = int(row.argmax())
            self._notice(probability(row, top), top == token)

    def check(self, match: Match, token: int) -> None:
        """Take in the token that came after a lookup's `match`, drafted or not."""
        share = self._by_match[match.length]
        self._by_match[match.length] += (1 - _MATCH_MEMORY) * ((match.token == token) - share)

    def _notice(self, confidence: float, hit: bool) -> None:
        band = _band(confidence)
        self._acceptance += (1 - _MEMORY) * (hit - self._acceptance)
        self._by_confidence[band] += (1 - _MEMORY) * (hit - self._by_confidence[band])


def draft(
    strand: Strand, sampler: Sampler, drafting: Drafting, plan: DraftPlan
) -> Generator[Need, Rows, Draft]:
    """Append what `plan` says of small_cpt's own choice to the strand; yields for each row.

    A copy of the target's sampler picks, with the same random stream: where the two models'
    probabilities agree, so do the picks, at any temperature. It stops where it is too unsure for
    another token to pay.
    """
    drafted = Draft()
    if plan.n_draft == 0:
        return drafted
    picker, reach = sampler.clone(), 1.0
    while len(drafted.tokens) < plan.n_draft:
        rows = yield (DRAFTER,), 1
        row = rows[DRAFTER][0].copy()  # llama.cpp reuses this buffer on the next decode
        drafted.rows.append(row)
        if strand.unused is not None:
            row[strand.unused] = -np.inf  # as in the mix
        token = picker.sample(row)
        confidence = probability(row, token)
        reach *= drafting.chance(confidence)
        if not plan.pays(len(drafted.tokens), reach):
            break
        picker.accept(token)
        drafted.tokens.append(token)
        drafted.confidences.append(confidence)
        strand.advance(token)
    return drafted


def _band(confidence: float) -> int:
    return min(_BANDS - 1, int(confidence * _BANDS))
