"""Running sums over a prompt: a prompt with the same prefix is not scored again from its start.

They belong to whoever owns the cache that holds the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimix_gguf.mixing.scoring import Float64
from trimix_gguf.trio.prefill import PromptMark
from trimix_gguf.trio.prompt import Unit

Axes = tuple[tuple[float, ...], tuple[float, ...]]  # alphas and betas that sums are over


@dataclass(frozen=True)
class Sum:
    """Nats [n_alpha, n_beta] of the first `n_tokens` scored tokens, at a mark of the prompt."""

    mark: PromptMark
    nll: Float64
    n_tokens: int


@dataclass
class PrefixSums:
    """The sums at each stop on the way through a prompt of `units`."""

    axes: Axes = ((), ())
    units: Sequence[Unit] = ()
    sums: list[Sum] = field(default_factory=list)

    @property
    def newest(self) -> Sum:
        """The last sum; zeros before the first."""
        if self.sums:
            return self.sums[-1]
        return Sum((0, 0), np.zeros((len(self.axes[0]), len(self.axes[1]))), 0)

    def add(self, mark: PromptMark, nll: Float64, n_tokens: int) -> None:
        """Take in nats of the next scored tokens, up to a mark."""
        before = self.newest
        self.sums.append(Sum(mark, before.nll + nll, before.n_tokens + n_tokens))

    def for_prompt(self, units: Sequence[Unit], axes: Axes, n_kept: int) -> "PrefixSums":
        """Those that hold for a prompt of `units` over `axes`, where `n_kept` are in the cache."""
        if axes != self.axes:
            return PrefixSums(axes, units)
        pairs = enumerate(zip(self.units, units, strict=False))
        n_same = next((i for i, (a, b) in pairs if a != b), min(len(self.units), len(units)))
        held = [s for s in self.sums if s.mark[1] <= n_same and s.mark[0] <= n_kept]
        return PrefixSums(axes, units, held)

    def to_json(self) -> dict[str, Any]:
        """What from_json reads."""
        marks = [[s.mark, s.nll.tolist(), s.n_tokens] for s in self.sums]
        return {"key": self.axes, "units": self.units, "marks": marks}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "PrefixSums":
        """From what to_json gave, after JSON made lists of its tuples."""
        return PrefixSums(
            axes=(tuple(saved["key"][0]), tuple(saved["key"][1])),
            units=[(tuple(tuple(i) for i in ids), scored) for ids, scored in saved["units"]],
            sums=[Sum((m[0], m[1]), np.asarray(nll), n) for m, nll, n in saved["marks"]],
        )
