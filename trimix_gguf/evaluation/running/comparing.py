"""A comparison: every method answers every task, into one folder."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from trimix_gguf.choosing.methods import ANSWERS, CONTINUOUS, DECOUPLED, MI_ANSWERS
from trimix_gguf.errors import DataError, WeightsError
from trimix_gguf.evaluation.names.axis import AXIS
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.run_files.record import FORMAT, ModelsRecord, RunRecord, claim
from trimix_gguf.evaluation.running.bars import OpenBar, no_bar
from trimix_gguf.evaluation.running.distributing import ask_task
from trimix_gguf.evaluation.running.prompts import exemplars_of
from trimix_gguf.evaluation.running.working import Here, Models, Workers
from trimix_gguf.evaluation.tasks import custom_task, find_task
from trimix_gguf.evaluation.tasks.task import Dataset, Task
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
        self._check_names([task.name for task in tasks])
        return {t.name: (t, t.load(self.data, self.lang, self.settings.seed)) for t in tasks}

    def _check_names(self, tasks: Sequence[str]) -> None:
        """Raises DataError where two tasks, or a task and a single GGUF, would write one file."""
        ends = ("", ".sample", ".task", *(f".{single}" for single in self.singles))
        written = Counter(task + end for task in tasks for end in ends)
        for file, n in written.items():
            if n > 1:
                raise DataError(
                    f"the run would write {file}.jsonl for two things; rename a task's file, or "
                    "give a --single another name"
                )

    @cached_property
    def own_files(self) -> dict[str, bytes]:
        """The user's task files by the name of their task, as they were when the run began."""
        own = [Path(name) for name in self.tasks if name.endswith(".jsonl")]
        return {custom_task(path).name: path.read_bytes() for path in own}

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
        """Load the data and see that it has what the methods need: before the models and answers.

        Raises DataError, PromptError, WeightsError.
        """
        _ = self.fourth, self.own_files
        for why in self.lacking().values():  # a run keeps its methods: it could never be finished
            raise WeightsError(f"{why}, or leave it out of --methods")
        for name, (_, data) in self.datasets.items():
            ids = Counter(q.id for q in data.questions(self.settings.limit, self.settings.seed))
            (twice, n), *_ = ids.most_common(1)
            if n > 1:  # a run tells questions by it
                raise DataError(f"{name}: the id {twice!r} comes {n} times in its data")

    def lacking(self) -> dict[str, str]:
        """Methods that need more exemplars than a task shows, and why. Raises DataError."""
        found = {}
        for task, data in self.datasets.values():
            n = len(exemplars_of(task, data, self.settings.n_exemplars))
            for method, least in ((ANSWERS, 1), (MI_ANSWERS, 2)):
                if method in self.settings.methods and n < least:
                    mend = f"give --exemplars {least} or more"
                    if len(data.exemplars) < least:
                        mend = 'mark rows with "exemplar": true'
                    found[method] = (
                        f"{task.name}: {method} needs {least} or more exemplars, and {n} are "
                        f"shown; {mend}"
                    )
        return found

    def without(self, methods: Collection[str]) -> "Comparison":
        """The same with fewer methods."""
        left = tuple(name for name in self.settings.methods if name not in methods)
        return replace(self, settings=replace(self.settings, methods=left))

    @property
    def of_single(self) -> RunSettings:
        """The settings with which a single GGUF answers."""
        return replace(self.settings, methods=(ROLES[0],))

    def load_single(self, name: str, n_ctx: int) -> Trio:
        """A single GGUF in the place of all three models."""
        file = self.singles[name]
        return Trio.load(large_ins=file, small_cpt=file, small_base=file, n_ctx=n_ctx)

    def models(self, trio: Trio, *, is_single: bool = False) -> Models:
        """The models of one process: `trio`, and a fourth if a method reads it."""
        if is_single:
            return Models(trio, self.datasets, self.of_single)
        return Models(trio, self.datasets, self.settings, fourth=self.fourth, singles=self.singles)

    def record(self, models: ModelsRecord) -> RunRecord:
        """run.json of this comparison with models."""
        limit, seed = self.settings.limit, self.settings.seed
        own_files = [Path(name) for name in self.tasks if name.endswith(".jsonl")]
        return {
            "format": FORMAT,
            "command": list(self.command),
            "lang": self.lang,
            "tasks": list(self.datasets),
            "n_questions": {
                name: len(data.questions(limit, seed)) for name, (_, data) in self.datasets.items()
            },
            "data": {  # the user's own files are kept whole
                name: data.digest(limit, seed)
                for name, (_, data) in self.datasets.items()
                if name not in self.own_files
            },
            "task_files": {custom_task(path).name: str(path.resolve()) for path in own_files},
            **self.settings.to_json(),
            "chat_template": models["chat_template"],
            "tuning": models["tuning"],
            # None in runs that searched from 0 to 1: they do not continue, their reports stay.
            "continuous_range": (
                list(CONTINUOUS_RANGE) if CONTINUOUS in self.settings.methods else None
            ),
            "n_ctx": models["n_ctx"],
            "axis": list(AXIS),
            "models": models["models"],
            "singles": models["singles"],
            "versions": models["versions"],
            "cpu": models["cpu"],
        }


class Source(Protocol):
    """Opens the models of a comparison: here, or on several machines."""

    def trio(self) -> AbstractContextManager[Workers]:
        """The trio, and a fourth model where a method needs it."""

    def single(self, name: str, n_ctx: int) -> AbstractContextManager[Workers]:
        """A single GGUF, by its name, in the place of all three models."""


class Local:
    """The models of this process, whose trio is open."""

    def __init__(self, trio: Trio, comparison: Comparison) -> None:
        self._trio, self._comparison = trio, comparison

    @contextmanager
    def trio(self) -> Iterator[Here]:
        """The trio, and a fourth model where a method needs it."""
        with closing(self._comparison.models(self._trio)) as models:
            yield Here(models)

    @contextmanager
    def single(self, name: str, n_ctx: int) -> Iterator[Here]:
        """A single GGUF, by its name."""
        with self._comparison.load_single(name, n_ctx) as trio:
            yield Here(self._comparison.models(trio, is_single=True))


def compare(
    source: Source, comparison: Comparison, folder: Path, open_bar: OpenBar = no_bar
) -> None:
    """Answer every task that is not finished in `folder`; then each single GGUF, one at a time.

    Raises DataError if the folder has another run, or another process writes there.
    """

    def ask(workers: Workers, single: str | None = None) -> None:
        for name, (task, dataset) in comparison.datasets.items():
            out = folder / (f"{name}.jsonl" if single is None else f"{name}.{single}.jsonl")
            settings = comparison.settings if single is None else comparison.of_single
            ask_task(workers, task, dataset, settings, out, open_bar=open_bar, single=single)

    with ExitStack() as stack:
        with source.trio() as workers:
            models = workers.header()
            stack.enter_context(claim(folder, comparison.record(models), comparison.own_files))
            ask(workers)
        for single in comparison.singles:
            with source.single(single, models["n_ctx"]) as workers:
                ask(workers, single)
