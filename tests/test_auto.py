"""The automatic choice: text goes by perplexity, questions by a measurement, else on a leash."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import KAZAKH
from summed import grid_nll
from topics import ask_here

from trimix_gguf import Trio, Weights, select_weights
from trimix_gguf.answering.chat import chat_prompt
from trimix_gguf.choosing import auto
from trimix_gguf.choosing.auto import asks, on_a_leash
from trimix_gguf.choosing.score import empty_score, score, score_prompts
from trimix_gguf.cli.task_weights import task_weights
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.running.file_weights import weights_of_file
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.mixing.fusion import METHODS, Mix
from trimix_gguf.mixing.scoring import WITH_CORNERS, large_ins_slopes, lowest, strays
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.sums import Sum
from trimix_gguf.trio.tuned import Free, Tuning

QUESTION = "Қазақстанның астанасы қай қала?"
MODELS = dict.fromkeys(ROLES, "0" * 64)


@pytest.fixture
def trio(nano_files):
    """The nano trio as if nobody had tuned it."""
    with Trio.load(**nano_files, n_ctx=512) as trio:
        yield trio


def rows(rng, n=6, n_vocab=200):
    return {role: rng.normal(size=(n, n_vocab)).astype(np.float32) * 3 for role in ROLES}


def log_softmax(row, unused):
    row = row.astype(np.float64).copy()
    row[unused] = -np.inf
    row -= row.max()
    return row - np.log(np.exp(row).sum())


def test_strays_are_the_divergence_from_large_ins():
    """Oracle: the sum over the vocabulary of p·(log p − log q) in float64."""
    rng = np.random.default_rng(0)
    given, targets = rows(rng), rng.integers(10, 200, 6)
    unused = np.zeros(200, bool)
    unused[3] = True
    alphas, betas = (0.0, 0.3, 1.0), (0.0, 0.5, 1.0)
    nll = grid_nll(**given, targets=targets, alphas=alphas, betas=betas, unused=unused)
    slopes = large_ins_slopes(**given, targets=targets, unused=unused, n_threads=2)
    found = strays(nll, slopes.sum(axis=0), alphas, betas)
    large, cpt, base = (given[role] for role in ROLES)
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            total = 0.0
            for t in range(6):
                p = log_softmax(large[t], unused)
                mix = base[t] + alpha * (large[t] - base[t]) + beta * (cpt[t] - base[t])
                q, used = log_softmax(mix, unused), ~unused
                total += float((np.exp(p[used]) * (p[used] - q[used])).sum())
            assert found[i, j] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "is_question"),
    [
        (QUESTION, True),
        ("Text: Ауа райы жылы.\nTopic:", True),
        ("إلى أين؟", True),
        (KAZAKH, False),
        ("Сұрақ: қайда? Ол үндемеді.", False),
        ("2) қаулының күші жойылды;", False),  # as statutes end their lines
    ],
)
def test_a_prompt_asks_where_it_ends_as_a_question_or_a_label(trio, text, is_question):
    assert asks(trio.prompt(text), trio.text) == is_question


def test_a_chat_and_marked_answers_ask(trio):
    assert asks(chat_prompt(trio, [{"role": "user", "content": KAZAKH}]), trio.text)
    assert asks(trio.prompt("2+2=[[4]] 3+3", spans=("[[", "]]")), trio.text)


def test_text_that_goes_on_takes_the_lowest_perplexity_of_grid_and_corners(trio):
    chosen = select_weights(trio, trio.prompt(KAZAKH))
    trio.forget()
    scored = score(trio, trio.prompt(KAZAKH), grid=(WITH_CORNERS, WITH_CORNERS))
    assert chosen.weights == scored.best()
    assert chosen.perplexities()["fused"] <= min(chosen.perplexities()[role] for role in ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_each_single_model_can_be_chosen(role):
    """Bug: no rule could take a single model, for the published grid has no 0."""
    scored, w = empty_score(), METHODS[role].weights
    a, b = np.meshgrid(scored.alphas, scored.betas, indexing="ij")
    nll = (a - w.alpha) ** 2 + (b - w.beta) ** 2
    scored.add(Sum((1, 1), nll, 1, np.zeros(2)))
    assert scored.best(corners=True) == w
    assert scored.best() != w


def test_a_question_to_a_trio_never_tuned_stays_close_to_large_ins(trio):
    chosen = select_weights(trio, trio.prompt(QUESTION))
    trio.forget()
    by_perplexity = select_weights(trio, trio.prompt(QUESTION), method="ppl").weights
    assert chosen.weights.alpha > by_perplexity.alpha
    assert "large_ins" in chosen.reason


@pytest.mark.parametrize("leash", [0.0, auto.LEASH])
def test_a_small_cpt_that_learned_nothing_changes_nothing(rng, monkeypatch, leash):
    """However long the leash: where large_ins is sure and wrong, any blur has a lower NLL."""
    monkeypatch.setattr(auto, "LEASH", leash)
    given, targets = rows(rng), rng.integers(0, 200, 6)
    given["small_cpt"] = given["small_base"]
    nll = grid_nll(**given, targets=targets, alphas=WITH_CORNERS, betas=WITH_CORNERS)
    slopes = large_ins_slopes(**given, targets=targets, unused=None, n_threads=1).sum(axis=0)
    assert lowest(nll, WITH_CORNERS, WITH_CORNERS).alpha < 1
    fused = Mix(on_a_leash(nll, slopes, WITH_CORNERS, WITH_CORNERS)).fuse(given, None)
    assert np.allclose(fused, given["large_ins"], atol=1e-5)


def test_the_shorter_the_leash_the_closer_to_large_ins(trio, monkeypatch):
    scored = empty_score(sloped=True)
    # A text whose lowest NLL is far from large_ins.
    text = "Мен мектепке барамын, себебі оқығым келеді."
    score_prompts(trio, trio.prompt(text), scored)
    given = scored.nll[0], scored.slopes[0], scored.alphas, scored.betas
    far = strays(*given)
    strayed = []
    for leash in (0.0, 0.5, 4.0, 1e9):
        monkeypatch.setattr(auto, "LEASH", leash)
        w = on_a_leash(*given)
        strayed.append(far[scored.alphas.index(w.alpha), scored.betas.index(w.beta)])
    assert strayed == sorted(strayed, reverse=True)
    assert strayed[0] > strayed[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_question_with_choices_goes_by_what_was_measured(nano_files):
    tuning = Tuning(Weights(0.9, 0.3), "measured", MODELS)
    with Trio.load(**nano_files, n_ctx=512, tuning=tuning) as trio:
        chosen = select_weights(trio, trio.prompt(QUESTION), with_choices=True)
        assert (chosen.weights, chosen.reason) == (Weights(0.9, 0.3), "measured")
        assert select_weights(trio, trio.prompt(KAZAKH), with_choices=True).score is not None


FOUND = (Weights(0.9, 0.3), Weights(1.0, 0.5), METHODS["small_cpt"].weights)


@pytest.mark.parametrize("free", [None, Free(None, "not better", 20, 0.5, 0.4)])
@pytest.mark.parametrize("found", FOUND)
def test_what_was_measured_with_choices_never_changes_a_free_answer(trio, found, free):
    """Bug: a pair chosen by exercises with choices broke a chat where large_ins was whole."""
    asked = [trio.prompt(QUESTION), chat_prompt(trio, [{"role": "user", "content": KAZAKH}])]
    for prompt in asked:
        trio.tuning = None
        trio.forget()
        before = select_weights(trio, prompt)
        trio.tuning = Tuning(found, "measured", MODELS, free=free)
        trio.forget()
        after = select_weights(trio, prompt)
        assert (after.weights, after.reason) == (before.weights, before.reason)


def test_free_answers_go_by_what_was_measured_of_them(trio):
    free = Free(Weights(0.9, 0.3), "better there too", 40, 0.4, 0.5)
    trio.tuning = Tuning(Weights(0.9, 0.3), "measured", MODELS, free=free)
    chosen = select_weights(trio, trio.prompt(QUESTION))
    assert (chosen.weights, chosen.reason) == (Weights(0.9, 0.3), "better there too")


@pytest.mark.parametrize("with_choices", [False, True])
def test_where_no_model_answers_perplexity_decides(nano_files, with_choices):
    with Trio.load(**nano_files, n_ctx=512, tuning=Tuning(None, "none", MODELS)) as trio:
        chosen = select_weights(trio, trio.prompt(QUESTION), with_choices=with_choices)
        trio.forget()
        scored = score(trio, trio.prompt(QUESTION), grid=(WITH_CORNERS, WITH_CORNERS))
    assert chosen.weights == scored.best()


# -- where choices are known ------------------------------------------------------------------

CHOICES = Weights(0.7, 0.5)  # what was measured with choices
FREELY = Example("free", "Text: Ауа райы жылы.\nTopic:", "ауа", ("ауа",))
CHOOSING = replace(FREELY, id="choosing", choices=("ауа", "жер"))


def test_a_run_takes_what_was_measured_only_for_questions_with_choices(trio, tmp_path):
    task = Task("topics", ("kk",), "Name the topic.", ("accuracy",), 4, lambda *_: None)
    settings = RunSettings(("auto",), n_exemplars=0)
    weights = {}
    for tuning in (None, Tuning(CHOICES, "measured", MODELS)):
        for asked in (FREELY, CHOOSING):
            trio.tuning = tuning
            out = tmp_path / f"{tuning is None}-{asked.id}.jsonl"
            ask_here(trio, task, Dataset([asked], []), settings, out)
            said = json.loads(out.read_text(encoding="utf-8"))["outputs"]["auto"]
            weights[tuning is None, asked.id] = Weights(said["alpha"], said["beta"])
    assert weights[False, "choosing"] == CHOICES
    assert weights[False, "free"] == weights[True, "free"] == weights[True, "choosing"]


@pytest.mark.parametrize("asked", [FREELY, CHOOSING], ids=["free", "choices"])
def test_a_run_goes_by_perplexity_where_no_model_answers(trio, tmp_path, asked):
    """Bug: a run kept free answers close to large_ins where generate went by perplexity."""
    task = Task("topics", ("kk",), "Name the topic.", ("accuracy",), 4, lambda *_: None)
    trio.tuning = Tuning(None, "none", MODELS)
    out = tmp_path / "lines.jsonl"
    ask_here(trio, task, Dataset([asked], []), RunSettings(("auto",), n_exemplars=0), out)
    line = json.loads(out.read_text(encoding="utf-8"))
    said = line["outputs"]["auto"]
    prompt = trio.prompt(f"Name the topic.\n\n{asked.question}")
    trio.forget()
    scored = score(trio, prompt, grid=(WITH_CORNERS, WITH_CORNERS))
    assert (said["alpha"], said["beta"]) == (scored.best().alpha, scored.best().beta)


@pytest.mark.parametrize("with_choices", [False, True])
def test_a_task_file_says_whether_there_are_choices(trio, tmp_path, with_choices):
    """Bug: its JSON lines were read as text, and the choices in them were not seen."""
    file = tmp_path / "task.jsonl"
    row = {"question": "2 + 2 = ?", "answer": "B" if with_choices else "4"}
    rows = [{**row, **({"choices": ["3", "4"]} if with_choices else {})}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    untuned = weights_of_file(trio, file, "auto", lambda *_: None).weights
    trio.tuning = Tuning(CHOICES, "measured", MODELS)
    trio.forget()
    chosen = weights_of_file(trio, file, "auto", lambda *_: None)
    assert chosen.weights == (CHOICES if with_choices else untuned) and chosen.method == "auto"


@pytest.mark.parametrize("method", ["ppl", "ent", "token"])
def test_the_prompts_of_a_task_file_are_its_questions_for_every_method(trio, tmp_path, method):
    """Bug: but for auto, its JSON lines were read as one text, and the weights were for JSON."""
    asked = [{"question": f"{n} + 2 = ?", "answer": "4"} for n in range(3)]
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    text = "Answer each question.\n\nQuestion: {}\nAnswer:"
    prompts = [trio.prompt(text.format(row["question"])) for row in asked]
    options = {"method": method, "grid": ((0.2, 0.8), (0.1, 0.5, 0.9))}
    expected = select_weights(trio, prompts, average="micro", **options)
    trio.forget()
    chosen = task_weights(trio, str(file), dict(options), "micro")
    assert (chosen.weights, chosen.method) == (expected.weights, method)
    if expected.score is not None:
        assert chosen.score.n_tokens == expected.score.n_tokens


def test_the_command_says_why_it_chose(trimix):
    result = trimix("generate", QUESTION, "-n", "4", "--json")
    weights = json.loads(result.stdout)["weights"]
    assert weights["method"] == "auto"
    assert weights["reason"]
