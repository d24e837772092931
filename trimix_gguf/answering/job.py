"""A request in the batch engine: which units of its prompt are read next, and what the rows say.

It is served in up to three stages: its prompt is scored, unless its weights are fixed; read again
for its tokens' own probabilities, if it wants them; and answered, token after token.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Literal

from trimix_gguf.answering.answer import Answer
from trimix_gguf.answering.decoding import Step, drafted_steps
from trimix_gguf.answering.drafting import DRAFTER, Drafting, Need
from trimix_gguf.answering.request import Event, FinishReason, Request
from trimix_gguf.choosing.score import add_window
from trimix_gguf.choosing.subset import stand_for
from trimix_gguf.errors import TrimixError
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import Role
from trimix_gguf.trio.prefill import Prefill, is_scored
from trimix_gguf.trio.prompt import Unit, is_shared
from trimix_gguf.trio.strand import Branch
from trimix_gguf.trio.sums import PrefixSums
from trimix_gguf.trio.trio import Trio

Stage = Literal["score", "echo", "read", "answer"]


class Job:
    """The state of a request: where it stands in its prompt, or in its answer.

    `prefill` says where it stands in its prompt; `need` is what its answer waits for in this
    round; `sequence` is where it is read, once it is. Without `drafts` a round is one token. Raises
    PromptError for a prompt that fits no context, SamplerError for a setting that llama.cpp
    refuses.
    """

    def __init__(
        self,
        trio: Trio,
        request: Request,
        on_event: Callable[[Event], None],
        *,
        drafts: bool = True,
    ) -> None:
        self._answer = Answer(trio, request)
        self._trio, self._request, self._on_event = trio, request, on_event
        self._prompt = self._answer.prompt
        self._chooser = self._answer.choose()
        self.stage: Stage = "read"
        if self._chooser is not None and self._chooser.score is not None:
            self.stage = "score"
            self._prompt = self._chooser.prompts[0]
        elif request.echo and self._answer.selection is not None:
            self.stage = "echo"
        scored = None if self._chooser is None else self._chooser.score
        self._sums = PrefixSums() if scored is None else PrefixSums(scored.points)
        self.prefill = Prefill(
            self._prompt,
            predicts=_PREDICTED[self.stage],
            stand_for=lambda n: stand_for(n, self._sums.points.stride),
        )
        most = min(self._answer.room, request.max_tokens)
        self.n_cells = {role: n + most for role, n in self._answer.n_prompt.items()}
        self.need: Need | None = None
        self.sequence: int | None = None
        self.cancelled = False
        self._drafting = Drafting(never=not drafts)
        self._steps: Generator[Step | Need, Rows | None, None] | None = None

    def cancel(self) -> None:
        """Have it end before its next token; does nothing once it has ended."""
        self.cancelled = True

    @property
    def sums(self) -> PrefixSums:
        """What it has read so far, and the sums over it."""
        return replace(self._sums, units=self.prefill.units[: self.prefill.at])

    @property
    def roles(self) -> tuple[Role, ...]:
        """Models that read its prompt now."""
        return self._answer.roles

    @property
    def reads_again(self) -> bool:
        """Whether what it has read is to be read again from its start, for an echo."""
        has_begun = self.stage == "echo" and self.prefill.at > 0
        return self._request.echo and self.stage != "answer" and not has_begun

    def lags(self, role: Role) -> bool:
        """Whether a model that may have to read later owes a window: others would wait for it."""
        assert self.sequence is not None
        if role not in self._answer.consults:
            return False
        sequences = self._trio.sequences
        n_ids = len(sequences.ids(self.sequence)[role])
        return n_ids - sequences.n_read(self.sequence, role) >= self._trio.n_window

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why its answer ended; None before."""
        return self._answer.finish_reason if self.stage == "answer" else None

    @property
    def n_tokens(self) -> int:
        """Tokens of its answer so far."""
        return self._answer.n_tokens

    @property
    def n_cached(self) -> int:
        """Tokens of its prompt that it did not read again."""
        return self._answer.n_cached

    # -- reading ----------------------------------------------------------------------------

    def start(self, n_kept: int, known: PrefixSums) -> None:
        """Begin where the first `n_kept` units are read already; `known` are the sums over them."""
        if self.stage == "score":
            self._sums = known.for_prompt(self.prefill.units, self._sums.points, n_kept)
        # The last unit's row is wanted, so it is read again; an echo wants all rows.
        most = 0 if self.stage == "echo" else min(n_kept, len(self.prefill.units) - 1)
        self.prefill.start(most, self._sums.newest.mark[1])
        self._answer.n_cached = self.prefill.lengths()["large_ins"]

    def read(self, end: int, rows: Rows) -> None:
        """Take in the rows [n_wanted, n_vocab] of the units up to `end`; raises TrimixError."""
        window = self.prefill.take(end, rows)
        if self.stage == "score" and len(window.targets):
            add_window(self._sums, self._trio, window, available_cores())
        elif self.stage == "echo":
            self._answer.echo(window)
        if end == len(self.prefill.units):
            self._finish_prompt({role: matrix[-1:] for role, matrix in rows.items()})

    def _finish_prompt(self, rows: Rows) -> None:
        """The prompt is read to its end, whose rows [1, n_vocab] these are."""
        assert self.sequence is not None
        if self._answer.selection is None:
            assert self._chooser is not None
            if self._chooser.score is not None:
                self._chooser.score.add(self._sums.newest)
            newest = {role: matrix[0] for role, matrix in rows.items()}
            self._answer.select(self._chooser.decide([newest]))
            if self._request.echo:
                self.stage = "echo"
                self.prefill = Prefill(self._prompt, predicts=_PREDICTED["echo"])
                self._answer.n_cached = 0
                return
        self.stage = "answer"
        if self.finish_reason is not None:  # no token was asked for
            self._on_event(self._answer.event())
        else:
            self._steps = drafted_steps(
                Branch(self._trio, self.sequence),
                self._answer.steering,
                self._answer.sampler,
                drafting=self._drafting,
                max_tokens=self._request.max_tokens,
                also=self._answer.traced,
            )
            self.begin_round(1, is_held=True)  # these are the rows it needs
            self.answer(rows)

    # -- answering --------------------------------------------------------------------------

    def begin_round(self, n_together: int, *, is_held: bool) -> None:
        """Say what it needs for its next token, as one of `n_together`. Raises SamplerError.

        While it is held, nothing is drafted.
        """
        assert self._steps is not None
        self._drafting.n_together, self._drafting.is_held = n_together, is_held
        self._go_on(None)

    @property
    def is_drafting(self) -> bool:
        """Whether it needs only rows to draft from, or the last row of a draft."""
        return self.need is not None and self.need[0] == (DRAFTER,)

    def answer(self, rows: Rows) -> None:
        """Take in the rows it needs, and tell of the tokens that follow. Raises SamplerError."""
        self._go_on(rows)

    def _go_on(self, rows: Rows | None) -> None:
        """Give tokens until it needs rows, or its round has ended and it needs none."""
        assert self._steps is not None
        found, self.need = self._steps.send(rows), None
        while isinstance(found, Step):
            told = self._answer.take(
                found.token, found.fused, found.rows, from_draft=found.from_draft
            )
            self._on_event(told)
            if self.finish_reason is not None or not found.from_draft:
                return
            found = next(self._steps)
        self.need = found

    def wanted(self, role: Role) -> Sequence[int]:
        """Indexes of its sequence's ids whose rows it needs of a role."""
        assert self.sequence is not None
        if self.need is None or role not in self.need[0]:
            return ()
        length = len(self._trio.sequences.ids(self.sequence)[role])
        return range(length - self.need[1], length)

    def end_steps(self) -> None:
        """Its sequence then holds all of its answer but the newest token."""
        self.need = None
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def tell_cancelled(self) -> None:
        """Say that it ends before its time."""
        self._on_event(self._answer.cancel())

    def fail(self, error: TrimixError) -> None:
        """Say that it cannot be answered."""
        self._on_event(self._answer.event(error=error))


# What a stage wants predicted: the scored tokens, or all that the models share.
_PREDICTED: dict[Stage, Callable[[Unit], bool]] = {
    "score": is_scored,
    "echo": lambda unit: is_shared(unit[0]),
    "read": lambda unit: False,
}
