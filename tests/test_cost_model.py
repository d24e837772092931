"""The benchmark's cost model: its laws, and that it finds itself in times made by it."""

import sys
from pathlib import Path

import pytest

from trimix_gguf import Trio
from trimix_gguf.bench.measuring import Run
from trimix_gguf.mixing.fusion import Mix, Weights
from trimix_gguf.roles import ROLES

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import cost_model  # noqa: E402
from cost_model import SIZES, Costs, Machine, Watched, checked, elsewhere  # noqa: E402

WHOLE = 2520  # tokens: rounds of any number up to 9 fit
SIZED = {"large_ins": (8e9, 14e9), "small_cpt": (1e9, 1.5e9), "small_base": (1e9, 1.5e9)}


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_no_draft_is_lockstep(p):
    costs = Costs(0.2, lambda n: 1.0 * n, row=0.01, pick=9.0)
    assert costs.tps(0, p) == pytest.approx(1 / (0.2 + 1.0 + 0.01))
    assert Costs(0.2, lambda n: 1.0, mixed=False).round(0, p) == 1.0


@pytest.mark.parametrize("k", [1, 4, 23])
def test_a_free_draft_that_is_always_right_multiplies_lockstep(k):
    costs = Costs(0.0, lambda n: 1.0)
    assert costs.tps(k, 1.0) == pytest.approx((k + 1) * costs.tps(0, 1.0))
    assert costs.best(1.0, range(k + 1)) == k
    assert costs.tps(k, 0.0) == pytest.approx(costs.tps(0, 0.0))


def test_a_round_by_hand():
    """Two drafted, half of them kept: 1.75 tokens; small_cpt reads the second a time in four."""
    costs = Costs(0.2, {3: 1.1}.get, row=0.1, pick=0.01)
    seconds = 2 * 0.2 + 0.25 * 0.2 + 1.1 + 2 * 0.01 + 1.75 * 0.1
    assert costs.round(2, 0.5) == pytest.approx(seconds)
    assert costs.tps(2, 0.5) == pytest.approx(1.75 / seconds)


def test_a_batch_costs_no_more_than_a_token_up_to_the_ridge():
    on = Machine("any", bandwidth=100e9, flops=10e12, launch=1e-3)
    n_bytes, n_params = 5e9, 10e9  # 50 ms to read; 2 ms of arithmetic a token
    assert on.seconds(1, n_bytes, n_params) == pytest.approx(0.051)
    assert on.seconds(25, n_bytes, n_params) == on.seconds(1, n_bytes, n_params)
    assert on.seconds(50, n_bytes, n_params) == pytest.approx(0.101)


def test_elsewhere_a_slow_large_model_gains_and_a_coefficient_of_0_costs_nothing():
    on = Machine("any", bandwidth=100e9, flops=1e15, launch=0.0)
    two = elsewhere(on, SIZED, Weights(0.1, 0.9), 0.9)
    assert two["lockstep_tps"] == pytest.approx(1 / 0.09)
    assert two["large_ins_tps"] == pytest.approx(1 / 0.08)
    assert two["over_lockstep"] > 2 and two["n_draft"] > 2
    three = elsewhere(on, SIZED, Weights(0.3, 0.9), 0.9)
    assert three["lockstep_tps"] == pytest.approx(1 / 0.1)
    bound = Machine("bound by arithmetic", bandwidth=1e15, flops=1e12, launch=0.0)
    assert elsewhere(bound, SIZED, Weights(0.1, 0.9), 0.9)["n_draft"] == 0


def test_times_made_by_the_model_are_predicted_without_error():
    draft, row, pick = 0.1, 0.02, 0.003
    times = {role: {n: [0.6 + 0.1 * n] * 3 for n in SIZES} for role in ROLES}
    times["small_cpt"] = {n: [draft] for n in SIZES}
    costs = Costs(draft, lambda n: 0.6 + 0.1 * n, row=row, pick=pick)
    runs = {}
    for k in cost_model.LENGTHS:
        n_rounds, drafting = WHOLE // (k + 1), Watched(k)
        for _ in range(n_rounds if k else 0):
            drafting.learn([0.9] * k, k)
        seconds = n_rounds * costs.round(k, 1.0)
        python = WHOLE * row + n_rounds * k * pick
        runs[k] = [[(Run([0] * WHOLE, seconds, seconds - python, [k] * n_rounds), drafting)]]
    found = checked(times, runs, Weights(0.1, 0.9), WHOLE)
    assert found["acceptance"] == 1.0
    assert found["abs_error"]["max"] < 1e-9 < found["decodes_alone_abs_error"]["median"]
    assert found["best"]["predicted"] == found["best"]["measured"] == 8
    assert found["lengths"][3]["tokens_per_round"] == 4.0


def test_only_tokens_whose_predecessors_were_accepted_count_as_tried():
    drafting = Watched(4)
    for n_accepted in (0, 2, 4):
        drafting.learn([0.9] * 4, n_accepted)
    assert (drafting.n_accepted, drafting.n_tried) == (6, 1 + 3 + 4)


def test_the_parts_of_a_step_are_all_of_it_and_nothing_stays_patched():
    patched = [(cost_model.Model, "decode_entries"), *cost_model.PARTS]
    before = [getattr(owner, name) for owner, name in patched]
    with Trio.nano(n_threads=1) as trio:
        ids = trio.prompt("Абай — ақын. " * 4).segments[-1].ids["large_ins"]
        for k in (0, 3):
            spent = cost_model.profile(trio, ids, Mix(Weights(0.1, 0.9)), k, 12)
            step = spent.pop("step")
            assert sum(spent.values()) == pytest.approx(step)
            assert spent["small_base"] == 0.0  # its coefficient is 0
            assert all(spent[part] > 0 for part in ("large_ins", "small_cpt", "fuse", "sampling"))
            assert (spent["drafter's confidence"] > 0) is (k > 0)
            assert spent["other"] > 0
    assert [getattr(owner, name) for owner, name in patched] == before
