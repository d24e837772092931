"""trimix pull, as a user types it, against a hub on loopback that fails when told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import KAZAKH
from hf_checkpoint import checkpoint_folder
from hub_server import Fault, serving
from huggingface_hub import constants
from killed_pulls import Pulls
from test_cli import one_line_error

from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.lora import convert_lora
from trimix_gguf.errors import TrimixError
from trimix_gguf.gguf_file import read_gguf
from trimix_gguf.trios.hub import N_TRIES
from trimix_gguf.trios.pull_plan import plan_pull
from trimix_gguf.trios.pulling import pull
from trimix_gguf.trios.store import sha256_of
from trimix_gguf.trios.triofile import TrioFile

ROLES = ("large_ins", "small_cpt", "small_base")
REPO = "kk/nano-GGUF"
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the port of nobody


@pytest.fixture
def hub():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def ready(tmp_path_factory, nano_files):
    """A folder of GGUF files, as it would be published."""
    folder = tmp_path_factory.mktemp("ready")
    for role, path in nano_files.items():
        shutil.copyfile(path, folder / f"{role}.gguf")
    (folder / "README.md").write_text("what these are")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, nano_files):
    """small_base as a checkpoint folder, named as its repository."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small-base"
    checkpoint_folder(nano_files["small_base"], folder, "F16")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT adapter of small_base."""
    from trimix_gguf.convert.checkpoint import StoredTensor, write_safetensors

    folder = tmp_path_factory.mktemp("adapters") / "kk-lora"
    folder.mkdir()
    module = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    shapes = {f"{module}A.weight": (4, 192), f"{module}B.weight": (192, 4)}
    stored = {n: StoredTensor(folder, 0, shape, "F32") for n, shape in shapes.items()}
    rng = np.random.default_rng(0)
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


def test_ready_files_are_pulled_pinned_and_answer_with_no_network(person, hub, ready, nano_files):
    commit = hub.add(REPO, ready, licence="cc-by-sa-4.0", token="hf_secret")
    file = person.write(**{r: f'repo = "{REPO}"\nfile = "{r}.gguf"' for r in ROLES})
    asked = person.trimix("pull", file, HF_TOKEN="hf_secret")
    assert asked.returncode == 2 and b"--yes" in asked.stderr and b"cc-by-sa-4.0" in asked.stderr
    assert b"10.6 MB" in asked.stderr and not (person.trio / "trio.toml").exists()
    result = person.pull(file, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode().strip() == str(person.trio)
    trio = person.pulled()
    for role, path in nano_files.items():
        entry = trio.models[role]
        assert (entry.sha256, entry.revision) == (sha256_of(path), commit)
        assert entry.licence == "cc-by-sa-4.0"
    # The token is the hub's to see, not that of the host which hands large files over.
    handed = {one.authorized for one in hub.asked if "/file/" in one.path}
    assert handed == {False} and any(one.authorized for one in hub.asked)
    wanted = ("--trio", "kk", "-n", "4", "--temperature", "0", "--json")  # drawn, it may be empty
    answer = person.trimix("generate", KAZAKH, *wanted, HF_HUB_OFFLINE="1", **NOWHERE)
    assert answer.returncode == 0 and json.loads(answer.stdout)["n_tokens"] > 0
    for again in ("kk", file):
        result = person.pull(again, HF_HUB_OFFLINE="1", **NOWHERE)
        assert result.returncode == 0 and b"kk is here already" in result.stderr


def test_checkpoint_and_adapter_are_converted_as_trimix_convert_does(
    person, hub, ready, checkpoint, adapter, tmp_path
):
    hub.add(REPO, ready)
    hub.add("kk/small-base", checkpoint)
    hub.add("kk/kk-lora", adapter)
    file = person.write(
        large_ins=f'repo = "{REPO}"\nfile = "large_ins.gguf"',
        small_base='repo = "kk/small-base"\nquantization = "q8_0"',
        small_cpt='repo = "kk/kk-lora"\nadapter_of = "small_base"',
    )
    result = person.pull(file, "--quantization", "f16")
    assert result.returncode == 0, result.stderr.decode()
    trio = person.pulled()
    convert_hf(checkpoint, tmp_path / "base.gguf", type="f16")
    convert_lora(adapter, checkpoint, tmp_path / "lora.gguf")
    assert trio.models["small_base"].sha256 == sha256_of(tmp_path / "base.gguf")
    assert trio.models["small_cpt"].sha256 == sha256_of(tmp_path / "lora.gguf")
    assert trio.models["small_base"].quantization == "f16"
    score = person.trimix("score", file, "--trio", "kk", "--json", HF_HUB_OFFLINE="1", **NOWHERE)
    perplexity = json.loads(score.stdout)["perplexity"]
    assert perplexity["small_cpt"] != pytest.approx(perplexity["small_base"], rel=1e-3)
    assert person.pull(file, "--quantization", "f16", **NOWHERE).returncode == 0
    other = person.pull(file, "--quantization", "q4_0", **NOWHERE)
    assert b"here already, with another small_base" in other.stderr and other.returncode == 1


def test_a_checkpoint_is_removed_once_it_is_converted_and_not_fetched_again(
    person, hub, ready, checkpoint
):
    hub.add(REPO, ready)
    hub.add("kk/small-cpt", checkpoint)
    hub.faults["/file/small_base"] = [Fault(), Fault(status=404)]
    file = person.write(small_cpt='repo = "kk/small-cpt"')
    person.refused(file)
    assert not list(person.trio.rglob("*.safetensors"))
    hub.asked.clear()
    assert person.pull(file).returncode == 0
    person.pulled()
    assert not [one for one in hub.asked if one.n_sent and "small_base" not in one.path]


def test_what_is_in_its_place_already_is_not_fetched_again(
    person, hub, ready, checkpoint, refusal, monkeypatch
):
    """A pull that ended between the last file's renaming and the writing of trio.toml."""
    hub.add(REPO, ready)
    hub.add("kk/small-cpt", checkpoint)
    file = person.write(small_cpt='repo = "kk/small-cpt"')
    with monkeypatch.context() as patch:
        patch.setattr(TrioFile, "write", lambda self: os.stat("/nowhere"))
        assert "pull again" in refusal(file)
    assert len(list(person.trio.glob("*.gguf"))) == 3
    hub.asked.clear()
    assert person.pull(file).returncode == 0
    person.pulled()
    assert not [one for one in hub.asked if one.n_sent]


def test_adapter_over_a_ready_base_takes_the_config_of_the_base_it_names(
    person, hub, ready, checkpoint, adapter, tmp_path
):
    named = shutil.copytree(adapter, tmp_path / "kk-lora")
    config = json.loads((named / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "kk/small-base"
    (named / "adapter_config.json").write_text(json.dumps(config))
    hub.add(REPO, ready)
    hub.add("kk/small-base", checkpoint)
    hub.add("kk/kk-lora", named)
    file = person.write(small_cpt='repo = "kk/kk-lora"\nadapter_of = "small_base"')
    result = person.pull(file)
    assert result.returncode == 0, result.stderr.decode()
    person.pulled()
    assert hub.n_sent("kk/small-base") == (checkpoint / "config.json").stat().st_size


def test_a_hub_of_faults_is_outlasted(person, hub, ready):
    """Cut, silent, overloaded, deaf to Range, behind a login page, wrong once: the file comes."""
    hub.add(REPO, ready)
    soon = {"Retry-After": "0"}
    hub.faults["/api/models"] = [Fault(status=429, headers=soon), Fault(status=503, headers=soon)]
    hub.faults["/file/small_base"] = [
        Fault(cut_after=100_001),
        Fault(body=b"<html>log in</html>"),
        Fault(status=500, headers=soon),
        Fault(stall_after=77_777),
        Fault(flip=2_000_000),
        Fault(cut_after=1_500_000),
        Fault(cut_after=1_000_000, whole=True),
        Fault(status=429, headers=soon),
    ]
    result = person.pull(person.write())
    assert result.returncode == 0, result.stderr.decode()
    assert b"wrong bytes; fetching it again" in result.stderr
    person.pulled()
    assert not hub.faults["/file/small_base"]
    first = [one.range for one in hub.asked if "/file/" in one.path][:5]
    assert first == [None, *3 * ["bytes=100001-"], "bytes=177778-"]


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


def test_a_hub_that_refuses_is_explained_with_the_mend(person, hub, ready, refusal):
    hub.add(REPO, ready)
    file = person.write()
    soon = {"Retry-After": "0"}
    for piece, fault, words in [
        ("/api/models", Fault(status=429, headers={"Retry-After": "3000"}), "again in 50 min"),
        ("/api/models", Fault(status=503, headers=soon, forever=True), "HTTP 503"),
        ("/api/models", Fault(body=b"<html>log in</html>"), "login page"),
        ("/file/", Fault(status=429, headers=soon, forever=True), "what came is kept"),
        ("/file/", Fault(flip=9, forever=True), "was removed; pull again later"),
        ("/resolve/", Fault(status=403, forever=True), "hf auth login"),
        ("/resolve/", Fault(status=401, forever=True), "hf auth login"),
    ]:
        hub.faults = {piece: [fault]}
        assert words in refusal(file)
        assert sum(path.stat().st_size for path in person.trio.rglob("*.gguf*")) == 0


def test_a_hub_that_sends_the_same_beginning_for_ever_is_given_up(person, hub, ready, refusal):
    """Bytes that were there before are no progress."""
    hub.add(REPO, ready)
    hub.faults["/file/"] = [Fault(cut_after=9, whole=True, forever=True)]
    words = refusal(person.write())
    assert "the connection fails" in words and "what came is kept" in words
    assert sum("/file/" in one.path for one in hub.asked) == N_TRIES
    assert sum(path.stat().st_size for path in person.trio.rglob("*.part")) == 9


def test_a_source_that_is_not_there_is_named(person, hub, ready, refusal):
    hub.add(REPO, ready)
    for entry, words in [
        ('repo = "kk/nobody"\nfile = "small_cpt.gguf"', "no such repository, or it is private"),
        (f'repo = "{REPO}"\nfile = "small_ctp.gguf"', "it has small_cpt.gguf"),
        (f'repo = "{REPO}"\nfile = "a.gguf"\nrevision = "v9"', "no such revision"),
        (f'repo = "{REPO}"', "set file to one of large_ins.gguf"),
        (f'repo = "{REPO}"\nfile = "a-00001-of-00002.gguf"', "one part of several"),
        (f'repo = "{REPO}"\nquantization = "q3"', "quantization 'q3' is unknown"),
        (f'repo = "{REPO}"\nfile = "small_cpt.gguf"\nsha256 = "{"0" * 64}"', "set revision to"),
        ('path = ".pull/a.gguf"', "the pull's own folder"),
        ('path = "trio.toml"', "is the trio file"),
        ('path = "./LARGE_INS.gguf"', "that of models.large_ins already"),
    ]:
        assert words in refusal(person.write(small_cpt=entry))


def test_no_consent_and_no_network_are_one_line(person, hub, ready):
    hub.add(REPO, ready, token="hf_secret")
    file = person.write()
    unasked = one_line_error(person.trimix("pull", file))
    assert f"accept it at https://huggingface.co/{REPO}" in unasked
    assert "connect to a network" in person.refused(file, **NOWHERE)
    assert "HF_HUB_OFFLINE is set" in person.refused(file, HF_HUB_OFFLINE="1")


def test_what_cannot_be_pulled_is_said_before_anything_is_fetched(person, hub, ready):
    hub.add(REPO, ready, declared={"small_base.gguf": 1 << 50})
    file = person.write()
    assert "--force" in person.refused(file)
    assert "on the disk" in person.refused(file, "--force")
    assert hub.n_sent("/file/") == 0
    assert "did you mean qwen2.5-1.5b-3b-kk" in person.refused("qwen2.5-1.5b-3b-kz")
    assert "trimix convert hf" in person.refused("qwen2.5-1.5b-3b-bn")
    assert "ships with the package" in person.refused("nano")
    assert "nothing of it is converted" in person.refused(file, "--quantization", "q4_0")


def test_what_is_converted_counts_by_the_size_that_it_will_have(
    person, hub, ready, checkpoint, here
):
    hub.add(REPO, ready)
    hub.add("kk/small-base", checkpoint, n_weights={"F16": 1_000_000_000})
    manifest = TrioFile.read(person.write(small_base='repo = "kk/small-base"'))
    plans = {t: plan_pull(manifest, quantization=t) for t in ("f16", "q8_0", "q4_k_m")}
    assert plans["f16"].n_memory == pytest.approx(2e9, rel=0.01)
    assert plans["q8_0"].n_memory == pytest.approx(34 / 32 * 1e9, rel=0.02)
    assert plans["q4_k_m"].n_memory < 0.7e9
    n_bytes = plans["f16"].n_to_fetch
    assert plans["f16"].n_disk == pytest.approx(n_bytes + 2e9, rel=0.01)


def test_models_that_do_not_speak_the_same_tokens_are_not_made_a_trio(person, hub, ready, tmp_path):
    folder = shutil.copytree(ready, tmp_path / "changed")
    data = (folder / "small_cpt.gguf").read_bytes()
    tokens = read_gguf(folder / "small_cpt.gguf").array("tokenizer.ggml.tokens")
    word = max(tokens, key=len)
    (folder / "small_cpt.gguf").write_bytes(data.replace(word, b"#" * len(word)))
    hub.add(REPO, folder)
    file = person.write(small_cpt=f'repo = "{REPO}"\nfile = "small_cpt.gguf"')
    assert "convert both with one tokenizer" in person.refused(file)


def test_ones_own_model_is_taken_from_beside_the_trio_file(person, hub, ready, nano_files):
    hub.add(REPO, ready)
    file = person.write(small_cpt='licence = "my own"')
    assert "small_cpt of your own" in person.refused(file)
    shutil.copyfile(nano_files["small_cpt"], file.parent / "small_cpt.gguf")
    person.trio = person.trio.with_name("mine")
    assert person.pull(file, "--name", "mine").returncode == 0
    assert person.pulled().models["small_cpt"].sha256 == sha256_of(nano_files["small_cpt"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_told_and_what_came_before_is_kept(person, hub, ready):
    hub.add(REPO, ready)
    hub.faults["/file/"] = [Fault(status=404)]
    file = person.write()
    person.refused(file)
    (part,) = person.trio.rglob("*.gguf.part")
    part.unlink()
    part.symlink_to("/dev/full")
    assert "free 3.6 MB and pull again" in person.refused(file)
    part.unlink()
    assert person.pull(file).returncode == 0
    person.pulled()


def test_a_second_pull_waits_its_turn_and_goes_on_from_the_first(person, hub, ready, tmp_path):
    """The branch moves meanwhile, by a file that is none of ours: that costs nothing."""
    ready = shutil.copytree(ready, tmp_path / "ready")
    hub.add(REPO, ready)
    hub.faults["/file/"] = [Fault(stall_after=500_000)]
    file = person.write()
    with person.start("pull", file, "--yes", HF_HUB_DOWNLOAD_TIMEOUT="60") as first:
        while not (parts := list(person.trio.rglob("*.part"))) or parts[0].stat().st_size < 500_000:
            assert first.poll() is None
            time.sleep(0.01)
        assert "another `trimix pull`" in person.refused(file)
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=30)
    assert first.returncode == 130
    (ready / "README.md").write_text("what these are, told better")
    hub.add(REPO, ready)
    hub.asked.clear()
    assert person.pull(file).returncode == 0
    n_bytes = {entry.n_bytes for entry in person.pulled().models.values()}.pop()
    assert hub.n_sent("/file/") == 3 * n_bytes - 500_000


def test_files_of_another_commit_are_not_mixed_with_those_of_the_first(
    person, hub, ready, tmp_path
):
    """Its small_base has the same size as the one that came once, and half of another time."""
    hub.add(REPO, ready)
    stopped = [Fault(), Fault(cut_after=500_000), Fault(status=404)]
    hub.faults["/file/"] = [*stopped]
    file = person.write()
    person.refused(file)
    newer = shutil.copytree(ready, tmp_path / "newer")
    shutil.copyfile(ready / "small_cpt.gguf", newer / "small_base.gguf")
    commit = hub.add(REPO, newer)
    hub.faults["/file/"] = [*stopped]
    person.refused(file)
    n_bytes = [path.stat().st_size for path in person.trio.rglob("*.gguf*")]
    assert sorted(n_bytes) == [500_000, (ready / "small_base.gguf").stat().st_size]
    assert person.pull(file).returncode == 0
    entries = person.pulled().models.values()
    assert {entry.sha256 for entry in entries} == {sha256_of(newer / "small_base.gguf")}
    assert {entry.revision for entry in entries} == {commit}


def test_a_file_that_was_lost_is_fetched_alone_from_its_commit(person, hub, ready, tmp_path):
    commit = hub.add(REPO, ready)
    file = person.write()
    assert person.pull(file).returncode == 0
    os.truncate(person.trio / "small_cpt.gguf", 1000)
    newer = shutil.copytree(ready, tmp_path / "newer")
    shutil.copyfile(ready / "small_cpt.gguf", newer / "small_base.gguf")
    hub.add(REPO, newer)
    n_sent = hub.n_sent("/file/")
    assert person.pull("kk").returncode == 0
    assert person.pulled().models["small_cpt"].revision == commit
    assert hub.n_sent("/file/") - n_sent == (ready / "small_base.gguf").stat().st_size
    other = person.write(large_ins=f'repo = "{REPO}"\nfile = "large_ins.gguf"')
    assert "with another large_ins" in one_line_error(person.pull(other))


def test_killed_ten_times_it_completes_with_the_right_bytes(tmp_path, hub):
    hub.seconds_per_chunk = 0.0003
    pulls = Pulls(tmp_path, hub, seed=7, type="q8_0")
    while pulls.counts["killed"] < 10:
        if pulls.pull():
            shutil.rmtree(pulls.home)
    assert pulls.pull(kill=False)
    assert pulls.counts["resumed"] > 0
