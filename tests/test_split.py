"""One model may be several files: each command sees all of them, or refuses the model."""

import shutil
import tarfile
from dataclasses import replace

import pytest
from conftest import KAZAKH
from split_gguf import split_gguf

from trimix_gguf import Trio
from trimix_gguf.convert.check import check_trio
from trimix_gguf.convert.quantize import quantize_gguf
from trimix_gguf.errors import ModelFileError, TrioFileError
from trimix_gguf.evaluation.run_files.record import fingerprint
from trimix_gguf.machine import memory
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.hashes import kept_sha256, sha256_of
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.parts import n_bytes_of, parts_of
from trimix_gguf.roles import ROLES
from trimix_gguf.trios import store
from trimix_gguf.trios.bundle import export_trio, import_trio
from trimix_gguf.trios.pull_plan import plan_pull
from trimix_gguf.trios.pulling import pull
from trimix_gguf.trios.triofile import ModelEntry, TrioFile


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "trios"


@pytest.fixture
def trio(tmp_path, nano_files):
    """The nano trio, large_ins in three files of which the first holds no tensor."""
    folder = tmp_path / "mine"
    folder.mkdir()
    split_gguf(nano_files["large_ins"], folder / "large", 3, empty_first=True)
    for role in ROLES[1:]:
        shutil.copy(nano_files[role], folder)
    models = {role: ModelEntry(path=f"{role}.gguf") for role in ROLES}
    models["large_ins"] = ModelEntry(path="large-00001-of-00003.gguf")
    made = TrioFile(folder, "mine", models, n_ctx=64)
    made.write()
    return made


def test_a_split_model_is_read_as_the_whole_one(trio, nano_files):
    whole, parts = read_gguf(nano_files["large_ins"]), read_gguf(trio.path("large_ins"))
    assert {t.name: t.n_bytes for t in parts.tensors} == {t.name: t.n_bytes for t in whole.tensors}
    assert parts.file_size == n_bytes_of(trio.path("large_ins")) > whole.file_size
    small = {role: read_gguf(nano_files[role]) for role in ROLES[1:]}
    loadings = dict.fromkeys(ROLES, Loading())
    needs = [
        memory.estimate(memory.Models({"large_ins": f, **small}, loadings)) for f in (whole, parts)
    ]  # fmt: skip
    assert needs[0] == needs[1]


def test_check_counts_all_parts_and_quantize_reads_them(trio, nano_files, tmp_path):
    report = check_trio(**trio.paths())["models"]["large_ins"]
    whole = check_trio(**nano_files)["models"]["large_ins"]
    assert report["n_parameters"] == whole["n_parameters"]
    assert report["bytes"] == n_bytes_of(trio.path("large_ins"))
    types = []
    for source in (trio.path("large_ins"), nano_files["large_ins"]):
        quantize_gguf(source, tmp_path / "x.gguf", type="q4_0", requantize=True, force=True)
        types.append({t.name: t.type for t in read_gguf(tmp_path / "x.gguf").tensors})
    assert types[0] == types[1]


@pytest.mark.parametrize("target", ["x.tar", "x"])
def test_a_split_model_travels_whole(home, trio, tmp_path, target):
    """Only the first part was exported, and called whole."""
    export_trio(trio, tmp_path / target)
    if target == "x.tar":
        with tarfile.open(tmp_path / target) as tar:
            names = tar.getnames()
        assert names[1:4] == [f"large_ins-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    there = import_trio(tmp_path / target)
    assert there.path("large_ins").name == "large_ins-00001-of-00003.gguf"
    assert [p.read_bytes() for p in parts_of(there.path("large_ins"))] == [
        p.read_bytes() for p in parts_of(trio.path("large_ins"))
    ]
    assert store.verify(there) == dict.fromkeys(ROLES, "whole")
    export_trio(there, tmp_path / target)  # an older export is brought up to date
    assert import_trio(tmp_path / target) == there
    assert store.read_folder(there.folder).missing() == []
    last = parts_of(there.path("large_ins"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1] + b"x")
    assert store.verify(there)["large_ins"] == "altered"
    last.write_bytes(content[:-1])
    assert store.verify(there)["large_ins"] == "altered"
    last.unlink()
    assert store.verify(there)["large_ins"] == "missing"
    with pytest.raises(TrioFileError, match="00003-of-00003.gguf is not there"):
        there.check_files()
    with pytest.raises(TrioFileError, match="00003-of-00003.gguf"):
        export_trio(there, tmp_path / "again.tar")
    store.remove("mine")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("target", ["x.tar", "x"])
def test_a_bundle_that_lacks_a_part_is_refused(home, trio, tmp_path, target):
    export_trio(trio, tmp_path / "x")
    (tmp_path / "x" / "large_ins-00002-of-00003.gguf").unlink()
    if target == "x.tar":
        with tarfile.open(tmp_path / target, "w") as tar:
            for path in sorted((tmp_path / "x").iterdir(), reverse=True):
                tar.add(path, path.name)
    with pytest.raises(TrioFileError, match="00002-of-00003.gguf"):
        import_trio(tmp_path / target)
    assert not (home / "mine").exists()


def test_a_split_model_of_ones_own_is_pulled_whole(home, trio):
    there = pull(plan_pull(replace(trio, name="pulled")))
    assert store.verify(there) == dict.fromkeys(ROLES, "whole")
    assert len(list(there.folder.glob("large-*"))) == 3


def test_every_hash_is_of_all_parts(trio):
    path = trio.path("large_ins")
    before = sha256_of(path), kept_sha256(path), fingerprint(path)["sha256"]
    assert len(set(before)) == 1 and fingerprint(path)["bytes"] == n_bytes_of(path)
    last = parts_of(path)[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    fingerprint.cache_clear()
    after = sha256_of(path), kept_sha256(path), fingerprint(path)["sha256"]
    assert len(set(after)) == 1 and after != before


def test_it_answers_as_the_whole_one(trio, nano_files):
    answers = []
    for paths in (nano_files, trio.paths()):
        with Trio.load(**paths, n_ctx=64, n_threads=1) as opened:
            opened.prefill(opened.prompt(KAZAKH))
            answers.append(opened.rows()["large_ins"].tobytes())
    assert answers[0] == answers[1]


def test_parts_that_do_not_belong_together_are_refused(trio, tmp_path):
    path = trio.path("large_ins")
    _, second, third = parts_of(path)

    def refusal(file=path):
        with pytest.raises(ModelFileError) as caught:
            read_gguf(file)
        return str(caught.value)

    assert "give the first file" in refusal(third)
    alone = shutil.copy(path, tmp_path / "alone.gguf")
    assert "a whole model by its name, and number 0 from 0 of 3" in refusal(alone)
    content = third.read_bytes()
    shutil.copy(second, third)
    assert "is 3 of 3 by its name, and number 1 from 0" in refusal()
    third.write_bytes(content[:-1])
    assert "cut off" in refusal()
    third.unlink()
    assert "00003-of-00003.gguf: no such file" in refusal()


def test_a_name_that_counts_no_parts_is_a_file_like_any_other(tmp_path):
    """Bug: a ValueError, for there was no first of no files."""
    path = tmp_path / "X-00001-of-00000.gguf"
    assert parts_of(path) == [path]
