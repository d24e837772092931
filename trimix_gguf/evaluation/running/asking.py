"""Runs a task: one line of JSON an example, so that a run that was killed goes on where it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trimix_gguf.choosing.methods import CONTINUOUS, DECOUPLED, ORACLE
from trimix_gguf.evaluation.names.settings import Progress, Settings, silent
from trimix_gguf.evaluation.run_files.lines import append_line, finished
from trimix_gguf.evaluation.running.continuing import (
    WIDEST,
    Continuation,
    Start,
    continue_all,
    continue_decoupled,
)
from trimix_gguf.evaluation.running.decoupled import FourthModel
from trimix_gguf.evaluation.running.loops import Loop
from trimix_gguf.evaluation.running.mixes import continuations, grid_continuations, lowest_decoupled
from trimix_gguf.evaluation.running.prompts import open_reader, question_after
from trimix_gguf.evaluation.running.racing import Points, still_racing
from trimix_gguf.evaluation.running.reading import Reader, Reading, choice_nll, token_nlls
from trimix_gguf.evaluation.running.task_weights import choose_task_weights
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.mixing.fusion import Rows, Weights
from trimix_gguf.mixing.scoring import GRID, Float64
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import Trio

# Questions, and mixes of them, together: more gain little, and a run that is killed loses them.
_MOST_TOGETHER, _MOST_MIXES = 8, 192


def run_task(
    trio: Trio,
    task: Task,
    dataset: Dataset,
    settings: Settings,
    out: Path,
    *,
    progress: Progress = silent,
    name_as: str | None = None,
    fourth: FourthModel | None = None,
) -> None:
    """Answer the task's questions by every method, appending lines to `out`.

    Lines that it already holds are kept, a line cut off by a kill is written anew. `name_as` is
    what large_ins' answers are to be called, where it is a model by itself; `fourth` is what
    DECOUPLED needs. Raises PromptError where the exemplars do not fit the context, saying how many
    do.
    """
    questions = settings.questions(dataset)
    done = finished(out)
    left = [q for q in questions if q.id not in done]
    if not left:
        return
    label = task.name if name_as is None else f"{task.name}, {name_as}"
    reader = open_reader(
        trio,
        task,
        dataset,
        questions,
        n_exemplars=settings.n_exemplars,
        chat=settings.chat,
        fourth=fourth,
        continuous=CONTINUOUS in settings.methods,
    )
    weights = choose_task_weights(
        reader, task, dataset, settings, out, lambda what: progress(f"{label}, {what}")
    )
    n, n_done = _n_together(reader, task, questions, settings), len(questions) - len(left)
    with progress(label) as shown, out.open("a", encoding="utf-8") as lines:
        shown(n_done, len(questions))
        for at in range(0, len(questions), n):
            # All of them, though some are done: a number depends, by rounding, on its neighbours.
            group = questions[at : at + n]
            if all(q.id in done for q in group):
                continue
            points = _points(task, settings, questions, [done[q.id] for q in questions[:at]])
            for line in answer_all(reader, task, group, settings, weights, points):
                if line["id"] in done:
                    continue
                if name_as is not None:
                    line["outputs"] = {name_as: line["outputs"]["large_ins"]}
                done[line["id"]] = line
                append_line(lines, line)
                n_done += 1
            lines.flush()
            shown(n_done, len(questions))


def _n_together(
    reader: Reader, task: Task, questions: Sequence[Example], settings: Settings
) -> int:
    """How many questions are answered at once: their answers' tokens are decoded in one batch."""
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


def _points(
    task: Task, settings: Settings, questions: Sequence[Example], lines: Sequence[dict[str, Any]]
) -> Points:
    """Which points answer after these lines of the run: none, all, or those still in the race."""
    asked = ORACLE in settings.methods
    if asked and settings.race and not any(q.choices for q in questions):
        return still_racing(task, lines)
    return np.full((len(GRID), len(GRID)), asked)


def answer_all(
    reader: Reader,
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    task_weights: Mapping[str, Weights],
    points: Points,
) -> list[dict[str, Any]]:
    """A line for each example: the sums of its reading, the text of each method and grid point."""
    reader.hold_exemplars(scored=settings.reads)
    with reader.trio.forks(settings.roles):
        begun = [_begin(reader, task, q, settings, task_weights, points) for q in examples]
        starts = [one.start for one in begun]
        continue_all(reader.trio, starts, max_tokens=task.max_tokens)
    return [one.finished() for one in begun]


@dataclass(frozen=True)
class _Begun:
    """An example whose prompt was read, and what is about to continue it."""

    line: dict[str, Any]
    named: Mapping[str, Continuation]
    points: Points
    start: Start

    def finished(self) -> dict[str, Any]:
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
    settings: Settings,
    task_weights: Mapping[str, Weights],
    points: Points,
) -> _Begun:
    trio, question = reader.trio, question_after(reader, example)
    line: dict[str, Any] = {"id": example.id, "references": list(example.references)}
    if example.choices:
        line["choices"] = list(example.choices)
    reading: Reading | None = None
    if settings.reads:
        reading = reader.read(question)
        line |= _reading_line(reading)
    else:
        reader.start(question)
    named = continuations(settings.methods, reading, task_weights, partial(_nats, trio))
    line["outputs"] = {name: _weights(one.mix.weights) for name, one in named.items()}
    grid = [one for one, here in zip(grid_continuations(), points.ravel(), strict=True) if here]
    start = Start.here(trio, settings.roles, [*named.values(), *grid])
    if settings.fill_loops:
        for one in start.continuations:
            one.loop = Loop()
    if reading is not None and example.choices:
        ids = [trio.models[ROLES[0]].tokenize(f" {choice}") for choice in example.choices]
        line["choice_nll"] = _rounded(choice_nll(trio, start, ids))
    if reading is not None and reading.decoupled is not None:
        line["outputs"][DECOUPLED] = _decoupled(reader, task, reading.decoupled)
    return _Begun(line, named, points, start)


def _decoupled(reader: Reader, task: Task, nats: Float64) -> dict[str, Any]:
    """The answer of four models to what the trio holds, by the lowest point of their reading."""
    if reader.fourth is None:
        raise ValueError("a decoupled reading needs a fourth model")
    best = lowest_decoupled(nats)
    written = continue_decoupled(
        reader.trio, reader.fourth, best.weights, best.gamma, max_tokens=task.max_tokens
    )
    return _weights(best.weights) | {"gamma": best.gamma} | _said(written)


def _nats(trio: Trio, rows: Rows, token: int) -> Float64:
    """Of one token after rows [n_vocab], over AXIS: what weights for each token follow."""
    one = {role: row[None] for role, row in rows.items()}
    nats: Float64 = token_nlls(trio, one, np.array([token]))[0]
    return nats


def _said(written: Continuation) -> dict[str, Any]:
    said = {"text": written.text, "n_tokens": len(written.ids)}
    return said | {"n_filled": written.n_filled} if written.n_filled else said


def _weights(chosen: Weights) -> dict[str, float]:
    return {"alpha": round(chosen.alpha, 6), "beta": round(chosen.beta, 6)}


def _reading_line(reading: Reading) -> dict[str, Any]:
    return {
        "n_prompt_tokens": reading.n_tokens,
        "n_scored": len(reading.nlls),
        "n_answers": int(reading.answers.sum()),
        "nll": _rounded(reading.nlls.sum(axis=0)),
        "answers_nll": _rounded(reading.nlls[reading.answers].sum(axis=0)),
        "entropy": _rounded(reading.entropy),
    }


def _rounded(values: Float64) -> Any:
    return np.round(values, 4).tolist()
