"""Trios by name: what a name means, what is installed, whether its files are what they were."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import KAZAKH

from trimix_gguf.errors import ModelFileError, TrioFileError
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios import store
from trimix_gguf.trios.triofile import ModelEntry, TrioFile, parse_trio, to_toml


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "trios"


def install(name, **changes):
    """The nano trio under another name, by links to its files."""
    folder = store.installed_folder(name)
    folder.mkdir(parents=True)
    for role in ROLES:
        (folder / f"{role}.gguf").symlink_to(NANO / f"{role}.gguf")
    trio = replace(store.resolve("nano"), folder=folder, name=name, **changes)
    trio.write()
    return trio


def one_line(result):
    assert result.returncode == 1, result.stderr.decode()
    assert len(result.stderr.decode().strip().splitlines()) == 1, result.stderr.decode()
    return result.stderr.decode()


# -- names ------------------------------------------------------------------------------------


def test_a_name_is_an_installed_trio_before_a_folder_here(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(NANO, "mine")
    assert store.resolve("mine").folder.resolve() == tmp_path / "mine"
    installed = install("mine")
    assert store.resolve("mine") == installed
    assert store.resolve("./mine").folder.resolve() == tmp_path / "mine"
    assert store.resolve("mine/trio.toml").file.resolve() == tmp_path / "mine" / "trio.toml"
    assert store.resolve("nano").folder == NANO


def test_a_folder_is_its_trio_file_or_three_files_named_by_role(home, tmp_path, nano_files):
    folder = tmp_path / "three"
    folder.mkdir()
    for path in nano_files.values():
        (folder / path.name).symlink_to(path)
    trio = store.resolve(str(folder))
    assert trio.name == "three" and trio.paths() == {r: folder / f"{r}.gguf" for r in ROLES}
    replace(trio, name="called").write()
    assert store.resolve(str(folder)).name == "called"
    (folder / "trio.toml").unlink()
    (folder / "small_cpt.gguf").unlink()
    with pytest.raises(ModelFileError, match="small_cpt.gguf"):
        store.resolve(str(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qwen2.5-1.5b-3b-kk", "`trimix pull qwen2.5-1.5b-3b-kk`"),
        ("qwen2.5-1.5b-3b-kz", "did you mean qwen2.5-1.5b-3b-"),
        ("minr", "did you mean mine?"),
        ("nanoo", "did you mean nano?"),
        ("", "`trimix list`"),
        ("../mine", "no such file"),
        ("/", "trio folder"),
        (".", "trio folder"),
        ("a\0b", "no such file"),
    ],
)
def test_what_is_not_here_is_one_line_with_the_nearest(home, tmp_path, monkeypatch, text, words):
    install("mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises((TrioFileError, ModelFileError)) as caught:
        store.resolve(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_only_whole_names_of_the_store_are_listed(home):
    assert store.installed() == []
    for name in ("b", "a"):
        install(name)
    (home / ".import-1-1-c").mkdir()
    (home / ".import-1-1-c" / "trio.toml").touch()
    (home / "unfinished").mkdir()
    assert store.installed() == ["a", "b"]


# -- removing ---------------------------------------------------------------------------------


def test_a_removed_trio_is_gone_and_its_linked_files_are_not(home, nano_files):
    install("mine")
    store.remove("mine")
    assert store.installed() == [] and list(home.iterdir()) == []
    assert all(path.is_file() for path in nano_files.values())
    (home / "linked").symlink_to(NANO)
    store.remove("linked")
    assert list(home.iterdir()) == [] and all(path.is_file() for path in nano_files.values())
    for name in ("nano", "mine", "../mine", "."):
        with pytest.raises(TrioFileError):
            store.remove(name)
    assert (NANO / "trio.toml").is_file()


def test_what_dead_processes_left_is_cleared_and_what_live_ones_hold_is_not(home):
    install("mine")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, check=True)  # fmt: skip
    ended = home / f".import-{int(dead.stdout)}-1-x"
    reused = home / f".remove-{os.getppid()}-1-x"  # its number is another process's now
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as living:
        held = home / f".import-{living.pid}-{store._started(living.pid)}-x"
        for folder in (ended, reused, held):
            folder.mkdir()
        store.clear_leftovers()
        assert sorted(home.iterdir()) == [held, home / "mine"]
        living.kill()
    store.clear_leftovers()
    assert list(home.iterdir()) == [home / "mine"]


# -- verifying --------------------------------------------------------------------------------


def test_the_shipped_trio_is_what_its_file_says():
    """Where the nano trio was made anew, its trio.toml needs the new sizes and hashes."""
    assert store.verify(store.resolve("nano")) == dict.fromkeys(ROLES, "whole")


def test_each_file_is_whole_altered_missing_or_of_no_known_hash(tmp_path):
    contents = {"large_ins": b"a" * (3 << 20), "small_cpt": b"b" * 10, "small_base": b"c" * 10}
    models = {}
    for role, content in {**contents, "large_base": b"d"}.items():
        (tmp_path / role).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        models[role] = ModelEntry(path=role, sha256=digest, n_bytes=len(content))
    del contents
    trio = TrioFile(tmp_path, "a", models)
    seen = []
    states = store.verify(trio, lambda role, done, total: seen.append((done, total)))
    assert states == dict.fromkeys(models, "whole")
    assert seen[-1][0] == seen[-1][1] == sum(entry.n_bytes for entry in models.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    (tmp_path / "large_ins").write_bytes(b"a" * (3 << 20) + b"x")
    (tmp_path / "small_cpt").write_bytes(b"b" * 9 + b"x")
    (tmp_path / "small_base").unlink()
    states = store.verify(trio.with_model("large_base", sha256=None))
    assert states == {
        "large_ins": "altered",
        "small_cpt": "altered",
        "small_base": "missing",
        "large_base": "no sha256",
    }


# -- presets ----------------------------------------------------------------------------------

LANGUAGES = {"kk", "ug", "bo", "mn", "bn", "ta", "te", "or"}
CPT = {  # the checkpoints that are known to exist
    *(f"pkupie/Qwen2.5-{size}B-{code}-cpt" for size in ("1.5", "3")
      for code in ("kk", "ug", "bo", "mn")),
    "pkupie/gemma-3-4b-ug-cpt",
}  # fmt: skip


def test_a_preset_is_a_trio_file_that_can_be_read(tmp_path):
    known = store.presets()
    assert {trio.split("-")[-1] for trio in known} == LANGUAGES
    for name, preset in known.items():
        file = tmp_path / name / "trio.toml"
        assert parse_trio(to_toml(preset.trio), file, inside=True) == replace(
            preset.trio, folder=file.parent
        )
        assert preset.trio.name == name and preset.licences
        for entry in preset.trio.models.values():
            assert entry.licence and entry.quantization and entry.sha256 is None


def test_a_preset_names_what_exists_and_says_what_it_lacks():
    for preset in store.presets().values():
        models = preset.trio.models
        for role in ("large_ins", "small_base"):
            assert models[role].repo.split("/")[0] in ("Qwen", "google", "meta-llama")
        assert models["small_cpt"].quantization == models["small_base"].quantization
        if preset.whole:
            assert models["small_cpt"].repo in CPT
        else:
            assert models["small_cpt"].repo is None
            assert f"your own small_cpt: {models['small_base'].repo}" in preset.trio.description
    assert {p.trio.models["small_cpt"].repo for p in store.presets().values()} == {None, *CPT}


# -- commands ---------------------------------------------------------------------------------


def test_list_show_verify_and_remove(home, trimix):
    install("mine", description="Менің үлгім")
    listed = json.loads(trimix("list", "--json").stdout)
    assert [(t["name"], t["state"]) for t in listed["installed"]] == [
        ("nano", "whole"),
        ("mine", "whole"),
    ]
    assert len(listed["presets"]) == len(store.presets())
    shown = json.loads(trimix("show", "mine", "--json").stdout)
    assert shown["description"] == "Менің үлгім" and shown["n_ctx"] == 512
    assert shown["models"]["large_ins"]["n_bytes"] == (NANO / "large_ins.gguf").stat().st_size
    assert trimix("verify", "mine").returncode == 0
    altered = home / "mine" / "small_cpt.gguf"
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.unlink()
    altered.write_bytes(content)
    (home / "mine" / "small_base.gguf").unlink()
    result = trimix("verify", "mine", "--json")
    error = one_line(result)
    assert f"{altered} is altered" in error and "small_base.gguf is missing" in error
    assert json.loads(result.stdout)["models"]["large_ins"] == "whole"
    table = trimix("list").stdout.decode()
    assert "without small_base" in table
    # Where a script is chosen that nobody published, the way to it is said.
    (row,) = [line for line in table.splitlines() if "qwen2.5-1.5b-3b-kk" in line]
    assert "Arabic script; for Cyrillic: trimix adapt" in row
    assert trimix("remove", "mine").returncode == 0
    assert "not installed" in one_line(trimix("remove", "mine"))


def test_show_tells_of_a_preset_what_pull_would_fetch(home, trimix):
    text = trimix("show", "gemma3-4b-12b-ug").stdout.decode()
    assert "pkupie/gemma-3-4b-ug-cpt@main" in text and text.count("missing") == 3


def test_what_is_not_here_is_shown_and_planned_by_the_sizes_that_are_known(home, trimix):
    name = "qwen2.5-1.5b-3b-ug"
    sizes = {"large_ins": 2_100_000_000, "small_cpt": 1_600_000_000, "small_base": 1_600_000_000}
    told = f"not here; `trimix pull {name}` makes about 5.3 GB of files"
    text = trimix("show", name).stdout.decode()
    assert told in text and "large_ins: missing, about 2.1 GB" in text
    assert json.loads(trimix("show", name, "--json").stdout)["to_pull"]["models"] == sizes
    enough = ("plan", "--trio", name, "--assume-ram", "4", "--assume-gpu", "4")
    planned = trimix(*enough)
    assert planned.returncode == 0, planned.stderr.decode()
    assert told in planned.stdout.decode() and "the weights fit" in planned.stdout.decode()
    report = json.loads(trimix(*enough, "--json").stdout)
    assert {role: model["weights"] for role, model in report["models"].items()} == sizes
    assert report["fits"] is None and report["free"] == {"RAM": 4 << 30, "GPU0": 4 << 30}
    short = trimix("plan", "--trio", name, "--assume-ram", "4", "--json")
    assert "about 5.3 GB, and 4.3 GB are free" in one_line(short)
    assert json.loads(short.stdout)["fits"] is False
    both = trimix(*enough, "--large-ins", "x.gguf")
    assert both.returncode == 2 and b"not both" in both.stderr


def test_a_trio_here_by_the_name_of_a_preset_is_planned_as_it_is(home, trimix):
    install("qwen2.5-1.5b-3b-ug")
    planned = json.loads(trimix("plan", "--trio", "qwen2.5-1.5b-3b-ug", "--json").stdout)
    assert planned["fits"] is True
    assert "to_pull" not in json.loads(trimix("show", "qwen2.5-1.5b-3b-ug", "--json").stdout)


def test_a_damaged_trio_file_hides_no_other(home, trimix):
    install("mine")
    install("worse")
    (home / "mine" / "trio.toml").write_text("version = 9")
    states = {
        t["name"]: t["state"] for t in json.loads(trimix("list", "--json").stdout)["installed"]
    }
    assert "update trimix-gguf" in states["mine"] and states["worse"] == "whole"
    assert "update trimix-gguf" in one_line(trimix("generate", "a", "--trio", "mine"))


def test_the_trios_own_settings_hold_beneath_the_options(home, trimix):
    """n_ctx, and what a model is loaded with; a flag takes the place of either."""
    trio = install("mine", n_ctx=256).with_model("large_ins", kv_type="q8_0")
    trio.write()

    def doctor(*arguments):
        return json.loads(trimix("doctor", "--trio", "mine", "--json", *arguments).stdout)["trio"]

    own = doctor()
    assert own["context"] == 256
    assert doctor("--n-ctx", 128)["context"] == 128
    from trimix_gguf.cli.options import trio_arguments

    def kv(*texts):
        arguments = trio_arguments({"trio": "mine", "kv_type": texts})["per_role"]
        return {role: arguments.get(role, {}).get("type_k") for role in ROLES}

    assert kv() == {"large_ins": "q8_0", "small_cpt": None, "small_base": None}
    assert kv("f16") == dict.fromkeys(ROLES, "f16")
    assert kv("small-cpt=q8_0")["large_ins"] == kv("small-cpt=q8_0")["small_cpt"] == "q8_0"


def test_the_trios_own_weights_are_the_default(home, trimix):
    from trimix_gguf import Weights

    install("mine", method=None, weights=Weights(0.25, 0.5), gpu_layers="auto")
    arguments = ("generate", KAZAKH, "--trio", "mine", "-n", "1", "--json")

    def weights(*more):
        chosen = json.loads(trimix(*arguments, *more).stdout)["weights"]
        return chosen["alpha"], chosen["beta"], chosen["method"]

    assert weights() == (0.25, 0.5, "fixed")
    assert weights("--weights", "1,0") == (1.0, 0.0, "fixed")
    assert weights("--method", "ent")[2] == "ent"
    assert weights("--grid", "0.1,0.9")[2] == "auto"
    report = json.loads(trimix("score", "--trio", "mine", "--json", stdin=KAZAKH.encode()).stdout)
    assert report["default"] == {"alpha": 0.25, "beta": 0.5}
    assert report["perplexity"]["fused"] <= report["perplexity"]["default"]


def test_the_trios_own_method_is_the_default(home, trimix):
    install("mine", method="proxy-tuning")
    result = trimix("generate", KAZAKH, "--trio", "mine", "-n", "1", "--json")
    assert json.loads(result.stdout)["weights"] == {"alpha": 1.0, "beta": 1.0, "method": "fixed"}
    install("other", method="ent")
    result = trimix("generate", KAZAKH, "--trio", "other", "-n", "1", "--json")
    assert json.loads(result.stdout)["weights"]["method"] == "ent"


def test_a_trio_without_a_file_is_not_loaded(home, trimix):
    install("mine")
    (home / "mine" / "small_cpt.gguf").unlink()
    for command in (("generate", "a"), ("doctor",)):
        assert "models.small_cpt" in one_line(trimix(*command, "--trio", "mine"))
    text = to_toml(store.resolve("mine")).replace("[models.small_cpt]", "[models.small_base2]")
    (home / "mine" / "trio.toml").write_text(text, encoding="utf-8")
    assert "small_base2" in one_line(trimix("score", "--trio", "mine", stdin=b"a"))
    assert trimix("generate", "a", "--trio", "mine", "--large-ins", "x").returncode == 2


def test_a_leftover_that_another_process_clears_as_well_is_no_error(tmp_path, monkeypatch):
    """Bug: of two commands that began together after a kill, one ended in a traceback."""
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path))
    left = store.trios_folder() / ".import-1-1-gone"
    left.mkdir(parents=True)
    monkeypatch.setattr(store, "_alive", lambda pid, started: left.rmdir())  # None: it is not
    store.clear_leftovers()
    assert not left.exists()
