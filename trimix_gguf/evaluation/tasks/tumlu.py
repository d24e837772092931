"""TUMLU-mini: school-exam questions written in Kazakh, four choices (Isbarov et al., 2025).

The right answer is the fourth choice in two questions of five: a model that says D beats chance.
So the choices of each question are shuffled, differently for each seed.
"""

import random
from pathlib import Path

from trimix_gguf.evaluation.tasks.belebele import LETTERS, lettered, read_letter
from trimix_gguf.evaluation.tasks.sources import Row, find, index_of, one_line, read_jsonl
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task


def load(data: Path, lang: str, seed: int) -> Dataset:
    """The test questions of all subjects; exemplars from the dev ones."""
    pool = _read(data, lang, "dev", seed)
    random.Random(seed).shuffle(pool)
    return Dataset(_read(data, lang, "test", seed), pool)


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
    # One generator a question: its order does not hang on which others were read before it.
    random.Random(f"{seed} {name}").shuffle(order)
    stem = f"Question: {one_line(record['question'])}"
    return lettered(name, stem, [choices[i] for i in order], order.index(gold))


TUMLU = Task(
    name="tumlu",
    languages=("kk",),
    instruction="Answer each question with the letter of the right choice.",
    metrics=("accuracy",),
    max_tokens=2,
    load=load,
    read_answer=read_letter,
)
