"""How sure a metric's value is: the bootstrap over examples, and rank correlation.

`stats` [n_examples, n_stats] are a metric's additive statistics; `value` turns their sum
[n_stats] into the metric. A resample draws n_examples examples with replacement.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trimix_gguf.errors import TrimixError
from trimix_gguf.mixing.scoring import Float64

_CHUNK = 1 << 22  # counts held at once: 32 MB


def bootstrap_interval(
    stats: Float64,
    value: Callable[[Float64], float],
    *,
    seed: int,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval (low, high) of `value` by the percentile bootstrap, at confidence `level`.

    Raises ValueError if there are no examples.
    """
    totals = resampled_totals(stats, seed=seed, n_resamples=n_resamples)
    values = [value(total) for total in totals]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """The difference of two systems, its interval, and how often chance gives as much.

    The paired bootstrap (Koehn 2004): both systems are judged on the same resamples. `p` is
    two-sided and centred: d* − d, a resample's difference minus the observed one, stands for the
    differences of two equal systems:

        p = (1 + #{ |d* − d| ≥ |d| }) / (1 + n_resamples)

    Equal systems get 1; the lowest value is 1 / (1 + n_resamples). sacrebleu's `paired-bs` counts
    |d*| − mean |d*| > |d|, which calls two identical systems different: it is not used here.
    """

    difference: float
    low: float
    high: float
    p: float

    @staticmethod
    def of(observed: float, drawn: Float64, *, level: float = 0.95) -> "Difference":
        """From a difference, and the differences `drawn` [n_resamples] on resamples."""
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        # Differences of a few right answers are often equal: rounding must not separate them.
        n_as_far = np.count_nonzero(np.abs(drawn - observed) >= abs(observed) - 1e-9)
        p = float((1 + n_as_far) / (1 + len(drawn)))
        return Difference(observed, float(low), float(high), p)


def paired_difference(
    ours: Float64,
    theirs: Float64,
    value: Callable[[Float64], float],
    *,
    seed: int,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> Difference:
    """The Difference of two systems on the same examples [n_examples, n_stats].

    Raises ValueError if the shapes differ or there are no examples.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"paired examples have one shape, got {ours.shape} and {theirs.shape}")
    n_stats = ours.shape[1]

    def difference(total: Float64) -> float:
        return value(total[:n_stats]) - value(total[n_stats:])

    both = np.concatenate([ours, theirs], axis=1)
    totals = resampled_totals(both, seed=seed, n_resamples=n_resamples)
    drawn = np.array([difference(total) for total in totals])
    return Difference.of(difference(both.sum(axis=0)), drawn, level=level)


def t_quantile(share: float, n_free: int) -> float:
    """The quantile of Student's t with `n_free` degrees of freedom: `share` of it lies below.

    Raises TrimixError if scipy is not installed.
    """
    return float(_scipy_stats().t.ppf(share, n_free))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of x and y [n], −1 … 1; ties get their mean rank.

    nan if one of them is constant. Raises TrimixError if scipy is not installed.
    """
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return float("nan")
    return float(_scipy_stats().spearmanr(x, y).statistic)


def _scipy_stats() -> Any:
    try:
        import scipy.stats
    except ImportError:
        raise TrimixError("statistics need scipy: pip install 'trimix-gguf[eval]'") from None
    return scipy.stats


def resampled_totals(stats: Float64, *, seed: int, n_resamples: int) -> Float64:
    """Summed statistics [n_resamples, n_stats]: each example times how often it is drawn."""
    n_examples = len(stats)
    if n_examples == 0:
        raise ValueError("a bootstrap needs one example or more, got none")
    rng = np.random.default_rng(seed)
    n_rows = max(1, _CHUNK // n_examples)
    even = np.full(n_examples, 1 / n_examples)
    totals = [
        rng.multinomial(n_examples, even, size=min(n_rows, n_resamples - start)) @ stats
        for start in range(0, n_resamples, n_rows)
    ]
    return np.concatenate(totals)
