"""What a model in training can do: perplexity of held-out text, and answers after examples.

Perplexity falls on while a model loses the ability to use examples; so both are looked at, and the
answers of its mix with large_ins where that can be.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trimix_gguf.adapting.bases import Base, Tokenizer
from trimix_gguf.adapting.extras import need
from trimix_gguf.adapting.partner import Partner
from trimix_gguf.adapting.questions import Question
from trimix_gguf.adapting.rows import Rows, measured_rows
from trimix_gguf.adapting.taught import inner_model

N_ROWS = 6  # of held-out text, and a third of it of English
FALL = 0.02  # of the probability of the right answers: a smaller fall is none
_CHUNK = 128  # tokens whose logits over the whole vocabulary are in memory together


@dataclass(frozen=True)
class Judgement:
    """A model after `step` steps; `sure` has each exercise's probability of the right choice.

    `mixed` has the same of its mix with large_ins, for each of PAIRS.
    """

    step: int
    perplexity: float
    english: float | None
    right: float | None  # share of the exercises answered right
    sure: list[float] = field(default_factory=list)
    loss: float | None = None  # of the step before
    mixed: list[list[float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def answers(self) -> list[float]:
        """What it is chosen by: each exercise under the mixes on average, or its own answers."""
        return [float(np.mean(one)) for one in zip(*self.mixed, strict=True)] or self.sure

    @property
    def partner(self) -> tuple[float, float] | None:
        """The mean of `answers` in a mix, and its standard error; None where nothing was mixed."""
        if not self.mixed:
            return None
        answers = np.asarray(self.answers)
        return float(answers.mean()), float(answers.std()) / math.sqrt(len(answers))

    def falls_below(self, best: Judgement, n_errors: float) -> bool:
        """Whether it answers worse than `best`: exercise by exercise, by so many errors."""
        if not self.answers or len(self.answers) != len(best.answers):
            return False
        less = np.asarray(best.answers) - np.asarray(self.answers)
        error = float(less.std()) / math.sqrt(len(less))
        return bool(less.mean() > max(FALL, n_errors * error))


@dataclass(frozen=True)
class Judge:
    """What to measure with: rows of held-out text and of English, exercises, and large_ins."""

    heldout: Rows
    english: Rows | None
    questions: Sequence[Question]
    partner: Partner | None = None

    @staticmethod
    def make(
        heldout: Sequence[str],
        english: Sequence[str],
        tokenizer: Tokenizer,
        base: Base,
        questions: Sequence[Question],
        partner: Partner | None = None,
    ) -> Judge:
        """From texts that nothing is learned from."""
        n_block = base.n_block
        rows = measured_rows(heldout, tokenizer, n_rows=N_ROWS, n_block=n_block)
        others = (
            measured_rows(english, tokenizer, n_rows=max(1, N_ROWS // 3), n_block=n_block)
            if english
            else None
        )
        return Judge(rows, others, questions, partner)

    def look(self, model: Any, step: int, dtype: str, loss: float | None = None) -> Judgement:
        """Measure a model; what is first measured, at step 0, is the untaught one."""
        torch = need("torch")
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            right, sure, rows = self._ask(model)
            found = Judgement(
                step=step,
                perplexity=_perplexity(model, self.heldout),
                english=None if self.english is None else _perplexity(model, self.english),
                right=float(np.mean(right)) if right else None,
                sure=sure,
                loss=loss,
                mixed=self._mixed(rows, step),
            )
        model.train(was_training)
        return found

    def _ask(self, model: Any) -> tuple[list[bool], list[float], list[Any]]:
        """Each exercise: whether it is answered right, how surely; its rows for the partner."""
        reader, right, sure, kept = _Reader(model), [], [], []
        for question in self.questions:
            rows = reader.rows(question)
            found = question.probabilities(rows.log_softmax(-1))
            right.append(bool(found.argmax() == question.right))
            sure.append(round(float(found[question.right]), 4))
            if self.partner is not None:
                kept.append(rows[:, self.partner.ids].cpu().numpy())
        return right, sure, kept

    def _mixed(self, rows: Sequence[Any], step: int) -> list[list[float]]:
        if self.partner is None:
            return []
        if step == 0 and not self.partner.has_base:
            self.partner.keep_base(rows)
        return self.partner.mixed(rows)


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

    def rows(self, question: Question) -> Any:
        """Logits [n_rows, n_vocab] that answer a question, in float32."""
        if question.shared != self._shared:
            self._shared = question.shared
            _, self._after_shared = self._read([question.shared], None)
        first, asked = self._read([question.rest], self._after_shared)
        found, longer = [first[0, -1:]], [c[:-1] for c in question.choices if len(c) > 1]
        if longer:
            # Side by side: what fills a shorter one up comes after all that is looked at.
            most = max(map(len, longer))
            later, _ = self._read([c + [0] * (most - len(c)) for c in longer], asked, most)
            found += [rows[: len(c)] for c, rows in zip(longer, later, strict=True)]
        return self._torch.cat(found).float()

    def _read(self, ids: Sequence[list[int]], before: Any, n_last: int = 1) -> tuple[Any, Any]:
        """Logits after each of the last ids of every text, and what the model then holds."""
        device = next(self._model.parameters()).device
        held = {}
        if before is not None:
            held = {self._name: copy.deepcopy(before)}
            if len(ids) > 1:
                held[self._name].batch_repeat_interleave(len(ids))
        read = self._model(
            input_ids=self._torch.tensor(ids, device=device),
            use_cache=True,
            logits_to_keep=n_last,
            **held,
        )
        after = getattr(read, self._name, None)
        return read.logits, read.past_key_values if after is None else after


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
