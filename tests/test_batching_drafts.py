"""Drafts in the batch engine: one that is answered by itself gets them, and nobody can tell."""

import queue
import threading
import time
from functools import partial

import pytest
from test_batching import GREEDY, MIX, TEXTS, ask, has_ended, text_of, trio  # noqa: F401

from trimix_gguf import generate
from trimix_gguf.answering import drafting
from trimix_gguf.answering import job as jobs_module
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.request import Request
from trimix_gguf.errors import ModelError


def test_one_that_is_answered_by_itself_is_drafted_until_others_come(trio, monkeypatch):  # noqa: F811
    """Its text is that of lockstep, whenever another one comes or goes."""
    monkeypatch.setattr(drafting, "_LEAST_STEP", 0.0)  # nano's steps are too short to draft for
    monkeypatch.setattr(jobs_module, "Drafting", partial(Drafting, n_draft=4))
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


def test_a_drafted_answer_that_is_cancelled_leaves_its_place(trio, monkeypatch):  # noqa: F811
    monkeypatch.setattr(jobs_module, "Drafting", partial(Drafting, n_draft=6))
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
    monkeypatch.setattr(jobs_module, "Drafting", partial(Drafting, n_draft=4))
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
