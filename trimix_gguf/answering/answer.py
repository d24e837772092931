"""One answer as its tokens come: what both engines do for a Request, whoever reads for them."""

import codecs
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.answering.request import Event, FinishReason, Request, Token
from trimix_gguf.answering.steering import Guard, Steering, steering_of
from trimix_gguf.choosing.selection import Chooser, Selection
from trimix_gguf.errors import PromptError, TrimixError
from trimix_gguf.mixing.fusion import Rows, probability
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.prefill import Prefill, Window
from trimix_gguf.trio.prompt import Prompt, is_shared
from trimix_gguf.trio.trio import Trio


class Answer:
    """The answer to a request: its mix, its sampler, its text so far, and why it ends.

    The engine sets `selection`, unless the request has it, and notes `n_cached` and `speed`. Times
    run from here. Raises PromptError for a prompt that does not fit, SamplerError for a setting
    that llama.cpp refuses.
    """

    def __init__(self, trio: Trio, request: Request) -> None:
        self._started = time.perf_counter()
        self.trio, self.request = trio, request
        prompt = request.prompt
        self.prompt = trio.prompt(prompt) if isinstance(prompt, str) else prompt
        self.n_prompt = {role: self.prompt.n_tokens(role) for role in ROLES}
        self.room = _room(trio, self.prompt, self.n_prompt)
        self.sampler = new_sampler(trio, self.prompt, request.sampling)
        self.selection: Selection | None = None
        self._steering: Steering | None = None
        if request.fixed is not None:
            self.select(request.fixed)
        self.n_tokens = self.n_cached = 0
        self.finish_reason: FinishReason | None = "length" if request.max_tokens <= 0 else None
        self.speed: dict[str, float] = {}
        self._text = TextStream(request.stop)
        self._prompt_tokens: list[Token] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self._started

    def choose(self) -> Chooser | None:
        """What is to choose its weights; None where they are given."""
        if self.selection is not None:
            return None
        return Chooser(self.trio, [self.prompt], **self.request.choosing)

    def select(self, selection: Selection) -> None:
        """Take a choice of weights, masked as the request wants it."""
        self.selection = self.request.masked(selection)
        self._steering = steering_of(self.selection, self.trio.unused)

    @property
    def steering(self) -> Steering:
        """What its next token is picked from, once weights are selected."""
        assert self._steering is not None
        return self._steering

    @property
    def roles(self) -> tuple[Role, ...]:
        """Models that read for it; all, while its mix is not selected."""
        if self._steering is None:
            return ROLES
        return tuple(r for r in ROLES if r in {*self.traced, *self._steering.roles})

    @property
    def traced(self) -> tuple[Role, ...]:
        """Models that read each token for it even where its mix does not."""
        if self.request.trace is None:
            return ()
        return ROLES if self.request.trace == "all" else self.consults

    @property
    def consults(self) -> tuple[Role, ...]:
        """Models that may have to read for it later."""
        return () if self._steering is None else self._steering.consults

    def fuse(self, rows: Rows) -> NDArray[np.float32]:
        """The mix of the models' rows."""
        return self.steering.mix.fuse(rows, self.trio.unused)

    def echo(self, window: Window) -> None:
        """Keep the prompt's tokens that a window predicts, with what was asked about them."""
        first, _ = self.prompt.units[0]
        if not self._prompt_tokens and is_shared(first):
            self._prompt_tokens.append(Token(first[0][0], self._piece(first[0][0])))
        for i, target in enumerate(window.targets):
            rows = {role: matrix[i] for role, matrix in window.rows.items()}
            self._prompt_tokens.append(self._token(int(target), self.fuse(rows), rows))

    def take(
        self, token: int, fused: NDArray[np.float32], rows: Rows, *, from_draft: bool = False
    ) -> Event:
        """The event of one more token, picked from these rows [n_vocab]; the sampler accepts it."""
        elapsed = self.elapsed
        self.speed.setdefault("ttft_s", elapsed)
        if self.n_tokens > 0:
            self.speed["decode_tps"] = self.n_tokens / (elapsed - self.speed["ttft_s"])
        told = self._token(token, fused, rows, from_draft)
        self.steering.take(token, rows)
        if token in self.trio.end_of_generation:
            self.finish_reason = "stop"
            return self.event(self._text.flush(), end=told)
        self.sampler.accept(token)
        self.n_tokens += 1
        text = self._text.push(told.piece)
        if self._text.stopped is not None:
            self.finish_reason = "stop"
        elif self.n_tokens >= self.request.max_tokens:
            self.finish_reason = "length"
        elif self.n_tokens > self.room:
            self.finish_reason = "context"
        if self.finish_reason is not None:
            text += self._text.flush()
        return self.event(text, (told,))

    def cancel(self) -> Event:
        """The event of an end before its time."""
        self.finish_reason = "cancelled"
        return self.event()

    def event(
        self,
        text: str = "",
        tokens: tuple[Token, ...] = (),
        *,
        end: Token | None = None,
        error: TrimixError | None = None,
    ) -> Event:
        """An event with all that is known by now."""
        prompt_tokens, self._prompt_tokens = tuple(self._prompt_tokens), []  # told once
        return Event(
            text,
            tokens,
            end,
            selection=self.selection,
            prompt_tokens=prompt_tokens,
            seed=self.sampler.seed,
            n_prompt=self.n_prompt["large_ins"],
            n_cached=self.n_cached,
            n_tokens=self.n_tokens,
            finish_reason=None if error else self.finish_reason,
            stopped=self._text.stopped,
            speed=dict(self.speed),
            guard=self._steering.stepped_in if isinstance(self._steering, Guard) else None,
            error=error,
        )

    def _piece(self, token: int) -> bytes:
        return self.trio.models["large_ins"].piece(token)

    def _token(
        self, token: int, fused: NDArray[np.float32], rows: Rows, from_draft: bool = False
    ) -> Token:
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self.request.n_top is not None:
            logprob, top = _logprobs(fused, token, self.request.n_top)
        probabilities: dict[str, float] = {}
        if self.request.trace is not None:
            read = [role for role in self.roles if role in rows]
            probabilities = {role: probability(rows[role], token) for role in read}
            probabilities["fused"] = probability(fused, token)
        mix = self.steering.mix if probabilities else None
        return Token(token, self._piece(token), logprob, top, probabilities, from_draft, mix)


class TextStream:
    """Bytes of tokens -> whole characters, holding back what may become a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = [s for s in stop if s]
        self._held = ""
        self.stopped: str | None = None  # the stop string that came

    def push(self, piece: bytes) -> str:
        """The text that is certain after one more token."""
        self._held += self._decoder.decode(piece)
        found = [(at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            at, self.stopped = min(found, key=lambda pair: pair[0])
            ready, self._held = self._held[:at], ""
            return ready
        keep = max((overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        if self.stopped is not None:
            return ""
        return self._held + self._decoder.decode(b"", final=True)


def new_sampler(trio: Trio, prompt: Prompt, sampling: Sampling) -> Sampler:
    """A sampler of a trio's tokens that has read the prompt, for its penalties."""
    vocab, end_ids = trio.models["large_ins"].vocab, tuple(trio.end_of_generation)
    tree = lambda: trio.token_tree  # noqa: E731
    sampler = Sampler(vocab, trio.n_vocab, sampling, stop_ids=end_ids, tree=tree)
    for segment in prompt.segments:
        sampler.read_prompt(segment.ids["large_ins"])
    return sampler


def _room(trio: Trio, prompt: Prompt, n_prompt: dict[Role, int]) -> int:
    """Tokens that every role can take after the prompt; raises PromptError."""
    n_ctx = {role: model.n_ctx for role, model in trio.models.items()}
    Prefill(prompt).check_fits(n_ctx, trio.n_vocab)
    if not all(n_prompt.values()):
        raise PromptError("the prompt is empty for one of the models; give some text")
    return min(model.n_ctx - n_prompt[role] for role, model in trio.models.items())


def overlap(text: str, stop: str) -> int:
    """Longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def _logprobs(
    fused: NDArray[np.float32], token: int, n_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of `token` in one row [n_vocab], and the `n_top` likeliest (id, its own)."""
    row = fused.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    n_top = min(n_top, len(row))
    likeliest = np.argpartition(row, -n_top)[-n_top:] if n_top else np.empty(0, dtype=int)
    top = sorted(((int(i), float(row[i])) for i in likeliest), key=lambda pair: -pair[1])
    return float(row[token]), tuple(top)
