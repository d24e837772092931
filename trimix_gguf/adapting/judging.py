"""What a model in training can do: perplexity of held-out text, and answers after examples.

Perplexity falls on while a model loses the ability to use examples; so both are looked at.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from trimix_gguf.adapting.bases import Base, Tokenizer
from trimix_gguf.adapting.extras import need
from trimix_gguf.adapting.rows import Rows, measured_rows
from trimix_gguf.adapting.taught import inner_model
from trimix_gguf.errors import DataError
from trimix_gguf.tuning.exercises import kinds_of
from trimix_gguf.tuning.probe import head
from trimix_gguf.tuning.text import passages_of

N_ROWS = 6  # of held-out text, and a third of it of English
PER_KIND = 6  # exercises
FALL = 0.02  # of the probability of the right answers: a smaller fall is none
_CHUNK = 128  # tokens whose logits over the whole vocabulary are in memory together


@dataclass(frozen=True)
class Judgement:
    """A model after `step` steps; `sure` has each exercise's probability of the right choice."""

    step: int
    perplexity: float
    english: float | None
    right: float | None  # share of the exercises answered right
    sure: list[float] = field(default_factory=list)
    loss: float | None = None  # of the step before

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def falls_below(self, best: Judgement) -> bool:
        """Whether it answers clearly worse than `best`: exercise by exercise, by two errors."""
        if not self.sure or len(self.sure) != len(best.sure):
            return False
        less = np.asarray(best.sure) - np.asarray(self.sure)
        error = float(less.std()) / math.sqrt(len(less))
        return bool(less.mean() > max(FALL, 2 * error))


@dataclass(frozen=True)
class Question:
    """An exercise as ids: the kind's examples, the rest of the question, each choice."""

    shared: list[int]
    rest: list[int]
    choices: list[list[int]]
    right: int


@dataclass(frozen=True)
class Judge:
    """What to measure with: rows of held-out text and of English, and exercises."""

    heldout: Rows
    english: Rows | None
    questions: Sequence[Question]

    @staticmethod
    def make(
        heldout: Sequence[str], english: Sequence[str], tokenizer: Tokenizer, base: Base, seed: int
    ) -> Judge:
        """From texts that nothing is learned from."""
        n_block = base.n_block
        rows = measured_rows(heldout, tokenizer, n_rows=N_ROWS, n_block=n_block)
        others = (
            measured_rows(english, tokenizer, n_rows=max(1, N_ROWS // 3), n_block=n_block)
            if english
            else None
        )
        questions = _questions(heldout, tokenizer, base.file.n_ctx_train, seed)
        return Judge(rows, others, questions)

    def look(self, model: Any, step: int, dtype: str, loss: float | None = None) -> Judgement:
        """Measure a model."""
        torch = need("torch")
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            reader = _Reader(model)
            sure = [reader.answer(question) for question in self.questions]
            found = Judgement(
                step=step,
                perplexity=_perplexity(model, self.heldout),
                english=None if self.english is None else _perplexity(model, self.english),
                right=float(np.mean([p.argmax() == q.right for p, q in self._pairs(sure)]))
                if sure
                else None,
                sure=[round(float(p[q.right]), 4) for p, q in self._pairs(sure)],
                loss=loss,
            )
        model.train(was_training)
        return found

    def _pairs(self, answers: Sequence[Any]) -> Any:
        return zip(answers, self.questions, strict=True)


def _questions(texts: Sequence[str], tokenizer: Tokenizer, n_ctx: int, seed: int) -> list[Question]:
    """PER_KIND exercises of each kind that fits the context; none where the text is too short."""
    passages = passages_of(line for text in texts for line in text.splitlines())
    try:
        kinds = kinds_of(passages, seed)
    except DataError:
        return []
    found = []
    for kind in kinds:
        shared = [*tokenizer.bos, *tokenizer.ids(head(kind))]
        for exercise in islice(kind.exercises, PER_KIND):
            choices = [tokenizer.ids(f" {choice}") for choice in exercise.choices]
            rest = tokenizer.ids(exercise.question)
            if len(shared) + len(rest) + max(map(len, choices)) <= n_ctx:
                found.append(Question(shared, rest, choices, exercise.right))
    return found


class _Reader:
    """Reads ids after others that the model has read; what was read before is read once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._torch = need("torch")
        # transformers calls it `cache` from 5.20 on, and takes the other name until 5.40.
        given = inspect.signature(inner_model(model).forward).parameters
        self._name = "cache" if "cache" in given else "past_key_values"
        self._shared: list[int] = []
        self._after_shared: Any = None

    def answer(self, question: Question) -> Any:
        """The probability of each choice among the choices [n_choices]."""
        if question.shared != self._shared:
            self._shared = question.shared
            _, self._after_shared = self._read(question.shared, None)
        first, asked = self._read(question.rest, self._after_shared)
        nlls = []
        for choice in question.choices:
            nll = -float(first[-1, choice[0]])
            if len(choice) > 1:
                logprobs, _ = self._read(choice[:-1], asked)
                nll -= float(logprobs[range(len(choice) - 1), choice[1:]].sum())
            nlls.append(nll)
        weights = np.exp(min(nlls) - np.asarray(nlls))
        return weights / weights.sum()

    def _read(self, ids: Sequence[int], before: Any) -> tuple[Any, Any]:
        """Log-probabilities after each of the last ids, and what the model then holds."""
        device = next(self._model.parameters()).device
        held = {} if before is None else {self._name: copy.deepcopy(before)}
        read = self._model(
            input_ids=self._torch.tensor([ids], device=device),
            use_cache=True,
            logits_to_keep=min(len(ids), _CHUNK),
            **held,
        )
        after = getattr(read, self._name, None)
        after = read.past_key_values if after is None else after
        return read.logits[0].float().log_softmax(-1), after


def _perplexity(model: Any, rows: Rows) -> float:
    """exp of the mean nats per token over the whole vocabulary."""
    torch = need("torch")
    whole = inner_model(model)
    decoder, head_ = getattr(whole, whole.base_model_prefix), whole.get_output_embeddings()
    device, total, n = head_.weight.device, 0.0, 0
    for row in rows.ids:
        ids = torch.from_numpy(np.asarray(row, np.int64)).to(device)
        hidden = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        for at in range(0, len(hidden), _CHUNK):
            logits = head_(hidden[at : at + _CHUNK].to(head_.weight.dtype)).float()
            targets = ids[1:][at : at + _CHUNK]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            n += len(targets)
    return math.exp(min(total / max(n, 1), 700))
