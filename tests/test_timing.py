"""The parts of an answer's time sum to the whole, and each is what its name says."""

import time

import pytest
from conftest import KAZAKH

from trimix_gguf import Trio, Weights
from trimix_gguf.answering import costs, decoding, generation
from trimix_gguf.answering.request import Request
from trimix_gguf.bench import timing
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.strand import Strand

PATCHED = (
    (generation, "select_weights"), (decoding, "draft"), (Strand, "tail_rows"), (Mix, "fuse"),
    (Sampler, "sample"), (Sampler, "accept"), (Model, "decode_entries"),
)  # fmt: skip
READING = list(timing.READING.values())


@pytest.fixture(scope="module")
def trio():
    with Trio.nano(n_threads=1) as opened:
        yield opened


@pytest.fixture
def moments(monkeypatch):
    """What was read from the clock of a timing, in order."""
    seen, read = [], time.perf_counter

    def noted():
        seen.append(read())
        return seen[-1]

    monkeypatch.setattr(timing.time, "perf_counter", noted)
    return seen


def timed(trio, speculative="off", **options):
    endless = dict.fromkeys(trio.end_of_generation, -1e9)
    given = {"max_tokens": 12, "temperature": 0, "logit_bias": endless, **options}
    with timing._with_clocks(trio) as (twin, clocks):
        return timing.time_answer(twin, Request.of(KAZAKH, **given), clocks, speculative)


def test_parts_within_parts_count_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.5, 6.0, 6.5, 9.0]).__next__
    monkeypatch.setattr(timing.time, "perf_counter", now)
    clock = timing.Clock()
    with clock.part(timing.REST):  # from 0
        with clock.part(timing.SAMPLING):  # from 1 to 3
            pass
        with clock.part(timing.CHOICE):  # from 4.5
            clock.split(4.0, timing.OUTPUT)  # before it began: of an earlier decode
            clock.split(5.0, timing.OUTPUT)  # to 6
    found = {name: seconds for name, seconds in clock.seconds.items() if seconds}
    assert sum(found.values()) == 9.0 and found[timing.SAMPLING] == 2.0
    assert found[timing.REST] == 1.0 + 1.5 + 2.5 and found[timing.CHOICE] == 0.5 + 0.5
    assert found[timing.OUTPUT] == 1.0


@pytest.mark.parametrize("speculative", ["off", "on"])
def test_the_parts_sum_to_the_whole(trio, moments, speculative):
    parts = timed(trio, speculative)
    whole = max(moments) - min(moments)
    assert sum(parts.values()) == pytest.approx(whole, rel=1e-9)
    assert list(parts) == list(timing.PARTS) and min(parts.values()) >= 0
    for name in (*READING, timing.OUTPUT, timing.CHOICE, timing.SAMPLING, timing.REST):
        assert parts[name] > 0, name


def test_each_part_is_there_where_its_work_is_done(trio):
    lockstep, drafted = timed(trio), timed(trio, "on", max_tokens=24)
    assert lockstep[timing.SINGLE] > 0
    assert lockstep[timing.DRAFTS] == lockstep[timing.VERIFYING] == 0
    assert drafted[timing.DRAFTS] > 0 and drafted[timing.VERIFYING] > 0
    fixed = timed(trio, weights=Weights(0.1, 0.9))
    assert fixed[timing.CHOICE] == 0 == fixed[timing.READING["small_base"]]
    assert fixed[timing.READING["large_ins"]] > 0 and fixed[timing.READING["small_cpt"]] > 0
    none = timed(trio, weights=Weights(0.1, 0.9), max_tokens=0)
    assert none[timing.SINGLE] == 0 and none[timing.OUTPUT] > 0


def test_each_decode_ends_in_its_output_layer(trio):
    """llama.cpp names the node before it; without that the layer would count as the rest."""
    with timing._with_clocks(trio) as (twin, clocks):
        twin.prefill(twin.prompt(KAZAKH))
        for role in ROLES:
            before, model = time.perf_counter(), twin.models[role]
            twin.rows((role,))
            assert before < clocks[model].began < time.perf_counter()


def test_the_logits_are_those_without_a_clock(trio):
    trio.prefill(trio.prompt(KAZAKH))
    expected = {role: row.copy() for role, row in trio.rows().items()}
    with timing._with_clocks(trio) as (twin, _):
        twin.prefill(twin.prompt(KAZAKH))
        for role, row in twin.rows().items():
            assert (row == expected[role]).all()


def test_afterwards_the_engine_and_its_costs_are_as_before(trio):
    own = [getattr(owner, name) for owner, name in PATCHED]
    request = {"mix": Mix(Weights(0.1, 0.9)), "n_tokens": 4, "repeats": 1}
    answers = timing.time_answers(trio, trio.prompt(KAZAKH), **request)
    assert list(answers) == list(timing.CONFIGURATIONS)
    assert [getattr(owner, name) for owner, name in PATCHED] == own
    stored = costs.read_table(costs._NOTE)
    for model in trio.models.values():
        known = costs._profile(stored[costs._key(model, costs._machine())])
        for n, times in model.decode_seconds.items():
            if n in known:
                assert known[n] == pytest.approx(float(costs.statistics.median(times)))


def test_of_several_runs_one_of_median_length_is_shown():
    runs = [{"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}]
    assert timing._of_median_length(runs) == {"a": 1.0, "b": 2.0}
