"""Reads a task's prompts: the exemplars once, then each question, scored over the grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.choosing.choices import token_nlls
from trimix_gguf.errors import PromptError
from trimix_gguf.evaluation.names.axis import AXIS
from trimix_gguf.evaluation.running.decoupled import FourthModel, three_of_four
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.mixing.scoring import (
    GRID,
    N_CHEBYSHEV,
    Float64,
    chebyshev_nodes,
    grid_entropy,
    large_ins_slopes,
)
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prefill import Window
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio


@dataclass(frozen=True)
class Reading:
    """The result of one pass over a prompt.

    `nlls` float64 [n_scored, n, n] in nats, over AXIS for alpha and for beta; `answers` bool
    [n_scored], the tokens of the exemplars' answers; `entropy` float64 [n_grid, n_grid] of the
    first generated token, over GRID. `decoupled` float64 [n_grid, n, n] is the sum of `nlls` at
    each gamma of GRID, if a fourth model read the prompt too. `continuous` float64
    [n_nodes, n_nodes] is their sum over chebyshev_nodes(), and `slopes` float64 [2] the sum of
    scoring.large_ins_slopes, if they were requested.
    """

    n_tokens: int
    nlls: Float64
    answers: NDArray[np.bool_]
    entropy: Float64
    decoupled: Float64 | None = None
    continuous: Float64 | None = None
    slopes: Float64 | None = None


class Reader:
    """Reads prompts that begin with the same exemplars, which are read and scored once.

    `answers` says for each unit of `prefix` whether it is part of an answer. `turn` are the ids
    with which large_ins' chat template begins an answer. `fourth` reads everything that is scored;
    `continuous` scores it over chebyshev_nodes() too; `sloped` adds large_ins_slopes.

    Every question is read from the same state of the caches and in the same batches, whatever was
    read before: a run that was stopped and continued gives the same numbers.
    """

    def __init__(
        self,
        trio: Trio,
        prefix: Prompt,
        answers: Sequence[bool],
        turn: Sequence[int] = (),
        fourth: FourthModel | None = None,
        continuous: bool = False,
        sloped: bool = False,
    ) -> None:
        self.trio, self.prefix, self.turn, self.fourth = trio, prefix, list(turn), fourth
        self._continuous, self._sloped = continuous, sloped
        self._answers = np.asarray(answers, dtype=bool)
        self._scores: _Scores | None = None

    def hold_exemplars(self, *, scored: bool = True) -> None:
        """Have the trio hold only the exemplars; `scored`: score them, if they are not yet."""
        known = self._scores is not None or not scored
        if self.prefix.units and not (known and self._holds(self.prefix)):
            self.trio.forget()
            if scored:
                self._scores = self._score(self.prefix, None)
        self.trio.prefill(self.prefix)

    def start(self, question: Prompt) -> None:
        """Have the trio hold the exemplars and `question`, without scoring them."""
        self.trio.prefill(Prompt((*self.prefix.segments, *question.segments)))

    def read(self, question: Prompt) -> Reading:
        """Score the exemplars and `question`; afterwards the trio holds both."""
        trio, prompt = self.trio, Prompt((*self.prefix.segments, *question.segments))
        n_prefix = len(self.prefix.units)
        if self._scores is None or not self._holds(prompt):
            self.hold_exemplars()
        scores = self._score(prompt, (n_prefix, n_prefix) if n_prefix else None)
        if self._scores is not None:
            scores = self._scores.before(scores)
        nlls = scores.nlls
        if not len(nlls):
            raise PromptError("the prompt has no token to score")
        scored = [at for at, (_, scored) in enumerate(prompt.units) if scored][-len(nlls) :]
        answers = np.pad(self._answers, (0, len(prompt.units) - n_prefix))[scored]
        rows = trio.rows()
        entropy = grid_entropy(**rows, alphas=GRID, betas=GRID, unused=trio.unused)
        decoupled = None if self.fourth is None else scores.decoupled
        continuous = scores.continuous if self._continuous else None
        slopes = scores.slopes if self._sloped else None
        return Reading(prompt.n_tokens(), nlls, answers, entropy, decoupled, continuous, slopes)

    def answer_nll(self, question: Prompt, answer: Sequence[int]) -> Float64:
        """Nats of `answer` (ids) after the exemplars and `question`: float64 [n, n] over AXIS."""
        before = [replace(s, scored=False) for s in (*self.prefix.segments, *question.segments)]
        nats: Float64 = self._score(Prompt((*before, Segment.of(tuple(answer)))), None).nlls.sum(0)
        return nats

    def _holds(self, prompt: Prompt) -> bool:
        """Whether the caches hold the exemplars as they are in `prompt`."""
        return self.trio.n_kept(prompt.units) >= len(self.prefix.units)

    def _score(self, prompt: Prompt, after: tuple[int, int] | None) -> "_Scores":
        parts = [np.empty((0, len(AXIS), len(AXIS)))]
        decoupled = np.zeros((len(GRID), len(AXIS), len(AXIS)))
        continuous = np.zeros((N_CHEBYSHEV, N_CHEBYSHEV))
        slopes = np.zeros(2)

        def consume(window: Window) -> None:
            parts.append(token_nlls(self.trio, window.rows, window.targets, AXIS))
            if self._sloped:
                slopes[...] += _slopes(self.trio, window.rows, window.targets)
            if self._continuous:
                nlls = token_nlls(self.trio, window.rows, window.targets, chebyshev_nodes())
                continuous[...] += nlls.sum(axis=0)
            if self.fourth is not None:
                # The newest target is covered, but no row here has read it.
                four = self.fourth.beside(window.rows, window.mark[1] - 1)
                for at, gamma in enumerate(GRID):
                    three = three_of_four(four, gamma)
                    decoupled[at] += token_nlls(self.trio, three, window.targets, AXIS).sum(axis=0)

        self.trio.prefill(prompt, consume=consume, after=after)
        return _Scores(np.concatenate(parts), decoupled, continuous, slopes)


@dataclass(frozen=True)
class _Scores:
    """Nats of tokens [n_tokens, n, n]; the sums of what else is asked of them, see Reading."""

    nlls: Float64
    decoupled: Float64
    continuous: Float64
    slopes: Float64

    def before(self, later: "_Scores") -> "_Scores":
        nlls = np.concatenate((self.nlls, later.nlls))
        return _Scores(
            nlls,
            self.decoupled + later.decoupled,
            self.continuous + later.continuous,
            self.slopes + later.slopes,
        )


def _slopes(trio: Trio, rows: Rows, targets: NDArray[np.int64]) -> Float64:
    slopes = large_ins_slopes(
        **{role: rows[role] for role in ROLES},
        targets=targets,
        unused=trio.unused,
        n_threads=available_cores(),
    )
    return np.asarray(slopes.sum(axis=0))
