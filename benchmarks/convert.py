"""Time and peak memory of `trimix convert hf`, beside llama.cpp's own converter.

    python benchmarks/convert.py FOLDER... --llama-cpp DIR [--python /other/venv/bin/python]

DIR is vendor/llama.cpp of llama-cpp-python's source distribution. Its converter needs torch and
transformers, so it may run by another Python. The two alternate; each run is a fresh process.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import cpu_name, spread

from trimix_gguf.convert.checkpoint import Checkpoint

_MIB = 1 << 20
# It says its own peak: seen from here, it would be at least that of this process.
_BARE = """
import trimix_gguf.convert.hf
from trimix_gguf.machine.memory import peak_rss
print(peak_rss())
"""


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    options.add_argument("--llama-cpp", type=Path, help="leave out to measure ours alone")
    options.add_argument("--python", default=sys.executable, help="that runs llama.cpp's")
    options.add_argument("--type", default="q8_0")
    options.add_argument("--repeats", type=int, default=3)
    options = options.parse_args()
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("trimix-gguf", "gguf", "numpy")},
        "type": options.type,
        "repeats": options.repeats,
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    bare = int(subprocess.check_output([sys.executable, "-c", _BARE]))
    for folder in options.folders:
        result[folder.name] = figures = measure(folder, options, bare)
        print(f"\n{folder.name}:", *described(figures), sep="\n  ")
    print(json.dumps(result))


def measure(folder: Path, options: argparse.Namespace, bare: int) -> dict[str, Any]:
    """Time and memory of both converters on one checkpoint."""
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.gguf"
        ours = [sys.executable, "-m", "trimix_gguf.cli", "convert", "hf", folder]
        commands = {"trimix": [*ours, "-o", out, "--type", options.type]}
        if options.llama_cpp:
            theirs = [options.python, options.llama_cpp / "convert_hf_to_gguf.py", folder]
            commands["llama.cpp"] = [*theirs, "--outfile", out, "--outtype", options.type]
        for _ in range(options.repeats):
            for name, command in commands.items():
                out.unlink(missing_ok=True)
                runs.setdefault(name, []).append(run([str(part) for part in command]))
    tensors = Checkpoint(folder).tensors.values()
    largest = 4 * max(math.prod(tensor.shape) for tensor in tensors)  # in float32
    return {
        "seconds": {name: spread([r["seconds"] for r in rs]) for name, rs in runs.items()},
        "peak": {name: max(r["peak"] for r in rs) for name, rs in runs.items()},
        "over_interpreter": max(r["peak"] for r in runs["trimix"]) - bare,
        "allowed": 2 * largest + 200 * _MIB,
        "ratio": spread([b["seconds"] / a["seconds"] for a, b in zip(*runs.values(), strict=True)])
        if len(runs) == 2
        else None,
    }


def run(command: list[str]) -> dict[str, Any]:
    """Seconds and peak resident bytes of a command, which must succeed."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    return {"seconds": time.perf_counter() - start, "peak": usage.ru_maxrss * 1024}


def described(figures: dict[str, Any]) -> list[str]:
    """The figures, as lines."""
    lines = [
        f"{name}: {s['median']:.1f} s (from {s['min']:.1f} to {s['max']:.1f}), "
        f"peak {figures['peak'][name] / _MIB:.0f} MiB"
        for name, s in figures["seconds"].items()
    ]
    if ratio := figures["ratio"]:
        lines.append(f"llama.cpp's time over ours: {ratio['median']:.2f}")
    lines.append(
        f"ours over the interpreter: {figures['over_interpreter'] / _MIB:.0f} MiB; twice the "
        f"largest tensor in float32, and 200 MiB: {figures['allowed'] / _MIB:.0f} MiB"
    )
    return lines


if __name__ == "__main__":
    main()
