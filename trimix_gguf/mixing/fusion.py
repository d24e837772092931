"""The mix: L = alpha·large_ins + beta·small_cpt + (1 − alpha − beta)·small_base.

Source: Zhang et al., "Efficient Low-Resource Language Adaptation via Multi-Source Dynamic
Logit Fusion" (TriMix), ACL 2026, arXiv 2604.18106, equation (1). Pure NumPy.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import WeightsError
from trimix_gguf.roles import ROLES, Role

Rows = dict[Role, NDArray[np.float32]]  # role -> logits [n_tokens, n_vocab] or [n_vocab]
NOT_FINITE = "a model gave logits that are not finite; its file may be damaged"


@dataclass(frozen=True)
class Weights:
    """The coefficients of one mix; the remainder goes to small_base and may be negative."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not abs(value) <= 1e6:  # also refuses NaN; float32 logits overflow beyond
                raise WeightsError(f"{name} is {value}; expected a finite number within ±1e6")

    @property
    def remainder(self) -> float:
        """Coefficient of small_base; rounding residue (1 − 0.9 − 0.1) counts as exactly 0."""
        rest = 1.0 - self.alpha - self.beta
        return 0.0 if abs(rest) < 1e-9 else rest

    @property
    def coefficients(self) -> dict[Role, float]:
        """The three factors of the mix, by role."""
        return dict(zip(ROLES, (self.alpha, self.beta, self.remainder), strict=True))

    @property
    def active(self) -> tuple[Role, ...]:
        """Roles that the mix reads; a coefficient of 0 leaves its model out."""
        return tuple(role for role, c in self.coefficients.items() if c != 0.0)


def check_threshold(value: float) -> None:
    """Raises WeightsError where a plausibility threshold is not from 0 to 1."""
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise WeightsError(f"plausibility threshold is {value}; expected 0 to 1")


@dataclass(frozen=True)
class Mix:
    """What a token is chosen from: weights, and a cut-off on what large_ins finds implausible.

    Tokens below `plausibility_threshold` times large_ins' top probability get −inf; 0 masks
    none. Raises WeightsError where the threshold is not from 0 to 1.
    """

    weights: Weights
    plausibility_threshold: float = 0.0

    def __post_init__(self) -> None:
        check_threshold(self.plausibility_threshold)

    @staticmethod
    def of(given: "Weights | Mix") -> "Mix":
        """A Mix as it is; weights as a Mix without a mask."""
        return given if isinstance(given, Mix) else Mix(given)

    @property
    def is_masked(self) -> bool:
        """Whether it has a mask, which gives some tokens probability 0."""
        return self.plausibility_threshold > 0.0

    @property
    def roles(self) -> tuple[Role, ...]:
        """Models that it reads, in the order of ROLES; the mask reads large_ins."""
        reads = {*self.weights.active, *(("large_ins",) if self.is_masked else ())}
        return tuple(role for role in ROLES if role in reads)

    def fuse(self, rows: Rows, unused: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Mix logits of its `roles`, [n_tokens, n_vocab] or [n_vocab]; masked ids are −inf."""
        fused = fuse(rows, self.weights, unused=unused)
        if self.is_masked:
            mask_implausible(fused, rows["large_ins"], self.plausibility_threshold, unused=unused)
        return fused

    def to_json(self) -> dict[str, float]:
        """`alpha` and `beta`; `plausibility_threshold` too where it masks."""
        pair = {"alpha": self.weights.alpha, "beta": self.weights.beta}
        if not self.is_masked:
            return pair
        return {**pair, "plausibility_threshold": self.plausibility_threshold}


# Methods whose mix is fixed; choosing/methods.py has those that choose weights.
METHODS = {
    "large_ins": Mix(Weights(1.0, 0.0)),
    "small_cpt": Mix(Weights(0.0, 1.0)),
    "small_base": Mix(Weights(0.0, 0.0)),
    "proxy-tuning": Mix(Weights(1.0, 1.0)),
    # What 49 of the 56 settings in the scripts of TriMix's authors fix by hand, or nearly.
    "authors-pair": Mix(Weights(0.1, 0.9)),
    # Li et al. 2023 in logits: 1.5·large_ins − 0.5·small_base over tokens that large_ins allows.
    "contrastive": Mix(Weights(1.5, 0.0), plausibility_threshold=0.1),
}


def fuse(
    rows: Rows, weights: Weights, *, unused: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Mix finite float32 logits of the active roles into a new array of the same shape.

    `unused` [n_vocab] ids become −inf, after the mix: −inf times a negative weight is +inf.
    """
    fused: NDArray[np.float32] | None = None
    for role in weights.active:
        c = np.float32(weights.coefficients[role])
        if fused is None:
            fused = rows[role] * c
        else:
            fused += rows[role] * c
    assert fused is not None  # the three coefficients sum to 1
    if unused is not None:
        fused[..., unused] = -np.inf
    return fused


def mask_implausible(
    fused: NDArray[np.float32],
    reference: NDArray[np.float32],
    plausibility_threshold: float,
    *,
    unused: NDArray[np.bool_] | None = None,
) -> None:
    """In place: −inf where `reference` is below threshold × its top probability.

    Both are [n_tokens, n_vocab] or [n_vocab]; `unused` [n_vocab] ids hold no probability. Raises
    WeightsError for a threshold out of range.
    """
    check_threshold(plausibility_threshold)
    if plausibility_threshold > 0.0:
        used = True if unused is None else ~unused
        top = reference.max(-1, keepdims=True, initial=-np.inf, where=used)
        cut_off = top + np.float32(math.log(plausibility_threshold))
        fused[reference < cut_off] = -np.inf


def probability(row: NDArray[np.float32], token: int) -> float:
    """Softmax of one row [n_vocab] at one id."""
    top = float(row.max())
    return math.exp(float(row[token]) - top) / float(np.exp(row - top).sum(dtype=np.float64))
