"""What is picked from one row of logits, whatever the row."""

import numpy as np
import pytest

from trimix_gguf import Sampler, Sampling
from trimix_gguf.errors import ModelError, SamplerError


@pytest.fixture
def sampler(trio):
    """Make a Sampler of the trio's tokens."""
    vocab = trio.models["large_ins"].vocab
    return lambda **settings: Sampler(vocab, trio.n_vocab, Sampling(seed=5, **settings))


@pytest.fixture
def row(trio):
    """Some logits [n_vocab]."""
    return np.random.default_rng(0).normal(size=trio.n_vocab).astype(np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 0}, {"mirostat": 2}], ids=str)
def test_logits_that_are_not_finite_are_no_answer(sampler, row, settings, value):
    """Bug: a model whose numbers overflowed wrote token 0, or any, and no error told of it."""
    row[7] = value
    with pytest.raises(ModelError, match="not finite"):
        sampler(**settings).sample(row)
    row[7] = -np.inf  # as a mask sets it
    assert sampler(**settings).sample(row) != 7


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("n_allowed", [2, 30, 99, 100])
def test_mirostat_draws_among_few_tokens_too(sampler, row, n_allowed, version):
    """Bug: where a mask or grammar left fewer than 100, version 1 took the likeliest each time."""
    row[n_allowed:] = -np.inf
    one = sampler(mirostat=version, temperature=1.0)
    picked = {one.sample(row) for _ in range(100)}
    assert len(picked) > 1 and max(picked) < n_allowed


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}, {"mirostat": 1}, {"mirostat": 2}], ids=str)
def test_the_colder_the_closer_to_greedy(sampler, row, settings):
    """Bug: at 1e-38 logits overflowed, and tokens were drawn that nobody would."""
    for temperature in (0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1e-6):
        assert sampler(temperature=temperature, **settings).sample(row * 8) == row.argmax()


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 200}, {"top_k": 0}, {"mirostat": 2}, {"temperature": 0}], ids=str
)
def test_a_bias_decides_or_is_refused(sampler, row, settings):
    """Bug: llama.cpp sorted a token with a bias of 1e9 behind all others, and it never came."""
    for bias in (1e9, np.inf, np.nan):
        with pytest.raises(SamplerError, match=f"a bias is {bias}; expected at most 1e"):
            sampler(logit_bias={7: bias}, **settings)
    assert sampler(logit_bias={7: 1e6}, **settings).sample(row) == 7
    for bias in (-1e6, -1e38, -np.inf):
        one = sampler(logit_bias={int(row.argmax()): bias}, **settings)
        assert row.argmax() not in [one.sample(row) for _ in range(20)]
