"""Answers that only repeat themselves: what is filled is the loop, and only where one is sure."""

import numpy as np
import pytest

from trimix_gguf.evaluation.running.loops import Loop


def watched(ids, probabilities=None):
    """A Loop that took in `ids`, all of them sure where no probability is given."""
    loop = Loop()
    for at, token in enumerate(ids):
        p = 1.0 if probabilities is None else probabilities[at]
        loop.append(int(token), lambda p=p: p)
    return loop


def looping(rng, period, n):
    """A beginning without a loop, and `n` tokens of one."""
    beginning, words = rng.integers(100, 10**6, 30), rng.integers(0, 100, period)
    words[0] = 100  # once a round: no shorter one is in it
    return np.concatenate([beginning, np.resize(words, n)])


@pytest.mark.parametrize("period", [2, 3, 7, 20, 64])
def test_a_loop_goes_on_as_it_went(period):
    rng = np.random.default_rng(period)
    ids = looping(rng, period, 3 * period + 40)
    n = 2 * period + 5
    expected = [ids[-period + i % period] for i in range(n)]
    assert watched(ids).rest(n) == expected
    assert watched(ids).rest(0) == []


@pytest.mark.parametrize("period", [2, 3, 7, 20, 64])
def test_fewer_rounds_are_no_loop(period):
    ids = looping(np.random.default_rng(period), period, 3 * period - 1)
    assert watched(ids).rest(9) == []
    assert watched(np.append(looping(np.random.default_rng(1), period, 200), 7)).rest(9) == []


def test_one_token_again_and_again_is_no_loop():
    """A mix wrote 1000…000 for 120 tokens, and then the unit."""
    assert watched([5, 6] + [7] * 200).rest(9) == []


def test_a_loop_that_is_not_sure_of_itself_is_decoded_on():
    ids = looping(np.random.default_rng(3), 9, 60)
    sure = np.ones(len(ids))
    assert watched(ids, sure).rest(5)
    for back in (1, 5, 9):
        unsure = sure.copy()
        unsure[-back] = 0.5
        assert watched(ids, unsure).rest(5) == []
