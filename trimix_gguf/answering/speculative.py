"""Decoding one token after another, with some drafted ahead where that pays.

The weights that a prompt's perplexity picks lean on small_cpt, so its own choice is mostly the
mix's: it drafts a few tokens, the others verify them in one batch, and the target's sampler runs
over the fused rows in order, up to the first pick that is not the drafted one. What repeats
earlier text is drafted from there instead, and verified by all models. Each fused row, and so each
pick, is that of lockstep (no draft at all): the same seed gives the same text, but for near ties.
llama.cpp sums a batch in another order than single tokens: logits differ by about 1e-6 in float32,
with quantized weights by 0.03 to 0.2, as the processor has it. Source: Leviathan et al. 2023,
"Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), with one of the
mixed models as the draft.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.answering.lookup import LONGEST, Lookup, Match
from trimix_gguf.mixing.fusion import Mix, Rows, probability
from trimix_gguf.mixing.sampling import Sampler
from trimix_gguf.trio.trio import Trio

DRAFTER = "small_cpt"
MOST_DRAFTED = 31
_LEAST_STEP = 0.005  # seconds of lockstep: around smaller models goes what drafting would save
_MIN_GAIN = 1.1  # expected over lockstep's speed, or nothing is drafted: costs are estimates
_MEMORY = 0.9  # weight of what was known, as the fate of each drafted token comes in
_PLAN_EVERY = 8  # rounds
_WATCH_EVERY = 3  # rounds of lockstep
_BANDS = 4  # of the drafter's confidence, each with its own share of accepted tokens
_MATCH_MEMORY, _MATCH_PRIOR = 0.8, 0.6  # as _MEMORY, and before anything is known: of lookups


@dataclass(frozen=True)
class Step:
    """One token of the target's choice; `rows` are the models' own, [n_vocab] each."""

    token: int
    fused: NDArray[np.float32]
    rows: Rows
    from_draft: bool


@dataclass(frozen=True)
class Plan:
    """A length of draft, and what it rests on; without costs it is drafted whole.

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
        """Whether to go on from `n` drafted tokens, the next one picked and good with `reach`.

        To some length at least: batches have sizes that cost little more than smaller ones.
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
    """How far to draft: as far as gives the most expected tokens a second; and what came of it.

    Costs are what the models' decodes of n tokens took so far, prefill included. Acceptance is a
    running share, for each band of the drafter's confidence in its token, and for each length of
    a lookup's match. `n_draft` fixes the length of what the drafter drafts instead, and rules out
    lookups; `always` rules out lockstep, `never` everything else.
    """

    def __init__(
        self, *, n_draft: int | None = None, always: bool = False, never: bool = False
    ) -> None:
        self.n_draft = 0 if never else n_draft
        self.always = always
        self.n_rounds = self.n_drafted = self.n_accepted = 0
        self._plan, self._next_plan = Plan(0), 0
        self._idle = False  # the models are too small for any of this
        self._acceptance = 0.8
        self._by_confidence = [0.5 + 0.5 * (i + 0.5) / _BANDS for i in range(_BANDS)]
        self._by_match = [_MATCH_PRIOR] * (LONGEST + 1)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted."""
        return self.n_accepted / self.n_drafted if self.n_drafted else None

    def plan(self, trio: Trio, needed: Sequence[str], most: int) -> "Plan":
        """What is worth drafting now, `most` tokens at most; `needed` are the roles in the mix."""
        if self.n_draft is not None:
            return Plan(min(self.n_draft, most))
        if self.n_rounds >= self._next_plan:
            self._plan = self._best(trio, needed, min(MOST_DRAFTED, trio.n_window - 1))
            # Costs change little; thinking about them costs too, beside a very small model.
            self._next_plan = self.n_rounds + (self.n_rounds > _PLAN_EVERY) * _PLAN_EVERY
        return replace(self._plan, n_draft=min(self._plan.n_draft, most))

    def _best(self, trio: Trio, needed: Sequence[str], most: int) -> "Plan":
        lockstep = sum(float(trio.models[role].seconds(1)[0]) for role in needed)
        self._idle = lockstep < _LEAST_STEP and not self.always
        if self._idle:
            return Plan(0)
        costs = {role: trio.models[role].seconds(most + 1) for role in needed}
        none = np.zeros(most + 1)
        read = sum(costs.values(), none).tolist()
        verify = sum((c for r, c in costs.items() if r != DRAFTER), none).tolist()
        step, p = float(trio.models[DRAFTER].seconds(1)[0]), self._acceptance
        if not math.isfinite(step + read[0]):
            return Plan(0)  # the first step is lockstep's, and measures it
        lead = step if DRAFTER in needed else 0.0  # its own row is then paid for anyway
        best, best_speed, expected = 0, 1 / read[0], 1.0
        for k in range(1, most + 1 if verify[0] else 1):
            expected += p**k
            # The last drafted token is read by the drafter only where all were accepted.
            speed = expected / (k * step + p**k * lead + verify[k])
            if speed > best_speed * (_MIN_GAIN if best == 0 and not self.always else 1):
                best, best_speed = k, speed
        n_draft = max(best, int(self.always and verify[0] > 0))
        return Plan(n_draft, step, tuple(verify), tuple(read), p, 1 / best_speed)

    def n_found(self, plan: "Plan", match: Match | None, most: int) -> int:
        """How many tokens from a lookup's match on to verify; 0 where `plan` gives more a second.

        Each that comes true makes the match longer by one.
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
        """That a token which the drafter gives this probability will be accepted."""
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
        """Take in a step of lockstep: whether the drafter's row, if any, would have led to `token`.

        One step in some: beside a very small model, looking costs too.
        """
        self.n_rounds += 1
        looks = self.n_draft is None and not self._idle and self.n_rounds % _WATCH_EVERY == 0
        if row is not None and looks:
            top = int(row.argmax())
            self._notice(probability(row, top), top == token)

    def check(self, match: Match, token: int) -> None:
        """Take in what came where a lookup had found `match`, whether it was drafted or not."""
        share = self._by_match[match.length]
        self._by_match[match.length] += (1 - _MATCH_MEMORY) * ((match.token == token) - share)

    def _notice(self, confidence: float, hit: bool) -> None:
        band = _band(confidence)
        self._acceptance += (1 - _MEMORY) * (hit - self._acceptance)
        self._by_confidence[band] += (1 - _MEMORY) * (hit - self._by_confidence[band])


def decode_steps(
    trio: Trio,
    mix: Mix,
    sampler: Sampler,
    *,
    drafting: Drafting,
    max_tokens: int,
    also: Sequence[str] = (),
) -> Generator[Step, None, None]:
    """Yield the target's tokens one by one, for as long as it is asked.

    The caller has `sampler` accept each token before it asks for the next, and asks for no more
    than `max_tokens`. `also` are roles whose rows it wants though the mix does not. However it
    ends, the trio then holds what it held, and the tokens yielded but for the last.
    """
    needed = tuple(role for role in trio.models if role in {*mix.roles, *also})
    lookup = Lookup(trio.ids[needed[0]] if drafting.n_draft is None else ())
    match = lookup.find()
    n_ahead, n_left = 0, max_tokens
    try:
        while True:
            most = max(0, min(MOST_DRAFTED + 1, trio.n_window, trio.room, n_left) - 1)
            plan = drafting.plan(trio, needed, most)
            n_found = drafting.n_found(plan, match, most)
            confidences: list[float] = []
            kept: list[NDArray[np.float32]] = []
            if match is not None and n_found:
                drafted, readers = lookup.following(match, n_found), needed
                for token in drafted:
                    trio.advance(token)
            else:
                drafted, confidences, kept = draft(trio, sampler, drafting, plan)
                readers = tuple(role for role in needed if role != DRAFTER)
            n_ahead = len(drafted)
            read = trio.tail_rows(readers, len(drafted) + 1)
            for i in range(len(drafted) + 1):
                rows = {role: read[role][i] for role in readers}
                if DRAFTER in needed and DRAFTER not in readers:
                    last = i == len(drafted)
                    rows[DRAFTER] = trio.rows((DRAFTER,))[DRAFTER] if last else kept[i]
                fused = mix.fuse(rows, trio.unused)
                token = sampler.sample(fused)
                n_left -= 1
                accepted = i < len(drafted) and token == drafted[i]
                if drafted and not accepted:
                    trio.rewind(len(drafted) - i)
                    if n_found:
                        drafting.count(n_found, i)
                    else:
                        drafting.learn(confidences, i)
                elif not drafted:
                    drafting.watch(rows.get(DRAFTER), token)
                n_ahead = len(drafted) - i if accepted else 0
                if drafting.n_draft is None:
                    if match is not None:
                        drafting.check(match, token)
                    lookup.append(token)
                    match = lookup.find()
                yield Step(token, fused, rows, accepted)
                if not accepted:
                    trio.advance(token)
                    break
    finally:
        trio.rewind(n_ahead)


def draft(
    trio: Trio, sampler: Sampler, drafting: Drafting, plan: Plan
) -> tuple[list[int], list[float], list[NDArray[np.float32]]]:
    """Append what `plan` says of small_cpt's own choice to the trio.

    Returns the tokens, its confidence in each, and the rows [n_vocab] that it picked them from.
    A copy of the target's sampler picks, with the same random stream: where the two models'
    probabilities agree, so do the picks, at any temperature. Stops where its own doubt makes
    going on a loss.
    """
    tokens: list[int] = []
    confidences: list[float] = []
    rows: list[NDArray[np.float32]] = []
    if plan.n_draft == 0:
        return tokens, confidences, rows
    picker, reach = sampler.clone(), 1.0
    while len(tokens) < plan.n_draft:
        row = trio.rows((DRAFTER,))[DRAFTER]
        if trio.unused is not None:
            row[trio.unused] = -np.inf  # as in the mix
        token = picker.sample(row)
        confidence = probability(row, token)
        reach *= drafting.chance(confidence)
        if not plan.pays(len(tokens), reach):
            break
        picker.accept(token)
        tokens.append(token)
        confidences.append(confidence)
        rows.append(row.copy())  # llama.cpp reuses this buffer on the next decode
        trio.advance(token)
    return tokens, confidences, rows


def _band(confidence: float) -> int:
    return min(_BANDS - 1, int(confidence * _BANDS))
