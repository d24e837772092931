"""The weights at which a run scores prompts: the published grid, and 0."""

import numpy as np

from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import GRID, WITH_CORNERS, Float64, lowest

# With 0, the single models and Proxy Tuning are corners of the grid.
AXIS = WITH_CORNERS


def on_grid(nll: Float64) -> Float64:
    """The part of `nll` [n_axis, n_axis] that lies on GRID²."""
    inner = [AXIS.index(weight) for weight in GRID]
    return nll[np.ix_(inner, inner)]


def lowest_on_grid(nll: Float64) -> Weights:
    """The point of GRID² with the lowest of `nll` [n_axis, n_axis]."""
    return lowest(on_grid(nll), GRID, GRID)
