"""Asks questions of a task, several at once: a line of answers for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimix_gguf.choosing.choices import choices_after
from trimix_gguf.choosing.methods import DECOUPLED, ORACLE, reading_methods
from trimix_gguf.evaluation.names.axis import AXIS
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.run_files.lines import (
    AnswerLine,
    LineExtras,
    MethodOutput,
    Nested,
)
from trimix_gguf.evaluation.running.continuing import (
    WIDEST,
    Continuation,
    Start,
    continue_all,
    continue_decoupled,
    roles_of,
)
from trimix_gguf.evaluation.running.loops import Loop
from trimix_gguf.evaluation.running.mixes import continuations, grid_continuations, lowest_decoupled
from trimix_gguf.evaluation.running.prompts import question_after
from trimix_gguf.evaluation.running.racing import Points
from trimix_gguf.evaluation.running.reading import Reader, Reading
from trimix_gguf.evaluation.tasks.task import Example, Task
from trimix_gguf.mixing.fusion import METHODS, Weights
from trimix_gguf.mixing.scoring import GRID, Float64
from trimix_gguf.roles import ROLES, Role

# Questions, and mixes of them, at once: more gain little, and a run that is killed loses them.
_MOST_TOGETHER, _MOST_MIXES = 8, 192


def n_together(
    reader: Reader, task: Task, questions: Sequence[Example], settings: RunSettings
) -> int:
    """How many questions are answered at once, their tokens decoded in one batch."""
    trio, n_mixes = reader.trio, len(settings.methods)
    if ORACLE in settings.methods:
        n_mixes += len(GRID) ** 2
    prompts = [question_after(reader, q) for q in questions]
    longest = max(p.n_tokens(role) for p in prompts for role in ROLES)
    room = trio.n_ctx - max(reader.prefix.n_tokens(role) for role in ROLES)
    n_texts = min(n_mixes, WIDEST)
    by_room = (room - n_texts * task.max_tokens) // (longest + 1)
    n_choices = max(len(q.choices) for q in questions)
    by_sequences = trio.n_window - 1 - max(n_texts, n_choices)
    by_mixes = _MOST_MIXES // n_mixes
    return max(1, min(_MOST_TOGETHER, by_room, by_sequences, by_mixes))


def _reads(settings: RunSettings) -> bool:
    """Whether a method chooses by scores of the prompt."""
    return any(name in reading_methods() for name in settings.methods)


def _roles(settings: RunSettings) -> tuple[Role, ...]:
    """The models that the methods run."""
    if any(name not in METHODS for name in settings.methods):
        return ROLES
    return roles_of([METHODS[name] for name in settings.methods])


def answer_all(
    reader: Reader,
    task: Task,
    examples: Sequence[Example],
    settings: RunSettings,
    task_weights: Mapping[str, Weights],
    points: Points,
) -> list[AnswerLine]:
    """A line per example: the sums of its reading, the text of each method and grid point."""
    reader.hold_exemplars(scored=_reads(settings))
    with reader.trio.forks(_roles(settings)):
        begun = [_begin(reader, task, q, settings, task_weights, points) for q in examples]
        starts = [one.start for one in begun]
        continue_all(reader.trio, starts, max_tokens=task.max_tokens)
    return [one.finished() for one in begun]


@dataclass(frozen=True)
class _Begun:
    """An example whose prompt was read, and what continues it."""

    line: AnswerLine
    named: Mapping[str, Continuation]
    points: Points
    start: Start

    def finished(self) -> AnswerLine:
        """The line, with what was written."""
        for name, written in self.named.items():
            self.line["outputs"][name] |= _said(written)
        if self.points.any():
            texts = iter(one.text for one in self.start.continuations[len(self.named) :])
            self.line["grid"] = [
                [next(texts) if here else None for here in row] for row in self.points.tolist()
            ]
        return self.line


def _begin(
    reader: Reader,
    task: Task,
    example: Example,
    settings: RunSettings,
    task_weights: Mapping[str, Weights],
    points: Points,
) -> _Begun:
    trio, question = reader.trio, question_after(reader, example)
    reading: Reading | None = None
    if _reads(settings):
        reading = reader.read(question)
    else:
        reader.start(question)
    with_choices = bool(example.choices)
    named = continuations(settings.methods, reading, task_weights, trio, with_choices=with_choices)
    line: AnswerLine = {
        "id": example.id,
        "references": list(example.references),
        **_sums(example, reading),
        "outputs": {name: _weights(one.mix.weights) for name, one in named.items()},
    }
    grid = [one for one, here in zip(grid_continuations(), points.ravel(), strict=True) if here]
    start = Start.here(trio, _roles(settings), [*named.values(), *grid])
    if settings.fill_loops:
        for one in start.continuations:
            one.loop = Loop()
    if reading is not None and example.choices:
        ids = [trio.models[ROLES[0]].tokenize(f" {choice}") for choice in example.choices]
        line["choice_nll"] = _rounded(choices_after(trio, start.sequence, start.rows, ids, AXIS))
    if reading is not None and reading.decoupled is not None:
        line["outputs"][DECOUPLED] = _decoupled(reader, task, reading.decoupled)
    return _Begun(line, named, points, start)


def _decoupled(reader: Reader, task: Task, nats: Float64) -> MethodOutput:
    """The answer of four models to what the trio holds, at the lowest point of `nats`."""
    if reader.fourth is None:
        raise ValueError("a decoupled reading needs a fourth model")
    best = lowest_decoupled(nats)
    written = continue_decoupled(
        reader.trio, reader.fourth, best.weights, best.gamma, max_tokens=task.max_tokens
    )
    return {**_weights(best.weights), "gamma": best.gamma, **_said(written)}


def _said(written: Continuation) -> MethodOutput:
    said: MethodOutput = {"text": written.text, "n_tokens": len(written.ids)}
    if written.n_filled:
        said["n_filled"] = written.n_filled
    return said


def _weights(chosen: Weights) -> MethodOutput:
    return {"alpha": round(chosen.alpha, 6), "beta": round(chosen.beta, 6)}


def _sums(example: Example, reading: Reading | None) -> LineExtras:
    sums: LineExtras = {"choices": list(example.choices)} if example.choices else {}
    if reading is not None:
        sums["n_prompt_tokens"] = reading.n_tokens
        sums["n_scored"] = len(reading.nlls)
        sums["n_answers"] = int(reading.answers.sum())
        sums["nll"] = _rounded(reading.nlls.sum(axis=0))
        sums["answers_nll"] = _rounded(reading.nlls[reading.answers].sum(axis=0))
        sums["entropy"] = _rounded(reading.entropy)
    return sums


def _rounded(values: Float64) -> Nested:
    rounded: Nested = np.round(values, 4).tolist()
    return rounded
