"""The mix: L = alpha·large_ins + beta·small_cpt + (1 − alpha − beta)·small_base.

Source: Zhang et al., "Efficient Low-Resource Language Adaptation via Multi-Source Dynamic
Logit Fusion" (TriMix), ACL 2026, arXiv 2604.18106, equation (1). Pure NumPy.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import WeightsError
from trimix_gguf.roles import ROLES

Rows = dict[str, NDArray[np.float32]]  # role -> logits [n_tokens, n_vocab] or [n_vocab]


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
    def coefficients(self) -> dict[str, float]:
        return dict(zip(ROLES, (self.alpha, self.beta, self.remainder), strict=True))

    @property
    def active(self) -> tuple[str, ...]:
        """Roles that the mix reads; a coefficient of 0 leaves its model out."""
        return tuple(role for role, c in self.coefficients.items() if c != 0.0)


@dataclass(frozen=True)
class Method:
    """Fixed weights that stand for a named method, with its plausibility cut-off."""

    weights: Weights
    plausibility_threshold: float = 0.0


METHODS = {
    "large_ins": Method(Weights(1.0, 0.0)),
    "small_cpt": Method(Weights(0.0, 1.0)),
    "small_base": Method(Weights(0.0, 0.0)),
    "proxy-tuning": Method(Weights(1.0, 1.0)),
    # Li et al. 2023 in logits: 1.5·large_ins − 0.5·small_base over tokens that large_ins allows.
    "contrastive": Method(Weights(1.5, 0.0), plausibility_threshold=0.1),
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
    fused: NDArray[np.float32], reference: NDArray[np.float32], plausibility_threshold: float
) -> None:
    """In place: −inf where `reference` [n_vocab] is below threshold × its top probability."""
    if not 0.0 <= plausibility_threshold <= 1.0:
        raise WeightsError(f"plausibility threshold is {plausibility_threshold}; expected 0 to 1")
    if plausibility_threshold > 0.0:
        fused[reference < reference.max() + math.log(plausibility_threshold)] = -np.inf
