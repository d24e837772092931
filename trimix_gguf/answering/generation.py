"""Tokens -> text: the answer of a mix, streamed."""

import codecs
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trimix_gguf.answering.costs import kept_costs
from trimix_gguf.answering.prompt_cache import load_prompt, save_prompt
from trimix_gguf.answering.speculative import Drafting, Step, decode_steps, probability
from trimix_gguf.choosing.selection import Grid, Selection, select_weights
from trimix_gguf.errors import PromptError
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.sampling import Sampler
from trimix_gguf.mixing.scoring import GRID
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.trio import Progress, Trio

Trace = Callable[[dict[str, Any]], None]


@dataclass
class Response:
    """A chunk of text; what it says of counts and speed holds up to this chunk.

    `finish_reason` is None until the last: 'stop', 'length' or 'context'. Times in seconds.
    """

    text: str
    token: int | None
    selection: Selection
    seed: int
    n_prompt_tokens: int
    n_tokens: int = 0
    finish_reason: str | None = None
    speed: dict[str, float] = field(default_factory=dict)


def stream_generate(
    trio: Trio,
    prompt: Prompt | str,
    *,
    weights: Weights | Selection | None = None,
    method: Literal["ppl", "ent"] = "ppl",
    grid: Grid = (GRID, GRID),
    last: int | None = None,
    max_tokens: int = 128,
    stop: Sequence[str] = (),
    plausibility_threshold: float = 0.0,
    speculative: Literal["auto", "on", "off"] = "auto",
    n_draft: int | None = None,
    prompt_cache: Path | None = None,
    trace: Trace | None = None,
    trace_roles: Sequence[str] = ROLES,
    on_selection: Callable[[Selection], None] | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> Generator[Response, None, None]:
    """Answer `prompt`, yielding text as it comes; `sampling` goes to Sampler.

    `weights` fixes (alpha, beta), or holds an earlier choice; otherwise `method` ('ppl' or 'ent')
    chooses them from the prompt over `grid`. Models whose coefficient is 0 are not evaluated,
    unless `trace` asks for them by `trace_roles`: it gets a dict a token, with its probability
    under each model that was evaluated. `speculative` lets small_cpt draft: 'auto' where that
    pays, by lengths that follow what it costs and brings; 'on' always, `n_draft` tokens at once
    if given. The text depends on it at near ties alone.
    `prompt_cache` is a folder that keeps the prompt as it was read, for the next run. Stops at an
    end-of-generation token of any of the three, at a `stop` string (not given out), after
    `max_tokens`, or where the context is full.
    """
    started = time.perf_counter()
    if isinstance(prompt, str):
        prompt = trio.prompt(prompt)
    end_ids = trio.end_of_generation
    sampler = Sampler(
        trio.models["large_ins"].vocab, trio.n_vocab, stop_ids=tuple(end_ids), **sampling
    )
    for segment in prompt.segments:
        sampler.read_prompt(segment.ids["large_ins"])
    cached = prompt_cache is not None and load_prompt(trio, prompt_cache)
    n_kept = trio.n_kept(prompt.units)
    if weights is None:
        selection = select_weights(
            trio, prompt, method=method, grid=grid, last=last, progress=progress
        )
        weights = selection.weights
    else:
        trio.prefill(prompt)
        selection = Selection(weights, "fixed") if isinstance(weights, Weights) else weights
        weights = selection.weights
    if on_selection is not None:
        on_selection(selection)
    selected = time.perf_counter()
    trio.rows(weights.active, progress)
    read = time.perf_counter()
    if prompt_cache is not None and not (cached and n_kept == len(prompt.units)):
        save_prompt(trio, prompt_cache)
    n_prompt = prompt.n_tokens()
    response = Response("", None, selection, sampler.seed, n_prompt)
    response.speed = {
        "select_s": selected - started if selection.method != "fixed" else 0.0,
        "prefill_tps": n_prompt / (read - started),
    }
    drafting = Drafting(n_draft=n_draft, always=speculative == "on", never=speculative == "off")
    steps = decode_steps(
        trio,
        weights,
        sampler,
        drafting=drafting,
        max_tokens=max_tokens,
        plausibility_threshold=plausibility_threshold,
        also=trace_roles if trace is not None else (),
    )
    answer = Answer(trio, sampler, stop=stop, max_tokens=max_tokens, room=trio.room)
    with closing(steps), kept_costs(trio, drafting.n_draft is None):
        while answer.finish_reason is None:
            step = next(steps)
            if trace is not None:
                trace(_trace_row(trio, step, weights))
            now = time.perf_counter()
            response.speed.setdefault("ttft_s", now - started)
            if answer.n_tokens > 0:
                took = now - started - response.speed["ttft_s"]
                response.speed["decode_tps"] = answer.n_tokens / took
            if drafting.acceptance is not None:
                response.speed["acceptance"] = drafting.acceptance
            text = answer.take(step.token)
            response.n_tokens = answer.n_tokens
            token = None if step.token in end_ids else step.token
            yield _chunk(response, text, token, answer.finish_reason)
    if max_tokens <= 0:
        yield _chunk(response, "", None, answer.finish_reason)


def generate(trio: Trio, prompt: Prompt | str, **options: Any) -> Response:
    """Answer `prompt` whole; the options are stream_generate's."""
    parts, last = [], None
    for last in stream_generate(trio, prompt, **options):
        parts.append(last.text)
    if last is None:
        raise PromptError("nothing was generated")
    last.text = "".join(parts)
    return last


def _chunk(response: Response, text: str, token: int | None, reason: str | None = None) -> Response:
    return replace(
        response, text=text, token=token, finish_reason=reason, speed=dict(response.speed)
    )


class Answer:
    """Text of an answer as its tokens come, and why it ends.

    `finish_reason` is None until then: 'stop', 'length', or 'context' where `room`, the tokens
    that can still be read, is used up.
    """

    def __init__(
        self, trio: Trio, sampler: Sampler, *, stop: Sequence[str], max_tokens: int, room: int
    ) -> None:
        self._end_ids, self._piece = trio.end_of_generation, trio.models["large_ins"].piece
        self._sampler, self._max_tokens, self._room = sampler, max_tokens, room
        self._text = _TextStream(stop)
        self.n_tokens = 0
        self.finish_reason: str | None = "length" if max_tokens <= 0 else None

    def take(self, token: int) -> str:
        """The text that is whole with one more token, which the sampler accepts."""
        ready = ""
        if token in self._end_ids:
            self.finish_reason = "stop"
        else:
            self._sampler.accept(token)
            self.n_tokens += 1
            ready = self._text.push(self._piece(token))
            if self._text.stopped:
                self.finish_reason = "stop"
            elif self.n_tokens >= self._max_tokens:
                self.finish_reason = "length"
            elif self.n_tokens > self._room:
                self.finish_reason = "context"
        return ready if self.finish_reason is None else ready + self._text.flush()


class _TextStream:
    """Bytes of tokens -> whole characters, holding back what may become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = [s for s in stop if s]
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        self._held += self._decoder.decode(piece)
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        if self.stopped:
            return ""
        return self._held + self._decoder.decode(b"", final=True)


def _overlap(text: str, stop: str) -> int:
    """Longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def _trace_row(trio: Trio, step: Step, weights: Weights) -> dict[str, Any]:
    token = step.token
    return {
        "id": token,
        "piece": trio.models["large_ins"].piece(token, special=True).decode("utf-8", "replace"),
        "probabilities": {
            **{r: probability(step.rows[r], token) for r in ROLES if r in step.rows},
            "fused": probability(step.fused, token),
        },
        "weights": {"alpha": weights.alpha, "beta": weights.beta},
        "from_draft": step.from_draft,
    }
