"""trimix pull, as a user types it: what comes, whole and once, through whatever happens."""

import json
import os
import shutil
import signal
import time

import pytest
from conftest import KAZAKH
from hub_server import Fault
from killed_pulls import Pulls
from person import NOWHERE, REPO
from test_cli import one_line_error

from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.lora import convert_lora
from trimix_gguf.machine.hashes import sha256_of
from trimix_gguf.roles import ROLES
from trimix_gguf.trios.pull_plan import plan_pull
from trimix_gguf.trios.triofile import TrioFile


def test_ready_files_are_pulled_pinned_and_answer_with_no_network(person, hub, ready, nano_files):
    commit = hub.add(REPO, ready, licence="cc-by-sa-4.0", token="hf_secret")
    file = person.write(**{r: f'repo = "{REPO}"\nfile = "{r}.gguf"' for r in ROLES})
    asked = person.trimix("pull", file, HF_TOKEN="hf_secret")
    assert asked.returncode == 2 and b"--yes" in asked.stderr and b"cc-by-sa-4.0" in asked.stderr
    size = f"{nano_files['large_ins'].stat().st_size / 1e6:.1f} MB"
    assert size.encode() in asked.stderr and not (person.trio / "trio.toml").exists()
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
        assert result.returncode == 0 and b"kk is already here" in result.stderr


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
    assert b"already here, with another small_base" in other.stderr and other.returncode == 1


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


def test_ones_own_model_is_taken_from_beside_the_trio_file(person, hub, ready, nano_files):
    hub.add(REPO, ready)
    file = person.write(small_cpt='licence = "my own"')
    assert "small_cpt of your own" in person.refused(file)
    shutil.copyfile(nano_files["small_cpt"], file.parent / "small_cpt.gguf")
    person.trio = person.trio.with_name("mine")
    assert person.pull(file, "--name", "mine").returncode == 0
    assert person.pulled().models["small_cpt"].sha256 == sha256_of(nano_files["small_cpt"])


@pytest.mark.skipif(os.name == "nt", reason="signals, limits or pipes as POSIX has them")
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
