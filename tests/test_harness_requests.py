"""What the harness asks of an LM, over the shipped trio, against naive loops."""

import numpy as np
import pytest
from conftest import KAZAKH

pytest.importorskip("lm_eval")

from lm_eval.utils import get_rolling_token_windows  # noqa: E402
from naive_mix import (  # noqa: E402
    CHOICES,
    LARGE,
    MIX,
    answers,
    ask,
    encode,
    log_softmax,
    naive,
    naive_pair,
    near,
)

from trimix_gguf import Trio, Weights, generate, select_weights  # noqa: E402
from trimix_gguf.errors import PromptError, SamplerError, WeightsError  # noqa: E402
from trimix_gguf.evaluation.running import harness  # noqa: E402
from trimix_gguf.evaluation.running.harness import TrimixLM  # noqa: E402
from trimix_gguf.machine.loading import Loading  # noqa: E402
from trimix_gguf.mixing.fusion import METHODS, Mix, fuse  # noqa: E402
from trimix_gguf.trio.model import Model  # noqa: E402
from trimix_gguf.trio.prompt import Prompt, Segment  # noqa: E402


@pytest.fixture(scope="module")
def trio():
    """One thread: these are many small decodes, which two on a busy machine wait for."""
    with Trio.nano(n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def short():
    """A trio whose context and windows the texts overflow."""
    with Trio.nano(n_threads=1, n_ctx=48, n_window=8) as opened:
        yield opened


# -- loglikelihood ------------------------------------------------------------------------------


def test_weights_of_one_model_give_its_log_softmax(trio, nano_files):
    model = Model(nano_files["large_ins"], Loading(n_ctx=128, n_threads=1))
    ids = encode(trio, KAZAKH)
    rows = np.stack([log_softmax(model.decode([token])[0]) for token in ids])
    cut = KAZAKH.index(" бүгін")
    n = len(encode(trio, KAZAKH[:cut]))
    expected = sum(rows[i - 1, ids[i]] for i in range(n, len(ids)))
    ((logprob, _),) = answers(TrimixLM(trio, LARGE), (KAZAKH[:cut], KAZAKH[cut:]))
    assert logprob == near(expected)


def test_a_mix_gives_the_values_of_fuse(trio):
    ids, tail = encode(trio, KAZAKH), 6
    trio.prefill(Prompt((Segment.of(ids[:-1]),)))
    rows = {role: r.copy() for role, r in trio.tail_rows(tuple(trio.models), tail).items()}
    for weights in (MIX, Weights(1.5, 0.7), Weights(0, 0)):
        fused = fuse(rows, weights, unused=trio.unused)
        expected = sum(log_softmax(fused[i])[t] for i, t in enumerate(ids[-tail:]))
        trio.forget()
        request = (None, ids[:-tail], ids[-tail:])
        ((logprob, _),) = TrimixLM(trio, weights)._loglikelihood_tokens([request], True)
        assert logprob == near(expected)
        trio.prefill(Prompt((Segment.of(ids[:-tail]),)))
        trio.rows()  # read: as the rows above
        ((again, _),) = TrimixLM(trio, weights)._loglikelihood_tokens([request], True)
        assert again == pytest.approx(expected, abs=1e-3)


def test_greedy_is_told_from_not(trio):
    lm = TrimixLM(trio, MIX)
    for question, _, _ in CHOICES:
        context = encode(trio, question)
        trio.prefill(Prompt((Segment.of(context),)))
        picked, margins = [], []
        for _ in range(4):
            row = np.sort(fused := fuse(trio.rows(), MIX, unused=trio.unused))
            margins.append(row[-1] - row[-2])
            picked.append(int(fused.argmax()))
            trio.advance(picked[-1])
        if min(margins) > 0.1:  # else rounding may flip a pick
            break
    requests = [(None, context, picked[:n]) for n in (1, 4)]
    for wrong in (0, 3):
        other = list(picked)
        other[wrong] += 1
        requests.append((None, context, other))
    scored = lm._loglikelihood_tokens(requests, True)
    assert [greedy for _, greedy in scored] == [True, True, False, False]


def test_the_order_of_requests_changes_nothing(trio):
    pairs = [(question, f" {choice}") for question, choices, _ in CHOICES[:3] for choice in choices]
    pairs += [("", " Астана"), pairs[0]]
    lm = TrimixLM(trio, MIX)
    straight = answers(lm, *pairs)
    order = np.random.default_rng(3).permutation(len(pairs))
    shuffled = answers(lm, *(pairs[i] for i in order))
    assert [shuffled[i] for i in np.argsort(order)] == straight
    assert straight[0] == straight[-1] and len({s for s, _ in straight[:4]}) == 4


def test_options_of_one_token_are_read_once(trio, monkeypatch):
    """A batch for each of 26 options would read the whole model 26 times."""
    n_calls = 0
    original = Trio.tail_rows

    def counted(self, *arguments):
        nonlocal n_calls
        n_calls += 1
        return original(self, *arguments)

    monkeypatch.setattr(Trio, "tail_rows", counted)
    context = encode(trio, KAZAKH)
    requests = [(None, context, [token]) for token in range(300, 326)]
    scored = TrimixLM(trio, MIX)._loglikelihood_tokens(requests, True)
    assert n_calls == 1
    trio.prefill(Prompt((Segment.of(context),)))
    expected = log_softmax(fuse(trio.rows(), MIX, unused=trio.unused))[300:326]
    assert [logprob for logprob, _ in scored] == pytest.approx(expected.tolist(), abs=0.1)


def test_a_continuation_of_several_windows(short):
    assert short.n_window == 8
    ids = encode(short, KAZAKH * 3)
    for n in (8, 9, 16, 17, 30):
        (scored,) = TrimixLM(short, MIX)._loglikelihood_tokens([(None, ids[:5], ids[5 : 5 + n])])
        assert scored[0] == near(naive(short, ids[:5], ids[5 : 5 + n], MIX)[0])


def test_a_model_without_weight_is_not_read(trio, monkeypatch):
    trio.forget()
    monkeypatch.setattr(trio.models["small_base"], "decode", None)
    assert answers(TrimixLM(trio, Weights(0.1, 0.9)), (KAZAKH, " Ол"))


def test_unused_ids_are_masked_after_the_mix(trio, monkeypatch):
    context = encode(trio, KAZAKH)
    trio.prefill(Prompt((Segment.of(context),)))
    row = fuse(trio.rows(), MIX)
    best, second = np.argsort(row)[::-1][:2]
    mask = np.zeros(trio.n_vocab, dtype=bool)
    mask[best] = True
    monkeypatch.setitem(trio.__dict__, "unused", mask)
    requests = [(None, context, [int(token)]) for token in (best, second)]
    masked, first = TrimixLM(trio, MIX)._loglikelihood_tokens(requests, True)
    assert masked == (-np.inf, False)
    row[best] = -np.inf
    assert first == (pytest.approx(log_softmax(row)[second], abs=0.05), True)


def test_borders_of_context_and_continuation(trio):
    lm, model = TrimixLM(trio, MIX), trio.models["large_ins"]
    ids = encode(trio, "Сұрақ: қыс")
    n = len(encode(trio, "Сұрақ:"))
    assert lm._encode_pair("Сұрақ: ", "қыс") == lm._encode_pair("Сұрақ:", " қыс")
    assert lm._encode_pair("Сұрақ: ", "қыс") == (ids[:n], ids[n:])
    pieces = (model.piece(token).decode("utf-8", "ignore") for token in range(300, 2000))
    merged = next(p for p in pieces if [len(model.tokenize(t)) for t in (p, p[:-1])] == [1, 1])
    assert lm._encode_pair(merged[:-1], merged[-1:]) == (model.bos, model.tokenize(merged))
    assert answers(lm, (KAZAKH, "")) == [(0.0, True)]
    assert lm._encode_pair("  ", "қыс")[0] == model.bos


def test_bos_is_there_once(trio):
    lm, bos = TrimixLM(trio), trio.models["large_ins"].bos
    named = trio.models["large_ins"].piece(bos[0], special=True).decode()
    assert len(bos) == 1 and lm.tok_encode(KAZAKH) == encode(trio, KAZAKH)
    assert lm.tok_encode(named + KAZAKH) == encode(trio, KAZAKH)
    assert lm.tok_encode(KAZAKH, add_special_tokens=False) == encode(trio, KAZAKH)[1:]
    assert lm.prefix_token_id == bos[0]


def test_a_vocabulary_that_adds_no_bos(trio, monkeypatch):
    expected = encode(trio, "қыс")
    monkeypatch.setattr(Model, "bos", [])
    lm = TrimixLM(trio, MIX)
    assert lm.tok_encode(KAZAKH)[0] != lm.prefix_token_id == expected[0]
    ((spaces, _), (empty, _)) = answers(lm, ("  ", "қыс"), ("", "  қыс"))
    assert spaces == empty
    rolled = lm.loglikelihood_rolling([ask("loglikelihood_rolling", "қыс")], disable_tqdm=True)
    assert rolled == [near(naive(trio, expected[:1], expected[1:], MIX)[0])]


def test_a_context_too_long_keeps_its_end_and_bos(short):
    lm, ids = TrimixLM(short, MIX), encode(short, KAZAKH * 12)
    continuation = [400, 401, 402]
    assert len(ids) > 2 * short.n_ctx
    (scored,) = lm._loglikelihood_tokens([(None, ids, continuation)], True)
    room = lm.max_length + 1 - len(continuation)
    kept = ids[:1] + ids[len(ids) - room + 1 :]
    assert scored[0] == near(naive(short, kept, continuation, MIX)[0])
    with pytest.raises(PromptError, match="raise --n-ctx"):
        lm._loglikelihood_tokens([(None, [0], [1]), (None, [0], ids)], True)


# -- whole texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [MIX, None])
def test_a_text_longer_than_the_context(short, weights):
    """Each token is predicted once, in windows that begin with BOS; no text chooses weights."""
    text = KAZAKH * 12
    lm = TrimixLM(short, weights, unprompted=Weights(0.5, 0.5))
    ids, bos = encode(short, text)[1:], encode(short, "")
    assert len(ids) > 2 * short.n_ctx
    expected, n_scored = 0.0, 0
    for read, predicted in get_rolling_token_windows(ids, bos[0], lm.max_length - 1, 1):
        whole = [*read, predicted[-1]]
        context = whole[: len(whole) - len(predicted)]
        context = context if context[:1] == bos else bos + context
        expected += naive(short, context, predicted, weights or Weights(0.5, 0.5))[0]
        n_scored += len(predicted)
    assert n_scored == len(ids)
    requests = [ask("loglikelihood_rolling", t) for t in (KAZAKH, text, "")]
    first, rolled, empty = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert rolled == pytest.approx(expected, abs=1) and empty == 0
    assert lm.loglikelihood_rolling(requests[:1], disable_tqdm=True) == [near(first)]


# -- the choice of weights ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ppl", "ent"])
def test_weights_are_chosen_once_for_each_context(trio, monkeypatch, method):
    calls = []

    def counted(*arguments, **options):
        calls.append(select_weights(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(harness, "select_weights", counted)
    lm = TrimixLM(trio, method=method)
    pairs = [(q, f" {choice}") for q, choices, _ in CHOICES[:3] for choice in choices]
    scored = answers(lm, *pairs[::2], *pairs[1::2])
    assert len(calls) == 3 and sum(lm.chosen.values()) == 3
    for i, (context, continuation) in enumerate([*pairs[::2], *pairs[1::2]]):
        weights = select_weights(trio, trio.prompt(context), method=method).weights
        assert scored[i][0] == near(naive_pair(trio, context, continuation, weights)[0])
    text = lm.generate_until(
        [ask("generate_until", KAZAKH, {"until": ["."], "max_gen_toks": 8})], disable_tqdm=True
    )
    chosen = select_weights(trio, trio.prompt(KAZAKH), method=method)
    assert calls[-1].weights == chosen.weights and len(calls) == 4
    options = {"temperature": 0, "stop": ["."], "max_tokens": 8, "speculative": "off"}
    assert text == [generate(trio, KAZAKH, weights=chosen, **options).text]


def test_control_tokens_choose_nothing_and_an_empty_context_chooses_not(trio):
    lm = TrimixLM(trio, unprompted=Weights(0.25, 0.5))
    chat = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": KAZAKH}]))
    prompt = lm._prompt(chat)
    scored = [s.ids["large_ins"] for s in prompt.segments if s.scored]
    assert [list(ids) for ids in scored] == [trio.models["large_ins"].tokenize(KAZAKH)]
    assert [i for s in prompt.segments for i in s.ids["large_ins"]] == chat
    ((logprob, _),) = answers(lm, ("", " Астана"))
    bos, ids = encode(trio, ""), encode(trio, " Астана")[1:]
    assert logprob == near(naive(trio, bos, ids, Weights(0.25, 0.5))[0]) and not lm.chosen


# -- generation ---------------------------------------------------------------------------------


def test_sampling_follows_the_seed_and_the_task(trio):
    sampled = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    requests = [ask("generate_until", KAZAKH, sampled)] * 4
    texts = TrimixLM(trio, MIX, seed=5).generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 1
    assert TrimixLM(trio, MIX, seed=5).generate_until(requests, disable_tqdm=True) == texts
    settings = TrimixLM(trio)._settings({"do_sample": True, "top_p": 0.5, "until": "\n"})
    assert settings.pop("stop") == ["\n"] and settings.pop("max_tokens") == 256
    assert settings == {"temperature": 1.0, "top_k": 0, "top_p": 0.5, "min_p": 0.0}


def test_greedy_unless_the_task_samples(trio):
    lm = TrimixLM(trio)
    assert lm._settings({})["temperature"] == 0
    assert lm._settings({"temperature": 0.7, "do_sample": False})["temperature"] == 0
    assert lm._settings({"temperature": 0.7})["temperature"] == 0.7
    assert lm._settings({"max_new_tokens": 3, "num_beams": 1})["max_tokens"] == 3
    with pytest.raises(SamplerError, match="num_beams = 4"):
        lm._settings({"num_beams": 4})


def test_generation_from_a_context_too_long(short):
    lm, options = TrimixLM(short, MIX), {"until": ["\n"], "max_gen_toks": 10}
    (text,) = lm.generate_until([ask("generate_until", KAZAKH * 12, options)], disable_tqdm=True)
    ids = encode(short, KAZAKH * 12)
    kept = Prompt((Segment.of(ids[:1] + ids[len(ids) - (short.n_ctx - 10) + 1 :]),))
    alone = generate(
        short, kept, weights=MIX, temperature=0, stop=["\n"], max_tokens=10, speculative="off"
    )
    assert alone.finish_reason != "context" and alone.text == text
    options["max_gen_toks"] = short.n_ctx
    with pytest.raises(PromptError, match="48 tokens after its context.*max_gen_toks"):
        lm.generate_until([ask("generate_until", "Ол", options)])


def test_a_masked_mix_generates_and_scores_nothing(trio):
    """Bug: a trio whose method is contrastive was asked without its mask."""
    contrastive = METHODS["contrastive"]
    lm = TrimixLM(trio, contrastive)
    hot = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    (text,) = lm.generate_until([ask("generate_until", KAZAKH, hot)], disable_tqdm=True)
    seed = int(np.random.default_rng(1234).integers(2**32 - 1, size=1)[0])
    options = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop": ["\n"],
               "max_tokens": 12, "seed": seed, "speculative": "off"}  # fmt: skip
    assert text == generate(trio, KAZAKH, weights=contrastive, **options).text
    assert text != generate(trio, KAZAKH, weights=Mix(contrastive.weights), **options).text
    with pytest.raises(WeightsError, match="cannot score texts"):
        answers(lm, (KAZAKH, " Ол"))
    assert lm.get_model_info()["weights"]["plausibility_threshold"] == 0.1
