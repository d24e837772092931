"""SIB-200: the topic of a sentence, one of seven (Adelani et al., 2024)."""

import random
from collections.abc import Sequence
from pathlib import Path

from trimix_gguf.evaluation.tasks.sources import (
    FLORES_CODES,
    HubFile,
    find,
    index_of,
    one_line,
    read_tsv,
)
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task

LABELS = (
    "science/technology",
    "travel",
    "politics",
    "sports",
    "health",
    "entertainment",
    "geography",
)


def load(data: Path, lang: str, seed: int) -> Dataset:
    """Test sentences; exemplars from the training ones, the first seven one of each label."""
    pool = _read(data, lang, "train")
    random.Random(seed).shuffle(pool)
    return Dataset(_read(data, lang, "test"), one_of_each(pool))


def _read(data: Path, lang: str, split: str) -> list[Example]:
    hub = HubFile("Davlan/sib200", f"data/{FLORES_CODES[lang]}/{split}.tsv")
    path = find(data, f"eval/{lang}/sib200/{split}.tsv", hub=hub)
    examples = []
    for where, row in read_tsv(path, ("index_id", "category", "text"), quoted=True):
        label = LABELS[index_of(where, "category", row["category"], LABELS)]
        question = f"Text: {one_line(row['text'])}\nTopic:"
        examples.append(Example(row["index_id"], question, label, (label,), LABELS))
    return examples


def one_of_each(pool: Sequence[Example]) -> list[Example]:
    """The pool in its order, but the first exemplar of each answer before all others."""
    first = {example.answer: example for example in reversed(pool)}
    chosen = {example.id for example in first.values()}
    return sorted(pool, key=lambda example: example.id not in chosen)


def read_label(text: str, choices: Sequence[str]) -> str:
    """The label that stands first in the first line, as "sports" does in "It is sports."; else
    that line. Of two labels that start at one place, the longer."""
    line = text.strip().split("\n")[0].strip()
    folded = line.casefold()
    found = []
    for choice in choices:
        at = folded.find(choice.casefold())
        while at > 0 and folded[at - 1].isalnum():  # the "sport" in "transport"
            at = folded.find(choice.casefold(), at + 1)
        if at >= 0:
            found.append((at, -len(choice), choice))
    return min(found)[2] if found else line


SIB200 = Task(
    name="sib200",
    languages=tuple(FLORES_CODES),
    instruction=f"Classify the topic of each text as one of: {', '.join(LABELS)}.",
    metrics=("accuracy",),
    # "science/technology" is 4 tokens of Qwen's and 8 of a small vocabulary; a newline ends it.
    max_tokens=10,
    load=load,
    n_exemplars=len(LABELS),
    read_answer=read_label,
)
