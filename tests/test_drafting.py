"""How many tokens are drafted: as many as pay, by what decodes cost and what was accepted."""

import math
import random

import numpy as np
import pytest

from trimix_gguf.answering.drafting import Drafting, DraftPlan
from trimix_gguf.answering.lookup import LONGEST, Lookup, Match

BOTH = ("large_ins", "small_cpt")


class Costs:
    """A trio that is only its models' costs."""

    def __init__(self, draft, verify):
        self.n_window = 16
        self.models = {"small_cpt": _Cost(lambda n: draft * n), "large_ins": _Cost(verify)}


class _Cost:
    def __init__(self, cost):
        self.cost = cost

    def seconds(self, most):
        return np.array([self.cost(n) for n in range(1, most + 1)])


@pytest.mark.parametrize(
    "draft, verify, expected",
    [
        (0.1, lambda n: 1.0, (4, 15)),  # a bandwidth-bound large model: draft far
        (0.3, lambda n: 0.7 * n + 0.3, (0, 0)),  # compute-bound: no draft pays
        (1.0, lambda n: float(n), (0, 0)),  # a drafter as dear as the target
        (0.2, lambda n: math.inf, (0, 0)),  # nothing measured yet
    ],
)
def test_the_length_follows_the_costs(draft, verify, expected):
    plan = Drafting().plan(Costs(draft, verify), BOTH, 15)
    assert expected[0] <= plan.n_draft <= expected[1]


def test_beside_models_too_small_nothing_is_drafted():
    """What goes on around a step of a millisecond is as much as drafts would save."""
    match = Match(4, place=9, token=1)
    for scale, drafts in ((1e-3, False), (1.0, True)):
        costs = Costs(0.1 * scale, lambda n, scale=scale: scale)
        plan = Drafting().plan(costs, BOTH, 15)
        assert (plan.n_draft > 0) is drafts
        assert drafts or Drafting().n_found(plan, match, 15) == 0
        assert Drafting(always=True).plan(costs, BOTH, 15).n_draft > 0


def test_the_length_follows_acceptance():
    costs, drafting = Costs(0.2, lambda n: 1.0 + 0.02 * n), Drafting()
    before = drafting.plan(costs, BOTH, 15).n_draft
    for _ in range(40):
        drafting.learn([0.9] * 4, 0)
    assert drafting.plan(costs, BOTH, 15).n_draft == 0 < before
    for _ in range(40):
        drafting.learn([0.9] * 4, 4)
    assert drafting.plan(costs, BOTH, 15).n_draft > before
    assert drafting.chance(0.9) > 0.9 and drafting.chance(0.1) < 0.8


def longest_match(ids):
    """How many of the newest ids stood somewhere before, by trying all."""
    sizes = range(2, LONGEST + 1)
    found = [n for n in sizes for at in range(n, len(ids)) if ids[at - n : at] == ids[-n:]]
    return max(found, default=0)


def test_a_lookup_finds_the_longest_match_and_what_followed_it():
    rng = random.Random(0)
    for size in range(60):
        ids = [rng.randrange(3) for _ in range(size)]
        match = Lookup(ids).find()
        assert (match.length if match else 0) == longest_match(ids)
        if match:
            before, after = ids[: match.place], ids[match.place :]
            assert before[-match.length :] == ids[-match.length :]
            assert match.token == after[0]
            assert Lookup(ids).following(match, size) == (after * size)[:size]


def test_lookups_follow_what_they_cost_and_bring():
    match = Match(4, place=9, token=1)
    cheap, dear = Costs(0.2, lambda n: 1.0 + 0.05 * n), Costs(1.0, lambda n: float(n))
    for costs, pays in ((cheap, True), (dear, False)):
        drafting = Drafting()
        for length in range(2, LONGEST + 1):
            for _ in range(20):
                drafting.check(Match(length, place=9, token=1), 1)
        plan = drafting.plan(costs, BOTH, 15)
        assert (drafting.n_found(plan, match, 15) > plan.n_draft) is pays
        assert drafting.n_found(plan, match, 3) <= 3 and drafting.n_found(plan, None, 15) == 0
        for length in range(2, LONGEST + 1):
            for _ in range(20):
                drafting.check(Match(length, place=9, token=1), 2)
        assert drafting.n_found(plan, match, 15) == 0
    assert Drafting(n_draft=3).n_found(DraftPlan(3), match, 15) == 0


@pytest.mark.parametrize(
    "verify, together, pays",
    [
        (lambda n: 1.0 + 0.02 * n, 1, True),  # little more for a batch than for one
        (lambda n: max(1.0, n / 4), 4, False),  # four answers fill what a batch has for free
        (lambda n: max(1.0, n / 4), 1, True),
        (lambda n: max(float(n), 6.0), 6, False),
        (lambda n: 6.0 if 4 < n <= 16 else float(n), 8, True),  # sixteen rows cost as eight
    ],
)
def test_an_answer_counts_its_share_of_a_batch(verify, together, pays):
    costs, drafting = Costs(0.02, verify), Drafting()
    drafting.n_together = together
    assert (drafting.plan(costs, BOTH, 15).n_draft > 0) is pays
    assert (drafting.plan(costs, BOTH, 15).n_draft + 1) * together <= costs.n_window


def test_who_comes_or_goes_changes_the_plan_at_once():
    costs, drafting = Costs(0.02, lambda n: max(1.0, n / 4)), Drafting()
    for together in (1, 4, 1):
        drafting.n_together = together
        assert (drafting.plan(costs, BOTH, 15).n_draft > 0) is (together == 1)
        for _ in range(9):
            drafting.watch(None, 0)
    drafting.is_held = True
    assert drafting.plan(costs, BOTH, 15) == DraftPlan(0)


def test_a_draft_stops_at_doubt_and_not_at_a_size_that_batches_well():
    steps = (1.0, 2.0, 2.1, 2.2, 9.0)  # verifying 1, 2, 3 tokens costs about the same
    plan = DraftPlan(3, step=0.2, verify=steps, acceptance=0.9, token=0.7)
    assert plan.pays(0, 0.9)  # alone the first would not: one more token for 1.0
    assert not plan.pays(0, 0.2)
    assert plan.pays(1, 0.5) and not plan.pays(3, 1.0)
    assert DraftPlan(2).pays(1, 0.0)  # a fixed length is drafted whole


def test_lockstep_is_watched_so_that_drafting_comes_back():
    costs, drafting = Costs(0.2, lambda n: 1.0 + 0.02 * n), Drafting()
    row = np.array([0.0, 1.0, 0.2], np.float32)  # unsure: about a half for the top one
    for token, expected in ((2, False), (1, True)):
        for _ in range(180):
            drafting.watch(row, token)
        assert (drafting.plan(costs, BOTH, 15).n_draft > 0) is expected
        assert (drafting.chance(0.5) > 0.9) is expected
