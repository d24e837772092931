"""The harness's own tasks over the shipped trio, against naive loops; no network."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import KAZAKH

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.utils import get_rolling_token_windows  # noqa: E402

from trimix_gguf import TrimixError, Trio, Weights, generate, select_weights  # noqa: E402
from trimix_gguf.chat import render_chat  # noqa: E402
from trimix_gguf.errors import PromptError, SamplerError  # noqa: E402
from trimix_gguf.evaluation import harness  # noqa: E402
from trimix_gguf.evaluation.harness import TrimixLM, run_harness  # noqa: E402
from trimix_gguf.fusion import fuse  # noqa: E402
from trimix_gguf.model import Model  # noqa: E402
from trimix_gguf.prompt import Prompt, Segment  # noqa: E402

LARGE, MIX = Weights(1, 0), Weights(0.3, 0.9)
CHOICES = [
    ("Қазақстанның астанасы қай қала?", ["Алматы", "Астана", "Шымкент", "Ақтөбе"], 1),
    ("Жылдың ең суық мезгілі қайсы?", ["жаз", "күз", "қыс", "көктем"], 2),
    ("Сүтті қай жануар береді?", ["сиыр", "қасқыр", "бүркіт", "балық"], 0),
    ("Аптада неше күн бар?", ["бес", "алты", "жеті", "он екі"], 2),
    ("Абай Құнанбайұлы кім болған?", ["ақын", "дәрігер", "ұшқыш", "аспаз"], 0),
    ("Күн қай жақтан шығады?", ["батыстан", "солтүстіктен", "оңтүстіктен", "шығыстан"], 3),
    ("Судың қатқан түрі қалай аталады?", ["мұз", "бу", "шаң", "от"], 0),
]
TEXTS = [KAZAKH, "Абай — қазақтың ұлы ақыны. " * 3, "Астана " * 5]
STOPS = [".", "\n\n"]
TASKS = {
    "kk_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Сұрақ: {{question}}\nЖауап:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "kk_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "kk_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCS = {
    "kk_choice": [{"question": q, "choices": c, "label": n} for q, c, n in CHOICES],
    "kk_rolling": [{"text": text} for text in TEXTS],
    "kk_text": [{"text": question} for question, _, _ in CHOICES[:3]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of local data, written as a user would; a YAML file may be JSON."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, config in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, DOCS[name])), encoding="utf-8")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, **config}
        whole["test_split"] = "test"
        (folder / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True, scope="module")
def offline():
    """Modules that are loaded have read the variables already."""
    import datasets.config
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def results(trio, folder, offline):
    return run_harness(
        trio, ["kk_*"], weights=MIX, include_path=folder, include_defaults=False, bootstrap_iters=0
    )


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


def ask(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def answers(lm, *pairs):
    return lm.loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)


def encode(trio, text):
    model = trio.models["large_ins"]
    return model.bos + model.tokenize(text)


def log_softmax(row):
    wide = row.astype(np.float64)
    return wide - np.logaddexp.reduce(wide)


def naive(trio, context, continuation, weights):
    """Token by token: logprob of the ids, and whether each is the argmax."""
    trio.prefill(Prompt((Segment.of(context),)))
    total, greedy = 0.0, True
    for token in continuation:
        row = log_softmax(fuse(trio.rows(), weights, unused=trio.unused))
        total, greedy = total + row[token], greedy and int(row.argmax()) == token
        trio.advance(token)
    return total, greedy


def naive_pair(trio, context, continuation, weights):
    whole, before = encode(trio, context + continuation), encode(trio, context)
    return naive(trio, before, whole[len(before) :], weights)


def near(logprob):
    return pytest.approx(logprob, abs=0.1)  # batched and single decodes differ by rounding


# -- the harness's tasks ------------------------------------------------------------------------


def test_accuracy_is_that_of_a_naive_loop(trio, results):
    right = []
    for (question, choices, label), sample in zip(
        CHOICES, results["samples"]["kk_choice"], strict=True
    ):
        context = f"Сұрақ: {question}\nЖауап:"
        scores = [naive_pair(trio, context, f" {choice}", MIX) for choice in choices]
        harness_scores = [response[0] for (response,) in sample["resps"]]
        assert harness_scores == near([score for score, _ in scores])
        assert [response[1] for (response,) in sample["resps"]] == [g for _, g in scores]
        right.append(max(range(4), key=harness_scores.__getitem__) == label)
    assert results["results"]["kk_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_perplexity_is_that_of_a_naive_loop(trio, results):
    bos = trio.models["large_ins"].bos
    logprob = sum(naive(trio, bos, encode(trio, text)[1:], MIX)[0] for text in TEXTS)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    bits = results["results"]["kk_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-logprob / n_bytes / np.log(2), abs=2e-3)


def test_generated_text_is_that_of_generate(trio, results):
    for (question, _, _), sample in zip(CHOICES, results["samples"]["kk_text"], strict=False):
        alone = generate(
            trio, question, weights=MIX, temperature=0, stop=STOPS, max_tokens=12, speculative="off"
        )
        assert sample["resps"] == [[alone.text]]


def test_results_say_which_weights(results):
    assert results["config"]["weights"] == {"method": "fixed", "alpha": 0.3, "beta": 0.9}
    assert results["config"]["models"]["small_cpt"] == "small_cpt.gguf"
    json.dumps(results["config"])


def test_limit_and_simple_evaluate_itself(trio, folder, results):
    from lm_eval.tasks import TaskManager

    whole = results["samples"]["kk_choice"]
    again = lm_eval.simple_evaluate(
        TrimixLM(trio, MIX),
        tasks=["kk_choice"],
        limit=2,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )["samples"]["kk_choice"]
    assert [s["resps"] for s in again] == [s["resps"] for s in whole[:2]]


def test_a_task_that_is_not_there(trio, folder):
    here = {"include_path": folder, "include_defaults": False}
    with pytest.raises(TrimixError, match="no task 'kk_choise'; did you mean kk_choice") as caught:
        run_harness(trio, ["kk_text", "kk_choise"], **here)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrimixError, match="no harness task was named"):
        run_harness(trio, [], **here)


def test_a_task_whose_data_is_not_there(trio, folder, tmp_path):
    config = json.loads((folder / "kk_text.yaml").read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "none.jsonl")}}
    (tmp_path / "kk_text.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TrimixError, match="cannot read the data of its task: .*none.jsonl") as e:
        run_harness(trio, ["kk_text"], include_path=tmp_path, include_defaults=False)
    assert "\n" not in str(e.value)


def test_without_lm_eval_the_error_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import trimix_gguf.evaluation.harness"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "TrimixError: the harness needs lm-eval: pip install 'trimix-gguf[lm-eval]'"
        in (run.stderr.splitlines()[-1])
    )


# -- loglikelihood ------------------------------------------------------------------------------


def test_weights_of_one_model_give_its_log_softmax(trio, nano_files):
    model = Model(nano_files["large_ins"], n_ctx=128, n_threads=1)
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


def test_weights_are_chosen_once_for_each_context(trio, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(select_weights(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(harness, "select_weights", counted)
    lm = TrimixLM(trio)
    pairs = [(q, f" {choice}") for q, choices, _ in CHOICES[:3] for choice in choices]
    scored = answers(lm, *pairs[::2], *pairs[1::2])
    assert len(calls) == 3 and sum(lm.chosen.values()) == 3
    for i, (context, continuation) in enumerate([*pairs[::2], *pairs[1::2]]):
        weights = select_weights(trio, trio.prompt(context)).weights
        assert scored[i][0] == near(naive_pair(trio, context, continuation, weights)[0])
    text = lm.generate_until(
        [ask("generate_until", KAZAKH, {"until": ["."], "max_gen_toks": 8})], disable_tqdm=True
    )
    chosen = select_weights(trio, trio.prompt(KAZAKH))
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


# -- chat ---------------------------------------------------------------------------------------

TRICKY = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'system' and strict %}{{ raise_exception('no system') }}{% endif %}
    {% if loop.index > 9 %}{% break %}{% endif %}
    {% generation %}<{{ m.role }}>{{ m.content | trim }}{{ m | tojson }}{% endgeneration %}</>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "Сен <көмекшісің> & т.б."},
    {"role": "user", "content": KAZAKH},
    {"role": "assistant", "content": "Жауап: "},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", ["{{ messages[-1].content }}", TRICKY, None])
def test_chat_is_rendered_as_transformers_does(trio, template, add_generation_prompt):
    library = pytest.importorskip("transformers.utils.chat_template_utils")
    template = template or TrimixLM(trio).chat_template(True)
    if template == TRICKY and not add_generation_prompt:
        template = template.replace("{{ m | tojson }}", "")  # would hold the mark twice
    theirs, _ = library.render_jinja_template(
        [MESSAGES],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
        bos_token="<s>",
    )
    ours = render_chat(
        template, MESSAGES, add_generation_prompt=add_generation_prompt, bos_token="<s>"
    )
    assert ours == theirs[0] and MESSAGES[-1]["content"] == "Жауап: "


def test_a_template_that_refuses_system_messages(trio, monkeypatch):
    lm, model = TrimixLM(trio), trio.models["large_ins"]
    monkeypatch.setattr(model, "chat_template", "{% set strict = 1 %}" + TRICKY)
    text = lm.apply_chat_template(MESSAGES[:2])
    bos = trio.models["large_ins"].piece(lm.prefix_token_id, special=True)
    assert text.startswith(bos.decode())
    assert KAZAKH in text and "көмекшісің" not in text
    with pytest.raises(PromptError, match="refuses the messages: no system"):
        lm.apply_chat_template(MESSAGES[:1])
    monkeypatch.setattr(model, "chat_template", None)
    with pytest.raises(PromptError, match="has no chat template"):
        lm.apply_chat_template(MESSAGES)


def test_the_template_asked_for_and_the_name_of_the_tokenizer(trio, monkeypatch):
    lm, model = TrimixLM(trio), trio.models["large_ins"]
    assert lm.chat_template(False) is None
    assert lm.chat_template(True) == model.file.metadata["tokenizer.chat_template"]
    name = lm.tokenizer_name
    assert name.startswith("large_ins-") and Path(name).name == name
    monkeypatch.setattr(model, "chat_template", TRICKY)
    assert lm.tokenizer_name != name


def test_tasks_in_chat(trio, folder):
    results = run_harness(
        trio, ["kk_text"], limit=1, weights=MIX, include_path=folder, include_defaults=False,
        apply_chat_template=True, bootstrap_iters=0,
    )  # fmt: skip
    (sample,) = results["samples"]["kk_text"]
    lm = TrimixLM(trio, MIX)
    asked = lm.apply_chat_template([{"role": "user", "content": CHOICES[0][0]}])
    assert sample["arguments"][0][0] == asked
    prompt = trio.prompt(asked, special=True)
    options = {"temperature": 0, "stop": STOPS, "max_tokens": 12, "speculative": "off"}
    assert sample["resps"] == [[generate(trio, prompt, weights=MIX, **options).text]]


def test_the_command_prints_the_harness_table_and_keeps_its_results(
    trimix, folder, tmp_path, results
):
    out = tmp_path / "out"
    run = trimix(
        "eval", "--harness", "kk_choice", "--harness-path", folder, "--weights", "0.3,0.9",
        "--threads", "1", "-o", out,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    assert "|kk_choice|" in run.stdout.decode()
    kept = json.loads((out / "harness.json").read_text("utf-8"))["results"]["kk_choice"]
    assert kept["acc,none"] == results["results"]["kk_choice"]["acc,none"]
