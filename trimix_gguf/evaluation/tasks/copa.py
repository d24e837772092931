"""COPA: the likelier cause or effect of two, in Kazakh (kkCOPA) and Tamil (XCOPA).

kkCOPA is COPA's test part alone: its last 20 items are for exemplars. XCOPA has a validation
part for them. In both the right answer stands first in half of the test items.
"""

import random
from collections.abc import Mapping
from pathlib import Path

from trimix_gguf.evaluation.tasks.belebele import lettered, read_letter
from trimix_gguf.evaluation.tasks.sources import (
    Row,
    find,
    hold_out,
    index_of,
    one_line,
    read_jsonl,
)
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task

N_HELD_OUT = 20

# Our name of a field -> the file's
_KKCOPA = {
    "premise": "p_contents_kz",
    "first": "a1_contents_kz",
    "second": "a2_contents_kz",
    "asks": "asks-for_eng",
    "answer": "correct_answers",
}
_XCOPA = {
    "premise": "premise",
    "first": "choice1",
    "second": "choice2",
    "asks": "question",
    "answer": "label",
}
_ASKED = {"cause": "What was the cause?", "effect": "What happened as a result?"}


def load(data: Path, lang: str, seed: int) -> Dataset:
    if lang == "kk":
        rows = _read(data, "eval/kk/kkCOPA.jsonl", _KKCOPA)
        examples, held_out = hold_out(rows, N_HELD_OUT, lambda row: row["p_contents_kz"])
        columns, allowed = _KKCOPA, ("1", "2")
    else:
        examples = _read(data, f"eval/{lang}/test.jsonl", _XCOPA)
        held_out = _read(data, f"eval/{lang}/val.jsonl", _XCOPA)
        columns, allowed = _XCOPA, ("0", "1")
    pool = [_example(row, columns, allowed) for row in held_out]
    random.Random(seed).shuffle(pool)
    return Dataset([_example(row, columns, allowed) for row in examples], pool)


def _read(data: Path, relative: str, columns: Mapping[str, str]) -> list[Row]:
    fields = {column: str | int for column in columns.values()}
    return read_jsonl(find(data, relative), fields)


def _example(row: Row, columns: Mapping[str, str], allowed: tuple[str, str]) -> Example:
    where, record = row
    gold = index_of(where, columns["answer"], record[columns["answer"]], allowed)
    asks = record[columns["asks"]]
    index_of(where, columns["asks"], asks, tuple(_ASKED))
    stem = f"Premise: {one_line(record[columns['premise']])}\n{_ASKED[asks]}"
    options = [record[columns["first"]], record[columns["second"]]]
    path, line = where.rsplit(":", 1)
    return lettered(f"{Path(path).stem}-{line}", stem, options, gold)


COPA = Task(
    name="copa",
    languages=("kk", "ta"),
    instruction="Choose the likelier answer to each question, by its letter.",
    metrics=("accuracy",),
    max_tokens=2,
    load=load,
    read_answer=read_letter,
)
