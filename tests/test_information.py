"""Mutual information of exemplars' answers and questions, on the nano trio."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_cli import one_line_error
from topics import QUESTION, TOPICS, arguments, ask_here

from trimix_gguf import Trio, score
from trimix_gguf.choosing.methods import MI_ANSWERS
from trimix_gguf.evaluation.names.axis import AXIS
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.running.information import exemplars_information
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.mixing.scoring import GRID

TASK = Task("topics", ("kk",), "Classify.", ("accuracy",), 4, lambda *_: None)
SHOWN = [
    Example(str(at), f"Text: {text}\nTopic:", label, (label,))
    for at, (label, text) in enumerate({**TOPICS, "ауа райы": "Қала үстінде жел соғады."}.items())
]


@pytest.fixture(scope="module")
def trio():
    with Trio.nano(n_threads=1) as loaded:
        yield loaded


def test_it_is_what_an_answer_costs_more_after_other_questions(trio):
    def nats(before, question, answer):
        text = f"{TASK.instruction}\n\n"
        text += "".join(f"{e.question} {e.answer}\n\n" for e in before)
        prompt = trio.prompt(f"{text}{question}\x02 {answer}\x03", spans=("\x02", "\x03"))
        found = score(trio, prompt, grid=(AXIS, AXIS))
        rows, columns = [found.alphas.index(a) for a in AXIS], [found.betas.index(b) for b in AXIS]
        return found.nll[0][np.ix_(rows, columns)]

    by_hand = []
    for one in SHOWN:
        before = [e for e in SHOWN if e is not one]
        others = [nats(before, other.question, one.answer) for other in before]
        by_hand.append(np.mean(others, axis=0) - nats(before, one.question, one.answer))
    found = exemplars_information(trio, TASK, SHOWN)
    assert found.shape == (len(AXIS), len(AXIS))
    assert found == pytest.approx(np.mean(by_hand, axis=0), abs=4e-3)
    assert np.ptp(found) > 0.1  # or else any numbers would pass


def test_the_same_question_to_every_answer_tells_nothing(trio):
    alike = [replace(example, question=QUESTION) for example in SHOWN]
    assert exemplars_information(trio, TASK, alike) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("chat", [False, True])
def test_it_does_not_hang_on_what_was_read_before(trio, chat):
    first = exemplars_information(trio, TASK, SHOWN, chat=chat)
    trio.prefill(trio.prompt(f"{TASK.instruction}\n\n{SHOWN[1].question} {SHOWN[1].answer}"))
    assert np.array_equal(exemplars_information(trio, TASK, SHOWN, chat=chat), first)


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_takes_the_point_where_its_exemplars_tell_most(trio, tmp_path, chat):
    asked = Dataset([Example("1", QUESTION, "саясат", ("саясат",))], SHOWN)
    settings = RunSettings((MI_ANSWERS,), n_exemplars=2, chat=chat)
    ask_here(trio, TASK, asked, settings, tmp_path / "topics.jsonl")
    output = json.loads((tmp_path / "topics.jsonl").read_text("utf-8"))["outputs"][MI_ANSWERS]
    expected = exemplars_information(trio, TASK, SHOWN[:2], chat=chat)
    kept = json.loads((tmp_path / "topics.exemplars.json").read_text("utf-8"))
    assert np.array_equal(kept, expected)
    inner = expected[1:, 1:]  # the grid lies there
    a, b = np.unravel_index(inner.argmax(), inner.shape)
    assert (output["alpha"], output["beta"]) == (GRID[a], GRID[b])


def test_one_exemplar_has_no_other_question(trimix, task_file, tmp_path):
    refused = trimix(*arguments(task_file, tmp_path / "run", "mi-answers"), "--exemplars", "1")
    assert "--exemplars 2" in one_line_error(refused)


@pytest.mark.parametrize(("method", "shown"), [("mi-answers", 1), ("ppl-answers", 0)])
def test_a_task_without_the_exemplars_of_a_method_is_refused_before_any_is_asked(
    trimix, task_file, tmp_path, method, shown
):
    """Bug: it was found when the tasks before it were answered; a run keeps its methods."""
    own = [{"question": "2 + 2?", "answer": "4", "exemplar": True}] * shown
    file, out = tmp_path / "own.jsonl", tmp_path / "run"
    rows = [*own, {"question": "3 + 3?", "answer": "6"}]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    for given in (f"{task_file},{file}", str(file)):
        said = one_line_error(trimix(*arguments(given, out, f"large_ins,{method}")))
        assert f"own: {method} needs" in said and "mark rows" in said and not out.exists()
    result = trimix("generate", "2 + 2?", "--task", file, "--method", method)
    assert f"{method} needs {shown + 1} or more exemplars; give rows" in one_line_error(result)


def test_without_exemplars_the_usual_methods_are_those_that_need_none(trimix, tmp_path):
    """Bug: the command of the README, on questions only, was refused for ppl-answers."""
    file, out = tmp_path / "own.jsonl", tmp_path / "run"
    file.write_text(json.dumps({"question": "3 + 3?", "answer": "6"}), "utf-8")
    done = trimix("eval", "--lang", "kk", "--tasks", file, "-o", out)
    assert done.returncode == 0 and b"left out: own: ppl-answers needs 1" in done.stderr
    methods = json.loads((out / "run.json").read_bytes())["methods"]
    assert "ppl" in methods and "ppl-answers" not in methods


def test_a_run_that_goes_on_reads_its_exemplars_no_more(trimix, task_file, tmp_path):
    given = arguments(task_file, tmp_path / "run", "mi-answers,ppl-task")
    whole = trimix(*given)
    assert "exemplars for mi-answers: 3/3" in whole.stderr.decode()
    file = tmp_path / "run" / "topics.jsonl"
    lines = file.read_bytes()
    file.unlink()
    resumed = trimix(*given)
    assert resumed.returncode == 0 and file.read_bytes() == lines
    assert "exemplars for" not in resumed.stderr.decode()
    file.unlink()
    kept = file.with_suffix(".exemplars.json").read_text("utf-8")
    sample = file.with_suffix(".sample.jsonl").read_text("utf-8")
    other = re.sub(r'"nll": .*', '"nll": [[1.0]]}', sample)
    assert other != sample
    for name, texts in (
        (".exemplars.json", ("[[0.1,", "{}", "[[1]]")),
        (".sample.jsonl", (other,)),
    ):
        for text in texts:
            file.with_suffix(name).write_text(text, "utf-8")
            assert "damaged" in one_line_error(trimix(*given))
            assert not file.exists()
        file.with_suffix(".exemplars.json").write_text(kept, "utf-8")
