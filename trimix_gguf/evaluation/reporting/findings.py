"""What a run shows beyond its scores: whether perplexity guides, and where the weights lie."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from trimix_gguf.evaluation.reporting.statistics import spearman
from trimix_gguf.evaluation.reporting.summary import ChosenWeights, Guidance, Surface
from trimix_gguf.mixing.scoring import Float64


def surface(nll: Float64, n_scored: Float64, metric: Float64) -> Surface:
    """Whether points of lower perplexity answer better: both over the grid, and Spearman's rho.

    `nll` [n, n_grid, n_grid] are summed nats; their mean is macro: over the mean of each prompt.
    rho is below 0 if low perplexity goes with a high metric [n_grid, n_grid].
    """
    mean_nll = (nll / n_scored[:, None, None]).mean(axis=0)
    rho = spearman(mean_nll.ravel(), metric.ravel())
    return {"mean_nll": mean_nll.tolist(), "metric": metric.tolist(), "spearman": number(rho)}


def chosen(weights: Float64, grid: Sequence[float]) -> ChosenWeights:
    """How often a method's weights [n, 2] lie at each point of grid², and which one is higher.

    `mean_ratio` is the mean of beta / alpha over examples with alpha above 0; `off_grid` counts
    examples between the points.
    """
    alpha, beta = weights.T
    counts = [
        [int(np.all(np.abs(weights - (a, b)) < 1e-6, axis=1).sum()) for b in grid] for a in grid
    ]
    some = alpha > 0
    return {
        "beta_above_alpha": float((beta > alpha).mean()),
        "mean_ratio": float((beta[some] / alpha[some]).mean()) if some.any() else None,
        "counts": counts,
        "off_grid": len(weights) - int(np.sum(counts)),
    }


def divergences(nll: Float64, axis: Sequence[float]) -> Float64:
    """KL(small_cpt || small_base) in nats, summed over each prompt's tokens [n], without logits.

    With base b, cpt c, target y and Z(beta) = Σ_v exp(b_v + beta (c_v − b_v)), the row alpha = 0
    of `nll` [n, n_axis, n_axis] is N(beta) = log Z(beta) − b_y − beta (c_y − b_y), summed. Then

        N'(1)       = E_cpt[c − b] − (c_y − b_y)
        N(0) − N(1) = log Z(0) − log Z(1) + (c_y − b_y)

    and their sum, in which the target cancels, is E_cpt[log p_cpt − log p_base]: exactly the
    divergence, for any text. N' is that of the polynomial through the axis' nodes: its error is
    0.001 nats per token where small models diverge by 3, and less where they are closer.
    """
    row = nll[:, axis.index(0.0)]
    at_base, at_cpt = axis.index(0.0), axis.index(1.0)
    slope = row @ derivative_weights(axis, 1.0)
    return np.asarray(slope + row[:, at_base] - row[:, at_cpt])


def derivative_weights(nodes: Sequence[float], at: float) -> Float64:
    """w [n_nodes] so that Σ w_j p(node_j) = p'(at) for every polynomial p of degree < n_nodes."""
    powers = np.arange(len(nodes))
    slopes = np.array([k * at ** (k - 1) if k else 0.0 for k in powers])
    return np.linalg.solve(np.vander(nodes, increasing=True).T, slopes)


def guidance(nll: Float64, n_scored: Float64, beta: Float64, axis: Sequence[float]) -> Guidance:
    """Whether beta [n] is higher where small_cpt differs more from small_base: Spearman's rho.

    The difference is their divergence, in nats per token of the prompt.
    """
    divergence = divergences(nll, axis) / n_scored
    return {
        "mean_divergence": float(divergence.mean()),
        "spearman": number(spearman(divergence, beta)),
    }


def gap_closed(values: Mapping[str, float], start: str, end: str) -> dict[str, float]:
    """How far each other method gets on the way from `start` (0) to `end` (1).

    Empty if one of the two is absent, or `end` is not above `start`.
    """
    if start not in values or end not in values or values[end] <= values[start]:
        return {}
    whole = values[end] - values[start]
    others = (name for name in values if name not in (start, end))
    return {name: (values[name] - values[start]) / whole for name in others}


def number(value: float) -> float | None:
    """The value, or None for nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
