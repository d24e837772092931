"""The tasks of `trimix eval`: what their files become."""

import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_tasks import load, prompt, write_all, write_lines

from trimix_gguf.errors import DataError, TrimixError
from trimix_gguf.evaluation.tasks import TASKS, find_task
from trimix_gguf.evaluation.tasks.belebele import read_letter
from trimix_gguf.evaluation.tasks.kazqad import PASSAGE_CHARS, excerpt
from trimix_gguf.evaluation.tasks.metrics import METRICS
from trimix_gguf.evaluation.tasks.mgsm import SOLUTIONS
from trimix_gguf.evaluation.tasks.sib200 import LABELS, read_label

pytestmark = pytest.mark.usefixtures("hub_cache")
ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("TRIMIX_DATA", ROOT.parent / "shared" / "data"))
CASES = [
    ("sib200", "kk"), ("flores-to-en", "kk"), ("flores-from-en", "kk"), ("belebele", "kk"),
    ("tumlu", "kk"), ("kazqad", "kk"), ("copa", "kk"), ("copa", "ta"), ("mgsm", "bn"),
    ("milic-response-selection", "ug"), ("milic-reading-comprehension", "ug"),
    ("milic-text-classification", "ug"), ("milic-title-generation", "ug"), ("milic-math", "ug"),
    ("milic-to-en", "ug"), ("milic-from-en", "ug"),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


# --- laws of every task ---


@pytest.mark.parametrize(("name", "lang"), CASES)
def test_a_task_loads_and_renders(name, lang, data):
    task, dataset = find_task(name, lang), load(name, lang, data)
    assert dataset.examples and len(dataset.exemplars) >= task.n_exemplars
    for example in [*dataset.examples, *dataset.exemplars]:
        assert example.question.endswith(":") and "\n\n" not in example.question
        assert example.answer == example.answer.strip() and "\n" not in example.answer
        assert example.references and all(example.references)
        if example.choices:
            assert example.answer in example.choices and example.references == (example.answer,)
        assert task.prediction(f" {example.answer}\n\nText: x", example.choices) == example.answer
    rendered = prompt(task, dataset, dataset.examples[0])
    assert rendered.count("\n\n") == task.n_exemplars + 1
    assert set(task.metrics) <= set(METRICS)


@pytest.mark.parametrize(("name", "lang"), CASES)
def test_ids_are_unique_and_no_example_is_shown_in_a_prompt(name, lang, data):
    dataset = load(name, lang, data)
    everything = [*dataset.examples, *dataset.exemplars]
    assert len({example.id for example in everything}) == len(everything)
    shown = {example.question for example in dataset.exemplars}
    if not name.startswith("milic"):  # where the sets' authors drew the line
        assert not shown & {example.question for example in dataset.examples}


@pytest.mark.parametrize(("name", "lang"), CASES)
def test_one_seed_gives_one_dataset_and_another_other_exemplars(name, lang, data):
    first, again, other = (load(name, lang, data, seed) for seed in (5, 5, 6))
    assert first == again
    n = find_task(name, lang).n_exemplars
    assert list(first.exemplars[:n]) != list(other.exemplars[:n])
    assert [e.id for e in first.examples] == [e.id for e in other.examples]
    if name != "tumlu":
        assert first.examples == other.examples


@pytest.mark.parametrize(("name", "lang"), CASES)
def test_the_right_answer_scores_full_marks(name, lang, data):
    task = find_task(name, lang)
    if "rouge_l" in task.metrics:
        pytest.importorskip("rouge_score")
    if "chrf++" in task.metrics:
        pytest.importorskip("sacrebleu")
    metric = METRICS[task.metrics[0]]
    examples = load(name, lang, data).examples
    said = [task.prediction(f" {e.answer}\n", e.choices) for e in examples]
    pairs = zip(said, examples, strict=True)
    total = np.sum([metric.statistics(s, e.references) for s, e in pairs], axis=0)
    assert metric.value(total) == pytest.approx(100)


def test_every_task_has_a_case():
    assert {name for name, _ in CASES} == set(TASKS)


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(DataError, match=r"no task 'sib'; the tasks are sib200, flores-to-en, "):
        find_task("sib", "kk")
    with pytest.raises(DataError, match=r"tumlu is not in 'ug'; its languages are kk$"):
        find_task("tumlu", "ug")
    assert issubclass(DataError, TrimixError)


# --- single tasks ---


@pytest.mark.parametrize("seed", range(5))
def test_the_first_exemplars_are_one_of_each_label(seed, data):
    pool = load("sib200", "kk", data, seed).exemplars
    assert {e.answer for e in pool[:7]} == set(LABELS) and len(pool) == 28
    assert TASKS["sib200"].n_exemplars == 7
    pool = load("milic-text-classification", "ug", data, seed).exemplars
    assert sorted(e.answer for e in pool[:4]) == [f"Label {n}" for n in range(4)]
    assert len(pool) == 16


def test_sib200_reads_quoted_fields(data):
    assert load("sib200", "kk", data).examples[0].question == ('Text: Ол "иә" деді test 0\nTopic:')


def test_flores_pairs_lines_and_leaves_quotation_marks(data):
    dataset = load("flores-from-en", "kk", data)
    assert dataset.examples[3].question == "English: Sentence 3\nKazakh:"
    assert dataset.examples[3].references == ("Сөйлем 3",)
    assert all(e.answer.startswith('"Мысал" ') for e in dataset.exemplars)
    assert load("flores-to-en", "kk", data).examples[3].references == ("Sentence 3",)


def test_flores_says_which_exemplars_it_misses_and_where_lines_differ(data, tmp_path):
    write_lines(tmp_path / "eval/en/flores200.txt", ["A.", "B."])
    write_lines(tmp_path / "eval/bo/flores200.txt", ["ཀ།", "ཁ།"])
    with pytest.raises(DataError, match=r"no eval/bo/flores200_fewshot\.tsv .*columns bo and en"):
        load("flores-to-en", "bo", tmp_path)
    write_lines(tmp_path / "eval/bo/flores200.txt", ["ཀ།"])
    with pytest.raises(DataError, match=r"en/flores200\.txt's 2, it has 1"):
        load("flores-to-en", "bo", tmp_path)
    write_lines(tmp_path / "eval/bo/flores200.txt", ["ཀ།", " "])
    with pytest.raises(DataError, match=r"bo/flores200\.txt:2: expected a sentence"):
        load("flores-to-en", "bo", tmp_path)


def test_tumlu_shuffles_choices_and_keeps_the_gold(data):
    by_seed = []
    for seed in range(4):
        examples = load("tumlu", "kk", data, seed).examples
        for example in examples:
            line = next(x for x in example.question.split("\n") if x[:1] == example.answer)
            assert line.startswith(f"{example.answer}. г")  # the file's D
        by_seed.append([example.answer for example in examples])
    assert len({tuple(letters) for letters in by_seed}) == 4
    counts = Counter(letter for letters in by_seed for letter in letters)
    assert set(counts) == set("ABCD") and max(counts.values()) < 0.4 * 240


def test_held_out_passages_are_not_asked_about(data):
    """Two questions share a passage: of 40 kept 20, an odd number would split one of them."""
    for name, n_examples, n_pool in (("kazqad", 20, 20), ("belebele", 24, 21)):
        dataset = load(name, "kk", data)
        assert (len(dataset.examples), len(dataset.exemplars)) == (n_examples, n_pool)
        words = [
            {w for e in part for w in re.findall(r"сөз\d+|Үзінді \d+", e.question)}
            for part in (dataset.examples, dataset.exemplars)
        ]
        assert words[0] and words[1] and not words[0] & words[1]
    assert load("kazqad", "kk", data).examples[3].references == ("жауап3",)  # twice in its file
    asked = load("copa", "kk", data).examples
    assert len(asked) == 19 and not any("Ортақ" in e.question for e in asked)


def test_copa_asks_for_a_cause_or_an_effect(data):
    examples = load("copa", "kk", data).examples
    assert examples[0].id == "kkCOPA-2" and examples[0].answer == "B"
    assert examples[0].question == (
        "Premise: Себеп 1.\nWhat was the cause?\nA. Бір.\nB. Екі.\nAnswer:"
    )
    tamil = load("copa", "ta", data).examples
    assert "What happened as a result?" in tamil[0].question and tamil[1].answer == "B"


def test_excerpts_hold_the_answer_and_do_not_say_where():
    """A passage with one answer per word: over many questions it stands at every depth."""
    generator = random.Random(0)
    depths = []
    for n in range(400):
        words = ["с" * generator.randint(1, 9) for _ in range(300)]
        words[150] = "ЖАУАП"
        passage = " ".join(words)
        start = passage.index("ЖАУАП")
        cut = excerpt(passage, start, start + 5, f"q{n}")
        assert "ЖАУАП" in cut.split() and PASSAGE_CHARS - 20 <= len(cut) <= PASSAGE_CHARS
        assert set(cut.split()) <= set(words)
        assert cut == excerpt(passage, start, start + 5, f"q{n}")
        depths.append(cut.index("ЖАУАП") / len(cut))
    fifths = Counter(int(depth * 5) for depth in depths)
    assert len(fifths) == 5 and min(fifths.values()) > 50


def test_an_excerpt_of_unbroken_text_and_of_a_long_answer():
    passage = "ཀ" * 500 + "ཁཁ" + "ཀ" * 500
    assert "ཁཁ" in excerpt(passage, 500, 502, "q") and len(excerpt(passage, 500, 502, "q")) <= 384
    assert excerpt("а" * 900, 100, 800, "q") == "а" * 700
    assert excerpt("қысқа", 0, 2, "q") == "қысқа"


def test_mgsm_solutions_add_up(data):
    """Each equation of the worked exemplars is true, and the last number is the answer."""
    for solution in SOLUTIONS.values():
        equations = re.findall(r"(\d[\d.]*(?: [-+*/] \d[\d.]*)+) = (\d+)", solution)
        assert equations and all(eval(left) == int(right) for left, right in equations)
        assert solution.endswith(f"The answer is {equations[-1][1]}.")


def test_mgsm_refuses_another_set(data, tmp_path):
    path = tmp_path / "eval/bn/mgsm_bn.tsv"
    lines = (data / "eval/bn/mgsm_bn.tsv").read_text(encoding="utf-8").splitlines()
    write_lines(path, lines[:100])
    with pytest.raises(DataError, match=r"mgsm_bn\.tsv: expected MGSM's 250 problems, got 100"):
        load("mgsm", "bn", tmp_path)
    write_lines(path, [*lines[:-1], "Басқа?\t56000"])
    with pytest.raises(DataError, match=r"mgsm_bn\.tsv:250: .* 56000 is not its answer"):
        load("mgsm", "bn", tmp_path)


def test_milic_follows_the_paper(data):
    counts = {name: find_task(name, "ug").n_exemplars for name in TASKS if "milic" in name}
    assert counts.pop("milic-title-generation") == 3
    assert counts.pop("milic-text-classification") == 8
    assert set(counts.values()) == {5}
    for seed, part in enumerate(("train_1", "train_2", "train_3", "train_1")):
        pool = load("milic-math", "ug", data, seed).exemplars
        assert [e.id for e in pool] == [f"{part}-{n}" for n in range(16)]
    title = load("milic-title-generation", "ug", data).examples[0].question
    assert len(title) <= len("Article: \nTitle:") + 256
    text = load("milic-text-classification", "ug", data).examples[0].question
    assert len(text.split("\n")[0]) <= len("Text: ") + 384
    assert text.endswith("Labels: Label 0, Label 1, Label 2, Label 3\nLabel:")
    dialogue = load("milic-reading-comprehension", "ug", data).examples[1]
    assert dialogue.question == (
        "Context:\nسالام\nياخشى مۇ\nQuestion: كىم؟\nA. بىر\nB. ئىككى\nC. ئۈچ\nAnswer:"
    )
    assert dialogue.choices == ("A", "B", "C") and dialogue.answer == "B"
    assert load("milic-math", "ug", data).examples[4].references == ("5",)
    to_english, from_english = (load(f"milic-{way}-en", "ug", data) for way in ("to", "from"))
    assert to_english.examples[1].question == "Uyghur: سالام 1\nEnglish:"
    assert from_english.examples[1].question == "English: Hello 1\nUyghur:"
    assert from_english.examples[1].references == ("سالام 1",)


# --- reading answers ---


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"), ("B.", "B"), ("(B)", "B"), (" b)", "B"), ("b", "B"), ("**C** because", "C"),
        ("В", "B"), ("А) Астана", "A"), ("с.", "C"), ("D\nE", "D"), ("B Астана", "B"),
        ("Because", "Because"), ("a dog", "a dog"), ("E", "E"), ("", ""), ("Б", "Б"), ("42", "42"),
        ("\n\nA", "A"), ("В1", "В1"),
    ],
)  # fmt: skip
def test_read_letter(text, letter):
    assert read_letter(text, ("A", "B", "C", "D")) == letter


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" sports", "sports"), ("Sports.", "sports"), ("It is travel, not sports", "travel"),
        ("sports news", "sports news"), ("transport", "transport"), ("transport sport", "sport"),
        ("unknown\nsports", "unknown"), ("", ""),
    ],
)  # fmt: skip
def test_read_label(text, label):
    assert read_label(text, ("travel", "sport", "sports", "sports news")) == label


# --- the real sets ---


@pytest.fixture(scope="module")
def real():
    if not (REAL / "eval").is_dir():
        pytest.skip("the evaluation sets are not here: name their folder in TRIMIX_DATA")
    return REAL


@pytest.mark.parametrize(
    ("name", "lang", "n_examples", "n_pool"),
    [
        *[("sib200", lang, 204, 701) for lang in ("kk", "ug", "bo", "mn", "bn", "ta", "te", "or")],
        ("sib200", "en", 204, 701),
        *[("flores-to-en", lang, 500, 199) for lang in ("kk", "ug")],
        *[("flores-from-en", lang, 500, 199) for lang in ("kk", "ug")],
        ("tumlu", "kk", 450, 45), ("kazqad", "kk", 376, 24), ("copa", "kk", 480, 20),
        ("copa", "ta", 500, 100),
        *[("mgsm", lang, 242, 8) for lang in ("bn", "te", "en")],
    ],
)  # fmt: skip
def test_real_sets(name, lang, n_examples, n_pool, real):
    dataset = load(name, lang, real)
    assert (len(dataset.examples), len(dataset.exemplars)) == (n_examples, n_pool)
    everything = [*dataset.examples, *dataset.exemplars]
    assert len({e.id for e in everything}) == n_examples + n_pool
    shown_ever = {e.question for e in dataset.exemplars}
    assert not shown_ever & {e.question for e in dataset.examples}
    assert all(not e.choices or e.answer in e.choices for e in everything)
    shown = dataset.exemplars[: find_task(name, lang).n_exemplars]
    if name == "sib200":
        assert {e.answer for e in shown} == set(LABELS)


def test_tumlus_bias_to_d_is_gone(real):
    lines = (real / "eval/kk/tumlu/test.jsonl").read_text(encoding="utf-8").splitlines()
    assert Counter(json.loads(line)["answer"] for line in lines)["D"] / len(lines) > 0.38
    for seed in range(5):
        counts = Counter(e.answer for e in load("tumlu", "kk", real, seed).examples)
        assert set(counts) == set("ABCD")
        assert all(0.19 < n / 450 < 0.31 for n in counts.values())  # 3 standard deviations


def test_kazqad_passages_hold_their_answers_at_any_depth(real):
    examples = load("kazqad", "kk", real).examples
    depths = []
    for example in examples:
        passage = example.question.split("\n")[0].removeprefix("Passage: ")
        assert len(passage) <= PASSAGE_CHARS and example.answer in passage
        if len(passage) > 300:
            depths.append(passage.index(example.answer) / len(passage))
    middle = sum(0.4 < depth < 0.6 for depth in depths) / len(depths)
    assert middle < 0.3, "the answers crowd in the middle of their passages"
