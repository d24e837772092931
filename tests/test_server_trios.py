"""Which trios a server has loaded: what waits, what makes room, and what a failure leaves."""

import asyncio
import itertools
import os
import queue
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from trimix_gguf import Trio, Weights
from trimix_gguf.answering import job as jobs_module
from trimix_gguf.answering.batching import Batcher, Statistics
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.generation import stream_generate
from trimix_gguf.answering.request import Request
from trimix_gguf.errors import ModelError, ModelFileError, QueueFull
from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.letters import closest
from trimix_gguf.server.limits import Limits
from trimix_gguf.server.trios import Entry, Group, ServedTask, Trios
from trimix_gguf.trio.sequences import Sequences


class Shelf:
    """Groups of one nano trio each, whose loading the test holds up and sees."""

    def __init__(self):
        self.gates = {name: threading.Event() for name in "abc"}
        self.opened, self.room, self.failures, self.fails_early = [], True, [], False
        self.entries = {name: Entry(name, 64) for name in "abc"}
        self.gates["a"].set()

    def trios(self, **options):
        groups = [
            Group([entry], load=lambda name=name: self._load(name), fits=self._fits)
            for name, entry in self.entries.items()
        ]
        limits = Limits(parallel=1, queue=1, timeout_s=options.pop("timeout_s", 60))
        return Trios(groups, limits=limits, **options)

    def _fits(self):
        if self.failures and self.fails_early:
            raise self.failures.pop()
        return self.room

    def _load(self, name):
        self.gates[name].wait(60)
        if self.failures:
            raise self.failures.pop()
        self.opened.append(name)
        return [Trio.nano(n_ctx=64, n_threads=1)]


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def run():
    """Run a coroutine function on new Trios, which are closed afterwards."""

    def running(check, trios):
        try:
            asyncio.run(asyncio.wait_for(check(trios), 60))
        finally:
            trios.close()

    return running


async def soon(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_while_one_loads_others_are_used_and_who_waits_for_it_has_limits(shelf, run):
    async def check(trios):
        async def use(name):
            async with trios.use(shelf.entries[name]) as engine:
                return engine.name

        waiting = [asyncio.create_task(use("b")) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert await use("a") == "a" and trios.is_alive  # b is not there yet
        with pytest.raises(QueueFull):  # as many wait as may
            await use("b")
        shelf.gates["b"].set()
        assert await asyncio.gather(*waiting) == ["b", "b"]
        assert shelf.opened == ["a", "b"]  # once for both

    run(check, shelf.trios())


def test_who_waits_too_long_is_told_and_the_trio_comes_for_the_next(shelf, run):
    async def check(trios):
        with pytest.raises(RequestError) as told:
            async with trios.use(shelf.entries["b"]):
                pass
        assert told.value.status == 504
        shelf.gates["b"].set()
        trios._limits = replace(trios._limits, timeout_s=60)  # however busy this machine is
        async with trios.use(shelf.entries["b"]) as engine:
            assert engine.name == "b"
        assert shelf.opened == ["a", "b"]

    run(check, shelf.trios(timeout_s=0.5))


def test_the_one_unused_longest_makes_room_once_nobody_holds_it(shelf, run):
    shelf.gates["b"].set(), shelf.gates["c"].set()

    async def check(trios):
        a, b, c = shelf.entries.values()

        async def use(entry):
            async with trios.use(entry) as engine:
                return engine.name

        for entry in (b, a, b, a):
            await use(entry)
        async with trios.use(b) as held:
            held.hold()  # as a stream that goes on
        await use(a)
        waiting = asyncio.create_task(use(c))
        await soon(lambda: not trios._group_of["b"].is_here)
        back = asyncio.create_task(use(b))  # it comes back after c, and does not keep c waiting
        await asyncio.sleep(0.1)
        assert not waiting.done() and held.batcher.is_alive
        held.release()
        assert await waiting == "c" and await back == "b"
        assert shelf.opened == ["a", "b", "c", "b"] and not held.batcher.is_alive

    run(check, shelf.trios(max_loaded=2))


def test_without_room_all_others_go_and_the_counts_stay(shelf, run):
    shelf.gates["b"].set()

    async def check(trios):
        a, b, _ = shelf.entries.values()
        async with trios.use(a) as engine:
            engine.batcher._statistics = Statistics(n_tokens=7, finished={"stop": 2})
            weights = weakref.ref(engine.trio.models["large_ins"]._weights)
        del engine
        shelf.room = False
        async with trios.use(b):
            assert not trios._group_of["a"].engines and weights() is None
            assert trios.statistics() == Statistics(n_tokens=7, finished={"stop": 2})

    run(check, shelf.trios())


@pytest.mark.parametrize("early", [False, True])
def test_a_failure_is_told_to_who_waits_and_does_not_last(shelf, run, capsys, early):
    """Bug: one that came as the room was reckoned named its file to the client."""
    shelf.fails_early = early

    async def check(trios):
        shelf.failures.append(ModelFileError("b.gguf: no such file"))
        shelf.gates["b"].set()
        with pytest.raises(RequestError, match="b cannot be loaded") as told:
            async with trios.use(shelf.entries["b"]):
                pass
        assert told.value.status == 503 and "gguf" not in str(told.value)
        assert capsys.readouterr().err == "trimix: b: b.gguf: no such file\n"
        async with trios.use(shelf.entries["a"]):
            pass
        async with trios.use(shelf.entries["b"]) as engine:
            assert engine.name == "b"

    run(check, shelf.trios())


# -- letters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "languages", "found"),
    [
        ("Қазақстан Республикасы", ["ru", "kk", "ug"], "kk"),
        ("Столица Казахстана", ["kk", "ru"], "ru"),  # Kazakh has these letters too
        ("Столица Казахстана", ["ug", "kk"], "kk"),
        ("بۈگۈن ھاۋا قانداق؟", ["kk", "bo", "ug"], "ug"),
        ("ءسوز قازاق جازۋى", ["ug", "kk"], "kk"),  # Kazakh in Arabic letters
        ("བོད་སྐད", ["kk", "ug", "bo"], "bo"),
        ("ᠮᠣᠩᠭᠣᠯ", ["kk", "mn"], "mn"),
        ("Монгол хэлээр ярьдаг уу, өдөр", ["kk", "mn"], "mn"),
        ("Merhaba dünya, nasılsın", ["en", "tr", "kk"], "tr"),
        ("Hello", ["kk", "ug"], "kk"),  # no letter of either: the first
        ("", ["ug", "kk"], "ug"),
        ("12345 ?!", ["ug", "kk"], "ug"),
        ("Қазақ", ["xx", "kk"], "kk"),
    ],
)
def test_letters_tell_the_language(text, languages, found):
    assert languages[closest(text, [[code] for code in languages])] == found


def test_codes_may_have_a_script_and_a_trio_several_languages_or_none():
    assert closest("བོད", [["kk_Cyrl"], ["bo-Tibt"]]) == 1
    assert closest("བོད", [[], ["kk", "bo"]]) == 1
    assert closest("བོད", [[], []]) == 0


# -- turns ------------------------------------------------------------------------------------


def test_one_thread_decodes_for_all_trios_of_a_server(shelf, run, monkeypatch):
    """A second thread has a team of its own in OpenMP, which makes both slow (see Batcher)."""
    threads, read = set(), Sequences.read

    def watched(*given):
        threads.add(threading.get_ident())
        return read(*given)

    monkeypatch.setattr(Sequences, "read", watched)
    shelf.gates["b"].set()
    task = ServedTask("t", lambda trio, _: next(stream_generate(trio, "Қазақ", max_tokens=1)))
    shelf.entries = {name: replace(shelf.entries[name], task=task) for name in "ab"}

    async def check(trios):
        for entry in shelf.entries.values():
            async with trios.use(entry) as engine:
                ended = threading.Event()
                request = Request("Қазақ", max_tokens=3, weights=Weights(0.1, 0.9))
                engine.batcher.submit(
                    request, lambda e, ended=ended: e.finish_reason and ended.set()
                )
                assert await asyncio.to_thread(ended.wait, 60)

    run(check, shelf.trios())
    assert len(threads) == 1 and shelf.opened == ["a", "b"]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_the_choice_for_a_task(shelf):
    """It used to go on in its thread, and the process with it."""
    ended = threading.Event()

    def choose(trio, watch):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            for _ in range(200):
                time.sleep(0.02)
                watch()
        except BaseException:
            ended.set()
            raise

    shelf.entries["a"] = replace(shelf.entries["a"], task=ServedTask("t", choose))
    with pytest.raises(KeyboardInterrupt):
        shelf.trios()
    assert ended.wait(2)


def test_the_end_of_a_server_ends_the_choice_for_a_task(shelf, run):
    """Bug: it lasted as long as the choice, until a watchdog ended the process."""
    begun, ended = threading.Event(), threading.Event()

    def choose(trio, watch):
        begun.set()
        with pytest.raises(ModelError):
            for _ in range(500):
                time.sleep(0.02)
                watch()
        ended.set()
        raise ModelError("it was ended")

    shelf.entries["b"] = replace(shelf.entries["b"], task=ServedTask("t", choose))
    shelf.gates["b"].set()

    async def check(trios):
        waiting = asyncio.create_task(trios.use(shelf.entries["b"]).__aenter__())
        await soon(begun.is_set)
        waiting.cancel()

    run(check, shelf.trios())
    assert ended.is_set()


def test_batchers_take_turns_step_by_step(monkeypatch):
    """No two steps at once, and none waits until the other's answers have ended."""
    thread, steps, now = ThreadPoolExecutor(1), [], set()
    step = Batcher._step

    def watched(self):
        assert not now
        now.add(self)
        steps.append(self)
        step(self)
        time.sleep(0.002)
        now.discard(self)

    monkeypatch.setattr(Batcher, "_step", watched)
    with Trio.nano(n_ctx=64, n_threads=1) as one, Trio.nano(n_threads=1, beside=one) as other:
        batchers = [Batcher(trio, drafts=False, thread=thread) for trio in (one, other)]
        ended = threading.Semaphore(0)
        request = Request("Қазақ", max_tokens=20, weights=Weights(0.1, 0.9))
        request = Request.of(request, logit_bias={0: -100, 3: -100})
        for batcher in batchers:
            batcher.submit(request, lambda event: event.finish_reason and ended.release())
        for _ in batchers:
            assert ended.acquire(timeout=60)
        for batcher in batchers:
            batcher.close()
    assert len(steps) > 30
    changes = sum(a is not b for a, b in itertools.pairwise(steps))
    assert changes > len(steps) / 2


def test_a_batcher_touches_its_models_in_its_turn_only(monkeypatch):
    """Also where drafts end, with an answer that is cancelled or because others come."""
    thread, outside, ended = ThreadPoolExecutor(1, "decode"), [], queue.SimpleQueue()
    monkeypatch.setattr(jobs_module, "Drafting", partial(Drafting, n_draft=6))

    def watch(name, call):
        def watched(*given):
            if not threading.current_thread().name.startswith("decode"):
                outside.append(name)
            return call(*given)

        monkeypatch.setattr(Sequences, name, watched)

    for name in ("fork", "append", "rewind", "drop", "drop_forks", "read"):
        watch(name, getattr(Sequences, name))
    request = Request("Қазақ", max_tokens=30, weights=Weights(0.1, 0.9))
    request = Request.of(request, logit_bias={0: -100, 3: -100})
    with Trio.nano(n_threads=1) as trio:
        batcher, going = Batcher(trio, thread=thread), queue.SimpleQueue()
        outside.clear()  # it empties the caches before its thread begins
        first = batcher.submit(replace(request, max_tokens=400), going.put)
        while going.get(timeout=60).n_tokens < 5:
            pass
        batcher.submit(request, lambda event: event.finish_reason and ended.put(event))
        assert ended.get(timeout=60).finish_reason == "length"
        for _ in range(going.qsize() + 5):  # it is drafted again
            going.get(timeout=60)
        first.cancel()
        while going.get(timeout=60).finish_reason is None:
            pass
        batcher.close()
    assert outside == []
