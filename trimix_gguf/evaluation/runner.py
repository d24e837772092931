"""Runs a task: one line of JSON an example, so that a run that was killed goes on where it was."""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trimix_gguf.branches import Branches
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.continuing import (
    WIDEST,
    Mix,
    Start,
    continue_all,
    continue_decoupled,
    roles_of,
)
from trimix_gguf.evaluation.decoupled import FourthModel
from trimix_gguf.evaluation.information import exemplars_information
from trimix_gguf.evaluation.loops import Loop
from trimix_gguf.evaluation.methods import (
    DECOUPLED,
    MI_ANSWERS,
    ORACLE,
    READING,
    SELECTING,
    fixed_mix,
    grid_mixes,
    lowest_decoupled,
    lowest_on_grid,
    mixes,
)
from trimix_gguf.evaluation.prompts import exemplars_of, open_reader, question_after
from trimix_gguf.evaluation.reading import Reader, Reading, choice_nll, token_nlls
from trimix_gguf.evaluation.task import Dataset, Example, Task
from trimix_gguf.fusion import ROLES, Rows, Weights
from trimix_gguf.scoring import GRID, Float64
from trimix_gguf.trio import Trio

N_TASK_SAMPLE = 50  # prompts that the published code averages over
# Questions, and mixes of them, together: more gain little, and a run that is killed loses them.
_MOST_TOGETHER, _MOST_MIXES = 8, 192
# What is under way -> how many of how many are done.
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextmanager
def silent(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress that nobody is shown."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Settings:
    """What an example's line depends on, beside the models and the data."""

    methods: tuple[str, ...]
    seed: int = 0
    n_exemplars: int | None = None
    limit: int | None = None
    chat: bool = False  # large_ins reads its chat template around each prompt
    fill_loops: bool = False  # answers that only repeat themselves are filled up, not decoded

    @property
    def reads(self) -> bool:
        """Whether a method chooses by what the prompts' reading shows."""
        return any(name in READING for name in self.methods)

    @property
    def roles(self) -> tuple[str, ...]:
        """Models that the methods run."""
        if any(name in SELECTING or name == ORACLE for name in self.methods):
            return ROLES
        return roles_of([fixed_mix(name) for name in self.methods])

    def questions(self, dataset: Dataset) -> list[Example]:
        """The examples to answer: all, or `limit` of them drawn with the seed, in their order."""
        examples = list(dataset.examples)
        if self.limit is None or self.limit >= len(examples):
            return examples
        drawn = set(random.Random(self.seed).sample(range(len(examples)), self.limit))
        return [example for at, example in enumerate(examples) if at in drawn]


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
    done = finished_ids(out)
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
    )
    weights = {
        name: choose(reader, task, dataset, settings, out, partial(progress, f"{label}, {what}"))
        for name, (what, choose) in _PER_TASK.items()
        if name in settings.methods
    }
    n, n_done = _n_together(reader, task, questions, settings), len(questions) - len(left)
    with progress(label) as shown, out.open("a", encoding="utf-8") as lines:
        shown(n_done, len(questions))
        for at in range(0, len(questions), n):
            # All of them, though some are done: a number depends, by rounding, on its neighbours.
            group = questions[at : at + n]
            if all(q.id in done for q in group):
                continue
            for line in answer_all(reader, task, group, settings, weights):
                if line["id"] in done:
                    continue
                if name_as is not None:
                    line["outputs"] = {name_as: line["outputs"]["large_ins"]}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
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
    by_branches = trio.n_window - 1 - max(n_texts, n_choices)
    by_mixes = _MOST_MIXES // n_mixes
    return max(1, min(_MOST_TOGETHER, by_room, by_branches, by_mixes))


def finished_ids(out: Path) -> set[str]:
    """Ids of the whole lines of `out`; cuts off what a kill left of the last one."""
    if not out.exists():
        return set()
    raw = out.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(out, len(whole))
    try:
        # Not splitlines(): an answer may hold other line ends, such as U+2028.
        return {json.loads(line)["id"] for line in whole.split(b"\n")[:-1]}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{out} holds lines that are not a run's; give another folder") from None


def answer_all(
    reader: Reader,
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    task_weights: Mapping[str, Weights],
) -> list[dict[str, Any]]:
    """A line for each example: the sums of its reading, and the text of each method."""
    reader.hold_exemplars(scored=settings.reads)
    with Branches(reader.trio, settings.roles) as branches:
        begun = [_begin(branches, reader, task, q, settings, task_weights) for q in examples]
        continue_all(branches, [one.start for one in begun], max_tokens=task.max_tokens)
    return [one.finished() for one in begun]


@dataclass(frozen=True)
class _Begun:
    """An example whose prompt was read; its mixes are about to continue it."""

    line: dict[str, Any]
    named: Mapping[str, Mix]
    start: Start

    def finished(self) -> dict[str, Any]:
        for name, mix in self.named.items():
            self.line["outputs"][name] |= _said(mix)
        texts = [mix.text for mix in self.start.mixes[len(self.named) :]]
        if texts:
            n = len(GRID)
            self.line["grid"] = [texts[at : at + n] for at in range(0, len(texts), n)]
        return self.line


def _begin(
    branches: Branches,
    reader: Reader,
    task: Task,
    example: Example,
    settings: Settings,
    task_weights: Mapping[str, Weights],
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
    named = mixes(settings.methods, reading, task_weights, partial(_nats, trio))
    line["outputs"] = {name: _weights(mix.weights) for name, mix in named.items()}
    grid = grid_mixes() if ORACLE in settings.methods else []
    start = Start.here(branches, [*named.values(), *grid])
    if settings.fill_loops:
        for mix in start.mixes:
            mix.loop = Loop()
    if reading is not None and example.choices:
        ids = [trio.models[ROLES[0]].tokenize(f" {choice}") for choice in example.choices]
        line["choice_nll"] = _rounded(choice_nll(branches, start, ids))
    if reading is not None and reading.decoupled is not None:
        line["outputs"][DECOUPLED] = _decoupled(reader, task, reading.decoupled)
    return _Begun(line, named, start)


def _decoupled(reader: Reader, task: Task, nats: Float64) -> dict[str, Any]:
    """The answer of four models to what the trio holds, by the lowest point of their reading."""
    if reader.fourth is None:
        raise ValueError("a decoupled reading needs a fourth model")
    best = lowest_decoupled(nats)
    mix = continue_decoupled(
        reader.trio, reader.fourth, best.weights, best.gamma, max_tokens=task.max_tokens
    )
    return _weights(best.weights) | {"gamma": best.gamma} | _said(mix)


def _nats(trio: Trio, rows: Rows, token: int) -> Float64:
    """Of one token after rows [n_vocab], over AXIS: what weights for each token follow."""
    one = {role: row[None] for role, row in rows.items()}
    nats: Float64 = token_nlls(trio, one, np.array([token]))[0]
    return nats


def _said(mix: Mix) -> dict[str, Any]:
    said = {"text": mix.text, "n_tokens": len(mix.ids)}
    return said | {"n_filled": mix.n_filled} if mix.n_filled else said


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


Doing = Callable[[], AbstractContextManager[Callable[[int, int], None]]]  # Progress of one thing


def _by_sample(
    reader: Reader, task: Task, dataset: Dataset, settings: Settings, out: Path, doing: Doing
) -> Weights:
    """The pair with the lowest macro perplexity of a sample of prompts.

    What each prompt of it has is kept beside `out`, for a run that goes on.
    """
    questions = settings.questions(dataset)
    sample = random.Random(settings.seed).sample(questions, min(N_TASK_SAMPLE, len(questions)))
    kept = out.with_suffix(".sample.jsonl")
    done = len(finished_ids(kept))
    if done < len(sample):
        with doing() as shown, kept.open("a", encoding="utf-8") as lines:
            shown(done, len(sample))
            for at, question in enumerate(sample[done:], done + 1):
                nats = reader.read(question_after(reader, question)).nlls.mean(axis=0)
                lines.write(json.dumps({"id": question.id, "nll": nats.tolist()}) + "\n")
                lines.flush()
                shown(at, len(sample))
    texts = kept.read_text(encoding="utf-8").split("\n")[:-1]
    return lowest_on_grid(np.mean([json.loads(text)["nll"] for text in texts], axis=0))


def _by_exemplars(
    reader: Reader, task: Task, dataset: Dataset, settings: Settings, out: Path, doing: Doing
) -> Weights:
    """The pair by which the exemplars' answers hang most on their questions."""
    exemplars = exemplars_of(task, dataset, settings.n_exemplars)
    with doing() as shown:
        information = exemplars_information(
            reader.trio, task, exemplars, chat=settings.chat, shown=shown
        )
    return lowest_on_grid(-information)


# Methods that choose one pair a task, before its first answer: what they do meanwhile, and how.
_PER_TASK = {
    "ppl-task": ("a sample for ppl-task", _by_sample),
    MI_ANSWERS: (f"exemplars for {MI_ANSWERS}", _by_exemplars),
}
