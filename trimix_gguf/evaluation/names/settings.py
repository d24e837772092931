"""What a run of a task is told beside the models and the data."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from trimix_gguf.choosing.methods import reading_methods
from trimix_gguf.evaluation.running.continuing import roles_of
from trimix_gguf.evaluation.tasks.task import Dataset, Example
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.roles import ROLES

# What is under way -> how many of how many are done.
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextmanager
def silent(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress that nobody is shown."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Settings:
    """What an example's line depends on."""

    methods: tuple[str, ...]
    seed: int = 0
    n_exemplars: int | None = None
    limit: int | None = None
    chat: bool = False  # large_ins reads its chat template around each prompt
    race: bool = False  # grid points that fell behind are left, where answers are free text
    fill_loops: bool = False  # answers that only repeat themselves are filled up, not decoded

    @property
    def reads(self) -> bool:
        """Whether a method chooses by what the prompts' reading shows."""
        return any(name in reading_methods() for name in self.methods)

    @property
    def roles(self) -> tuple[str, ...]:
        """Models that the methods run."""
        if any(name not in METHODS for name in self.methods):
            return ROLES
        return roles_of([METHODS[name] for name in self.methods])

    def questions(self, dataset: Dataset) -> list[Example]:
        """The examples to answer: all, or `limit` of them drawn with the seed, in their order."""
        examples = list(dataset.examples)
        if self.limit is None or self.limit >= len(examples):
            return examples
        drawn = set(random.Random(self.seed).sample(range(len(examples)), self.limit))
        return [example for at, example in enumerate(examples) if at in drawn]
