"""Answers that only repeat themselves: they need not be decoded up to their limit.

Greedy decoding of a weak model often ends in the same few words again and again, and each round
makes the next one likelier (Xu et al. 2022, "Learning to Break the Loop", arXiv 2206.02369). After
three rounds, if every token of the last one was likely, the rest counts as known. A single token
again and again, such as the zeros of a number, is not such a loop: it ends.
"""

from collections.abc import Callable

import numpy as np

_LONGEST = 64  # tokens of a round
_ROUNDS, _FEWEST = 3, 24  # that must be there, and tokens in them
_LIKELY = 0.7  # least probability of a token in the last round


class Loop:
    """The tokens of one greedy answer, watched for rounds that do not end."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._periods = np.arange(1, _LONGEST + 1)
        self._again = np.zeros(_LONGEST, int)  # newest tokens that stood one period before
        self._n_likely = 0  # newest tokens that were likely, in a third round or later

    def append(self, token: int, probability: Callable[[], float]) -> None:
        """Add a token; its probability is computed only in a third round or later."""
        before = np.full(_LONGEST, -1)
        newest = self._ids[: -_LONGEST - 1 : -1]
        before[: len(newest)] = newest
        self._again = np.where(before == token, self._again + 1, 0)
        self._ids.append(token)
        likely = bool((self._again > self._periods).any()) and probability() >= _LIKELY
        self._n_likely = self._n_likely + 1 if likely else 0

    def rest(self, n: int) -> list[int]:
        """The next `n` tokens of a loop that will not end; an empty list if there is none."""
        length = self._again + self._periods
        settled = (length >= np.maximum(_ROUNDS * self._periods, _FEWEST)) & (
            self._periods <= self._n_likely
        )
        period = int(self._periods[settled.argmax()])  # the shortest
        if period == 1:  # also where none is settled
            return []
        return [self._ids[i % period - period] for i in range(n)]
