"""A trio on a stick: what is exported is imported byte for byte, or refused and not seen."""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import KAZAKH

from trimix_gguf.errors import TrioFileError
from trimix_gguf.roles import ROLES
from trimix_gguf.trios import bundle_files, store
from trimix_gguf.trios.bundle import export_trio, import_trio
from trimix_gguf.trios.triofile import ModelEntry, TrioFile, to_toml

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from kills import FORMS, kill_many  # noqa: E402


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "trios"


@pytest.fixture
def small(tmp_path):
    """A trio of a few kilobytes, where only its bytes count; large_ins is elsewhere."""
    draw = random.Random(0)
    folder = tmp_path / "small"
    folder.mkdir()
    models = {}
    for role in ROLES:
        path = tmp_path / "elsewhere.bin" if role == "large_ins" else folder / f"{role}.bin"
        path.write_bytes(draw.randbytes(draw.randrange(3000, 5000)))
        name = str(path) if role == "large_ins" else path.name
        models[role] = ModelEntry(path=name, licence="CC0", adapter_of=None)
    trio = TrioFile(folder, "small", models, languages=("kk",), n_ctx=64)
    trio.write()
    return trio


@pytest.fixture(params=["bundle.tar", "bundle"])
def bundle(request, small, tmp_path):
    export_trio(small, tmp_path / request.param)
    return tmp_path / request.param


def contents(trio):
    return {role: trio.path(role).read_bytes() for role in trio.models}


def snapshot(folder):
    """Every file under a folder, with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(source, words, home, **options):
    """The import is refused in one line, and nothing of it is in the store."""
    before = snapshot(home)
    with pytest.raises(TrioFileError) as caught:
        import_trio(source, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert snapshot(home) == before
    assert not home.exists() or not any(p.name.startswith(".") for p in home.iterdir())
    return str(caught.value)


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
        (folder / path.name).symlink_to(path)
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


# -- what others may hand over ----------------------------------------------------------------


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), link
    return info, io.BytesIO(content)


def crafted(small, path, *more, text=None, without=()):
    """A tar of the small trio, with more members, another trio.toml, or some left out."""
    models = {}
    for role, content in contents(small).items():
        digest = hashlib.sha256(content).hexdigest()
        models[role] = replace(small.models[role], path=f"{role}.gguf", sha256=digest)
    text = to_toml(replace(small, models=models)) if text is None else text
    with tarfile.open(path, "w") as tar:
        own = {"trio.toml": text.encode()}
        own |= {f"{role}.gguf": content for role, content in contents(small).items()}
        for name in own.keys() - set(without):
            tar.addfile(*member(name, own[name]))
        for info, content in more:
            tar.addfile(info, content)
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (member("../evil", b"x"), "leads out"),
        (member("a/../../evil", b"x"), "leads out"),
        (member("/tmp/evil", b"x"), "leads out"),
        (member("C:\\evil", b"x"), "leads out"),
        (member("evil", kind=tarfile.SYMTYPE, link="/etc/passwd"), "not a plain file"),
        (member("evil", kind=tarfile.LNKTYPE, link="trio.toml"), "not a plain file"),
        (member("evil", kind=tarfile.CHRTYPE), "not a plain file"),
        (member("evil", kind=tarfile.BLKTYPE), "not a plain file"),
        (member("evil", kind=tarfile.FIFOTYPE), "not a plain file"),
        (member("evil", kind=tarfile.DIRTYPE), "not a plain file"),
        (member("large_ins.gguf", b"x"), "twice"),
        (member("evil", b"x"), "does not name"),
    ],
)
def test_a_tar_with_anything_but_its_files_is_refused(home, small, tmp_path, more, words):
    refused(crafted(small, tmp_path / "x.tar", more), words, home)
    assert not (tmp_path / "evil").exists() and not Path("/tmp/evil").exists()


def test_a_sparse_member_is_refused(home, small, tmp_path):
    info, content = member("evil")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": "9", "GNU.sparse.map": "0,9"}
    refused(crafted(small, tmp_path / "x.tar", (info, content)), "not a plain file", home)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("version = 1", "version = 2", "update trimix-gguf"),
        ('name = "small"', 'name = "nano"', "ships in the package"),
        ('name = "small"', 'name = "../small"', "name"),
        ('path = "small_cpt.gguf"', 'path = "../small_cpt.gguf"', "leads out"),
        ('path = "small_cpt.gguf"', 'path = "/etc/passwd"', "leads out"),
        ('path = "small_cpt.gguf"', 'path = "other.gguf"', "ends before other.gguf"),
        ('licence = "CC0"\nsha256', 'licence = "CC0"\nn_bytes = 7\nsha256', "altered"),
        ("[models.small_cpt]", "[models.large_base]", "models.small_cpt is missing"),
    ],
)
def test_a_trio_file_that_asks_for_more_is_refused(home, small, tmp_path, old, new, words):
    whole = crafted(small, tmp_path / "whole.tar")
    with tarfile.open(whole) as tar:
        text = tar.extractfile("trio.toml").read().decode()
    assert old in text
    refused(crafted(small, tmp_path / "x.tar", text=text.replace(old, new, 1)), words, home)
    bare = "\n".join(line for line in text.splitlines() if not line.startswith("sha256"))
    refused(crafted(small, tmp_path / "x.tar", text=bare), "sha256 is missing", home)


def test_what_is_no_bundle_is_refused(home, small, tmp_path, nano_files):
    refused(crafted(small, tmp_path / "x.tar", without=["trio.toml"]), "no trio.toml", home)
    refused(crafted(small, tmp_path / "x.tar", without=["small_cpt.gguf"]), "small_cpt.gguf", home)
    refused(tmp_path / "nowhere.tar", "no such file", home)
    refused(nano_files["small_cpt"], "not a plain tar", home)
    refused(tmp_path, "trio.toml", home)
    (tmp_path / "empty.tar").touch()
    refused(tmp_path / "empty.tar", "not a plain tar", home)


@pytest.mark.skipif(os.name == "nt", reason="signals, limits or pipes as POSIX has them")
def test_links_and_pipes_in_a_folder_are_refused(home, small, tmp_path):
    folder = tmp_path / "x"
    export_trio(small, folder)
    path = folder / "small_cpt.gguf"
    path.rename(tmp_path / "moved")
    refused(folder, "is missing", home)
    path.symlink_to(tmp_path / "moved")
    refused(folder, "is a link", home)
    path.unlink()
    os.mkfifo(path)
    refused(folder, "not a plain file", home)


def test_a_cut_or_altered_tar_is_refused_or_whole(home, small, tmp_path):
    """Any byte turned, any length: one line and nothing seen, or just the trio it was."""
    whole, x = tmp_path / "whole.tar", tmp_path / "x.tar"
    export_trio(small, whole)
    good, draw = whole.read_bytes(), random.Random(0)
    n_refused = 0
    for i in range(400):
        bad = bytearray(good)
        if i % 4 == 0:
            del bad[draw.randrange(len(good)) :]
        elif i % 4 == 1:  # in a header
            starts = [
                at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"
            ]
            bad[draw.choice(starts) + draw.randrange(512)] = draw.randrange(256)
        else:
            bad[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        x.write_bytes(bad)
        try:
            there = import_trio(x, name="x")
        except TrioFileError as error:
            n_refused += 1
            assert "\n" not in str(error)
            assert store.installed() == [] and not any(home.glob("*"))
        else:
            assert contents(there) == contents(small)
            store.remove("x")
    assert n_refused > 200


def test_an_altered_folder_is_refused(home, small, tmp_path):
    export_trio(small, tmp_path / "x")
    path = tmp_path / "x" / "small_base.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(tmp_path / "x", f"{path} is not what trio.toml says", home)
    path.write_bytes(content[:-1])
    refused(tmp_path / "x", f"{path} is not what trio.toml says", home)


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
