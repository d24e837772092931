"""Which tokens of a prompt are scored: all, so many, or enough for a choice of weights.

A choice does not need every token, and the rows of a token over a large vocabulary cost up to half
of its reading. Whether a token is scored depends on its place only, neither
on the length of the prompt nor on how it is read: so the sums over a prefix hold for each prompt
that begins with it, and a request chooses the same weights alone and among others.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import WeightsError

ScoreTokens = int | Literal["auto", "all"]
ALL = 1  # the stride that scores each token
FREE, LEASHED = 0, -1  # strides that grow with the place: for any mix, or one close to large_ins
N_FIRST = 32  # tokens that are all scored in any case
DENSITY = {FREE: 4.0, LEASHED: 1.0}  # after them, this / sqrt(place) of the tokens are


def stride_of(tokens: ScoreTokens, n_tokens: int, *, leashed: bool) -> int:
    """The stride for a prompt of `n_tokens`."""
    if isinstance(tokens, int):
        return max(ALL, -(-n_tokens // tokens))
    return ALL if tokens == "all" else LEASHED if leashed else FREE


def stand_for(n_tokens: int, stride: int) -> NDArray[np.int64]:
    """For how many tokens each of the first `n_tokens` counts, 0 where it is left out: [n_tokens].

    One of each part counts for all of it, at a place that looks like chance but is fixed.
    """
    if stride == ALL:
        return np.ones(n_tokens, np.int64)
    if stride in DENSITY:
        steps = 0.5 / DENSITY[stride]
        roots = np.arange(math.sqrt(N_FIRST), math.sqrt(n_tokens) + 1.0, steps)
        later = np.unique(np.floor(roots**2 + 1e-6).astype(np.int64))
        ends = np.concatenate((np.arange(N_FIRST), later))
    else:
        ends = np.arange(0, n_tokens + stride, stride)
    lengths = np.diff(ends)
    places = np.fromiter(map(_mixed, range(len(lengths))), np.int64) % lengths
    counts = np.zeros(ends[-1], np.int64)
    counts[ends[:-1] + places] = lengths
    return counts[:n_tokens]


def _mixed(n: int) -> int:
    """31 bits that depend on all of `n` (Knuth's multiplicative hash, folded)."""
    n = (n + 1) * 2654435761 % 2**32
    return (n ^ (n >> 15)) % 2**31


def check_score_tokens(tokens: object) -> None:
    """Raises WeightsError for anything but `auto`, `all` and a number of 1 or more."""
    if tokens in ("auto", "all") or (type(tokens) is int and tokens >= 1):
        return
    raise WeightsError(f"score_tokens is {tokens!r}; expected auto, all, or a number of tokens")
