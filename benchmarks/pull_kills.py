"""`trimix pull` killed (SIGKILL) at random places: does it always complete, with the right bytes?

    python benchmarks/pull_kills.py --n 100

A hub on loopback serves two GGUF files of the nano trio, and the third as a checkpoint that is
converted, with llama.cpp's quantizer in a process of its own. After each kill, and at the end:
trio.toml is absent, or every file has its hash; no finished file is fetched again; a part is
gone on from at its very end. The first thing that does not hold ends this with an error.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from hub_server import serving  # noqa: E402
from killed_pulls import Pulls  # noqa: E402


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--n", type=int, default=100, help="kills")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    result = {
        "python": platform.python_version(),
        **{p: importlib.metadata.version(p) for p in ("trimix-gguf", "huggingface-hub")},
        "n": options.n,
        "seed": options.seed,
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serving() as hub:
        hub.seconds_per_chunk = 0.0005  # the hub is slower than the disk, as hubs are
        pulls = Pulls(Path(folder), hub, seed=options.seed, type="q4_0")
        while pulls.counts["killed"] < options.n:
            if pulls.pull():
                shutil.rmtree(pulls.home)
        pulls.pull(kill=False)
    result |= {**pulls.counts, "seconds": round(time.perf_counter() - started, 1)}
    print(*(f"{key}: {value}" for key, value in pulls.counts.items()), sep="\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
