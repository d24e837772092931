"""`trimix worker` as a user starts it: a process of its own, at a free port."""

import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from served import PATIENCE_S

from trimix_gguf.errors import BuildError
from trimix_gguf.machine import rpc

try:
    rpc.require_library()
    MISSING = ""
except BuildError as error:
    MISSING = str(error)
HAVE_WORKERS = [
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as on POSIX"),
]


@dataclass
class Running:
    """A worker that lends this machine."""

    process: subprocess.Popen
    endpoint: str

    @property
    def port(self):
        return int(self.endpoint.rpartition(":")[2])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self, how=signal.SIGTERM):
        """Its last lines, once it was told to end."""
        self.process.send_signal(how)
        return self.process.communicate(timeout=PATIENCE_S)[1].decode()


@contextmanager
def lending(*arguments, limit=None):
    """A worker that is ready; `limit` bytes of address space for each of its processes."""
    command = [sys.executable, "-m", "trimix_gguf.cli", "worker", "--port", "0", "--threads", "1"]
    command += arguments
    if limit is not None:
        command = ["sh", "-c", f'ulimit -v {limit >> 10}; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    line = process.stderr.readline().decode()
    found = re.search(r"at (\S+:\d+) ", line)
    try:
        assert found, line + process.stderr.read().decode()
        process.stderr.readline()  # its device
        yield Running(process, found[1])
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=PATIENCE_S)
        process.stderr.close()


@pytest.fixture(scope="module")
def two():
    """Two workers, and their addresses as --rpc takes them."""
    with lending() as one, lending() as other:
        yield f"{one.endpoint},{other.endpoint}"
