"""Prompt -> Weights, without labels: streams prompts through a Trio into scoring."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.choosing.methods import ENT, PPL, ChosenBy
from trimix_gguf.errors import PromptError, WeightsError
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import METHODS, Mix, Rows, Weights
from trimix_gguf.mixing.scoring import (
    GRID,
    Float64,
    chebyshev_nodes,
    continuous_optimum,
    grid_entropy,
    grid_nll,
    interpolate,
    lowest,
)
from trimix_gguf.trio.prefill import Window
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.sequences import TokenProgress
from trimix_gguf.trio.sums import PrefixSums
from trimix_gguf.trio.trio import Trio

Grid = tuple[Sequence[float], Sequence[float]] | Literal["continuous"]
Average = Literal["micro", "macro"]

SINGLE = {name: METHODS[name].weights for name in ("large_ins", "small_cpt", "small_base")}
PROXY_TUNING = METHODS["proxy-tuning"].weights


@dataclass
class Score:
    """NLL of scored prompts over a grid, in nats; each single model is a point of the same grid.

    `nll` float64 [n_prompts, n_alpha, n_beta] sums over the `n_tokens` [n_prompts] scored tokens.
    """

    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    grid: tuple[tuple[float, ...], tuple[float, ...]]  # the part of it to choose from
    continuous: bool = False
    nll: list[Float64] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)

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

    def best(self, average: Average = "micro") -> Weights:
        """The weights with the lowest perplexity."""
        if self.continuous:
            return continuous_optimum(self.on_grid(average))
        return lowest(self.on_grid(average), *self.grid)

    def perplexity(self, weights: Weights, average: Average = "micro") -> float:
        """exp of the mean nats at a point of the grid, or between its points where continuous."""
        mean = self.mean_nll(average)
        if weights.alpha in self.alphas and weights.beta in self.betas:
            i, j = self.alphas.index(weights.alpha), self.betas.index(weights.beta)
            return math.exp(mean[i, j])
        return math.exp(interpolate(self.on_grid(average), weights))


@dataclass(frozen=True)
class Selection:
    """A mix, how it was chosen, and what the choice rests on."""

    mix: Mix
    method: str
    score: Score | None = None

    @property
    def weights(self) -> Weights:
        """Those of the mix."""
        return self.mix.weights

    def to_json(self) -> dict[str, Any]:
        """The mix, and `method`: what chose it."""
        return {**self.mix.to_json(), "method": self.method}

    def perplexities(self, average: Average = "micro") -> dict[str, float] | None:
        """Each single model's and the mix's perplexity of the prompt, where it was scored."""
        if self.score is None:
            return None
        table = {name: self.score.perplexity(w, average) for name, w in SINGLE.items()}
        return {**table, "fused": self.score.perplexity(self.weights, average)}


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
    threads = available_cores() if n_threads is None else n_threads
    for prompt in [prompts] if isinstance(prompts, Prompt) else prompts:
        nll, n_tokens = _prompt_nll(trio, prompt, result, progress, threads)
        result.nll.append(nll)
        result.n_tokens.append(n_tokens)
    if not result.nll:
        raise PromptError("there is no prompt to score; give some text")
    return result


def empty_score(grid: Grid = (GRID, GRID), also: Sequence[Weights] = ()) -> Score:
    """A Score of no prompt yet, over `grid`, the single models and `also`."""
    chosen = (chebyshev_nodes(),) * 2 if grid == "continuous" else (tuple(grid[0]), tuple(grid[1]))
    # Single models and Proxy Tuning are corners (0|1, 0|1): two more factor rows a side.
    alphas = tuple(dict.fromkeys((*chosen[0], 0.0, 1.0, *(w.alpha for w in also))))
    betas = tuple(dict.fromkeys((*chosen[1], 0.0, 1.0, *(w.beta for w in also))))
    return Score(alphas, betas, chosen, continuous=grid == "continuous")


def window_nll(
    trio: Trio, rows: Rows, targets: NDArray[np.int64], score: Score, n_threads: int
) -> Float64:
    """Summed nats of `targets` [n] after `rows` [n, n_vocab], over the points of `score`."""
    return grid_nll(
        large_ins=rows["large_ins"],
        small_cpt=rows["small_cpt"],
        small_base=rows["small_base"],
        targets=targets,
        alphas=score.alphas,
        betas=score.betas,
        unused=trio.unused,
        n_threads=n_threads,
    )


def _prompt_nll(
    trio: Trio,
    prompt: Prompt,
    score: Score,
    progress: TokenProgress | None,
    n_threads: int,
) -> tuple[Float64, int]:
    """One prompt's summed nats [n_alpha, n_beta] and its scored tokens, in one pass."""
    axes, units = (score.alphas, score.betas), prompt.units
    sums = (trio.sums or PrefixSums()).for_prompt(units, axes, trio.n_kept(units))
    trio.sums = None  # until the caches hold what they are over

    def consume(window: Window) -> None:
        nll = window_nll(trio, window.rows, window.targets, score, n_threads)
        sums.add(window.mark, nll, len(window.targets))

    trio.prefill(prompt, consume=consume, progress=progress, after=sums.newest.mark)
    if sums.newest.n_tokens == 0:
        raise PromptError(
            "the prompt has no token to score: give more text, mark longer spans, or fix --weights"
        )
    trio.sums = sums
    return sums.newest.nll, sums.newest.n_tokens


def select_weights(
    trio: Trio,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: ChosenBy = "ppl",
    grid: Grid = (GRID, GRID),
    average: Average = "macro",
    last: int | None = None,
    progress: TokenProgress | None = None,
) -> Selection:
    """Choose (alpha, beta) for a prompt, or one pair for a task's prompts, without labels.

    `ppl`: the lowest fused perplexity (TriMix-PPL); `average` over several prompts, `macro` as
    published. `ent`: the lowest entropy of the first generated token (TriMix-ENT), averaged.
    `last` scores only that many tokens at the end of each prompt, for slow machines.
    """
    if last is not None and last < 1:
        raise WeightsError(f"the number of last tokens to score is {last}; expected 1 or more")
    listed = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if method == ENT:
        return lowest_entropy(_next_rows(trio, listed, progress), grid, trio.unused)
    if last is not None:
        listed = [p.score_last(last) for p in listed]
    scored = score(trio, listed, grid=grid, progress=progress)
    return Selection(Mix(scored.best(average)), PPL, scored)


def lowest_entropy(rows: Iterable[Rows], grid: Grid, unused: NDArray[np.bool_] | None) -> Selection:
    """TriMix-ENT over the next-token rows [n_vocab] after each of some prompts."""
    if grid == "continuous":
        raise WeightsError("entropy is not convex, so it has no continuous optimum; give a grid")
    total = np.zeros((len(grid[0]), len(grid[1])))
    for one in rows:
        total += grid_entropy(**one, alphas=grid[0], betas=grid[1], unused=unused)
    return Selection(Mix(lowest(total, *grid)), ENT)


def _next_rows(
    trio: Trio, prompts: Sequence[Prompt], progress: TokenProgress | None
) -> Iterator[Rows]:
    for prompt in prompts:
        trio.prefill(prompt)
        yield trio.rows(progress=progress)
