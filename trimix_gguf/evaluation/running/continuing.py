"""Greedy answers of many mixes to a few prompts, together.

Mixes that have written the same text so far are one sequence, decoded once; all sequences get their
next token in one batch per model. So 36 grid points that agree cost as much as one. A token decoded
by itself takes up to four times as long as one of thirty, so several prompts share the batches.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.answering.steering import Steering
from trimix_gguf.errors import ContextFullError
from trimix_gguf.evaluation.running.decoupled import FourthModel, three_of_four
from trimix_gguf.evaluation.running.loops import Loop
from trimix_gguf.mixing.fusion import Mix, Rows, Weights
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.sequences import Sequences
from trimix_gguf.trio.trio import Trio

WIDEST = 20  # texts at once: beyond this, extra texts give no speed-up (all cells are read)


@dataclass
class Continuation:
    """One mix that continues a prompt, and what it wrote.

    A `steering` may change the mix after each token. With a `loop`, an answer that only repeats
    itself is filled up to its limit with `n_filled` ids that were not decoded.
    """

    mix: Mix
    steering: Steering | None = None
    loop: Loop | None = None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    n_filled: int = 0
    raw: bytes = b""  # the pieces of `ids`, joined

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models that it reads; what its steering consults reads along, as in one batch."""
        if self.steering is None:
            return self.mix.roles
        reads = {*self.steering.roles, *self.steering.consults}
        return tuple(role for role in ROLES if role in reads)

    def pick(self, rows: Rows, unused: NDArray[np.bool_] | None) -> int:
        """The most likely next token after rows [n_vocab]."""
        fused = self.mix.fuse(rows, unused)
        token = int(fused.argmax())
        if self.loop is not None:
            self.loop.append(token, lambda: 1 / float(np.exp(fused - fused[token]).sum()))
        if self.steering is not None:
            self.steering.take(token, rows)
            self.mix = self.steering.mix
        return token


@dataclass(frozen=True)
class Start:
    """A prompt that `sequence` holds, the rows [n_vocab] after it, and what continues it."""

    sequence: int
    rows: Rows
    continuations: Sequence[Continuation]

    @staticmethod
    def here(trio: Trio, roles: Sequence[Role], continuations: Sequence[Continuation]) -> "Start":
        """A start after what `trio` holds now; `roles` are all that the continuations read."""
        rows = {role: row.copy() for role, row in trio.rows(roles).items()}
        sequence = trio.sequences.fork()
        trio.forget_rows()  # forks write where they are
        return Start(sequence, rows, continuations)


def continue_all(trio: Trio, starts: Sequence[Start], *, max_tokens: int) -> None:
    """Continue each prompt up to the end of its first line; sets the texts and ids.

    As many texts as surely fit are decoded at once. When one ends, another begins: the batches stay
    wide, even if a few answers are `max_tokens` long. Raises ContextFullError if not even one
    answer fits.
    """
    sequences, roles = trio.sequences, starts[0].rows
    room = min(trio.models[r].n_ctx - sequences.n_cells(r) for r in roles)
    most = min(room // max_tokens, sequences.n_free, WIDEST)
    if most < 1:
        raise ContextFullError(
            f"an answer of {max_tokens} tokens does not fit behind {trio.n_past} in a context of "
            f"{trio.n_ctx}; raise --n-ctx or lower the number of exemplars"
        )
    waiting = deque(
        _Node(start, group)
        for start in starts
        for group in _followed(trio, start.continuations, start.rows, max_tokens)
    )
    going: list[_Node] = []
    while waiting or going:
        while waiting and len(going) < most:
            going.append(_begin(sequences, waiting.popleft()))
        rows = list(_next_rows(sequences, going))
        parted = [
            (node, _followed(trio, node.continuations, row, max_tokens))
            for node, row in zip(going, rows, strict=True)
        ]
        n_free = most - sum(bool(groups) for _, groups in parted)
        going = []
        for node, groups in parted:
            if not groups:
                sequences.drop(node.sequence)
                continue
            grown, left = _grow(sequences, node, groups, n_free)
            n_free -= len(grown) - 1
            going += grown
            waiting.extendleft(left)


def continue_decoupled(
    trio: Trio, fourth: FourthModel, weights: Weights, gamma: float, *, max_tokens: int
) -> Continuation:
    """Like continue_all, for one mix of four models, token by token."""
    written, n_written = Continuation(Mix(weights)), 0
    while True:
        rows = {role: row[None] for role, row in trio.rows().items()}
        three = three_of_four(fourth.beside(rows, trio.n_past), gamma)
        token = written.pick({role: row[0] for role, row in three.items()}, trio.unused)
        if _finish(trio, written, token, max_tokens):
            break
        trio.advance(token)
        n_written += 1
    trio.rewind(n_written)
    return written


@dataclass
class _Node:
    """Continuations with the same text after a prompt; the sequence that holds it, or 0."""

    start: Start
    continuations: list[Continuation]
    sequence: int = 0


def _followed(
    trio: Trio, continuations: Sequence[Continuation], rows: Rows, max_tokens: int
) -> list[list[Continuation]]:
    """Let each pick its next token after rows [n_vocab]; unfinished ones, grouped by token."""
    groups: dict[int, list[Continuation]] = {}
    for one in continuations:
        token = one.pick(rows, trio.unused)
        if not _finish(trio, one, token, max_tokens):
            groups.setdefault(token, []).append(one)
    return list(groups.values())


def _begin(sequences: Sequences, node: _Node) -> _Node:
    """Give the text so far a sequence."""
    node.sequence = sequences.fork(node.start.sequence)
    sequences.append(node.sequence, node.continuations[0].ids)
    return node


def _finish(trio: Trio, written: Continuation, token: int, max_tokens: int) -> bool:
    """Add the token; returns whether the answer is complete."""
    if token in trio.end_of_generation:
        return True
    new = [token]
    if written.loop is not None:
        filled = written.loop.rest(max_tokens - len(written.ids) - 1)
        new += filled
        written.n_filled = len(filled)
    written.ids += new
    piece = trio.models["large_ins"].piece
    written.raw += b"".join(piece(i) for i in new)
    text = written.raw.decode("utf-8", errors="replace")
    line, newline, _ = text.lstrip().partition("\n")
    written.text = line.rstrip()
    return bool(newline) or len(written.ids) >= max_tokens


def _grow(
    sequences: Sequences, node: _Node, groups: Sequence[list[Continuation]], n_free: int
) -> tuple[list[_Node], list[_Node]]:
    """A node for each text that continues now, and the nodes that wait for a sequence.

    The first one continues in the node's sequence, `n_free` others in new ones.
    """
    # The forks first: they share what the node's sequence holds.
    numbers = [node.sequence, *[sequences.fork(node.sequence) for _ in groups[1 : 1 + n_free]]]
    grown = [_Node(node.start, *pair) for pair in zip(groups, numbers, strict=False)]
    for child in grown:
        sequences.append(child.sequence, child.continuations[0].ids[-1:])
    return grown, [_Node(node.start, group) for group in groups[len(grown) :]]


def _next_rows(sequences: Sequences, nodes: Sequence[_Node]) -> Iterator[Rows]:
    """Rows [n_vocab] of the models that each node reads."""
    found: list[Rows] = [{} for _ in nodes]
    for role in ROLES:
        reading = [i for i, node in enumerate(nodes) if role in roles_of(node.continuations)]
        if reading:
            rows = sequences.rows([nodes[i].sequence for i in reading], (role,))[role]
            for i, row in zip(reading, rows, strict=True):
                found[i][role] = row
    yield from found


def roles_of(readers: Sequence[Mix | Continuation]) -> tuple[Role, ...]:
    """The models that at least one of them reads."""
    return tuple(role for role in ROLES if any(role in one.roles for one in readers))
