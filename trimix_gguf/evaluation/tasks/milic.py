"""MiLiC-Eval in the paper's seven tasks: Tibetan, Uyghur, Kazakh, Mongolian (Zhang et al., 2025).

Here Kazakh is written in Arabic script, and Mongolian in Mongolian script. The files are
`data/<folder>/<lang>/{test,train_1,train_2,train_3}.json`. Exemplars keep the order of their file,
as in the paper, which uses train_1: seed 0 uses train_1, seed 1 train_2, seed 2 train_3, seed 3
train_1 again. All settings below are the paper's, but a label may have more than two tokens.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks import flores
from trimix_gguf.evaluation.tasks.belebele import LETTERS, letter_task, lettered
from trimix_gguf.evaluation.tasks.rows import Fields, Row, index_of, one_line, read_json
from trimix_gguf.evaluation.tasks.sib200 import one_of_each, read_label
from trimix_gguf.evaluation.tasks.sources import HubFile, find
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Load, Task

LANGUAGES = ("bo", "ug", "kk", "mn")
HUB = "pkupie/milic-eval"
ON_HUB = ("response_selection", "reading_comprehension", "math", "translation_dialogue")
TEXT_CHARS, ARTICLE_CHARS = 384, 256

_CHOICE: Fields = {"context": list, "options": list, "answer": str}


def _loader(folder: str, fields: Fields, example: Callable[[Row], Example]) -> Load:
    """The `load` of a task: each row of the test and the training file is one example."""

    def load(data: Path, lang: str, seed: int) -> Dataset:
        test, train = _read(data, folder, lang, seed, fields)
        return Dataset([example(row) for row in test], [example(row) for row in train])

    return load


def _topics(data: Path, lang: str, seed: int) -> Dataset:
    """The pool is the training file, but with one exemplar of each label first, shuffled."""
    test, train = _read(data, "text_classification", lang, seed, {"text": str, "label": dict})
    labels = tuple(sorted({_english(row, "label") for row in test}))
    pool = one_of_each([_topic(row, labels) for row in train])
    n = len({example.answer for example in pool})
    first = random.Random(seed).sample(pool[:n], n)
    return Dataset([_topic(row, labels) for row in test], first + pool[n:])


def _to_english(data: Path, lang: str, seed: int) -> Dataset:
    return _translations(lang, lang, "en")(data, lang, seed)


def _from_english(data: Path, lang: str, seed: int) -> Dataset:
    return _translations(lang, "en", lang)(data, lang, seed)


def _translations(lang: str, source: str, target: str) -> Load:
    def example(row: Row) -> Example:
        _, record = row
        pair = (record[source], record[target])
        return flores.translation(str(record["id"]), pair, source, target)

    return _loader("translation_dialogue", {lang: str, "en": str}, example)


def _read(
    data: Path, folder: str, lang: str, seed: int, fields: Fields
) -> tuple[list[Row], list[Row]]:
    """The test rows, and those of the training file that the seed names; all have an id too."""
    mend = (
        "put it there: data.zip of github.com/luciusssss/TriMix has it, or the dataset's page on"
        f" the hub ({HUB})"
    )
    parts = []
    for part in ("test", f"train_{seed % 3 + 1}"):
        name = f"{folder}/{lang}/{part}.json"
        hub = HubFile(HUB, name) if folder in ON_HUB else None
        path = find(data, f"data/{name}", hub=hub, mend=mend)
        parts.append(read_json(path, {"id": str | int, **fields}))
    return parts[0], parts[1]


def _english(row: Row, field: str) -> str:
    where, record = row
    text = record[field].get("en")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: field '{field}.en' is missing")
    return one_line(text)


def _turns(row: Row) -> str:
    return "\n".join(["Context:", *(one_line(str(turn)) for turn in row[1]["context"])])


def _choice(row: Row, stem: str) -> Example:
    where, record = row
    options = [str(option) for option in record["options"]]
    gold = index_of(where, "answer", record["answer"], tuple(LETTERS[: len(options)]))
    return lettered(str(record["id"]), stem, options, gold)


def _response(row: Row) -> Example:
    return _choice(row, _turns(row))


def _comprehension(row: Row) -> Example:
    return _choice(row, f"{_turns(row)}\nQuestion: {one_line(row[1]['question'])}")


def _topic(row: Row, labels: tuple[str, ...]) -> Example:
    where, record = row
    label = labels[index_of(where, "label.en", _english(row, "label"), labels)]
    text = one_line(record["text"][:TEXT_CHARS])
    question = f"Text: {text}\nLabels: {', '.join(labels)}\nLabel:"
    return Example(str(record["id"]), question, label, (label,), labels)


def _title(row: Row) -> Example:
    _, record = row
    question = f"Article: {one_line(record['content'][:ARTICLE_CHARS])}\nTitle:"
    title = one_line(record["title"])
    return Example(str(record["id"]), question, title, (title,))


def _problem(row: Row) -> Example:
    _, record = row
    question = f"Problem: {one_line(record['question'])}\nSolution:"
    return Example(str(record["id"]), question, _english(row, "cot"), (str(record["answer"]),))


RESPONSES = letter_task(
    name="milic-response-selection",
    languages=LANGUAGES,
    instruction="Choose the response that fits each dialogue, by its letter.",
    load=_loader("response_selection", _CHOICE, _response),
)
COMPREHENSION = letter_task(
    name="milic-reading-comprehension",
    languages=LANGUAGES,
    instruction="Read each dialogue and answer the question with the letter of the right choice.",
    load=_loader("reading_comprehension", {**_CHOICE, "question": str}, _comprehension),
)
TOPICS = Task(
    name="milic-text-classification",
    languages=LANGUAGES,
    instruction="Classify each text by one of the labels below it.",
    metrics=("accuracy",),
    max_tokens=10,  # as of SIB-200: where two tokens were enough, a newline ends the answer
    load=_topics,
    n_exemplars=8,  # one a label: the parts have 16, 48 and 504 texts, multiples of eight
    read_answer=read_label,
)
TITLES = Task(
    name="milic-title-generation",
    languages=LANGUAGES,
    instruction="Write a title for each article, in its language.",
    metrics=("rouge_l",),
    max_tokens=250,
    load=_loader("title_generation_200", {"content": str, "title": str}, _title),
    n_exemplars=3,
)
MATH = Task(
    name="milic-math",
    languages=LANGUAGES,
    instruction="Solve each problem step by step, in English and on one line.",
    metrics=("number",),
    max_tokens=250,
    load=_loader("math", {"question": str, "cot": dict, "answer": int | float | str}, _problem),
)
TO_ENGLISH = replace(flores.TO_ENGLISH, name="milic-to-en", languages=LANGUAGES, load=_to_english)
FROM_ENGLISH = replace(
    flores.FROM_ENGLISH, name="milic-from-en", languages=LANGUAGES, load=_from_english
)
