"""The questions of a task, in groups, to whoever answers them.

Each answer is a line of JSON, so a run that was killed can continue.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from trimix_gguf.choosing.methods import ORACLE
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.run_files.lines import (
    AnswerLine,
    append_line,
    finished,
    put_in_order,
)
from trimix_gguf.evaluation.running.bars import OpenBar, no_bar
from trimix_gguf.evaluation.running.racing import Points, still_racing
from trimix_gguf.evaluation.running.task_weights import choose_task_weights
from trimix_gguf.evaluation.running.working import Job, Workers, only
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import GRID


def ask_task(
    workers: Workers,
    task: Task,
    dataset: Dataset,
    settings: RunSettings,
    out: Path,
    *,
    open_bar: OpenBar = no_bar,
    single: str | None = None,
) -> None:
    """Have the task's questions answered with every method; appends lines to `out`.

    Lines that `out` already has are kept, a line cut off by a kill is written again. In the end
    they have the order of the questions. `single` is the name of large_ins' answers if it is a
    model by itself. Raises PromptError if the exemplars do not fit into the context; it says how
    many would.
    """
    questions = dataset.questions(settings.limit, settings.seed)
    done = finished(out)
    n_done = sum(q.id in done for q in questions)
    if n_done < len(questions):
        label = task.name if single is None else f"{task.name}, {single}"
        n = only(workers, Job("together", task.name))
        weights = choose_task_weights(
            workers, task, dataset, settings, out, lambda what: open_bar(f"{label}, {what}")
        )
        jobs = _jobs(task, questions, settings, weights, n, done)
        with open_bar(label) as shown, out.open("a", encoding="utf-8") as lines:
            shown(n_done, len(questions))
            for _, answered in workers.done(jobs):
                for line in answered:
                    if line["id"] in done:
                        continue
                    if single is not None:
                        line["outputs"] = {single: line["outputs"]["large_ins"]}
                    done[line["id"]] = line
                    append_line(lines, line)
                    n_done += 1
                lines.flush()
                shown(n_done, len(questions))
    put_in_order(out, done, [q.id for q in questions])


def _jobs(
    task: Task,
    questions: Sequence[Example],
    settings: RunSettings,
    weights: Mapping[str, Weights],
    n: int,
    done: Mapping[str, AnswerLine],
) -> Iterator[Job]:
    """The groups of `n` questions that are not `done`, which grows meanwhile."""
    for at in range(0, len(questions), n):
        # All of the group, even if some are done: rounding makes neighbours change numbers.
        group = questions[at : at + n]
        if all(q.id in done for q in group):
            continue
        points = _points(task, settings, questions, questions[:at], done)
        yield Job("answers", task.name, group, weights, points)


def _points(
    task: Task,
    settings: RunSettings,
    questions: Sequence[Example],
    before: Sequence[Example],
    done: Mapping[str, AnswerLine],
) -> Points:
    """Which points answer after the lines of `before`: none, all, or those still in the race."""
    asked = ORACLE in settings.methods
    if asked and settings.race and not any(q.choices for q in questions):
        return still_racing(task, [done[q.id] for q in before])
    return np.full((len(GRID), len(GRID)), asked)
