"""A trio whose answers repeat themselves: the nano trio, as if small_cpt answered freely best."""

from dataclasses import replace

import pytest

from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trio.tuned import Free
from trimix_gguf.trios.triofile import TrioFile


@pytest.fixture(scope="session")
def looping_folder(tmp_path_factory):
    """Its folder; in a chat `auto` takes small_cpt, which, greedy, repeats itself."""
    shipped = TrioFile.read(NANO / "trio.toml")
    models = {role: replace(shipped.models[role], path=str(shipped.path(role))) for role in ROLES}
    free = Free(METHODS["small_cpt"].weights, "small_cpt is better", 40, 0.1, 0.9)
    tuning = replace(shipped.tuning, weights=METHODS["small_cpt"].weights, free=free)
    folder = tmp_path_factory.mktemp("looping")
    replace(shipped, folder=folder, models=models, tuning=tuning).write()
    return folder
