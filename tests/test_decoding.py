"""Drafting changes when tokens come, never which: lockstep is the oracle."""

import itertools
import json

import numpy as np
import pytest
from conftest import KAZAKH

from trimix_gguf import Trio, Weights, generate, stream_generate
from trimix_gguf.answering import drafting as drafts
from trimix_gguf.answering.decoding import decode_steps
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.steering import Steering
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.mixing.sampler import Sampler
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.trio.trio import concurrency

ROUNDING = 0.3  # of a logit, between a batch and single decodes; a cache gone wrong shows in units
MIXES = [Weights(0.1, 0.9), Weights(0.3, 0.9), Weights(1.0, 1.0), Weights(1.0, 0.0)]
SAMPLERS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8},
    "hot": {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "penalties": {"temperature": 0, "repeat_penalty": 1.3, "frequency_penalty": 0.2},
    "dry": {"temperature": 0.5, "dry_multiplier": 0.8},
    "xtc": {"xtc_probability": 0.5},
    "mirostat": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2},
    "grammar": {"grammar": 'root ::= ([а-яәіңғүұқөһ]+ " ")+'},
    "bias": {"temperature": 0, "logit_bias": {5: 3.0}},
}


@pytest.fixture(scope="module")
def lone_trio():
    """Its caches are this module's alone; exact enough for batches to equal single decodes."""
    settings = {"flash_attn": False, "type_k": "f32", "type_v": "f32", "n_threads": 1}
    with Trio.nano(**settings) as opened:
        yield opened


def steps_of(trio, weights, n, *, drafting, prompt=KAZAKH, **sampling):
    """(token ids, fused row before each) of one answer."""
    ids, rows = [], []
    sampler = new_sampler(trio, sampling)
    trio.prefill(trio.prompt(prompt))
    steps = decode_steps(trio, Steering(Mix(weights)), sampler, drafting=drafting, max_tokens=n)
    for step in itertools.islice(steps, n):
        sampler.accept(step.token)
        ids.append(step.token)
        rows.append(step.fused.copy())
    steps.close()
    return ids, rows


def new_sampler(trio, sampling):
    settings = Sampling(seed=7, **sampling)
    return Sampler(trio.models["large_ins"].vocab, trio.n_vocab, settings)


def assert_same(trio, ours, oracle, **sampling):
    """The rows are lockstep's up to rounding, and each token is what lockstep takes from its row.

    So the two part only where rounding parts them, and how far two batches of different size
    round apart depends on the processor.
    """
    sampler = new_sampler(trio, sampling)
    for i, (token, row, expected, single) in enumerate(zip(*ours, *oracle, strict=True)):
        assert np.abs(row - single).max() < ROUNDING, f"row {i}"
        assert sampler.clone().sample(row) == token, f"token {i}"
        assert sampler.clone().sample(single) == expected, f"lockstep's token {i}"
        assert sampler.sample(row) == token
        sampler.accept(token)
        if token != expected:
            return


@pytest.mark.parametrize("n_draft", [1, 3, 15])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_tokens_of_lockstep(lone_trio, name, n_draft):
    settings = SAMPLERS[name]
    lockstep = steps_of(lone_trio, MIXES[0], 24, drafting=Drafting(never=True), **settings)
    drafting = Drafting(n_draft=n_draft)
    ours = steps_of(lone_trio, MIXES[0], 24, drafting=drafting, **settings)
    assert_same(lone_trio, ours, lockstep, **settings)
    assert drafting.n_drafted > 0


@pytest.mark.parametrize("weights", MIXES, ids=str)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_any_mix(lone_trio, weights, temperature, monkeypatch):
    monkeypatch.setattr(drafts, "_LEAST_STEP", 0)  # or nano's steps are too short to draft
    settings = {"temperature": temperature}
    lockstep = steps_of(lone_trio, weights, 30, drafting=Drafting(never=True), **settings)
    for drafting in (Drafting(n_draft=4), Drafting(always=True), Drafting()):
        ours = steps_of(lone_trio, weights, 30, drafting=drafting, **settings)
        assert_same(lone_trio, ours, lockstep, **settings)


def test_drafts_are_accepted_where_small_cpt_leads(lone_trio):
    drafting = Drafting(n_draft=4)
    steps_of(lone_trio, Weights(0.05, 0.95), 40, drafting=drafting, temperature=0)
    assert drafting.acceptance > 0.5
    assert drafting.n_rounds < 30  # 40 tokens took fewer rounds than lockstep's 40


def test_a_coupled_draft_is_accepted_whole_when_the_mix_is_small_cpt_itself(lone_trio):
    """A copy of the sampler, random stream included, picks the same from the same row."""
    drafting = Drafting(n_draft=5)
    weights = Weights(1e-7, 1 - 1e-7)
    steps_of(lone_trio, weights, 36, drafting=drafting, temperature=1.0)
    assert drafting.acceptance > 0.99


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_stopping_anywhere_leaves_the_caches_at_what_was_yielded(lone_trio, n):
    """Inside an accepted run the caches are ahead; closing brings them back."""
    ids, _ = steps_of(lone_trio, MIXES[1], n, drafting=Drafting(n_draft=6), temperature=0)
    rows = {role: row.copy() for role, row in lone_trio.rows().items()}
    prompt = lone_trio.prompt(KAZAKH)
    assert lone_trio.n_past == prompt.n_tokens() + n - 1
    lone_trio.prefill(prompt)
    for token in ids[:-1]:
        lone_trio.advance(token)
    for role, row in lone_trio.rows().items():
        np.testing.assert_allclose(rows[role], row, atol=2e-3)


def test_stop_strings_and_limits_inside_an_accepted_run(lone_trio):
    options = {"weights": Weights(0.05, 0.95), "temperature": 0}
    whole = generate(lone_trio, KAZAKH, **options, max_tokens=40, speculative="off").text
    stop = whole[len(whole) // 2 :][:4]
    for settings in ({"stop": [stop]}, {"max_tokens": 11}, {"max_tokens": 1}, {"max_tokens": 0}):
        off = generate(lone_trio, KAZAKH, **options, speculative="off", **settings)
        on = generate(lone_trio, KAZAKH, **options, speculative="on", n_draft=7, **settings)
        assert (on.text, on.finish_reason, on.n_tokens) == (
            off.text,
            off.finish_reason,
            off.n_tokens,
        )


def test_the_end_of_the_context_comes_at_the_same_token():
    with Trio.nano(n_ctx=48, flash_attn=False, type_k="f32", type_v="f32") as small:
        options = {"weights": Weights(0.05, 0.95), "temperature": 0, "max_tokens": 100}
        options["logit_bias"] = dict.fromkeys(small.end_of_generation, -100.0)
        off = generate(small, KAZAKH, **options, speculative="off")
        on = generate(small, KAZAKH, **options, speculative="on", n_draft=9)
        assert off.finish_reason == on.finish_reason == "context"
        assert (on.text, on.n_tokens) == (off.text, off.n_tokens)


def test_interrupted_in_a_run_the_trio_goes_on_as_new(lone_trio):
    options = {"weights": MIXES[0], "temperature": 0, "max_tokens": 20}
    oracle = generate(lone_trio, KAZAKH, **options, speculative="off").text
    stream = stream_generate(lone_trio, KAZAKH, **options, speculative="on", n_draft=6)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert generate(lone_trio, KAZAKH, **options, speculative="on").text == oracle


class Finds(Drafting):
    """Takes `n` tokens from every match."""

    n = 0

    def n_found(self, plan, match, most):
        return min(self.n, most) if match else 0


@pytest.mark.parametrize("weights", [*MIXES, Weights(0.0, 1.0)], ids=str)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_what_is_looked_up_changes_no_token(lone_trio, weights, temperature):
    again = " ".join([KAZAKH, KAZAKH, *KAZAKH.split()[:3]])
    settings = {"prompt": again, "temperature": temperature}
    lockstep = steps_of(lone_trio, weights, 32, drafting=Drafting(never=True), **settings)
    for n in (1, 5, 31):
        drafting = Finds()
        drafting.n = n
        ours = steps_of(lone_trio, weights, 32, drafting=drafting, **settings)
        assert_same(lone_trio, ours, lockstep, temperature=temperature)
        assert drafting.n_drafted > 0


def test_models_on_different_devices_give_the_same_rows(lone_trio):
    """Named apart, they are read at the same time, each by its own thread."""
    prompt = lone_trio.prompt(KAZAKH)
    lone_trio.prefill(prompt)
    expected = {role: rows.copy() for role, rows in lone_trio.tail_rows(("large_ins",), 5).items()}
    expected |= {role: r.copy() for role, r in lone_trio.tail_rows(("small_base",), 5).items()}
    large = lone_trio.models["large_ins"]
    large.device = "another"
    try:
        lone_trio.prefill(prompt)
        together = lone_trio.tail_rows(("large_ins", "small_base"), 5)
        for role, rows in expected.items():
            np.testing.assert_allclose(together[role], rows, atol=1e-4)
    finally:
        large.device = "CPU"


def test_how_the_models_run_is_said(trimix):
    assert "in turn, on CPU" in trimix("doctor").stdout.decode()
    result = trimix("generate", KAZAKH, "-n", "1", "--verbose")
    assert "models run in turn, on CPU" in result.stderr.decode()
    apart = {"large_ins": "CUDA0", "small_cpt": "CPU", "small_base": "CPU"}
    assert concurrency(apart) == "at once, large_ins on CUDA0, small_cpt on CPU, small_base on CPU"


def test_the_command_line_gives_one_text(trimix):
    arguments = ("generate", KAZAKH, "-n", "24", "--seed", "4", "--json", "--weights", "0.1,0.9")
    off, on = (
        json.loads(trimix(*arguments, *more).stdout)
        for more in (("--speculative", "off"), ("--speculative", "on", "--n-draft", "3"))
    )
    assert on["text"] == off["text"]
    assert "acceptance" in on["speed"] and "acceptance" not in off["speed"]
