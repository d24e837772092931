"""The tasks of `trimix eval`, by name."""

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks import (
    belebele,
    copa,
    flores,
    kazqad,
    mgsm,
    milic,
    sib200,
    tumlu,
)
from trimix_gguf.evaluation.tasks.custom import custom_task
from trimix_gguf.evaluation.tasks.task import Task

__all__ = ["TASKS", "custom_task", "find_task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        sib200.SIB200,
        flores.TO_ENGLISH,
        flores.FROM_ENGLISH,
        belebele.BELEBELE,
        tumlu.TUMLU,
        kazqad.KAZQAD,
        copa.COPA,
        mgsm.MGSM,
        milic.RESPONSES,
        milic.COMPREHENSION,
        milic.TOPICS,
        milic.TITLES,
        milic.MATH,
        milic.TO_ENGLISH,
        milic.FROM_ENGLISH,
    )
}


def find_task(name: str, lang: str) -> Task:
    """The task of that name; raises DataError if there is none, or not in that language."""
    task = TASKS.get(name)
    if task is None:
        raise DataError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    if lang not in task.languages:
        raise DataError(f"{name} is not in {lang!r}; its languages are {', '.join(task.languages)}")
    return task
