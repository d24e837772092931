"""Scoring: prompts streamed through a Trio into their NLL over a grid of mixes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trimix_gguf.choosing.subset import stand_for
from trimix_gguf.errors import PromptError, WeightsError
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import (
    CONTINUOUS_RANGE,
    GRID,
    Float64,
    chebyshev_nodes,
    continuous_optimum,
    grid_token_nlls,
    interpolate,
    large_ins_slopes,
    lowest,
    perplexity_of,
)
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prefill import Window
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.sequences import TokenProgress
from trimix_gguf.trio.sums import Points, PrefixSums, Sum
from trimix_gguf.trio.trio import Trio

Grid = tuple[Sequence[float], Sequence[float]] | Literal["continuous"]
Average = Literal["micro", "macro"]


@dataclass
class Score:
    """NLL of scored prompts over a grid, in nats; each single model is a point of the same grid.

    `nll` float64 [n_prompts, n_alpha, n_beta] sums over the `n_tokens` [n_prompts] scored tokens,
    and so do `slopes` [n_prompts, 2] (scoring.large_ins_slopes), at and of `points`.
    """

    points: Points
    grid: tuple[tuple[float, ...], tuple[float, ...]]  # the part of it to choose from
    continuous: bool = False
    nll: list[Float64] = field(default_factory=list)
    slopes: list[Float64] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)

    @property
    def alphas(self) -> tuple[float, ...]:
        """All of them, 0 and 1 included."""
        return self.points.alphas

    @property
    def is_estimate(self) -> bool:
        """Whether only some tokens of a prompt were scored."""
        counts = stand_for(max(self.n_tokens, default=0), self.points.stride)
        return bool((counts != 1).any())

    @property
    def betas(self) -> tuple[float, ...]:
        """All of them, 0 and 1 included."""
        return self.points.betas

    def add(self, scored: Sum) -> None:
        """Take in a prompt's sum. Raises PromptError where it has no scored token."""
        if scored.n_tokens == 0:
            raise PromptError(
                "the prompt has no token to score: give more text, mark longer spans, or fix the "
                "weights"
            )
        self.nll.append(scored.nll)
        self.slopes.append(scored.slopes)
        self.n_tokens.append(scored.n_tokens)

    def mean_nll(self, average: Average = "micro") -> Float64:
        """[n_alpha, n_beta]: nats a token over all (micro), or mean over prompts of it (macro)."""
        nll, n = np.stack(self.nll), np.asarray(self.n_tokens, dtype=float)
        if average == "micro":
            return np.asarray(nll.sum(0) / n.sum())
        return np.asarray((nll / n[:, None, None]).mean(0))

    def on_grid(self, average: Average = "micro") -> Float64:
        """mean_nll at the points to choose from alone."""
        rows = [self.alphas.index(a) for a in self.grid[0]]
        columns = [self.betas.index(b) for b in self.grid[1]]
        return self.mean_nll(average)[np.ix_(rows, columns)]

    def surface(self, *, corners: bool) -> tuple[Sequence[float], Sequence[float], Float64]:
        """Alphas, betas and mean_nll of the points to choose from; with `corners` 0 and 1 too."""
        if not corners or self.continuous:
            return *self.grid, self.on_grid()
        alphas, betas = sorted(self.alphas), sorted(self.betas)
        rows, columns = map(self.alphas.index, alphas), map(self.betas.index, betas)
        return alphas, betas, self.mean_nll()[np.ix_(list(rows), list(columns))]

    def best(self, average: Average = "micro", *, corners: bool = False) -> Weights:
        """The weights with the lowest perplexity; with `corners` each single model is one of them.

        The continuous range holds them anyway.
        """
        if self.continuous:
            return continuous_optimum(self.on_grid(average))
        if corners:
            return lowest(self.mean_nll(average), self.alphas, self.betas)
        return lowest(self.on_grid(average), *self.grid)

    def perplexity(self, weights: Weights, average: Average = "micro") -> float:
        """exp of the mean nats at a point of the grid, or between its points where continuous.

        Raises WeightsError elsewhere: what was not scored is not known there.
        """
        mean = self.mean_nll(average)
        if weights.alpha in self.alphas and weights.beta in self.betas:
            i, j = self.alphas.index(weights.alpha), self.betas.index(weights.beta)
            return perplexity_of(mean[i, j])
        low, high = CONTINUOUS_RANGE
        inside = all(low <= w <= high for w in (weights.alpha, weights.beta))
        if not (self.continuous and inside):
            raise WeightsError(
                f"alpha {weights.alpha:g}, beta {weights.beta:g} were not scored; name them to "
                "score() (also=), or take a point of the grid"
            )
        return perplexity_of(interpolate(self.on_grid(average), weights))


def score(
    trio: Trio,
    prompts: Prompt | Sequence[Prompt],
    *,
    grid: Grid = (GRID, GRID),
    also: Sequence[Weights] = (),
    progress: TokenProgress | None = None,
    n_threads: int | None = None,
) -> Score:
    """Perplexity of each prompt under every mix of `grid`, of the single models and of `also`.

    One pass a prompt and no stored logits; afterwards the caches hold the last prompt. Raises
    PromptError where a prompt has no token that another one predicts.
    """
    result = empty_score(grid, also)
    score_prompts(trio, prompts, result, progress=progress, n_threads=n_threads)
    return result


def score_prompts(
    trio: Trio,
    prompts: Prompt | Sequence[Prompt],
    result: Score,
    *,
    progress: TokenProgress | None = None,
    n_threads: int | None = None,
) -> None:
    """Add prompts to `result`; see score()."""
    threads = available_cores() if n_threads is None else n_threads
    for prompt in [prompts] if isinstance(prompts, Prompt) else prompts:
        result.add(_prompt_sum(trio, prompt, result, progress, threads))
    if not result.nll:
        raise PromptError("there is no prompt to score; give some text")


def empty_score(
    grid: Grid = (GRID, GRID),
    also: Sequence[Weights] = (),
    *,
    sloped: bool = False,
    keep: float = 1.0,
    stride: int = 1,
) -> Score:
    """A Score of no prompt yet, over `grid`, the single models and `also`."""
    chosen = (chebyshev_nodes(),) * 2 if grid == "continuous" else (tuple(grid[0]), tuple(grid[1]))
    # Single models and Proxy Tuning are corners (0|1, 0|1): two more factor rows a side.
    alphas = tuple(dict.fromkeys((*chosen[0], 0.0, 1.0, *(w.alpha for w in also))))
    betas = tuple(dict.fromkeys((*chosen[1], 0.0, 1.0, *(w.beta for w in also))))
    points = Points(alphas, betas, sloped, keep, stride)
    return Score(points, chosen, continuous=grid == "continuous")


def add_window(sums: PrefixSums, trio: Trio, window: Window, n_threads: int) -> None:
    """Add to `sums` what the rows of a window say of their targets."""
    points = sums.points
    rows: dict[str, Any] = {role: window.rows[role] for role in ROLES}
    rows |= {"targets": window.targets, "unused": trio.unused, "n_threads": n_threads}
    nlls = grid_token_nlls(**rows, alphas=points.alphas, betas=points.betas)
    slopes = large_ins_slopes(**rows) if points.sloped else np.zeros((len(nlls), 2))
    start = 0
    for end, mark in window.marks:
        part, counts = nlls[start:end], window.stand_for[start:end]
        if points.keep < 1.0:
            ages = np.arange(end - start)[::-1]
            part = part * (points.keep**ages)[:, None, None]
        total = np.tensordot(counts, part, 1)
        sums.add(mark, total, int(counts.sum()), counts @ slopes[start:end])
        start = end


def _prompt_sum(
    trio: Trio, prompt: Prompt, score: Score, progress: TokenProgress | None, n_threads: int
) -> Sum:
    """What one prompt comes to, in one pass."""
    units = prompt.units
    sums = (trio.sums or PrefixSums()).for_prompt(units, score.points, trio.n_kept(units))
    trio.sums = None  # until the caches hold what they are over
    trio.prefill(
        prompt,
        consume=lambda window: add_window(sums, trio, window, n_threads),
        progress=progress,
        after=sums.newest.mark,
        stand_for=lambda n: stand_for(n, sums.points.stride),
    )
    trio.sums = sums
    return sums.newest
