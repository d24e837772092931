"""Sequences: several texts in the same models, each with what it has read and what it owes.

Sequence 0 is the trio's own. fork() starts others, which share the cells of what they continue:
a prompt is read and kept once however many answers go on from it. One batch a model reads for
all of them. Ids that are appended are owed; a model reads them when a row of it is asked for.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from trimix_gguf.errors import ModelError
from trimix_gguf.machine.spreading import together
from trimix_gguf.machine.threads import run_all
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.model import Entry, Logits, Model

TokenProgress = Callable[[int], None]  # tokens just read
Wanted = Mapping[int, Sequence[int]]  # sequence -> indexes of its ids whose rows are wanted


@dataclass
class _Held:
    """A sequence: its ids by role, and the cells of those that were read.

    Of large_ins' ids the first `n_exact` were read as they stand; None: all.
    """

    ids: dict[Role, list[int]]
    cells: dict[Role, list[int]]
    n_exact: int | None = None


class Sequences:
    """What each sequence holds in each of a trio's models; the cells of all share each context."""

    def __init__(self, models: Mapping[Role, Model], n_vocab: int) -> None:
        self._models, self._n_vocab = models, n_vocab
        self.most = min(m.n_window for m in models.values()) - 1
        self._held = {0: _Held({r: [] for r in ROLES}, {r: [] for r in ROLES})}
        self._free = list(range(self.most, 0, -1))
        self._new_cell = itertools.count()
        self._users: dict[Role, Counter[int]] = {role: Counter() for role in ROLES}
        self._pool = ThreadPoolExecutor(len(ROLES) - 1, thread_name_prefix="device")

    # -- what they hold ---------------------------------------------------------------------

    @property
    def n_free(self) -> int:
        """How many more sequences there can be."""
        return len(self._free)

    def n_cells(self, role: Role) -> int:
        """Positions of a role's context in use; what sequences share counts once."""
        self._follow_model(role)
        return len(self._users[role])

    def ids(self, sequence: int) -> Mapping[Role, Sequence[int]]:
        """What a sequence has read or owes, by role."""
        return self._held[sequence].ids

    def n_read(self, sequence: int, role: Role) -> int:
        """How many of a sequence's ids a role has read."""
        if sequence == 0:  # its model counts them, and may be rewound by others
            return min(self._models[role].n_past, len(self._held[0].ids[role]))
        return len(self._held[sequence].cells[role])

    def n_alone(self, sequence: int, role: Role) -> int:
        """How many of the positions that a role has read of it no other sequence shares."""
        return sum(self._users[role][cell] == 1 for cell in self._held[sequence].cells[role])

    def fork(self, source: int = 0) -> int:
        """A new sequence that holds and owes what `source` does. Raises ModelError.

        There can be `most` at once beside sequence 0. What is owed is read by each for itself.
        """
        if not self._free:
            raise ModelError(f"{self.most} sequences at once are the most; drop one")
        new, known = self._free.pop(), self._held[source]
        cells: dict[Role, list[int]] = {}
        for role, model in self._models.items():
            self._follow_model(role)
            model.fork(source, new)
            cells[role] = list(known.cells[role])
            self._users[role].update(cells[role])
        ids = {role: list(of_role) for role, of_role in known.ids.items()}
        self._held[new] = _Held(ids, cells, known.n_exact)
        return new

    def replace_ids(self, ids: Mapping[Role, Sequence[int]]) -> None:
        """Say what sequence 0 holds, of which the models have read no more than is there."""
        self._held[0].ids = {role: list(ids[role]) for role in ROLES}
        self._held[0].n_exact = None

    def append(self, sequence: int, ids: Sequence[int] | Mapping[Role, Sequence[int]]) -> None:
        """Continue a sequence by the same ids for all roles, or by each role's own."""
        held = self._held[sequence].ids
        for role in ROLES:
            held[role] += ids[role] if isinstance(ids, Mapping) else ids

    def rewind(self, sequence: int, lengths: Mapping[Role, int]) -> None:
        """Cut what each role holds or owes of a sequence to a length. Raises ModelError."""
        for role in ROLES:
            self._cut(sequence, role, max(0, lengths[role]))
            del self._held[sequence].ids[role][max(0, lengths[role]) :]
        held = self._held[sequence]
        if held.n_exact is not None and lengths[ROLES[0]] <= held.n_exact:
            held.n_exact = None

    def is_exact(self, sequence: int) -> bool:
        """Whether a sequence was read as it stands: nothing in it was shifted."""
        return self._held[sequence].n_exact is None

    def shift(self, sequence: int, ranges: Mapping[Role, tuple[int, int]]) -> bool:
        """Take a range of ids (first, end) out of each role's; what was read after it moves up.

        That still holds what it took from the range. False, and all is as before, where a model
        cannot shift, or where another sequence has the same cells. Raises ModelError.
        """
        held = self._held[sequence]
        for role, (_, end) in ranges.items():
            self._follow_model(role)
            if moved := held.cells[role][end:]:
                alone = all(self._users[role][cell] == 1 for cell in moved)
                if not alone or not self._models[role].can_shift:
                    return False
        for role, (start, end) in ranges.items():
            if held.cells[role][end:]:
                self._models[role].shift(sequence, start, end)
                self._release(role, held.cells[role][start:end])
                del held.cells[role][start:end]
            else:  # nothing to move: the cut is at the end of what was read
                self._cut(sequence, role, start)
            del held.ids[role][start:end]
        start, _ = ranges[ROLES[0]]
        held.n_exact = start if held.n_exact is None else min(start, held.n_exact)
        return True

    def drop(self, sequence: int) -> None:
        """Forget a sequence other than 0; its number may come back from fork()."""
        for role, model in self._models.items():
            model.drop(sequence)
            self._release(role, self._held[sequence].cells[role])
        del self._held[sequence]
        self._free.append(sequence)

    def drop_forks(self) -> None:
        """Forget every sequence but 0."""
        for sequence in [number for number in self._held if number != 0]:
            self.drop(sequence)

    # -- reading ----------------------------------------------------------------------------

    def rows(self, sequences: Sequence[int], roles: Sequence[Role] = ROLES) -> Rows:
        """Next-token logits [n_sequences, n_vocab] of `roles` after each sequence's newest id.

        Zero-copy where one batch has all, as decode_entries. Raises ContextFullError, ModelError.
        """
        newest = {
            role: {s: [len(self._held[s].ids[role]) - 1] for s in sequences} for role in roles
        }
        return self.read(newest)

    def read(self, wanted: Mapping[Role, Wanted], progress: TokenProgress | None = None) -> Rows:
        """Let each role read what these sequences owe it; logits [n_rows, n_vocab] by role.

        `wanted` gives, by role and sequence, the ids (ascending indexes) whose rows are wanted;
        they come in its order. One that was read before is read again. On different devices the
        roles read at the same time, on one in turn. Those on the CPU read in the caller's thread:
        OpenMP keeps a team for each thread that decodes. After a failure forks are to be dropped.
        """

        def one(role: Role) -> Logits:
            return self._read(role, wanted[role], progress if role == ROLES[0] else None)

        groups = together({role: self._models[role].device for role in wanted})
        if len(groups) < 2:
            return {role: one(role) for role in wanted}
        groups.sort(key=lambda group: any(self._models[role].device == "CPU" for role in group))
        parts = run_all(self._pool, lambda group: {r: one(r) for r in group}, groups)
        return {role: rows for part in parts for role, rows in part.items()}

    def _read(self, role: Role, wanted: Wanted, progress: TokenProgress | None) -> Logits:
        model, parts = self._models[role], []
        for sequence, indexes in wanted.items():
            if indexes:
                self._cut(sequence, role, indexes[0])
        batches = list(_batches(self._owed(role, wanted), model.n_batch, model.n_window))
        for at, batch in enumerate(batches, 1):
            rows = model.decode_entries(batch)[:, : self._n_vocab]
            if len(rows):  # Copy: llama.cpp reuses this buffer on the next decode.
                parts.append(rows if at == len(batches) else rows.copy())
            if progress is not None:
                progress(len(batch))
        for sequence in wanted:
            self._take_cells(sequence, role, len(self._held[sequence].ids[role]))
        if not parts:
            return np.empty((0, self._n_vocab), dtype=np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _owed(self, role: Role, wanted: Wanted) -> Iterator[Entry]:
        for sequence, indexes in wanted.items():
            ids, rows = self._held[sequence].ids[role], set(indexes)
            for i in range(self.n_read(sequence, role), len(ids)):
                yield ids[i], i, sequence, i in rows

    # -- cells ------------------------------------------------------------------------------

    def _cut(self, sequence: int, role: Role, length: int) -> None:
        """Have a role forget what it read of a sequence from `length` on."""
        model = self._models[role]
        if sequence == 0:
            if model.n_past > length:
                model.rewind(length)
            self._follow_model(role)
        elif self.n_read(sequence, role) > length:
            model.drop(sequence, length)
            self._release(role, self._held[sequence].cells[role][length:])
            del self._held[sequence].cells[role][length:]

    def _take_cells(self, sequence: int, role: Role, n_read: int) -> None:
        cells = self._held[sequence].cells[role]
        new = list(itertools.islice(self._new_cell, max(0, n_read - len(cells))))
        cells += new
        self._users[role].update(new)

    def _follow_model(self, role: Role) -> None:
        """Bring sequence 0's cells to what its model holds of it."""
        cells, n_past = self._held[0].cells[role], self._models[role].n_past
        self._release(role, cells[n_past:])
        del cells[n_past:]
        self._take_cells(0, role, n_past)

    def _release(self, role: Role, cells: Sequence[int]) -> None:
        users = self._users[role]
        for cell in cells:
            if users[cell] == 1:
                del users[cell]
            else:
                users[cell] -= 1


def _batches(entries: Iterable[Entry], n_batch: int, n_rows: int) -> Iterator[list[Entry]]:
    """Cut into runs of at most `n_batch` entries that want at most `n_rows` rows."""
    batch: list[Entry] = []
    rows = 0
    for entry in entries:
        if len(batch) == n_batch or rows + entry[3] > n_rows:
            yield batch
            batch, rows = [], 0
        batch.append(entry)
        rows += entry[3]
    if batch:
        yield batch
