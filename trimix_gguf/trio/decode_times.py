"""What decoding so many ids at once takes, from the times that a model has seen."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_BY_ITSELF, _BY_FOURS = 1.25, 2.0  # how much longer a decode may take: see _credible


def seconds_by_size(times: Mapping[int, Sequence[float]], most: int) -> NDArray[np.float64]:
    """Seconds of decoding 1, 2, … `most` ids at once [most]: medians of the last times.

    `times` are seconds by the number of ids. Sizes not seen, or seen in a busy moment, lie on a
    line between others; infinite below the smallest of these.
    """
    above = min((n for n in times if n >= most), default=0)
    looked_at = {n for n in times if n < most} | {above} - {0}  # few: with small models it costs
    credible = _credible({n: _median(times[n]) for n in looked_at})
    if not credible:
        return np.full(most, np.inf)
    known = sorted(credible)
    medians = [credible[n] for n in known]
    sizes = np.arange(1, most + 1)
    seconds: NDArray[np.float64] = np.interp(sizes, known, medians, left=np.inf)
    beyond = sizes > known[-1]
    seconds[beyond] = medians[-1] * sizes[beyond] / known[-1]
    return seconds


def _credible(times: Mapping[int, float]) -> dict[int, float]:
    """Seconds by ids decoded at once, without those that tell of other work on the machine.

    A batch takes no longer than its ids one by one, and hardly longer than a larger batch (some
    are taken in fours, and the rest one by one). An odd time would else rule a size out for good:
    drafts of that size would never be tried again. Single ids are decoded all the time.
    """
    one, least, kept = times.get(1, math.inf), math.inf, {}
    for n in sorted(times, reverse=True):
        if n == 1 or times[n] <= min(_BY_ITSELF * n * one, _BY_FOURS * least):
            kept[n] = times[n]
            least = min(least, times[n])
    return kept


def _median(times: Iterable[float]) -> float:
    """As statistics.median, in a seventh of its time: with small models, planning costs time."""
    ordered = sorted(times)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
