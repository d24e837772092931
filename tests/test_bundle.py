"""A trio on a stick: what is exported is imported byte for byte, or refused and not seen."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import KAZAKH
from small_trio import contents, refused, snapshot

from trimix_gguf.errors import TrioFileError
from trimix_gguf.roles import ROLES
from trimix_gguf.trios import bundle_files, store
from trimix_gguf.trios.bundle import export_trio, import_trio

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from kills import FORMS, kill_many  # noqa: E402

# -- as a user does ---------------------------------------------------------------------------


def test_a_trio_goes_to_another_machine_and_answers_there(trimix, tmp_path, monkeypatch):
    tar = tmp_path / "x.tar"
    assert trimix("export", "nano", tar).stdout.decode().strip() == str(tar)
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "other"))
    assert trimix("import", tar, "--name", "carried").stdout.decode().strip() == "carried"
    assert trimix("verify", "carried").returncode == 0
    arguments = ("generate", KAZAKH, "-n", "4", "--temperature", "0", "--json")
    here, there = trimix(*arguments), trimix(*arguments, "--trio", "carried")
    assert json.loads(here.stdout)["text"] == json.loads(there.stdout)["text"]
    folder = tmp_path / "stick"
    assert trimix("export", "carried", folder).returncode == 0
    assert trimix("import", folder, "--name", "again").returncode == 0
    assert store.verify(store.resolve("again")) == dict.fromkeys(ROLES, "whole")
    assert trimix("import", tar).stdout.decode().strip() == "nano"  # the same as the shipped one
    assert not (tmp_path / "other" / "trios" / "nano").exists()


# -- laws -------------------------------------------------------------------------------------


def test_what_is_imported_is_what_was_exported(home, small, bundle):
    there = import_trio(bundle)
    assert contents(there) == contents(small)
    assert store.resolve("small") == there and there.folder == home / "small"
    assert there.n_ctx == 64 and there.languages == ("kk",)
    assert store.verify(there) == dict.fromkeys(ROLES, "whole")
    assert sorted(p.name for p in there.folder.iterdir()) == sorted(
        ["trio.toml", *(f"{role}.gguf" for role in ROLES)]
    )


def test_an_adapter_stays_one(home, small, tmp_path):
    export_trio(small.with_model("small_cpt", adapter_of="small_base"), tmp_path / "x.tar")
    there = import_trio(tmp_path / "x.tar")
    assert there.paths()["small_cpt_lora"] == home / "small" / "small_cpt_lora.gguf"


def test_three_files_in_a_folder_are_exported_too(home, tmp_path, nano_files):
    folder = tmp_path / "three"
    folder.mkdir()
    for path in nano_files.values():
        shutil.copy(path, folder)
    export_trio(store.read_folder(folder), tmp_path / "x.tar")
    there = import_trio(tmp_path / "x.tar")
    assert there.name == "three" and contents(there) == contents(store.resolve("nano"))


def test_the_same_trio_gives_the_same_plain_tar(small, tmp_path):
    one, other = tmp_path / "one.tar", tmp_path / "other.TAR"
    export_trio(small, one)
    os.utime(small.path("small_cpt"), (1, 1))
    export_trio(small, other)
    assert one.read_bytes() == other.read_bytes()
    with tarfile.open(one, "r:") as tar:
        assert tar.getnames() == ["trio.toml", *(f"{role}.gguf" for role in ROLES)]
        assert all(member.isreg() for member in tar)


def test_progress_goes_up_to_all_bytes(home, small, tmp_path):
    for run in (lambda p: export_trio(small, tmp_path / "x.tar", progress=p),
                lambda p: export_trio(small, tmp_path / "x", progress=p),
                lambda p: export_trio(small, tmp_path / "x", progress=p),
                lambda p: import_trio(tmp_path / "x.tar", progress=p)):  # fmt: skip
        seen = []
        run(lambda what, done, total, seen=seen: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1] >= sum(map(len, contents(small).values()))


def test_importing_again_changes_nothing_and_another_trio_needs_another_name(home, small, bundle):
    first = import_trio(bundle)
    before = snapshot(home)
    assert import_trio(bundle) == first and snapshot(home) == before
    other = first.path("small_cpt")
    other.write_bytes(b"x")
    first.with_model("small_cpt", sha256=hashlib.sha256(b"x").hexdigest(), n_bytes=1).write()
    refused(bundle, "--name", home)
    assert import_trio(bundle, name="second").name == "second"
    refused(bundle, "name", home, name="a/b")


def test_settings_that_differ_are_named_and_nothing_is_taken(home, small, bundle):
    """Bug: a newer export, tuned since, was "complete", and the trio stayed as it had been."""
    there = import_trio(bundle)
    export_trio(replace(small, n_ctx=256, languages=("ug",)), bundle)
    refused(bundle, "languages, n_ctx", home)
    assert import_trio(bundle, name="second").n_ctx == 256
    store.remove(there.name)
    assert import_trio(bundle).n_ctx == 256


def test_an_altered_trio_is_not_taken_for_the_one_that_is_imported(home, small, bundle, trimix):
    """Bug: after `trimix verify` said to import again, it was "complete", and as it had been."""
    path = import_trio(bundle).path("small_cpt")
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    told = trimix("verify", "small")
    assert told.returncode == 1 and b"trimix remove small" in told.stderr
    refused(bundle, "trimix remove small", home)
    store.remove("small")
    assert contents(import_trio(bundle)) == contents(small)


def test_an_export_is_brought_up_to_date(home, small, bundle):
    for content in (b"newer", b"newest", b"NEWEST"):  # also where only the bytes differ
        small.path("small_cpt").write_bytes(content)
        export_trio(small, bundle)
        assert contents(import_trio(bundle)) == contents(small)
        store.remove("small")


def test_an_export_takes_nothing_elses_place(small, tmp_path):
    folder, file = tmp_path / "full", tmp_path / "letter.tar"
    folder.mkdir()
    (folder / "letter").write_text("dear")
    file.write_text("dear")
    export_trio(replace(small, name="other"), tmp_path / "other")
    before = snapshot(tmp_path)
    for target in (folder, file, tmp_path / "other", small.folder, folder / "letter"):
        with pytest.raises(TrioFileError, match="name"):
            export_trio(small, target)
    assert snapshot(tmp_path) == before


def test_an_altered_trio_is_not_exported(small, tmp_path):
    for role, entry in small.models.items():
        content = (small.folder / entry.path).read_bytes()
        small = small.with_model(role, sha256=hashlib.sha256(content).hexdigest())
    small.path("small_cpt").write_bytes(b"altered")
    for target in (tmp_path / "x.tar", tmp_path / "x"):
        with pytest.raises(TrioFileError, match="small_cpt.bin is not what trio.toml says"):
            export_trio(small, target)
        assert not target.exists() or not (target / "trio.toml").exists()
    small.path("small_cpt").unlink()
    with pytest.raises(TrioFileError, match="small_cpt"):
        export_trio(small, tmp_path / "y.tar")
    assert not list(tmp_path.glob(".*"))


# -- kills ------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_shows_no_half_trio_and_the_next_completes_it(form, tmp_path):
    assert kill_many(form, "nano", tmp_path, n=6, seed=0).total() == 6


def test_ctrl_c_leaves_nothing(home, small, tmp_path):
    export_trio(small, tmp_path / "x.tar")

    def interrupt(what, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_trio(tmp_path / "x.tar", progress=interrupt)
    assert list(home.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        export_trio(small, tmp_path / "y.tar", progress=interrupt)
    assert not list(tmp_path.glob("*y.tar*"))


# -- disks ------------------------------------------------------------------------------------


def test_a_disk_too_small_is_told_before_anything_is_written(home, small, tmp_path, monkeypatch):
    export_trio(small, tmp_path / "x.tar")
    usage = namedtuple("usage", "total used free")(10_000, 0, 10_000)
    monkeypatch.setattr(bundle_files.shutil, "disk_usage", lambda folder: usage)
    refused(tmp_path / "x.tar", "0.0 MB free", home)
    for target in (tmp_path / "y.tar", tmp_path / "y"):
        with pytest.raises(TrioFileError, match="0.0 MB free"):
            export_trio(small, target)
        assert not target.exists() or not any(target.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="sets a limit of Unix")
@pytest.mark.parametrize("name", ["x.tar", "x"])
def test_a_file_system_that_takes_no_file_so_large_is_one_line(tmp_path, name):
    """As FAT32 at 4 GiB, where it is not known to be one: here the limit is 8 MB."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000,) * 2)\n"
        f"import sys; sys.argv = ['trimix', 'export', 'nano', {str(tmp_path / name)!r}]\n"
        "from trimix_gguf.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "FAT32: 4 GiB" in result.stderr and "exFAT" in result.stderr
    assert ("export to a folder" in result.stderr) == (name == "x.tar")
    assert not (tmp_path / "x.tar").exists() and not (tmp_path / "x" / "trio.toml").exists()
    assert not list(tmp_path.glob(".x.tar*"))


def test_fat32_is_told_before_4_gib_are_written(small, tmp_path, monkeypatch):
    mount = namedtuple("mount", "mountpoint fstype")
    mounts = [mount("/", "ext4"), mount(str(tmp_path), "vfat")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda: mounts)
    monkeypatch.setattr(bundle_files, "FAT32_LIMIT", 6000)  # below it each file, above it the tar
    export_trio(small, tmp_path / "x")
    with pytest.raises(TrioFileError, match="export to a folder"):
        export_trio(small, tmp_path / "x.tar")
    mounts.append(mount(str(tmp_path / "deeper"), "exfat"))
    export_trio(small, tmp_path / "deeper" / "x.tar")
    small.path("small_cpt").write_bytes(bytes(6000))
    with pytest.raises(TrioFileError, match="format it as exFAT"):
        export_trio(small, tmp_path / "y")
