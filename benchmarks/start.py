"""What the self-test adds to a start, or with --trio how long `trimix chat` takes to its prompt.

The self-test: processes that only load llama.cpp, in turn: without it, with a kept verdict, and
with none. The ratio is by rounds. In the process itself, a kept verdict costs `check_ms`.

A chat: at a terminal, to the prompt, where the system has the models' files in memory (warm), where
it has to read them from the disk (cold), and where no verdict on the files is kept yet either
(first). Copies of the files are used: what another process maps would stay in memory. Linux only.
"""

import argparse
import json
import os
import pty
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import cpu_name, spread

from trimix_gguf.trios.store import resolve

LOAD = [sys.executable, "-c", "import trimix_gguf.machine.native"]
CHECK = """
import statistics, time
from trimix_gguf.machine import self_test
self_test.require()
def once():
    started = time.perf_counter()
    self_test.require()
    return time.perf_counter() - started
print(statistics.median(once() for _ in range(50)) * 1e3)
"""


def seconds(environment: dict[str, str]) -> float:
    """Seconds that a process takes to load llama.cpp."""
    started = time.perf_counter()
    subprocess.run(LOAD, env=environment, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trio", metavar="NAME|FILE|DIR", help="time `trimix chat` with this trio")
    options = parser.parse_args()
    kind = self_test if options.trio is None else partial(chat, options.trio)
    result = kind(options.rounds)
    for key, value in result.items():
        print(f"{key}: {value}")
    print(json.dumps(result))


def self_test(rounds: int) -> dict[str, Any]:
    """What a kept verdict and the first start of a build add."""
    added: dict[str, list[float]] = {"kept": [], "first": []}
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as kept:
        known = {**os.environ, "TRIMIX_CACHE": kept}
        known.pop("TRIMIX_SELF_TEST", None)
        seconds(known)
        for _ in range(rounds):
            plain.append(seconds({**known, "TRIMIX_SELF_TEST": "0"}))
            added["kept"].append(seconds(known) - plain[-1])
            with tempfile.TemporaryDirectory() as empty:
                added["first"].append(seconds({**known, "TRIMIX_CACHE": empty}) - plain[-1])
        check = subprocess.run([sys.executable, "-c", CHECK], env=known, capture_output=True)
    return {
        "cpu": cpu_name(),
        "n": rounds,
        "plain_s": statistics.median(plain),
        **{f"{name}_adds_s": spread(values) for name, values in added.items()},
        "check_ms": float(check.stdout),
    }


def chat(trio: str, rounds: int) -> dict[str, Any]:
    """Seconds from the start of `trimix chat` to its prompt."""
    took: dict[str, list[float]] = {"first": [], "cold": [], "warm": []}
    computed: dict[str, list[float]] = {name: [] for name in took}
    cache = Path()
    with tempfile.TemporaryDirectory() as kept:
        arguments, n_bytes = [], 0
        for path, option in files_of(trio).items():
            copy = Path(shutil.copy(path, kept))
            arguments += [option, str(copy)]
            n_bytes += copy.stat().st_size
        for i in range(rounds):
            for name, times in took.items():
                if name != "warm":
                    drop_pages(Path(kept))
                if name == "first":
                    cache = Path(kept, f"cache-{i}")  # an empty one; the other two then have it
                environment = {**os.environ, "TRIMIX_CACHE": str(cache)}
                seconds, cpu_seconds = to_the_prompt(arguments, environment)
                times.append(seconds)
                computed[name].append(cpu_seconds)
    return {
        "cpu": cpu_name(),
        "n": rounds,
        "trio": resolve(trio).name,  # no path of this machine
        "mib": round(n_bytes / (1 << 20)),
        **{f"{name}_s": spread(times) for name, times in took.items()},
        **{f"{name}_cpu_s": spread(times) for name, times in computed.items()},
    }


def files_of(trio: str) -> dict[Path, str]:
    """A trio's files, and the options that name them."""
    arguments = resolve(trio).load_arguments()
    names = ("large_ins", "small_base", "small_cpt", "small_cpt_lora")
    return {arguments[n]: f"--{n.replace('_', '-')}" for n in names if arguments.get(n)}


def drop_pages(folder: Path) -> None:
    """Have the system forget what it holds of the files."""
    for path in folder.glob("*.gguf"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def to_the_prompt(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from the start of a chat at a terminal until it takes a message; those of CPUs.

    Of CPUs to its end: on a busy machine they say what an idle one would need.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "trimix_gguf.cli", "chat", *arguments]
    started, seen = time.perf_counter(), b""
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    ) as process:
        os.close(slave)
        while b">" not in seen.partition(b"lists the commands")[2]:
            seen += os.read(master, 65536)
        seconds = time.perf_counter() - started
        process.terminate()
        process.wait()
    os.close(master)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
