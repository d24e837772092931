"""One prompt at a time: read, answered with drafts, and streamed as text."""

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Literal, Unpack

from trimix_gguf.answering.answer import Answer
from trimix_gguf.answering.costs import kept_costs
from trimix_gguf.answering.decoding import decode_steps
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.prompt_cache import load_prompt, save_prompt
from trimix_gguf.answering.request import Event, Options, Request, join_events
from trimix_gguf.choosing.selection import Selection, select_weights
from trimix_gguf.trio.prompt import Prompt, Segment, is_shared
from trimix_gguf.trio.sequences import TokenProgress
from trimix_gguf.trio.trio import Trio

Speculative = Literal["auto", "on", "off"]
OnSelection = Callable[[Selection], None]


class AllOptions(Options, total=False):
    """Keyword arguments of stream_generate."""

    speculative: Speculative
    n_draft: int | None
    prompt_cache: Path | None
    on_selection: OnSelection | None
    progress: TokenProgress | None


def generate(trio: Trio, prompt: Request | Prompt | str, **options: Unpack[AllOptions]) -> Event:
    """Answer `prompt`; one Event has the whole text. The options are stream_generate's."""
    return join_events(stream_generate(trio, prompt, **options))


def stream_generate(
    trio: Trio,
    prompt: Request | Prompt | str,
    *,
    speculative: Speculative = "auto",
    n_draft: int | None = None,
    prompt_cache: Path | None = None,
    on_selection: OnSelection | None = None,
    progress: TokenProgress | None = None,
    **options: Unpack[Options],
) -> Generator[Event, None, None]:
    """Answer a Request, or a prompt and the options that make one; yield events as they come.

    `speculative` lets small_cpt draft: 'auto' where that pays, by lengths that follow its cost and
    its success; 'on' always, `n_draft` tokens at once if given. The text depends on it only at near
    ties. `prompt_cache` is a folder that keeps the prompt as it was read, for the next run.
    `on_selection` gets the weights before the first event, `progress` the number of tokens that
    were read. Models whose coefficient is 0 are not evaluated, unless the request traces them.
    """
    answer = Answer(trio, Request.of(prompt, **options))
    _read_prompt(answer, prompt_cache, on_selection, progress)
    drafting = Drafting(n_draft=n_draft, always=speculative == "on", never=speculative == "off")
    steps = decode_steps(
        trio,
        answer.steering,
        answer.sampler,
        drafting=drafting,
        max_tokens=answer.request.max_tokens,
        also=answer.traced,
    )
    with closing(steps), kept_costs(trio, drafting.n_draft is None):
        if answer.finish_reason is not None:  # no token was asked for
            yield answer.event()
        while answer.finish_reason is None:
            step = next(steps)
            if drafting.acceptance is not None:
                answer.speed["acceptance"] = drafting.acceptance
            yield answer.take(step.token, step.fused, step.rows, from_draft=step.from_draft)


def _read_prompt(
    answer: Answer,
    prompt_cache: Path | None,
    on_selection: OnSelection | None,
    progress: TokenProgress | None,
) -> None:
    """Bring the trio to the end of the prompt, and choose weights on the way."""
    trio, prompt = answer.trio, answer.prompt
    cached = prompt_cache is not None and load_prompt(trio, prompt_cache)
    n_kept, n_read = trio.n_kept(prompt.units), 0

    def count(n: int) -> None:
        nonlocal n_read
        n_read += n
        if progress is not None:
            progress(n)

    _select(answer, count)
    assert answer.selection is not None
    if on_selection is not None:
        on_selection(answer.selection)
    fixed = answer.selection.method == "fixed"
    answer.speed["select_s"] = 0.0 if fixed else answer.elapsed
    trio.rows(answer.steering.roles, count)
    n_prompt = answer.n_prompt["large_ins"]
    answer.speed["prefill_tps"] = n_prompt / answer.elapsed
    n_held = sum(len(ids[0]) for ids, _ in prompt.units[:n_kept])
    answer.n_cached = max(0, min(n_held, n_prompt - n_read))
    if prompt_cache is not None and not (cached and n_kept == len(prompt.units)):
        save_prompt(trio, prompt_cache)
    if answer.request.echo:
        _echo(answer)


def _select(answer: Answer, progress: TokenProgress) -> None:
    """Take the mix that is given, or choose one by the prompt; the trio then holds the prompt."""
    trio, choosing = answer.trio, answer.request.choosing
    if answer.selection is not None:
        trio.prefill(answer.prompt)
        return
    answer.select(select_weights(trio, answer.prompt, progress=progress, **choosing))


def _echo(answer: Answer) -> None:
    """Read the prompt again, for its tokens' own probabilities."""
    segments = []
    for segment in answer.prompt.segments:
        shared = all(is_shared(ids) for ids, _ in segment.units)
        segments.append(Segment(segment.ids, shared=shared, scored=shared))
    answer.trio.prefill(Prompt(tuple(segments)), consume=answer.echo)
    answer.n_cached = 0
