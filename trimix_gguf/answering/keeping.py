"""Sequences of finished requests in the batch engine: a later prompt may begin as one of them.

A request forks what it shares with a kept sequence. Where the context has no room for both, it goes
on in the kept sequence itself: a long chat is then not read again for each turn.
"""

from collections.abc import Iterable, Mapping

from trimix_gguf.answering.job import Job
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prefill import count_ids
from trimix_gguf.trio.prompt import left_out, n_common
from trimix_gguf.trio.sums import PrefixSums
from trimix_gguf.trio.trio import Trio

_WORTH_KEEPING = 16  # units of a prompt: for fewer, their cells would slow each step


class Kept:
    """Kept sequences and the sums over them, the longest unused first.

    With `context_shift`, a request that goes on in one may leave a range of it out, as a long chat
    does without its oldest turns: what follows moves up, and is no longer exact.
    """

    def __init__(self, trio: Trio, *, context_shift: bool) -> None:
        self._sequences = trio.sequences
        can_shift = all(model.can_shift for model in trio.models.values())
        self._context_shift = context_shift and can_shift
        self._sums: dict[int, PrefixSums] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, sequence: int, sums: PrefixSums) -> None:
        """Keep a sequence; it was used now."""
        self._sums[sequence] = sums

    def forget_one(self) -> None:
        """Drop the one that was not used for the longest time."""
        self._forget(next(iter(self._sums)))

    def forget_unused(self, to_read: Iterable[Job]) -> None:
        """Drop what no request that is still to be read begins with."""
        prompts = [job.prefill.units for job in to_read]
        for sequence in list(self._sums):
            ids = self._sequences.ids(sequence)
            if all(n_common(units, ids) < _WORTH_KEEPING for units in prompts):
                self._forget(sequence)

    def clear(self) -> None:
        """Keep nothing; the sequences are dropped by who calls."""
        self._sums.clear()

    def place(self, job: Job, running: Mapping[int, PrefixSums]) -> int:
        """A sequence for a request: a fork of the one that begins most like its prompt.

        `running` are other requests' sequences, and the sums over them.
        """
        known = {**self._sums, **running}
        common = {s: n_common(job.prefill.units, self._sequences.ids(s)) for s in known}
        source = max(common, key=lambda sequence: common[sequence], default=None)
        if source is not None:
            job.start(common[source], known[source])
        if source is None or job.prefill.at == 0:
            source = None
        elif source in self._sums:  # used now, so it is forgotten last
            self._sums[source] = self._sums.pop(source)
        if self._sequences.n_free == 0:
            if source is not None and list(self._sums) == [source]:
                del self._sums[source]  # no other is free, so it is continued itself
                return source
            self.forget_one()
        return self._sequences.fork(source or 0)

    def take_over(self, job: Job) -> None:
        """Have a request go on in the kept sequence that begins most like it, if one is worth it.

        For where there is no room beside it.
        """
        units = job.prefill.units
        if self._context_shift:
            self._shift(job)
        common = {s: n_common(units, self._sequences.ids(s)) for s in self._sums}
        source = max(common, key=lambda sequence: common[sequence], default=None)
        if source is None or common[source] < _WORTH_KEEPING:
            return
        job.start(common[source], self._sums.pop(source))
        job.sequence = source
        self._sequences.rewind(source, job.prefill.lengths())

    def _shift(self, job: Job) -> None:
        """Take out of a kept sequence what a prompt leaves out of it, where most is then common."""
        units = job.prefill.units
        found = {s: left_out(sums.units, units) for s, sums in self._sums.items()}
        # Units in common: without a shift, and with that of each sequence.
        least = max((n_common(units, self._sequences.ids(s)) for s in self._sums), default=0)
        common = {s: len(self._sums[s].units) - r[1] + r[0] for s, r in found.items() if r}
        best = max(common, key=lambda sequence: common[sequence], default=None)
        if best is None or common[best] < least + _WORTH_KEEPING:
            return
        start, end = found[best] or (0, 0)
        ends = [count_ids(self._sums[best].units, i) for i in range(len(ROLES))]
        ranges = {r: (at[start], at[end]) for r, at in zip(ROLES, ends, strict=True)}
        # Others may have the same cells; where there is no room they would be dropped anyway.
        others = [sequence for sequence in self._sums if sequence != best]
        while not self._sequences.shift(best, ranges):
            if not others:
                return
            self._forget(others.pop(0))
        self._sums[best] = self._sums[best].without(start, end)

    def _forget(self, sequence: int) -> None:
        del self._sums[sequence]
        self._sequences.drop(sequence)
