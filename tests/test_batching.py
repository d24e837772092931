"""Batching: requests answered together get what each gets alone, and nothing of one another's."""

import math
import queue
import random
import threading
from dataclasses import replace

import numpy as np
import pytest

from trimix_gguf import Trio, Weights, generate, select_weights, stream_generate
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.request import Request
from trimix_gguf.errors import ModelError, PromptError, SamplerError
from trimix_gguf.mixing.fusion import METHODS, Mix
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment

TEXTS = [
    "Қазақстан Республикасының Үкіметі",
    "Бүгін Алматыда жаңа мектеп ашылды, ал",
    "The prince had come to",
    "Абай Құнанбайұлы — қазақтың ұлы ақыны. Ол",
]
GREEDY = Sampling(temperature=0, logit_bias={0: -100.0})
MIX = Weights(0.3, 0.7)


@pytest.fixture(scope="module")
def trio():
    """Where a token read alone and beside others, or in another window, hardly rounds apart.

    Flash attention computes each token of few by itself, not of 64. Drafts round apart: none here.
    """
    loaded = Trio.nano(n_ctx=512, n_threads=2, n_window=32, flash_attn=True)
    with pytest.MonkeyPatch.context() as patch, loaded:
        patch.setattr("trimix_gguf.answering.drafting._LEAST_STEP", math.inf)
        yield loaded


@pytest.fixture
def batcher(trio):
    opened = Batcher(trio, n_parallel=6, n_queue=64)
    yield opened
    opened.close()


def ask(batcher, requests, cancelled=()):
    """Submit all at once, and cancel some; the events of each, once every one has ended."""
    events, ended = [[] for _ in requests], queue.Queue()

    def listener(i):
        def on_event(event):
            events[i].append(event)
            if event.finish_reason is not None or event.error is not None:
                ended.put(i)

        return on_event

    jobs = [batcher.submit(request, listener(i)) for i, request in enumerate(requests)]
    for i in cancelled:
        jobs[i].cancel()
    for _ in requests:
        ended.get(timeout=120)
    return events


def has_ended(events):
    return bool(events) and events[-1].finish_reason is not None


def text_of(events):
    return "".join(event.text for event in events)


def alone(trio, request):
    """The whole answer by the one-prompt path."""
    response = generate(trio, request, speculative="off")
    trio.forget()
    return response


def agrees(events, ids):
    """Whether an answer is `ids`, or parts from them where two tokens all but tie.

    llama.cpp sums a batch in another order than single tokens; see decoding.py.
    """
    tokens = [token for event in events for token in event.tokens]
    for token, other in zip(tokens, ids, strict=False):
        if token.id != other:
            return token.logprob - dict(token.top).get(other, -math.inf) < 0.1
    return len(tokens) == len(ids)


def ids_alone(trio, request):
    """The answer's ids by the one-prompt path, of greedy requests."""
    ids = [token.id for event in stream_generate(trio, request) for token in event.tokens]
    trio.forget()
    return ids


def per_role(trio, text):
    tokenize = trio.models["large_ins"].tokenize
    own = {"large_ins": tokenize("Question: "), "small_cpt": tokenize("Сұрақ: "), "small_base": []}
    return Prompt((Segment.per_role(own), Segment.of(tokenize(text)), Segment.of([7, 8])))


def kinds(trio):
    """One request of every kind of weights, prompt and end."""
    for text in TEXTS:
        prompt = trio.prompt(text)
        yield Request(prompt, sampling=GREEDY, max_tokens=16)
        yield Request(prompt, Mix(Weights(0.1, 0.9)), sampling=GREEDY, max_tokens=9)
        yield Request(prompt, method="ent", sampling=GREEDY, max_tokens=5)
        yield Request(per_role(trio, text), sampling=GREEDY, max_tokens=8)
        yield Request(prompt, sampling=Sampling(seed=11, temperature=0.9), max_tokens=12)
        yield Request(prompt, METHODS["contrastive"], sampling=GREEDY, max_tokens=8, stop=("а",))


def test_answered_together_as_each_alone(trio):
    expected = [alone(trio, request) for request in kinds(trio)]
    batcher = Batcher(trio, n_parallel=6, n_queue=64)
    found = ask(batcher, list(kinds(trio)))
    batcher.close()
    n_same = 0
    for events, want in zip(found, expected, strict=True):
        assert events[0].n_prompt == want.n_prompt
        assert events[0].selection.weights == want.selection.weights
        if text_of(events) == want.text:
            assert events[-1].finish_reason == want.finish_reason
            assert events[-1].n_tokens == want.n_tokens
            n_same += 1
        if want.selection.score is not None:
            for average in ("micro", "macro"):
                ours, theirs = (
                    s.perplexities(average) for s in (events[0].selection, want.selection)
                )
                assert ours == pytest.approx(theirs, rel=1e-4)
    assert n_same >= len(expected) - 2  # one may come to two tokens that all but tie


def test_a_kept_beginning_is_not_read_again_and_chooses_the_same_weights(trio, batcher):
    first = TEXTS[3] * 5
    later = [first + " Алматы.", first + TEXTS[0], first, "Мүлде басқа мәтін туралы"]

    def request(text):
        return Request(trio.prompt(text), sampling=GREEDY, max_tokens=3, score_tokens="all")

    ask(batcher, [request(first)])
    found = [ask(batcher, [request(text)]) for text in later]
    batcher.close()
    cached = [events[0][0].n_cached for events in found]
    n_first = trio.prompt(first).n_tokens()
    assert cached[0] > n_first - 40 and cached[1] > n_first - 40  # whole windows of rows
    assert cached[2] == n_first - 1  # its last row is read again
    assert cached[3] <= 1  # BOS at most
    for text, (events,) in zip(later, found, strict=True):
        fresh = select_weights(trio, trio.prompt(text), score_tokens="all")
        assert events[0].selection.weights == fresh.weights
        assert events[0].selection.perplexities() == pytest.approx(fresh.perplexities(), rel=1e-4)
    trio.forget()


def test_sums_over_any_kept_beginning_are_those_of_a_fresh_prompt(trio):
    """Parting inside and at the ends of windows, and where only what is scored differs."""
    w = trio.n_window
    ids = [i for s in trio.prompt(TEXTS[3] * 12).segments for i in s.ids["large_ins"]][: 2 * w + 6]
    assert len(ids) == 2 * w + 6
    prompts = [
        Prompt((Segment.of(ids[:n]), Segment.of([9, 10, 11, 12])))
        for n in (1, w - 1, w, w + 1, 2 * w - 1, 2 * w)
    ]
    prompts += [
        Prompt((Segment.of(ids[:n], scored=False), Segment.of(ids[n:]))) for n in (20, w, w + 18)
    ]
    cuts = ids[: w + 8], ids[w + 8 : 2 * w], ids[2 * w :]
    prompts.append(Prompt(tuple(Segment.of(c, scored=i != 1) for i, c in enumerate(cuts))))
    found = []
    for prompt in prompts:
        batcher = Batcher(trio)
        for asked in (Prompt((Segment.of(ids),)), prompt):
            request = Request(asked, max_tokens=0, score_tokens="all")
            ((event,),) = ask(batcher, [request])
        found.append(event)
        batcher.close()
    assert [event.n_cached for event in found] == [0, 0, 0, w, w, w, 19, w - 1, w + 17, w]
    for prompt, event in zip(prompts, found, strict=True):
        fresh = select_weights(trio, prompt, score_tokens="all")
        assert event.selection.score.n_tokens == fresh.score.n_tokens
        for ours, theirs in zip(event.selection.score.nll, fresh.score.nll, strict=True):
            assert np.allclose(ours, theirs, rtol=1e-4)
    trio.forget()


def test_an_answer_is_kept_for_what_goes_on_from_it(trio, batcher):
    prompt = trio.prompt(TEXTS[0])
    weights = Weights(0.1, 0.9)
    (events,) = ask(batcher, [Request(prompt, Mix(weights), sampling=GREEDY, max_tokens=20)])
    ids = [token.id for event in events for token in event.tokens]
    longer = Prompt((*prompt.segments, Segment.of(ids), Segment.of([9, 10, 11])))
    (events,) = ask(batcher, [Request(longer, Mix(weights), sampling=GREEDY, max_tokens=4)])
    # Its newest token was picked, and never read.
    assert events[0].n_cached == prompt.n_tokens() + len(ids) - 1


@pytest.mark.parametrize("weights", [None, Weights(0.3, 0.7), Weights(0.1, 0.9)])
def test_log_probabilities_of_the_prompt_add_up_to_its_perplexity(trio, batcher, weights):
    prompt = trio.prompt(TEXTS[1])
    request = Request(prompt, weights and Mix(weights), max_tokens=0, n_top=2, echo=True)
    ((event,),) = ask(batcher, [request])
    batcher.close()
    fresh = select_weights(trio, prompt)
    trio.forget()
    chosen = weights or fresh.weights
    tokens = event.prompt_tokens
    assert event.finish_reason == "length" and event.text == ""
    assert [t.id for t in tokens] == [i for s in prompt.segments for i in s.ids["large_ins"]]
    scored = [t.logprob for t in tokens[len(tokens) - prompt.n_scored :] if t.logprob is not None]
    mean = -np.mean(scored)
    assert math.exp(mean) == pytest.approx(fresh.score.perplexity(chosen), rel=1e-3)
    assert tokens[0].logprob is None
    for token in tokens[1:]:
        assert token.logprob <= token.top[0][1] + 1e-9 and len(token.top) == 2
        assert sum(math.exp(p) for _, p in token.top) <= 1 + 1e-9


def test_traced_and_logged_tokens(trio, batcher):
    request = Request(
        trio.prompt(TEXTS[0]),
        Mix(Weights(0.1, 0.9)),
        sampling=GREEDY,
        max_tokens=4,
        n_top=3,
        trace="mix",
    )
    (events,) = ask(batcher, [request])
    tokens = [token for event in events for token in event.tokens]
    assert len(tokens) == 4
    for token in tokens:
        assert token.probabilities.keys() == {"large_ins", "small_cpt", "fused"}
        # The chosen one is the likeliest under the mix, the bias apart.
        assert token.top[0] == (token.id, token.logprob)
        assert math.exp(token.logprob) == pytest.approx(token.probabilities["fused"], rel=1e-4)


def test_requests_beyond_the_room_wait_and_all_are_answered(trio):
    """More positions are wanted in all than the contexts have; nobody is cut off or lost."""
    prompts = [trio.prompt(text * 3) for text in TEXTS * 3]
    requests = [Request(p, sampling=GREEDY, max_tokens=60, n_top=4) for p in prompts]
    assert sum(r.prompt.n_tokens() + 60 for r in requests) > 2 * trio.n_ctx
    expected = [ids_alone(trio, r) for r in requests[: len(TEXTS)]] * 3
    batcher = Batcher(trio, n_parallel=12, n_queue=64)
    found = ask(batcher, requests)
    batcher.close()
    assert all(agrees(events, ids) for events, ids in zip(found, expected, strict=True))
    assert all(events[-1].n_tokens == 60 for events in found)


def test_where_every_sequence_is_taken_the_kept_one_goes_on_itself():
    """Bug: it was forgotten to make room for its own fork, and the engine stopped."""
    with Trio.nano(n_ctx=2048, n_window=8, n_threads=2) as small:
        batcher = Batcher(small, n_parallel=7)
        prompt = small.prompt(TEXTS[3])
        (want,) = ask(batcher, [Request(prompt, Mix(Weights(0, 1)), sampling=GREEDY, max_tokens=5)])
        started = queue.Queue()
        jobs = []
        for token in range(20, 26):
            long = Request(
                Prompt((Segment.of([token]),)),
                Mix(Weights(0, 1)),
                sampling=replace(GREEDY, logit_bias=dict.fromkeys(small.end_of_generation, -100.0)),
                max_tokens=240,
            )
            jobs.append(batcher.submit(long, started.put))
        while batcher.statistics().n_running < 6:
            started.get(timeout=60)
        for _ in range(12):
            started.get(timeout=60)
        (again,) = ask(
            batcher, [Request(prompt, Mix(Weights(0, 1)), sampling=GREEDY, max_tokens=5)]
        )
        assert batcher.statistics().n_running == 6  # all sequences were in use
        for job in jobs:
            job.cancel()
        batcher.close()
    assert text_of(again) == text_of(want)
    assert again[0].n_cached == prompt.n_tokens() - 1


def test_an_answer_ends_where_the_context_is_full(trio, batcher):
    prompt = trio.prompt(TEXTS[0])
    (events,) = ask(
        batcher, [Request(prompt, Mix(Weights(0, 1)), sampling=GREEDY, max_tokens=5000)]
    )
    assert events[-1].finish_reason == "context"
    assert events[-1].n_tokens == trio.n_ctx - prompt.n_tokens() + 1


def test_a_cancelled_request_ends_and_gives_up_its_place(trio):
    batcher = Batcher(trio, n_parallel=1, n_queue=8)
    started, ended = threading.Event(), threading.Event()

    def on_event(event):
        started.set()
        if event.finish_reason == "cancelled":
            ended.set()

    sampling = Sampling(seed=1, logit_bias={0: -100.0})
    job = batcher.submit(
        Request(trio.prompt("а"), Mix(Weights(0.1, 0.9)), sampling=sampling, max_tokens=400),
        on_event,
    )
    waits = batcher.submit(Request(trio.prompt("б"), sampling=GREEDY), lambda event: None)
    assert started.wait(60)
    waits.cancel()
    job.cancel()
    assert ended.wait(60)
    (events,) = ask(batcher, [Request(trio.prompt("в"), sampling=GREEDY, max_tokens=2)])
    assert events[-1].finish_reason == "length"
    statistics = batcher.statistics()
    assert statistics.finished == {"cancelled": 2, "length": 1}
    assert statistics.n_running == statistics.n_waiting == 0
    batcher.close()


def test_bad_requests_are_refused_and_harm_nobody(trio, batcher):
    with pytest.raises(PromptError, match="context holds 512"):
        batcher.submit(Request(trio.prompt("сөз " * 600)), print)
    with pytest.raises(SamplerError, match="grammar"):
        batcher.submit(Request(trio.prompt("а"), sampling=Sampling(grammar="root ::= (")), print)
    # Ruled out only once its rows are there.
    silent = Sampling(grammar='root ::= ""')
    nothing = Request(trio.prompt("а"), Mix(Weights(1, 0)), sampling=silent)
    single = Request(Prompt((Segment.of([5]),)), sampling=GREEDY)
    good = Request(trio.prompt(TEXTS[0]), sampling=GREEDY, max_tokens=3)
    found = ask(batcher, [nothing, good, single])
    assert isinstance(found[0][-1].error, SamplerError) or found[0][-1].n_tokens == 0
    assert found[1][-1].finish_reason == "length" and found[1][-1].n_tokens == 3
    assert isinstance(found[2][-1].error, PromptError)


def test_after_a_failed_decode_all_are_told_and_the_next_is_answered(trio, batcher, monkeypatch):
    request = Request(trio.prompt(TEXTS[0]), Mix(Weights(0.3, 0.5)), sampling=GREEDY, max_tokens=40)
    (want,) = ask(batcher, [request])
    read, failing = batcher._sequences._read, [True]

    def fail_once(role, wanted, progress):
        if role == ROLES[1] and len(batcher._running) == 2 and failing:
            failing.clear()
            raise ModelError("the device is gone")
        return read(role, wanted, progress)

    monkeypatch.setattr(batcher._sequences, "_read", fail_once)
    found = ask(batcher, [request, request])
    assert all(str(events[-1].error) == "the device is gone" for events in found)
    (again,) = ask(batcher, [request])
    assert text_of(again) == text_of(want)


def test_any_mixture_of_requests_gives_each_its_own_text(trio):
    """Beginnings in common, room for few, cancellations: whoever ends has his own text."""
    rng = random.Random(5)
    requests = []
    for _ in range(30):
        text = " ".join(rng.choices(TEXTS, k=rng.randint(1, 3)))
        weights = rng.choice([None, Weights(0.1, 0.9), Weights(0.5, 0.5), Weights(0, 1)])
        n = rng.randint(1, 25)
        prompt = trio.prompt(text)
        requests.append(
            Request(prompt, weights and Mix(weights), sampling=GREEDY, max_tokens=n, n_top=4)
        )
    expected = [ids_alone(trio, request) for request in requests]
    batcher = Batcher(trio, n_parallel=5, n_queue=64)
    events = ask(batcher, requests, cancelled=rng.sample(range(len(requests)), 8))
    batcher.close()
    for i, own in enumerate(events):
        assert own[-1].error is None
        cancelled = own[-1].finish_reason == "cancelled"
        assert agrees(own, expected[i][: own[-1].n_tokens] if cancelled else expected[i])


def test_a_closed_batcher_leaves_the_trio_as_new(trio, batcher):
    ask(batcher, [Request(trio.prompt(TEXTS[0]), sampling=GREEDY, max_tokens=4)])
    batcher.close()
    assert trio.n_past == 0
    fresh = generate(trio, Request(TEXTS[2], max_tokens=8, sampling=GREEDY)).text
    trio.forget()
    with Trio.nano(n_threads=2) as other:
        assert generate(other, Request(TEXTS[2], max_tokens=8, sampling=GREEDY)).text == fresh
