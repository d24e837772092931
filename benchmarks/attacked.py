"""A client of `trimix serve` beside one that sends the worst known of each kind: its slowest token.

Each kind is sent over and over, by `--attackers` threads, while another client streams one answer.
The slowest token is the longest time from the request to the first chunk of that answer, or between
two of them. On the nano trio.
"""

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from common import cpu_name

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from schemas import COSTLY  # noqa: E402
from served import ENDLESS, Served, serving  # noqa: E402

from trimix_gguf.trio.trio import NANO  # noqa: E402
from trimix_gguf.trios.triofile import ModelEntry, TrioFile  # noqa: E402

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FIELDS = {f"p{i}": {"type": "string"} for i in range(400)}
Attack = Callable[[Served], None]


def schema(value: object) -> Attack:
    """Answers under a schema."""
    form = {"type": "json_schema", "json_schema": {"schema": value}}
    body = {"prompt": "a", "max_tokens": 60, "temperature": 1.5, "response_format": form}
    return post("/v1/completions", body)


def post(path: str, body: object) -> Attack:
    """One body, again and again."""
    raw = json.dumps(body).encode()

    def send(served: Served) -> None:
        httpx.post(served.url + path, content=raw, timeout=120)

    return send


def idle(served: Served) -> None:
    """Connections that ask nothing."""
    open_ones = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(200)]
    time.sleep(0.2)
    for connection in open_ones:
        connection.close()


ATTACKS: dict[str, Attack] = {
    "nothing": lambda served: time.sleep(0.1),
    **{f"schema: {name}": schema(value) for name, value in COSTLY.items() if "chain" not in name},
    "schema: chain": schema(COSTLY["long chain of property"]),
    "schema: 400 properties": schema({"type": "object", "properties": FIELDS}),
    "template without end": post("/v1/chat/completions", {"messages": [
        {"role": "user", "content": "a"}]}),
    "30,000 messages": post("/v1/chat/completions", {"messages": [
        {"role": "user", "content": "a"}] * 30_000}),
    "a word of 1 MB": post("/v1/completions", {"prompt": "a" * 1_000_000}),
    "200,000 ids": post("/v1/completions", {"prompt": [5] * 200_000, "echo": True}),
    "/tokenize of 1 MB": post("/tokenize", {"content": "сөз " * 140_000}),
    "/detokenize of 200,000 ids": post("/detokenize", {"tokens": [5] * 200_000}),
    "idle connections": idle,
}  # fmt: skip


def slowest(served: Served, attack: Attack, n_tokens: int, n_attackers: int) -> float:
    """The longest of a streamed answer's waits for its next chunk, while `attack` goes on."""
    over = threading.Event()

    def keep_on() -> None:
        while not over.is_set():
            with suppress(httpx.HTTPError, OSError):
                attack(served)

    threads = [threading.Thread(target=keep_on) for _ in range(n_attackers)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # the attack has begun
    body = {"prompt": "Қазақ", "max_tokens": n_tokens, "stream": True, **ENDLESS}
    body |= {"trimix": {"weights": [0.3, 0.6]}}
    gaps, before = [], time.perf_counter()
    url = f"{served.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=300) as response:
        for line in response.iter_lines():
            if line:
                now = time.perf_counter()
                gaps.append(now - before)
                before = now
    over.set()
    for thread in threads:
        thread.join()
    if len(gaps) < n_tokens // 4:
        raise SystemExit(f"the answer had only {len(gaps)} chunks")
    return max(gaps)


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200, help="of the answer beside each attack")
    parser.add_argument("--attackers", type=int, default=1)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        roles = ("large_ins", "small_cpt", "small_base")
        models = {role: ModelEntry(str(NANO / f"{role}.gguf")) for role in roles}
        TrioFile(Path(folder), "attacked", models, chat_template=LOOPS).write()
        with serving("--trio", folder, "--n-ctx", 8192) as served:
            for name, attack in ATTACKS.items():
                seconds = slowest(served, attack, options.tokens, options.attackers)
                found[name] = round(seconds, 3)
                print(f"{name:32} slowest token {found[name]:6.3f} s", flush=True)
    device = {"cpu": cpu_name(), "tokens": options.tokens, "attackers": options.attackers}
    print(json.dumps({**device, "slowest_token_s": found}))


if __name__ == "__main__":
    main()
