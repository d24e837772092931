"""Greedy answers of many mixes to a few prompts, together.

Mixes that have written the same text so far are one branch, decoded once; all branches take
their next token in one batch a model. 36 grid points that agree cost as much as one. A token
decoded alone takes up to four times as long as one of thirty, so several prompts share the batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.branches import Branches
from trimix_gguf.errors import ContextFullError
from trimix_gguf.evaluation.decoupled import FourthModel, three_of_four
from trimix_gguf.fusion import ROLES, Rows, Weights, fuse, mask_implausible
from trimix_gguf.trio import Trio

Adapt = Callable[[Rows, int], Weights]  # rows [n_vocab] and the token picked -> the next weights


@dataclass
class Mix:
    """One way to mix, and what it wrote; `adapt`, if any, gives new weights after each token."""

    weights: Weights
    plausibility_threshold: float = 0.0
    adapt: Adapt | None = None
    text: str = ""
    ids: list[int] = field(default_factory=list)

    @property
    def roles(self) -> tuple[str, ...]:
        """Models that it reads."""
        if self.adapt is not None:
            return ROLES
        masked = self.plausibility_threshold > 0
        return tuple(dict.fromkeys((*self.weights.active, *(("large_ins",) if masked else ()))))

    def pick(self, rows: Rows, unused: NDArray[np.bool_] | None) -> int:
        """The likeliest next token after rows [n_vocab]."""
        fused = fuse(rows, self.weights, unused=unused)
        if self.plausibility_threshold > 0:
            mask_implausible(fused, rows["large_ins"], self.plausibility_threshold)
        token = int(fused.argmax())
        if self.adapt is not None:
            self.weights = self.adapt(rows, token)
        return token


@dataclass(frozen=True)
class Start:
    """A prompt that `branch` holds, the rows [n_vocab] after it, and what is to continue it."""

    branch: int
    rows: Rows
    mixes: Sequence[Mix]

    @staticmethod
    def here(branches: Branches, mixes: Sequence[Mix]) -> "Start":
        """From what the trio of `branches` holds now."""
        trio = branches.trio
        rows = {role: row.copy() for role, row in trio.rows(branches.roles).items()}
        branch = branches.fork()
        trio.forget_rows()  # branches write where they are
        return Start(branch, rows, mixes)


def continue_all(branches: Branches, starts: Sequence[Start], *, max_tokens: int) -> None:
    """Let each mix continue its prompt up to the end of its first line; sets its text and ids.

    As many are under way as surely fit; as answers end, others begin, so that the batches stay
    wide though a few answers run on to `max_tokens`. Raises ContextFullError where not even one
    answer fits.
    """
    trio = branches.trio
    room = min(trio.models[r].n_ctx - branches.n_cells(r) for r in branches.roles)
    most = min(room // max_tokens, branches.n_free)
    if most < 1:
        raise ContextFullError(
            f"an answer of {max_tokens} tokens does not fit behind {trio.n_past} in a context of "
            f"{trio.n_ctx}; raise --n-ctx or lower the number of exemplars"
        )
    waiting = [
        _Node(start, mixes[at : at + most])
        for start in starts
        for mixes in _followed(trio, start.mixes, start.rows, max_tokens).values()
        for at in range(0, len(mixes), most)
    ]
    going: list[_Node] = []
    while waiting or going:
        going += _admit(branches, waiting, most - sum(len(node.mixes) for node in going))
        rows = list(_next_rows(branches, going))
        going = [
            child
            for node, row in zip(going, rows, strict=True)
            for child in _grow(branches, node, _followed(trio, node.mixes, row, max_tokens))
        ]


def continue_decoupled(
    trio: Trio, fourth: FourthModel, weights: Weights, gamma: float, *, max_tokens: int
) -> Mix:
    """As continue_all, the one mix of four models, token after token."""
    mix, n_written = Mix(weights), 0
    while True:
        rows = {role: row[None] for role, row in trio.rows().items()}
        three = three_of_four(fourth.beside(rows, trio.n_past), gamma)
        token = mix.pick({role: row[0] for role, row in three.items()}, trio.unused)
        if _finish(trio, mix, token, max_tokens):
            break
        trio.advance(token)
        n_written += 1
    trio.rewind(n_written)
    return mix


@dataclass
class _Node:
    """Mixes that wrote the same text after a prompt, and the branch that holds it, if one does."""

    start: Start
    mixes: list[Mix]
    branch: int = 0


def _followed(
    trio: Trio, mixes: Sequence[Mix], rows: Rows, max_tokens: int
) -> dict[int, list[Mix]]:
    """Let each take its next token after rows [n_vocab]; those not whole then, by their token."""
    groups: dict[int, list[Mix]] = {}
    for mix in mixes:
        token = mix.pick(rows, trio.unused)
        if not _finish(trio, mix, token, max_tokens):
            groups.setdefault(token, []).append(mix)
    return groups


def _admit(branches: Branches, waiting: list[_Node], n: int) -> list[_Node]:
    """Give branches to those of `waiting` that fit among `n` mixes, and take them out of it.

    Each mix counts: those that part take a branch and cells of their own.
    """
    admitted = []
    for node in waiting:
        if len(node.mixes) <= n:
            n -= len(node.mixes)
            node.branch = branches.fork(node.start.branch)
            branches.append(node.branch, node.mixes[0].ids)
            admitted.append(node)
    waiting[:] = [node for node in waiting if not node.branch]
    return admitted


def _finish(trio: Trio, mix: Mix, token: int, max_tokens: int) -> bool:
    """Take in the token; whether the answer is whole."""
    if token in trio.end_of_generation:
        return True
    mix.ids.append(token)
    piece = trio.models["large_ins"].piece
    text = b"".join(piece(i) for i in mix.ids).decode("utf-8", errors="replace")
    line, newline, _ = text.lstrip().partition("\n")
    mix.text = line.rstrip()
    return bool(newline) or len(mix.ids) >= max_tokens


def _grow(branches: Branches, node: _Node, groups: dict[int, list[Mix]]) -> list[_Node]:
    """A branch for each token that followed; the last one goes on in the node's own."""
    grown = []
    for i, mixes in enumerate(groups.values()):
        last = i == len(groups) - 1
        branch = node.branch if last else branches.fork(node.branch)
        grown.append(_Node(node.start, mixes, branch))
    if not groups:
        branches.drop(node.branch)
    for token, child in zip(groups, grown, strict=True):  # after the forks: they share the parent's
        branches.append(child.branch, [token])
    return grown


def _next_rows(branches: Branches, nodes: Sequence[_Node]) -> Iterator[Rows]:
    """Rows [n_vocab] of the models that each node's mixes read."""
    found: list[Rows] = [{} for _ in nodes]
    for role in ROLES:
        reading = [i for i, node in enumerate(nodes) if role in roles_of(node.mixes)]
        if reading:
            rows = branches.rows([nodes[i].branch for i in reading], (role,))[role]
            for i, row in zip(reading, rows, strict=True):
                found[i][role] = row
    yield from found


def roles_of(mixes: Sequence[Mix]) -> tuple[str, ...]:
    """Models that at least one of `mixes` reads."""
    return tuple(role for role in ROLES if any(role in mix.roles for mix in mixes))
