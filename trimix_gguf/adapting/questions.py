"""Exercises as token ids, which a model in training answers after examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.adapting.bases import Tokenizer
from trimix_gguf.errors import DataError
from trimix_gguf.tuning.exercises import kinds_of
from trimix_gguf.tuning.probe import head
from trimix_gguf.tuning.text import passages_of

N_EXERCISES = 64  # of all kinds together: a share of them is known to ±6 points


@dataclass(frozen=True)
class Question:
    """An exercise as ids: the kind's examples, the rest of the question, each choice.

    Its rows of logits: after `rest`, then after each token but the last of each choice.
    """

    shared: list[int]
    rest: list[int]
    choices: list[list[int]]
    right: int

    @property
    def n_rows(self) -> int:
        """How many rows of logits its answer needs."""
        return 1 + sum(len(choice) - 1 for choice in self.choices)

    @property
    def n_tokens(self) -> int:
        """Of the longest text that is read for it."""
        return len(self.shared) + len(self.rest) + max(map(len, self.choices))

    def probabilities(self, logprobs: Any, columns: Mapping[int, int] | None = None) -> Any:
        """Of each choice among the choices [n_choices], from log-probabilities [n_rows, n].

        `columns` says where a token's column is, where not every token has one.
        """
        found, at = [], 1
        for choice in self.choices:
            places = choice if columns is None else [columns[token] for token in choice]
            later = range(at, at + len(choice) - 1)
            found.append(float(logprobs[0, places[0]]) + float(logprobs[later, places[1:]].sum()))
            at = later.stop
        weights = np.exp(np.asarray(found) - max(found))
        return weights / weights.sum()


def questions_of(
    texts: Sequence[str], tokenizer: Tokenizer, n_ctx: int, seed: int
) -> list[Question]:
    """N_EXERCISES, as many of each kind, that fit the context; none where the text is too short.

    Not those that `trimix tune` asks of the same text and seed: what they chose, it then judges.
    """
    passages = passages_of(line for text in texts for line in text.splitlines())
    try:
        kinds = kinds_of(passages, seed + 1)
    except DataError:
        return []
    found = []
    for kind in kinds:
        shared = [*tokenizer.bos, *tokenizer.ids(head(kind))]
        for exercise in islice(kind.exercises, -(-N_EXERCISES // len(kinds))):
            choices = [tokenizer.ids(f" {choice}") for choice in exercise.choices]
            question = Question(shared, tokenizer.ids(exercise.question), choices, exercise.right)
            if question.n_tokens <= n_ctx:
                found.append(question)
    return found


def tokens_of(questions: Sequence[Question]) -> NDArray[np.int64]:
    """Ids that occur in the questions and their choices, sorted."""
    parts = (part for q in questions for part in (q.shared, q.rest, *q.choices))
    return np.array(sorted({token for part in parts for token in part}), np.int64)
