"""A strand: one sequence of a trio's models, read and continued token by token."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimix_gguf.errors import PromptError
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.sequences import Sequences, TokenProgress


class Strand:
    """A sequence, and the rows after its last token; a Trio is that of sequence 0.

    `unused` bool [n_vocab] are ids that no mix may pick. Rows are llama.cpp's own buffers, valid
    until the next call that reads: while other sequences are read, their rows are to be forgotten.
    """

    unused: Any
    n_texts = 0  # how often another text took the place of this one

    def __init__(self, models: Mapping[Role, Model], sequences: Sequences, number: int) -> None:
        self.models, self.sequences, self.number = models, sequences, number
        self.n_window = min(m.n_window for m in models.values())
        self._rows: Rows = {}  # next-token rows [n_vocab] of the roles that are up to date

    @property
    def _ids(self) -> Mapping[Role, Sequence[int]]:
        return self.sequences.ids(self.number)

    @property
    def ids(self) -> dict[Role, list[int]]:
        """What each role has read or owes."""
        return {role: list(ids) for role, ids in self._ids.items()}

    @property
    def room(self) -> int:
        """Tokens that every role can still take, if nobody else does."""
        return min(self.models[r].n_ctx - len(self._ids[r]) for r in ROLES)

    def advance(self, token: int) -> None:
        """Append one token to every role; it is decoded when a row is asked for."""
        self.sequences.append(self.number, [token])
        self._rows = {}

    def rewind(self, n: int) -> None:
        """Forget the last `n` shared tokens."""
        self._rows = {}
        lengths = {role: len(self._ids[role]) - n for role in ROLES}
        self.sequences.rewind(self.number, lengths)

    def rows(self, roles: Sequence[Role] = ROLES, progress: TokenProgress | None = None) -> Rows:
        """Next-token logits [n_vocab] of `roles`, after all tokens so far.

        Zero-copy: valid until the next call that reads. A role that owes tokens reads them now.
        """
        owing = [role for role in roles if role not in self._rows]
        self._rows |= {role: tail[-1] for role, tail in self._read_tail(owing, 1, progress).items()}
        return {role: self._rows[role] for role in roles}

    def tail_rows(self, roles: Sequence[Role], n: int) -> Rows:
        """Logits [n, n_vocab] of `roles` after each of the last `n` ≤ n_window tokens.

        One batch per role, zero-copy: valid until the next call that reads that role.
        """
        if n == 1:
            return {role: row[None, :] for role, row in self.rows(roles).items()}
        tails = self._read_tail(roles, n)
        self._rows |= {role: tails[role][-1] for role in roles}
        return tails

    def _read_tail(
        self, roles: Sequence[Role], n: int, progress: TokenProgress | None = None
    ) -> Rows:
        """Rows [n, n_vocab] after each of the last `n` ids, which are read now."""
        for role in roles:
            if not self._ids[role]:
                raise PromptError(f"{role} has nothing to continue; give a prompt")
        last = {role: len(self._ids[role]) for role in roles}
        wanted = {role: {self.number: range(last[role] - n, last[role])} for role in roles}
        return self.sequences.read(wanted, progress)


class Branch(Strand):
    """A fork in a trio's sequences, to be continued by itself."""

    def __init__(self, of: Strand, number: int) -> None:
        super().__init__(of.models, of.sequences, number)
        self.unused = of.unused
