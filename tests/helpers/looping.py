"""Trios made of nano: one whose answers repeat themselves, and one whose answers do not end."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader

from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trio.tuned import Free
from trimix_gguf.trios.triofile import TrioFile

NEVER_ENDS = {0: -100.0, 3: -100.0}  # bias of the tokens that end an answer


@pytest.fixture(scope="session")
def looping_folder(tmp_path_factory):
    """A trio's folder; in a chat `auto` takes small_cpt, which, greedy, repeats itself.

    It has no attention: its next token depends on the newest one only.
    """

    def change(tensor):
        if "attn_output" in tensor.name:
            tensor.data[...] = 0

    weights = METHODS["small_cpt"].weights
    free = Free(weights, "small_cpt is better", 40, 0.1, 0.9)
    folder = tmp_path_factory.mktemp("looping")
    return _made_of_nano(folder, {"small_cpt": change}, weights=weights, free=free)


@pytest.fixture(scope="session")
def endless_folder(tmp_path_factory):
    """A trio's folder; the rows of the tokens that end an answer are 0, so nothing picks them."""

    def change(tensor):
        if tensor.name == "token_embd.weight":
            tensor.data[[*NEVER_ENDS]] = 0

    return _made_of_nano(tmp_path_factory.mktemp("endless"), dict.fromkeys(ROLES, change))


def _made_of_nano(folder, changes, **tuning):
    """`folder`, with a trio of nano's models, some changed, and a tuning that was made of them."""
    shipped = TrioFile.read(NANO / "trio.toml")
    models = {role: replace(shipped.models[role], path=str(shipped.path(role))) for role in ROLES}
    models |= {role: _changed(models[role], folder, change) for role, change in changes.items()}
    known = {role: models[role].sha256 for role in ROLES}
    tuned = replace(shipped.tuning, models=known, **tuning)
    replace(shipped, folder=folder, models=models, tuning=tuned).write()
    return folder


def _changed(entry, folder, change):
    """A copy of a model in `folder`, whose tensors were changed in place."""
    file = folder / Path(entry.path).name
    shutil.copyfile(entry.path, file)
    reader = GGUFReader(file, "r+")
    for tensor in reader.tensors:
        change(tensor)
    reader.data.flush()
    return replace(entry, path=str(file), sha256=sha256_of(file))
