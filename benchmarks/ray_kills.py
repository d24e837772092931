"""`trimix run --ray` with a process killed at a random moment: the same answers as one process.

    python benchmarks/ray_kills.py > benchmarks/results/ray_kills.txt

One process answers a file of prompts: greedily, with fixed weights. Then two processes of a local
Ray cluster answer it, ten times; each time one of the two gets SIGKILL at a random moment. Every
line has to be there once, in its order. Answers with another text are listed. Ends in a line of
JSON.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import cpu_name, versions

from trimix_gguf.trio.trio import NANO

WORKER = "ray::_Worker"  # what Ray calls a process that has a trio


def main() -> None:
    """Answer once in one process, then with kills, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer, at most")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} cores, {platform.platform()}")
    kinds = {**versions(), "ray": importlib.metadata.version("ray")}
    print(f"Python {platform.python_version()}, {kinds}, seed {options.seed}")
    print(f"{options.prompts} prompts, {options.tokens} tokens, nano", flush=True)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "prompts.jsonl")
        write_prompts(source, options.prompts, options.tokens)
        started(source, Path(folder, "one")).wait()
        one = read(Path(folder, "one"))
        assert [answer["id"] for answer in one] == list(range(1, options.prompts + 1))
        kills = [kill_one(source, Path(folder, f"{i}"), one, draw) for i in range(options.kills)]
    ties = sorted({id for kill in kills for id in kill["ties"]})
    print(json.dumps({"n": options.prompts, "seed": options.seed, "kills": kills, "ties": ties}))


def write_prompts(source: Path, n: int, n_tokens: int) -> None:
    """Beginnings of the sentences of nano's text, no two the same."""
    sentences = re.split(r"(?<=[.!?])\s+", (NANO / "text.txt").read_text(encoding="utf-8"))
    words = [sentence.split() for sentence in sentences]
    beginnings = dict.fromkeys(
        " ".join(one[:length]) for length in range(2, 12) for one in words if len(one) >= length
    )
    fixed = {"max_tokens": n_tokens, "temperature": 0, "trimix": {"weights": [0.5, 1.0]}}
    prompts = list(beginnings)[:n]
    assert len(prompts) == n
    lines = [{"id": i, "prompt": text, **fixed} for i, text in enumerate(prompts, 1)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    source.write_text(text, encoding="utf-8")


def started(source: Path, out: Path, *more: str) -> "subprocess.Popen[bytes]":
    """`trimix run`, which has begun."""
    command = [sys.executable, "-m", "trimix_gguf", "run", str(source), "-o", str(out), *more]
    return subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.DEVNULL)


def read(out: Path) -> list[dict[str, Any]]:
    """The answers of a run that has ended."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def kill_one(
    source: Path, out: Path, one: list[dict[str, Any]], draw: random.Random
) -> dict[str, Any]:
    """Answer by two processes, one of which is killed; when, and the ids with another text.

    The moment is between two groups of answers, or within one: drawn as a number of answers that
    the journal has, and a fraction of a second more.
    """
    process = started(source, out, "--ray", "local", "--ray-workers", "2")
    after, pause = draw.randrange(len(one) - 64), draw.uniform(0, 0.5)
    while n_kept(out) < after:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(pause)
    while not (workers := workers_of(process.pid)):
        time.sleep(0.02)
    draw.choice(workers).kill()
    kept = n_kept(out)
    assert process.wait() == 0
    answers = read(out)
    assert [answer["id"] for answer in answers] == [answer["id"] for answer in one]
    pairs = zip(answers, one, strict=True)
    ties = [mine["id"] for mine, theirs in pairs if text_of(mine) != text_of(theirs)]
    same = answers == one
    print(
        f"killed with {kept} of {len(one)} answers: all once, {len(ties)} other texts", flush=True
    )
    return {"kept": kept, "ties": ties, "same_bytes": same}


def n_kept(out: Path) -> int:
    """How many answers the journal of a run has."""
    journal = out.with_name(f"{out.name}.part")
    try:
        return sum(line[:1].isdigit() for line in journal.read_bytes().splitlines())
    except FileNotFoundError:
        return 0


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes of a command that have a trio."""
    found = psutil.Process(pid).children(recursive=True)
    return [child for child in found if WORKER in " ".join(child.cmdline())]


def text_of(answer: dict[str, Any]) -> str:
    """What an answer says."""
    text: str = answer["response"]["choices"][0]["text"]
    return text


if __name__ == "__main__":
    main()
