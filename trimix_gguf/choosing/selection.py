"""Prompt -> Weights, without labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.choosing.auto import asks, on_a_leash
from trimix_gguf.choosing.methods import ANSWERS, AUTO, ENT, TOKEN, ChosenBy
from trimix_gguf.choosing.score import Average, Grid, Score, empty_score, score_prompts
from trimix_gguf.choosing.subset import ScoreTokens, check_score_tokens, stride_of
from trimix_gguf.errors import PromptError, WeightsError
from trimix_gguf.mixing.fusion import METHODS, Mix, Rows, Weights
from trimix_gguf.mixing.scoring import GRID, grid_entropy, lowest
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.sequences import TokenProgress
from trimix_gguf.trio.sums import Sum
from trimix_gguf.trio.trio import Trio

SINGLE = {name: METHODS[name].weights for name in ("large_ins", "small_cpt", "small_base")}
PROXY_TUNING = METHODS["proxy-tuning"].weights
TOKEN_KEEP = 0.97  # what a token's evidence is worth one token later, for weights of each token


@dataclass(frozen=True)
class Selection:
    """A mix, how it was chosen, and what the choice rests on.

    `reason` says in words why `auto` chose as it did. `follows` are the nats over the points of
    `score`, newest tokens counting most, where the weights go on to follow the text.
    """

    mix: Mix
    method: str
    score: Score | None = None
    reason: str = ""
    follows: Sum | None = None

    @property
    def weights(self) -> Weights:
        """Those of the mix."""
        return self.mix.weights

    def to_json(self) -> dict[str, Any]:
        """The mix, `method`: what chose it, and the `reason` if there is one."""
        reason = {"reason": self.reason} if self.reason else {}
        return {**self.mix.to_json(), "method": self.method, **reason}

    def perplexities(self, average: Average = "micro") -> dict[str, float] | None:
        """Each single model's and the mix's perplexity of the prompt, where it was scored."""
        if self.score is None or self.follows is not None:
            return None
        table = {name: self.score.perplexity(w, average) for name, w in SINGLE.items()}
        return {**table, "fused": self.score.perplexity(self.weights, average)}


class ChoosingOptions(TypedDict, total=False):
    """How weights are chosen by prompts; select_weights says what these are."""

    method: ChosenBy
    grid: Grid
    last: int | None
    score_tokens: ScoreTokens


class Chooser:
    """How a method finds the weights of some prompts: what is read for it, and what it decides.

    `selection` is set where nothing need be read. Otherwise `score`, if any, takes in the scored
    tokens of `prompts`; then decide() has the choice. Raises WeightsError, PromptError.
    """

    def __init__(
        self,
        trio: Trio,
        prompts: Sequence[Prompt],
        *,
        method: ChosenBy = AUTO,
        grid: Grid = (GRID, GRID),
        last: int | None = None,
        score_tokens: ScoreTokens = "auto",
        with_choices: bool = False,
    ) -> None:
        check_method(method)
        check_last(last)
        check_score_tokens(score_tokens)
        self.prompts = prompts if last is None else [p.score_last(last) for p in prompts]
        self.selection: Selection | None = None
        self.score: Score | None = None
        self._trio, self._method, self._grid = trio, method, grid
        self._leashed, self._reason = False, "a text that goes on; lowest perplexity"
        if method == ANSWERS and not any(p.is_marked for p in prompts):
            raise WeightsError(
                f"{ANSWERS} needs the exemplars' answers: mark them (--spans), or give a task file"
            )
        if method == AUTO and any(asks(p, trio.text) for p in prompts):
            self._for_questions(with_choices)
        if self.selection is None and method != ENT:
            keep = TOKEN_KEEP if method == TOKEN else 1.0
            if method == TOKEN or (score_tokens == "auto" and method != AUTO):
                score_tokens = "all"
            n_tokens = max((sum(scored for _, scored in p.units) for p in self.prompts), default=0)
            stride = stride_of(score_tokens, n_tokens, leashed=self._leashed)
            if self._leashed:  # alpha stays 1
                grid = ((1.0,), GRID if grid == "continuous" else grid[1])
            self.score = empty_score(grid, sloped=self._leashed, keep=keep, stride=stride)

    def _for_questions(self, with_choices: bool) -> None:
        """What a measurement of such questions says; without one, the choice is on a leash."""
        tuning = self._trio.tuning
        found = None if tuning is None else tuning.of(with_choices=with_choices)
        if found is None:
            self._leashed = True
        elif found.weights is None:
            self._reason = f"a question; {found.verdict}"
        else:
            self.selection = Selection(Mix(found.weights), AUTO, reason=found.verdict)

    def decide(self, rows: Iterable[Rows], average: Average = "macro") -> Selection:
        """The choice, once the prompts are read; `rows` [n_vocab] are those after each."""
        if self.selection is not None:
            return self.selection
        if self.score is None:
            return lowest_entropy(rows, self._grid, self._trio.unused)
        scored = self.score
        if self._leashed:
            nll, slopes = np.sum(scored.nll, axis=0), np.sum(scored.slopes, axis=0)
            weights = on_a_leash(nll, slopes, scored.alphas, scored.betas)
            return Selection(Mix(weights), AUTO, scored, "a question; close to large_ins")
        if self._method == AUTO:
            weights = scored.best(average, corners=True)
            return Selection(Mix(weights), AUTO, scored, self._reason)
        follows = None
        if self._method == TOKEN:
            follows = Sum((0, 0), scored.nll[-1], scored.n_tokens[-1], scored.slopes[-1])
        return Selection(Mix(scored.best(average)), self._method, scored, follows=follows)


def select_weights(
    trio: Trio,
    prompts: Prompt | Sequence[Prompt],
    *,
    average: Average = "macro",
    with_choices: bool = False,
    progress: TokenProgress | None = None,
    **choosing: Unpack[ChoosingOptions],
) -> Selection:
    """Choose (alpha, beta) for a prompt, or one pair for a task's prompts, without labels.

    `auto`: lowest perplexity for text that goes on, what `trimix tune` measured for questions
    (auto.py); `with_choices` says that a question's answer is one of some that are given.
    `ppl`: the lowest fused perplexity (TriMix-PPL); `average` over several prompts, `macro` as
    published. `ent`: the lowest entropy of the first generated token (TriMix-ENT), averaged.
    `ppl-answers`: the lowest perplexity of the marked answers. `token`: chosen again for each
    token. `last` scores only that many tokens at the end of each prompt. `score_tokens` scores
    about that many, spread over it; "auto" enough of them for `auto`, and all for other methods.
    """
    listed = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if not listed:
        raise PromptError("there is no prompt to choose weights by; give some text")
    chooser = Chooser(trio, listed, with_choices=with_choices, **choosing)
    if chooser.score is not None:
        score_prompts(trio, chooser.prompts, chooser.score, progress=progress)
    elif chooser.selection is not None:
        trio.prefill(listed[-1])
    return chooser.decide(_next_rows(trio, listed, progress), average)


def check_method(name: str) -> None:
    """Raises WeightsError for a name that does not choose by a prompt, and lists those that do."""
    if name not in (known := get_args(ChosenBy)):
        raise WeightsError(f"method {name!r} does not choose by a prompt; {', '.join(known)} do")


def check_last(n: int | None) -> None:
    """Raises WeightsError where a number of last tokens to score is below 1."""
    if n is not None and n < 1:
        raise WeightsError(f"the number of last tokens to score is {n}; expected 1 or more")


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
