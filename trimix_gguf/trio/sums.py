"""Running sums over a prompt: a prompt with the same prefix is not scored again from its start.

They belong to whoever owns the cache that holds the prompt.
"""

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trimix_gguf.mixing.scoring import Float64
from trimix_gguf.trio.prefill import PromptMark
from trimix_gguf.trio.prompt import Unit, n_same


@dataclass(frozen=True)
class Points:
    """What is summed: nats over `alphas` × `betas`, which hold the points (0 | 1, 0 | 1).

    A token counts `keep` times less one token later; 1 counts all alike. With `sloped`,
    scoring.large_ins_slopes are summed too. Of `stride` tokens one is scored, and stands for the
    others; of 1 all are, and below it fewer the later they stand (choosing/subset.py).
    """

    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    sloped: bool = False
    keep: float = 1.0
    stride: int = 1


@dataclass(frozen=True)
class Sum:
    """Nats [n_alpha, n_beta] of the first `n_tokens` scored tokens, at a mark of the prompt.

    `slopes` [2] are scoring.large_ins_slopes of the same tokens, zeros where nobody wants them.
    """

    mark: PromptMark
    nll: Float64
    n_tokens: int
    slopes: Float64


@dataclass
class PrefixSums:
    """The sums at each stop on the way through a prompt of `units`."""

    points: Points = Points()
    units: Sequence[Unit] = ()
    sums: list[Sum] = field(default_factory=list)

    @property
    def newest(self) -> Sum:
        """The last sum; zeros before the first."""
        if self.sums:
            return self.sums[-1]
        shape = len(self.points.alphas), len(self.points.betas)
        return Sum((0, 0), np.zeros(shape), 0, np.zeros(2))

    def add(self, mark: PromptMark, nll: Float64, n_tokens: int, slopes: Float64) -> None:
        """Take in what the next scored tokens came to, up to a mark."""
        before, kept = self.newest, self.points.keep**n_tokens
        n = before.n_tokens + n_tokens
        self.sums.append(Sum(mark, kept * before.nll + nll, n, before.slopes + slopes))

    def for_prompt(self, units: Sequence[Unit], points: Points, n_kept: int) -> "PrefixSums":
        """Those that hold for a prompt of `units`, where `n_kept` are in the cache."""
        if points != self.points:
            return PrefixSums(points, units)
        same = n_same(self.units, units)
        held = [s for s in self.sums if s.mark[1] <= same and s.mark[0] <= n_kept]
        return PrefixSums(points, units, held)

    def without(self, start: int, end: int) -> "PrefixSums":
        """Those of the units without a range, which begins and ends beside scored parts.

        What follows the range keeps its nats, which are those of a text that had it.
        """
        before = [s for s in self.sums if s.mark[1] <= start]
        in_range = [s for s in self.sums if start < s.mark[1] <= end]
        kept = PrefixSums(self.points, [*self.units[:start], *self.units[end:]], before)
        first, last = kept.newest, (in_range or [kept.newest])[-1]
        for s in self.sums:
            if s.mark[1] > end:
                (n_read, n_covered), n = s.mark, s.n_tokens - last.n_tokens
                mark = n_read - (end - start), n_covered - (end - start)
                nll = s.nll + self.points.keep**n * (first.nll - last.nll)
                slopes = s.slopes + first.slopes - last.slopes
                kept.sums.append(Sum(mark, nll, first.n_tokens + n, slopes))
        return kept

    def to_json(self) -> dict[str, Any]:
        """What from_json reads."""
        sums = [[s.mark, s.nll.tolist(), s.n_tokens, s.slopes.tolist()] for s in self.sums]
        return {"points": asdict(self.points), "units": self.units, "sums": sums}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "PrefixSums":
        """From what to_json gave, after JSON made lists of its tuples.

        Raises KeyError, TypeError or ValueError where it is something else.
        """
        axes = {name: tuple(saved["points"][name]) for name in ("alphas", "betas")}
        points = Points(**{**saved["points"], **axes})
        sums = [
            Sum(
                (operator.index(mark[0]), operator.index(mark[1])),
                np.array(nll, dtype=np.float64).reshape(len(points.alphas), len(points.betas)),
                operator.index(n),
                np.array(slopes, dtype=np.float64).reshape(2),
            )
            for mark, nll, n, slopes in saved["sums"]
        ]
        units = [
            (tuple(tuple(map(operator.index, i)) for i in ids), bool(scored))
            for ids, scored in saved["units"]
        ]
        return PrefixSums(points=points, units=units, sums=sums)
