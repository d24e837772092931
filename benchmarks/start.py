"""What the self-test adds to a start: the first one of a build, and each later one.

Processes that only load llama.cpp, in turn: without the self-test, with a kept verdict, and with
none. The ratio is by rounds. In the process itself, a kept verdict costs `check_ms`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import cpu_name, spread

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
    rounds = parser.parse_args().rounds
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
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "n": rounds,
        "plain_s": statistics.median(plain),
        **{f"{name}_adds_s": spread(values) for name, values in added.items()},
        "check_ms": float(check.stdout),
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
