"""Files that are there whole or not at all, for any number of processes."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from trimix_gguf.machine.files import temporary_path, whole_file, write_text, writer_of
from trimix_gguf.machine.hashes import kept_sha256
from trimix_gguf.machine.packed import open_unpacked, packing_writer


def test_what_a_killed_process_left_is_removed_and_a_running_ones_file_is_not(tmp_path):
    """Bug: two conversions to one output wrote into one temporary file, and left no GGUF."""
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    left = tmp_path / f".out.{ended.strip()}.part"
    running = tmp_path / f".out.{os.getppid()}.part"
    for path in (left, running):
        path.write_bytes(b"x")
    write_text(tmp_path / "out", "new")
    assert not left.exists() and running.read_bytes() == b"x"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_kept_hash_is_not_that_of_other_bytes_with_the_same_size_and_time(tmp_path, in_place):
    """Bug: an export's tar gives every file the time 0, and a new file may get the old number."""
    file, hashes = tmp_path / "model.gguf", set()
    for content in (b"one", b"two", b"six"):
        if not in_place:
            file.unlink(missing_ok=True)
        file.write_bytes(content)
        os.utime(file, (0, 0))
        hashes.add(kept_sha256(file))
        time.sleep(0.02)  # a file system counts in steps
    assert len(hashes) == 3


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_until_the_block_ends_the_old_file_stays_and_a_failure_leaves_nothing(tmp_path, failure):
    out = tmp_path / "out"
    write_text(out, "old\n")
    with pytest.raises(failure), whole_file(out) as unfinished:
        unfinished.write_bytes(b"half")
        assert out.read_bytes() == b"old\n"
        raise failure
    assert out.read_bytes() == b"old\n" and list(tmp_path.iterdir()) == [out]


def test_every_temporary_name_is_another_and_says_whose_it_is(tmp_path):
    """Bug: two threads of one process wrote into one temporary file."""
    out = tmp_path / "out"
    with temporary_path(out, "part") as one, temporary_path(out, "part") as other:
        assert one != other
        one.mkdir()
        (one / "x").touch()
        assert writer_of(out) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f".out.{os.getppid()}-0.part").touch()
    (tmp_path / ".out.99999999-0.part").touch()
    assert writer_of(out) == os.getppid() and writer_of(tmp_path / "other") is None


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".zst"])
def test_what_is_packed_is_read_again_and_the_same_bytes_give_the_same_file(
    tmp_path, monkeypatch, ending
):
    if ending == ".zst":
        pytest.importorskip("zstandard")
    content, files = "қазақ\n".encode() * 999, []
    for second in (1, 2):  # gzip has a place for the time and for the file's name
        monkeypatch.setattr(time, "time", lambda second=second: 1e9 + second)
        path, name = tmp_path / f"{second}", tmp_path / f"{second}.jsonl{ending}"
        with packing_writer(path, name) as writer:
            writer.write(content)
        files.append(path.replace(name).read_bytes())
        with ExitStack() as stack:
            assert open_unpacked(name, stack).read() == content
    assert files[0] == files[1] and (files[0] == content) == (ending == "")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
def test_a_packed_file_that_is_cut_short_is_no_shorter_text(tmp_path, ending):
    """Bug: of a .zst that was fetched in part, the part was read as if it were the whole."""
    if ending == ".zst":
        pytest.importorskip("zstandard")
    content, name = os.urandom(300_000), tmp_path / f"a{ending}"
    with packing_writer(name, name) as writer:
        writer.write(content)
    whole = name.read_bytes()
    name.write_bytes(whole + whole)
    with ExitStack() as stack:
        assert open_unpacked(name, stack).read() == content * 2
    for raw in (whole[:-5], whole + whole[:-5]):
        name.write_bytes(raw)
        with ExitStack() as stack, pytest.raises(EOFError):
            open_unpacked(name, stack).read()
