"""Decoding one token after another, with small_cpt drafting some ahead where that pays.

The weights that a prompt's perplexity picks lean on small_cpt, so its own choice is mostly the
mix's: it drafts a few tokens, the others verify them in one batch, and the target's sampler runs
over the fused rows in order, up to the first pick that is not the drafted one. Each fused row,
and so each pick, is that of lockstep (no draft at all): the same seed gives the same text, but
for near ties. llama.cpp sums a batch in another order than single tokens: logits differ by about
1e-6 in float32, by some 0.03 with quantized weights. Source: Leviathan et al. 2023, "Fast Inference
from Transformers via Speculative Decoding" (arXiv 2211.17192), with one of the mixed models as
the draft.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.fusion import Rows, Weights, fuse, mask_implausible
from trimix_gguf.sampling import Sampler
from trimix_gguf.trio import Trio

DRAFTER = "small_cpt"
_MIN_GAIN = 1.1  # expected over lockstep's speed, or nothing is drafted: costs are estimates
_MEMORY = 0.9  # weight of what was known, as the fate of each drafted token comes in
_PLAN_EVERY = 8  # rounds
_BANDS = 4  # of the drafter's confidence, each with its own share of accepted tokens


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

    Seconds: `step` of one drafted token, `verify[k]` of k drafted tokens, `token` of one token
    of the answer. `acceptance` is the chance of each.
    """

    n_draft: int
    step: float = 0.0
    verify: tuple[float, ...] = ()
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
    running share, for each band of the drafter's confidence in its token. `n_draft` fixes the
    length instead; `always` rules out lockstep, `never` everything else.
    """

    def __init__(
        self, *, n_draft: int | None = None, always: bool = False, never: bool = False
    ) -> None:
        self.n_draft = 0 if never else n_draft
        self.always = always
        self.n_rounds = self.n_drafted = self.n_accepted = 0
        self._plan, self._next_plan = Plan(0), 0
        self._acceptance = 0.8
        self._by_confidence = [0.5 + 0.5 * (i + 0.5) / _BANDS for i in range(_BANDS)]

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted."""
        return self.n_accepted / self.n_drafted if self.n_drafted else None

    def plan(
        self, trio: Trio, verifiers: Sequence[str], most: int, *, mixed: bool = True
    ) -> "Plan":
        """What is worth drafting now, `most` tokens at most.

        `mixed` says whether the drafter's own rows are part of the mix, and so paid for anyway.
        """
        if self.n_draft is not None:
            return Plan(min(self.n_draft, most))
        if self.n_rounds >= self._next_plan:
            self._plan = self._best(trio, verifiers, trio.n_window - 1, mixed)
            # Costs change little; thinking about them costs too, beside a very small model.
            self._next_plan = self.n_rounds + (self.n_rounds > _PLAN_EVERY) * _PLAN_EVERY
        return replace(self._plan, n_draft=min(self._plan.n_draft, most))

    def _best(self, trio: Trio, verifiers: Sequence[str], most: int, mixed: bool) -> "Plan":
        verify = [sum(trio.models[r].seconds(n) for r in verifiers) for n in range(1, most + 2)]
        step, p = trio.models[DRAFTER].seconds(1), self._acceptance
        if not math.isfinite(step + verify[0]):
            return Plan(0)  # the first step is lockstep's, and measures it
        lead = step if mixed else 0.0
        best, best_speed = 0, 1 / (lead + verify[0])
        for k in range(1, most + 1):
            expected = sum(p**i for i in range(k + 1))
            # The last drafted token is read by the drafter only where all were accepted.
            speed = expected / (k * step + p**k * lead + verify[k])
            if speed > best_speed * (_MIN_GAIN if best == 0 and not self.always else 1):
                best, best_speed = k, speed
        return Plan(max(best, int(self.always)), step, tuple(verify), p, 1 / best_speed)

    def chance(self, confidence: float) -> float:
        """That a token which the drafter gives this probability will be accepted."""
        return self._by_confidence[_band(confidence)]

    def learn(self, confidences: Sequence[float], n_accepted: int) -> None:
        """Take in a round of drafts: the drafter's confidence in each, and how many were kept."""
        self.n_rounds += 1
        self.n_drafted += len(confidences)
        self.n_accepted += n_accepted
        for i, confidence in enumerate(confidences[: n_accepted + 1]):
            self._notice(confidence, i < n_accepted)

    def watch(self, row: NDArray[np.float32], token: int) -> None:
        """Take in a step of lockstep: whether the drafter's row would have led to `token`."""
        self.n_rounds += 1
        if self.n_draft is None:
            top = int(row.argmax())
            self._notice(probability(row, top), top == token)

    def _notice(self, confidence: float, hit: bool) -> None:
        band = _band(confidence)
        self._acceptance += (1 - _MEMORY) * (hit - self._acceptance)
        self._by_confidence[band] += (1 - _MEMORY) * (hit - self._by_confidence[band])


def decode_steps(
    trio: Trio,
    weights: Weights,
    sampler: Sampler,
    *,
    drafting: Drafting,
    max_tokens: int,
    plausibility_threshold: float = 0.0,
    also: Sequence[str] = (),
) -> Generator[Step, None, None]:
    """Yield the target's tokens one by one, for as long as it is asked.

    The caller has `sampler` accept each token before it asks for the next, and asks for no more
    than `max_tokens`. `also` are roles whose rows it wants though the mix does not. However it
    ends, the trio then holds what it held, and the tokens yielded but for the last.
    """
    needed = {*weights.active, *also, *(("large_ins",) if plausibility_threshold > 0 else ())}
    verifiers = tuple(role for role in trio.models if role in needed and role != DRAFTER)
    n_ahead, n_left = 0, max_tokens
    try:
        while True:
            most = max(0, min(trio.n_window, trio.room, n_left) - 1)
            plan = Plan(0)
            if verifiers:
                plan = drafting.plan(trio, verifiers, most, mixed=DRAFTER in needed)
            drafted, confidences, kept = draft(trio, sampler, drafting, plan)
            n_ahead = len(drafted)
            verified = trio.tail_rows(verifiers, len(drafted) + 1)
            for i in range(len(drafted) + 1):
                rows = {role: verified[role][i] for role in verifiers}
                if DRAFTER in needed:
                    last = i == len(drafted)
                    rows[DRAFTER] = trio.rows((DRAFTER,))[DRAFTER] if last else kept[i]
                fused = fuse(rows, weights, unused=trio.unused)
                if plausibility_threshold > 0:
                    mask_implausible(fused, rows["large_ins"], plausibility_threshold)
                token = sampler.sample(fused)
                n_left -= 1
                accepted = i < len(drafted) and token == drafted[i]
                if drafted and not accepted:
                    trio.rewind(len(drafted) - i)
                    drafting.learn(confidences, i)
                elif not drafted and DRAFTER in rows:
                    drafting.watch(rows[DRAFTER], token)
                n_ahead = len(drafted) - i if accepted else 0
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


def probability(row: NDArray[np.float32], token: int) -> float:
    """Softmax of one row [n_vocab] at one id."""
    top = float(row.max())
    return math.exp(float(row[token]) - top) / float(np.exp(row - top).sum(dtype=np.float64))


def _band(confidence: float) -> int:
    return min(_BANDS - 1, int(confidence * _BANDS))
