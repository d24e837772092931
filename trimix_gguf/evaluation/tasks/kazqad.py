"""KazQAD: the span of a Kazakh passage that answers a question (Yeshpanov et al., 2024).

Only its validation part is at hand: the passages of its last 20 questions are for exemplars.
"""

import random
from pathlib import Path
from typing import Any

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks.sources import Row, find, hold_out, one_line, read_jsonl
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task

N_HELD_OUT = 20
PASSAGE_CHARS = 384  # the paper's cut of passages


def load(data: Path, lang: str, seed: int) -> Dataset:
    path = find(data, f"eval/{lang}/kazqad/validation.jsonl")
    rows = read_jsonl(path, {"id": str, "context": str, "question": str, "answers": dict})
    examples, held_out = hold_out(rows, N_HELD_OUT, lambda row: row["context"])
    pool = [_example(row) for row in held_out]
    random.Random(seed).shuffle(pool)
    return Dataset([_example(row) for row in examples], pool)


def _example(row: Row) -> Example:
    where, record = row
    texts, starts = _spans(where, record)
    passage = excerpt(record["context"], starts[0], starts[0] + len(texts[0]), record["id"])
    question = f"Passage: {one_line(passage)}\nQuestion: {one_line(record['question'])}\nAnswer:"
    references = tuple(dict.fromkeys(one_line(text) for text in texts))
    return Example(record["id"], question, references[0], references)


def _spans(where: str, record: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The answers and where each starts in the passage; raises DataError where one does not."""
    texts, starts = record["answers"].get("text"), record["answers"].get("answer_start")
    if not texts or not starts or len(texts) != len(starts):
        raise DataError(f"{where}: field 'answers' should have as many text as answer_start, ≥ 1")
    for text, start in zip(texts, starts, strict=True):
        if not text.strip() or record["context"][start : start + len(text)] != text:
            raise DataError(
                f"{where}: field 'answers': {text!r} does not stand at character {start}"
                " of the context"
            )
    return texts, starts


def excerpt(passage: str, start: int, end: int, key: str) -> str:
    """At most PASSAGE_CHARS characters of `passage`, whole words, with [start, end) inside.

    A cut at the front would drop the answer of every fourth question; one around the answer
    would say where it stands. So the window is drawn evenly from all that hold the answer, with
    `key` alone as seed: one question has one text, in any run and whatever else is asked.
    """
    n_chars = max(PASSAGE_CHARS, end - start)
    if len(passage) <= n_chars:
        return passage
    first, last = max(0, end - n_chars), min(start, len(passage) - n_chars)
    left = random.Random(key).randint(first, last)
    right = left + n_chars
    while 0 < left < start and not passage[left - 1].isspace():
        left += 1
    while end < right < len(passage) and not passage[right].isspace():
        right -= 1
    return passage[left:right]


KAZQAD = Task(
    name="kazqad",
    languages=("kk",),
    instruction="Answer each question with the shortest words of the passage that answer it.",
    metrics=("exact_match", "f1"),
    max_tokens=32,  # all but the longest few answers, in a small vocabulary too
    load=load,
)
