"""Methods that choose one pair per task, before its first answer."""

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trimix_gguf.choosing.methods import MI_ANSWERS, TASK
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.axis import AXIS, lowest_on_grid
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.run_files.lines import (
    append_line,
    finished,
    finite,
    read_json,
    write_json,
)
from trimix_gguf.evaluation.running.bars import OpenBar
from trimix_gguf.evaluation.running.working import Job, Workers, only
from trimix_gguf.evaluation.tasks.task import Dataset, Task
from trimix_gguf.machine.cluster import in_order
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.mixing.scoring import Float64

N_SAMPLE = 50  # prompts that the published code averages over


def choose_task_weights(
    workers: Workers,
    task: Task,
    dataset: Dataset,
    settings: RunSettings,
    out: Path,
    open_bar: OpenBar,
) -> Mapping[str, Weights]:
    """The pair of weights of each such method in the settings.

    What they read takes minutes; it is kept beside `out`, for a run that continues.
    """
    chosen: dict[str, Weights] = {}
    if TASK in settings.methods:
        kept = out.with_suffix(".sample.jsonl")
        nats = _sample_nats(workers, task, dataset, settings, kept, open_bar)
        chosen[TASK] = lowest_on_grid(nats)
    if MI_ANSWERS in settings.methods:
        kept = out.with_suffix(".exemplars.json")
        information = _exemplars_information(workers, task, kept, open_bar)
        chosen[MI_ANSWERS] = lowest_on_grid(-information)
    return chosen


def _sample_nats(
    workers: Workers,
    task: Task,
    dataset: Dataset,
    settings: RunSettings,
    kept: Path,
    open_bar: OpenBar,
) -> Float64:
    """Macro perplexity, as nats, of a sample of prompts over AXIS² [n, n]."""
    questions = dataset.questions(settings.limit, settings.seed)
    sample = random.Random(settings.seed).sample(questions, min(N_SAMPLE, len(questions)))
    done = len(finished(kept))
    if done < len(sample):
        with open_bar(f"a sample for {TASK}") as shown, kept.open("a", encoding="utf-8") as lines:
            shown(done, len(sample))
            left = sample[done:]
            results = workers.done(Job("sample", task.name, [question]) for question in left)
            for at, (question, nats) in enumerate(
                zip(left, in_order(results), strict=True), done + 1
            ):
                append_line(lines, {"id": question.id, "nll": nats.tolist()})
                lines.flush()
                shown(at, len(sample))
    nats = [_on_axes(line.get("nll"), kept) for line in finished(kept).values()]
    mean: Float64 = np.mean(nats, axis=0)
    return mean


def _exemplars_information(workers: Workers, task: Task, kept: Path, open_bar: OpenBar) -> Float64:
    """How much the exemplars' answers depend on their questions, over AXIS² [n, n]."""
    if not kept.exists():
        with open_bar(f"exemplars for {MI_ANSWERS}") as shown:
            information = only(workers, Job("information", task.name, shown=shown))
        write_json(kept, information.tolist())
    return _on_axes(read_json(kept), kept)


def _on_axes(value: object, file: Path) -> Float64:
    """Numbers over AXIS² from `file`; raises DataError if they are not."""
    numbers = finite(value, (len(AXIS), len(AXIS)))
    if numbers is None:
        raise DataError(f"{file} is damaged; give another folder")
    return numbers
