"""Tokens -> text: the answer of a mix, streamed."""

import codecs
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trimix_gguf.answering.costs import kept_costs
from trimix_gguf.answering.decoding import Step, decode_steps
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.prompt_cache import load_prompt, save_prompt
from trimix_gguf.choosing.methods import ChosenBy
from trimix_gguf.choosing.selection import Grid, Selection, select_weights
from trimix_gguf.errors import PromptError
from trimix_gguf.mixing.fusion import Mix, Weights, check_threshold, probability
from trimix_gguf.mixing.sampling import Sampler
from trimix_gguf.mixing.scoring import GRID
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.sequences import TokenProgress
from trimix_gguf.trio.trio import Trio

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
    weights: Weights | Mix | Selection | None = None,
    method: ChosenBy = "ppl",
    grid: Grid = (GRID, GRID),
    last: int | None = None,
    max_tokens: int = 128,
    stop: Sequence[str] = (),
    plausibility_threshold: float | None = None,
    speculative: Literal["auto", "on", "off"] = "auto",
    n_draft: int | None = None,
    prompt_cache: Path | None = None,
    trace: Trace | None = None,
    trace_roles: Sequence[str] = ROLES,
    on_selection: Callable[[Selection], None] | None = None,
    progress: TokenProgress | None = None,
    **sampling: Any,
) -> Generator[Response, None, None]:
    """Answer `prompt`, yielding text as it comes; `sampling` goes to Sampler.

    `weights` fixes (alpha, beta), fixes a whole Mix, or holds an earlier choice; otherwise `method`
    ('ppl' or 'ent') chooses them from the prompt over `grid`. A `plausibility_threshold` that is
    given stands in place of the mix's own, whoever chose the weights; without one, weights that
    are chosen or given as a pair have none. Models whose coefficient is 0 are not evaluated,
    unless `trace` asks for them by `trace_roles`: it gets a dict per token, with its probability
    under each model that was evaluated. `speculative` lets small_cpt draft: 'auto' where that
    pays, by lengths that follow what it costs and brings; 'on' always, `n_draft` tokens at once
    if given. The text depends on it only at near ties.
    `prompt_cache` is a folder that keeps the prompt as it was read, for the next run. Stops at an
    end-of-generation token of any of the three, at a `stop` string (not given out), after
    `max_tokens`, or where the context is full.
    """
    started = time.perf_counter()
    if plausibility_threshold is not None:
        check_threshold(plausibility_threshold)  # before minutes of reading
    if isinstance(prompt, str):
        prompt = trio.prompt(prompt)
    sampler = _sampler(trio, prompt, sampling)
    cached = prompt_cache is not None and load_prompt(trio, prompt_cache)
    n_kept = trio.n_kept(prompt.units)
    choice: dict[str, Any] = {"method": method, "grid": grid, "last": last, "progress": progress}
    selection = _selection(trio, prompt, weights, plausibility_threshold, choice)
    if on_selection is not None:
        on_selection(selection)
    selected = time.perf_counter()
    trio.rows(selection.mix.roles, progress)
    read = time.perf_counter()
    if prompt_cache is not None and not (cached and n_kept == len(prompt.units)):
        save_prompt(trio, prompt_cache)
    response = Response("", None, selection, sampler.seed, prompt.n_tokens())
    response.speed = {
        "select_s": selected - started if selection.method != "fixed" else 0.0,
        "prefill_tps": response.n_prompt_tokens / (read - started),
    }
    drafting = Drafting(n_draft=n_draft, always=speculative == "on", never=speculative == "off")
    answer = AnswerText(trio, sampler, stop=stop, max_tokens=max_tokens, room=trio.room)
    also = trace_roles if trace is not None else ()
    steps = decode_steps(
        trio, selection.mix, sampler, drafting=drafting, max_tokens=max_tokens, also=also
    )
    told = None if trace is None else partial(_tell, trio, selection.mix, trace)
    yield from _chunks(response, answer, steps, drafting, trio, told, started)


def generate(trio: Trio, prompt: Prompt | str, **options: Any) -> Response:
    """Answer `prompt` whole; the options are stream_generate's."""
    parts, last = [], None
    for last in stream_generate(trio, prompt, **options):
        parts.append(last.text)
    if last is None:
        raise PromptError("nothing was generated")
    last.text = "".join(parts)
    return last


def _sampler(trio: Trio, prompt: Prompt, settings: dict[str, Any]) -> Sampler:
    """One that has read the prompt, for its penalties."""
    end_ids = tuple(trio.end_of_generation)
    sampler = Sampler(trio.models["large_ins"].vocab, trio.n_vocab, stop_ids=end_ids, **settings)
    for segment in prompt.segments:
        sampler.read_prompt(segment.ids["large_ins"])
    return sampler


def _selection(
    trio: Trio,
    prompt: Prompt,
    weights: Weights | Mix | Selection | None,
    plausibility_threshold: float | None,
    choice: dict[str, Any],
) -> Selection:
    """What the caller fixed or chose before, or chosen by the prompt; the trio then holds it."""
    if weights is None:
        selection = select_weights(trio, prompt, **choice)
    else:
        trio.prefill(prompt)
        selection = (
            weights if isinstance(weights, Selection) else Selection(Mix.of(weights), "fixed")
        )
    if plausibility_threshold is None:
        return selection
    masked = replace(selection.mix, plausibility_threshold=plausibility_threshold)
    return replace(selection, mix=masked)


def _chunks(
    response: Response,
    answer: "AnswerText",
    steps: Generator[Step, None, None],
    drafting: Drafting,
    trio: Trio,
    tell: Callable[[Step], None] | None,
    started: float,
) -> Generator[Response, None, None]:
    """The answer's text as its steps bring it; `tell` gets each step before its chunk."""
    with closing(steps), kept_costs(trio, drafting.n_draft is None):
        if answer.finish_reason is not None:  # no token was asked for
            yield _chunk(response, "", None, answer.finish_reason)
        while answer.finish_reason is None:
            step = next(steps)
            if tell is not None:
                tell(step)
            _time(response, answer, drafting, time.perf_counter() - started)
            text = answer.take(step.token)
            response.n_tokens = answer.n_tokens
            token = None if step.token in trio.end_of_generation else step.token
            yield _chunk(response, text, token, answer.finish_reason)


def _time(response: Response, answer: "AnswerText", drafting: Drafting, elapsed: float) -> None:
    """Note the speed at a token that came `elapsed` seconds after the start."""
    speed = response.speed
    speed.setdefault("ttft_s", elapsed)
    if answer.n_tokens > 0:
        speed["decode_tps"] = answer.n_tokens / (elapsed - speed["ttft_s"])
    if drafting.acceptance is not None:
        speed["acceptance"] = drafting.acceptance


def _chunk(response: Response, text: str, token: int | None, reason: str | None = None) -> Response:
    return replace(
        response, text=text, token=token, finish_reason=reason, speed=dict(response.speed)
    )


class AnswerText:
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


def _tell(trio: Trio, mix: Mix, trace: Trace, step: Step) -> None:
    """Give `trace` what each model made of a token."""
    token = step.token
    row = {
        "id": token,
        "piece": trio.models["large_ins"].piece(token, special=True).decode("utf-8", "replace"),
        "probabilities": {
            **{r: probability(step.rows[r], token) for r in ROLES if r in step.rows},
            "fused": probability(step.fused, token),
        },
        "weights": mix.to_json(),
        "from_draft": step.from_draft,
    }
    trace(row)
