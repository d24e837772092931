"""Files that are there whole or not at all, for any number of processes."""

import os
import subprocess
import sys

import pytest

from trimix_gguf.machine.files import whole_file, write_text


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


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_until_the_block_ends_the_old_file_stays_and_a_failure_leaves_nothing(tmp_path, failure):
    out = tmp_path / "out"
    write_text(out, "old\n")
    with pytest.raises(failure), whole_file(out) as unfinished:
        unfinished.write_bytes(b"half")
        assert out.read_bytes() == b"old\n"
        raise failure
    assert out.read_bytes() == b"old\n" and list(tmp_path.iterdir()) == [out]
