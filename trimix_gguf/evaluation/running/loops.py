"""Answers that only repeat themselves, which need not be decoded to their limit.

Greedy decoding of a weak model ends in the same few words over and over, and each round makes the
next one likelier (Xu et al. 2022, "Learning to Break the Loop", arXiv 2206.02369). Where three
rounds are there and every token of the last was likely, what follows is taken for known. One token
again and again, as a number's zeros, is no such loop: it ends.
"""

from collections.abc import Callable

import numpy as np

_LONGEST = 64  # tokens of a round
_ROUNDS, _FEWEST = 3, 24  # that must be there, and tokens in them
_LIKELY = 0.7  # least probability of a token in the last round


class Loop:
    """The tokens of one greedy answer, watched for rounds that go on for ever."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._periods = np.arange(1, _LONGEST + 1)
        self._again = np.zeros(_LONGEST, int)  # newest tokens that stood one period before
        self._n_likely = 0  # newest tokens that were likely, in a third round or later

    def append(self, token: int, probability: Callable[[], float]) -> None:
        """Take in a token; its probability is asked where it belongs to a third round."""
        before = np.full(_LONGEST, -1)
        newest = self._ids[: -_LONGEST - 1 : -1]
        before[: len(newest)] = newest
        self._again = np.where(before == token, self._again + 1, 0)
        self._ids.append(token)
        likely = bool((self._again > self._periods).any()) and probability() >= _LIKELY
        self._n_likely = self._n_likely + 1 if likely else 0

    def rest(self, n: int) -> list[int]:
        """The next `n` tokens of a loop that will not end; none where there is no such loop."""
        length = self._again + self._periods
        settled = (length >= np.maximum(_ROUNDS * self._periods, _FEWEST)) & (
            self._periods <= self._n_likely
        )
        period = int(self._periods[settled.argmax()])  # the shortest
        if period == 1:  # also where none is settled
            return []
        return [self._ids[i % period - period] for i in range(n)]
