"""One pair of weights from a file of exemplars and questions, for prompts that are like them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimix_gguf.choosing.choices import choice_nll
from trimix_gguf.choosing.methods import (
    ANSWERS,
    INFORMATIVE,
    MI_ANSWERS,
    ChosenBy,
    file_methods,
)
from trimix_gguf.choosing.score import Average
from trimix_gguf.choosing.selection import Selection, select_weights
from trimix_gguf.errors import WeightsError
from trimix_gguf.evaluation.names.axis import AXIS, lowest_on_grid
from trimix_gguf.evaluation.reporting.informative import most_informative
from trimix_gguf.evaluation.running.information import exemplars_information
from trimix_gguf.evaluation.running.prompts import (
    exemplars_of,
    marked_prefix,
    open_task,
    question_after,
)
from trimix_gguf.evaluation.running.reading import Reader
from trimix_gguf.evaluation.tasks.custom import custom_task
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.mixing.fusion import Mix
from trimix_gguf.mixing.scoring import Float64
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.sequences import TokenProgress
from trimix_gguf.trio.trio import Trio

MOST_QUESTIONS = 50

Shown = Callable[[int, int], None]  # (done, total)


def weights_of_file(
    trio: Trio,
    file: Path,
    method: str,
    shown: Shown,
    *,
    average: Average = "macro",
    **given: Any,
) -> Selection:
    """Choose weights by a task file (tasks/custom.py), once for all prompts that are like it.

    `auto`: what was measured of such questions, with choices or without; else one pair, close to
    large_ins, by all of them. `mi`: mutual information of its questions and their choices.
    `mi-answers`: of its exemplars' answers and questions. `ppl-answers`: the lowest perplexity of
    the exemplars' answers. Other methods are select_weights' over its questions, and `average` and
    `given` are options of it. Raises WeightsError where the file lacks what the method needs,
    DataError where it is no task file.
    """
    task = custom_task(file)
    dataset = task.load(Path(), "", 0)
    exemplars = exemplars_of(task, dataset)
    if method not in (*file_methods(), ANSWERS):
        asked = _asked(trio, task, dataset)
        with_choices = all(question.choices for question, _ in asked)
        prompts = [prompt for _, prompt in asked]
        return select_weights(
            trio,
            prompts,
            method=cast(ChosenBy, method),
            with_choices=with_choices,
            average=average,
            progress=_counted(shown, sum(prompt.n_tokens() for prompt in prompts)),
            **given,
        )
    if method == INFORMATIVE:
        return Selection(Mix(most_informative(_choices(trio, task, dataset, shown))), INFORMATIVE)
    if len(exemplars) < (least := 2 if method == MI_ANSWERS else 1):
        raise WeightsError(
            f'{method} needs {least} or more exemplars; give rows "exemplar": true in {file}'
        )
    if method == MI_ANSWERS:
        information = exemplars_information(trio, task, exemplars, shown=shown)
        return Selection(Mix(lowest_on_grid(-information)), MI_ANSWERS)
    return select_weights(trio, marked_prefix(trio, task, exemplars), method=ANSWERS)


def _counted(shown: Shown, total: int) -> TokenProgress:
    """What shows tokens one after another as how many are done."""
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        shown(done, total)

    return advance


def _choices(trio: Trio, task: Task, dataset: Dataset, shown: Shown) -> Float64:
    """Nats of each question's choices, nan where it has fewer: [n, n_choices, n_axis, n_axis]."""
    asked = [(q, prompt) for q, prompt in _asked(trio, task, dataset) if q.choices]
    if not asked:
        raise WeightsError(f"{INFORMATIVE} needs questions with choices; {MI_ANSWERS} does not")
    most = max(len(q.choices) for q, _ in asked)
    nats = np.full((len(asked), most, len(AXIS), len(AXIS)), np.nan)
    for at, (question, prompt) in enumerate(asked):
        trio.prefill(prompt)
        ids = [trio.models[ROLES[0]].tokenize(f" {choice}") for choice in question.choices]
        nats[at, : len(ids)] = choice_nll(trio, ids, AXIS)
        shown(at + 1, len(asked))
    return nats


def _asked(trio: Trio, task: Task, dataset: Dataset) -> list[tuple[Example, Prompt]]:
    """Questions of a task, and each as a whole prompt."""
    reader = Reader(trio, *open_task(trio, task, exemplars_of(task, dataset)))
    return [
        (question, Prompt((*reader.prefix.segments, *question_after(reader, question).segments)))
        for question in dataset.questions(MOST_QUESTIONS, 0)
    ]
