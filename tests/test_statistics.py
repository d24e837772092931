"""Laws of the bootstrap and of rank correlation, on made-up examples."""

import math
import sys

import numpy as np
import pytest

from trimix_gguf.errors import TrimixError
from trimix_gguf.evaluation.reporting import statistics
from trimix_gguf.evaluation.reporting.statistics import (
    bootstrap_interval,
    paired_difference,
    spearman,
)


def mean(total):
    return 100 * total[0] / total[1]


def paired_p_value(*pair, **options):
    return paired_difference(*pair, mean, **options).p


def examples(scores):
    """A mean's statistics [n, 2]: each score, and one."""
    return np.stack([scores, np.ones(len(scores))], axis=1)


def right_answers(n, share, seed):
    return (np.random.default_rng(seed).random(n) < share).astype(float)


@pytest.mark.parametrize(("level", "z"), [(0.95, 1.959964), (0.8, 1.281552)])
def test_the_interval_of_a_mean_is_the_normal_one(level, z):
    scores = np.random.default_rng(0).normal(0.6, 0.1, 400)
    half = 100 * z * scores.std() / math.sqrt(len(scores))
    low, high = bootstrap_interval(examples(scores), mean, seed=1, n_resamples=8000, level=level)
    assert low == pytest.approx(100 * scores.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(100 * scores.mean() + half, abs=0.06 * half)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    n_covered = 0
    for seed in range(200):
        stats = examples(right_answers(100, 0.6, seed))
        low, high = bootstrap_interval(stats, mean, seed=seed, n_resamples=200)
        n_covered += low <= 60 <= high
    assert 0.9 <= n_covered / 200 <= 0.98


def test_one_seed_gives_one_answer():
    ours, theirs = map(examples, np.random.default_rng(3).random((2, 50)))
    first, again, other = (bootstrap_interval(ours, mean, seed=s) for s in (7, 7, 8))
    assert first == again != other
    p_values = [paired_p_value(ours, theirs, seed=s) for s in (7, 7, 8)]
    assert p_values[0] == p_values[1] != p_values[2]


def test_equal_examples_leave_no_doubt():
    assert bootstrap_interval(examples(np.full(20, 0.25)), mean, seed=0) == (25, 25)


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    stats = examples(right_answers(30, 0.5, 0))
    whole = statistics.resampled_totals(stats, seed=2, n_resamples=50)
    assert whole.shape == (50, 2)
    np.testing.assert_array_equal(whole[:, 1], 30)
    monkeypatch.setattr(statistics, "_CHUNK", 7 * 30)
    chunked = statistics.resampled_totals(stats, seed=2, n_resamples=50)
    np.testing.assert_array_equal(chunked, whole)


def test_identical_systems_do_not_differ():
    ours = examples(right_answers(80, 0.4, 0))
    assert paired_p_value(ours, ours.copy(), seed=0) == 1
    # As good on the whole, on other examples.
    assert paired_p_value(ours, ours[::-1].copy(), seed=0) == 1


def test_clearly_different_systems_differ():
    ours, theirs = (examples(right_answers(200, share, s)) for s, share in enumerate((0.9, 0.3)))
    assert paired_p_value(ours, theirs, seed=0) == 1 / 1001
    assert paired_p_value(ours, theirs, seed=0, n_resamples=99) == 1 / 100


def test_a_p_value_does_not_ask_which_system_is_ours():
    ours, theirs = (examples(right_answers(60, share, s)) for s, share in enumerate((0.6, 0.5)))
    p = paired_p_value(ours, theirs, seed=4)
    assert 0.01 < p < 0.99
    assert paired_p_value(theirs, ours, seed=4) == p


def test_pairing_sees_a_small_steady_gain_that_intervals_hide():
    rng = np.random.default_rng(0)
    scores = rng.random(100)
    ours, theirs = examples(scores + 0.02 + rng.normal(0, 0.02, 100)), examples(scores)
    intervals = [bootstrap_interval(stats, mean, seed=0) for stats in (ours, theirs)]
    assert intervals[0][0] < intervals[1][1]
    assert paired_p_value(ours, theirs, seed=0) < 0.01


def test_the_interval_of_a_difference_is_the_normal_one_of_paired_scores():
    rng = np.random.default_rng(0)
    theirs = rng.random(400)
    gains = 0.05 + rng.normal(0, 0.1, 400)
    found = paired_difference(
        examples(theirs + gains), examples(theirs), mean, seed=1, n_resamples=8000
    )
    half = 100 * 1.959964 * gains.std() / math.sqrt(len(gains))
    assert found.difference == pytest.approx(100 * gains.mean())
    assert found.low == pytest.approx(100 * gains.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(100 * gains.mean() + half, abs=0.06 * half)


def test_one_answer_of_difference_is_chance():
    """d* counts how often the one example was drawn: all but a draw of exactly 1 are as far."""
    theirs = right_answers(100, 0.5, 0)
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 0)[0]] = 1
    p = paired_p_value(examples(ours), examples(theirs), seed=0, n_resamples=4000)
    assert p == pytest.approx(1 - 0.99**99, abs=0.03)  # 1 − P(Binomial(100, 1/100) = 1)


def test_equal_systems_seldom_seem_to_differ():
    n_rejected = 0
    for seed in range(200):
        ours, theirs = (examples(right_answers(100, 0.6, [seed, s])) for s in (0, 1))
        n_rejected += paired_p_value(ours, theirs, seed=seed, n_resamples=199) <= 0.05
    assert 0.01 <= n_rejected / 200 <= 0.09


def test_examples_must_be_there_and_paired():
    with pytest.raises(ValueError, match="one example or more"):
        bootstrap_interval(np.zeros((0, 2)), mean, seed=0)
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(4, 2\)"):
        paired_difference(examples(np.ones(3)), examples(np.ones(4)), mean, seed=0)


def test_spearman_by_hand():
    pytest.importorskip("scipy", reason="the eval extra is not installed")
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # No ties: 1 − 6 Σd² / (n (n² − 1)) with d = 0, 1, 1, 0.
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / 60)
    assert math.isnan(spearman([3, 1, 2], [7, 7, 7]))
    assert math.isnan(spearman([1], [2]))


def test_spearman_is_pearsons_correlation_of_ranks_that_ties_share():
    stats = pytest.importorskip("scipy.stats", reason="the eval extra is not installed")
    x, y = np.random.default_rng(0).integers(0, 6, (2, 40))
    y += x
    ranks = [stats.rankdata(values) for values in (x, y)]
    assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_an_absent_scipy_is_named_with_its_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(TrimixError, match=r"scipy: pip install 'trimix-gguf\[eval\]'"):
        spearman([1, 2], [1, 2])
