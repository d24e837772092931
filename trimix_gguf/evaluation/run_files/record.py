"""run.json: what a run was asked for, and with which models; a run with another one is refused."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NotRequired, TypedDict

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.settings import RunSettingsRecord
from trimix_gguf.evaluation.run_files.lines import read_json, write_json
from trimix_gguf.machine.files import write_bytes
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.machine.locking import alone
from trimix_gguf.machine.parts import n_bytes_of

FORMAT = 1  # of run.json and of the lines
# A run may continue with others of these: numbers change only by rounding.
_MAY_DIFFER = ("command", "cpu", "n_ctx")


class ModelRecord(TypedDict):
    """A model's file."""

    file: str
    sha256: str
    bytes: int


class ModelsRecord(TypedDict):
    """What of run.json those say who have the models."""

    chat_template: str | None
    tuning: str | None
    n_ctx: int
    models: dict[str, ModelRecord]
    singles: dict[str, ModelRecord]
    versions: dict[str, str]
    cpu: str


class RunRecord(RunSettingsRecord):
    """run.json; runs of earlier versions lack some of it."""

    format: int
    lang: str
    tasks: list[str]
    axis: list[float]
    models: dict[str, ModelRecord]
    n_questions: NotRequired[dict[str, int]]
    data: NotRequired[dict[str, str]]  # a task's digest
    task_files: NotRequired[dict[str, str]]
    singles: NotRequired[dict[str, ModelRecord]]
    chat_template: NotRequired[str | None]
    tuning: NotRequired[str | None]  # its checksum, where a method answers by it
    continuous_range: NotRequired[list[float] | None]
    n_ctx: NotRequired[int]
    command: NotRequired[list[str]]
    versions: NotRequired[dict[str, str]]
    cpu: NotRequired[str]


@contextmanager
def claim(folder: Path, record: RunRecord, own: Mapping[str, bytes]) -> Iterator[None]:
    """Begin or continue a run in `folder`; until the end no other process can.

    `own` are the user's task files by the name of the task. Raises DataError if the folder has
    another run, or another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{folder} is being written by another run; wait for it, or stop it")
    with alone(folder / ".lock", busy):
        if begun := (folder / "run.json").exists():
            _keep(folder, record)  # first: into the folder of another run nothing is written
        _keep_own(folder, own, begun=begun)
        if not begun:
            _keep(folder, record)  # last: from here on a run has begun
        yield


def kept_task(folder: Path, task: str) -> Path:
    """Where a run keeps the user's task file: its questions and settings as they were asked."""
    return folder / f"{task}.task.jsonl"


def _keep_own(folder: Path, own: Mapping[str, bytes], *, begun: bool) -> None:
    """Keep the user's task files. Raises DataError if a run that has begun asked other ones."""
    for task, content in own.items():
        kept = kept_task(folder, task)
        if not (begun and kept.exists()):  # runs of earlier versions have none
            write_bytes(kept, content)
        elif kept.read_bytes() != content:
            raise DataError(
                f"the file of {task} has changed since this run began, which asked {kept}; give "
                "another folder"
            )


def _keep(folder: Path, record: RunRecord) -> None:
    """Write run.json. A run that is there may only get more single models: their files are apart.

    Raises DataError.
    """
    file, asked = folder / "run.json", json.loads(json.dumps(record))
    kept = asked
    if file.exists():
        kept = read_json(file)
        if not isinstance(kept, dict):
            raise DataError(f"{file} is damaged; give another folder")
        known = kept.get("singles") or {}
        there = all(asked["singles"].get(name) == model for name, model in known.items())
        if more := there and known != asked["singles"]:
            kept |= {"singles": asked["singles"], "command": asked["command"]}
        # Runs of earlier versions do not say these: taken as the same ones.
        told = {"tuning": asked["tuning"], "data": asked["data"], **kept}
        own = asked["task_files"]
        if own.keys() == (told.get("task_files") or {}).keys() and all(
            kept_task(folder, name).exists() for name in own
        ):
            told["task_files"] = own  # what is in them counts, not where they are
        changed = [k for k in asked if k not in _MAY_DIFFER and told.get(k) != asked[k]]
        if changed:
            raise DataError(
                f"{folder} holds a run with other {', '.join(changed)}; give another folder"
            )
        if not more:
            return
    write_json(file, kept)


@cache
def fingerprint(path: Path) -> ModelRecord:
    """A model's file: its name, size and SHA-256."""
    return {"file": path.name, "sha256": sha256_of(path), "bytes": n_bytes_of(path)}
