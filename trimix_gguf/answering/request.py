"""A request among many: which units of its prompt are read next, and what the rows then say.

It is served in up to three stages: its prompt is scored, unless its weights are fixed; read again
for its tokens' own probabilities, if it wants them; and answered, token after token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.answering.generation import AnswerText
from trimix_gguf.choosing.methods import ENT, PPL, ChosenBy
from trimix_gguf.choosing.selection import Grid, Selection, empty_score, lowest_entropy, window_nll
from trimix_gguf.errors import PromptError, TrimixError
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import Mix, Rows, probability
from trimix_gguf.mixing.sampling import Sampler
from trimix_gguf.mixing.scoring import GRID
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prefill import Prefill, is_scored
from trimix_gguf.trio.prompt import Prompt, Unit, is_shared
from trimix_gguf.trio.sums import PrefixSums
from trimix_gguf.trio.trio import Trio


@dataclass(frozen=True)
class Request:
    """What to answer and how; names and defaults are those of generation.stream_generate.

    Without a `mix`, `method` chooses the weights from the prompt.
    `n_top` asks for the log-probability of each token under the mix, and of that many likeliest
    ones; with `echo` for those of the prompt too. `trace` asks what each model that the mix reads
    made of each token. `sampling` goes to Sampler.
    """

    prompt: Prompt
    mix: Mix | None = None
    method: ChosenBy = "ppl"
    grid: Grid = (GRID, GRID)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n_top: int | None = None
    echo: bool = False
    trace: bool = False


@dataclass(frozen=True)
class Token:
    """A token and what was asked about it; log-probabilities are natural, before temperature.

    `logprob` is None where nothing predicts it; `top` are (id, logprob), likeliest first;
    `probabilities` by role and 'fused', where a trace was asked for.
    """

    id: int
    piece: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """A piece of an answer. The first has the selection and the prompt's tokens, if wanted.

    `finish_reason` is None until the last: 'stop', 'length', 'context' or 'cancelled'. Where
    `error` is set there will be no more. `n_cached` of the prompt's tokens were not read anew.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    selection: Selection | None = None
    prompt_tokens: tuple[Token, ...] = ()
    n_prompt: int = 0
    n_cached: int = 0
    n_tokens: int = 0
    finish_reason: str | None = None
    error: TrimixError | None = None


class Work:
    """The state of a request: where it stands in its prompt, or in its answer.

    `prefill` says where it stands in its prompt; `newest` is the token picked last, which is to
    be read next. Raises PromptError for a prompt that fits no context, SamplerError for a setting
    that llama.cpp refuses.
    """

    def __init__(self, trio: Trio, request: Request, on_event: Callable[[Event], None]) -> None:
        self.trio, self.request, self._on_event = trio, request, on_event
        self.stage: Literal["score", "echo", "read", "answer"] = "read"
        if request.mix is None and request.method == PPL:
            self.stage = "score"
        elif request.echo and request.mix is not None:
            self.stage = "echo"
        self.prefill = Prefill(request.prompt, predicts=_PREDICTED[self.stage])
        room = _room(trio, self.prefill)
        n_prompt = {role: ends[-1] for role, ends in self.prefill.ends.items()}
        self.n_cells = {r: n_prompt[r] + min(room, request.max_tokens) for r in ROLES}
        self._sampler = Sampler(
            trio.models["large_ins"].vocab,
            trio.n_vocab,
            **{"stop_ids": tuple(trio.end_of_generation), **request.sampling},
        )
        for segment in request.prompt.segments:
            self._sampler.read_prompt(segment.ids["large_ins"])
        self._answer = AnswerText(
            trio, self._sampler, stop=request.stop, max_tokens=request.max_tokens, room=room
        )
        self.n_cached = self.newest = 0
        self.selection = None if request.mix is None else Selection(request.mix, "fixed")
        self._score = empty_score(request.grid)
        self._sums = PrefixSums((self._score.alphas, self._score.betas))
        self._prompt_tokens: list[Token] = []
        self._told = False

    @property
    def sums(self) -> PrefixSums:
        """What it has read so far, and the sums over it."""
        return replace(self._sums, units=self.prefill.units[: self.prefill.at])

    @property
    def roles(self) -> tuple[str, ...]:
        """Models that it reads now."""
        return ROLES if self.selection is None else self.selection.mix.roles

    @property
    def finish_reason(self) -> str | None:
        """Why its answer ended; None before."""
        return self._answer.finish_reason if self.stage == "answer" else None

    @property
    def n_tokens(self) -> int:
        """Tokens of its answer so far."""
        return self._answer.n_tokens

    # -- reading ----------------------------------------------------------------------------

    def start(self, n_kept: int, known: PrefixSums) -> None:
        """Begin where the first `n_kept` units are read already; `known` are the sums over them."""
        if self.stage == "score":
            self._sums = known.for_prompt(self.prefill.units, self._sums.axes, n_kept)
        # The last unit's row is wanted, so it is read again; an echo wants all rows.
        most = 0 if self.stage == "echo" else min(n_kept, len(self.prefill.units) - 1)
        self.prefill.start(most, self._sums.newest.mark[1])
        self.n_cached = self.prefill.lengths()["large_ins"]

    def read(self, end: int, rows: Rows) -> None:
        """Take in the rows [n_wanted, n_vocab] of the units up to `end`; raises TrimixError."""
        window = self.prefill.take(end, rows)
        if self.stage == "score" and len(window.targets):
            nll = window_nll(self.trio, window.rows, window.targets, self._score, available_cores())
            self._sums.add(window.mark, nll, len(window.targets))
        elif self.stage == "echo":
            self._echo(window.rows, window.targets)
        if end == len(self.prefill.units):
            self._decide({role: matrix[-1] for role, matrix in rows.items()})

    def _echo(self, before: Rows, targets: NDArray[np.int64]) -> None:
        first, _ = self.prefill.units[0]
        if not self._prompt_tokens and is_shared(first):
            self._prompt_tokens.append(self._token(first[0][0]))
        for i, target in enumerate(targets):
            rows = {role: matrix[i] for role, matrix in before.items()}
            self._prompt_tokens.append(self._token(int(target), self._fused(rows), rows))

    def _decide(self, rows: Rows) -> None:
        """The prompt is read to its end, whose rows [n_vocab] these are."""
        if self.selection is None:
            self.selection = self._select(rows)
            if self.request.echo:
                self.stage = "echo"
                self.prefill = Prefill(self.request.prompt, predicts=_PREDICTED["echo"])
                return
        self.stage = "answer"
        if self.finish_reason is not None:  # no token was asked for
            self._tell(Event(finish_reason=self.finish_reason))
        else:
            self.answer(rows)

    def _select(self, rows: Rows) -> Selection:
        grid = self.request.grid
        if self.request.method == ENT:
            return lowest_entropy([rows], grid, self.trio.unused)
        if not self._sums.sums:
            raise PromptError("the prompt has no token to score: give more text, or fix weights")
        self._score.nll.append(self._sums.newest.nll)
        self._score.n_tokens.append(self._sums.newest.n_tokens)
        return Selection(Mix(self._score.best()), PPL, self._score)

    # -- answering --------------------------------------------------------------------------

    def answer(self, rows: Rows) -> None:
        """Pick the next token after rows [n_vocab], and tell of it. Raises SamplerError."""
        fused = self._fused(rows)
        self.newest = self._sampler.sample(fused)
        ended = self.newest in self.trio.end_of_generation
        tokens = () if ended else (self._token(self.newest, fused, rows),)
        text = self._answer.take(self.newest)
        self._tell(Event(text, tokens, finish_reason=self.finish_reason))

    def cancel(self) -> None:
        """Say that it ends before its time."""
        self._tell(Event(finish_reason="cancelled"))

    def fail(self, error: TrimixError) -> None:
        """Say that it cannot be answered."""
        self._tell(Event(error=error))

    def _fused(self, rows: Rows) -> NDArray[np.float32]:
        assert self.selection is not None  # set before the first token
        return self.selection.mix.fuse(rows, self.trio.unused)

    def _token(
        self, token: int, fused: NDArray[np.float32] | None = None, rows: Rows | None = None
    ) -> Token:
        piece = self.trio.models["large_ins"].piece(token)
        if fused is None or rows is None:
            return Token(token, piece)
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self.request.n_top is not None:
            logprob, top = _logprobs(fused, token, self.request.n_top)
        traced = {**rows, "fused": fused} if self.request.trace else {}
        probabilities = {name: probability(row, token) for name, row in traced.items()}
        return Token(token, piece, logprob, top, probabilities)

    def _tell(self, event: Event) -> None:
        event = replace(
            event,
            n_prompt=self.prefill.ends["large_ins"][-1],
            n_cached=self.n_cached,
            n_tokens=self.n_tokens,
        )
        if not self._told:
            echoed = tuple(self._prompt_tokens)
            event = replace(event, selection=self.selection, prompt_tokens=echoed)
        self._told = True
        self._on_event(event)


# What a stage wants predicted: the scored tokens, or all that the models share.
_PREDICTED: dict[str, Callable[[Unit], bool]] = {
    "score": is_scored,
    "echo": lambda unit: is_shared(unit[0]),
    "read": lambda unit: False,
}


def _room(trio: Trio, prefill: Prefill) -> int:
    """Tokens that every role can take after the prompt; raises PromptError."""
    prefill.check_fits({role: model.n_ctx for role, model in trio.models.items()})
    if not all(ends[-1] for ends in prefill.ends.values()):
        raise PromptError("the prompt is empty for one of the models; give some text")
    return min(model.n_ctx - prefill.ends[role][-1] for role, model in trio.models.items())


def _logprobs(
    fused: NDArray[np.float32], token: int, n_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of `token` in one row [n_vocab], and the `n_top` likeliest (id, its own)."""
    row = fused.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    likeliest = np.argpartition(row, -n_top)[-n_top:] if n_top else np.empty(0, dtype=int)
    top = sorted(((int(i), float(row[i])) for i in likeliest), key=lambda pair: -pair[1])
    return float(row[token]), tuple(top)
