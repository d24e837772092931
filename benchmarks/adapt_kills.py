"""`trimix adapt`, killed at random moments and completed: the same adapter as one that was not.

    python benchmarks/adapt_kills.py TEXT... [--kills 20] [--seed 0] [--tokens 60000] [--trio NAME]

Half of the kills are SIGKILL, half Ctrl-C. The last line is JSON: the largest difference between
the numbers of the two adapters.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGUFReader

ADAPTER = "small_cpt_lora.gguf"


def main() -> None:
    """Adapt once unbroken, once with kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--trio", default="nano")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        started = time.monotonic()
        run(home, "whole", options)
        took = time.monotonic() - started
        n_kills = 0
        while n_kills < options.kills and not made(home, "broken"):
            # Short beside the run, so that it lives to see all of them.
            n_kills += run(home, "broken", options, rng.uniform(2, 4 * took / options.kills), rng)
        run(home, "broken", options)
        one, other = (numbers(home / "trios" / name / ADAPTER) for name in ("whole", "broken"))
    largest = max(float(np.abs(one[name] - other[name]).max()) for name in one | other)
    found = {"kills": n_kills, "seconds": round(took), "largest_difference": largest}
    print(json.dumps({**found, "seed": options.seed, "tokens": options.tokens}))


def run(
    home: Path,
    name: str,
    options: argparse.Namespace,
    seconds: float | None = None,
    rng: random.Random | None = None,
) -> bool:
    """Adapt until the end, or for some seconds; whether it was killed."""
    command = [sys.executable, "-m", "trimix_gguf", "adapt", name, *options.texts]
    command += ["--tokens", str(options.tokens), "--trio", options.trio, "--no-tune"]
    if made(home, name):
        return False
    environment = {**os.environ, "TRIMIX_HOME": str(home)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        chosen = (rng or random).choice([signal.SIGKILL, signal.SIGINT])
        process.send_signal(chosen)
        process.wait()
        print(f"{chosen.name} after {seconds:.1f} s", flush=True)
        return True
    if process.returncode:
        raise SystemExit(f"trimix adapt ended with {process.returncode}")
    return False


def made(home: Path, name: str) -> bool:
    """Whether the trio is there."""
    return (home / "trios" / name / ADAPTER).is_file()


def numbers(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter."""
    return {t.name: np.asarray(t.data, np.float32) for t in GGUFReader(path).tensors}


if __name__ == "__main__":
    main()
