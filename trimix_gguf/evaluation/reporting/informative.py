"""The pair of weights at which a task's choices depend most on its questions."""

import numpy as np

from trimix_gguf.evaluation.names.axis import lowest_on_grid
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import Float64


def most_informative(choice_nll: Float64) -> Weights:
    """The point of GRID² where the choice depends most on the question; no label is used.

    `choice_nll` [n, n_choices, n_axis, n_axis] are the nats of each example's choices, nan where
    it has fewer. Mutual information is the entropy of the choices' mean probabilities minus the
    mean of their entropies: low where every question gets the same answer, and where no choice is
    preferred. Source: Sorensen et al. 2022, "An Information-theoretic Approach to Prompt
    Engineering Without Ground Truth Labels" (arXiv 2203.11364), for templates.
    """
    nats = np.where(np.isnan(choice_nll), np.inf, choice_nll)
    p = np.exp(np.nanmin(choice_nll, axis=1, keepdims=True) - nats)
    p /= p.sum(axis=1, keepdims=True)
    information = _entropy(p.mean(axis=0), axis=0) - _entropy(p, axis=1).mean(axis=0)
    return lowest_on_grid(-information)


def _entropy(p: Float64, axis: int) -> Float64:
    entropy: Float64 = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=axis)
    return entropy
