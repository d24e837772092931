"""Prompt lookup: where the newest ids stood before, the same ids may follow again.

Names, quotations and loops repeat word for word, so this drafts them at no cost.
Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from collections.abc import Iterable
from dataclasses import dataclass

LONGEST = 8  # ids that are compared: a longer match does not say more
_SHORTEST = 2
_MOST_PLACES = 32  # the newest places are compared: a space stands in thousands


@dataclass(frozen=True)
class Match:
    """The newest `length` ids stood before, and `token` followed them at `place`."""

    length: int
    place: int
    token: int


class Lookup:
    """The ids of a prompt and its answer so far, indexed by pairs of ids."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # pair -> where the next id stands
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Take in the newest id."""
        if len(self._ids) >= _SHORTEST:
            self._places.setdefault(self._newest, []).append(len(self._ids))
        self._ids.append(token)

    @property
    def _newest(self) -> tuple[int, ...]:
        return tuple(self._ids[-_SHORTEST:])

    def find(self) -> Match | None:
        """The longest match; the newest of several."""
        length = found = 0
        for place in reversed(self._places.get(self._newest, [])[-_MOST_PLACES:]):
            here = self._length(place)
            if here > length:
                length, found = here, place
            if length == LONGEST:
                break
        return Match(length, found, self._ids[found]) if length else None

    def following(self, match: Match, n: int) -> list[int]:
        """The `n` ids after the match; where they reach the newest id, they repeat."""
        period = len(self._ids) - match.place
        return [self._ids[match.place + i % period] for i in range(n)]

    def _length(self, place: int) -> int:
        ids, most = self._ids, min(LONGEST, place)
        length = _SHORTEST
        while length < most and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        return length
