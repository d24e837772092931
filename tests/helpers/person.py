"""Someone who pulls trios, from a hub on loopback that fails when told: fixtures of the tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_checkpoint import checkpoint_folder
from hub_server import serving
from huggingface_hub import constants

from trimix_gguf.errors import TrimixError
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.pull_plan import plan_pull
from trimix_gguf.trios.pulling import pull
from trimix_gguf.trios.triofile import TrioFile

REPO = "kk/nano-GGUF"
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the port of nobody


@pytest.fixture
def hub():
    with serving() as served:
        yield served


@pytest.fixture(scope="session")
def ready(tmp_path_factory, nano_files):
    """A folder of GGUF files, as it would be published."""
    folder = tmp_path_factory.mktemp("ready")
    for role, path in nano_files.items():
        shutil.copyfile(path, folder / f"{role}.gguf")
    (folder / "README.md").write_text("what these are")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, nano_files):
    """small_base as a checkpoint folder, named as its repository."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small-base"
    checkpoint_folder(nano_files["small_base"], folder, "F16")
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """A PEFT adapter of small_base."""
    return adapter_folder(tmp_path_factory.mktemp("adapters") / "kk-lora", seed=0)


def adapter_folder(folder: Path, seed: int, layers: tuple[int, ...] = (1,)) -> Path:
    """A PEFT adapter of small_base in a new folder; another one for each seed."""
    from trimix_gguf.convert.checkpoint import StoredTensor, write_safetensors

    folder.mkdir()
    n_embd, shapes = read_gguf(NANO / "small_base.gguf").n_embd, {}
    for layer in layers:
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        shapes |= {f"{module}A.weight": (4, n_embd), f"{module}B.weight": (n_embd, 4)}
    stored = {n: StoredTensor(folder, 0, shape, "F32") for n, shape in shapes.items()}
    rng = np.random.default_rng(seed)
    data = {n: rng.standard_normal(shape, "f4") for n, shape in shapes.items()}
    write_safetensors(folder / "adapter_model.safetensors", stored, data.__getitem__)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Person:
    """Someone with a home, a hub, and a trio file."""

    def __init__(self, folder: Path, hub) -> None:
        self.folder, self.hub = folder, hub
        self.trio = folder / "home" / "trios" / "kk"
        self.environment = {
            **os.environ,
            **hub.environment(),
            "HF_HOME": str(folder / "hf"),
            "TRIMIX_HOME": str(folder / "home"),
        }

    def write(self, **models: str) -> Path:
        """A trio file: each role's entry, where it is not the ready small_base."""
        file = self.folder / "kk.toml"
        default = f'repo = "{REPO}"\nfile = "small_base.gguf"'
        entries = [f"[models.{role}]\n{models.get(role, default)}\n" for role in ROLES]
        file.write_text("\n".join(['version = 1\nname = "kk"', *entries]), encoding="utf-8")
        return file

    def start(self, *arguments, **environment):
        command = [sys.executable, "-m", "trimix_gguf.cli", *map(str, arguments)]
        return subprocess.Popen(
            command, env={**self.environment, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def trimix(self, *arguments, **environment):
        with self.start(*arguments, **environment) as process:
            out, error = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def pull(self, *arguments, **environment):
        return self.trimix("pull", *arguments, "--yes", **environment)

    def pulled(self) -> TrioFile:
        """The trio as it is here, each file with the hash that trio.toml names."""
        trio = TrioFile.read(self.trio / "trio.toml", inside=True)
        for role, entry in trio.models.items():
            assert sha256_of(trio.path(role)) == entry.sha256
            assert trio.path(role).stat().st_size == entry.n_bytes
        assert {p.name for p in self.trio.iterdir()} == {
            "trio.toml", *(entry.path for entry in trio.models.values())
        }  # fmt: skip
        return trio

    def refused(self, *arguments, **environment) -> str:
        """What a pull that fails says in its last line; no trio comes of it."""
        result = self.pull(*arguments, **environment)
        error = result.stderr.decode()
        assert result.returncode == 1 and result.stdout == b"", error
        assert "Traceback" not in error and not (self.trio / "trio.toml").exists()
        return error.strip().splitlines()[-1]


@pytest.fixture
def person(tmp_path, hub):
    return Person(tmp_path, hub)


@pytest.fixture
def here(person, hub, monkeypatch):
    """This very process has the person's home and hub; it waits for nothing."""
    monkeypatch.setenv("TRIMIX_HOME", str(person.folder / "home"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("trimix_gguf.trios.hub.PAUSES", (0.0,))


@pytest.fixture
def refusal(here):
    """What a pull in this very process, of a trio file, is refused with."""

    def refused(file: Path) -> str:
        with pytest.raises(TrimixError) as refused:
            pull(plan_pull(TrioFile.read(file, inside=True)))
        assert len(str(refused.value).splitlines()) == 1
        return str(refused.value)

    return refused
