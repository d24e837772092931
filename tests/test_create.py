"""trimix create and trimix disk: a trio of files that other programs hold, and what takes space."""

import hashlib
import json
import os
import shutil

import pytest
from split_gguf import split_gguf

from trimix_gguf.convert.lora import convert_lora
from trimix_gguf.machine.folders import cache_folder
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.roles import ROLES
from trimix_gguf.trios import disk, store
from trimix_gguf.trios.disk import disk_use
from trimix_gguf.trios.elsewhere import everywhere

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def person_home(tmp_path, monkeypatch):
    """A home of one's own, on the disk of the store."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def held(person_home, nano_files):
    """The nano trio: its large model in Ollama, small_base in the hub's cache, small_cpt in LM
    Studio; role -> (what a user writes, the file)."""
    ollama = person_home / ".ollama" / "models"
    raw = nano_files["large_ins"].read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    (ollama / "blobs").mkdir(parents=True)
    blob = ollama / "blobs" / f"sha256-{digest}"
    blob.write_bytes(raw)
    manifest = ollama / "manifests" / "registry.ollama.ai" / "library" / "nano" / "latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}), encoding="utf-8")
    repo = person_home / ".cache" / "huggingface" / "hub" / "models--kk--nano-base"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (repo / "blobs").mkdir()
    shutil.copy(nano_files["small_base"], repo / "blobs" / "b")
    (snapshot / "base.gguf").symlink_to("../../blobs/b")
    studio = person_home / ".lmstudio" / "models" / "kk" / "nano-cpt"
    studio.mkdir(parents=True)
    shutil.copy(nano_files["small_cpt"], studio / "cpt.gguf")
    return {
        "large_ins": ("ollama:nano", blob),
        "small_base": ("hf:kk/nano-base/base.gguf", repo / "blobs" / "b"),
        "small_cpt": ("lmstudio:kk/nano-cpt/cpt.gguf", studio / "cpt.gguf"),
    }


def options(sources):
    return [w for role, s in sources.items() for w in (f"--{role.replace('_', '-')}", s)]


def refusal(result, code=1):
    said = result.stderr.decode()
    assert result.returncode == code, said
    assert code == 2 or said.count("\n") == 1
    return said


# -- create -----------------------------------------------------------------------------------


def test_a_trio_of_other_programs_files_is_made_by_links_and_answers(held, trimix):
    sources = {role: source for role, (source, _) in held.items()}
    assert trimix("create", "mine", *options(sources), "--language", "kk").stdout == b"mine\n"
    trio = store.resolve("mine")
    for role, (_, file) in held.items():
        assert os.path.samefile(trio.path(role), file) and not trio.path(role).is_symlink()
        assert trio.models[role].n_bytes == file.stat().st_size
    assert trio.languages == ("kk",)
    assert store.verify(trio)["large_ins"] == "whole"  # Ollama names a file by its SHA-256
    assert "here already" in refusal(trimix("create", "mine", *options(sources)))
    held["large_ins"][1].unlink()  # as `ollama rm` does
    arguments = ("Қазақстан", "--temperature", 0, "-n", 4)
    answer = trimix("generate", *arguments, "--trio", "mine")
    assert answer.returncode == 0 and answer.stdout == trimix("generate", *arguments).stdout
    assert trimix("remove", "mine").returncode == 0 and held["small_cpt"][1].is_file()


def test_a_file_that_cannot_be_linked_is_named_by_its_path(held, monkeypatch):
    from trimix_gguf.trios import creating

    def refuse(*_):
        raise OSError("another disk")

    monkeypatch.setattr(creating.os, "link", refuse)
    trio, _ = creating.create("far", {role: file for role, (_, file) in held.items()})
    assert all(trio.path(role) == file for role, (_, file) in held.items())
    assert not trio.missing() and [p.name for p in trio.folder.iterdir()] == ["trio.toml"]


def test_an_adapter_and_a_folder_of_one_file(nano_files, adapter, checkpoint, person_home, trimix):
    lora, folder = person_home / "kk.gguf", person_home / "one"
    convert_lora(adapter, checkpoint, lora)
    folder.mkdir()
    shutil.copy(nano_files["large_ins"], folder / "any.gguf")
    base = nano_files["small_base"]
    sources = {"large_ins": folder, "small_base": base, "small_cpt_lora": lora}
    done = trimix("create", "lora", *options(sources), "--json")
    assert json.loads(done.stdout)["name"] == "lora", done.stderr
    trio = store.resolve("lora")
    assert trio.models["small_cpt"].adapter_of == "small_base"
    done = trimix("generate", "Қазақстан", "--trio", "lora", "-n", 2)
    assert done.returncode == 0, done.stderr
    sources["small_cpt"] = sources.pop("small_cpt_lora")
    assert "--small-cpt-lora" in refusal(trimix("create", "other", *options(sources)))


def test_a_model_in_several_files_is_linked_whole(nano_files, person_home, trimix):
    parts = split_gguf(nano_files["large_ins"], person_home / "large", 3)
    sources = {**nano_files, "large_ins": parts[0]}
    assert trimix("create", "split", *options(sources)).returncode == 0
    trio = store.resolve("split")
    assert not trio.missing()
    links = sorted(p.name for p in trio.folder.glob("large_ins-*.gguf"))
    assert links == [f"large_ins-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_files_of_other_vocabularies_make_no_trio(nano_files, person_home, trimix):
    token = max(read_gguf(nano_files["small_cpt"]).array("tokenizer.ggml.tokens"), key=len)
    raw = nano_files["small_cpt"].read_bytes()
    assert raw.count(token) == 1
    (person_home / "other.gguf").write_bytes(raw.replace(token, token.decode()[::-1].encode()))
    sources = {**nano_files, "small_cpt": person_home / "other.gguf"}
    assert "small_cpt" in refusal(trimix("create", "mixed", *options(sources)))
    assert store.installed() == [] and not list(store.trios_folder().glob(".*"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ollama:nan", "did you mean ollama:nano"),
        ("hf:kk/nothing", "--found"),
        ("none.gguf", "no such file"),
        ("hf:kk/nano-base/other.gguf", "did you mean hf:kk/nano-base/base.gguf"),
    ],
)
def test_what_is_not_here_is_one_line(held, trimix, source, words):
    sources = {role: named for role, (named, _) in held.items()} | {"large_ins": source}
    assert words in refusal(trimix("create", "x", *options(sources)))


def test_a_folder_of_several_models_asks_for_one(held, nano_files, person_home, trimix):
    sources = {role: named for role, (named, _) in held.items()}
    folder = nano_files["large_ins"].parent
    said = refusal(trimix("create", "x", *options({**sources, "large_ins": folder})))
    assert "3 models" in said and "name one" in said
    (person_home / "empty").mkdir()
    said = refusal(trimix("create", "x", *options({**sources, "large_ins": person_home / "empty"})))
    assert "no GGUF" in said


def test_what_other_programs_hold_is_listed(held, trimix):
    assert {found.source for found in everywhere()} == {
        "ollama:nano:latest",
        *(source for source, _ in list(held.values())[1:]),
    }
    listed = json.loads(trimix("create", "--found", "--json").stdout)["found"]
    assert {found["n_bytes"] for found in listed} == {f.stat().st_size for _, f in held.values()}
    shown = trimix("create", "--found").stdout.decode()
    assert "ollama:nano:latest" in shown and len(shown.splitlines()) == 3


def test_wrong_options_of_create(trimix):
    assert "NAME" in refusal(trimix("create"), 2)
    both = ("create", "x", "--small-cpt", "a", "--small-cpt-lora", "b")
    assert "not both" in refusal(trimix(*both), 2)


# -- disk -------------------------------------------------------------------------------------


def used(**wanted):
    found = [u for u in disk_use() if all(getattr(u, k) == v for k, v in wanted.items())]
    assert len(found) == 1, disk_use()
    return found[0]


def test_each_file_counts_once_and_what_is_freed_is_told(held, trimix):
    sources = options({role: source for role, (source, _) in held.items()})
    for name in ("one", "two"):
        assert trimix("create", name, *sources).returncode == 0
    whole = sum(file.stat().st_size for _, file in held.values())
    first, second = used(kind="trio", name="one"), used(kind="trio", name="two")
    assert first.n_bytes - whole < 10_000 and second.n_bytes < 10_000
    assert first.frees < 10_000 and first.how == "trimix remove one"  # others hold the files
    for _, file in held.values():
        file.unlink()
    trimix("remove", "two")
    assert used(kind="trio", name="one").frees == first.n_bytes


def test_trios_and_runs_are_no_caches_where_a_system_has_all_in_one_folder(
    held, person_home, trimix, monkeypatch
):
    """Bug: Windows does, and `trimix disk` said there: cache trios, delete …/trios."""
    monkeypatch.setenv("TRIMIX_CACHE", str(person_home / "data"))
    sources = options({role: source for role, (source, _) in held.items()})
    assert trimix("create", "one", *sources).returncode == 0
    for name in ("adapt/kk/state", "tune/a.jsonl"):
        file = person_home / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"a" * 900)
    caches = {use.name for use in disk_use() if use.kind == "cache"}
    assert caches - {"notes"} == {"tune"}


def test_without_a_home_folder_there_are_no_caches(monkeypatch):
    """Bug: a traceback, where TRIMIX_HOME was set and TRIMIX_CACHE was not."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(disk, "cache_folder", no_home)
    assert disk_use() == []


def test_work_caches_leftovers_and_files_elsewhere_are_told(nano_files, person_home, trimix):
    folder = store.installed_folder("far")
    folder.mkdir(parents=True)
    for role in ROLES:
        (folder / f"{role}.gguf").symlink_to(nano_files[role])
    shutil.copy(nano_files["large_ins"].parent / "trio.toml", folder)
    sizes = {
        person_home / "data" / "adapt" / "kk" / "state": 5_000,
        store.trios_folder() / "begun" / ".pull" / "large_ins.part": 7_000,
        cache_folder() / "tune" / "a.jsonl": 900,
        cache_folder() / "costs.json": 80,
        person_home / "prompts" / "kept": 3_000,
    }
    for file, size in sizes.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"a" * size)
    assert used(kind="adapt", name="kk").n_bytes == 5_000
    assert "trimix pull begun" in used(kind="unfinished").how
    assert used(kind="unfinished").n_bytes == 7_000
    assert used(kind="cache", name="tune").n_bytes == 900
    assert used(kind="cache", name="notes").n_bytes == 80
    large = used(kind="model", name="large_ins of far")
    assert large.n_bytes == nano_files["large_ins"].stat().st_size and large.frees == 0
    told = json.loads(trimix("disk", person_home / "prompts", "--json").stdout)
    assert {"prompts", "kk", "begun"} <= {use["name"] for use in told["uses"]}
    assert told["n_bytes"] == sum(use["n_bytes"] for use in told["uses"])
    shown = trimix("disk").stdout.decode()
    assert "in all" in shown and "trimix remove far" in shown
    assert "no such folder" in refusal(trimix("disk", person_home / "none"))
