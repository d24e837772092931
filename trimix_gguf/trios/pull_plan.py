"""What it takes to fetch a trio: from where, how many bytes, how much of it is here already.

A trio's folder holds `.pull` while it is fetched. Whatever stands there under its final name is
whole: it got the name once its hash was right, and the name holds the hashes of what it was made
from. So a pull after one that was killed continues with what is there.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from trimix_gguf.errors import HubError, MemoryNeededError, TrioFileError
from trimix_gguf.machine import memory
from trimix_gguf.machine.parts import is_here, n_bytes_of
from trimix_gguf.machine.quantization import DIRECT, FLOATS, WEIGHT_TYPES
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.roles import ROLES
from trimix_gguf.trios.hub import Notify, RemoteFile, Repository, check_access, read_repository
from trimix_gguf.trios.names import check_name
from trimix_gguf.trios.store import SHIPPED, installed, installed_folder, nearest_trio, presets
from trimix_gguf.trios.triofile import FILENAME, ModelEntry, TrioFile

WORK = ".pull"
# What the converter reads beside the weights.
CHECKPOINT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors$")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Part:
    """A model to be fetched: `files` of a repository, and what they become.

    `kind` is 'gguf', 'checkpoint' or 'adapter' (of PEFT); the last two are converted to `type`.
    `n_bytes` is what the GGUF takes, about where it is converted.
    """

    role: str
    kind: str
    repository: Repository
    files: tuple[RemoteFile, ...]
    type: str
    n_bytes: int

    @property
    def key(self) -> str:
        """The name of what is made from these very files."""
        made = [self.role, self.kind, self.type, *(f"{f.name} {f.digest}" for f in self.files)]
        return f"{self.role}-{hashlib.sha256(chr(10).join(made).encode()).hexdigest()[:16]}"

    @property
    def n_weight_bytes(self) -> int:
        """Bytes of its safetensors files."""
        return sum(f.n_bytes for f in self.files if f.name.endswith(".safetensors"))


@dataclass(frozen=True)
class PullPlan:
    """A trio as it will be written, what of it is to be fetched, and what is the user's own."""

    trio: TrioFile
    parts: tuple[Part, ...]
    own_files: dict[str, Path]

    @property
    def work(self) -> Path:
        """The folder of what is fetched but not yet in its place."""
        return self.trio.folder / WORK

    def staged(self, part: Part) -> Path:
        """A model's GGUF, whole, until the trio is."""
        return self.work / f"{part.key}.gguf"

    def source(self, part: Part, file: RemoteFile) -> Path:
        """Where a fetched file lies: a GGUF is staged, the others wait for the converter."""
        if part.kind == "gguf":
            return self.staged(part)
        folder = self.work / part.key / part.repository.repo.split("/")[-1]
        return folder / PurePosixPath(file.name).name

    def note(self, part: Part) -> Path:
        """The file that holds a staged model's hash and size, until it is in its place."""
        return self.work / f"{part.role}.json"

    def ready(self, part: Part) -> dict[str, Any] | None:
        """The note of this very model, sha256 and n_bytes, if it is staged or in its place."""
        try:
            noted = parse(self.note(part).read_text(encoding="utf-8"), object)
        except (OSError, ValueError):
            return None
        if not isinstance(noted, dict) or noted.get("key") != part.key:
            return None
        for path in (self.staged(part), self.trio.path(part.role)):
            if path.is_file() and path.stat().st_size == noted["n_bytes"]:
                return noted
        return None

    def n_missing(self, part: Part) -> int:
        """Bytes of a part that are still to come."""
        if self.ready(part) or self.staged(part).exists():
            return 0
        n_bytes = 0
        for path, size in ((self.source(part, file), file.n_bytes) for file in part.files):
            partial = path.with_name(f"{path.name}.part")
            if not path.exists():
                n_bytes += max(0, size - (partial.stat().st_size if partial.exists() else 0))
        return n_bytes

    @property
    def n_to_fetch(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(self.n_missing(part) for part in self.parts)

    @property
    def n_memory(self) -> int:
        """About the bytes that the models take when they are loaded."""
        fetched = {part.role: part.n_bytes for part in self.parts}
        for role in self.trio.models.keys() - fetched.keys():
            fetched[role] = n_bytes_of(self.own_files.get(role) or self.trio.path(role))
        return sum(n for role, n in fetched.items() if role in ROLES)

    @property
    def n_disk(self) -> int:
        """About the most free bytes that are taken while models are fetched and converted."""
        kept = sum(map(n_bytes_of, self.own_files.values()))
        most = kept
        for part in self.parts:
            missing = self.n_missing(part)
            if part.kind == "gguf":
                kept += missing
                most = max(most, kept)
            elif not self.ready(part) and not self.staged(part).exists():
                # llama.cpp's quantizer reads a whole GGUF in the checkpoint's own type.
                between = 0 if part.type in DIRECT else part.n_weight_bytes
                most = max(most, kept + missing + part.n_bytes + between)
                kept += part.n_bytes
        return most


# -- planning ---------------------------------------------------------------------------------


def find_manifest(text: str) -> TrioFile:
    """What `trimix pull TEXT` means: a preset, an installed trio, a trio file or its folder.

    Raises TrioFileError, with the nearest names.
    """
    if text == SHIPPED:
        raise TrioFileError(f"{SHIPPED} ships in the package; there is nothing to pull")
    known = presets()
    if text in known:
        return known[text].trio
    if text in installed():
        return TrioFile.read(installed_folder(text) / FILENAME)
    path = Path(text)
    if path.is_dir():
        path = path / FILENAME
    if path.is_file():
        return TrioFile.read(path, inside=True)
    hint = nearest_trio(text, [*known, *installed()], 3)
    raise TrioFileError(f"{text}: no trio of that name can be pulled, and no such file; {hint}")


def plan_pull(
    manifest: TrioFile,
    *,
    name: str | None = None,
    quantization: str | None = None,
    notify: Notify = lambda text: None,
) -> PullPlan:
    """Find out what a pull must fetch; asks the hub unless everything is here.

    `quantization` takes the place of the manifest's for what is converted. Raises TrioFileError,
    HubError.
    """
    name = check_name(name or manifest.name)
    if name == SHIPPED:
        raise TrioFileError(f"{SHIPPED} is the name of the shipped trio; give another --name")
    folder = installed_folder(name)
    trio = replace(manifest, folder=folder, filename=FILENAME, name=name)
    _check_paths(trio)
    if quantization is not None:
        trio = _requantized(trio, quantization)
    here: list[str] = []
    if trio.file.is_file():
        trio = _same_trio(trio, TrioFile.read(trio.file), notify)
        here = [role for role in trio.models if _is_whole(trio, role)]
    own_files = {
        role: _own_path(manifest, trio, role)
        for role, entry in trio.models.items()
        if entry.repo is None and role not in here
    }
    read = cache(partial(read_repository, notify=notify))  # one commit for all of a repository
    parts = tuple(
        _plan_part(role, entry, read(entry.repo, entry.revision), notify)
        for role, entry in trio.models.items()
        if entry.repo is not None and role not in here
    )
    return PullPlan(trio, parts, own_files)


def check_room(plan: PullPlan, *, force: bool = False) -> None:
    """Raise MemoryNeededError where the machine's memory is too small, unless `force`; HubError
    where the disk is."""
    need, have = plan.n_memory, memory.total()
    if need > have and not force:
        raise MemoryNeededError(
            f"{plan.trio.name} needs about {memory.in_gib(need)} of memory, and this machine has "
            f"{memory.in_gib(have)}; take a smaller trio or --quantization, or --force"
        )
    folder = plan.trio.folder
    while not folder.exists():
        folder = folder.parent
    need, have = plan.n_disk, shutil.disk_usage(folder).free
    if need > have:
        raise HubError(
            f"{plan.trio.name} needs about {memory.in_gib(need)} on the disk, and {folder} has "
            f"{memory.in_gib(have)} free; free some, or set TRIMIX_HOME to a folder elsewhere"
        )


def _check_paths(trio: TrioFile) -> None:
    """Each model has a place of its own, and none that the pull or the trio file takes."""
    taken = {WORK: "the pull's own folder", FILENAME: "the trio file"}
    for role, entry in trio.models.items():
        path = PurePosixPath(entry.path)
        for name in (str(path).lower(), path.parts[0].lower()):  # as file systems compare them
            if name in taken:
                raise TrioFileError(
                    f"models.{role}.path: {entry.path!r} is {taken[name]}; name another"
                )
        taken[str(path).lower()] = f"that of models.{role} already"


def _requantized(trio: TrioFile, quantization: str) -> TrioFile:
    _check_type(quantization)
    converted = [
        role
        for role, entry in trio.models.items()
        if entry.repo is not None and entry.file is None and entry.adapter_of is None
    ]
    if not converted:
        raise TrioFileError(
            f"{trio.name} is published as GGUF, nothing is converted; leave --quantization "
            "out, or name other files in a trio file of your own"
        )
    for role in converted:
        trio = trio.with_model(role, quantization=quantization, sha256=None, n_bytes=None)
    return trio


def _check_type(quantization: str) -> None:
    if quantization not in WEIGHT_TYPES:
        raise TrioFileError(
            f"quantization {quantization!r} is unknown; one of {', '.join(WEIGHT_TYPES)}"
        )


def _same_trio(asked: TrioFile, have: TrioFile, notify: Notify) -> TrioFile:
    """The trio that is here, if it is the one asked for; else TrioFileError."""
    for role in {**asked.models, **have.models}:
        one, other = asked.models.get(role), have.models.get(role)
        if one is None or other is None or not _same_source(one, other, notify):
            raise TrioFileError(
                f"a trio {have.name} is already here, with another {role}; give another --name, "
                f"or `trimix remove {have.name}` first"
            )
    return have


def _same_source(asked: ModelEntry, have: ModelEntry, notify: Notify) -> bool:
    if (asked.repo, asked.file, asked.adapter_of) != (have.repo, have.file, have.adapter_of):
        return False
    if asked.repo is None:
        return True
    converted = asked.file is None and asked.adapter_of is None
    if converted and asked.quantization not in (None, have.quantization):
        return False
    if asked.revision in ("main", have.revision):
        return True
    if _COMMIT.fullmatch(asked.revision):
        return False
    return read_repository(asked.repo, asked.revision, notify=notify).commit == have.revision


def _is_whole(trio: TrioFile, role: str) -> bool:
    """Whether a model is here, by its size; `trimix verify` looks closer."""
    path, entry = trio.path(role), trio.models[role]
    return is_here(path) and entry.n_bytes in (None, n_bytes_of(path))


def _own_path(manifest: TrioFile, trio: TrioFile, role: str) -> Path:
    """Where the user's own model is: beside the manifest, or in the trio's folder already."""
    for path in (manifest.path(role), trio.path(role)):
        if is_here(path):
            return path
    trio.path(role).parent.mkdir(parents=True, exist_ok=True)
    kind = trio.models[role].quantization
    raise TrioFileError(
        f"{trio.name} needs a {role} of your own: make it with `trimix convert hf CHECKPOINT "
        f"-o {trio.path(role)}{f' --type {kind}' if kind else ''}`, then pull again"
    )


def _plan_part(role: str, entry: ModelEntry, repository: Repository, notify: Notify) -> Part:
    where = f"models.{role}"
    if entry.file is None and entry.adapter_of is None:
        part = _plan_checkpoint(role, entry.quantization or "q8_0", repository)
    elif entry.file is None or entry.file.endswith(".safetensors"):
        folder = "" if entry.file is None else str(PurePosixPath(entry.file).parent)
        names = [str(PurePosixPath(folder, name)) for name in ADAPTER_FILES]
        files = tuple(repository.file(name) for name in names)
        kind = entry.quantization if entry.quantization in FLOATS else "f16"
        part = Part(role, "adapter", repository, files, kind, files[-1].n_bytes)
    else:
        if _SPLIT.search(entry.file):
            raise TrioFileError(
                f"{where}.file: {entry.file} is one part of several, and a trio takes whole files; "
                "name another file or repo, or leave file out where the repo has safetensors"
            )
        file = repository.file(entry.file)
        if entry.sha256 is not None and file.lfs and file.digest != entry.sha256:
            raise TrioFileError(
                f"{where}.sha256 is {entry.sha256[:12]}…, but the hub's {file.name} at "
                f"{entry.revision} has {file.digest[:12]}…; set revision to the commit it is of"
            )
        part = Part(role, "gguf", repository, (file,), "", file.n_bytes)
    if repository.gated:
        check_access(part.files[0], notify=notify)
    return part


def _plan_checkpoint(role: str, type: str, repository: Repository) -> Part:
    _check_type(type)
    names = repository.files
    whole = [name for name in names if name == "model.safetensors"]
    weights = whole or sorted(name for name in names if _SHARD.match(name))
    if not weights:
        ready = [name for name in names if name.endswith(".gguf") and not _SPLIT.search(name)]
        mend = f"set file to one of {', '.join(ready[:6])}" if ready else "name another repo"
        raise TrioFileError(f"{repository.repo} has no model.safetensors to convert; {mend}")
    small = [name for name in CHECKPOINT_FILES if name in names]
    files = tuple(repository.file(name) for name in [*small, *weights])
    n_bytes = sum(names[name].n_bytes for name in weights)
    n_weights = sum(repository.n_weights.values()) or n_bytes // 2
    n_bytes = int(n_weights * WEIGHT_TYPES[type].bytes_in_file)
    return Part(role, "checkpoint", repository, files, type, n_bytes)
