"""The portable build of llama.cpp: which variant it takes on which processor, and how fast it is.

    python benchmarks/portable.py dist/llama_cpp_python-….whl --model GGUF --text TEXT.txt

The wheel is unpacked beside the llama-cpp-python that is installed, which is the native one.
Older processors are emulated by qemu-user (Debian: qemu-user): the self-test's child runs there,
and says which variant llama.cpp loaded and how far its logits are from the known ones. Speed is
that of this machine: both builds read and write in turn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common import VERSIONS, cpu_name, spread

PROCESSORS = ("Nehalem-v1", "SandyBridge-v1", "IvyBridge-v1", "Opteron_G5-v1", "Haswell-v1")

VARIANT = """
import json, os, re
from trimix_gguf.trio import trial
known = json.loads(trial._KNOWN.read_text(encoding="utf-8"))
worst = 0.0
for name, row in trial._rows():
    worst = max(worst, *(abs(float(row[int(i)]) - value) for i, value in known[name].items()))
maps = open("/proc/self/maps").read()
print(json.dumps({"loaded": sorted(set(re.findall(r"libggml-cpu[\\w-]*", maps))), "worst": worst}))
"""

SPEED = """
import json, sys, time
from trimix_gguf.machine.loading import Loading
from trimix_gguf.trio.model import Model
path, n_prompt, n_tokens, text = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = Model(path, Loading(n_ctx=n_prompt + n_tokens + 1, n_batch=512))
ids = model.tokenize(open(text, encoding="utf-8").read(100_000))[:n_prompt]
assert len(ids) == n_prompt
model.decode(ids[:64])
for line in sys.stdin:  # a line asks for one measurement
    model.rewind(0)
    started = time.perf_counter()
    for at in range(0, n_prompt, 512):
        model.decode(ids[at:at + 512])
    read = time.perf_counter()
    for token in ids[:n_tokens]:
        model.decode([token])
    wrote = time.perf_counter()
    print(json.dumps([n_prompt / (read - started), n_tokens / (wrote - read)]), flush=True)
"""


def environment(folder: Path | None) -> dict[str, str]:
    """Of a process that takes llama_cpp from `folder`, or the one that is installed."""
    path = {"PYTHONPATH": str(folder)} if folder else {}
    return {**os.environ, "TRIMIX_SELF_TEST": "0", **path}


def chosen(folder: Path, processor: str | None) -> dict[str, Any]:
    """What the self-test's child finds on a processor that qemu plays, or on this one."""
    qemu = [] if processor is None else ["qemu-x86_64", "-cpu", processor]
    command = [*qemu, os.path.realpath(sys.executable), "-c", VARIANT]
    # Under qemu sys.executable is not followed into its environment: say where its packages are.
    packages = os.pathsep.join([str(folder), *(p for p in sys.path if p)])
    done = subprocess.run(
        command, env={**environment(None), "PYTHONPATH": packages}, capture_output=True, text=True
    )
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def speeds(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both builds in turn, and portable over native, round by round."""
    arguments = [options.model, str(options.n_prompt), str(options.n_tokens), options.text]
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", SPEED, *arguments],
            env=environment(where),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, where in (("native", None), ("portable", folder))
    }
    measured: dict[str, list[list[float]]] = {name: [] for name in running}
    for _ in range(options.repeats):
        for name, process in running.items():
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            measured[name].append(json.loads(process.stdout.readline()))
    for process in running.values():
        assert process.stdin
        process.stdin.close()
        process.wait()
    result: dict[str, Any] = {}
    for i, what in enumerate(("read_tps", "write_tps")):
        pairs = zip(measured["native"], measured["portable"], strict=True)
        result[what] = {n: statistics.median(m[i] for m in ms) for n, ms in measured.items()}
        result[what]["ratio"] = spread([portable[i] / native[i] for native, portable in pairs])
    return result


def main() -> None:
    """Measure, and print; the last line is JSON."""
    import importlib.metadata

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="made by `make portable`")
    parser.add_argument("--model", help="GGUF to read and write with")
    parser.add_argument("--text", help="UTF-8 text to read")
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.model and not options.text:
        parser.error("--model needs --text")
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    result: dict[str, Any] = {"cpu": cpu_name(), **versions, "wheel": options.wheel.name}
    for key, value in result.items():
        print(f"{key}: {value}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(options.wheel).extractall(folder)
        processors: list[str | None] = [None]
        processors += PROCESSORS if shutil.which("qemu-x86_64") else []
        result["chosen"] = {p or "this one": chosen(folder, p) for p in processors}
        for processor, found in result["chosen"].items():
            print(f"{processor}: {json.dumps(found)}")
        if options.model:
            result["speed"] = speeds(folder, options)
            for what, found in result["speed"].items():
                print(f"{what}: {json.dumps(found)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
