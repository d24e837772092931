"""A chat goes on from what the caches hold, and nobody can tell by its words or its numbers."""

import json
import math
from dataclasses import replace

import gguf
import numpy as np
import pytest
from conftest import KAZAKH

from trimix_gguf import Trio, Weights, generate, select_weights
from trimix_gguf.answering.conversation import Conversation, pulls
from trimix_gguf.errors import PromptError, WeightsError
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import NANO

EXACT = {"flash_attn": False, "type_k": "f32", "type_v": "f32", "n_threads": 1, "n_ctx": 512}
MIX = Weights(0.1, 0.9)
QUESTIONS = [KAZAKH, "Қалайсыз?", "Абай Құнанбаев кім болған? Ол туралы айтып беріңіз.", "Астана"]


@pytest.fixture(scope="module")
def exact_files(tmp_path_factory):
    """nano in float32: quantized activations round by batch, some 0.03 in a logit."""
    folder, paths = tmp_path_factory.mktemp("float32"), {}
    for role in ROLES:
        paths[role] = folder / f"{role}.gguf"
        reader = gguf.GGUFReader(NANO / f"{role}.gguf")
        writer = gguf.GGUFWriter(paths[role], "llama")
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
    return paths


@pytest.fixture(scope="module")
def kept(exact_files):
    with Trio.load(**exact_files, **EXACT) as opened:
        yield opened


@pytest.fixture(scope="module")
def fresh(exact_files):
    with Trio.load(**exact_files, **EXACT) as opened:
        yield opened


def talk(trio, **options):
    """Greedy answers of twelve tokens, unless told otherwise."""
    endless = dict.fromkeys(trio.end_of_generation, -100.0)
    own = {"temperature": 0, "max_tokens": 12, "speculative": "off", "logit_bias": endless}
    return Conversation(trio, **{**own, **options})


def ask(conversation, text, **options):
    return "".join(r.text for r in conversation.say(text, **options))


@pytest.fixture
def decoded(kept, monkeypatch):
    """Ids that each role of `kept` decodes; clear it before what is to be counted."""
    counts = {}
    for role, model in kept.models.items():

        def counting(entries, role=role, decode=model.decode_entries):
            counts[role] = counts.get(role, 0) + len(entries)
            return decode(entries)

        monkeypatch.setattr(model, "decode_entries", counting)
    return counts


def spelled(trio, ids):
    return b"".join(trio.models["large_ins"].piece(i) for i in ids).decode("utf-8", "replace")


def assert_goes_on_as_fresh(conversation, fresh, question):
    """The next answer and its weights are those of one who reads the same prompt for once."""
    prompt = conversation.prompt(question)
    said = ask(conversation, question)
    fresh.forget()
    oracle = select_weights(fresh, prompt)
    selection = conversation.last.selection
    if conversation.weights is None:
        assert selection.score.n_tokens == oracle.score.n_tokens
        ours, theirs = selection.score.mean_nll(), oracle.score.mean_nll()
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert selection.weights == oracle.weights
    fresh.forget()
    request = replace(conversation._request, prompt=prompt)
    answer = generate(fresh, request, weights=selection.weights, speculative="off")
    assert said == answer.text


def test_each_turn_answers_as_if_all_had_been_read_for_it(kept, fresh):
    for system in ("", "Сен көмекшісің."):
        conversation = talk(kept, system=system)
        for question in QUESTIONS:
            assert_goes_on_as_fresh(conversation, fresh, question)
        assert len(conversation.exchanges) == 4


@pytest.mark.parametrize("weights", [None, MIX, Weights(0.5, 0.3)])
def test_a_turn_reads_only_what_is_new(kept, decoded, weights):
    conversation, read = talk(kept, weights=weights), dict.fromkeys(ROLES, 0)
    kept.forget()
    for question in [*QUESTIONS, KAZAKH]:
        prompt = conversation.prompt(question)
        decoded.clear()
        ask(conversation, question)
        active = conversation.last.selection.weights.active
        assert set(decoded) == set(ROLES if weights is None else active)
        for role in decoded:
            n_past = kept.models[role].n_past
            # The rows before a question, and after a prompt, may be read again for their own sake.
            assert n_past - read[role] <= decoded[role] <= n_past - read[role] + 2
            assert role not in active or n_past == prompt.n_tokens(role) + 11
            read[role] = n_past
    assert all(read[role] > 100 for role in decoded)


def test_held_weights_are_neither_chosen_nor_scored_again(kept, decoded):
    conversation = talk(kept)
    with pytest.raises(WeightsError, match="say something first"):
        conversation.hold()
    ask(conversation, KAZAKH)
    chosen = conversation.hold()
    ask(conversation, "Қалайсыз?")
    assert conversation.last.selection is chosen
    conversation.weights = Weights(0, 1)
    decoded.clear()
    ask(conversation, "Астана")
    assert set(decoded) == {"small_cpt"}
    conversation.weights = None
    ask(conversation, "Алматы")
    assert set(decoded) == set(ROLES) and conversation.last.selection.method == "auto"


def test_undo_edit_and_retry_go_on_from_before(kept, fresh):
    conversation = talk(kept)
    answers = [ask(conversation, q) for q in QUESTIONS[:3]]
    assert conversation.undo().question == QUESTIONS[2]
    assert [e.question for e in conversation.exchanges] == QUESTIONS[:2]
    assert ask(conversation, QUESTIONS[2]) == answers[2]
    assert "".join(r.text for r in conversation.retry()) == answers[2]  # greedy
    edited = "".join(r.text for r in conversation.edit("Алматы қаласы"))
    assert conversation.exchanges[2].question == "Алматы қаласы" and edited != answers[2]
    assert [e.question for e in conversation.exchanges[:2]] == QUESTIONS[:2]
    assert_goes_on_as_fresh(conversation, fresh, "Астана")
    conversation.reset()
    assert conversation.messages == []
    for wrong in (conversation.undo, conversation.retry, lambda: conversation.edit("a")):
        with pytest.raises(PromptError, match="nothing was said"):
            wrong()


def test_a_retry_has_another_seed(kept):
    conversation = talk(kept, temperature=1.0, seed=7, max_tokens=24)
    first = ask(conversation, KAZAKH)
    again = "".join(r.text for r in conversation.retry())
    assert again != first and conversation.last.seed == 8
    conversation.undo()
    assert ask(conversation, KAZAKH) == first


def test_what_was_said_before_a_break_is_kept(kept, fresh):
    conversation, shown = talk(kept), ""
    for response in conversation.say(KAZAKH):
        shown += response.text
        if response.n_tokens == 5:
            break
    (exchange,) = conversation.exchanges
    assert shown and exchange.answer == shown.strip()
    assert spelled(kept, exchange.ids) == shown
    assert_goes_on_as_fresh(conversation, fresh, "Қалайсыз?")


def test_a_question_that_was_not_answered_is_not_kept(kept, fresh):
    conversation = talk(kept)
    answer = ask(conversation, KAZAKH)

    def interrupt(_):
        raise KeyboardInterrupt

    for call in (conversation.say, conversation.edit):
        with pytest.raises(KeyboardInterrupt):
            list(call("Қалайсыз?", progress=interrupt))
        assert [e.answer for e in conversation.exchanges] == [answer.strip()]
        assert conversation.last.finish_reason == "length" and len(conversation.trace) == 12
    with pytest.raises(PromptError, match="empty"):
        ask(conversation, " \n")
    assert_goes_on_as_fresh(conversation, fresh, "Астана")


@pytest.mark.parametrize("role", ROLES)
def test_a_break_amid_the_first_batch_leaves_the_caches_empty(kept, monkeypatch, role):
    """Bug: Python tells of Ctrl-C after the batch, whose cells no position then counted."""
    oracle, conversation, model = talk(kept), talk(kept), kept.models[role]
    expected = ask(oracle, KAZAKH)
    kept.forget()
    decode = model._decode

    def interrupted(entries):
        decode(entries)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(conversation, KAZAKH)
    monkeypatch.undo()
    assert ask(conversation, KAZAKH) == expected


def test_an_answer_that_ends_in_a_token_keeps_ids_of_its_text_alone(kept, fresh):
    numbers = [i for c in "0123456789.,-" for i in kept.models["large_ins"].tokenize(c)]
    banned = dict.fromkeys([*numbers, *kept.end_of_generation], -100.0)
    sampled, n_inside = {"logit_bias": banned, "weights": MIX}, 0
    whole = ask(talk(kept, **sampled), KAZAKH)
    for at in range(2, len(whole) - 1):
        stop = whole[at : at + 2]
        conversation = talk(kept, stop=[stop], **sampled)
        shown = ask(conversation, KAZAKH)
        assert shown == whole[: whole.index(stop)]
        ids = conversation.exchanges[0].ids
        assert spelled(kept, ids) == shown
        n_inside += list(ids) != [token.id for token in conversation.trace][: len(ids)]
    assert n_inside > 2
    conversation.weights = None
    assert_goes_on_as_fresh(conversation, fresh, "Астана")


def test_it_stops_where_the_models_begin_to_ask_themselves(kept):
    asks = 'root ::= "Ақын.\\n\\nUser:\\nКім?"'
    conversation = talk(kept, grammar=asks, max_tokens=60, logit_bias=None)
    assert ask(conversation, KAZAKH) == "Ақын."
    assert conversation.last.finish_reason == "stop"


def test_the_oldest_are_dropped_with_a_note_and_never_the_question():
    notes = []
    with Trio.nano(n_ctx=160, n_threads=1) as trio:
        conversation = talk(trio, system="Сен көмекшісің.", notify=notes.append, max_tokens=20)
        for i in range(12):
            prompt, n = conversation.prompt(f"{i} {KAZAKH}"), conversation.n_dropped
            ask(conversation, f"{i} {KAZAKH}")
            full = max(prompt.n_tokens(r) for r in ROLES) + 20 > 160
            assert full == (conversation.n_dropped > n) == (len(notes) > 0)
            if notes:
                assert "160 tokens is full" in notes.pop()
                read = spelled(trio, trio.ids["small_base"])
                assert "Сен көмекшісің." in read and f"{i} {KAZAKH}" in read
                assert "User:\n0 " not in read
        assert 0 < conversation.n_dropped < 12 and len(conversation.messages) == 25
        before = (list(conversation.exchanges), conversation.n_dropped)
        with pytest.raises(PromptError, match="--n-ctx"):
            ask(conversation, KAZAKH * 20)
        assert (conversation.exchanges, conversation.n_dropped) == before
        for _ in range(12):
            conversation.undo()
        assert conversation.n_dropped == 0


def test_saved_and_loaded_it_goes_on_alike(kept, tmp_path):
    conversation = talk(kept, system="Жүйе")
    for question in QUESTIONS[:2]:
        ask(conversation, question)
    conversation.weights = MIX
    path = tmp_path / "chat.json"
    conversation.save(path)
    other = talk(kept)
    other.load(path)
    assert other.messages == conversation.messages and other.held == Mix(MIX)
    assert other.prompt("a") == conversation.prompt("a")
    assert ask(other, "Астана") == ask(conversation, "Астана")
    empty = tmp_path / "empty.json"
    talk(kept, system="Жүйе").save(empty)
    other.load(empty)
    assert other.messages == [{"role": "system", "content": "Жүйе"}] and other.held == Mix(MIX)


def test_answers_of_other_models_are_read_as_text(kept, tmp_path):
    notes, conversation = [], talk(kept, max_tokens=8)
    ask(conversation, KAZAKH)
    path = tmp_path / "chat.json"
    conversation.save(path)
    saved = json.loads(path.read_text("utf-8"))
    assert saved["models"]["large_ins"] == "large_ins.gguf" and saved["messages"][1]["ids"]
    path.write_text(json.dumps({**saved, "vocabulary": "another"}), encoding="utf-8")
    other = talk(kept, notify=notes.append)
    other.load(path)
    assert len(notes) == 1 and "other models" in notes[0]
    assert other.messages == conversation.messages
    assert other.exchanges[0].ids is None
    answer = other.exchanges[0].answer
    known = kept.models["large_ins"].tokenize(answer)
    (found,) = [s for s in other.prompt("a").segments if s.shared and not s.scored][-1:]
    assert list(found.ids["small_base"]) == known


def test_a_save_that_fails_leaves_what_was_saved(kept, tmp_path):
    """The file was emptied first: where the disk was full, the chat was lost."""
    path = tmp_path / "chat.json"
    conversation = talk(kept, system="Жүйе")
    conversation.save(path)
    before = path.read_bytes()
    conversation.system = "\udcff"  # it cannot be written
    with pytest.raises(UnicodeEncodeError):
        conversation.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"messages": 3}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}',
        '{"messages": [], "weights": {"alpha": "much"}}',
        f'{{"messages": [], "weights": {{"alpha": {10**400}, "beta": 1}}}}',
        '{"messages": [{"role": "system", "content": "\\ud83d"}]}',
    ],
)
def test_files_that_are_no_conversation_are_refused(kept, tmp_path, text):
    conversation, path = talk(kept), tmp_path / "chat.json"
    ask(conversation, "a")
    before = conversation.messages
    path.write_text(text)
    with pytest.raises(PromptError, match="holds no conversation"):
        conversation.load(path)
    assert conversation.messages == before


def test_ids_beyond_the_vocabulary_are_refused(kept, tmp_path):
    conversation, path = talk(kept), tmp_path / "chat.json"
    ask(conversation, "a")
    conversation.save(path)
    saved = json.loads(path.read_text("utf-8"))
    for wrong in (kept.n_vocab, -1, "1", True):
        saved["messages"][1]["ids"][0] = wrong
        path.write_text(json.dumps(saved))
        with pytest.raises(PromptError, match="holds no conversation"):
            conversation.load(path)


def test_a_trace_tells_of_the_models_that_the_mix_reads(kept):
    conversation = talk(kept, weights=MIX)
    ask(conversation, KAZAKH)
    assert len(conversation.trace) == 12
    for token in conversation.trace:
        assert token.probabilities.keys() == {"large_ins", "small_cpt", "fused"}
        assert token.probabilities["fused"] == max(token.probabilities["fused"], 1e-4)


def test_pulls_by_hand():
    row = {"large_ins": 0.5, "small_cpt": 0.125, "small_base": 0.01, "fused": 0.9}
    expected = {"large_ins": math.log(4), "small_cpt": 0.0, "small_base": -math.log(0.08)}
    assert pulls(row, Weights(1, 1), 8) == pytest.approx(expected)
    assert pulls(row, Weights(0, 1), 8) == pytest.approx({"small_cpt": 0.0})
