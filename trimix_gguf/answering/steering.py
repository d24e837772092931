"""What an answer's next token is picked from: one mix, or one that follows what was written."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.choosing.methods import AUTO
from trimix_gguf.choosing.score import Score
from trimix_gguf.choosing.selection import TOKEN_KEEP, Selection
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import METHODS, Mix, Rows
from trimix_gguf.mixing.scoring import Float64, grid_token_nlls, lowest
from trimix_gguf.roles import ROLES, Role

LARGE_INS = METHODS["large_ins"].weights
SPAN = 8  # tokens that come again: two words or so of a language that the tokenizer cuts small
_EXPECTED = math.log(0.5)  # large_ins expects a token this close to its likeliest one
_ENOUGH = 6  # tokens of a span that it must expect


class Steering:
    """One mix from the first token to the last; others follow what was written."""

    # Models whose newest rows it may ask to see, to say whether the mix may go on.
    consults: tuple[Role, ...] = ()

    def __init__(self, mix: Mix) -> None:
        self.mix = mix

    @property
    def roles(self) -> tuple[Role, ...]:
        """Models whose rows it wants for the next token."""
        return self.mix.roles

    @property
    def n_owed(self) -> int:
        """Newest tokens for which it has to `see` rows before another one is picked."""
        return 0

    def take(self, token: int, rows: Rows) -> None:
        """Take in a token, and the rows [n_vocab] by role that it was picked from."""

    def see(self, rows: Rows) -> None:
        """Take in the rows [n_owed, n_vocab] of what it consults that these tokens follow."""


def steering_of(selection: Selection, unused: NDArray[np.bool_] | None) -> Steering:
    """How a choice of weights goes on while an answer is written."""
    if selection.follows is not None and selection.score is not None:
        return Following(selection.mix, selection.score, selection.follows.nll, unused)
    if selection.method == AUTO and selection.weights != LARGE_INS:
        return Guard(selection.mix)
    return Steering(selection.mix)


class Guard(Steering):
    """The collapse guard: where a mix repeats itself and large_ins would not, large_ins goes on.

    A small model that read much text and few answers falls into loops, and each round makes the
    next one likelier (Xu et al. 2022, "Learning to Break the Loop", arXiv 2206.02369). Lists,
    songs and code repeat themselves too, but there large_ins expects it. A mix without large_ins
    has it read only while a span comes again. `stepped_in` is the number of tokens after which
    large_ins went on by itself, or None.
    """

    def __init__(self, mix: Mix) -> None:
        super().__init__(mix)
        self.stepped_in: int | None = None
        self.consults = ROLES[:1]
        self._ids: list[int] = []
        self._expected: list[bool | None] = []  # None: not seen yet
        self._seen: set[tuple[int, ...]] = set()
        self._comes_again = False  # the newest span

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those of the mix, and large_ins while what comes was there before."""
        reads = {*self.mix.roles, *(self.consults if self._comes_again else ())}
        return tuple(role for role in ROLES if role in reads)

    @property
    def n_owed(self) -> int:
        """From the oldest token of a span that comes again and whose row was not seen."""
        newest = self._expected[-SPAN:]
        if self.stepped_in is not None or not self._comes_again or None not in newest:
            return 0
        return SPAN - newest.index(None)

    def take(self, token: int, rows: Rows) -> None:
        """Let large_ins go on after a span that came again and that it did not expect."""
        if self.stepped_in is not None:
            return
        row = rows.get(ROLES[0])
        self._ids.append(token)
        self._expected.append(None if row is None else _expects(row, token))
        span = tuple(self._ids[-SPAN:])
        self._comes_again = span in self._seen
        if len(span) == SPAN:
            self._seen.add(span)
        self._judge()

    def see(self, rows: Rows) -> None:
        """Judge the newest span, whose tokens' rows are known now."""
        first = len(self._ids) - self.n_owed
        for at, row in enumerate(rows[ROLES[0]], first):
            self._expected[at] = _expects(row, self._ids[at])
        self._judge()

    def _judge(self) -> None:
        n_expected = self._expected[-SPAN:].count(True)
        if self._comes_again and self.n_owed == 0 and n_expected < _ENOUGH:
            self.stepped_in = len(self._ids)
            self.mix = replace(self.mix, weights=LARGE_INS)


def _expects(row: NDArray[np.float32], token: int) -> bool:
    return bool(row[token] >= row.max() + _EXPECTED)


class Following(Steering):
    """Weights of each token: lowest NLL of prompt and answer, where older tokens count less."""

    def __init__(
        self, mix: Mix, score: Score, nll: Float64, unused: NDArray[np.bool_] | None
    ) -> None:
        super().__init__(mix)
        self._score, self._nll, self._unused = score, nll, unused
        at = [
            [axis.index(w) for w in grid] for axis, grid in zip(self._axes, score.grid, strict=True)
        ]
        self._on_grid = np.ix_(*at)

    @property
    def _axes(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self._score.alphas, self._score.betas

    @property
    def roles(self) -> tuple[Role, ...]:
        """All: each is a part of what is compared."""
        return ROLES

    def take(self, token: int, rows: Rows) -> None:
        """Choose again, with this token's NLL over the grid."""
        one: Mapping[str, NDArray[np.float32]] = {role: rows[role][None] for role in ROLES}
        alphas, betas = self._axes
        newest = grid_token_nlls(
            **one,
            targets=[token],
            alphas=alphas,
            betas=betas,
            unused=self._unused,
            n_threads=available_cores(),
        )
        self._nll = TOKEN_KEEP * self._nll + newest[0]
        weights = lowest(self._nll[self._on_grid], *self._score.grid)
        self.mix = replace(self.mix, weights=weights)
