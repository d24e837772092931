"""Some tokens of a prompt stand for all: which ones, and that nothing else decides it."""

import numpy as np
import pytest
from conftest import KAZAKH
from test_prefix import EXACT, tokens_read
from test_request import alone, batched

from trimix_gguf import Request, Trio, select_weights
from trimix_gguf.choosing.score import empty_score, score_prompts
from trimix_gguf.choosing.subset import ALL, FREE, LEASHED, stand_for, stride_of
from trimix_gguf.errors import WeightsError
from trimix_gguf.mixing.scoring import GRID, grid_token_nlls

LONG = " ".join([KAZAKH, "Абай Құнанбаев қазақ ақыны, ағартушы, ойшыл болды. "] * 14)
STRIDES = [FREE, LEASHED, ALL, 2, 7, 100]


@pytest.fixture(scope="module")
def exact():
    with Trio.nano(**EXACT, n_window=32) as opened:
        yield opened


@pytest.mark.parametrize("stride", STRIDES)
def test_each_part_of_a_prompt_counts_once_wherever_it_ends(stride):
    long = stand_for(5000, stride)
    for n in (0, 1, 2, 17, 300, 4999):
        counts = stand_for(n, stride)
        assert len(counts) == n and (counts == long[:n]).all()
        assert abs(counts.sum() - n) <= long.max()  # the last part may be cut
    chosen = np.flatnonzero(long)
    assert (np.diff(chosen) < 2 * long.max()).all()


def test_a_number_of_tokens_is_about_kept_to():
    for n, asked in ((1, 1), (100, 1), (100, 33), (1000, 64), (50, 200)):
        kept = np.count_nonzero(stand_for(n, stride_of(asked, n, leashed=False)))
        assert 1 <= kept <= asked and kept > min(asked, n) / 2 - 1
    assert (stand_for(40, stride_of("all", 40, leashed=True)) == 1).all()
    for leashed, most in ((True, 128), (False, 256)):
        stride = stride_of("auto", 512, leashed=leashed)
        assert (stand_for(32, stride) == 1).all()
        assert np.count_nonzero(stand_for(512, stride)) < most


@pytest.mark.parametrize("stride", STRIDES)
def test_a_score_is_the_sum_of_what_stands_for_the_others(exact, stride):
    """Oracle: the nats of every token, each as often as it counts."""
    prompt, parts = exact.prompt(LONG), []

    def consume(window):
        rows = {role: window.rows[role] for role in exact.models}
        axes = {"alphas": (*GRID, 0.0), "betas": (*GRID, 0.0)}
        parts.append(grid_token_nlls(**rows, targets=window.targets, unused=exact.unused, **axes))

    exact.forget()
    exact.prefill(prompt, consume=consume)
    each = np.concatenate(parts)
    score = empty_score(stride=stride)
    exact.forget()
    score_prompts(exact, prompt, score)
    counts = stand_for(len(each), stride)
    assert score.n_tokens == [counts.sum()]
    np.testing.assert_allclose(score.nll[0], np.tensordot(counts, each, 1), atol=0.02)
    assert score.is_estimate == (stride != 1)


def test_a_longer_prompt_reuses_what_was_scored(exact):
    """A chat grows by its end; the weights are those of a prompt that is read whole."""
    exact.forget()
    select_weights(exact, exact.prompt(LONG))
    longer = exact.prompt(LONG + " " + KAZAKH)
    chosen = []
    n_read = tokens_read(exact, lambda: chosen.append(select_weights(exact, longer)))
    exact.forget()
    exact.sums = None
    whole = select_weights(exact, longer)
    assert n_read < longer.n_tokens() / 4
    assert chosen[0].weights == whole.weights and chosen[0].score.n_tokens == whole.score.n_tokens
    np.testing.assert_allclose(chosen[0].score.nll[0], whole.score.nll[0], rtol=1e-4)


@pytest.mark.parametrize("tokens", ["auto", 10, "all"])
def test_both_engines_score_the_same_tokens(exact, tokens):
    request = Request.of(exact.prompt(LONG), score_tokens=tokens, max_tokens=1, temperature=0)
    one, many = alone(exact, request).selection, batched(exact, request).selection
    assert one.weights == many.weights and one.score.n_tokens == many.score.n_tokens
    np.testing.assert_allclose(one.score.nll[0], many.score.nll[0], rtol=1e-4)


def test_the_published_rule_scores_every_token(exact):
    prompt = exact.prompt(LONG)
    default = select_weights(exact, prompt, method="ppl")
    assert not default.score.is_estimate
    asked = select_weights(exact, prompt, method="ppl", score_tokens=20)
    assert asked.score.is_estimate and asked.perplexities() != default.perplexities()


def test_from_the_command_line(trimix, tmp_path):
    long = LONG.strip()

    def line(*more):
        result = trimix("generate", long, "-n", 1, "--temperature", 0, *more)
        assert result.returncode == 0, result.stderr.decode()
        return next(x for x in result.stderr.decode().splitlines() if x.startswith("weights:"))

    assert "perplexity about " in line() and "perplexity about " in line("--score-tokens", 30)
    assert "perplexity large_ins" in line("--score-tokens", "all")
    for wrong in ("0", "-3", "many"):
        assert trimix("generate", "а", "--score-tokens", wrong).returncode == 2
    assert "about" not in line("--method", "ppl")


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "most", None])
def test_what_is_no_number_of_tokens_is_refused(wrong):
    with pytest.raises(WeightsError, match="score_tokens"):
        Request("а", score_tokens=wrong)
