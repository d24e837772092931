"""Branches: several continuations of what a Trio holds, decoded together.

Each is a llama.cpp sequence that shares the cells of what it continues, so a prompt is read and
kept once however many answers go on from it; one batch a model decodes a token of each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trimix_gguf.errors import ModelError
from trimix_gguf.fusion import ROLES, Rows
from trimix_gguf.model import Entry, Logits
from trimix_gguf.trio import Trio


@dataclass
class _Branch:
    """Ids after the trunk, and how many of them each role has read."""

    ids: list[int]
    n_read: dict[str, int]


class Branches:
    """Continuations of `trio`, its trunk, by the models in `roles`.

    Use it as a context manager, and leave the trio alone meanwhile; afterwards the trio holds
    what it held. All of them together share the n_ctx positions of each context.
    """

    def __init__(self, trio: Trio, roles: Sequence[str] = ROLES) -> None:
        self.trio, self.roles = trio, tuple(roles)
        if trio.n_past:
            trio.rows(self.roles)  # a fork shares what was read, not what is owed
        self._start = {role: len(ids) for role, ids in trio.ids.items()}
        self.most = trio.n_window - 1
        self._branches: dict[int, _Branch] = {}
        self._free = list(range(self.most, 0, -1))
        trio.forget_rows()

    def __enter__(self) -> "Branches":
        return self

    def __exit__(self, *_: object) -> None:
        for branch in list(self._branches):
            self.drop(branch)

    def fork(self, branch: int | None = None) -> int:
        """A new branch that goes on from `branch`, or from the trunk; raises ModelError.

        There can be `most` at once.
        """
        if not self._free:
            raise ModelError(f"{self.most} branches at once are the most; drop one")
        new = self._free.pop()
        for role in self.roles:
            self.trio.models[role].fork(branch or 0, new)
        known = self._branches[branch] if branch else _Branch([], dict.fromkeys(self.roles, 0))
        self._branches[new] = _Branch(list(known.ids), dict(known.n_read))
        return new

    def append(self, branch: int, ids: Sequence[int]) -> None:
        """Continue a branch; it is decoded when its row is asked for, by the roles asked for."""
        self._branches[branch].ids += ids

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
        return self.trio.on_devices(wanted, lambda role: self._read(role, branches))

    def _read(self, role: str, branches: Sequence[int]) -> Logits:
        model, parts = self.trio.models[role], []
        entries = list(self._owed(role, branches))
        batches = list(_batches(entries, model.n_batch, model.n_window))
        for batch in batches:
            rows = model.decode_branches(batch)[:, : self.trio.n_vocab]
            # Copy: llama.cpp reuses this buffer on the next decode.
            parts.append(rows if len(batches) == 1 else rows.copy())
        for branch in branches:
            self._branches[branch].n_read[role] = len(self._branches[branch].ids)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _owed(self, role: str, branches: Sequence[int]) -> Iterator[Entry]:
        for number in branches:
            branch = self._branches[number]
            first = branch.n_read[role]
            if first == len(branch.ids):
                raise ValueError(f"branch {number} owes {role} nothing; append to it first")
            for i, token in enumerate(branch.ids[first:], first):
                yield token, self._start[role] + i, number, i == len(branch.ids) - 1


def _batches(entries: Sequence[Entry], n_batch: int, n_rows: int) -> Iterator[list[Entry]]:
    """Cut into runs of at most `n_batch` entries that want at most `n_rows` rows."""
    batch: list[Entry] = []
    for entry in entries:
        if len(batch) == n_batch or sum(e[3] for e in batch) == n_rows:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch
