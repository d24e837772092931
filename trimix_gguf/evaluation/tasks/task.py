"""A task: labelled examples in one language, how they are asked, and how answers are judged."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks.rows import Row

N_HELD_OUT = 20  # last rows that become exemplars, where a set has no part for them


@dataclass(frozen=True)
class Example:
    """One question as the model reads it, up to where its answer begins.

    `answer` is what a prompt shows if this example is an exemplar. `references` are the answers
    that count as right. `choices` are the answers to pick from, if there are any.
    """

    id: str
    question: str
    answer: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Examples to answer, and the pool of exemplars, in the order in which prompts show them."""

    examples: Sequence[Example]
    exemplars: Sequence[Example]

    @staticmethod
    def shuffled(examples: Sequence[Example], pool: Sequence[Example], seed: int) -> "Dataset":
        """The examples as they are, and the pool shuffled by the seed."""
        exemplars = list(pool)
        random.Random(seed).shuffle(exemplars)
        return Dataset(examples, exemplars)

    @staticmethod
    def held_out(
        rows: Sequence[Row], field: str, example: Callable[[Row], Example], seed: int
    ) -> "Dataset":
        """The dataset of a set that has no part for exemplars.

        The pool is the last N_HELD_OUT rows, and all other rows with the same `field` (questions on
        one passage): so no exemplar gives away an answer. It is the same for every seed, and so
        are the examples. Raises DataError if no example is left.
        """
        kept = {record[field] for _, record in rows[-N_HELD_OUT:]}
        pool = [example(row) for row in rows if row[1][field] in kept]
        asked = [example(row) for row in rows if row[1][field] not in kept]
        if not asked:
            raise DataError(
                f"{rows[-1][0]}: too few rows: the last {N_HELD_OUT} are exemplars, and no question"
                " is left"
            )
        return Dataset.shuffled(asked, pool, seed)

    def digest(self, limit: int | None, seed: int) -> str:
        """SHA-256 of what is asked, and of the exemplars to choose from."""
        both = (self.questions(limit, seed), self.exemplars)
        parts = [[asdict(example) for example in part] for part in both]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def questions(self, limit: int | None, seed: int) -> list[Example]:
        """The examples to answer: all, or `limit` of them drawn with the seed, in their order."""
        if limit is None or limit >= len(self.examples):
            return list(self.examples)
        drawn = set(random.Random(seed).sample(range(len(self.examples)), limit))
        return [example for at, example in enumerate(self.examples) if at in drawn]


Load = Callable[[Path, str, int], Dataset]  # the data folder, the language, the seed


@dataclass(frozen=True)
class Task:
    """How a task is asked and judged; `load` reads its Dataset.

    `metrics` are names in metrics.METRICS, the main one first. `read_answer(text, choices)` finds
    the answer in a generated text; None: the first line, without spaces around it.
    """

    name: str
    languages: tuple[str, ...]
    instruction: str
    metrics: tuple[str, ...]
    max_tokens: int
    load: Load
    n_exemplars: int = 5
    read_answer: Callable[[str, Sequence[str]], str] | None = None

    def prediction(self, text: str, choices: Sequence[str] = ()) -> str:
        """The answer in a generated text."""
        line = text.strip().split("\n")[0].strip()
        return line if self.read_answer is None else self.read_answer(text, choices)
