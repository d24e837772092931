"""`trimix adapt` begun again: with files in other parts, beside another run, on a fuller disk."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

for needed in ("ftfy", "datasketch", "zstandard", "fontTools"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")

from trimix_gguf.adapting import outlook  # noqa: E402
from trimix_gguf.adapting.asked import Asked  # noqa: E402
from trimix_gguf.adapting.bases import Base  # noqa: E402
from trimix_gguf.adapting.recipe import Recipe  # noqa: E402
from trimix_gguf.adapting.workplace import Workplace  # noqa: E402
from trimix_gguf.errors import DataError, ModelError  # noqa: E402
from trimix_gguf.machine.folders import home_folder  # noqa: E402
from trimix_gguf.trio.trio import NANO, Trio  # noqa: E402
from trimix_gguf.trios.store import installed_folder  # noqa: E402


def test_a_file_that_was_text_and_is_replay_is_another_wish(tmp_path):
    """Bug: the text was not read again, and replay that was never made was missing later."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("kk.txt", "en.txt"):
        (texts / name).write_text(name, encoding="utf-8")
    work = Workplace(tmp_path / "work")
    for asked in (
        Asked("kk", [texts]),
        Asked("kk", [texts / "kk.txt"], replay=[texts / "en.txt"]),
        Asked("kk", [texts / "kk.txt"], keep_out=[texts / "en.txt"]),
    ):
        work.check_asked(asked.settings(), asked.files())
        assert work.read("report.json") is None
        work.write("report.json", {})
    work.write("decided.json", {"n_steps": 1})
    work.check_asked(asked.settings(), asked.files())
    other = Asked("kk", [texts / "kk.txt"], replay=[texts / "en.txt"])
    with pytest.raises(DataError, match="--replay"):
        work.check_asked(other.settings(), other.files())


def test_a_second_dry_run_leaves_the_first_one_its_folder(adapt, text_file):
    """Bug: it was refused, and then deleted the files that the first one was working at."""
    first = Workplace(home_folder() / "adapt" / ".kk-dry-run")
    with first.held():
        first.write("asked.json", {})
        done = adapt("kk", text_file, "--dry-run")
        assert "another process works" in str(done.exception)
        assert first.read("asked.json") == {}
    assert adapt("kk", text_file, "--dry-run").exit_code == 0 and not first.folder.exists()


def test_a_picture_that_cannot_be_written_costs_nothing_else(
    adapt, text_file, tmp_path, with_torch
):
    """Bug: the run's folder stayed, and the trio was not tuned."""
    options = ("--tokens", 2048, "--no-tune", "--plot", tmp_path / "absent" / "a.png")
    done = adapt("kk", text_file, *options)
    assert isinstance(done.exception, OSError) and "kk is complete" in done.stderr
    assert done.stdout.strip() == str(installed_folder("kk"))
    assert not list((home_folder() / "adapt").iterdir())


def test_a_trio_that_cannot_be_measured_is_complete(adapt, text_file, monkeypatch, with_torch):
    """Bug: the run ended as if it had failed, its folder stayed, and the name was taken."""
    monkeypatch.setattr(Trio, "load", lambda **_: (_ for _ in ()).throw(ModelError("no memory")))
    done = adapt("kk", text_file, "--tokens", 2048)
    assert done.exit_code == 0 and done.stdout.strip() == str(installed_folder("kk"))
    assert done.stderr.count("not measured: no memory") == 2 and "kk is complete" in done.stderr
    assert not list((home_folder() / "adapt").iterdir())


def test_an_output_on_another_full_disk_is_absent_not_half(
    adapt, text_file, tmp_path, monkeypatch, with_torch
):
    """Bug: half a file had the output's name, and the same command refused to replace it."""
    out = tmp_path / "disk" / "a.gguf"
    out.parent.mkdir()

    def rename(source, target):
        raise OSError(errno.EXDEV, "another disk")

    def copy(source, target, **_):
        Path(target).write_bytes(b"GGUF")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "rename", rename)
        full.setattr(shutil, "copyfile", copy)
        done = adapt("kk", text_file, "--tokens", 2048, "-o", out)
        assert "No space left" in str(done.exception)
    assert not list(out.parent.iterdir())
    assert adapt("kk", text_file, "--tokens", 2048, "-o", out).exit_code == 0 and out.is_file()


def test_what_a_run_has_on_disk_is_part_of_what_it_needs(tmp_path, monkeypatch):
    """Bug: a run that had filled half of the disk was not let go on: it would fill it again."""
    free = SimpleNamespace(free=5 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    arguments = (Base(NANO / "small_base.gguf"), tmp_path, outlook.Way(4))
    amount = {"n_tokens": 10**9, "n_characters": 0}
    before = outlook.look_ahead(*arguments, **amount)
    with open(tmp_path / "rows.ids", "wb") as rows:
        rows.truncate(4 << 30)
    free.free -= 4 << 30
    assert outlook.look_ahead(*arguments, **amount).free_disk == before.free_disk


def test_minutes_are_what_a_dry_run_with_minutes_says(adapt, text_file):
    """Bug: it told how long three times the text would take, and the disk for that."""
    for minutes in (30, 60):
        done = adapt("kk", text_file, "--dry-run", "--minutes", minutes)
        assert f"about {minutes} minutes on this machine" in done.stderr


@pytest.mark.parametrize(("n_steps", "between"), [(130, 22), (100, 20), (3, 20), (40, 1)])
def test_the_time_left_counts_the_measurements_that_come(n_steps, between):
    """Bug: of a run that measured for nine minutes more, it was left out."""
    recipe = Recipe(n_steps, 1e-3, "float32", steps_between_looks=between)
    for step in range(n_steps + 1):
        later = [recipe.has_look(s) for s in range(step + 1, n_steps + 1)]
        assert recipe.looks_left(step) == sum(later)
