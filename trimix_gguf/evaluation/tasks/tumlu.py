"""TUMLU-mini: school-exam questions written in Kazakh, four choices (Isbarov et al., 2025).

In two of five questions the fourth choice is right: a model that always says D beats chance. So
the choices of each question are shuffled, differently for each seed.
"""

import random
from pathlib import Path

from trimix_gguf.evaluation.tasks.belebele import LETTERS, letter_task, lettered
from trimix_gguf.evaluation.tasks.rows import Row, index_of, one_line, read_jsonl
from trimix_gguf.evaluation.tasks.sources import find
from trimix_gguf.evaluation.tasks.task import Dataset, Example


def load(data: Path, lang: str, seed: int) -> Dataset:
    """The test questions of all subjects; exemplars from the dev part."""
    pool = _read(data, lang, "dev", seed)
    return Dataset.shuffled(_read(data, lang, "test", seed), pool, seed)


def _read(data: Path, lang: str, split: str, seed: int) -> list[Example]:
    path = find(data, f"eval/{lang}/tumlu/{split}.jsonl")
    fields = {"question": str, "choices": list, "answer": str}
    rows = enumerate(read_jsonl(path, fields), 1)
    return [_example(f"{split}-{number}", row, seed) for number, row in rows]


def _example(name: str, row: Row, seed: int) -> Example:
    where, record = row
    choices = [str(choice) for choice in record["choices"]]
    gold = index_of(where, "answer", record["answer"], tuple(LETTERS[: len(choices)]))
    order = list(range(len(choices)))
    # A generator per question: its order does not depend on the questions before it.
    random.Random(f"{seed} {name}").shuffle(order)
    stem = f"Question: {one_line(record['question'])}"
    return lettered(name, stem, [choices[i] for i in order], order.index(gold))


TUMLU = letter_task(
    name="tumlu",
    languages=("kk",),
    instruction="Answer each question with the letter of the right choice.",
    load=load,
)
