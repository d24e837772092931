"""A comparison: every method answers every task, into one folder."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path

from trimix_gguf.choosing.methods import CONTINUOUS, DECOUPLED
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.axis import AXIS
from trimix_gguf.evaluation.names.compared import LARGE_BASE
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.run_files.record import FORMAT, RunRecord, claim, fingerprint
from trimix_gguf.evaluation.running.asking import ask_task
from trimix_gguf.evaluation.running.bars import OpenBar, no_bar
from trimix_gguf.evaluation.running.decoupled import FourthModel, check_fourth, open_fourth
from trimix_gguf.evaluation.tasks import custom_task, find_task
from trimix_gguf.evaluation.tasks.task import Dataset, Task
from trimix_gguf.machine import native
from trimix_gguf.mixing.scoring import CONTINUOUS_RANGE
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import Trio


@dataclass(frozen=True)
class Comparison:
    """What is compared: `tasks` are names, or paths of a user's own JSONL.

    `singles` are GGUFs by name that answer too, each by itself; `large_base` is the fourth model,
    read if a method needs it; `command` is what the user typed.
    """

    lang: str
    tasks: Sequence[str]
    data: Path
    settings: RunSettings
    singles: Mapping[str, Path]
    large_base: Path | None = None
    command: Sequence[str] = ()

    @cached_property
    def datasets(self) -> dict[str, tuple[Task, Dataset]]:
        """Each task by its name, loaded. Raises DataError."""
        tasks = [
            custom_task(Path(name)) if name.endswith(".jsonl") else find_task(name, self.lang)
            for name in self.tasks
        ]
        return {t.name: (t, t.load(self.data, self.lang, self.settings.seed)) for t in tasks}

    @property
    def fourth(self) -> Path | None:
        """`large_base` if a method reads it. Raises DataError if it is needed and missing."""
        if DECOUPLED not in self.settings.methods:
            return None
        if self.large_base is None:
            raise DataError(
                f"{DECOUPLED} needs a fourth model: give --large-base, or a trio that names one"
            )
        if self.settings.chat:
            raise DataError(f"{DECOUPLED} reads only plain prompts; leave out --chat")
        return self.large_base

    def check(self) -> None:
        """Load the data and look at the fourth model's name: before the models, which take longer.

        Raises DataError.
        """
        _ = self.fourth, self.datasets

    def record(self, trio: Trio) -> RunRecord:
        """run.json of this comparison with `trio`."""
        files: dict[str, Path] = {role: model.path for role, model in trio.models.items()}
        if self.fourth is not None:
            files[LARGE_BASE] = self.fourth
        files |= {f"{r}_lora": m.lora for r, m in trio.models.items() if m.lora is not None}
        limit, seed = self.settings.limit, self.settings.seed
        own_files = [Path(name) for name in self.tasks if name.endswith(".jsonl")]
        packages = ("trimix-gguf", "llama-cpp-python", "numpy")
        return {
            "format": FORMAT,
            "command": list(self.command),
            "lang": self.lang,
            "tasks": list(self.datasets),
            "n_questions": {
                name: len(data.questions(limit, seed)) for name, (_, data) in self.datasets.items()
            },
            "task_files": {custom_task(path).name: str(path.resolve()) for path in own_files},
            **self.settings.to_json(),
            "chat_template": trio.models[ROLES[0]].chat_template if self.settings.chat else None,
            # None in runs that searched from 0 to 1: they do not continue, their reports stay.
            "continuous_range": (
                list(CONTINUOUS_RANGE) if CONTINUOUS in self.settings.methods else None
            ),
            "n_ctx": trio.n_ctx,
            "axis": list(AXIS),
            "models": {role: fingerprint(path) for role, path in files.items()},
            "singles": {name: fingerprint(path) for name, path in self.singles.items()},
            "versions": {name: metadata.version(name) for name in packages},
            "cpu": native.build_info().get("cpu", ""),
        }


def compare(trio: Trio, comparison: Comparison, folder: Path, open_bar: OpenBar = no_bar) -> None:
    """Answer every task that is not finished in `folder`; then each single GGUF, one at a time.

    Raises DataError if the folder has another run, or another process writes there.
    """
    if comparison.fourth is not None:
        check_fourth(comparison.fourth, trio)
    with claim(folder, comparison.record(trio)):
        with ExitStack() as stack:
            fourth = None
            if comparison.fourth is not None:
                large_base = stack.enter_context(closing(open_fourth(comparison.fourth, trio)))
                fourth = FourthModel(large_base, trio)
            for name, (task, dataset) in comparison.datasets.items():
                out = folder / f"{name}.jsonl"
                ask_task(
                    trio, task, dataset, comparison.settings, out, open_bar=open_bar, fourth=fourth
                )
        for single, file in comparison.singles.items():
            _ask_single(single, file, comparison, folder, trio.n_ctx, open_bar)


def _ask_single(
    single: str, file: Path, comparison: Comparison, folder: Path, n_ctx: int, open_bar: OpenBar
) -> None:
    """Have one GGUF answer every task, in the place of all three models."""
    settings = replace(comparison.settings, methods=(ROLES[0],))
    with Trio.load(large_ins=file, small_cpt=file, small_base=file, n_ctx=n_ctx) as trio:
        for name, (task, dataset) in comparison.datasets.items():
            out = folder / f"{name}.{single}.jsonl"
            ask_task(trio, task, dataset, settings, out, open_bar=open_bar, single=single)
