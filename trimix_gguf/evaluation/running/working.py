"""Who does a task's work: the models of this process, or those of several machines.

What a job results in does not depend on the jobs before it, nor on who does it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from trimix_gguf.choosing.methods import AUTO
from trimix_gguf.evaluation.names.compared import LARGE_BASE
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.run_files.record import ModelsRecord, fingerprint
from trimix_gguf.evaluation.running.asking import answer_all, n_together
from trimix_gguf.evaluation.running.bars import Shown
from trimix_gguf.evaluation.running.decoupled import FourthModel, check_fourth, open_fourth
from trimix_gguf.evaluation.running.information import exemplars_information
from trimix_gguf.evaluation.running.prompts import exemplars_of, open_reader, question_after
from trimix_gguf.evaluation.running.racing import Points
from trimix_gguf.evaluation.running.reading import Reader
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task
from trimix_gguf.machine import native
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import Trio


@dataclass(frozen=True)
class Job:
    """One thing to do for the task of that name.

    `what` is 'together': how many questions are answered at once; 'sample': the mean nats of one
    question over AXIS²; 'information': that of the exemplars; or 'answers': a line for each of
    `questions`. `shown` hears how far it is, if the job is done in this process.
    """

    what: str
    task: str
    questions: Sequence[Example] = ()
    weights: Mapping[str, Weights] | None = None
    points: Points | None = None
    shown: Shown | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shown": None}

    def __str__(self) -> str:
        if not self.questions:
            return f"{self.what} of {self.task}"
        first, last = self.questions[0].id, self.questions[-1].id
        return f"{self.task}, question {first}" + (f" to {last}" if first != last else "")


class Workers(Protocol):
    """Who does jobs."""

    def header(self) -> Any:
        """What of the models the results depend on, as ModelsRecord."""

    def done(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Any]]:
        """(index, result) of jobs, as they are done."""


def only(workers: Workers, job: Job) -> Any:
    """The result of a single job."""
    ((_, result),) = workers.done([job])
    return result


class Here:
    """Models of this process, which do one job after another."""

    def __init__(self, models: "Models") -> None:
        self._models = models

    def header(self) -> Any:
        """What of the models the results depend on."""
        return self._models.header()

    def done(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Any]]:
        """(index, result) of jobs; each is taken when those before it are done."""
        for i, job in enumerate(jobs):
            yield i, self._models.work(job)


class Models:
    """The models of one process, for the tasks of a run; `singles` are files by name."""

    def __init__(
        self,
        trio: Trio,
        datasets: Mapping[str, tuple[Task, Dataset]],
        settings: RunSettings,
        *,
        fourth: Path | None = None,
        singles: Mapping[str, Path] | None = None,
    ) -> None:
        self._trio, self._datasets, self._settings = trio, datasets, settings
        self._fourth_file, self._singles = fourth, singles or {}
        self._fourth: FourthModel | None = None
        self._readers: dict[str, Reader] = {}
        if fourth is not None:
            check_fourth(fourth, trio)
        for name, file in self._singles.items():  # they are loaded last, hours later
            check_contract({name: read_gguf(file)})

    def header(self) -> ModelsRecord:
        """What run.json says of the models."""
        trio = self._trio
        files: dict[str, Path] = {role: model.path for role, model in trio.models.items()}
        if self._fourth_file is not None:
            files[LARGE_BASE] = self._fourth_file
        files |= {f"{r}_lora": m.lora for r, m in trio.models.items() if m.lora is not None}
        chat = self._settings.chat
        tuning = trio.tuning if AUTO in self._settings.methods else None
        packages = ("trimix-gguf", "llama-cpp-python", "numpy")
        return {
            "chat_template": trio.models[ROLES[0]].chat_template if chat else None,
            "tuning": None if tuning is None else tuning.to_table()["checksum"],
            "n_ctx": trio.n_ctx,
            "models": {role: fingerprint(path) for role, path in files.items()},
            "singles": {name: fingerprint(path) for name, path in self._singles.items()},
            "versions": {name: metadata.version(name) for name in packages},
            "cpu": native.build_info().get("cpu", ""),
        }

    def work(self, job: Job) -> Any:
        """The result of a job."""
        task, dataset = self._datasets[job.task]
        settings, reader = self._settings, self._reader(job.task)
        if job.what == "together":
            questions = dataset.questions(settings.limit, settings.seed)
            return n_together(reader, task, questions, settings)
        if job.what == "sample":
            (question,) = job.questions
            return reader.read(question_after(reader, question)).nlls.mean(axis=0)
        if job.what == "information":
            exemplars = exemplars_of(task, dataset, settings.n_exemplars)
            given = {} if job.shown is None else {"shown": job.shown}
            return exemplars_information(self._trio, task, exemplars, chat=settings.chat, **given)
        assert job.weights is not None and job.points is not None
        return answer_all(reader, task, job.questions, settings, job.weights, job.points)

    def close(self) -> None:
        """Close the fourth model; the trio stays open."""
        if self._fourth is not None:
            self._fourth.model.close()

    def _reader(self, name: str) -> Reader:
        """The reader of a task; the newest one is kept."""
        if self._fourth_file is not None and self._fourth is None:
            self._fourth = FourthModel(open_fourth(self._fourth_file, self._trio), self._trio)
        if name not in self._readers:
            task, dataset = self._datasets[name]
            questions = dataset.questions(self._settings.limit, self._settings.seed)
            reader = open_reader(self._trio, task, dataset, questions, self._settings, self._fourth)
            self._readers = {name: reader}
        return self._readers[name]
