"""Grid scoring: rows of logits -> negative log-likelihood at every (alpha, beta).

With b = small_base, dA = large_ins − b and dC = small_cpt − b, the partition function factors,

    S(α,β) = Σ_v exp(b_v + α·dA_v + β·dC_v) = Σ_v [exp(α·dA_v)] · [exp(b_v + β·dC_v)],

so a whole grid is one matrix product X·Yᵀ over the vocabulary. And X's rows follow from one
another by products, exp(α₂·dA) = exp(α₁·dA) · exp((α₂ − α₁)·dA), so an evenly spaced grid of any
size costs four exponentials a token id. Ids whose factors leave the range of float32 are summed
apart, in float64. Pure NumPy; nats throughout.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ModelError, WeightsError
from trimix_gguf.machine.threads import run_all
from trimix_gguf.mixing.fusion import NOT_FINITE, Weights

GRID = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # published, for alpha and for beta
WITH_CORNERS = (0.0, *GRID)  # each single model is a corner of its square
CONTINUOUS_RANGE = (-0.5, 1.5)  # where the continuous optimum is looked for, in each weight
N_CHEBYSHEV = 13

_FACTORS = 700_000  # most numbers in a block of both factors: 2.8 MB, for the last-level cache
_PRODUCT = 250_000  # most multiplications a product: OpenBLAS wakes its threads above 262,144
_MOST_NATS = 700.0
_MOST = 35.0  # X, Y ≤ e^35: no product overflows float32, and what underflows is < e^−50
_LEAST = -85.0  # a factor below e^−85 has lost digits: nothing may be multiplied up from it
_ODD = 4096  # ids outside of that range at once

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


def perplexity_of(mean_nll: float) -> float:
    """exp of the mean nats; at most e^700, so that it is a number in JSON too."""
    return math.exp(min(mean_nll, _MOST_NATS))


def grid_token_nlls(
    *,
    large_ins: Float32,
    small_cpt: Float32,
    small_base: Float32,
    targets: Sequence[int] | NDArray[np.integer],
    alphas: Sequence[float],
    betas: Sequence[float],
    unused: NDArray[np.bool_] | None = None,
    n_threads: int = 1,
) -> Float64:
    """Nats of each target under the mix at each grid point: float64 [n_tokens, n_alpha, n_beta].

    Logits are float32 [n_tokens, n_vocab], finite; `targets` [n_tokens] are the token ids that
    the rows predict; `unused` bool [n_vocab] ids hold no probability. Within 1e-4 nats a token
    of a float64 log-softmax. Raises ModelError where a row is not finite.
    """
    a, b = np.asarray(alphas, np.float64), np.asarray(betas, np.float64)
    ids = np.asarray(targets, dtype=np.int64)
    n_tokens, n_vocab = large_ins.shape
    if len(ids) != n_tokens or not large_ins.shape == small_cpt.shape == small_base.shape:
        raise ValueError("logits and targets must agree: [n_tokens, n_vocab] and [n_tokens]")
    if n_tokens and not (ids.min() >= 0 and ids.max() < n_vocab):
        raise ValueError(f"targets must lie in 0 … {n_vocab - 1}")

    nll = np.empty((n_tokens, len(a), len(b)))

    def fill(part: range) -> None:
        work = _workspace(len(a), len(b))
        n_at_once = max(1, work.shape[1] // n_vocab)
        for t in range(part.start, part.stop, n_at_once):
            rows = slice(t, min(t + n_at_once, part.stop))
            block = large_ins[rows], small_cpt[rows], small_base[rows]
            nll[rows] = _rows_nll(*block, ids[rows], a, b, unused, work)

    n_parts = max(1, min(n_threads, n_tokens))
    ends = [n_tokens * k // n_parts for k in range(n_parts + 1)]
    parts = [range(first, end) for first, end in zip(ends, ends[1:], strict=False)]
    if n_parts > 1:
        run_all(_pool(n_threads), fill, parts)
    else:
        fill(*parts)
    return nll


def large_ins_slopes(
    *,
    large_ins: Float32,
    small_cpt: Float32,
    small_base: Float32,
    targets: Sequence[int] | NDArray[np.integer],
    unused: NDArray[np.bool_] | None = None,
    n_threads: int = 1,
) -> Float64:
    """How the NLL of each target changes with alpha and beta at large_ins: [n_tokens, 2], nats.

    Arrays as in grid_token_nlls. The derivative of a token's log-partition is the mean of
    (large_ins − small_base, small_cpt − small_base) under large_ins; that of its NLL is this less
    the same at the target.
    """
    ids = np.asarray(targets, dtype=np.int64)
    slopes = np.empty((len(ids), 2))

    def fill(rows: range) -> None:
        for t in rows:
            large, base, cpt = large_ins[t], small_base[t], small_cpt[t]
            p = np.exp(large - large.max())
            if unused is not None:
                p[unused] = 0.0
            total = p.sum(dtype=np.float64)
            # p·(m − base), in parts: no difference of whole rows is made.
            means = [float(p @ m) / total for m in (large, cpt, base)]
            at = [float(m[ids[t]]) for m in (large, cpt, base)]
            slopes[t] = [means[i] - means[2] - (at[i] - at[2]) for i in (0, 1)]

    n_parts = max(1, min(n_threads, len(ids)))
    run_all(_pool(n_threads), fill, [range(k, len(ids), n_parts) for k in range(n_parts)])
    return slopes


def strays(
    nll: Float64, slopes: Float64, alphas: Sequence[float], betas: Sequence[float]
) -> Float64:
    """KL(large_ins ‖ mix) at each grid point, summed over the tokens of `nll`: [n_alpha, n_beta].

    `nll` are summed nats over the grid, which holds (1, 0); `slopes` are large_ins_slopes of the
    same tokens. The log-partition A is convex in the weights g, and KL(h ‖ g) is its Bregman
    divergence A(g) − A(h) − ∇A(h)·(g − h); a target's logit is linear in g, so that of the NLL is
    the same.
    """
    a, b = np.asarray(alphas, np.float64)[:, None], np.asarray(betas, np.float64)[None, :]
    here = nll[list(alphas).index(1.0), list(betas).index(0.0)]
    return np.asarray(nll - here - (a - 1.0) * slopes[0] - b * slopes[1])


@lru_cache(maxsize=1)
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="grid-nll")


def _rows_nll(large, cpt, base, targets, alphas, betas, unused, work) -> Float64:
    """Nats of `targets` [n] after rows [n, n_vocab] at each grid point: [n, n_alpha, n_beta]."""
    at = np.arange(len(targets))
    pivots = _pivots(cpt, unused)
    # Log-partitions relative to the pivots, less the targets' logits relative to them.
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is refused below
        gain = [m[at, targets].astype(np.float64) - m[at, pivots] for m in (large, cpt, base)]
        dA, dC, b = (g[:, None, None] for g in (gain[0] - gain[2], gain[1] - gain[2], gain[2]))
        logits = b + alphas[:, None] * dA + betas * dC
        sums, apart = _separable_partition(large, cpt, base, pivots, alphas, betas, unused, work)
        nll: Float64 = np.log(sums) - logits
    for t, odd in apart.items():
        row = large[t], cpt[t], base[t]
        _check_finite(*row)
        nll[t] = _log_sum_with(sums[t], odd, *row, pivots[t], alphas, betas) - logits[t]
    if unused is not None:
        nll[unused[targets]] = np.inf
    return nll


def _check_finite(*rows: Float32) -> None:
    if not all(np.isfinite(row).all() for row in rows):
        raise ModelError(NOT_FINITE)


def _pivots(cpt: Float32, unused: NDArray[np.bool_] | None) -> NDArray[np.intp]:
    """The origins of all exponents: any id makes S ≥ 1, small_cpt's top one keeps X, Y small."""
    top = cpt.argmax(axis=1)
    if unused is None or not unused[top].any():
        return np.asarray(top)
    return np.asarray(np.where(unused, -np.inf, cpt).argmax(axis=1))


def _workspace(n_alpha: int, n_beta: int) -> Float32:
    """Room for one block of both factors and of what they are made from."""
    n_rows = n_alpha + n_beta
    return np.empty((n_rows + 4, max(256, _FACTORS // n_rows)), np.float32)


def _separable_partition(
    large, cpt, base, pivots, alphas, betas, unused, work
) -> tuple[Float64, dict[int, NDArray[np.intp]]]:
    """S(α,β) over exp of the pivots' logits, float64 [n, n_alpha, n_beta], of rows [n, n_vocab].

    Ids whose factors leave the safe range are not in the sums; they come by row.
    """
    (n_rows, n_vocab), n_a, n_b = base.shape, len(alphas), len(betas)
    width = max(256, work.shape[1] // n_rows)
    step = max(256, _PRODUCT // (n_a * n_b))
    order_a, order_b = np.argsort(alphas), np.argsort(betas)
    alphas, betas = alphas[order_a], betas[order_b]
    pivot_logits = [m[np.arange(n_rows), pivots][:, None] for m in (large, cpt, base)]
    total = np.zeros((n_rows, n_a, n_b))
    apart: dict[int, NDArray[np.intp]] = {}
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, n_vocab, width):
            part = slice(start, min(start + width, n_vocab))
            shape = len(work), n_rows, part.stop - start
            block = work[:, : shape[1] * shape[2]].reshape(shape)
            d_large, d_cpt, origin, scratch, *_ = block
            x, y = block[4 : 4 + n_a], block[4 + n_a :]
            for m, at_pivot, out in zip((large, cpt, base), pivot_logits, block[:3], strict=True):
                np.subtract(m[:, part], at_pivot, out=out)
            block[:2] -= origin
            odd = [
                _exponentials(x, None, d_large, alphas, scratch),
                _exponentials(y, origin, d_cpt, betas, scratch),
            ]
            if unused is not None and unused[part].any():
                y[:, :, unused[part]] = 0.0
            if any(map(len, odd)):
                _take_apart(apart, np.unique(np.concatenate(odd)), x, y, start)
            total += _product(x, y, step)
    if unused is not None:
        apart = {t: ids[~unused[ids]] for t, ids in apart.items()}
    return total[:, np.argsort(order_a)][:, :, np.argsort(order_b)], apart


def _take_apart(apart, odd, x, y, start) -> None:
    """Remove the places `odd` [n] of [rows, width] from both factors; add the ids, by row."""
    rows, ids = np.divmod(odd, x.shape[2])
    x[:, rows, ids] = y[:, rows, ids] = 0.0
    for t in np.unique(rows).tolist():
        own = start + ids[rows == t]
        apart[t] = np.concatenate((apart[t], own)) if t in apart else own


def _product(x: Float32, y: Float32, step: int) -> Float64:
    """X·Yᵀ [n, n_alpha, n_beta] of factors [·, n, width], `step` ids to a product."""
    n_rows, width = x.shape[1:]
    whole = width // step * step
    parts = (m[:, :, :whole].reshape(len(m), n_rows, -1, step) for m in (x, y))
    left, right = (m.transpose(1, 2, 0, 3) for m in parts)
    total: Float64 = (left @ right.transpose(0, 1, 3, 2)).sum(axis=1, dtype=np.float64)
    rest = (m[:, :, whole:].transpose(1, 0, 2) for m in (x, y))
    return total + next(rest) @ next(rest).transpose(0, 2, 1)


def _exponentials(rows, start, slope, weights, scratch) -> NDArray[np.intp]:
    """rows[i] = exp(start + weights[i]·slope), weights rising; the places outside the safe range.

    A line is between its ends, so the first and the last row bound it.
    """
    last, first = rows[-1], scratch
    for weight, line in ((weights[-1], last), (weights[0], first)):
        np.multiply(slope, np.float32(weight), out=line)
        if start is not None:
            line += start
    # `<=` and `>=` are False for NaN too, which comes of logits that are not finite.
    odd = [
        np.flatnonzero(~is_safe(line, limit))
        for line, worst, is_safe, limit in (
            (last, last.max(), np.less_equal, _MOST),
            (first, first.max(), np.less_equal, _MOST),
            (first, first.min(), np.greater_equal, _LEAST),
        )
        if not is_safe(worst, limit)
    ]
    np.exp(first, out=rows[0])
    gap = None
    for i in range(1, len(weights)):
        previous, gap = gap, round(weights[i] - weights[i - 1], 9)
        if gap != previous:
            np.multiply(slope, np.float32(gap), out=scratch)
            np.exp(scratch, out=scratch)
        np.multiply(rows[i - 1], scratch, out=rows[i])
    return np.concatenate(odd) if odd else np.empty(0, np.intp)


def _log_sum_with(sums, odd, large, cpt, base, pivot, alphas, betas) -> Float64:
    """log(sums + S of the `odd` ids) at each grid point, [n_alpha, n_beta], in float64."""
    total, scale = sums, np.zeros_like(sums)  # the sum is total · exp(scale)
    for start in range(0, len(odd), _ODD):
        ids = odd[start : start + _ODD]
        d_large, d_cpt, b = (
            m[ids].astype(np.float64) - float(m[pivot]) for m in (large, cpt, base)
        )
        lines = b + alphas[:, None] * (d_large - b)
        exponents = lines[:, None, :] + betas[:, None] * (d_cpt - b)
        top = np.maximum(scale, exponents.max(axis=-1))
        here = np.exp(exponents - top[:, :, None]).sum(axis=-1)
        total, scale = total * np.exp(scale - top) + here, top
    logs: Float64 = np.log(total) + scale
    return logs


def grid_entropy(*, large_ins, small_cpt, small_base, alphas, betas, unused=None) -> Float64:
    """Entropy in nats of one fused row [n_vocab] at each grid point: float64 [n_alpha, n_beta]."""
    _check_finite(large_ins, small_cpt, small_base)
    entropy = np.empty((len(alphas), len(betas)))
    large, cpt, base = (m.astype(np.float64) for m in (large_ins, small_cpt, small_base))
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            fused = base + alpha * (large - base) + beta * (cpt - base)
            if unused is not None:
                fused[unused] = -np.inf
            p = np.exp(fused - fused.max())
            p /= p.sum()
            entropy[i, j] = -(p[p > 0] * np.log(p[p > 0])).sum()
    return entropy


def lowest(grid: Float64, alphas: Sequence[float], betas: Sequence[float]) -> Weights:
    """The grid point with the lowest value; the first in grid order on a tie. WeightsError."""
    if grid.size == 0:
        raise WeightsError("the grid has no point; give at least one alpha and one beta")
    i, j = np.unravel_index(int(np.argmin(grid)), grid.shape)
    return Weights(float(alphas[int(i)]), float(betas[int(j)]))


def chebyshev_nodes(n: int = N_CHEBYSHEV) -> tuple[float, ...]:
    """Chebyshev points over CONTINUOUS_RANGE: where a grid determines the smooth NLL surface."""
    low, high = CONTINUOUS_RANGE
    x = np.polynomial.chebyshev.chebpts1(n)
    return tuple(float(v) for v in low + (high - low) * (x + 1) / 2)


def continuous_optimum(nll: Float64) -> Weights:
    """Minimum over CONTINUOUS_RANGE² of the NLL known at chebyshev_nodes() in each weight.

    The NLL is convex and analytic in (α, β) — a log-sum-exp of linear functions minus a linear
    one — so its Chebyshev interpolant is accurate far below the differences that matter, and
    one pass over the prompt replaces an optimiser that would read it again at every step.
    """
    coefficients = _chebyshev_coefficients(nll)
    centre, half = np.zeros(2), 1.0
    for _ in range(24):  # zoom, slowly: along a narrow slanted valley the best mesh point is off
        axes = [np.clip(c + half * np.linspace(-1, 1, 33), -1, 1) for c in centre]
        mesh = np.polynomial.chebyshev.chebgrid2d(axes[0], axes[1], coefficients)
        i, j = np.unravel_index(int(np.argmin(mesh)), mesh.shape)
        centre, half = np.array([axes[0][i], axes[1][j]]), half / 2
    low, high = CONTINUOUS_RANGE
    alpha, beta = low + (high - low) * (centre + 1) / 2
    return Weights(float(alpha), float(beta))


def interpolate(nll: Float64, weights: Weights) -> float:
    """NLL at any point of CONTINUOUS_RANGE², from its values at chebyshev_nodes()."""
    low, high = CONTINUOUS_RANGE
    x, y = (2 * (w - low) / (high - low) - 1 for w in (weights.alpha, weights.beta))
    return float(np.polynomial.chebyshev.chebval2d(x, y, _chebyshev_coefficients(nll)))


def _chebyshev_coefficients(nll: Float64) -> Float64:
    n = len(nll)
    nodes = np.polynomial.chebyshev.chebpts1(n)
    inverse = np.linalg.inv(np.polynomial.chebyshev.chebvander(nodes, n - 1))
    return np.asarray(inverse @ nll @ inverse.T)


def parse_grid(text: str) -> tuple[float, ...]:
    """'0.1,0.5,1' -> (0.1, 0.5, 1.0); raises WeightsError for anything but finite numbers."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(v) for v in values) or len(set(values)) < len(values):
        raise WeightsError(
            f"grid {text!r} is neither 'continuous' nor different finite numbers such as 0.1,0.5,1"
        )
    return values
