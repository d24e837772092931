"""Many requests in one trio: read and answered together, one batch per model and step.

Each request is a sequence of its own. A step decodes the newest token of every answer, and
with them a window of the prompt that is being read. While none is read, answers are drafted ahead
where that pays, as in generation.py: one batch verifies the drafts of all. Prompts are read one at
a time, so that the next one finds the prefix that they share. Sequences of finished requests are
kept for later prompts with the same prefix, until their room is needed. A request starts once there
is room for all of it.
"""

import itertools
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from trimix_gguf.answering.costs import kept_costs
from trimix_gguf.answering.job import Job
from trimix_gguf.answering.keeping import Kept
from trimix_gguf.answering.request import Event, Request
from trimix_gguf.errors import ModelError, QueueFull, TrimixError
from trimix_gguf.machine.loading import N_BATCH
from trimix_gguf.machine.threads import past_ctrl_c
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.trio import Trio


@dataclass(frozen=True)
class Statistics:
    """What a Batcher does now, and has done: requests by their end, tokens, seconds."""

    n_running: int = 0
    n_waiting: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_tokens: int = 0
    step_seconds: float = 0.0

    def __add__(self, other: "Statistics") -> "Statistics":
        finished = Counter(self.finished)
        finished.update(other.finished)
        return Statistics(
            n_running=self.n_running + other.n_running,
            n_waiting=self.n_waiting + other.n_waiting,
            finished=finished,
            n_prompt_tokens=self.n_prompt_tokens + other.n_prompt_tokens,
            n_cached_tokens=self.n_cached_tokens + other.n_cached_tokens,
            n_tokens=self.n_tokens + other.n_tokens,
            step_seconds=self.step_seconds + other.step_seconds,
        )


LONG_STEP_S = 5.0
_STOPPED = "the server has stopped"
Wanted = dict[Role, dict[int, Sequence[int]]]  # role -> sequence -> its ids whose rows are wanted


class Batcher:
    """Answers requests in another thread; until it is closed, only it may use `trio`.

    It answers `n_parallel` at once, at most a trio's n_window − 1; `n_queue` more may wait. With
    `drafts`, answers are drafted ahead where that pays. With `all_known` no others come later, so
    only what they begin with is kept. `context_shift`: see Kept. Several Batchers in one process
    share a `thread`, where their steps take turns. Two steps at once would share the same cores;
    and OpenMP keeps a team for each thread that ever decoded: once all teams together are larger
    than the cores, it sends them to sleep at each barrier, which costs a quarter of the speed.
    """

    def __init__(
        self,
        trio: Trio,
        *,
        n_parallel: int = 8,
        n_queue: int = 32,
        drafts: bool = True,
        all_known: bool = False,
        context_shift: bool = False,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.trio, self._drafts, self._all_known = trio, drafts, all_known
        trio.forget()
        self._sequences = trio.sequences
        self._n_parallel, self._n_queue = min(n_parallel, self._sequences.most), n_queue
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._kept = Kept(trio, context_shift=context_shift)
        self._statistics = Statistics()
        self._changed = threading.Condition()
        self._n_reserved = 0
        self._step_began: float | None = None
        self._has_turn = self._is_closing = self._has_ended = False
        self._at_end = ExitStack()
        self._thread = thread or self._at_end.enter_context(ThreadPoolExecutor(1, "batcher"))
        self._at_end.enter_context(kept_costs(trio, drafts))

    def reserve(self, n: int) -> None:
        """Hold `n` places, before anything is prepared for them; raises QueueFull, ModelError."""
        with self._changed:
            self._check_room(n)
            self._n_reserved += n

    def release(self, n: int) -> None:
        """Give back places that were not used."""
        with self._changed:
            self._n_reserved -= n
            self._changed.notify_all()

    def submit(
        self, request: Request, on_event: Callable[[Event], None], *, reserved: bool = False
    ) -> Job:
        """Queue a request; this Batcher's thread calls `on_event`, which must not raise.

        A `reserved` one uses up a place that was held. Raises QueueFull, ModelError, PromptError,
        SamplerError.
        """
        job = Job(self.trio, request, on_event, drafts=self._drafts)
        with self._changed:
            self._check_room(0 if reserved else 1)
            self._n_reserved -= reserved
            self._waiting.append(job)
            self._ask_for_turn()
        return job

    def submit_all(
        self, requests: Sequence[Request], on_event: Callable[[int, Event], None]
    ) -> None:
        """Queue requests together; `on_event` gets the index of one, too.

        The engine begins when all of them wait: in an engine that was just made, the same requests
        share the same batches, and round the same way, each time. Raises as submit does.
        """
        jobs = [
            Job(self.trio, r, partial(on_event, i), drafts=self._drafts)
            for i, r in enumerate(requests)
        ]
        with self._changed:
            self._check_room(len(jobs))
            self._waiting += jobs
            self._ask_for_turn()

    def _check_room(self, n: int) -> None:
        if self._is_closing:
            raise QueueFull("the server is shutting down; try again later")
        if self._has_ended:
            raise ModelError(_STOPPED)
        if n > self._n_free:
            raise QueueFull(f"{self._n_queue} requests wait already; try again later")

    @property
    def _n_free(self) -> int:
        """Places that are neither taken nor held."""
        taken = len(self._waiting) + len(self._running) + self._n_reserved
        return self._n_queue + self._n_parallel - taken

    @property
    def is_busy(self) -> bool:
        """Whether one more request would be refused, or a step takes long."""
        began = self._step_began
        return self._n_free <= 0 or (began is not None and time.monotonic() - began > LONG_STEP_S)

    @property
    def is_idle(self) -> bool:
        """Whether no place is taken or held."""
        with self._changed:
            return self._n_free == self._n_queue + self._n_parallel

    @property
    def is_alive(self) -> bool:
        """Whether it can still answer: it was not closed, and no mistake has ended it."""
        return not self._has_ended

    def statistics(self) -> Statistics:
        """The numbers of this moment; any thread may ask."""
        return replace(self._statistics, n_running=len(self._running), n_waiting=len(self._waiting))

    def close(self) -> None:
        """Take no more requests, and cancel those that run. The trio stays open.

        As it may be freed next, this waits for the step that runs, past Ctrl-C too, and until no
        place is held: who holds one uses the tokenizer.
        """
        past_ctrl_c(self._close)

    def _close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.wait_for(lambda: not (self._has_turn or self._n_reserved))
        if not self._has_ended:
            self._thread.submit(self._end).result()
        self._at_end.close()

    # -- the thread -------------------------------------------------------------------------

    def _ask_for_turn(self) -> None:
        """Come to the end of the thread's queue, unless it is there already."""
        if not self._has_turn:
            self._thread.submit(self._turn)
            self._has_turn = True

    def _turn(self) -> None:
        try:
            self._end_cancelled()
            self._let_in()
            self._timed_step()
        except BaseException:  # a mistake of ours
            traceback.print_exc()
            self._end()
        finally:  # close() waits for it, also where the same mistake comes again in _end()
            with self._changed:
                self._has_turn = False
                self._changed.notify_all()
                if (self._waiting or self._running) and not self._has_ended:
                    self._ask_for_turn()

    def _end(self) -> None:
        with self._changed:  # so that none is submitted once those that are there are told
            self._has_ended = True
        self._abandon(ModelError(_STOPPED))

    def _timed_step(self) -> None:
        started, self._step_began = time.perf_counter(), time.monotonic()
        try:
            self._step()
        except TrimixError as error:  # of a decode: no one request is at fault
            self._abandon(error)
        self._step_began = None
        took = self._statistics.step_seconds + time.perf_counter() - started
        self._statistics = replace(self._statistics, step_seconds=took)

    def _end_cancelled(self) -> None:
        if self._is_closing:
            for job in (*self._waiting, *self._running):
                job.cancel()
        for job in [j for j in (*self._waiting, *self._running) if j.cancelled]:
            job.tell_cancelled()
            self._release(job, "cancelled")

    def _let_in(self) -> None:
        """Start waiting requests in their order, while there is room for all of each."""
        while self._waiting and len(self._running) < self._n_parallel:
            job = self._waiting[0]
            if not self._has_room(job) and job.sequence is None:
                self._kept.take_over(job)
            while not self._has_room(job) and self._kept:
                self._kept.forget_one()
            if not self._has_room(job):
                return
            with self._changed:
                self._running.append(self._waiting.popleft())

    def _has_room(self, new: Job) -> bool:
        for role, model in self.trio.models.items():
            to_come = 0
            for job in (*self._running, new):
                to_come += job.n_cells[role] - self._n_held(job, role)
            if self._sequences.n_cells(role) + to_come > model.n_ctx:
                return False
        return True

    def _n_held(self, job: Job, role: Role) -> int:
        """Positions of a request that need no more room."""
        if job.sequence is None:
            return 0
        if job.reads_again:  # what it shares stays where it is, and it has none of that then
            return self._sequences.n_alone(job.sequence, role)
        # What a role owes has no cells yet, but the guard may have it read.
        return self._sequences.n_read(job.sequence, role)

    # -- a step -----------------------------------------------------------------------------

    def _step(self) -> None:
        """Give each answer its next tokens, and read a window of one prompt."""
        answering = [job for job in self._running if job.stage == "answer"]
        reading = next((job for job in self._running if job.stage != "answer"), None)
        for job in answering:
            is_held = reading is not None
            self._take(job, partial(job.begin_round, len(answering), is_held=is_held))
        while reading or any(job.need for job in answering):
            needing = [job for job in answering if job.need is not None]
            # Drafts come first, so that one batch verifies all; beside a prompt there are none.
            drafting = [job for job in needing if job.is_drafting and reading is None]
            self._read(drafting or needing, reading)
            reading = None

    def _read(self, answering: Sequence[Job], reading: Job | None = None) -> None:
        """Decode what these answers need and a window of a prompt; hand out the rows."""
        wanted: Wanted = {role: {} for role in ROLES}
        for job in answering:
            assert job.sequence is not None  # it was placed to be read
            for role in ROLES:
                indexes = job.wanted(role)
                if indexes or job.lags(role):
                    wanted[role][job.sequence] = indexes
        end = 0 if reading is None else self._append_portion(reading, len(answering), wanted)
        roles = [role for role in ROLES if wanted[role]]
        rows = self._sequences.read({role: wanted[role] for role in roles})
        for job in answering:
            found = _rows_of(job.sequence, rows, wanted)
            found = {role: matrix for role, matrix in found.items() if len(matrix)}
            self._take(job, partial(job.answer, found))
        if reading is not None:
            own = _rows_of(reading.sequence, rows, wanted)
            self._take(reading, partial(reading.read, end, own))

    def _append_portion(self, job: Job, n_answering: int, wanted: Wanted) -> int:
        """Append units of a prompt to its sequence, and rows to `wanted`; returns their end."""
        reading = job.prefill
        if job.sequence is None:
            running = {other.sequence: other.sums for other in self._running if other.sequence}
            job.sequence = self._kept.place(job, running)
        # Others wait while a portion is read, so it is short; alone, a longer one is faster.
        n_ids = self.trio.n_window if n_answering else N_BATCH
        end = reading.portion(n_ids - n_answering, self.trio.n_window - n_answering)
        self._sequences.rewind(job.sequence, reading.lengths())
        self._sequences.append(job.sequence, reading.ids(reading.at, end))
        for role in job.roles:
            wanted[role][job.sequence] = reading.wanted(end, role)
        return end

    def _take(self, job: Job, work: Callable[[], None]) -> None:
        """Do a request's part of a step; release it once it has ended, or by its own fault."""
        try:
            work()
        except TrimixError as error:
            job.fail(error)
            self._release(job, "error")
        if job.finish_reason is not None:
            self._release(job, job.finish_reason)

    def _release(self, job: Job, reason: str) -> None:
        """Remove a request that has ended, and keep what was read for it."""
        with self._changed:
            (self._running if job in self._running else self._waiting).remove(job)
        if job.sequence is not None:
            job.end_steps()
            self._kept.add(job.sequence, job.sums)
            if self._all_known:
                others = (*self._waiting, *self._running)
                self._kept.forget_unused(other for other in others if other.sequence is None)
        finished = dict(self._statistics.finished)
        finished[reason] = finished.get(reason, 0) + 1
        self._statistics = replace(
            self._statistics,
            finished=finished,
            n_prompt_tokens=self._statistics.n_prompt_tokens + job.prefill.lengths()["large_ins"],
            n_cached_tokens=self._statistics.n_cached_tokens + job.n_cached,
            n_tokens=self._statistics.n_tokens + job.n_tokens,
        )

    def _abandon(self, error: TrimixError) -> None:
        """End everything: after a failed decode no sequence can be trusted."""
        for job in (*self._waiting, *self._running):
            with suppress(TrimixError):
                job.end_steps()
            job.fail(error)
            job.sequence = None
            self._release(job, "error")
        self._kept.clear()
        self._sequences.drop_forks()


def _rows_of(sequence: int | None, rows: Rows, wanted: Wanted) -> Rows:
    """The part [n, n_vocab] of each role's rows that belongs to a sequence."""
    found: Rows = {}
    for role, own in wanted.items():
        if sequence in own:
            first = sum(len(own[s]) for s in itertools.takewhile(lambda s: s != sequence, own))
            found[role] = rows[role][first : first + len(own[sequence])]
    return found
