"""The tasks of `trimix eval`: what their files become, and what is said of a bad file."""

import json
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from trimix_gguf.errors import DataError, TrimixError
from trimix_gguf.evaluation.metrics import METRICS
from trimix_gguf.evaluation.sources import HubFile, find, read_json, read_jsonl, read_tsv
from trimix_gguf.evaluation.tasks import TASKS, custom_task, find_task
from trimix_gguf.evaluation.tasks.belebele import read_letter
from trimix_gguf.evaluation.tasks.kazqad import PASSAGE_CHARS, excerpt
from trimix_gguf.evaluation.tasks.mgsm import SOLUTIONS
from trimix_gguf.evaluation.tasks.sib200 import LABELS, read_label

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("TRIMIX_DATA", ROOT.parent / "shared" / "data"))
CASES = [
    ("sib200", "kk"), ("flores-to-en", "kk"), ("flores-from-en", "kk"), ("belebele", "kk"),
    ("tumlu", "kk"), ("kazqad", "kk"), ("copa", "kk"), ("copa", "ta"), ("mgsm", "bn"),
    ("milic-response-selection", "ug"), ("milic-reading-comprehension", "ug"),
    ("milic-text-classification", "ug"), ("milic-title-generation", "ug"), ("milic-math", "ug"),
    ("milic-to-en", "ug"), ("milic-from-en", "ug"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def hub_cache(monkeypatch, tmp_path):
    """An empty cache and no network: a test that lacks its file fails at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small file of every kind that a task reads."""
    folder = tmp_path_factory.mktemp("data")
    write_sib200(folder)
    write_flores(folder)
    write_kazakh(folder)
    for part, n in (("val", 6), ("test", 6)):
        write_jsonl(folder / f"eval/ta/{part}.jsonl", [xcopa(part, n) for n in range(n)])
    numbers = {n: solution.split()[-1].rstrip(".") for n, solution in SOLUTIONS.items()}
    lines = [f"সমস্যা {n}?\t{numbers.get(n, n)}" for n in range(1, 251)]
    write_lines(folder / "eval/bn/mgsm_bn.tsv", lines)
    write_milic(folder)
    return folder


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, rows):
    return write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def write_json(path, rows):
    return write_lines(path, [json.dumps(rows, ensure_ascii=False, indent=1)])


def write_sib200(folder):
    for part, n in (("train", 28), ("test", 9)):
        rows = [f"{part}{i}\t{LABELS[i % 7]}\tМәтін {part} {i}" for i in range(n)]
        rows[0] = rows[0].replace("Мәтін", '"Ол ""иә"" деді').replace(" 0", ' 0"')
        lines = ["index_id\tcategory\ttext", *rows]
        write_lines(folder / f"eval/kk/sib200/{part}.tsv", lines)


def write_flores(folder):
    for lang, word in (("kk", "Сөйлем\u2028"), ("en", "Sentence")):
        write_lines(folder / f"eval/{lang}/flores200.txt", [f"{word} {i}" for i in range(7)])
    pairs = [f'"Мысал" {i}\t"Example" {i}' for i in range(9)]
    write_lines(folder / "eval/kk/flores200_fewshot.tsv", ["kk\ten", *pairs])


def write_kazakh(folder):
    for part, n in (("dev", 9), ("test", 60)):
        rows = [
            {"question": f"{part} {i}?", "choices": [f"{c}{i}" for c in "абвг"], "answer": "D"}
            for i in range(n)
        ]
        write_jsonl(folder / f"eval/kk/tumlu/{part}.jsonl", rows)
    write_jsonl(folder / "eval/kk/kazqad/validation.jsonl", [kazqad(i) for i in range(40)])
    write_jsonl(folder / "eval/kk/kkCOPA.jsonl", [kkcopa(i) for i in range(40)])
    write_jsonl(folder / "kaz_Cyrl.jsonl", [belebele(i) for i in range(45)])


def kazqad(i):
    words = [f"сөз{i // 2}-{n}" for n in range(150)]
    answer = f"жауап{i}"
    words[(i * 7) % 150] = answer
    context = " ".join(words)
    answers = {"text": [answer, answer], "answer_start": [context.index(answer)] * 2}
    row = {"id": f"q{i}", "title": "т", "context": context, "question": f"не\n{i}?"}
    return {**row, "answers": answers}


def kkcopa(i):
    premise = "Ортақ себеп." if i in (0, 39) else f"Себеп {i}."
    row = {"items_id": str(i), "asks-for_eng": "cause" if i % 2 else "effect"}
    texts = {"p_contents_kz": premise, "a1_contents_kz": "Бір.", "a2_contents_kz": "Екі."}
    return {**row, **texts, "correct_answers": str(1 + i % 2)}


def xcopa(part, i):
    row = {"premise": f"{part} {i}", "choice1": "ஒன்று", "choice2": "இரண்டு"}
    return {**row, "question": "effect", "label": i % 2, "idx": i}


def belebele(i):
    options = {f"mc_answer{n}": f"жауап {n}" for n in range(1, 5)}
    row = {"flores_passage": f"Үзінді {i // 2}.", "question": f"Сұрақ {i}?", **options}
    return {**row, "correct_answer_num": str(1 + i % 4) if i % 2 else 1 + i % 4}


def milic(kind, part, i):
    name, answer = f"{part}-{i}", "ABC"[i % 3]
    context, options = ["سالام", "ياخشى\nمۇ"], ["بىر", "ئىككى", "ئۈچ"]
    kinds: dict[str, dict] = {
        "response_selection": {"context": context, "options": options, "answer": answer},
        "reading_comprehension": {
            "context": context, "question": "كىم؟", "options": options, "answer": answer,
        },
        "text_classification": {
            "text": "تېكىست " * 99, "label": {"en": f"Label {i % 4}", "zh": "标"},
        },
        "title_generation_200": {"content": "ماقالە " * 99, "title": f"ماۋزۇ {i}"},
        "math": {"question": f"1 + {i}؟", "cot": {"en": f"It is {1 + i}.", "zh": ""},
                 "answer": 1 + i},
        "translation_dialogue": {"ug": f"سالام {i}", "en": f"Hello {i}"},
    }  # fmt: skip
    return {**kinds[kind], "id": name}


def write_milic(folder):
    for kind in (
        "response_selection", "reading_comprehension", "text_classification",
        "title_generation_200", "math", "translation_dialogue",
    ):  # fmt: skip
        for part, n in (("test", 12), ("train_1", 16), ("train_2", 16), ("train_3", 16)):
            rows = [milic(kind, part, i) for i in range(n)]
            write_json(folder / f"data/{kind}/ug/{part}.json", rows)


def load(name, lang, folder, seed=0):
    return find_task(name, lang).load(folder, lang, seed)


def prompt(task, dataset, example):
    shown = [f"{e.question} {e.answer}\n\n" for e in dataset.exemplars[: task.n_exemplars]]
    return f"{task.instruction}\n\n{''.join(shown)}{example.question}"


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


# --- what is said of a bad file ---


def broken(path, edit):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    edit(rows)
    return write_jsonl(path, rows)


@pytest.mark.parametrize(
    ("name", "lang", "relative", "edit", "said"),
    [
        ("belebele", "kk", "kaz_Cyrl.jsonl", lambda r: r[2].pop("mc_answer3"),
         r"kaz_Cyrl\.jsonl:3: field 'mc_answer3' is missing; it has flores_passage, question"),
        ("belebele", "kk", "kaz_Cyrl.jsonl", lambda r: r[2].update(correct_answer_num=5),
         r":3: field 'correct_answer_num' should be one of 1, 2, 3, 4; got 5"),
        ("tumlu", "kk", "eval/kk/tumlu/test.jsonl", lambda r: r[9].update(answer="E"),
         r"test\.jsonl:10: field 'answer' should be one of A, B, C, D; got 'E'"),
        ("tumlu", "kk", "eval/kk/tumlu/dev.jsonl", lambda r: r[0].update(choices="аб"),
         r"dev\.jsonl:1: field 'choices' should be a list, got a text"),
        ("kazqad", "kk", "eval/kk/kazqad/validation.jsonl",
         lambda r: r[1]["answers"].update(answer_start=[0, 0]),
         r"validation\.jsonl:2: field 'answers': 'жауап1' does not stand at character 0"),
        ("kazqad", "kk", "eval/kk/kazqad/validation.jsonl",
         lambda r: r[1]["answers"].pop("answer_start"), r":2: field 'answers' should have as many"),
        ("kazqad", "kk", "eval/kk/kazqad/validation.jsonl", lambda r: r.__delitem__(slice(15, 99)),
         r"validation\.jsonl:15: too few rows: the last 20"),
        ("copa", "kk", "eval/kk/kkCOPA.jsonl", lambda r: r[3].update({"asks-for_eng": "why"}),
         r":4: field 'asks-for_eng' should be one of cause, effect; got 'why'"),
        ("copa", "ta", "eval/ta/test.jsonl", lambda r: r[1].update(label=None),
         r"test\.jsonl:2: field 'label' is missing"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(name, lang, relative, edit, said, tmp_path):
    write_kazakh(tmp_path)
    for part in ("val", "test"):
        write_jsonl(tmp_path / f"eval/ta/{part}.jsonl", [xcopa(part, n) for n in range(3)])
    load(name, lang, tmp_path)
    broken(tmp_path / relative, edit)
    with pytest.raises(DataError, match=said):
        load(name, lang, tmp_path)


def test_a_bad_item_of_milic_is_named(tmp_path):
    write_milic(tmp_path)
    path = tmp_path / "data/text_classification/ug/test.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[4]["label"] = {"zh": "标"}
    write_json(path, rows)
    with pytest.raises(DataError, match=r"test\.json, item 5: field 'label\.en' is missing"):
        load("milic-text-classification", "ug", tmp_path)
    path = tmp_path / "data/math/ug/train_1.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    del rows[1]["cot"]
    write_json(path, rows)
    with pytest.raises(DataError, match=r"train_1\.json, item 2: field 'cot' is missing; it has"):
        load("milic-math", "ug", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "x"}\n{"a": \n', r"f:2: not JSON: Expecting value, column 7"),
        (b'{"a": "x"}\n\n{"a": "\xd0"}\n', r"f:3: not UTF-8; save the file as UTF-8"),
        (b'{"a": "x"}\n["x"]\n', r"f:2: expected a JSON object, got a list"),
        (b'{"b": "x"}\n', r"f:1: field 'a' is missing; it has b"),
        (b'{"a": ""}\n', r"f:1: field 'a' is missing"),
        (b'{"a": 7}\n', r"f:1: field 'a' should be a text, got a number"),
        (b"\n", r"f has no rows"),
    ],
)
def test_bad_jsonl(content, said, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_jsonl(path, {"a": str})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}', r"f: expected a JSON list of objects, got an object"),
        (b'[\n {"a": "x"},\n {"a": }\n]', r"f:3: not JSON: Expecting value, column 8"),
        (b'[{"a": "x"}, {"b": 1}]', r"f, item 2: field 'a' is missing; it has b"),
        (b'[{"a": "x"}, 3]', r"f, item 2: expected a JSON object, got a number"),
        (b"[]", r"f has no rows"),
    ],
)
def test_bad_json(content, said, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_json(path, {"a": str})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a\tb\nx\n", r"f:2: expected 2 columns \(a, b\), got 1"),
        ("a\tc\nx\ty\n", r"f:2: field 'b' is missing; it has a, c"),
        ('a\tb\nx\t"y\nz\tz\n', r"f:3: not tab-separated values: unexpected end of data"),
        ("a\tb\nx\t\n", r"f:2: field 'b' is missing"),
        ("a\tb\n", r"f has no rows"),
    ],
)
def test_bad_tsv(content, said, tmp_path):
    path = tmp_path / "f"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_tsv(path, ("a", "b"), quoted=True)


def test_windows_files_and_unicode_line_ends_are_read_whole(tmp_path):
    path = tmp_path / "f"
    path.write_bytes('\ufeff{"a": "бір\u2028екі"}\r\n{"a": "үш\x85"}\r\n'.encode())
    assert [row["a"] for _, row in read_jsonl(path, {"a": str})] == ["бір\u2028екі", "үш\x85"]
    path.write_bytes(b'a\tb\r\n"x\ty"\r\n')
    assert read_tsv(path, ("a", "b"))[0][1] == {"a": '"x', "b": 'y"'}


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_jsonl(tmp_path, {})


# --- the hub ---

HUB_FILES = {
    "belebele": ("facebook/belebele", {"kaz_Cyrl.jsonl": "data/kaz_Cyrl.jsonl"}),
    "sib200": (
        "Davlan/sib200",
        {f"eval/kk/sib200/{p}.tsv": f"data/kaz_Cyrl/{p}.tsv" for p in ("train", "test")},
    ),
    "milic-to-en": (
        "pkupie/milic-eval",
        {
            f"data/translation_dialogue/ug/{p}.json": f"translation_dialogue/ug/{p}.json"
            for p in ("train_1", "test")
        },
    ),
}


def test_a_file_at_hand_is_not_asked_of_the_hub(data, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert load("belebele", "kk", data).examples


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_file_in_the_hubs_cache_needs_no_network(name, data, hub_cache, tmp_path):
    lang = "ug" if name.startswith("milic") else "kk"
    repo, files = HUB_FILES[name]
    with pytest.raises(DataError) as caught:
        load(name, lang, tmp_path / "none")
    said = str(caught.value)
    assert "\n" not in said and f"in {tmp_path / 'none'}" in said and repo in said
    assert "it is not cached, and the hub does not answer: run once with a network" in said
    assert said.startswith("there is no ") and "put it there" in said
    folder = hub_cache / f"datasets--{repo.replace('/', '--')}"
    write_lines(folder / "refs" / "main", ["c0ffee"]).write_text("c0ffee")
    for local, remote in files.items():
        text = (data / local).read_text(encoding="utf-8")
        write_lines(folder / "snapshots" / "c0ffee" / remote, [text])
    assert load(name, lang, tmp_path / "none") == load(name, lang, data)


def test_a_set_of_no_known_repository_names_its_place(tmp_path):
    with pytest.raises(DataError, match=r"no eval/kk/tumlu/dev\.jsonl in .*; put it there"):
        load("tumlu", "kk", tmp_path)
    with pytest.raises(DataError, match=r"title_generation_200/ug/test.json in .*TriMix has it"):
        load("milic-title-generation", "ug", tmp_path)


class Hub(BaseHTTPRequestHandler):
    """The hub as far as a download sees it: one open file, one repository behind terms."""

    asked: list[str] = []

    def do_HEAD(self):  # noqa: N802
        self.asked.append(self.path)
        body = b'{"a": "x"}\n'
        if "/gated/" in self.path:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            body = b""
        elif self.path.endswith("/data/x.jsonl"):
            self.send_response(200)
            self.send_header("ETag", '"e7a6"')
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            body = b""
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "c0ff")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_):
        pass


FETCH = """
import sys
from pathlib import Path
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.sources import HubFile, find, read_jsonl
for repo, name in (("open/set", "data/x.jsonl"), ("open/set", "data/y"), ("gated/set", "data/x")):
    try:
        print(read_jsonl(find(Path("here"), name, hub=HubFile(repo, name)), {"a": str})[0][1])
    except DataError as error:
        print(error)
"""


def test_the_hub_is_asked_once_and_its_refusals_are_told(tmp_path):
    """A hub of our own: a download, a missing file, a gated set; then the same once more."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    outputs, n_asked = [], []
    try:
        for _ in range(2):
            run = subprocess.run(
                [sys.executable, "-c", FETCH],
                env=environment, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
            )  # fmt: skip
            outputs.append(run.stdout.splitlines())
            n_asked.append(sum(path.endswith("x.jsonl") for path in Hub.asked))
    finally:
        server.shutdown()
        server.server_close()
    got, missing, gated = outputs[0]
    assert got == "{'a': 'x'}"
    assert "nor data/y of open/set (the hub has no such file)" in missing
    assert (
        "accept it at https://huggingface.co/datasets/gated/set, then run `hf auth login`" in gated
    )
    assert outputs[1] == outputs[0] and n_asked[0] == n_asked[1] > 0


def test_find_takes_the_folder_first(tmp_path):
    path = write_lines(tmp_path / "a" / "b.tsv", ["x"])
    assert find(tmp_path, "a/b.tsv", hub=HubFile("x/y", "z")) == path


# --- a user's own file ---


def test_a_custom_task(tmp_path):
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        [
            {"instruction": "Answer in Kazakh.", "language": "kk", "n_exemplars": 1},
            {"question": "Қазақстан астанасы?", "answer": "Астана", "exemplar": True},
            {"question": "Абай кім?", "answer": "Ақын", "exemplar": True},
            {"question": "Ең ұзын өзен?", "answer": ["Ертіс", "Ертіс өзені"]},
        ],
    )
    task = custom_task(path)
    dataset = task.load(Path("nowhere"), "kk", 0)
    assert (task.name, task.languages, task.metrics) == ("mine", ("kk",), ("exact_match", "f1"))
    assert (task.n_exemplars, len(dataset.exemplars), task.max_tokens) == (1, 2, 64)
    assert dataset.examples[0].references == ("Ертіс", "Ертіс өзені")
    assert re.fullmatch(
        r"Answer in Kazakh\.\n\nQuestion: (Қазақстан астанасы\?\nAnswer: Астана"
        r"|Абай кім\?\nAnswer: Ақын)\n\nQuestion: Ең ұзын өзен\?\nAnswer:",
        prompt(task, dataset, dataset.examples[0]),
    )
    orders = {tuple(e.id for e in task.load(path, "kk", s).exemplars) for s in range(9)}
    assert orders == {("2", "3"), ("3", "2")}


def test_a_custom_task_with_choices(tmp_path):
    path = write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"question": "2 + 2 = ?", "choices": ["3", "4"], "answer": "B"},
            {"question": "Which vitamin?", "choices": ["B", "A"], "answer": "A"},
        ],
    )
    task = custom_task(path)
    first, second = task.load(path, "und", 0).examples
    assert (task.metrics, task.max_tokens, task.n_exemplars) == (("accuracy",), 2, 0)
    assert first.question == "Question: 2 + 2 = ?\nA. 3\nB. 4\nAnswer:" and first.answer == "B"
    assert second.answer == "B"  # the text of a choice goes before a letter
    assert task.prediction(" b)", first.choices) == "B"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "a?"}], r"q\.jsonl:1: field 'answer' is missing; it has question"),
        ([{"question": "a?", "answer": []}], r":1: field 'answer' is missing"),
        ([{"question": "a?", "answer": 4}], r":1: field 'answer' should be a text or a list, got"),
        ([{"question": "a?", "answer": "x", "anwser": 1}], r":1: field 'anwser' is unknown; known"),
        ([{"question": "a?", "answer": "x", "exemplar": 1}], r"should be true or false, got a num"),
        ([{"question": "a?", "answer": "C", "choices": ["x", "y"]}], r"one of A, B; got 'C'"),
        ([{"question": "a?", "answer": "x", "exemplar": True}], r"no question to ask"),
        ([{"question": "a?", "answer": "A", "choices": ["x"] * 27}], r"at most 26"),
        ([{"metrics": ["bleurt"]}, {"question": "a?", "answer": "x"}],
         r"q\.jsonl:1: field 'metrics' should be one of accuracy, exact_match"),
        ([{"max_tokens": -1}, {"question": "a?", "answer": "x"}], r":1: field 'max_tokens' should"),
        ([{"question": "a?", "answer": "x"},
          {"question": "b?", "answer": "x", "choices": ["x"]}], r"some rows have choices"),
        ([{"instruction": "Answer."}], r"q\.jsonl has no question to ask"),
        (["a?"], r"q\.jsonl:1: expected a JSON object, got a text"),
    ],
)  # fmt: skip
def test_a_bad_custom_file_is_named(rows, said, tmp_path):
    with pytest.raises(DataError, match=said):
        custom_task(write_jsonl(tmp_path / "q.jsonl", rows))


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
