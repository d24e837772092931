"""The collapse guard: a mix that repeats itself gives way to large_ins, and that is said."""

import itertools
import json
import queue
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import KAZAKH
from looping import NEVER_ENDS
from served import ENDLESS, PATIENCE_S, events_of, serving

from trimix_gguf import Trio, Weights, generate
from trimix_gguf.answering.answer import new_sampler
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.chat import chat_prompt
from trimix_gguf.answering.decoding import decode_steps
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.answering.generation import stream_generate
from trimix_gguf.answering.request import Request, join_events
from trimix_gguf.answering.steering import SPAN, Guard, Steering
from trimix_gguf.choosing.methods import AUTO
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.mixing.fusion import METHODS, Mix
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trios.triofile import TrioFile


def expecting(token: int, expects: bool) -> dict[str, np.ndarray]:
    row = np.zeros(50, np.float32)
    row[token if expects else token - 1] = 9.0
    return {"large_ins": row}


def written(guard: Guard, ids: list[int], *, expects: bool) -> int | None:
    for token in ids:
        guard.take(token, expecting(token, expects))
    return guard.stepped_in


ROUND = list(range(1, 2 * SPAN))


def test_a_loop_that_large_ins_does_not_expect_ends_in_large_ins():
    guard = Guard(Mix(Weights(0.3, 0.9)))
    assert written(guard, ROUND, expects=False) is None
    assert written(guard, ROUND, expects=False) == len(ROUND) + SPAN
    assert guard.mix.weights == METHODS["large_ins"].weights


def test_what_large_ins_would_repeat_is_never_cut():
    guard = Guard(Mix(Weights(0.3, 0.9)))
    assert written(guard, 5 * ROUND, expects=True) is None


def test_text_that_does_not_repeat_is_left_alone():
    assert written(Guard(Mix(Weights(0.3, 0.9))), list(range(1, 49)), expects=False) is None


def test_who_sees_rows_only_when_asked_judges_like_who_sees_each(rng):
    """Random texts with loops, some of which large_ins expects."""
    n_stepped_in = 0
    for _ in range(60):
        pieces = [rng.integers(1, 50, rng.integers(3, 14)).tolist() for _ in range(3)]
        ids = [i for at in rng.integers(0, 3, 12) for i in pieces[at]]
        rows = [expecting(i, bool(rng.random() < 0.9)) for i in ids]
        all_along, when_asked = Guard(Mix(Weights(0.3, 0.9))), Guard(Mix(Weights(0.0, 1.0)))
        for n, token in enumerate(ids, 1):
            all_along.take(token, rows[n - 1])
            when_asked.take(token, rows[n - 1] if "large_ins" in when_asked.roles else {})
            if owed := when_asked.n_owed:
                see = np.stack([row["large_ins"] for row in rows[n - owed : n]])
                when_asked.see({"large_ins": see})
            assert when_asked.stepped_in == all_along.stepped_in and when_asked.n_owed == 0
        n_stepped_in += all_along.stepped_in is not None
    assert 10 < n_stepped_in < 50


# -- the engines ------------------------------------------------------------------------------

SMALL_CPT, LARGE_INS = METHODS["small_cpt"].weights, METHODS["large_ins"].weights
MESSAGES = [{"role": "user", "content": KAZAKH}]
MOST = 160  # tokens of an answer, of which small_cpt repeats itself before half


@pytest.fixture(scope="module")
def looping(looping_folder):
    """Where a token read alone and beside others hardly rounds apart."""
    arguments = TrioFile.read(looping_folder / "trio.toml").load_arguments()
    with Trio.load(**{**arguments, "n_window": 32}, flash_attn=True, n_threads=1) as opened:
        yield opened


def request(trio, **options):
    options = {"logit_bias": NEVER_ENDS, **options}
    return Request.of(chat_prompt(trio, MESSAGES), max_tokens=MOST, temperature=0, **options)


@pytest.fixture(scope="module")
def alone(looping):
    """The answer without drafts, one token after another."""
    looping.forget()
    return generate(looping, request(looping), speculative="off")


def ids(answer, n=None):
    return [token.id for token in answer.tokens[:n]]


def test_the_guard_steps_in_where_the_same_weights_by_hand_go_on(looping, alone):
    assert alone.selection.weights == SMALL_CPT and 0 < alone.guard < MOST
    looping.forget()
    fixed = generate(looping, request(looping, weights=SMALL_CPT), speculative="off")
    assert fixed.guard is None
    assert ids(alone, alone.guard) == ids(fixed, alone.guard)
    assert ids(alone) != ids(fixed)


def test_after_it_the_answer_is_that_of_large_ins(looping, alone):
    """Oracle: large_ins, greedy, after the prompt and what was written until then."""
    segments = chat_prompt(looping, MESSAGES).segments
    looping.prefill(Prompt((*segments, Segment.of(ids(alone, alone.guard)))))
    after = int(looping.rows((ROLES[0],))[ROLES[0]].argmax())
    assert alone.tokens[alone.guard].id == after


def test_drafts_do_not_move_it(looping, alone):
    looping.forget()
    drafted = generate(looping, request(looping), speculative="on")
    assert any(token.from_draft for token in drafted.tokens)
    assert (drafted.guard, ids(drafted)) == (alone.guard, ids(alone))


def test_a_mix_without_large_ins_has_it_read_only_where_a_span_comes_again(looping, alone):
    """And a trace, which has it read for each token, changes nothing."""
    looping.forget()
    n_read = []
    for event in stream_generate(looping, request(looping), speculative="off"):
        n_read.append(looping.sequences.n_read(0, "large_ins"))
        if event.guard is not None:
            break
    assert n_read[: SPAN + 1] == [0] * (SPAN + 1)
    assert n_read[-1] == alone.n_prompt + alone.guard
    looping.forget()
    traced = generate(looping, request(looping, trace="mix"), speculative="off")
    assert (traced.guard, ids(traced)) == (alone.guard, ids(alone))


def answers(trio, requests, **options):
    """The whole answers of a batch engine to requests that come together."""
    batcher = Batcher(trio, n_parallel=4, n_queue=8, **options)
    events, ended = [[] for _ in requests], queue.Queue()

    def take(i, event):
        events[i].append(event)
        if event.finish_reason is not None or event.error is not None:
            ended.put(i)

    try:
        for i, one in enumerate(requests):
            batcher.submit(one, lambda event, i=i: take(i, event))
        for _ in requests:
            ended.get(timeout=PATIENCE_S)
    finally:
        batcher.close()
    return [join_events(some) for some in events]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("drafts", [False, True])
def test_it_steps_in_in_the_batch_engine_with_drafts_and_without(looping, alone, n, drafts):
    looping.forget()
    others = [request(looping, weights=LARGE_INS) for _ in range(n - 1)]
    found, *rest = answers(looping, [request(looping), *others], drafts=drafts)
    assert (found.guard, ids(found)) == (alone.guard, ids(alone))
    assert all(other.guard is None for other in rest)


def test_where_others_wait_large_ins_never_owes_much_of_an_answer(looping_folder):
    """Else it would read a long answer at once, and all others would stand still."""
    arguments = TrioFile.read(looping_folder / "trio.toml").load_arguments()
    owed, ended = [], queue.Queue()
    with Trio.load(**{**arguments, "n_window": 12}, n_threads=1) as trio:
        batcher = Batcher(trio, drafts=False)

        def look(event):
            held = trio.sequences.ids(job.sequence)["large_ins"]
            owed.append(len(held) - trio.sequences.n_read(job.sequence, "large_ins"))
            if event.finish_reason is not None:
                ended.put(event)

        try:
            with batcher._changed:  # so that it does not begin before `job` is known
                job = batcher.submit(request(trio), look)
            assert ended.get(timeout=PATIENCE_S).error is None
        finally:
            batcher.close()
    assert SPAN < max(owed) <= 12


def test_what_it_has_still_to_read_has_room_beside_others(looping, alone):
    """Bug: a second request was let into that room, and then the context was full for both."""
    chat = chat_prompt(looping, MESSAGES).segments
    ahead = Segment.per_role({ROLES[0]: [5] * 100})
    chosen = Selection(Mix(SMALL_CPT), AUTO)
    first = replace(request(looping, weights=chosen), prompt=Prompt((ahead, *chat)))
    second = request(looping, weights=LARGE_INS)
    n_free = looping.n_ctx - 100 - alone.n_prompt - MOST
    ahead = Segment.per_role({ROLES[0]: [5] * (n_free + 10 - alone.n_prompt - MOST)})
    second = replace(second, prompt=Prompt((ahead, *chat)))
    looping.forget()
    batcher, events, ended = Batcher(looping, n_parallel=2), [], queue.Queue()

    def take(event):
        events.append(event)
        if sum(len(one.tokens) for one in events) == 10:
            batcher.submit(second, tell)
        tell(event)

    def tell(event):
        if event.finish_reason is not None or event.error is not None:
            ended.put(event)

    batcher.submit(first, take)
    found = [ended.get(timeout=PATIENCE_S) for _ in range(2)]
    batcher.close()
    assert [event.error for event in found] == [None, None]
    assert 10 < found[0].guard < MOST == found[1].n_tokens


class Asks(Steering):
    """Has to see large_ins' row of each third token before another one is picked."""

    consults = ROLES[:1]
    n_taken, n_seen = 0, 0

    @property
    def n_owed(self):
        return int(self.n_taken // 3 > self.n_seen)

    def take(self, token, rows):
        assert self.n_owed == 0
        self.n_taken, self.token = self.n_taken + 1, token

    def see(self, rows):
        assert rows["large_ins"].shape[0] == 1
        self.n_seen += 1


def test_a_draft_ends_where_something_has_to_be_seen(trio):
    """Else its other tokens would be picked from a mix that has perhaps ended."""
    texts = {}
    for n_draft in (0, 5):
        prompt, steering = trio.prompt(KAZAKH), Asks(Mix(Weights(0.0, 0.9)))
        trio.prefill(prompt)
        sampler = new_sampler(trio, prompt, Sampling(temperature=0))
        drafting = Drafting(n_draft=n_draft)
        steps = decode_steps(trio, steering, sampler, drafting=drafting, max_tokens=30)
        found = []
        for step in itertools.islice(steps, 30):
            sampler.accept(step.token)
            steering.take(step.token, step.rows)
            found.append(step)
        steps.close()
        assert any(step.from_draft for step in found) == bool(n_draft)
        assert steering.n_seen == 9  # the thirtieth token is not followed by another
        texts[n_draft] = [step.token for step in found]
        trio.forget()
    assert texts[0] == texts[5]


# -- who says so ------------------------------------------------------------------------------

GREEDY = ("-n", MOST, "--temperature", 0, "--threads", 1)
GREEDY += tuple(word for i, bias in NEVER_ENDS.items() for word in ("--logit-bias", f"{i}={bias}"))


def test_generate_says_so_in_a_note_in_json_and_in_the_trace(trimix, looping_folder, tmp_path):
    trace, asked = tmp_path / "trace.jsonl", "Абай кім?"
    result = trimix(
        "generate", asked, "--trio", looping_folder, *GREEDY, "--trace", trace, "--json"
    )
    assert result.returncode == 0, result.stderr.decode()
    n = json.loads(result.stdout)["guard"]
    assert f"note: the mix repeated itself; after {n} tokens" in result.stderr.decode()
    rows = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert all(row["weights"] == {"alpha": 0.0, "beta": 1.0} for row in rows[:n])
    assert all(row["weights"] == {"alpha": 1.0, "beta": 0.0} for row in rows[n:]) and rows[n:]


def test_a_chat_says_so_and_why_shows_all_its_tokens(trimix, looping_folder):
    """Bug: /why failed after the guard, for it looked for models that were no longer read."""
    stdin = f"{KAZAKH}\n/why\n".encode()
    result = trimix("chat", "--trio", looping_folder, *GREEDY, stdin=stdin)
    assert result.returncode == 0, result.stderr.decode()
    said = "the mix repeated itself; after {} tokens large_ins went on by itself"
    [n] = re.findall(said.format(r"(\d+)"), result.stderr.decode())
    out = result.stdout.decode()
    assert f"guard: {said.format(n)}" in out
    assert f"{MOST} tokens" in out and "auto: small_cpt is better" in out
    header = next(line for line in out.splitlines() if line.startswith("token "))
    assert header.split() == ["token", "large_ins", "small_cpt", "mix", "spoke"]


@pytest.fixture(scope="module")
def server(looping_folder):
    with serving("--trio", looping_folder, "--threads", 1) as served:
        yield served


CHAT = {"messages": MESSAGES, "max_tokens": MOST, "temperature": 0, **ENDLESS}


@pytest.fixture(scope="module")
def told(server):
    """What the server says of its guard."""
    answer = server.post("/v1/chat/completions", {**CHAT, "trimix": {"trace": True}}).json()
    n = answer["trimix"]["guard"]
    traced = answer["trimix"]["tokens"]
    assert 0 < n < len(traced) == MOST
    # After it only large_ins is read, and so the trace has only its probability.
    assert {*traced[n - 1]["probabilities"]} == {"large_ins", "small_cpt", "fused"}
    assert all({*token["probabilities"]} == {"large_ins", "fused"} for token in traced[n:])
    return n


def test_the_server_says_so_whole_and_streamed(server, told):
    assert server.post("/v1/chat/completions", CHAT).json()["trimix"]["guard"] == told
    text = server.post("/v1/chat/completions", {**CHAT, "stream": True}).text
    chunks = [json.loads(line) for line in events_of(text) if line != "[DONE]"]
    guards = [chunk["trimix"]["guard"] for chunk in chunks if "guard" in chunk.get("trimix", {})]
    assert guards and set(guards) == {told}
    fixed = {**CHAT, "trimix": {"weights": [0, 1]}}
    assert "guard" not in server.post("/v1/chat/completions", fixed).json()["trimix"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", CHAT),
        ("/v1/responses", {"input": KAZAKH, "max_output_tokens": MOST, "temperature": 0}),
    ],
)
def test_the_other_doors_say_so(server, told, path, body):
    assert server.post(path, body).json()["trimix"]["guard"] == told


def test_a_run_of_many_prompts_says_so(trimix, looping_folder, told, tmp_path):
    lines, out = tmp_path / "lines.jsonl", tmp_path / "out.jsonl"
    lines.write_text(json.dumps(CHAT), encoding="utf-8")
    result = trimix("run", lines, "-o", out, "--trio", looping_folder, "--threads", 1)
    assert result.returncode == 0, result.stderr.decode()
    assert f'"guard": {told}' in out.read_text(encoding="utf-8")
