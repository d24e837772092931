"""The fetching of a trio: files from the hub, converted where they must be, trio.toml last.

However it ends, what is in the trio's folder is not a trio, or is whole.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from trimix_gguf.errors import HubError, TrioFileError
from trimix_gguf.machine.files import ByteProgress, place_flushed, put_in_place, write_text
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.machine.locking import alone
from trimix_gguf.machine.parts import n_bytes_of, parts_of
from trimix_gguf.machine.vocabulary import check_contract
from trimix_gguf.trios.hub import Notify, fetch, read_repository
from trimix_gguf.trios.pull_plan import WORK, Part, PullPlan
from trimix_gguf.trios.triofile import TrioFile


def pull(
    plan: PullPlan,
    *,
    progress: ByteProgress = lambda what, done, total: None,
    notify: Notify = lambda text: None,
) -> TrioFile:
    """Fetch what a plan names, and write its trio.toml; returns the trio as it then is.

    `progress` gets (what is worked at, bytes done, bytes in all), `notify` a line for each file.
    A call after one that failed, or was killed, continues there. Raises HubError,
    ConversionError, TrioFileError, VocabularyMismatch.
    """
    trio = plan.trio
    try:
        plan.work.mkdir(parents=True, exist_ok=True)
        busy = TrioFileError(
            f"another `trimix pull` is fetching {trio.name}; wait for it, or stop it"
        )
        with alone(plan.work / "lock", busy):
            _tidy(plan)
            for part in plan.parts:  # what cannot be converted is refused before gigabytes came
                _fetch_small_files(part, plan, notify)
            for part in plan.parts:
                noted = _make_ready(part, plan, progress, notify)
                trio = _pinned(trio, part, noted, notify)
            for role, path in plan.own_files.items():
                trio = _take_own(trio, role, path, plan)
            _check_contract(trio, plan)
            for part in plan.parts:
                if plan.staged(part).exists():
                    trio.path(part.role).parent.mkdir(parents=True, exist_ok=True)
                    put_in_place(plan.staged(part), trio.path(part.role))
            trio.write()
    except OSError as error:
        raise HubError(
            f"cannot write in {trio.folder}: {error.strerror or error}; mend that and pull again, "
            "it continues from there"
        ) from None
    clear_work(trio)
    return trio


def clear_work(trio: TrioFile) -> None:
    """Remove what a pull leaves beside a trio that is whole, where it was killed just then."""
    shutil.rmtree(trio.folder / WORK, ignore_errors=True)


def _tidy(plan: PullPlan) -> None:
    """Remove what no part can use: files of other versions, and unfinished conversions."""
    kept = {"lock"} | {plan.note(part).name for part in plan.parts}
    for part in plan.parts:
        kept |= {part.key, f"{part.key}.gguf", f"{part.key}.gguf.part"}
    for path in plan.work.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _fetch_small_files(part: Part, plan: PullPlan, notify: Notify) -> None:
    if part.kind == "gguf" or plan.ready(part) or plan.staged(part).exists():
        return
    for file in part.files:
        path = plan.source(part, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not file.name.endswith(".safetensors") and not path.exists():
            fetch(file, path, notify=notify)
    if part.kind == "checkpoint":
        from trimix_gguf.convert.architectures import read_config, read_sizes
        from trimix_gguf.convert.tokenizer import read_tokenizer

        folder = plan.source(part, part.files[0]).parent
        architecture, config = read_config(folder)
        read_sizes(architecture, config)
        read_tokenizer(folder, config)


def _make_ready(
    part: Part, plan: PullPlan, progress: ByteProgress, notify: Notify
) -> dict[str, Any]:
    """Stage a model, and note its sha256; what an earlier pull did is not done again."""
    noted = plan.ready(part)
    if noted is not None:
        return noted
    staged = plan.staged(part)
    if not staged.exists():
        for file in part.files:
            path = plan.source(part, file)
            if not path.exists():
                fetch(file, path, progress=progress, notify=notify)
                notify(f"{part.role}: fetched {file.name} of {file.repo}, its hash is right")
        if part.kind != "gguf":
            _convert(part, plan, progress, notify)
    known = part.kind == "gguf" and part.files[0].lfs
    sha256 = part.files[0].digest if known else sha256_of(staged)
    noted = {"key": part.key, "sha256": sha256, "n_bytes": staged.stat().st_size}
    note = plan.note(part)
    write_text(note, json.dumps(noted))
    return noted


def _convert(part: Part, plan: PullPlan, progress: ByteProgress, notify: Notify) -> None:
    from trimix_gguf.convert.hf import convert_hf
    from trimix_gguf.convert.lora import convert_lora

    folder = plan.source(part, part.files[0]).parent
    repo = part.repository.repo

    def show(tensor: str, done: int, total: int) -> None:
        progress(f"converting {repo}", done, total)

    # A folder of its own: a killed pull's quantizer may still be writing in the one before.
    with tempfile.TemporaryDirectory(prefix="convert-", dir=plan.work) as scratch:
        out = Path(scratch) / "out.gguf"
        if part.kind == "checkpoint":
            convert_hf(folder, out, type=part.type, progress=show)
        else:
            convert_lora(folder, _base_folder(folder, plan), out, type=part.type, progress=show)
        place_flushed(out, plan.staged(part))
    shutil.rmtree(plan.work / part.key)
    notify(f"{part.role}: converted {repo} to {part.type}")


def _base_folder(adapter_dir: Path, plan: PullPlan) -> Path:
    """A folder with the config.json of what a PEFT adapter adapts."""
    from trimix_gguf.convert.checkpoint import read_json

    entry = plan.trio.models["small_base"]
    if entry.repo is not None and entry.file is None:
        repo, revision = entry.repo, entry.revision
        commits = {p.repository.repo: p.repository.commit for p in plan.parts}
        revision = commits.get(repo, revision)
    else:
        repo = str(read_json(adapter_dir / "adapter_config.json").get("base_model_name_or_path"))
        revision = "main"
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            raise TrioFileError(
                f"the adapter names its base as {repo!r}, which is not a repository; convert it "
                "yourself with `trimix convert lora`, and give its path in place of its repo"
            )
    folder = adapter_dir / "base"
    folder.mkdir(exist_ok=True)
    fetch(read_repository(repo, revision).file("config.json"), folder / "config.json")
    return folder


def _pinned(trio: TrioFile, part: Part, noted: dict[str, Any], notify: Notify) -> TrioFile:
    """The trio with a model's commit, type and hash."""
    entry = trio.models[part.role]
    if entry.sha256 not in (None, noted["sha256"]):
        if part.kind == "gguf":
            raise _other_bytes(part.role, entry.sha256, noted["sha256"])
        notify(
            f"{part.role}: converted here, it differs in bytes from the one the trio file is of "
            "(another version of the converter, or another processor)"
        )
    return trio.with_model(
        part.role,
        revision=part.repository.commit,
        quantization=part.type or entry.quantization,
        licence=entry.licence or part.repository.licence,
        sha256=noted["sha256"],
        n_bytes=noted["n_bytes"],
    )


def _take_own(trio: TrioFile, role: str, path: Path, plan: PullPlan) -> TrioFile:
    """Copy the user's own model to its place, unless it is there, and note its hash."""
    target, expected, sha256 = trio.path(role), trio.models[role].sha256, sha256_of(path)
    if expected not in (None, sha256):
        raise _other_bytes(role, expected, sha256)
    if path != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = plan.work / f"{role}.copy"
        for part, to in zip(parts_of(path), parts_of(target), strict=True):
            shutil.copyfile(part, copy)
            put_in_place(copy, to)
    return trio.with_model(role, sha256=sha256, n_bytes=n_bytes_of(target))


def _other_bytes(role: str, expected: str | None, came: str) -> TrioFileError:
    return TrioFileError(
        f"models.{role}.sha256 is {expected}, but its file has {came}; get the file that the "
        "trio file is of, or take sha256 out"
    )


def _check_contract(trio: TrioFile, plan: PullPlan) -> None:
    """The models speak the same tokens, or the trio is not written."""
    staged = {part.role: plan.staged(part) for part in plan.parts}
    files = {}
    for role, entry in trio.models.items():
        path = staged.get(role, trio.path(role))
        file = read_gguf(path if path.exists() else trio.path(role))
        if entry.adapter_of is None:
            files[role] = file
    check_contract(files)
