"""Branches: several continuations of what a Trio holds, decoded together.

Each is a llama.cpp sequence that shares the cells of what it continues, so a prompt is read and
kept once however many answers go on from it; one batch a model decodes a token of each.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimix_gguf.errors import ModelError
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Entry, Logits
from trimix_gguf.trio.trio import Trio


@dataclass
class _Branch:
    """Ids after the trunk by role, how many of them it has read, and the cells that hold these."""

    ids: dict[str, list[int]]
    n_read: dict[str, int]
    cells: dict[str, list[int]]


class Branches:
    """Continuations of `trio`, its trunk, by the models in `roles`.

    Use it as a context manager. Meanwhile the trio may read on from what it held, and be rewound
    to it; afterwards it holds what it was left with. All of them together share the n_ctx
    positions of each context.
    """

    def __init__(self, trio: Trio, roles: Sequence[str] = ROLES) -> None:
        self.trio, self.roles = trio, tuple(roles)
        # A fork shares what was read, not what is owed.
        trio.rows([r for r in self.roles if trio.models[r].n_past < len(trio.ids[r])])
        self._start = {role: len(ids) for role, ids in trio.ids.items()}
        self.most = trio.n_window - 1
        self._branches: dict[int, _Branch] = {}
        self._free = list(range(self.most, 0, -1))
        self._new_cell = itertools.count()
        trio.forget_rows()

    def __enter__(self) -> "Branches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget every branch."""
        for branch in list(self._branches):
            self.drop(branch)

    @property
    def n_free(self) -> int:
        """How many more branches there can be."""
        return len(self._free)

    def n_cells(self, role: str) -> int:
        """Positions of a role's context in use; what branches share counts once."""
        cells = (branch.cells[role] for branch in self._branches.values())
        return self._start[role] + len(set().union(*cells))

    def ids(self, branch: int) -> Mapping[str, Sequence[int]]:
        """What a branch holds or owes after the trunk, by role."""
        return self._branches[branch].ids

    def fork(self, branch: int | None = None) -> int:
        """A new branch that goes on from `branch`, or from what the trunk holds now.

        There can be `most` at once; raises ModelError.
        """
        if not self._free:
            raise ModelError(f"{self.most} branches at once are the most; drop one")
        new = self._free.pop()
        for role in self.roles:
            self.trio.models[role].fork(branch or 0, new)
        known = self._branches[branch] if branch else self._trunk()
        self._branches[new] = _Branch(
            {role: list(ids) for role, ids in known.ids.items()},
            dict(known.n_read),
            {role: list(cells) for role, cells in known.cells.items()},
        )
        return new

    def append(self, branch: int, ids: Sequence[int] | Mapping[str, Sequence[int]]) -> None:
        """Continue a branch by ids of all roles, or of each; they are decoded when rows are asked.

        And then by the roles asked for alone.
        """
        own = ids if isinstance(ids, Mapping) else dict.fromkeys(self.roles, ids)
        for role in self.roles:
            self._branches[branch].ids[role] += own[role]

    def rewind(self, branch: int, lengths: Mapping[str, int]) -> None:
        """Cut what each role holds or owes of a branch to a length. Raises ModelError."""
        for role in self.roles:
            self._cut(branch, role, lengths[role])
            del self._branches[branch].ids[role][lengths[role] :]

    def drop(self, branch: int) -> None:
        """Forget a branch; its number may come back from fork()."""
        for role in self.roles:
            self.trio.models[role].drop(branch)
        del self._branches[branch]
        self._free.append(branch)

    def rows(self, branches: Sequence[int], roles: Sequence[str] | None = None) -> Rows:
        """Next-token logits [n_branches, n_vocab] of `roles` after the newest id of each branch.

        Each branch must owe these roles an id. Zero-copy where one batch did, as Trio.rows.
        Raises ContextFullError, ModelError; the branches may be dropped then, and no more.
        """
        wanted = self.roles if roles is None else tuple(roles)
        for branch in branches:
            known = self._branches[branch]
            for role in wanted:
                if known.n_read[role] == len(known.ids[role]):
                    raise ValueError(f"branch {branch} owes {role} nothing; append to it first")
        return self.trio.on_devices(
            wanted,
            lambda role: self.read(
                role, {b: [len(self._branches[b].ids[role]) - 1] for b in branches}
            ),
        )

    def read(self, role: str, wanted: Mapping[int, Sequence[int]]) -> Logits:
        """Let `role` read what these branches owe it; logits [n_rows, n_vocab], as rows() has them.

        `wanted` gives, for each branch, the ids (ascending indexes after the trunk) whose rows are
        wanted; they come in its order. One that was read before is read again.
        """
        model, parts = self.trio.models[role], []
        for branch, indexes in wanted.items():
            if indexes and indexes[0] < self._branches[branch].n_read[role]:
                self._cut(branch, role, indexes[0])
        batches = list(_batches(self._owed(role, wanted), model.n_batch, model.n_window))
        for batch in batches:
            rows = model.decode_branches(batch)[:, : self.trio.n_vocab]
            # Copy: llama.cpp reuses this buffer on the next decode.
            parts.append(rows if len(batches) == 1 else rows.copy())
        for branch in wanted:
            known = self._branches[branch]
            new = len(known.ids[role]) - known.n_read[role]
            known.cells[role] += itertools.islice(self._new_cell, new)
            known.n_read[role] += new
        if not parts:
            return np.empty((0, self.trio.n_vocab), dtype=np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _owed(self, role: str, wanted: Mapping[int, Sequence[int]]) -> Iterator[Entry]:
        for number, indexes in wanted.items():
            branch, rows = self._branches[number], set(indexes)
            for i in range(branch.n_read[role], len(branch.ids[role])):
                yield branch.ids[role][i], self._start[role] + i, number, i in rows

    def _trunk(self) -> _Branch:
        """What the trio read since it became the trunk; a branch owes what it owes."""
        held = {role: self.trio.ids[role][self._start[role] :] for role in self.roles}
        n_read = {r: min(self.trio.models[r].n_past - self._start[r], len(held[r])) for r in held}
        cells = {role: list(itertools.islice(self._new_cell, n)) for role, n in n_read.items()}
        return _Branch(held, n_read, cells)

    def _cut(self, branch: int, role: str, length: int) -> None:
        known = self._branches[branch]
        if known.n_read[role] > length:
            self.trio.models[role].drop(branch, self._start[role] + length)
            known.n_read[role] = length
            del known.cells[role][length:]


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
