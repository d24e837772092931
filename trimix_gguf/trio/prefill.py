"""A prompt on its way into the models: what is read next, and which rows of it are wanted.

It is read in portions of units; rows are wanted where they predict a unit that is to be scored,
and after the last unit. A prompt with the same prefix as an earlier one starts behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import PromptError
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.prompt import Prompt, Unit

# How far a prompt has come: units read, and units covered (predicted, or nothing to predict).
PromptMark = tuple[int, int]

StandFor = Callable[[int], NDArray[np.int64]]


@dataclass(frozen=True)
class Window:
    """Rows [n, n_vocab] by role, the ids [n] that they predict, and how far the prompt has come.

    `marks` say after how many of these ids it has come how far: where one scored part ends and
    another begins, and at the window's end. `stand_for` [n] says for how many ids each of them
    counts. The rows are valid until the next decode.
    """

    rows: Rows
    targets: NDArray[np.int64]
    marks: tuple[tuple[int, PromptMark], ...]
    stand_for: NDArray[np.int64]

    @property
    def mark(self) -> PromptMark:
        """How far the prompt has come at the window's end."""
        return self.marks[-1][1]


def is_scored(unit: Unit) -> bool:
    """Whether a unit is to be predicted when a prompt is scored."""
    return unit[1]


class Prefill:
    """Where a prompt stands: `at` of its units are read; `stop` is where reading ends.

    `predicts` tells which units are to be predicted, and `stand_for`, of so many, for how many each
    of them counts, 0 for one that is left out. Without `to_end`, reading stops behind the last of
    those: nothing after it needs a row yet.
    """

    def __init__(
        self,
        prompt: Prompt,
        *,
        predicts: Callable[[Unit], bool] = is_scored,
        stand_for: StandFor | None = None,
        to_end: bool = True,
    ) -> None:
        self.units = prompt.units
        # ends[role][n]: how many ids of `role` the first n units hold.
        self.ends = {role: count_ids(self.units, i) for i, role in enumerate(ROLES)}
        # Units whose id is a target: to be predicted, and every role has something before them.
        started = [all(ends[i] > 0 for ends in self.ends.values()) for i in range(len(self.units))]
        pairs = zip(self.units, started, strict=True)
        self._counts = [int(is_started and predicts(unit)) for unit, is_started in pairs]
        targets = [i for i, count in enumerate(self._counts) if count]
        # By unit, the scored part that it is in: what stands between two parts is not predicted.
        self._part = list(accumulate(1 - count for count in self._counts))
        self.stop = len(self.units) if to_end else max(targets, default=-1) + 1
        self.at = 0
        if stand_for is not None:
            for i, count in zip(targets, stand_for(len(targets)).tolist(), strict=True):
                self._counts[i] = count
        self._is_wanted = [*map(bool, self._counts[1:]), False]  # the rows that predict those
        if self.stop:
            self._is_wanted[self.stop - 1] = True

    def check_fits(self, n_ctx: Mapping[Role, int], n_vocab: int) -> None:
        """Raise PromptError where a role's context is too small for the prompt and one token.

        Or where an id is not in the vocabulary: llama.cpp's samplers would end the process.
        """
        ids = {token for of_roles, _ in self.units for of_role in of_roles for token in of_role}
        if wrong := [token for token in ids if not 0 <= token < n_vocab]:
            raise PromptError(f"there is no token {wrong[0]}; there are 0 to {n_vocab - 1}")
        for role, most in n_ctx.items():
            n = self.ends[role][-1]
            if n >= most:
                raise PromptError(
                    f"the prompt is {n} tokens, and {role}'s context holds {most}; shorten it or "
                    "raise --n-ctx"
                )

    def start(self, n_kept: int, covered: int = 0) -> None:
        """Begin where the first `n_kept` units are read already, and `covered` of them scored.

        What predicts the next unit to score is read again, for its row.
        """
        rest = (i for i in range(max(covered, 1), len(self.units)) if self._counts[i])
        self.at = min(n_kept, next(rest, len(self.units) + 1) - 1)

    def portion(self, n_ids: int, n_rows: int) -> int:
        """Up to which unit to read next, if so many ids and rows are to spare; at least one."""
        end, ids, rows = self.at, 0, 0
        while end < self.stop:
            ids += max(len(of_role) for of_role in self.units[end][0])
            rows += self._is_wanted[end]
            if end > self.at and (ids > n_ids or rows > n_rows):
                break
            end += 1
        return end

    def ids(self, start: int, end: int) -> dict[Role, list[int]]:
        """The ids of the units from `start` to `end`, by role."""
        units = self.units[start:end]
        return {role: [t for ids, _ in units for t in ids[i]] for i, role in enumerate(ROLES)}

    def lengths(self) -> dict[Role, int]:
        """How many ids each role has of the units that are read."""
        return {role: self.ends[role][self.at] for role in ROLES}

    def wanted(self, end: int, role: Role) -> list[int]:
        """Indexes of the ids, up to unit `end`, whose rows are wanted of a role."""
        ends, units = self.ends[role], range(self.at, end)
        return [ends[unit + 1] - 1 for unit in units if self._is_wanted[unit]]

    def take(self, end: int, rows: Rows) -> Window:
        """The units up to `end` are read, and these are the rows [n_wanted, n_vocab]."""
        n_units = min(end + 1, len(self.units))  # those up to `end`, and the one after them
        predicted = [unit for unit in range(self.at + 1, n_units) if self._counts[unit]]
        targets = np.array([self.units[unit][0][0][0] for unit in predicted], dtype=np.int64)
        self.at = end
        before = {role: matrix[: len(targets)] for role, matrix in rows.items()}
        counts = np.array([self._counts[unit] for unit in predicted], dtype=np.int64)
        marks = [
            (n, (unit, unit + 1))
            for n, (unit, after) in enumerate(pairwise(predicted), 1)
            if self._part[unit] != self._part[after]
        ]
        return Window(before, targets, (*marks, (len(targets), (end, n_units))), counts)


def count_ids(units: Sequence[Unit], role: int) -> list[int]:
    """How many ids of a role, by its index, the first 0, 1, … units hold."""
    ends = [0]
    for ids, _ in units:
        ends.append(ends[-1] + len(ids[role]))
    return ends
