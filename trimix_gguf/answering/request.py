"""What is asked of a trio, and what comes of it: one Request, and its Events."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Unpack

from trimix_gguf.choosing.methods import ChosenBy
from trimix_gguf.choosing.score import Grid
from trimix_gguf.choosing.selection import ChoosingOptions, Selection, check_last
from trimix_gguf.choosing.subset import ScoreTokens, check_score_tokens
from trimix_gguf.errors import TrimixError
from trimix_gguf.mixing.fusion import Mix, Weights, check_threshold
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.mixing.scoring import GRID
from trimix_gguf.trio.prompt import Prompt

FinishReason = Literal["stop", "length", "context", "cancelled"]


class Options(ChoosingOptions, total=False):
    """Keyword arguments that make a Request: its own fields, and those of its Sampling.

    The latter replace those of a `sampling` that is given too.
    """

    weights: Weights | Mix | Selection | None
    plausibility_threshold: float | None
    max_tokens: int
    stop: Sequence[str]
    sampling: Sampling
    n_top: int | None
    echo: bool
    trace: Literal["mix", "all"] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_last_n: int
    xtc_probability: float
    xtc_threshold: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    seed: int | None
    grammar: str | None
    json_schema: str | Mapping[str, object] | None
    logit_bias: Mapping[int, float] | None


@dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it.

    `weights` fixes (alpha, beta), fixes a whole Mix, or holds an earlier choice. Without it
    `method` (choosing/methods.py) chooses them from the prompt over `grid`; where it scores, its
    `last` tokens or all of it, and of those as many as `score_tokens` says. A
    `plausibility_threshold` replaces that of the mix. It ends after `max_tokens`, before a `stop`
    string (or the first of several), at an end-of-generation token of any model, or where the
    context is full.

    `n_top` asks for the log-probability of each token under the mix, and of that many likeliest
    ones; with `echo`, also for those of the prompt. `trace` asks for each token's probability under
    the models that the mix reads ('mix') or under all three ('all').

    Raises WeightsError where the threshold, `last` or `score_tokens` is out of range.
    """

    prompt: Prompt | str
    weights: Weights | Mix | Selection | None = None
    method: ChosenBy = "auto"
    grid: Grid = (GRID, GRID)
    last: int | None = None
    score_tokens: ScoreTokens = "auto"
    plausibility_threshold: float | None = None
    max_tokens: int = 128
    stop: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)
    n_top: int | None = None
    echo: bool = False
    trace: Literal["mix", "all"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # else each of its characters would be one
            object.__setattr__(self, "stop", (self.stop,))
        check_last(self.last)
        check_score_tokens(self.score_tokens)
        if self.plausibility_threshold is not None:
            check_threshold(self.plausibility_threshold)

    @classmethod
    def of(cls, prompt: "Request | Prompt | str", **options: Unpack[Options]) -> "Request":
        """A request for `prompt`; or a given one, with these options in place of its own."""
        base = prompt if isinstance(prompt, Request) else cls(prompt)
        own: dict[str, Any] = {**options}
        names = [f.name for f in fields(Sampling) if f.name in own]
        given = own.pop("sampling", base.sampling)
        sampling = replace(given, **{name: own.pop(name) for name in names})
        return replace(base, sampling=sampling, **own)

    @property
    def choosing(self) -> ChoosingOptions:
        """How the prompt is to choose the weights."""
        return ChoosingOptions(
            method=self.method, grid=self.grid, last=self.last, score_tokens=self.score_tokens
        )

    @property
    def fixed(self) -> Selection | None:
        """The mix that is given; None where the prompt is to choose it."""
        if self.weights is None:
            return None
        if isinstance(self.weights, Selection):
            return self.masked(self.weights)
        return self.masked(Selection(Mix.of(self.weights), "fixed"))

    def masked(self, selection: Selection) -> Selection:
        """A choice of weights, with this request's plausibility threshold if it has one."""
        if self.plausibility_threshold is None:
            return selection
        mix = replace(selection.mix, plausibility_threshold=self.plausibility_threshold)
        return replace(selection, mix=mix)


@dataclass(frozen=True)
class Token:
    """A token and what was asked about it; log-probabilities are natural, before temperature.

    `logprob` is None where nothing predicts it; `top` are (id, logprob), likeliest first;
    `probabilities` by role and 'fused', and the `mix` that it was picked from, where a trace was
    asked for.
    """

    id: int
    piece: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    probabilities: Mapping[str, float] = field(default_factory=dict)
    from_draft: bool = False
    mix: Mix | None = None


@dataclass(frozen=True)
class Event:
    """A piece of an answer; counts and speed are those up to this piece.

    `tokens` are those that gave `text`; `end` is the end-of-generation token, where one came.
    The first event has the `prompt_tokens`, if they were asked for. `finish_reason` is None until
    the last: 'stop', 'length', 'context' or 'cancelled'; `stopped` is the stop string that came, or
    None. An `error` is the last event too.
    `n_prompt` tokens of large_ins are the prompt, and `n_cached` of these were not read again.
    `speed` has times in seconds and tokens per second. `guard` is the number of tokens after which
    the mix had fallen into a loop and large_ins went on by itself (steering.Guard), or None.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    end: Token | None = None
    selection: Selection | None = None
    prompt_tokens: tuple[Token, ...] = ()
    seed: int = 0
    n_prompt: int = 0
    n_cached: int = 0
    n_tokens: int = 0
    finish_reason: FinishReason | None = None
    stopped: str | None = None
    speed: Mapping[str, float] = field(default_factory=dict)
    guard: int | None = None
    error: TrimixError | None = None


def join_events(events: Iterable[Event]) -> Event:
    """All events of an answer as one: the last, with the text and the tokens of all."""
    listed = list(events)
    return replace(
        listed[-1],
        text="".join(event.text for event in listed),
        tokens=tuple(token for event in listed for token in event.tokens),
        prompt_tokens=listed[0].prompt_tokens,
    )
