"""What a run says of the published claims."""

import json

import numpy as np
import pytest
from made_runs import (
    AXIS,
    GRID,
    SELECTING,
    made_lines,
    report,
    summary_of,
    write_run,
)

from trimix_gguf.evaluation.reporting.findings import derivative_weights, divergences


def test_chosen_points_by_hand(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", 4)
    points = [(0.1, 0.9), (0.1, 0.9), (0.5, 0.5), (1.0, 0.1)]
    for line, (alpha, beta) in zip(lines, points, strict=True):
        line["outputs"]["ppl"] |= {"alpha": alpha, "beta": beta}
        line["outputs"]["continuous"] |= {"alpha": 0.0, "beta": 0.3}
    lines[0]["outputs"]["continuous"]["alpha"] = 0.6
    found = summary_of(lines, tmp_path)["findings"]["chosen"]
    assert list(found) == list(SELECTING)
    counts = np.array(found["ppl"].pop("counts"))
    assert counts[0, 4] == 2 and counts[2, 2] == counts[5, 0] == 1 and counts.sum() == 4
    assert found["ppl"] == {
        "beta_above_alpha": 0.5, "mean_ratio": pytest.approx((9 + 9 + 1 + 0.1) / 4), "off_grid": 0
    }  # fmt: skip
    # Where alpha is 0 the ratio has no value.
    assert found["continuous"]["mean_ratio"] == pytest.approx(0.5)
    assert found["continuous"]["off_grid"] == 4


def test_rank_correlation_over_the_grid(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", 36)
    order = rng.permutation(36).reshape(6, 6)  # of the points, by perplexity
    for at, line in enumerate(lines):
        line["references"] = ["A"]
        line["grid"] = [["A" if at >= rank else "B" for rank in row] for row in order]
        nll = np.array(line["nll"])
        nll[1:, 1:] = line["n_scored"] * (1 + order)
        line["nll"] = nll.tolist()
    found = summary_of(lines, tmp_path)["findings"]["surface"]
    assert found["spearman"] == pytest.approx(-1)
    np.testing.assert_allclose(found["mean_nll"], 1 + order)
    for line in lines:
        line["grid"] = [["B"] * 6] * 6
    assert summary_of(lines, tmp_path)["findings"]["surface"]["spearman"] is None


def test_nats_of_the_surface_are_macro(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu")
    means = [np.array(line["nll"])[1:, 1:] / line["n_scored"] for line in lines]
    found = summary_of(lines, tmp_path)["findings"]["surface"]
    np.testing.assert_allclose(found["mean_nll"], np.mean(means, axis=0))


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def row_of_nlls(rng, n_tokens, spread):
    """Nats over AXIS² of a random text at alpha = 0 (nan elsewhere), and the true divergence."""
    base = rng.normal(0, 2, (n_tokens, 300))
    cpt = base + rng.normal(0, spread, base.shape)
    targets = rng.integers(0, 300, n_tokens)
    nll = np.full((7, 7), np.nan)
    for at, beta in enumerate(AXIS):
        fused = log_softmax(base + beta * (cpt - base))
        nll[0, at] = -fused[np.arange(n_tokens), targets].sum()
    log_cpt, log_base = log_softmax(cpt), log_softmax(base)
    return nll, (np.exp(log_cpt) * (log_cpt - log_base)).sum()


@pytest.mark.parametrize(("spread", "rel"), [(0.1, 1e-5), (0.5, 1e-5), (1.0, 1e-3), (2.0, 0.01)])
def test_divergence_without_logits_is_the_one_of_the_logits(rng, spread, rel):
    """The targets are no draws from either model: what depends on them cancels."""
    made = [row_of_nlls(rng, n, spread) for n in (5, 40, 200)]
    found = divergences(np.stack([nll for nll, _ in made]), AXIS)
    assert found == pytest.approx([true for _, true in made], rel=rel)
    assert found[0] < found[1] < found[2]


def test_derivative_weights_are_exact_for_polynomials(rng):
    polynomial = np.polynomial.Polynomial(rng.normal(size=7))
    for at in (0.0, 0.2, 1.0):
        found = derivative_weights(AXIS, at) @ polynomial(np.array(AXIS))
        assert found == pytest.approx(polynomial.deriv()(at))


def test_beta_follows_the_divergence_per_token(rng, tmp_path):
    """Not the sum's: the longest prompts are those of the least divergence a token."""
    pytest.importorskip("scipy")
    lines = made_lines(rng, "tumlu", 6)
    true = []
    for at, line in enumerate(lines):
        line["n_scored"] = 20 * (10 - at)
        nll, total = row_of_nlls(rng, line["n_scored"], 0.3 + 0.05 * at)
        line["nll"] = np.nan_to_num(nll, nan=line["n_scored"]).tolist()
        line["outputs"]["ppl"]["beta"] = GRID[at]
        true.append(total / line["n_scored"])
    found = summary_of(lines, tmp_path)["findings"]["guidance"]
    assert found["spearman"] == pytest.approx(1)
    assert found["mean_divergence"] == pytest.approx(np.mean(true), rel=1e-4)
    for line in lines:
        line["outputs"]["ppl"]["beta"] = 0.9
    assert summary_of(lines, tmp_path)["findings"]["guidance"]["spearman"] is None


def test_a_summary_is_json_and_comes_out_the_same_again(rng, tmp_path):
    pytest.importorskip("scipy")
    tasks = {"tumlu": made_lines(rng, "tumlu"), "kazqad": made_lines(rng, "kazqad", 3)}
    folder = write_run(tmp_path, tasks)
    text = json.dumps(report(folder), allow_nan=False)
    assert text == json.dumps(report(folder))
    assert json.loads(text) == report(folder) | {"runs": json.loads(text)["runs"]}
