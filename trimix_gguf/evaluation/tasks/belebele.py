"""Belebele: questions on a FLORES passage, four choices (Bandarkar et al., 2024).

The set has one part, 900 questions on 488 passages: the passages of its last 20 questions are
kept for exemplars. What every task with lettered choices shares is here too.
"""

import re
import string
from collections.abc import Sequence
from pathlib import Path

from trimix_gguf.evaluation.tasks.rows import Row, index_of, one_line, read_jsonl
from trimix_gguf.evaluation.tasks.sources import FLORES_CODES, HubFile, find
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Load, Task

LETTERS = string.ascii_uppercase

_OPTIONS = tuple(f"mc_answer{n}" for n in range(1, 5))
_FIELDS = dict.fromkeys(("flores_passage", "question", *_OPTIONS), str)
_LOOK_ALIKES = str.maketrans("АВСЕавсе", "ABCEabce")  # Cyrillic, as a Kazakh model writes them


def load(data: Path, lang: str, seed: int) -> Dataset:
    """All questions but those of the held-out passages."""
    code = FLORES_CODES[lang]
    path = find(data, f"{code}.jsonl", hub=HubFile("facebook/belebele", f"data/{code}.jsonl"))
    rows = read_jsonl(path, {**_FIELDS, "correct_answer_num": str | int})
    return Dataset.held_out(rows, "flores_passage", _example, seed)


def _example(row: Row) -> Example:
    where, record = row
    gold = index_of(where, "correct_answer_num", record["correct_answer_num"], ("1", "2", "3", "4"))
    passage, question = one_line(record["flores_passage"]), one_line(record["question"])
    stem = f"Passage: {passage}\nQuestion: {question}"
    return lettered(where.rsplit(":", 1)[1], stem, [record[name] for name in _OPTIONS], gold)


def lettered(name: str, stem: str, options: Sequence[str], gold: int) -> Example:
    """A question with a letter as its answer: `stem`, the options after A., B., …, "Answer:"."""
    letters = tuple(LETTERS[: len(options)])
    lines = [
        f"{letter}. {one_line(option)}" for letter, option in zip(letters, options, strict=True)
    ]
    question = "\n".join([stem, *lines, "Answer:"])
    return Example(name, question, letters[gold], (letters[gold],), letters)


def read_letter(text: str, choices: Sequence[str]) -> str:
    """The letter at the beginning of the first line ("B", "(B)", " b)"), else that line.

    A Cyrillic look-alike counts as the Latin letter. "Because" does not begin with an answer, and
    "a dog" does not either: after a small letter there must be a mark, or the end of the line.
    """
    line = text.strip().split("\n")[0].strip()
    match = re.match(r"[\W_]*([^\W\d_])(?!\w)(\s*[^\w\s]|$)?", line)
    if match is None or (match[1].islower() and match[2] is None):
        return line
    letter = match[1].translate(_LOOK_ALIKES).upper()
    return letter if letter in choices else line


def letter_task(name: str, languages: tuple[str, ...], instruction: str, load: Load) -> Task:
    """A task whose answers are letters of choices."""
    return Task(
        name=name,
        languages=languages,
        instruction=instruction,
        metrics=("accuracy",),
        max_tokens=2,
        load=load,
        read_answer=read_letter,
    )


BELEBELE = letter_task(
    name="belebele",
    languages=tuple(lang for lang in FLORES_CODES if lang != "ug"),  # it has no Uyghur
    instruction="Read each passage and answer the question with the letter of the right choice.",
    load=load,
)
