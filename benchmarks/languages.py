"""Several trios that share weights in one server, beside a server for each of them.

    python benchmarks/languages.py TRIO TRIO [TRIO …]

Each is asked once, so that all are loaded. Memory is the proportional share (Pss) of a server and
its children: pages that processes share count once. Then one client asks the same greedy questions
of the one server and of the others, first of one, then of the other; the ratio of tokens/s is of
each pair. Each round starts new servers, the one first or last by turns: which of several
processes has its weights in memory first was seen to change its speed by three percent.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import cpu_name, versions
from serving import ask

QUESTION = "Қазақстанның астанасы қай қала? Ол туралы айтып беріңізші."


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("trios", nargs="+", metavar="NAME|FILE|DIR")
    options.add_argument("--n-tokens", type=int, default=48)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--rounds", type=int, default=4)
    options = options.parse_args()
    names = options.trios
    ratios: list[float] = []
    for i in range(options.rounds):
        memory, found = one_round(names, options, one_first=i % 2 == 0)
        print(f"round {i + 1}: {statistics.median(found):.3f}", flush=True)
        ratios += found
    share = memory["one"] / sum(memory["apart"])
    print(f"{cpu_name()}; {versions()}")
    print(
        f"memory: one server {memory['one'] / 2**20:.0f} MiB, {len(names)} servers "
        f"{' + '.join(f'{n / 2**20:.0f}' for n in memory['apart'])} MiB: {share:.2f} times"
    )
    print(
        f"tokens/s of one client, one server over its own: {statistics.median(ratios):.3f} times "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)"
    )
    print(json.dumps({"cpu": cpu_name(), "memory": memory, "ratios": ratios}))


def one_round(
    names: list[str], options: argparse.Namespace, *, one_first: bool
) -> tuple[dict[str, Any], list[float]]:
    """Memory of new servers, and the ratio of tokens/s of each question."""
    with ExitStack() as stack:
        servers: dict[bool, list[tuple[int, int]]] = {}
        for together in (True, False) if one_first else (False, True):
            sets = [names] if together else [[name] for name in names]
            servers[together] = [stack.enter_context(serving(each)) for each in sets]
            for i, name in enumerate(names):
                answer(servers[together][0 if together else i], name, 4, QUESTION)
        (one,), apart = servers[True], servers[False]
        memory = {"one": pss(one[0]), "apart": [pss(server[0]) for server in apart]}
        ratios = []
        for turn in range(options.turns):
            for own, name in zip(apart, names, strict=True):
                prompt = f"{turn} {name}: {QUESTION}"  # in no cache
                order = (one, own) if turn % 2 else (own, one)
                speed = {at: answer(at, name, options.n_tokens, prompt) for at in order}
                ratios.append(speed[one] / speed[own])
    return memory, ratios


@contextmanager
def serving(trios: list[str]) -> Iterator[tuple[int, int]]:
    """A server of these trios, each of which stays loaded: its process and its port."""
    command = [sys.executable, "-m", "trimix_gguf.cli", "serve", "--port", "0"]
    for trio in trios:
        command += ["--trio", trio]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r":(\d+)", line)
        try:
            if found is None:
                raise SystemExit(line + process.stderr.read())
            yield process.pid, int(found[1])
        finally:
            process.terminate()


def answer(server: tuple[int, int], trio: str, n_tokens: int, prompt: str) -> float:
    """Tokens per second of one answer, its prompt included."""
    started = time.perf_counter()
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": n_tokens, "model": Path(trio).name}
    got = ask(server[1], body | {"temperature": 0})
    return int(got["usage"]["completion_tokens"]) / (time.perf_counter() - started)


def pss(pid: int) -> int:
    """Bytes of a process and its children, shared pages by their share."""
    total = 0
    for each in [pid, *children(pid)]:
        text = Path(f"/proc/{each}/smaps_rollup").read_text(encoding="ascii")
        total += int(re.search(r"^Pss:\s+(\d+) kB", text, re.M)[1]) << 10  # type: ignore[index]
    return total


def children(pid: int) -> list[int]:
    """All processes below one."""
    direct = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [n for child in map(int, direct) for n in (child, *children(child))]


if __name__ == "__main__":
    main()
