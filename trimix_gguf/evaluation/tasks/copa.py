"""COPA: the likelier cause or effect of two, in Kazakh (kkCOPA) and Tamil (XCOPA).

kkCOPA has only COPA's test part: its last 20 items are exemplars. XCOPA has a validation part
for them. In both, the right answer is the first one in half of the test items.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from trimix_gguf.evaluation.tasks.belebele import letter_task, lettered
from trimix_gguf.evaluation.tasks.rows import Row, index_of, one_line, read_jsonl
from trimix_gguf.evaluation.tasks.sources import find
from trimix_gguf.evaluation.tasks.task import Dataset, Example

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
    """kkCOPA for Kazakh, else XCOPA's test part, with exemplars from its validation part."""
    if lang == "kk":
        rows = _read(data, "eval/kk/kkCOPA.jsonl", _KKCOPA)
        example = partial(_example, columns=_KKCOPA, allowed=("1", "2"))
        return Dataset.held_out(rows, _KKCOPA["premise"], example, seed)
    test, val = (
        [_example(row, _XCOPA, ("0", "1")) for row in _read(data, f"eval/{lang}/{part}", _XCOPA)]
        for part in ("test.jsonl", "val.jsonl")
    )
    return Dataset.shuffled(test, val, seed)


def _read(data: Path, relative: str, columns: Mapping[str, str]) -> list[Row]:
    fields = {column: str | int for column in columns.values()}
    return read_jsonl(find(data, relative), fields)


def _example(row: Row, columns: Mapping[str, str], allowed: tuple[str, str]) -> Example:
    where, record = row
    gold = index_of(where, columns["answer"], record[columns["answer"]], allowed)
    asks = str(record[columns["asks"]]).strip()
    index_of(where, columns["asks"], asks, tuple(_ASKED))
    stem = f"Premise: {one_line(record[columns['premise']])}\n{_ASKED[asks]}"
    options = [record[columns["first"]], record[columns["second"]]]
    path, line = where.rsplit(":", 1)
    return lettered(f"{Path(path).stem}-{line}", stem, options, gold)


COPA = letter_task(
    name="copa",
    languages=("kk", "ta"),
    instruction="Choose the likelier answer to each question, by its letter.",
    load=load,
)
