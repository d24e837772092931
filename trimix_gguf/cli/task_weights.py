"""--task FILE: one pair of weights for prompts that are like those of a file."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from trimix_gguf.choosing.methods import ANSWERS, AUTO, CHOOSING, TOKEN, file_methods
from trimix_gguf.cli.bars import count_bar, token_progress
from trimix_gguf.cli.options import read_text
from trimix_gguf.mixing.fusion import METHODS


def check_task(task: str | None, method: str | None, weights: str | None) -> None:
    """Refuse --task beside fixed weights, and a method that needs --task without it."""
    if task is None:
        if method in file_methods():
            raise click.UsageError(
                f"--method {method} needs --task FILE.jsonl, with exemplars and questions; see "
                "`trimix help weights`"
            )
        return
    if weights is not None:
        raise click.UsageError("give --task or --weights, not both")
    if method in METHODS:
        raise click.UsageError(f"give --task or --method {method}, not both: its weights are fixed")
    if method in file_methods() and not task.endswith(".jsonl"):
        raise click.UsageError(f"--method {method} needs a task file of JSON lines, not {task}")


def task_methods() -> tuple[str, ...]:
    """Methods that choose one pair by a file; `token` chooses again for each token."""
    return (
        tuple(name for name, row in CHOOSING.items() if row.where == "runtime" and name != TOKEN)
        + file_methods()
    )


def check_served_task(task: str, method: str | None) -> None:
    """Refuse what is no method or no file that can be read, before any model is loaded."""
    if method is not None and method not in task_methods():
        raise click.UsageError(
            f"--task-method {method} is unknown; choose {', '.join(task_methods())}"
        )
    check_task(task, method, None)
    if task == "-":
        raise click.UsageError("--task takes a file here, as each trio reads it when it is loaded")
    if not task.endswith(".jsonl"):
        from trimix_gguf.cli.score import split_texts

        if method == ANSWERS:
            raise click.UsageError(f"--task-method {method} needs a task file of JSON lines")
        split_texts(read_text(task))
        return
    from trimix_gguf.evaluation.tasks.custom import custom_task

    custom_task(Path(task))


def task_weights(
    trio: Any,
    task: str,
    settings: dict[str, Any],
    average: Any = None,
    *,
    watch: Callable[[], None] | None = None,
) -> Any:
    """The Selection by a file: of texts that blank lines separate, or of a task's JSON lines.

    Takes what it needs out of `settings`. Where `watch` is given, it is called now and then, and
    no progress is shown. What it raises ends the choice.
    """
    from trimix_gguf.choosing.selection import select_weights
    from trimix_gguf.cli.score import split_texts

    chosen = {
        k: settings.pop(k) for k in ("method", "grid", "last", "score_tokens") if k in settings
    }
    if task.endswith(".jsonl"):
        from trimix_gguf.evaluation.running.file_weights import weights_of_file

        bar = count_bar(f"Choosing weights by {Path(task).name}")
        with bar if watch is None else nullcontext(lambda done, total: watch()) as shown:
            method, average = chosen.pop("method", AUTO), average or "macro"
            return weights_of_file(trio, Path(task), method, shown, average=average, **chosen)
    prompts = [trio.prompt(t) for t in split_texts(read_text(task))]
    total = sum(p.n_tokens() for p in prompts)
    tokens = token_progress(total, f"Scoring {len(prompts)} prompts")
    with tokens if watch is None else nullcontext(lambda n: watch()) as progress:
        return select_weights(
            trio, prompts, average=average or "macro", progress=progress, **chosen
        )
