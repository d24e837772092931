"""Chats that fill most of the context, in the batch engine: a turn reads what is new."""

import queue
from dataclasses import replace

import pytest
from conftest import KAZAKH
from served import ENDLESS, serving
from test_batching import agrees, ask, ids_alone, text_of

from trimix_gguf import Trio, Weights
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.chat import chat_prompt
from trimix_gguf.answering.job import Job
from trimix_gguf.answering.request import Request
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment

SYSTEM = {"role": "system", "content": "Сен көмекшісің."}
N_TOKENS = 16


@pytest.fixture(scope="module")
def trio():
    with Trio.nano(n_ctx=256, n_threads=2, n_window=32, flash_attn=True) as loaded:
        yield loaded


def request_of(trio, messages, **options):
    endless = dict.fromkeys(trio.end_of_generation, -100.0)
    prompt = chat_prompt(trio, messages)
    sampling = Sampling(temperature=0, logit_bias=endless)
    given = {"sampling": sampling, "max_tokens": N_TOKENS, "n_top": 20}
    return Request(prompt, **{**given, **options})


def chat(trio, batcher, n_turns, *, most, seen, **options):
    """Turns one after another, the oldest left out where a prompt has more than `most` tokens.

    `seen` gets of each its request, its events and whether more was left out than before.
    """
    said, first = [], 0
    for i in range(n_turns):
        asked = {"role": "user", "content": f"{i} {KAZAKH}"}
        before = first
        if request_of(trio, [SYSTEM, *said[first:], asked]).prompt.n_tokens("small_cpt") > most:
            first = len(said) - 4
        request = request_of(trio, [SYSTEM, *said[first:], asked], **options)
        (events,) = ask(batcher, [request])
        said += [asked, {"role": "assistant", "content": text_of(events).strip()}]
        seen.append((request, events, first > before))


def n_read(events):
    return events[-1].n_prompt - events[-1].n_cached


@pytest.mark.parametrize("options", [{"weights": Weights(0.3, 0.9)}, {"method": "ppl"}])
def test_a_long_chat_goes_on_in_its_own_sequence_and_exactly(trio, options):
    """Bug: where a chat took half of the context, each turn read all of it again."""
    batcher, seen = Batcher(trio, n_parallel=3), []
    try:
        chat(trio, batcher, 5, most=1000, seen=seen, **options)
    finally:
        batcher.close()
    assert seen[-1][0].prompt.n_tokens("small_cpt") > 0.7 * trio.n_ctx
    for _, events, _ in seen[1:]:
        # The new question, the answer before it as the text that it is, and a row for its own sake.
        assert n_read(events) < 2 * N_TOKENS + 30
    for request, events, _ in seen:
        assert agrees(events, ids_alone(trio, request))


@pytest.mark.parametrize("options", [{"weights": Weights(0.3, 0.9)}, {"method": "ppl"}])
def test_with_a_shift_a_chat_without_its_oldest_turns_reads_only_what_is_new(trio, options):
    n_cut = {}
    for shifts in (True, False):
        batcher, seen = Batcher(trio, n_parallel=3, context_shift=shifts), []
        try:
            chat(trio, batcher, 9, most=190, seen=seen, **options)
        finally:
            batcher.close()
        n_cut[shifts] = [n_read(events) for _, events, is_cut in seen if is_cut]
        assert len(n_cut[shifts]) >= 1
        others = [n_read(events) for _, events, is_cut in seen[1:] if not is_cut]
    assert max(n_cut[True]) <= max(others) < 0.6 * min(n_cut[False])


def test_where_a_model_cannot_shift_what_is_left_is_read_again_and_exact(trio, monkeypatch):
    can_shift = Model.can_shift.fget
    own = property(lambda model: model is not trio.models["small_base"] and can_shift(model))
    monkeypatch.setattr(Model, "can_shift", own)
    batcher, seen = Batcher(trio, n_parallel=3, context_shift=True), []
    try:
        chat(trio, batcher, 7, most=190, seen=seen, weights=Weights(0.3, 0.9))
    finally:
        batcher.close()
    n_cut = [n_read(events) for _, events, is_cut in seen if is_cut]
    assert n_cut and min(n_cut) > 2 * N_TOKENS + 30
    for request, events, _ in seen:
        assert agrees(events, ids_alone(trio, request))


def test_room_is_left_for_a_prompt_that_is_read_a_second_time_for_its_echo(trio, monkeypatch):
    """Bug: it counted as read, though by then it shares no position; then all requests failed."""

    def prompt(n, first):
        return Prompt((Segment.of([first, *range(20, 19 + n)]),))

    batcher, more, late = Batcher(trio, n_parallel=3), [], queue.Queue()
    other = request_of(trio, [SYSTEM], weights=Weights(0.3, 0.7), max_tokens=80)
    read = Job.read

    def read_and_ask(job, end, rows):
        read(job, end, rows)
        if job._request.echo and not more:  # it was placed, and its weights are still chosen
            more.append(batcher.submit(replace(other, prompt=prompt(60, 12)), late.put))

    try:
        kept = replace(other, prompt=prompt(100, 11), weights=None, method="ppl", max_tokens=1)
        ask(batcher, [kept])
        monkeypatch.setattr(Job, "read", read_and_ask)
        (events,) = ask(batcher, [replace(kept, echo=True, max_tokens=4)])
        while (event := late.get(timeout=120)).finish_reason is None:
            assert event.error is None
    finally:
        batcher.close()
    assert events[-1].finish_reason == event.finish_reason == "length"
    assert len(events[0].prompt_tokens) == 100 and events[0].n_cached == 0


@pytest.mark.parametrize("flags", [(), ("--context-shift",)], ids=["default", "shift"])
def test_a_server_shifts_only_if_it_is_asked_to(flags):
    said = [SYSTEM]
    with serving("--n-ctx", 256, "--threads", 1, *flags) as served:
        for i in range(5):
            said.append({"role": "user", "content": f"{i} {KAZAKH}"})
            if i == 4:
                del said[1:5]  # the oldest two turns
            body = {
                "messages": said,
                "temperature": 0,
                "max_tokens": N_TOKENS,
                "trimix": {"weights": [0.3, 0.9]},
                **ENDLESS,
            }
            answer = served.post("/v1/chat/completions", body).json()
            said.append(answer["choices"][0]["message"])
        usage = answer["usage"]
    n_read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert (n_read < 2 * N_TOKENS + 24) == bool(flags)
