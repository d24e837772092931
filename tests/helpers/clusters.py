"""A Ray cluster of this machine, whose processes are killed."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from served import PATIENCE_S

has_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or not Path("/proc/self/environ").exists(),
    reason="ray is not installed, or there is no /proc",
)
has_no_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is not None, reason="ray is installed"
)


def started(*arguments):
    """A command that runs beside the test."""
    command = [sys.executable, "-m", "trimix_gguf.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    """The CompletedProcess of a command, once it has ended."""
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def processes(name):
    """Ids of Ray's processes of that name that are of this test."""
    own = f"TRIMIX_CACHE={os.environ['TRIMIX_CACHE']}".encode()
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes().split(b"\0")[0]
            if name in title and own in (folder / "environ").read_bytes():
                yield int(folder.name)
        except OSError:
            continue


def wait_for(condition, process):
    """What `condition` says, once it is true; the process must not end before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def kill_one(process, name):
    """Kill one of Ray's processes of that name."""
    os.kill(wait_for(lambda: list(processes(name)), process)[0], signal.SIGKILL)


def no_head():
    """An address of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
