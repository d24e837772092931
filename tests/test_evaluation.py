"""Reading, continuing and running tasks, on the nano trio; the command driven as a user would."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
from conftest import KAZAKH
from test_cli import one_line_error

from trimix_gguf import Trio, Weights, generate, score
from trimix_gguf.chat import around_message
from trimix_gguf.errors import ContextFullError
from trimix_gguf.evaluation import methods
from trimix_gguf.evaluation.continuing import Mix, continue_all, continue_decoupled
from trimix_gguf.evaluation.decoupled import FourthModel
from trimix_gguf.evaluation.reading import AXIS, Reader, Reading, choice_nll
from trimix_gguf.evaluation.runner import Settings, finished_ids, run_task
from trimix_gguf.evaluation.task import Dataset, Example, Task
from trimix_gguf.model import Model
from trimix_gguf.prompt import Prompt, Segment
from trimix_gguf.scoring import GRID

TOPICS = {"спорт": "Команда ойында жеңді.", "саясат": "Үкімет жаңа заң қабылдады."}
EXEMPLARS = "".join(f"Text: {text}\nTopic: {label}\n\n" for label, text in TOPICS.items())
QUESTION = "Text: Президент Астанада сөз сөйледі.\nTopic:"


@pytest.fixture(scope="module")
def trio():
    with Trio.nano(n_threads=1) as loaded:
        yield loaded


def scored(trio, text):
    return Prompt(tuple(s for s in trio.prompt(text).segments if s.scored))


@pytest.fixture
def reader(trio):
    prefix = trio.prompt(EXEMPLARS)
    return Reader(trio, prefix, [i % 3 == 0 for i in range(len(prefix.units))])


# -- reading --------------------------------------------------------------------------------


def test_a_reading_is_the_score_of_the_whole_prompt(trio, reader):
    reading = reader.read(scored(trio, QUESTION))
    whole = Prompt((*reader.prefix.segments, *scored(trio, QUESTION).segments))
    expected = score(trio, whole, grid=(AXIS, AXIS))
    rows = [expected.alphas.index(a) for a in AXIS]
    columns = [expected.betas.index(b) for b in AXIS]
    assert reading.n_tokens == whole.n_tokens()
    assert reading.nlls.sum(axis=0) == pytest.approx(
        expected.nll[0][np.ix_(rows, columns)], abs=2e-3
    )
    marked = [i % 3 == 0 for i in range(len(reader.prefix.units))]
    n_question = len(whole.units) - len(reader.prefix.units)
    assert reading.answers[-n_question:].sum() == 0
    assert reading.answers.sum() == sum(marked[-(len(reading.answers) - n_question) :])


@pytest.fixture
def fourth(nano_files, trio):
    """small_cpt's file as large_base: a model unlike its neighbours in the formula."""
    with closing(Model(nano_files["small_cpt"], n_ctx=512, n_threads=1, tokenizer=False)) as model:
        yield FourthModel(model, trio)


def test_a_decoupled_reading_is_the_formula_at_each_token(trio, fourth):
    """In float64, on each model's own logits of the whole prompt."""
    other = Reader(trio, trio.prompt(f"{QUESTION} {EXEMPLARS}"), [False] * 500, fourth=fourth)
    other.read(scored(trio, QUESTION))
    reader = Reader(trio, trio.prompt(EXEMPLARS), [False] * 500, fourth=fourth)
    reader.read(scored(trio, QUESTION + " x"))
    reading = reader.read(scored(trio, QUESTION))
    n_past = trio.n_past
    assert continue_decoupled(trio, fourth, Weights(0.5, 0.5), 0.3, max_tokens=6).ids
    assert trio.n_past == n_past
    segments = (*reader.prefix.segments, *scored(trio, QUESTION).segments)
    ids = [i for segment in segments for i in segment.ids["large_ins"]]
    n, rows = len(reading.nlls), {}
    for role in trio.models:
        parts = []
        for at in range(len(ids) - n - 1, len(ids) - 1, 16):
            end = min(at + 16, len(ids) - 1)
            trio.prefill(Prompt((Segment.of(ids[:end]),)))
            parts.append(trio.tail_rows((role,), end - at)[role].astype(np.float64))
        rows[role] = np.concatenate(parts)
    large, cpt, base = (rows[r] for r in ("large_ins", "small_cpt", "small_base"))
    fourth_rows = cpt  # large_base is small_cpt's file
    targets = np.array(ids[-n:])
    for at, gamma in ((0, GRID[0]), (3, GRID[3])):
        for alpha, beta in ((0.0, 0.0), (1.0, 0.3), (0.5, 0.9)):
            mixed = base + alpha * (large - fourth_rows) + beta * (cpt - base)
            mixed += gamma * (fourth_rows - base)
            if trio.unused is not None:
                mixed[:, trio.unused] = -np.inf
            top = mixed.max(axis=1, keepdims=True)
            logp = mixed - top - np.log(np.exp(mixed - top).sum(axis=1, keepdims=True))
            expected = -logp[np.arange(n), targets].sum()
            found = reading.decoupled[at, AXIS.index(alpha), AXIS.index(beta)]
            assert found == pytest.approx(expected, rel=1e-4)


def test_a_fourth_model_follows_the_trio_to_another_text(trio, fourth):
    for text in (EXEMPLARS + QUESTION, QUESTION, QUESTION + EXEMPLARS):
        trio.prefill(trio.prompt(text))
        three = {role: row[None].copy() for role, row in trio.rows().items()}
        row = fourth.beside(three, trio.n_past)["large_base"][0]
        np.testing.assert_allclose(row, three["small_cpt"][0], atol=0.05)  # the same file


def test_a_question_gives_the_same_numbers_whatever_was_read_before(trio, reader):
    others = ["Text: Ауа райы жылы.\nTopic:", QUESTION + " спорт"]
    first = reader.read(scored(trio, QUESTION))
    for other in others:
        reader.read(scored(trio, other))
    again = reader.read(scored(trio, QUESTION))
    trio.prefill(trio.prompt(KAZAKH))  # the exemplars are gone from the caches
    trio.rows()
    once_more = reader.read(scored(trio, QUESTION))
    trio.forget()
    anew = Reader(trio, reader.prefix, [False] * len(reader.prefix.units))
    after_a_break = anew.read(scored(trio, QUESTION))
    for reading in (again, once_more, after_a_break):
        assert np.array_equal(reading.nlls, first.nlls)
        assert np.array_equal(reading.entropy, first.entropy)


def test_exemplars_are_decoded_once(trio, reader, monkeypatch):
    reader.read(scored(trio, QUESTION))
    seen = []
    model = trio.models["large_ins"]
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda ids, **o: (seen.append(len(ids)), decode(ids, **o))[1]
    )
    reader.read(scored(trio, QUESTION))
    # The question, its first token's row and, for the entropy, at most one more.
    assert sum(seen) <= scored(trio, QUESTION).n_tokens() + 2


def test_choices_cost_what_their_tokens_cost(trio):
    labels = ("ғылым және технология", "спорт", "денсаулық сақтау", "ел")
    choices = [trio.models["large_ins"].tokenize(f" {label}") for label in labels]
    assert len({len(ids) for ids in choices}) > 1
    trio.prefill(trio.prompt(QUESTION))
    found = choice_nll(trio, choices)
    for ids, nats in zip(choices, found, strict=True):
        prompt = trio.prompt(QUESTION)
        tail = Prompt(
            (*(Segment.of(s.ids["large_ins"], scored=False) for s in prompt.segments),)
            + (Segment.of(ids),)
        )
        expected = score(trio, tail, grid=(GRID, GRID)).on_grid() * len(ids)
        assert nats[1:, 1:] == pytest.approx(expected, abs=2e-3)


# -- continuing -----------------------------------------------------------------------------


def test_mixes_together_write_what_each_writes_alone(trio):
    weights = [Weights(a, b) for a in (0.0, 0.1, 0.5, 1.0) for b in (0.0, 0.3, 0.9, 1.0)]
    expected = []
    for one in weights:
        answer = generate(trio, QUESTION, weights=one, max_tokens=8, temperature=0)
        expected.append(answer.text.lstrip().partition("\n")[0].rstrip())
    trio.prefill(trio.prompt(QUESTION))
    mixes = [Mix(one) for one in weights]
    continue_all(trio, mixes, max_tokens=8)
    assert [mix.text for mix in mixes] == expected
    assert len(set(expected)) > 3


def test_an_answer_ends_where_a_model_ends_it(trio):
    trio.prefill(trio.prompt(KAZAKH))
    ended, goes_on = Mix(Weights(1, 0)), Mix(Weights(0, 1))
    continue_all(trio, [ended, goes_on], max_tokens=5)
    assert ended.ids == [] and ended.text == ""  # large_ins takes the sentence for a whole text
    assert goes_on.ids


def test_more_mixes_than_fit_at_once(trio):
    trio.prefill(trio.prompt(KAZAKH))
    weights = [Weights(a, b) for a in np.linspace(0, 1, 6) for b in np.linspace(0, 1, 6)]
    together, apart = [Mix(w) for w in weights], [Mix(w) for w in weights]
    continue_all(trio, together, max_tokens=6)
    for mix in apart:
        continue_all(trio, [mix], max_tokens=6)
    assert [m.text for m in together] == [m.text for m in apart]


def test_models_that_no_mix_reads_are_not_run(trio, monkeypatch):
    trio.forget()
    for role in ("small_cpt", "small_base"):
        monkeypatch.setattr(trio.models[role], "_decode", None)
    trio.prefill(trio.prompt(QUESTION))
    mix = Mix(Weights(1, 0))
    continue_all(trio, [mix], max_tokens=5)
    assert mix.ids


def test_an_answer_that_cannot_fit_is_refused():
    with Trio.nano(n_ctx=64) as small:
        small.prefill(small.prompt("а " * 20))
        with pytest.raises(ContextFullError, match="does not fit"):
            continue_all(small, [Mix(Weights(1, 0))], max_tokens=60)


# -- methods --------------------------------------------------------------------------------


def bowl(alpha, beta, n=12):
    """nlls [n, …] whose sum is lowest at (alpha, beta)."""
    a, b = np.asarray(AXIS)[:, None], np.asarray(AXIS)[None, :]
    return np.repeat(((a - alpha) ** 2 + (b - beta) ** 2)[None], n, axis=0)


def reading_of(nlls, answers):
    entropy = np.ones((len(GRID), len(GRID)))
    entropy[2, 3] = 0
    return Reading(len(nlls), nlls, np.asarray(answers), entropy)


def test_each_method_takes_the_lowest_of_its_own_evidence():
    nlls = np.concatenate((bowl(0.1, 0.9), bowl(0.7, 0.3, n=4)))
    reading = reading_of(nlls, [False] * 12 + [True] * 4)
    names = ("ppl", "ppl-answers", "ent", "ppl-task", "large_ins", "continuous")
    made = methods.mixes(names, reading, Weights(0.3, 0.3), lambda rows, token: np.zeros(()))
    chosen = {name: (mix.weights.alpha, mix.weights.beta) for name, mix in made.items()}
    continuous = chosen.pop("continuous")
    assert chosen == {
        "ppl": (0.3, 0.7),
        "ppl-answers": (0.7, 0.3),
        "ent": (0.5, 0.7),
        "ppl-task": (0.3, 0.3),
        "large_ins": (1.0, 0.0),
    }
    assert continuous == pytest.approx((0.25, 0.75), abs=0.011)


def test_token_level_weights_follow_the_newest_evidence():
    reading = reading_of(bowl(0.1, 0.9, n=40), [False] * 40)
    there = bowl(1.0, 0.1, n=1)[0]
    mix = methods.mixes(("token",), reading, None, lambda rows, token: there)["token"]
    assert mix.weights == Weights(0.1, 0.9)
    weights = [mix.adapt({}, 0) for _ in range(200)]
    assert weights[-1] == Weights(1.0, 0.1)
    assert [w.alpha for w in weights] == sorted(w.alpha for w in weights)


# -- chat -----------------------------------------------------------------------------------


def test_in_a_chat_large_ins_alone_reads_control_tokens(trio, tmp_path):
    example = Example("1", QUESTION, "саясат", ("саясат",))
    shown = [
        Example(str(i), f"Text: {t}\nTopic:", a, (a,)) for i, (a, t) in enumerate(TOPICS.items())
    ]
    task = Task("topics", ("kk",), "Classify.", ("accuracy",), 4, lambda *_: None, n_exemplars=2)
    dataset, plain = Dataset([example], shown), {}
    for chat in (False, True):
        settings = Settings(("ppl", "ppl-answers"), chat=chat)
        out = tmp_path / f"{chat}.jsonl"
        run_task(trio, task, dataset, settings, out)
        plain[chat] = trio.ids, json.loads(out.read_text("utf-8"))
    control = set(around_message(trio.models["large_ins"])[0])
    assert control and control & set(plain[True][0]["large_ins"])
    assert not control & set(plain[True][0]["small_cpt"])
    assert (
        plain[True][0]["small_base"] == plain[True][0]["small_cpt"] == plain[False][0]["large_ins"]
    )
    for key in ("n_scored", "n_answers"):
        assert plain[True][1][key] == plain[False][1][key]


# -- the command ----------------------------------------------------------------------------


@pytest.fixture
def task_file(tmp_path):
    """A user's own task: topics of made-up Kazakh sentences."""
    sentences = {
        "спорт": ["Команда доп ойнады.", "Балуан жеңіске жетті.", "Жүгіруші рекорд жасады."],
        "саясат": ["Үкімет заң қабылдады.", "Президент сөз сөйледі.", "Сайлау өтті."],
        "денсаулық": ["Дәрігер науқасты емдеді.", "Аурухана ашылды.", "Вакцина егілді."],
    }
    rows = [{"instruction": "Classify the topic: спорт, саясат, денсаулық.", "language": "kk"}]
    for label, texts in sentences.items():
        for i, text in enumerate(texts):
            row = {"question": f"Text: {text}\nTopic:", "choices": list(sentences)}
            rows.append(row | {"answer": label} | ({"exemplar": True} if i == 0 else {}))
    path = tmp_path / "topics.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


def arguments(task_file, out, methods="ppl,ppl-answers,ppl-task,ent,proxy-tuning,upper-bound"):
    return [
        *("eval", "--lang", "kk", "--tasks", str(task_file), "--methods", methods),
        *("--threads", "1", "-o", str(out)),
    ]  # fmt: skip


def test_a_comparison_from_the_command_line(trimix, task_file, tmp_path):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "run"
    result = trimix(*arguments(task_file, out))
    assert result.returncode == 0, result.stderr.decode()
    lines = [json.loads(line) for line in (out / "topics.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 6
    assert all(len(line["grid"]) == len(line["grid"][0]) == 6 for line in lines)
    report = trimix("eval", "report", out, "--json")
    assert report.returncode == 0, report.stderr.decode()
    table = trimix("eval", "report", out)
    assert b"upper-bound" in table.stdout and b"proxy-tuning" in table.stdout
    assert not {p.name for p in out.iterdir()} - {
        "run.json",
        "topics.jsonl",
        "topics.weights.json",
    }


@pytest.mark.parametrize("role", ["large_ins", "small_base"])
def test_a_fourth_model_that_says_what_one_of_three_does_changes_nothing(
    trimix, task_file, tmp_path, nano_files, role
):
    """large_base as large_ins leaves gamma as alpha; as small_base, alpha as it is."""
    out = tmp_path / "run"
    given = [*arguments(task_file, out, "ppl,decoupled"), "--large-base", nano_files[role]]
    assert trimix(*given).returncode == 0
    for line in (out / "topics.jsonl").read_text("utf-8").splitlines():
        ppl, decoupled = (json.loads(line)["outputs"][name] for name in ("ppl", "decoupled"))
        weight = "gamma" if role == "large_ins" else "alpha"
        assert (decoupled[weight], decoupled["beta"]) == (ppl["alpha"], ppl["beta"])
        assert decoupled["text"] == ppl["text"]
    report = trimix("eval", "report", out)
    assert report.returncode == 0, report.stderr.decode()
    assert b"| decoupled |" in report.stdout
    other = tmp_path / "other"
    given = arguments(task_file, other, "ppl,decoupled")
    assert "--large-base" in one_line_error(trimix(*given))
    assert "no.gguf" in one_line_error(trimix(*given, "--large-base", tmp_path / "no.gguf"))
    assert not other.exists()


def test_a_run_killed_twenty_times_ends_with_the_same_file(trimix, task_file, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert trimix(*arguments(task_file, whole)).returncode == 0
    rng, kills = random.Random(7), 0
    command = [sys.executable, "-m", "trimix_gguf.cli", *arguments(task_file, broken)]
    while kills < 20:
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.6))
        started.send_signal(signal.SIGKILL)
        started.wait()
        kills += 1
    assert trimix(*arguments(task_file, broken)).returncode == 0
    for name in ("topics.jsonl", "topics.weights.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_line_cut_short_by_a_kill_is_written_anew(trimix, task_file, tmp_path):
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins,small_cpt")
    assert trimix(*given).returncode == 0
    file = out / "topics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    assert trimix(*given).returncode == 0
    assert file.read_bytes() == whole


def test_an_answer_with_a_line_end_of_its_own_breaks_no_resumed_run(tmp_path):
    """finished_ids cut lines at U+2028, and took the file for another program's."""
    out = tmp_path / "topics.jsonl"
    line = json.dumps(
        {"id": "7", "outputs": {"ppl": {"text": "a\u2028b\u0085c"}}}, ensure_ascii=False
    )
    out.write_text(line + "\n", encoding="utf-8")
    assert finished_ids(out) == {"7"}


def test_an_unfinished_run_is_not_reported(trimix, task_file, tmp_path):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "run"
    assert trimix(*arguments(task_file, out, "large_ins")).returncode == 0
    file = out / "topics.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:4]))
    assert "4 of 6" in one_line_error(trimix("eval", "report", out))


def test_one_more_model_by_itself(trimix, task_file, tmp_path, nano_files):
    out = tmp_path / "run"
    single = f"twin={nano_files['large_ins']}"
    result = trimix(*arguments(task_file, out, "large_ins"), "--single", single)
    assert result.returncode == 0, result.stderr.decode()
    ours, twins = (
        [json.loads(line) for line in (out / f"topics{end}.jsonl").read_text("utf-8").splitlines()]
        for end in ("", ".twin")
    )
    for line, twin in zip(ours, twins, strict=True):
        assert twin["outputs"]["twin"] == line["outputs"]["large_ins"]


def test_other_settings_are_not_mixed_into_a_run(trimix, task_file, tmp_path):
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins")
    assert trimix(*given).returncode == 0
    message = one_line_error(trimix(*given, "--seed", "1"))
    assert "other seed" in message


def test_options_of_the_harness_are_not_passed_over(trimix, task_file, tmp_path):
    result = trimix(*arguments(task_file, tmp_path / "run"), "--weights", "0.1,0.9")
    assert result.returncode == 2 and b"goes with --harness" in result.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--tasks", "sib2000"), "sib200, flores"),
        (("--methods", "best"), "proxy-tuning"),
        (("--tasks", "sib200", "--lang", "xx"), "kk"),
        (("--exemplars", "9"), "3 exemplars"),
        (("--n-ctx", "128"), "1 would"),
    ],
)
def test_bad_input_is_one_line_that_names_what_there_is(trimix, task_file, tmp_path, changed, said):
    message = one_line_error(trimix(*arguments(task_file, tmp_path / "run"), *changed))
    assert said in message
