"""Where the time of a whole answer goes: the engine's own calls, timed while it answers.

A part that is called within another counts for itself only, so the parts sum to the whole. The
models are opened a second time, over the same weights, with a clock at their output layers.
"""

import math
import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from trimix_gguf.answering import decoding, generation
from trimix_gguf.answering.costs import save_costs
from trimix_gguf.answering.drafting import DRAFTER, draft
from trimix_gguf.answering.generation import Speculative
from trimix_gguf.answering.request import Request
from trimix_gguf.choosing.subset import ScoreTokens
from trimix_gguf.machine.products import OutputClock
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.roles import LOADING_ORDER, ROLES, Role
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.strand import Strand
from trimix_gguf.trio.trio import Trio

READING: dict[Role, str] = {role: f"reading, {role}" for role in LOADING_ORDER}
OUTPUT, CHOICE, SAMPLING, REST = "output layers", "grid and choice", "mix and sampling", "the rest"
SINGLE, DRAFTS, VERIFYING = "tokens one by one", "drafts", "verification"
PARTS = (*READING.values(), CHOICE, SINGLE, DRAFTS, VERIFYING, OUTPUT, SAMPLING, REST)
# By name: whether small_cpt drafts, and which tokens of the prompt are scored.
CONFIGURATIONS: dict[str, tuple[Speculative, ScoreTokens]] = {
    "no drafts, all tokens scored": ("off", "all"),
    "drafts, some tokens scored": ("auto", "auto"),
}
Clocks = Mapping[Model, OutputClock]


class Clock:
    """Seconds by part, of the thread that made it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.thread = threading.get_ident()
        self._open: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str:
        """The part that time counts for now."""
        return self._open[-1]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it, time counts for the part of that name."""
        self._count(time.perf_counter())
        self._open.append(name)
        try:
            yield
        finally:
            self._count(time.perf_counter())
            self._open.pop()

    def split(self, at: float, name: str) -> None:
        """Since the moment `at`, if that is in the current part, time counted for `name`."""
        if at > self._since:
            self._count(at)
            self._since = time.perf_counter()
            self.seconds[name] += self._since - at

    def _count(self, now: float) -> None:
        if self._open:
            self.seconds[self.current] += now - self._since
        self._since = now


def time_answers(
    trio: Trio, prompt: Prompt, *, mix: Mix | None, n_tokens: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds by part of a greedy answer, in each configuration: the run of median length.

    Without `mix` the prompt chooses it. Configurations run in turn, after one of each that does
    not count.
    """
    request = Request.of(
        prompt,
        weights=mix,
        max_tokens=n_tokens,
        temperature=0,
        logit_bias=dict.fromkeys(trio.end_of_generation, -math.inf),
    )
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGURATIONS}
    with _with_clocks(trio) as (twin, clocks):
        for _ in range(1 + repeats):
            for name, (speculative, score_tokens) in CONFIGURATIONS.items():
                one = Request.of(request, score_tokens=score_tokens)
                runs[name].append(time_answer(twin, one, clocks, speculative))
    save_costs(trio)  # those of the twin hold the clocks' own
    return {name: _of_median_length(times[1:]) for name, times in runs.items()}


def time_answer(
    trio: Trio, request: Request, clocks: Clocks, speculative: Speculative
) -> dict[str, float]:
    """Seconds by part of one answer, whose prompt is read from its start."""
    trio.forget()
    clock = Clock()
    with _timed(clock, trio, clocks), clock.part(REST):
        generation.generate(trio, request, speculative=speculative)
    return clock.seconds


def _of_median_length(runs: list[dict[str, float]]) -> dict[str, float]:
    """One of the runs, so that its parts are of one whole."""
    lengths = [sum(run.values()) for run in runs]
    return runs[lengths.index(statistics.median_low(lengths))]


@contextmanager
def _with_clocks(trio: Trio) -> Iterator[tuple[Trio, Clocks]]:
    """A second trio over the same weights, and what notes when its output layers begin."""
    models, clocks = {}, {}
    for role, model in trio.models.items():
        clock = OutputClock()
        models[role] = Model(
            model.path,
            model.loading,
            lora=model.lora,
            share=model,
            tokenizer=role == ROLES[0],
            watch=clock,
        )
        models[role].decode_seconds = {n: times.copy() for n, times in model.decode_seconds.items()}
        clocks[models[role]] = clock
    with Trio(**models) as twin:
        twin.tuning = trio.tuning
        yield twin, clocks


@contextmanager
def _timed(clock: Clock, trio: Trio, clocks: Clocks) -> Iterator[None]:
    """Within it, calls of the engine count for their parts."""
    role_of = {model: role for role, model in trio.models.items()}
    newest, is_drafting = "", False  # what the newest round of the answer was

    def round_part(strand: Strand, roles: Sequence[Role], n: int) -> str:
        nonlocal newest
        if is_drafting:
            return DRAFTS
        if tuple(roles) != (DRAFTER,) or not newest:
            newest = SINGLE if n == 1 else VERIFYING
        # small_cpt's own row after a round's last token is read by itself.
        return newest

    def noted(drafts: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
        def run(*given: Any) -> Generator[Any, Any, Any]:
            nonlocal is_drafting
            is_drafting = given[-1].n_draft > 0
            try:
                return (yield from drafts(*given))
            finally:
                is_drafting = False

        return run

    def decoding_part(model: Model, *_: Any) -> str:
        if clock.current in (SINGLE, DRAFTS, VERIFYING):
            return clock.current
        return newest or READING[role_of[model]]

    def wrapped(call: Callable[..., Any], part_of: Callable[..., str]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != clock.thread:  # models at once, on several devices
                return call(*arguments, **options)
            with clock.part(part_of(*arguments)):
                result = call(*arguments, **options)
                if arguments and arguments[0] in clocks:
                    clock.split(clocks[arguments[0]].began, OUTPUT)
                return result

        return run

    calls: list[tuple[Any, str, Callable[..., str]]] = [
        (generation, "select_weights", lambda *_: CHOICE),
        (Strand, "tail_rows", round_part),
        (Sampler, "sample", lambda *_: SAMPLING),
        (Sampler, "accept", lambda *_: SAMPLING),
        (Mix, "fuse", lambda *_: SAMPLING),
        (Model, "decode_entries", decoding_part),
    ]
    with ExitStack() as restore:
        restore.callback(setattr, decoding, "draft", draft)
        vars(decoding)["draft"] = noted(draft)
        for owner, name, part_of in calls:
            own = getattr(owner, name)
            restore.callback(setattr, owner, name, own)
            setattr(owner, name, wrapped(own, part_of))
        yield
