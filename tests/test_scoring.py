"""Laws of scoring: the factored grid is a plain log-softmax at every point, only faster."""

import math
from typing import Any

import numpy as np
import pytest
from summed import grid_nll

from trimix_gguf.errors import ModelError, WeightsError
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import (
    CONTINUOUS_RANGE,
    GRID,
    _pivots,
    _separable_partition,
    _workspace,
    chebyshev_nodes,
    continuous_optimum,
    grid_entropy,
    interpolate,
    lowest,
    parse_grid,
)

TOLERANCE = 1e-4  # nats a token
WIDE = (-0.5, 0.0, 0.4, 1.0, 1.5)  # corners and both signs of 1 − alpha − beta
ROLES = ("large_ins", "small_cpt", "small_base")


def random_logits(
    n_tokens: int, n_vocab: int, *, seed: int = 0, spread: float = 3.0, apart: float = 1.0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Three models that mostly agree, each at its own level, and targets mostly likely."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, spread, (n_tokens, n_vocab))
    targets = rng.integers(0, n_vocab, n_tokens)
    common[np.arange(n_tokens), targets] += rng.uniform(0, 5 * spread, n_tokens)
    rows = {
        role: (common + rng.normal(0, apart, common.shape) + level).astype(np.float32)
        for role, level in zip(ROLES, (8, -3, 1), strict=True)
    }
    return rows, targets


def plain_fused(
    rows: dict[str, np.ndarray], alpha: float, beta: float, unused: np.ndarray | None = None
) -> np.ndarray:
    """Log-probabilities [n_tokens, n_vocab] in float64, by the definition."""
    large, cpt, base = (np.asarray(rows[role], np.float64) for role in ROLES)
    fused = alpha * large + beta * cpt + (1 - alpha - beta) * base
    if unused is not None:
        fused[..., unused] = -np.inf
    fused -= fused.max(-1, keepdims=True)
    return fused - np.log(np.exp(fused).sum(-1, keepdims=True))


def plain_nll(
    rows: dict[str, np.ndarray],
    targets: np.ndarray,
    alpha: float,
    beta: float,
    unused: np.ndarray | None = None,
) -> float:
    logprobs = plain_fused(rows, alpha, beta, unused)
    return -float(logprobs[np.arange(len(targets)), targets].sum())


def plain_grid(rows: Any, targets: Any, alphas: Any, betas: Any, unused: Any = None) -> np.ndarray:
    return np.array([[plain_nll(rows, targets, a, b, unused) for b in betas] for a in alphas])


def assert_is_plain(
    rows: Any, targets: Any, alphas: Any, betas: Any, unused: Any = None, n_threads: int = 1
) -> None:
    nll = grid_nll(
        **rows, targets=targets, alphas=alphas, betas=betas, unused=unused, n_threads=n_threads
    )
    assert nll.shape == (len(alphas), len(betas)) and nll.dtype == np.float64
    expected = plain_grid(rows, targets, alphas, betas, unused)
    np.testing.assert_allclose(nll, expected, rtol=0, atol=TOLERANCE * len(targets))


def is_separable(rows: Any, t: int, alphas: Any, betas: Any, unused: Any = None) -> bool:
    a, b = np.asarray(alphas), np.asarray(betas)
    large, cpt, base = (rows[role][[t]] for role in ROLES)
    pivots = _pivots(cpt, unused)
    work = _workspace(len(a), len(b))
    _, apart = _separable_partition(large, cpt, base, pivots, a, b, unused, work)
    return not apart


# -- the grid -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(
    "n_vocab", [3, 6944, 6945, 58333, 58334]
)  # a product, a block: full, and one more
def test_grid_nll_is_a_plain_log_softmax(n_vocab: int, n_threads: int) -> None:
    rows, targets = random_logits(6, n_vocab, seed=n_vocab)
    for t, edge in ((0, 0), (1, n_vocab - 1)):  # the first and last id of all must count
        targets[t] = edge
        for role in ROLES:
            rows[role][t, edge] = rows[role][t].max() + 1
    for t in range(6):
        assert is_separable(rows, t, GRID, GRID)
    assert_is_plain(rows, targets, GRID, GRID, n_threads=n_threads)


def test_negative_remainders_and_weights() -> None:
    rows, targets = random_logits(6, 5000)
    for t in range(6):
        assert is_separable(rows, t, WIDE, (-0.3, 1.0, 1.4))
    assert_is_plain(rows, targets, WIDE, (-0.3, 1.0, 1.4))


def test_a_real_vocabulary() -> None:
    rows, targets = random_logits(3, 151_936, spread=2.5)
    unused = np.zeros(151_936, bool)
    unused[151_665:] = True
    assert_is_plain(rows, targets % 151_665, GRID, (0.5, 1.0), unused, n_threads=2)


def test_a_flat_distribution_keeps_its_small_terms() -> None:
    rows, targets = random_logits(2, 60_000, spread=0.2, apart=0.05)
    assert_is_plain(rows, targets, (0.1, 1.0), (0.1, 1.0))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_unused_ids_hold_no_probability(n_threads: int) -> None:
    rows, targets = random_logits(5, 5000)
    unused = np.zeros(5000, bool)
    unused[::7] = True
    unused[targets] = False
    for role in ROLES:  # one would else be the likeliest token of every mix
        rows[role][:, unused.argmax()] += 30
    assert_is_plain(rows, targets, WIDE, WIDE, unused, n_threads)


def test_an_unused_target_is_impossible() -> None:
    rows, targets = random_logits(2, 500)
    unused = np.arange(500) == targets[0]
    nll = grid_nll(**rows, targets=targets, alphas=GRID, betas=WIDE, unused=unused)
    assert (nll == np.inf).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_extreme_logits_fall_back_to_float64(n_threads: int, masked: bool) -> None:
    rng = np.random.default_rng(3)
    rows = {role: rng.choice([-200, 0, 200], (4, 5000)).astype(np.float32) for role in ROLES}
    targets = np.array([0, 17, 4999, 256])
    unused = np.arange(5000) % 5 == 1 if masked else None
    for t in range(4):
        assert not is_separable(rows, t, WIDE, GRID, unused)
    if unused is not None:
        unused[targets] = False
    assert_is_plain(rows, targets, WIDE, GRID, unused, n_threads)


def test_a_row_that_falls_back_leaves_the_others_exact() -> None:
    rows, targets = random_logits(4, 5000)
    rows["large_ins"][2, 11] = 200
    rows["small_base"][2, 11] = -200
    assert [is_separable(rows, t, GRID, GRID) for t in range(4)] == [True, True, False, True]
    assert_is_plain(rows, targets, GRID, GRID, n_threads=2)


def test_one_factor_alone_out_of_range_falls_back() -> None:
    """e^120 · e^−120 is 1, but in float32 it is infinity times zero."""
    rows, targets = random_logits(1, 500)
    for role, gap in (("large_ins", 0), ("small_cpt", -120), ("small_base", -120)):
        rows[role][0, 11] = rows[role][0, targets[0]] + gap
    assert not is_separable(rows, 0, (0.1, 1.0), (0.1,))
    assert_is_plain(rows, targets, (0.1, 1.0), (0.1,))


def test_a_factor_that_underflows_at_the_first_weight_counts_at_the_last() -> None:
    """Its row is 0 in float32 at beta = 0.1, and no product brings it back to e^−1 at beta = 1."""
    rows, targets = random_logits(1, 500, spread=0.1, apart=0.1)
    for role, gap in (("large_ins", -1), ("small_cpt", -1), ("small_base", -130)):
        rows[role][0, 11] = rows[role][0, targets[0]] + gap
    assert not is_separable(rows, 0, (0.0,), (0.1, 0.5, 1.0))
    assert_is_plain(rows, targets, (0.0,), (0.1, 0.5, 1.0))


def test_any_order_of_the_grid() -> None:
    rows, targets = random_logits(3, 5000)
    assert_is_plain(rows, targets, (0.9, -0.2, 0.5), (1.0, 0.1, 0.3, 0.2))


@pytest.mark.parametrize("role", ROLES)
def test_a_constant_added_to_one_model_changes_nothing(role: str) -> None:
    rows, targets = random_logits(4, 5000)
    shifted = {**rows, role: rows[role] + np.float32(37)}
    before = grid_nll(**rows, targets=targets, alphas=WIDE, betas=GRID)
    after = grid_nll(**shifted, targets=targets, alphas=WIDE, betas=GRID)
    np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE * 4)


def test_rows_add_up_in_any_number_and_threads() -> None:
    rows, targets = random_logits(7, 3000)

    def part(first: int, last: int, n_threads: int = 1) -> np.ndarray:
        cut = {role: row[first:last] for role, row in rows.items()}
        ids = targets[first:last]
        return grid_nll(**cut, targets=ids, alphas=GRID, betas=WIDE, n_threads=n_threads)

    whole = part(0, 7)
    np.testing.assert_array_equal(part(0, 7, n_threads=2), whole)
    np.testing.assert_allclose(part(0, 3) + part(3, 7), whole, rtol=1e-12)
    np.testing.assert_array_equal(part(2, 2), np.zeros((len(GRID), len(WIDE))))


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("role", ROLES)
def test_nan_is_a_model_error(role: str, n_threads: int) -> None:
    rows, targets = random_logits(4, 5000)
    rows[role][1, 4321] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        grid_nll(**rows, targets=targets, alphas=WIDE, betas=GRID, n_threads=n_threads)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("role", ROLES)
def test_infinity_is_a_model_error(role: str, value: float) -> None:
    """Infinite logits used to pass as probability 0, or to end in a NumPy warning."""
    rows, targets = random_logits(4, 5000)
    rows[role][1, 4321] = value
    with pytest.raises(ModelError, match="not finite"):
        grid_nll(**rows, targets=targets, alphas=GRID, betas=GRID)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shape", [(3, 50), (4, 49), (4, 51)])
def test_one_model_of_another_shape_is_refused(role: str, shape: tuple[int, int]) -> None:
    """A chained != once let a single wrong shape through."""
    rows, targets = random_logits(4, 50)
    rows[role] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match="agree"):
        grid_nll(**rows, targets=targets, alphas=GRID, betas=GRID)


def test_targets_must_be_one_a_row_and_inside_the_vocabulary() -> None:
    rows, _ = random_logits(4, 50)
    with pytest.raises(ValueError, match="agree"):
        grid_nll(**rows, targets=[1, 2, 3], alphas=GRID, betas=GRID)
    for outside in (-1, 50):
        with pytest.raises(ValueError, match="targets"):
            grid_nll(**rows, targets=[1, 2, 3, outside], alphas=GRID, betas=GRID)


# -- entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_entropy_is_that_of_the_plain_distribution(masked: bool) -> None:
    rows, _ = random_logits(1, 5000)
    row = {role: logits[0] for role, logits in rows.items()}
    unused = np.arange(5000) % 3 == 0 if masked else None
    entropy = grid_entropy(**row, alphas=WIDE, betas=GRID, unused=unused)
    assert entropy.shape == (len(WIDE), len(GRID))
    for i, alpha in enumerate(WIDE):
        for j, beta in enumerate(GRID):
            logprobs = plain_fused(row, alpha, beta, unused)
            finite = logprobs[logprobs > -np.inf]
            assert entropy[i, j] == pytest.approx(-(np.exp(finite) * finite).sum(), abs=1e-9)


@pytest.mark.parametrize("role", ROLES)
def test_entropy_of_nan_is_a_model_error(role: str) -> None:
    """The lowest of NaN entropies is the first grid point: weights out of nothing."""
    rows, _ = random_logits(1, 50)
    row = {name: logits[0] for name, logits in rows.items()}
    row[role][7] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        grid_entropy(**row, alphas=GRID, betas=GRID)


def test_entropy_by_hand() -> None:
    fair, sure = np.zeros(4, np.float32), np.array([500, 0, 0, 0], np.float32)
    grid = grid_entropy(
        large_ins=sure, small_cpt=fair, small_base=fair, alphas=(0, 1), betas=(0, 1)
    )
    np.testing.assert_allclose(grid, [[math.log(4)] * 2, [0, 0]], atol=1e-12)
    two = grid_entropy(
        large_ins=fair,
        small_cpt=fair,
        small_base=fair,
        alphas=(0,),
        betas=(0,),
        unused=np.array([True, False, True, False]),
    )
    assert two[0, 0] == pytest.approx(math.log(2))


# -- choice ---------------------------------------------------------------------------------


def test_lowest_is_the_first_lowest_point() -> None:
    grid = np.array([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]])
    assert lowest(grid, (0.1, 0.2), (0.3, 0.4, 0.5)) == Weights(0.1, 0.4)
    grid[1, 2] = 0.5
    assert lowest(grid, (0.1, 0.2), (0.3, 0.4, 0.5)) == Weights(0.2, 0.5)


def gradient(rows: dict[str, np.ndarray], targets: np.ndarray, at: Weights) -> np.ndarray:
    """d mean NLL / d (alpha, beta): the mix's expected logit difference less the target's."""
    probs = np.exp(plain_fused(rows, at.alpha, at.beta))
    base = rows["small_base"].astype(np.float64)
    moves = [rows[role].astype(np.float64) - base for role in ("large_ins", "small_cpt")]
    picked = np.arange(len(targets)), targets
    return np.array([((probs * m).sum(-1) - m[picked]).mean() for m in moves])


def readers_of_one_text(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Targets drawn from a mix of the three, so that the optimum is near its (alpha, beta)."""
    rows, _ = random_logits(40, 2000, seed=seed)
    rng = np.random.default_rng(seed)
    alpha, beta = rng.uniform(0.1, 0.9, 2)
    probs = np.exp(plain_fused(rows, alpha, beta))
    return rows, np.array([rng.choice(2000, p=p / p.sum()) for p in probs])


@pytest.mark.parametrize("seed", range(3))
def test_the_continuous_optimum_is_the_lowest_point_of_its_range(seed: int) -> None:
    rows, targets = readers_of_one_text(seed)
    nodes = chebyshev_nodes()
    nll = grid_nll(**rows, targets=targets, alphas=nodes, betas=nodes)
    best = continuous_optimum(nll)
    low, high = CONTINUOUS_RANGE
    assert low < best.alpha < high and low < best.beta < high
    found = plain_nll(rows, targets, best.alpha, best.beta) / 40
    assert np.abs(gradient(rows, targets, best)).max() < 1e-3
    random_points = np.random.default_rng(seed).uniform(low, high, (30, 2))
    points = [(a, b) for a in GRID for b in GRID] + random_points.tolist()
    assert found <= min(plain_nll(rows, targets, a, b) for a, b in points) / 40 + 1e-6


def test_the_continuous_optimum_stays_in_its_range() -> None:
    rows, targets = random_logits(8, 500)
    # Only large_ins knows the targets: the more of it, the better, up to the edge.
    rows["large_ins"][np.arange(8), targets] += 5
    rows["small_base"][np.arange(8), targets] -= 5
    nodes = chebyshev_nodes()
    best = continuous_optimum(grid_nll(**rows, targets=targets, alphas=nodes, betas=nodes))
    assert best.alpha == pytest.approx(CONTINUOUS_RANGE[1], abs=1e-6)


@pytest.mark.parametrize("angle", np.linspace(0, 3.1, 32).round(1))
def test_a_narrow_slanted_valley_is_followed_to_its_end(angle: float) -> None:
    """Alike models make one; a zoom that closed in too fast stopped 0.1 beside its end."""
    nodes = np.array(chebyshev_nodes())
    alpha, beta = nodes[:, None] - 0.83, nodes[None, :] - 0.37
    along = math.cos(angle) * alpha + math.sin(angle) * beta
    across = math.cos(angle) * beta - math.sin(angle) * alpha
    best = continuous_optimum(0.01 * along**2 + 10 * across**2)
    assert (best.alpha, best.beta) == pytest.approx((0.83, 0.37), abs=1e-3)


def test_interpolation_is_the_nll_between_nodes() -> None:
    rows, targets = random_logits(20, 2000)
    nodes = chebyshev_nodes()
    nll = grid_nll(**rows, targets=targets, alphas=nodes, betas=nodes)
    for alpha, beta in np.random.default_rng(1).uniform(*CONTINUOUS_RANGE, (30, 2)):
        expected = plain_nll(rows, targets, alpha, beta) / 20
        assert interpolate(nll, Weights(alpha, beta)) / 20 == pytest.approx(expected, abs=1e-3)


def test_nodes_lie_inside_the_range() -> None:
    nodes = chebyshev_nodes()
    assert CONTINUOUS_RANGE[0] < min(nodes) and max(nodes) < CONTINUOUS_RANGE[1]
    assert list(nodes) == sorted(set(nodes))


@pytest.mark.parametrize("text", ["0.1,0.5,1", " 0.1, 0.5 ,1.0 "])
def test_a_grid_is_read(text: str) -> None:
    assert parse_grid(text) == (0.1, 0.5, 1.0)


def test_a_grid_may_have_one_point_and_negative_ones() -> None:
    assert parse_grid("-0.5") == (-0.5,)


@pytest.mark.parametrize(
    "text", ["", ",", "0.1,", "0.1 0.5", "a", "nan", "0.1,inf", "0.1,0.1", "1,1.0", "0,-0", "0.1;1"]
)
def test_rubbish_is_no_grid(text: str) -> None:
    with pytest.raises(WeightsError, match="grid"):
        parse_grid(text)
