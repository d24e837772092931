"""A run: a folder with its settings (run.json) and one JSONL a task."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from trimix_gguf.choosing.methods import CONTINUOUS, DECOUPLED
from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.settings import Progress, Settings
from trimix_gguf.evaluation.run_files.lines import read_json, write_json
from trimix_gguf.evaluation.running.asking import run_task
from trimix_gguf.evaluation.running.decoupled import (
    LARGE_BASE,
    FourthModel,
    check_fourth,
    open_fourth,
)
from trimix_gguf.evaluation.running.reading import AXIS
from trimix_gguf.evaluation.tasks import custom_task, find_task
from trimix_gguf.evaluation.tasks.task import Dataset, Task
from trimix_gguf.machine import native
from trimix_gguf.machine.locking import alone
from trimix_gguf.mixing.scoring import CONTINUOUS_RANGE
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import Trio

FORMAT = 1  # of run.json and of the lines
# Between the parts of one run: what changes numbers by rounding alone.
_MAY_DIFFER = ("command", "cpu", "n_ctx")


@dataclass(frozen=True)
class Plan:
    """What is to be compared; `tasks` are names, or paths of a user's own JSONL.

    `large_base` is the fourth model, read where a method needs it.
    """

    lang: str
    tasks: Sequence[str]
    methods: tuple[str, ...]
    data: Path
    seed: int = 0
    limit: int | None = None
    n_exemplars: int | None = None
    chat: bool = False
    fill_loops: bool = False
    race: bool = False
    singles: Mapping[str, Path] | None = None
    large_base: Path | None = None
    command: Sequence[str] = ()

    @property
    def settings(self) -> Settings:
        return Settings(
            methods=self.methods,
            seed=self.seed,
            n_exemplars=self.n_exemplars,
            limit=self.limit,
            chat=self.chat,
            fill_loops=self.fill_loops,
            race=self.race,
        )

    @cached_property
    def datasets(self) -> dict[str, tuple[Task, Dataset]]:
        """Each task by its name, loaded. Raises DataError."""
        tasks = [
            custom_task(Path(name)) if name.endswith(".jsonl") else find_task(name, self.lang)
            for name in self.tasks
        ]
        return {t.name: (t, t.load(self.data, self.lang, self.seed)) for t in tasks}

    @property
    def fourth(self) -> Path | None:
        """`large_base` where it is read. Raises DataError where it is needed and missing."""
        if DECOUPLED not in self.methods:
            return None
        if self.large_base is None:
            raise DataError(
                f"{DECOUPLED} needs a fourth model: give --large-base, or a trio that names one"
            )
        if self.chat:
            raise DataError(f"{DECOUPLED} reads only plain prompts; leave out --chat")
        return self.large_base

    def own_files(self) -> dict[str, str]:
        paths = [Path(name) for name in self.tasks if name.endswith(".jsonl")]
        return {custom_task(path).name: str(path.resolve()) for path in paths}


@dataclass(frozen=True)
class OpenRun:
    """A folder that is being written."""

    folder: Path
    plan: Plan

    def compare(self, trio: Trio, progress: Progress) -> None:
        """Run every task that is not finished; then each single GGUF, one at a time."""
        plan = self.plan
        with ExitStack() as stack:
            fourth = None
            if plan.fourth is not None:
                large_base = stack.enter_context(closing(open_fourth(plan.fourth, trio)))
                fourth = FourthModel(large_base, trio)
            for name, (task, dataset) in plan.datasets.items():
                out = self.folder / f"{name}.jsonl"
                run_task(trio, task, dataset, plan.settings, out, progress=progress, fourth=fourth)
        for single, file in (plan.singles or {}).items():
            alone = replace(plan.settings, methods=("large_ins",))
            with Trio.load(
                large_ins=file, small_cpt=file, small_base=file, n_ctx=trio.n_ctx
            ) as model:
                for name, (task, dataset) in plan.datasets.items():
                    out = self.folder / f"{name}.{single}.jsonl"
                    run_task(model, task, dataset, alone, out, progress=progress, name_as=single)


@contextmanager
def open_run(folder: Path, plan: Plan, trio: Trio) -> Iterator[OpenRun]:
    """Begin a run, or go on with one; its folder is this process's alone meanwhile.

    Raises DataError where the folder's run was made otherwise, or another process is at it.
    """
    if plan.fourth is not None:
        check_fourth(plan.fourth, trio)
    settings = _settings(plan, trio)
    folder.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{folder} is being written by another run; wait for it, or stop it")
    with alone(folder / ".lock", busy):
        _keep_settings(folder, settings)
        yield OpenRun(folder, plan)


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write run.json; of a run that is there, only single models may be more: they have own files.

    Raises DataError.
    """
    file, asked = folder / "run.json", json.loads(json.dumps(settings))
    kept = asked
    if file.exists():
        kept = read_json(file)
        known = kept.get("singles") or {}
        there = all(asked["singles"].get(name) == model for name, model in known.items())
        if more := there and known != asked["singles"]:
            kept |= {"singles": asked["singles"], "command": asked["command"]}
        changed = [k for k in asked if k not in _MAY_DIFFER and kept.get(k) != asked[k]]
        if changed:
            raise DataError(
                f"{folder} holds a run with other {', '.join(changed)}; give another folder"
            )
        if not more:
            return
    write_json(file, kept)


def _settings(plan: Plan, trio: Trio) -> dict[str, Any]:
    datasets, questions = plan.datasets, plan.settings.questions
    files = {role: model.path for role, model in trio.models.items()}
    if plan.fourth is not None:
        files[LARGE_BASE] = plan.fourth
    files |= {f"{r}_lora": m.lora for r, m in trio.models.items() if m.lora is not None}
    return {
        "format": FORMAT,
        "command": list(plan.command),
        "lang": plan.lang,
        "tasks": list(datasets),
        "n_questions": {n: len(questions(data)) for n, (_, data) in datasets.items()},
        "task_files": plan.own_files(),
        "methods": list(plan.methods),
        "seed": plan.seed,
        "limit": plan.limit,
        "n_exemplars": plan.n_exemplars,
        "chat": plan.chat,
        "chat_template": trio.models[ROLES[0]].chat_template if plan.chat else None,
        "fill_loops": plan.fill_loops or None,  # None: a run from before it could be asked
        "race": plan.race or None,
        # None in runs that looked from 0 to 1: they do not go on, their reports stay.
        "continuous_range": CONTINUOUS_RANGE if CONTINUOUS in plan.methods else None,
        "n_ctx": trio.n_ctx,
        "axis": AXIS,
        "models": {role: _fingerprint(path) for role, path in files.items()},
        "singles": {name: _fingerprint(path) for name, path in (plan.singles or {}).items()},
        "versions": {
            name: metadata.version(name) for name in ("trimix-gguf", "llama-cpp-python", "numpy")
        },
        "cpu": native.build_info().get("cpu", ""),
    }


@cache
def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}
