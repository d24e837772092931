"""One Request and one Event: both engines take the same, and give the same."""

import inspect
import math
import queue
import re
from dataclasses import fields, replace
from typing import get_type_hints

import pytest
from conftest import KAZAKH

from trimix_gguf import Request, Sampling, Trio, Weights, generate, select_weights, stream_generate
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.conversation import Watch
from trimix_gguf.answering.generation import AllOptions
from trimix_gguf.answering.request import Options, join_events
from trimix_gguf.cli.generation_options import SAMPLING_HELP
from trimix_gguf.errors import PromptError, SamplerError, WeightsError
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.mixing.sampling import DEFAULTS, RANGES
from trimix_gguf.roles import ROLES
from trimix_gguf.server.openai import parse_chat
from trimix_gguf.trio.prompt import Prompt, Segment

MIX = Weights(0.1, 0.9)
GREEDY = Sampling(temperature=0, logit_bias={0: -100.0})


@pytest.fixture(scope="module")
def trio():
    """Where tokens read alone and beside others hardly round apart: see test_batching."""
    with Trio.nano(n_ctx=512, n_threads=2, n_window=32, flash_attn=True) as loaded:
        yield loaded


def batched(trio, request):
    """The whole answer by the batch engine."""
    trio.forget()
    batcher, events = Batcher(trio), queue.Queue()
    batcher.submit(request, events.put)
    found = [events.get(timeout=60)]
    while found[-1].finish_reason is None and found[-1].error is None:
        found.append(events.get(timeout=60))
    batcher.close()
    if found[-1].error is not None:
        raise found[-1].error
    return join_events(found)


def alone(trio, request):
    """The whole answer by the one-prompt engine."""
    trio.forget()
    return generate(trio, request, speculative="off")


ENGINES = [alone, batched]


# -- names ----------------------------------------------------------------------------------


def test_options_are_the_fields_of_a_request_and_of_its_sampling():
    own = {f.name: f.type for f in fields(Request) if f.name != "prompt"}
    assert get_type_hints(Options) == {**own, **{f.name: f.type for f in fields(Sampling)}}


def test_all_options_are_what_stream_generate_takes():
    parameters = inspect.signature(stream_generate).parameters.values()
    named = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert get_type_hints(AllOptions) == {**named, **get_type_hints(Options)}
    assert get_type_hints(Watch).items() <= named.items()


def test_the_command_line_has_a_text_for_every_setting_that_is_a_number():
    files = {"grammar", "json_schema", "logit_bias"}
    assert SAMPLING_HELP.keys() == DEFAULTS.keys() - files


def test_what_the_server_takes_are_options():
    body = {
        "messages": [{"role": "user", "content": "a"}], "temperature": 1, "top_p": 0.5,
        "presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"5": 1}, "stop": "b",
        "response_format": {"type": "json_object"}, "max_tokens": 3, "logprobs": True,
        "trimix": {"weights": [1, 0], "trace": True, "top_k": 3, "min_p": 0, "repeat_penalty": 2},
    }  # fmt: skip
    options = parse_chat(body).options
    assert len(options) == 14 and options.keys() <= get_type_hints(Options).keys()
    assert Request.of("a", **options).sampling.top_k == 3


def test_options_make_a_request_or_replace_those_of_one():
    request = Request.of("a", weights=MIX, max_tokens=3, temperature=0, seed=5)
    sampling = Sampling(temperature=0, seed=5)
    assert request == Request("a", weights=MIX, max_tokens=3, sampling=sampling)
    other = Request.of(request, max_tokens=4, seed=6)
    assert other == replace(request, max_tokens=4, sampling=replace(sampling, seed=6))
    with pytest.raises(TypeError, match="temprature"):
        Request.of("a", temprature=0)


def test_one_stop_string_is_not_its_letters(trio):
    """Bug: the answer ended at the first letter of it."""
    assert Request("a", stop="END") == Request.of("a", stop=("END",))
    whole = generate(trio, KAZAKH, weights=MIX, temperature=0, max_tokens=8).text
    cut = generate(trio, KAZAKH, weights=MIX, temperature=0, max_tokens=8, stop=whole[3:6])
    assert (cut.text, cut.stopped) == (whole[:3], whole[3:6])


def test_a_whole_sampling_is_an_option_too():
    """Bug: the help calls it one, and it was a TypeError."""
    sampling = Sampling(temperature=0, seed=5)
    assert Request.of("a", sampling=sampling) == Request("a", sampling=sampling)
    both = Request.of(Request("a", sampling=Sampling(seed=1)), sampling=sampling, seed=6)
    assert both.sampling == replace(sampling, seed=6)


# -- limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANGES)
def test_a_setting_out_of_range_is_refused_at_once(name):
    low, high = RANGES[name]
    for value in (low, high):
        assert getattr(Sampling(**{name: value}), name) == value
    for value in (low - 1, high + 1, math.nan):
        message = re.escape(f"{name} is {value}; expected {low:g} to {high:g}")
        with pytest.raises(SamplerError, match=message):
            Sampling(**{name: value})


@pytest.mark.parametrize("seed", [-1, -5, 2**32 - 1, 2**32 + 5])
def test_a_seed_that_llama_cpp_would_not_take_as_it_is_is_refused(seed):
    """Bug: -1 was another text each time, though the answer told of it as its seed."""
    with pytest.raises(SamplerError, match=f"seed is {seed}; expected 0 to 4294967294"):
        Request.of("a", seed=seed)
    assert Request.of("a", seed=0).sampling.seed == 0
    assert Request.of("a", seed=2**32 - 2).sampling.seed == 2**32 - 2


def test_every_number_of_the_chain_has_a_range():
    """What has none goes to C, where NaN passes and large ids wrap."""
    assert {f.name for f in fields(Sampling) if f.type in (int, float)} == set(RANGES)


@pytest.mark.parametrize("token", [-1, 2**33 + 5, "n_vocab"])
def test_a_bias_is_for_a_token_that_is_there(trio, token):
    n_vocab = trio.models["large_ins"].n_vocab
    token = n_vocab if token == "n_vocab" else token
    with pytest.raises(SamplerError, match=f"token {token}; there are 0 to {n_vocab - 1}"):
        generate(trio, "a", weights=MIX, max_tokens=1, logit_bias={token: 1.0})


def test_a_request_refuses_what_no_engine_can_do():
    with pytest.raises(SamplerError, match="not both"):
        Sampling(grammar="root ::= [a]", json_schema={})
    with pytest.raises(WeightsError, match="plausibility threshold is 2"):
        Request("a", plausibility_threshold=2)
    with pytest.raises(WeightsError, match="last tokens to score is 0"):
        Request("a", last=0)


# -- both engines ---------------------------------------------------------------------------


REQUESTS = {
    "ppl": Request(KAZAKH, sampling=GREEDY, max_tokens=8),
    "last": Request(KAZAKH, sampling=GREEDY, max_tokens=8, last=3),
    "ent": Request(KAZAKH, sampling=GREEDY, max_tokens=8, method="ent"),
    "threshold": Request(
        KAZAKH, sampling=Sampling(temperature=2.0, seed=5), max_tokens=12,
        weights=MIX, plausibility_threshold=0.1,
    ),
    "threshold of chosen weights": Request(
        KAZAKH, sampling=GREEDY, max_tokens=8, plausibility_threshold=0.1
    ),
    "asked about": Request(
        KAZAKH, sampling=GREEDY, max_tokens=8, weights=MIX, n_top=2, echo=True, trace="mix"
    ),
    "asked about all": Request(
        KAZAKH, sampling=GREEDY, max_tokens=8, n_top=0, echo=True, trace="all"
    ),
}  # fmt: skip


def assert_alike(token, other):
    assert (token.id, token.piece) == (other.id, other.piece)
    assert token.probabilities.keys() == other.probabilities.keys()
    assert token.probabilities == pytest.approx(other.probabilities, abs=0.02)
    assert (token.logprob is None) == (other.logprob is None)
    if token.logprob is not None:
        assert token.logprob == pytest.approx(other.logprob, abs=0.1)
        assert len(token.top) == len(other.top)


@pytest.mark.parametrize("name", REQUESTS)
def test_both_engines_give_the_same_event(trio, name):
    request = REQUESTS[name]
    one, other = alone(trio, request), batched(trio, request)
    for field in ("text", "n_prompt", "n_cached", "n_tokens", "finish_reason"):
        assert getattr(one, field) == getattr(other, field), field
    assert one.selection.mix == other.selection.mix
    assert one.selection.method == other.selection.method
    if one.selection.score is not None:
        assert one.selection.score.n_tokens == other.selection.score.n_tokens
    for ours, theirs in zip(one.tokens, other.tokens, strict=True):
        assert_alike(ours, theirs)
    for ours, theirs in zip(one.prompt_tokens, other.prompt_tokens, strict=True):
        assert_alike(ours, theirs)
    assert one.speed.keys() - other.speed.keys() == {"select_s", "prefill_tps"}
    assert other.speed["ttft_s"] > 0 and other.speed["decode_tps"] > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_last_and_a_threshold_do_what_they_say(trio, engine):
    found = engine(trio, REQUESTS["last"])
    trio.forget()
    expected = select_weights(trio, trio.prompt(KAZAKH), last=3)
    assert found.selection.score.n_tokens == [3]
    assert found.selection.weights == expected.weights
    masked = engine(trio, REQUESTS["threshold"])
    assert masked.selection.mix == Mix(MIX, 0.1)
    free = engine(trio, replace(REQUESTS["threshold"], plausibility_threshold=None))
    whole = engine(trio, replace(REQUESTS["threshold"], weights=Mix(MIX, 0.1)))
    assert masked.text == whole.text != free.text
    again = engine(trio, replace(REQUESTS["threshold"], weights=masked.selection))
    assert again.text == masked.text and again.selection == masked.selection


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_asked_about_tokens_is_told(trio, engine):
    event = engine(trio, REQUESTS["asked about"])
    assert [t.id for t in event.prompt_tokens] == [
        i for s in trio.prompt(KAZAKH).segments for i in s.ids["large_ins"]
    ]
    assert event.prompt_tokens[0].logprob is None
    for token in (*event.prompt_tokens[1:], *event.tokens):
        assert len(token.top) == 2 and token.probabilities.keys() == {
            "large_ins", "small_cpt", "fused",
        }  # fmt: skip
        assert math.exp(token.logprob) == pytest.approx(token.probabilities["fused"], rel=1e-4)
    event = engine(trio, REQUESTS["asked about all"])
    for token in (*event.prompt_tokens[1:], *event.tokens):
        assert list(token.probabilities) == [*ROLES, "fused"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_token_that_ends_an_answer_is_told_apart(trio, engine):
    end = min(trio.end_of_generation)
    request = Request(
        KAZAKH, MIX, trace="mix", sampling=Sampling(temperature=0, logit_bias={end: 100.0})
    )
    event = engine(trio, request)
    assert (event.text, event.tokens, event.finish_reason) == ("", (), "stop")
    assert event.end.id == end and event.end.probabilities.keys() > {"fused"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_that_cannot_be_answered_is_refused(trio, engine):
    with pytest.raises(PromptError, match="context holds 512"):
        engine(trio, Request("сөз " * 600))
    with pytest.raises(PromptError, match="no token to score"):
        engine(trio, Request(Prompt((Segment.of([5]),))))
    with pytest.raises(PromptError, match="is empty"):
        engine(trio, Request(Prompt((Segment.of([]),)), MIX))
    with pytest.raises(SamplerError, match="grammar"):
        engine(trio, Request(KAZAKH, MIX, sampling=Sampling(grammar="root ::= (")))


# -- the front doors ------------------------------------------------------------------------


def test_a_request_and_its_options_give_the_same_answer(trio):
    options = {"max_tokens": 6, "temperature": 0.7, "seed": 3, "weights": Weights(0.3, 0.7)}
    options["logit_bias"] = {0: -100.0}
    event = generate(trio, KAZAKH, **options)
    for asked in (Request.of(KAZAKH, **options), Request.of(trio.prompt(KAZAKH), **options)):
        assert generate(trio, asked).text == event.text
    assert (event.seed, event.n_tokens, event.finish_reason) == (3, 6, "length")
    assert event.selection.weights == Weights(0.3, 0.7)
    assert {"select_s", "prefill_tps", "ttft_s", "decode_tps"} <= event.speed.keys()
    assert len(event.tokens) == 6
    assert event.text == b"".join(token.piece for token in event.tokens).decode()


def test_what_the_caches_held_is_counted(trio):
    trio.forget()
    request = Request(KAZAKH, MIX, sampling=GREEDY, max_tokens=1)
    n_prompt = trio.prompt(KAZAKH).n_tokens()
    assert generate(trio, request).n_cached == 0
    assert generate(trio, request).n_cached == n_prompt - 1  # its last row is read again
    longer = generate(trio, replace(request, prompt=KAZAKH + " Алматы"))
    assert n_prompt - 2 <= longer.n_cached < longer.n_prompt


def test_more_likeliest_than_there_are_ids_are_all_of_them(trio):
    """Bug: it was a ValueError of NumPy."""
    request = Request(KAZAKH, sampling=GREEDY, max_tokens=1, weights=MIX, n_top=10**6)
    assert len(alone(trio, request).tokens[0].top) == trio.n_vocab
