"""Numbers of scripts in benchmarks/ that no other test computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_checkpoint import checkpoint_folder

from trimix_gguf.machine.gguf_file import read_gguf

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
_MIB = 1 << 20

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the scripts are for POSIX")


def test_the_memory_of_a_fuzzed_command_is_its_own():
    """Bug: Linux has a child inherit the peak of its parent, and all kinds got that of fuzz.py."""
    from fuzz import asked, start

    ballast = b"1" * (300 * _MIB)
    child = start()
    try:
        end, said, memory = asked(child, ["list"])
    finally:
        child.kill()
        child.communicate()
    assert end == "well", said
    assert 10 * _MIB < memory < len(ballast)


def test_a_conversion_of_float32_is_measured_over_the_bare_interpreter(nano_files, tmp_path):
    """Bug: it ended in a traceback; and the interpreter was counted with the script's memory."""
    folder = tmp_path / "checkpoint"
    checkpoint_folder(nano_files["small_base"], folder, "F32")
    command = [sys.executable, BENCHMARKS / "convert.py", folder, "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["checkpoint"]
    assert found["over_interpreter"] > 5 * _MIB  # of the script's own, 10 MiB more are counted
    n_embd = read_gguf(nano_files["small_base"]).n_embd
    assert found["allowed"] == 200 * _MIB + 2 * 4 * 6144 * n_embd
