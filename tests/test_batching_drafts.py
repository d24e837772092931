"""Drafts in the batch engine: answers get them together, and nobody can tell."""

import queue
import threading
import time
from functools import partial

import pytest
from test_batching import GREEDY, MIX, TEXTS, ask, has_ended, text_of, trio  # noqa: F401

from trimix_gguf import Trio, Weights, generate
from trimix_gguf.answering import answer as answers_module
from trimix_gguf.answering import drafting
from trimix_gguf.answering import job as jobs_module
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.request import Request
from trimix_gguf.answering.steering import Steering
from trimix_gguf.errors import ModelError
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.mixing.sampling import Sampling


def test_an_answer_is_drafted_whoever_comes_or_goes(trio, monkeypatch):  # noqa: F811
    """Its text is that of lockstep."""
    monkeypatch.setattr(drafting, "_LEAST_STEP", 0.0)  # nano's steps are too short to draft for
    draft_always(monkeypatch)
    requests = [
        Request(trio.prompt(text), MIX, sampling=GREEDY, max_tokens=n, trace="all")
        for text, n in zip(TEXTS, (40, 9, 23), strict=False)
    ]
    trio.forget()
    alone = [generate(trio, request, speculative="off") for request in requests]
    for gaps in ((0, 0, 0), (0, 3, 8), (0, 12, 30)):
        batcher, found = Batcher(trio, n_parallel=3), [[] for _ in requests]
        ended = threading.Semaphore(0)

        def take(events, event, ended=ended):
            events.append(event)
            if event.finish_reason is not None or event.error is not None:
                ended.release()

        for request, events, gap in zip(requests, found, gaps, strict=True):
            while len(found[0]) < gap and not has_ended(found[0]):
                time.sleep(0.001)
            batcher.submit(request, partial(take, events))
        assert all(ended.acquire(timeout=60) for _ in requests)
        batcher.close()
        for events, want in zip(found, alone, strict=True):
            assert text_of(events) == want.text and events[-1].n_tokens == want.n_tokens
    drafted = [token.from_draft for event in found[0] for token in event.tokens]
    assert any(drafted)
    trio.forget()


@pytest.fixture(scope="module")
def exact():
    """Exact enough for batches to equal single decodes, so that draws are the same too."""
    with Trio.nano(flash_attn=False, type_k="f32", type_v="f32", n_threads=1) as opened:
        yield opened


def draft_always(monkeypatch, n_draft=4):
    monkeypatch.setattr(jobs_module, "Drafting", lambda never: Drafting(n_draft=n_draft))


def ask_together(trio, requests, **options):  # noqa: F811
    """The events of each request; the engine begins when all of them wait."""
    trio.forget()
    batcher, events, ended = Batcher(trio, **options), [[] for _ in requests], queue.Queue()

    def take(i, event):
        events[i].append(event)
        if event.error is not None or event.finish_reason is not None:
            ended.put(i)

    batcher.submit_all(requests, take)
    for _ in requests:
        ended.get(timeout=120)
    batcher.close()
    return events


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_drafts_of_several_change_no_text(exact, monkeypatch, temperature):
    mixes = ((0.3, 0.7), (0.05, 0.95), (1.0, 0.0), (0.0, 1.0))
    sampling = Sampling(seed=5, temperature=temperature)
    requests = [
        Request(exact.prompt(text), Weights(*mix), sampling=sampling, max_tokens=n)
        for text, mix, n in zip(TEXTS, mixes, (24, 7, 16, 30), strict=True)
    ]
    exact.forget()
    expected = [generate(exact, request, speculative="off") for request in requests]
    draft_always(monkeypatch)
    found = ask_together(exact, requests)
    for events, want in zip(found, expected, strict=True):
        assert text_of(events) == want.text and events[-1].n_tokens == want.n_tokens
    assert sum(token.from_draft for events in found for e in events for token in e.tokens) > 10


def test_one_batch_verifies_the_drafts_of_all(trio, monkeypatch):  # noqa: F811
    draft_always(monkeypatch)
    requests = [
        Request(trio.prompt(text), MIX, sampling=GREEDY, max_tokens=20) for text in TEXTS[:3]
    ]
    batches = {role: [] for role in trio.models}
    for role, model in trio.models.items():

        def noted(entries, decode=model.decode_entries, into=batches[role]):
            into.append([sequence for _, _, sequence, _ in entries])
            return decode(entries)

        monkeypatch.setattr(model, "decode_entries", noted)
    ask_together(trio, requests)
    assert any(len(set(batch)) == 3 and len(batch) == 15 for batch in batches["large_ins"])
    assert any(len(set(batch)) == 3 and len(batch) == 3 for batch in batches["small_cpt"])
    trio.forget()


def test_the_engine_measures_what_its_drafts_are_planned_by(trio, monkeypatch, tmp_path):  # noqa: F811
    """Bug: only sequence 0 was timed, so a server drafted nothing until `generate` had run once."""
    monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path))
    for model in trio.models.values():
        monkeypatch.setattr(model, "decode_seconds", {})
    request = Request(trio.prompt(TEXTS[0]), MIX, sampling=GREEDY, max_tokens=8)
    ask_together(trio, [request], drafts=False)
    assert all(1 in trio.models[role].decode_seconds for role in ("large_ins", "small_cpt"))
    trio.forget()


def test_a_model_that_the_mix_leaves_on_the_way_is_read_no_more(trio, monkeypatch):  # noqa: F811
    """Bug: what the mix read at the start was read to the end, also after the collapse guard."""

    class Leaves(Steering):
        def take(self, token, rows):
            self.mix = METHODS["large_ins"]

    monkeypatch.setattr(answers_module, "steering_of", lambda selection, _: Leaves(selection.mix))
    model, n_decoded = trio.models["small_base"], []
    decode = model.decode_entries
    monkeypatch.setattr(
        model, "decode_entries", lambda entries: n_decoded.append(len(entries)) or decode(entries)
    )
    request = Request(trio.prompt(TEXTS[0]), Weights(0.3, 0.9), sampling=GREEDY, max_tokens=9)
    ask_together(trio, [request], drafts=False)
    assert len(n_decoded) == 1  # the prompt
    generate(trio, request, speculative="off")
    assert len(n_decoded) == 2
    trio.forget()


def test_without_drafts_a_step_is_one_token(trio):  # noqa: F811
    request = Request(trio.prompt(TEXTS[0]), MIX, sampling=GREEDY, max_tokens=20)
    found = ask_together(trio, [request, request], drafts=False)
    assert not any(token.from_draft for events in found for e in events for token in e.tokens)
    trio.forget()


def test_a_drafted_answer_that_is_cancelled_leaves_its_place(trio, monkeypatch):  # noqa: F811
    draft_always(monkeypatch, 6)
    batcher, events = Batcher(trio), queue.Queue()
    going = batcher.submit(Request(trio.prompt(TEXTS[0]), MIX, max_tokens=400), events.put)
    while events.get(timeout=60).n_tokens < 5:
        pass
    going.cancel()
    while events.get(timeout=60).finish_reason is None:
        pass
    held = trio.sequences.ids(going.sequence)["small_cpt"]
    assert len(held) == len(trio.sequences.ids(going.sequence)["large_ins"])
    (again,) = ask(batcher, [Request(trio.prompt(TEXTS[0]), MIX, sampling=GREEDY, max_tokens=8)])
    batcher.close()
    trio.forget()
    want = generate(trio, trio.prompt(TEXTS[0]), weights=MIX, temperature=0, max_tokens=8)
    assert text_of(again) == want.text
    trio.forget()


@pytest.mark.parametrize("role", ["small_cpt", "large_ins"])
def test_after_a_failed_decode_nothing_that_was_read_is_trusted(trio, monkeypatch, role):  # noqa: F811
    """Bug: it was taken for a fault of the request, and later prompts began with its caches."""
    draft_always(monkeypatch)
    batcher, model = Batcher(trio), trio.models[role]
    request = Request(trio.prompt(TEXTS[0]), MIX, sampling=GREEDY, max_tokens=12)
    decode, n_left = model.decode_entries, 4

    def fails_once(entries):
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise ModelError("the device is gone")
        return decode(entries)

    monkeypatch.setattr(model, "decode_entries", fails_once)
    (failed,) = ask(batcher, [request])
    assert "the device is gone" in str(failed[-1].error) and len(failed) > 1
    (again,) = ask(batcher, [request])
    batcher.close()
    assert again[0].n_cached == 0
    trio.forget()
    assert text_of(again) == generate(trio, request).text
    trio.forget()
