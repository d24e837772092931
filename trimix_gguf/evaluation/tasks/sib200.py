"""SIB-200: the topic of a sentence, one of seven (Adelani et al., 2024)."""

from collections.abc import Sequence
from pathlib import Path

from trimix_gguf.evaluation.tasks.rows import index_of, one_line, read_tsv
from trimix_gguf.evaluation.tasks.sources import FLORES_CODES, HubFile, find
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
    """Test sentences; exemplars from the training part, the first seven one of each label."""
    pool = _read(data, lang, "train")
    drawn = Dataset.shuffled(_read(data, lang, "test"), pool, seed)
    return Dataset(drawn.examples, one_of_each(drawn.exemplars))


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
    """The pool in its order, but with the first exemplar of each answer before all others."""
    first = {example.answer: example for example in reversed(pool)}
    chosen = {example.id for example in first.values()}
    return sorted(pool, key=lambda example: example.id not in chosen)


def read_label(text: str, choices: Sequence[str]) -> str:
    """The label that comes first in the first line ("sports" in "It is sports."), else that line.

    Of two labels that start at the same place, it is the longer one.
    """
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
