"""A task: labelled examples in one language, how they are asked, and how answers are judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One question as the model reads it, up to where its answer begins.

    `answer` is what an exemplar shows there; `references` are the answers that a metric takes
    as right; `choices`, where there are some, are the answers to pick from.
    """

    id: str
    question: str
    answer: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Examples to answer, and the pool that exemplars are drawn from."""

    examples: Sequence[Example]
    exemplars: Sequence[Example]


@dataclass(frozen=True)
class Task:
    """How a task is asked and judged; `load(data, lang, seed)` reads its Dataset.

    `metrics` are names in metrics.METRICS, the main one first. `read_answer(text, choices)`
    takes the answer out of what was generated: its first line, stripped, where it is None.
    """

    name: str
    languages: tuple[str, ...]
    instruction: str
    metrics: tuple[str, ...]
    max_tokens: int
    load: Callable[[Path, str, int], Dataset]
    n_exemplars: int = 5
    read_answer: Callable[[str, Sequence[str]], str] | None = None

    def prediction(self, text: str, choices: Sequence[str] = ()) -> str:
        """The answer in a generated text."""
        line = text.strip().split("\n")[0].strip()
        return line if self.read_answer is None else self.read_answer(text, choices)
