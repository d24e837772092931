"""Laws of the mix: what its coefficients, masks and cut-offs mean, on hand-made rows."""

import math

import numpy as np
import pytest

from trimix_gguf.errors import WeightsError
from trimix_gguf.mixing.fusion import METHODS, Mix, Rows, Weights, fuse, mask_implausible
from trimix_gguf.roles import ROLES

INF = math.inf


@pytest.fixture
def rows() -> Rows:
    """Logits [4, 50] of three models that disagree."""
    rng = np.random.default_rng(0)
    return {role: rng.normal(0, 5, (4, 50)).astype(np.float32) for role in ROLES}


@pytest.mark.parametrize(
    ("weights", "role"),
    [
        (Weights(1, 0), "large_ins"),
        (Weights(0, 1), "small_cpt"),
        (Weights(0, 0), "small_base"),
    ],
)
def test_a_corner_is_one_model(rows: Rows, weights: Weights, role: str) -> None:
    assert weights.active == (role,)
    assert METHODS[role].weights == weights
    np.testing.assert_array_equal(fuse(rows, weights), rows[role])
    # The other two are not read, so they need not be there.
    np.testing.assert_array_equal(fuse({role: rows[role]}, weights), rows[role])


@pytest.mark.parametrize("alpha", [-0.5, 0.1, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("beta", [-0.5, 0.2, 0.9, 1.0, 1.5])
def test_one_model_three_times_over_is_itself(rows: Rows, alpha: float, beta: float) -> None:
    same = dict.fromkeys(ROLES, rows["large_ins"])
    np.testing.assert_allclose(fuse(same, Weights(alpha, beta)), rows["large_ins"], atol=1e-5)


def test_the_mix_by_hand() -> None:
    rows = {
        "large_ins": np.array([1, 2], np.float32),
        "small_cpt": np.array([10, 20], np.float32),
        "small_base": np.array([100, 400], np.float32),
    }
    np.testing.assert_allclose(fuse(rows, Weights(0.5, 0.25)), [28, 106])
    np.testing.assert_allclose(fuse(rows, METHODS["proxy-tuning"].weights), [-89, -378])
    np.testing.assert_allclose(fuse(rows, METHODS["contrastive"].weights), [-48.5, -197])


def test_fuse_leaves_its_rows_alone(rows: Rows) -> None:
    before = {role: row.copy() for role, row in rows.items()}
    unused = np.arange(50) >= 48
    for weights in (Weights(1, 0), Weights(0.3, 0.9)):
        fused = fuse(rows, weights, unused=unused)
        assert fused.dtype == np.float32
        for role in ROLES:
            assert not np.shares_memory(fused, rows[role])
            np.testing.assert_array_equal(rows[role], before[role])


@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_rounding_residue_does_not_wake_small_base(alpha: float) -> None:
    """1 − 0.9 − 0.1 is −2.8e-17 in floats: as a coefficient it would cost a whole model."""
    weights = Weights(alpha, {0.1: 0.9, 0.9: 0.1}[alpha])
    assert 1 - 0.9 - 0.1 != 0
    assert weights.remainder == 0.0
    assert weights.active == ("large_ins", "small_cpt")
    assert weights.coefficients["small_base"] == 0.0
    # A small coefficient that someone asked for is no residue.
    assert Weights(0.1, 0.899).active == ROLES


def test_the_remainder_may_be_negative() -> None:
    weights = METHODS["proxy-tuning"].weights
    assert weights.remainder == -1.0
    assert weights.active == ROLES


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(WeightsError, match="alpha"):
        Weights(value, 0.5)
    with pytest.raises(WeightsError, match="beta"):
        Weights(0.5, value)


@pytest.mark.parametrize(
    "weights", [Weights(0.3, 0.5), Weights(1, 1), Weights(-0.5, 0.1), Weights(0, 0)]
)
def test_unused_ids_are_impossible_whatever_the_signs(rows: Rows, weights: Weights) -> None:
    unused = np.zeros(50, bool)
    unused[[0, 7, 49]] = True
    for part in (rows, {role: row[0] for role, row in rows.items()}):  # several rows, and one
        fused = fuse(part, weights, unused=unused)
        assert (fused[..., unused] == -INF).all()
        np.testing.assert_array_equal(fused[..., ~unused], fuse(part, weights)[..., ~unused])


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0.0, [0, 1, 2, 3]),
        (0.05, [0, 1, 2, 3]),  # cut-off 0.025
        (0.2, [0, 1, 2]),  # 0.10
        (0.4, [0, 1]),  # 0.20
        (0.8, [0]),  # 0.40
        (1.0, [0]),
    ],
)
def test_plausibility_is_a_share_of_the_top_probability(threshold: float, kept: list[int]) -> None:
    # Logits are probabilities' logarithms but for a constant, which must not matter.
    reference = (np.log([0.5, 0.3, 0.15, 0.05]) + 7).astype(np.float32)
    fused = np.array([-4, 3, 2, 1], np.float32)
    expected = [x if i in kept else -INF for i, x in enumerate(fused)]
    mask_implausible(fused, reference, threshold)
    assert fused.tolist() == expected


@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_plausibility_is_a_share_of_what_may_be_picked(rows: Rows, threshold: float) -> None:
    """Bug: where large_ins liked an unused id best, no token at all was left."""
    unused = np.zeros(50, bool)
    unused[7] = True
    rows["large_ins"] = rows["large_ins"].copy()
    mix = Mix(Weights(1, 1), threshold)
    for part in (rows, {role: row[0] for role, row in rows.items()}):
        part["large_ins"][..., 7] = -50
        expected = mix.fuse(part, unused)
        part["large_ins"][..., 7] = 50
        np.testing.assert_array_equal(mix.fuse(part, unused), expected)
        assert np.isfinite(expected).any(-1).all()


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    row = np.zeros(4, np.float32)
    with pytest.raises(WeightsError, match="plausibility"):
        mask_implausible(row, row, threshold)
    with pytest.raises(WeightsError, match="plausibility"):
        Mix(Weights(1, 0), threshold)


@pytest.mark.parametrize(
    ("mix", "roles"),
    [
        (Mix(Weights(0, 1)), ("small_cpt",)),
        (Mix(Weights(0, 1), 0.1), ("large_ins", "small_cpt")),
        (Mix(Weights(0, 0), 0.1), ("large_ins", "small_base")),
        (Mix(Weights(0.3, 0.9), 0.1), ROLES),
    ],
)
def test_a_mix_reads_its_models_and_for_a_mask_large_ins(rows: Rows, mix: Mix, roles) -> None:
    assert mix.roles == tuple(roles)
    unused = np.arange(50) >= 48
    read = {role: rows[role] for role in roles}
    fused = mix.fuse(read, unused)
    for i in range(4):  # several rows at once are as one by one
        expected = fuse({role: rows[role][i] for role in ROLES}, mix.weights, unused=unused)
        mask_implausible(expected, rows["large_ins"][i], mix.plausibility_threshold)
        np.testing.assert_array_equal(fused[i], expected)
        np.testing.assert_array_equal(
            mix.fuse({r: m[i] for r, m in read.items()}, unused), fused[i]
        )
