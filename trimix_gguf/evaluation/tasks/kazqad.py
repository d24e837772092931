"""KazQAD: the span of a Kazakh passage that answers a question (Yeshpanov et al., 2024).

Only its validation part is used: the passages of its last 20 questions are for exemplars.
"""

import random
from pathlib import Path

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks.rows import Record, Row, one_line, read_jsonl
from trimix_gguf.evaluation.tasks.sources import find
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task

PASSAGE_CHARS = 384  # the paper's cut of passages


def load(data: Path, lang: str, seed: int) -> Dataset:
    """All questions but those of the held-out passages."""
    path = find(data, f"eval/{lang}/kazqad/validation.jsonl")
    rows = read_jsonl(path, {"id": str, "context": str, "question": str, "answers": dict})
    return Dataset.held_out(rows, "context", _example, seed)


def _example(row: Row) -> Example:
    where, record = row
    texts, starts = _spans(where, record)
    passage = excerpt(record["context"], starts[0], starts[0] + len(texts[0]), record["id"])
    question = f"Passage: {one_line(passage)}\nQuestion: {one_line(record['question'])}\nAnswer:"
    references = tuple(dict.fromkeys(one_line(text) for text in texts))
    return Example(record["id"], question, references[0], references)


def _spans(where: str, record: Record) -> tuple[list[str], list[int]]:
    """The answers, and where each starts in the passage; raises DataError if one is not there."""
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

    The first characters of a passage lack the answer of every fourth question. A window around
    the answer would show where it is. So the window is drawn evenly from all that contain the
    answer, with only `key` as the seed: a question has the same text in every run.
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
