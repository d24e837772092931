"""A small trio, and what an import of it may do: fixtures of the tests of export and import."""

import random

import pytest

from trimix_gguf.errors import TrioFileError
from trimix_gguf.roles import ROLES
from trimix_gguf.trios.bundle import export_trio, import_trio
from trimix_gguf.trios.triofile import ModelEntry, TrioFile


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "trios"


@pytest.fixture
def small(tmp_path):
    """A trio of a few kilobytes, where only its bytes count; large_ins is in a folder below."""
    draw = random.Random(0)
    folder = tmp_path / "small"
    folder.mkdir()
    models = {}
    for role in ROLES:
        name = "below/large.bin" if role == "large_ins" else f"{role}.bin"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(draw.randbytes(draw.randrange(3000, 5000)))
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
