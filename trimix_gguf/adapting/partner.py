"""How well the model in training mixes with the trio's large_ins, which is read once per run.

A small model that knows the language better may be a worse partner in the mix, and exercises that
it answers by itself do not show that. large_ins answers by llama.cpp before training begins, the
untaught small_base at step 0; both leave rows of logits on disk, over the ids that the exercises
have, so that a measurement later costs no more than reading the model in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.adapting.questions import Question, tokens_of
from trimix_gguf.machine.files import whole_file
from trimix_gguf.machine.loading import Loading
from trimix_gguf.mixing.fusion import Rows, Weights, fuse
from trimix_gguf.trio.model import Model

# Near large_ins, in the middle, Proxy Tuning: what `auto` takes lies between them.
PAIRS = (Weights(0.9, 0.3), Weights(0.5, 0.5), Weights(1.0, 1.0))
_LARGE_INS, _SMALL_BASE = "large_ins.npy", "small_base.npy"

Array = NDArray[np.float32]


class Partner:
    """Rows of large_ins, and of the untaught small_base once keep_base() was given them.

    Rows are float16 [n_rows of all questions, n_ids], less each row's maximum.
    """

    def __init__(self, folder: Path, questions: Sequence[Question]) -> None:
        self._folder, self._questions = folder, questions
        self.ids = tokens_of(questions)
        self._columns = {int(token): at for at, token in enumerate(self.ids)}
        ends = np.cumsum([question.n_rows for question in questions])
        self._rows = [slice(e - q.n_rows, e) for q, e in zip(questions, ends, strict=True)]

    def read_large_ins(self, file: Path, show: Callable[[int], None]) -> None:
        """Have large_ins answer, unless a run before this one did; the file is freed again."""
        if (self._folder / _LARGE_INS).is_file():
            return
        most = max(question.n_tokens for question in self._questions)
        model = Model(file, Loading(n_ctx=most + 1, mmap=True), tokenizer=False)
        try:
            _keep(self._folder / _LARGE_INS, self._read(model, show))
        finally:
            model.close()

    def _read(self, model: Model, show: Callable[[int], None]) -> Iterator[Array]:
        held: list[int] = []
        for at, question in enumerate(self._questions):
            if question.shared != held:
                model.rewind(0)
                _decode(model, question.shared)
                held = question.shared
            model.rewind(len(held))
            yield _decode(model, question.rest)[-1:, self.ids]
            n_asked = model.n_past
            for choice in question.choices:
                for first in range(0, len(choice) - 1, model.n_window):
                    part = choice[first : min(first + model.n_window, len(choice) - 1)]
                    yield model.decode(part, every_row=True)[:, self.ids]
                model.rewind(n_asked)
            show(at + 1)

    @property
    def has_base(self) -> bool:
        """Whether small_base's rows are kept."""
        return (self._folder / _SMALL_BASE).is_file()

    def keep_base(self, rows: Sequence[Array]) -> None:
        """Keep the untaught model's logits of each question [n_rows, n_ids]."""
        _keep(self._folder / _SMALL_BASE, iter(rows))

    @property
    def n_bytes(self) -> int:
        """What both files take, or will."""
        return 2 * 2 * sum(question.n_rows for question in self._questions) * len(self.ids)

    def alone(self) -> list[float]:
        """The probability that large_ins by itself gives to each right answer."""
        large = self._load(_LARGE_INS)
        return [
            self._sure(question, large[rows].astype(np.float32))
            for question, rows in zip(self._questions, self._rows, strict=True)
        ]

    def mixed(self, small: Sequence[Array]) -> list[list[float]]:
        """For each of PAIRS, each exercise's probability of the right choice in the mix.

        `small` has the model in training's logits of each question [n_rows, n_ids].
        """
        large, base = self._load(_LARGE_INS), self._load(_SMALL_BASE)
        found: list[list[float]] = [[] for _ in PAIRS]
        for question, rows, own in zip(self._questions, self._rows, small, strict=True):
            both: Rows = {
                "large_ins": large[rows].astype(np.float32),
                "small_cpt": own,
                "small_base": base[rows].astype(np.float32),
            }
            for sure, weights in zip(found, PAIRS, strict=True):
                sure.append(self._sure(question, fuse(both, weights)))
        return found

    def _sure(self, question: Question, logits: Array) -> float:
        total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logprobs = logits - logits.max(1, keepdims=True) - total
        return round(float(question.probabilities(logprobs, self._columns)[question.right]), 4)

    def _load(self, name: str) -> NDArray[np.float16]:
        found: NDArray[np.float16] = np.load(self._folder / name, mmap_mode="r")
        return found


def _decode(model: Model, ids: Sequence[int]) -> Array:
    """The last row of logits, which the next decoding overwrites."""
    parts = [ids[at : at + model.n_batch] for at in range(0, len(ids), model.n_batch)]
    return [model.decode(part) for part in parts][-1]


def _keep(file: Path, rows: Iterator[Array]) -> None:
    small = [(part - part.max(1, keepdims=True)).astype(np.float16) for part in rows]
    with whole_file(file) as path, path.open("wb") as opened:
        np.save(opened, np.concatenate(small))
