"""A prompt that was read, on disk: the three caches, what is owed, and the running sums.

A folder with one llama.cpp state per role and `prompt.json`. States hold no logits: the last token
is read again when its row is asked for. The folder is trusted as a program is: damage is seen by
its SHA-256, but llama.cpp reads a state that was made to harm as any other.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from trimix_gguf.errors import ModelError
from trimix_gguf.machine import native
from trimix_gguf.machine.files import put_in_place, temporary_path
from trimix_gguf.machine.hashes import kept_sha256, sha256_of
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.sums import PrefixSums
from trimix_gguf.trio.trio import Trio

_NUMBERS = [float]
_UNITS = [[object]]  # ids of the roles, and whether they are scored; checked as they are read
_POINTS = {"alphas": _NUMBERS, "betas": _NUMBERS, "sloped": bool, "keep": float}
_SHAPE = {
    "models": {str: list},
    "states": {str: str},
    "ids": {str: [int]},
    "sums": (None, {"points": _POINTS, "units": _UNITS, "sums": [[object]]}),
}


def save_prompt(trio: Trio, folder: Path) -> None:
    """Write what the trio has read to `folder`, completely or not at all, over an older one.

    Raises ModelError where llama.cpp cannot write a state or part of it was shifted, OSError.
    """
    if not trio.sequences.is_exact(0):
        raise ModelError(f"{folder}: what the caches hold was shifted; read it again to save it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(folder, "part") as partial:
        partial.mkdir()
        for role, model in trio.models.items():
            model.save_state(partial / f"{role}.state")
        contents = {
            "models": _fingerprints(trio),
            "states": _state_digests(partial),
            "ids": trio.ids,
            "sums": trio.sums.to_json() if trio.sums else None,
        }
        (partial / "prompt.json").write_text(json.dumps(contents), encoding="utf-8")
        if (folder / "prompt.json").is_file():
            shutil.rmtree(folder)
        put_in_place(partial, folder)


def load_prompt(trio: Trio, folder: Path) -> bool:
    """Restore what save_prompt wrote; False, and an empty trio, where there is none.

    Raises ModelError where the folder was written with other models or settings, or is damaged.
    """
    trio.forget()
    if not folder.exists():
        return False
    try:
        contents = parse((folder / "prompt.json").read_text(encoding="utf-8"), _SHAPE)
        known, states, ids, sums = (contents[key] for key in ("models", "states", "ids", "sums"))
        _check_ids(trio, ids)
        # Sums of an earlier version are not read: the prompt is scored again.
        kept = PrefixSums.from_json(sums) if sums is not None and "points" in sums else None
        # llama.cpp ends the process on a damaged state.
        damaged = states != _state_digests(folder)
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        raise ModelError(f"{folder} is not a saved prompt; remove it, or name another") from None
    if damaged:
        raise ModelError(f"{folder} is damaged; remove it, or name another")
    if known != _fingerprints(trio):
        changed = [r for r in ROLES if known.get(r) != _fingerprints(trio)[r]]
        raise ModelError(
            f"{folder} was saved with another {changed[0]}, adapter, cache type or llama.cpp; "
            "remove it, or name another"
        )
    try:
        for role, model in trio.models.items():
            model.load_state(folder / f"{role}.state", len(ids[role]))
    except BaseException:
        trio.forget()
        raise
    trio.hold(ids)
    trio.sums = kept
    return True


def _check_ids(trio: Trio, ids: dict[Role, list[int]]) -> None:
    """Raise ValueError where these cannot be what a trio has read."""
    for role in ROLES:
        if not all(0 <= i < trio.models[role].n_vocab for i in ids[role]):
            raise ValueError(f"{role} has no such ids")


def _state_digests(folder: Path) -> dict[Role, str]:
    return {role: sha256_of(folder / f"{role}.state") for role in ROLES}


def _fingerprints(trio: Trio) -> dict[Role, list[Any]]:
    return {role: _fingerprint(model) for role, model in trio.models.items()}


def _fingerprint(model: Model) -> list[Any]:
    """What a state depends on: weights, adapter, cache types and layout, llama.cpp's version."""
    files = [kept_sha256(path) for path in (model.path, model.lora) if path is not None]
    return [*files, *model.kv_types, model.flash_attn, native.build_info()["llama-cpp-python"]]
