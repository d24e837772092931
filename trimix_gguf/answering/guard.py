"""The collapse guard: where a mix repeats itself and large_ins would not, large_ins goes on.

A small model that read much text and few answers falls into loops, and each round makes the next
one likelier (Xu et al. 2022, "Learning to Break the Loop", arXiv 2206.02369). Lists, songs and
code repeat themselves too, but there large_ins expects it.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.mixing.fusion import METHODS, Mix

SPAN = 8  # tokens that come again: two words or so of a language the tokenizer cuts small
_EXPECTED = math.log(0.5)  # large_ins expects a token this close to its likeliest one
_ENOUGH = 6  # tokens of a span that it must expect


class Guard:
    """Watches one answer; `mix` is what its next token is picked from.

    `stepped_in` is the number of tokens after which large_ins went on by itself, or None.
    """

    def __init__(self, mix: Mix) -> None:
        self.mix = mix
        self.stepped_in: int | None = None
        self._ids: list[int] = []
        self._expected: list[bool] = []
        self._seen: set[tuple[int, ...]] = set()

    def take(self, token: int, large_ins: NDArray[np.float32]) -> None:
        """Take in a token that was picked, and large_ins' logits [n_vocab] before it."""
        if self.stepped_in is not None:
            return
        self._ids.append(token)
        self._expected.append(bool(large_ins[token] >= large_ins.max() + _EXPECTED))
        span = tuple(self._ids[-SPAN:])
        if len(span) < SPAN:
            return
        if span in self._seen and sum(self._expected[-SPAN:]) < _ENOUGH:
            self.stepped_in = len(self._ids)
            self.mix = METHODS["large_ins"]
        self._seen.add(span)
