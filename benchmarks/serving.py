"""`trimix serve`: requests of several clients at once against the same one after another, and
what the server adds to the time of the first token.

A round starts a fresh server for each way, so that neither finds prompts that the other read, and
sends `--requests` greedy requests whose weights are chosen by their prompts; tokens a second
count generated tokens over the whole time, reading included. One after another, they are also
answered by `generate`, without a server. The first token is timed over HTTP,
by the same engine without HTTP, and by stream_generate, for prompts not read before. What batches
could gain at most follows from what llama.cpp takes for one id, for one of each client, and for
a prompt. Without files, the nano trio.
"""

import argparse
import http.client
import json
import queue
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import files, load, machine, nano_parser, or_nano, report, spread

from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.generation import generate, stream_generate
from trimix_gguf.answering.request import Request
from trimix_gguf.bench.measuring import TEXT
from trimix_gguf.choosing.selection import select_weights
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

_WARM_UP = [5, 6, 7, 8]


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parse_options()
    n_prompts = max(options.requests, options.repeats)
    ids, bias = read_prompts(options, n_prompts)
    bodies = [
        {"prompt": p, "max_tokens": options.n_tokens, "temperature": 0, "logit_bias": bias}
        for p in ids
    ]
    serial: list[float] = []
    together: list[float] = []
    without: list[float] = []
    for _ in range(options.rounds):  # alternating: what drifts, drifts for both
        serial.append(rate(options, bodies[: options.requests], 1))
        together.append(rate(options, bodies[: options.requests], options.clients))
        without.append(rate_by_generate(options, bodies[: options.requests]))
    most = most_gained(options, ids[: options.requests])
    first = first_tokens(options, ids[: options.repeats], bodies[: options.repeats])
    result = {
        "machine": machine(argparse.Namespace(**{**vars(options), "text": name_of_text(options)})),
        "n": {
            name: getattr(options, name)
            for name in ("clients", "requests", "rounds", "n_prompt", "n_tokens", "repeats")
        },
        "tokens_per_s": {"one_after_another": spread(serial), "together": spread(together),
                         "generate": spread(without)},
        "ratio": spread([b / a for a, b in zip(serial, together, strict=True)]),
        "most_gained": most,
        "over_generate": spread([a / b for a, b in zip(serial, without, strict=True)]),
        "first_token_s": {name: statistics.median(times) for name, times in first.items()},
        "http_adds_ms": {
            name: 1000 * statistics.median(
                [a - b for a, b in zip(first["http"], first[name], strict=True)]
            )
            for name in ("engine", "stream_generate")
        },
    }  # fmt: skip
    report(options, result, describe(result))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = nano_parser(__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15, help="first tokens timed each way")
    return or_nano(parser.parse_args())


def name_of_text(options: argparse.Namespace) -> Path:
    """The file of the text, or the name of the one that is built in."""
    return options.text or Path("trimix_gguf.bench.measuring.TEXT")


def n_ctx(options: argparse.Namespace) -> int:
    """Room for every client's request, and as much again."""
    return 2 * options.clients * (options.n_prompt + options.n_tokens)


def read_prompts(options: argparse.Namespace, n: int) -> tuple[list[list[int]], dict[str, float]]:
    """Prompts as ids that begin at different places, and biases that no answer ends early by."""
    text = TEXT if options.text is None else options.text.read_text(encoding="utf-8")
    with load(options, n_ctx=64) as trio:
        every = trio.models["large_ins"].tokenize(text)
        if len(every) < n:
            raise SystemExit(f"the text has {len(every)} tokens; at least {n} are needed")
        starts = [i * (len(every) // n) for i in range(n)]
        round_about = every * (1 + options.n_prompt // len(every)) + every
        ids = [round_about[start : start + options.n_prompt] for start in starts]
        return ids, {str(token): -100.0 for token in trio.end_of_generation}


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[int]:
    """A fresh server that has answered once; its port."""
    command = [sys.executable, "-m", "trimix_gguf.cli", "serve", "--port", "0"]
    command += ["--n-ctx", str(n_ctx(options)), "--parallel", str(options.clients)]
    for role, path in files(options).items():
        command += [f"--{role.replace('_', '-')}", str(path)] if path else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r":(\d+)/v1", line)
        if found is None:
            raise SystemExit(line + process.stderr.read())
        try:
            ask(int(found[1]), {"prompt": _WARM_UP, "max_tokens": 4})
            yield int(found[1])
        finally:
            process.terminate()


def ask(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request over HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise SystemExit(answer["error"]["message"])
    return dict(answer)


def rate(options: argparse.Namespace, bodies: list[dict[str, Any]], n_clients: int) -> float:
    """Generated tokens a second, by so many clients."""
    with serving(options) as port, ThreadPoolExecutor(n_clients) as clients:
        started = time.perf_counter()
        answers = list(clients.map(lambda body: ask(port, body), bodies))
        seconds = time.perf_counter() - started
    return sum(a["usage"]["completion_tokens"] for a in answers) / seconds


def rate_by_generate(options: argparse.Namespace, bodies: list[dict[str, Any]]) -> float:
    """Generated tokens a second by `generate`; nothing is kept from prompt to prompt."""
    bias = {int(token): value for token, value in bodies[0]["logit_bias"].items()}
    settings = {"temperature": 0, "logit_bias": bias, "max_tokens": options.n_tokens}
    with load(options, n_ctx=n_ctx(options)) as trio:
        generate(trio, Prompt((Segment.of(_WARM_UP),)), max_tokens=4)
        n_tokens, started = 0, time.perf_counter()
        for body in bodies:
            trio.forget()
            n_tokens += generate(trio, Prompt((Segment.of(body["prompt"]),)), **settings).n_tokens
        return n_tokens / (time.perf_counter() - started)


def most_gained(options: argparse.Namespace, ids: list[list[int]]) -> float:
    """How much faster all are together if llama.cpp's decodes took all the time.

    Each prompt is read by itself either way. The mixes are those that the prompts choose.
    """
    with load(options, n_ctx=n_ctx(options)) as trio:
        needed: Counter[str] = Counter()
        for prompt in ids:
            needed.update(select_weights(trio, Prompt((Segment.of(prompt),))).mix.roles)
            trio.forget()
        apart = together = 0.0
        for role, model in trio.models.items():
            apart += needed[role] * options.n_tokens * decode_seconds(model, ids, 1)
            n_rounds, rest = divmod(needed[role], options.clients)
            for n in [options.clients] * n_rounds + [rest] * bool(rest):
                together += options.n_tokens * decode_seconds(model, ids, n)
            reading = len(ids) * decode_seconds(model, ids, options.n_prompt)
            apart, together = apart + reading, together + reading
    return apart / together


def decode_seconds(model: Model, ids: list[list[int]], n: int) -> float:
    """What a batch of n ids takes after a prompt; the median of five, the first left out."""
    times = []
    for _ in range(6):
        model.rewind(0)
        model.decode(ids[0])
        started = time.perf_counter()
        model.decode(ids[1][:n], every_row=True)
        times.append(time.perf_counter() - started)
    model.rewind(0)
    return statistics.median(times[1:])


def first_tokens(
    options: argparse.Namespace, ids: list[list[int]], bodies: list[dict[str, Any]]
) -> dict[str, list[float]]:
    """Seconds to each prompt's first token: over HTTP, by the engine alone, by stream_generate."""
    times: dict[str, list[float]] = {"http": [], "engine": [], "stream_generate": []}
    with serving(options) as port, load(options, n_ctx=n_ctx(options)) as trio:
        for prompt, body in zip(ids, bodies, strict=True):
            times["http"].append(over_http(port, {**body, "stream": True}))
            times["engine"].append(by_engine(trio, prompt))
            times["stream_generate"].append(by_stream_generate(trio, prompt))
    return times


def over_http(port: int, body: dict[str, Any]) -> float:
    """Seconds to the first token over HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    while True:
        line = response.readline()
        chunk = json.loads(line[6:]) if line.startswith(b"data: {") else None
        if chunk and "trimix" not in chunk:  # the first of all says the weights alone
            took = time.perf_counter() - started
            response.read()
            connection.close()
            return took


def by_engine(trio: Trio, ids: list[int]) -> float:
    """Seconds to the first token by the engine, without HTTP."""
    batcher, events = Batcher(trio), queue.Queue()
    started = time.perf_counter()
    batcher.submit(Request(Prompt((Segment.of(ids),)), max_tokens=1), events.put)
    events.get()
    took = time.perf_counter() - started
    batcher.close()
    return took


def by_stream_generate(trio: Trio, ids: list[int]) -> float:
    """Seconds to the first token by stream_generate."""
    trio.forget()
    started = time.perf_counter()
    next(stream_generate(trio, Prompt((Segment.of(ids),)), max_tokens=1))
    took = time.perf_counter() - started
    trio.forget()
    return took


def describe(result: dict[str, Any]) -> list[str]:
    """The figures, as lines."""
    rates, first, n = result["tokens_per_s"], result["first_token_s"], result["n"]
    added = result["http_adds_ms"]
    return [
        f"{n['requests']} requests one after another {rates['one_after_another']['median']:.1f} "
        f"tokens/s, by {n['clients']} clients {rates['together']['median']:.1f}: "
        f"{result['ratio']['median']:.2f} times ({result['ratio']['min']:.2f} to "
        f"{result['ratio']['max']:.2f}); llama.cpp's decodes alone: {result['most_gained']:.2f}",
        f"one after another over HTTP, compared with generate: "
        f"{result['over_generate']['median']:.2f} times ({result['over_generate']['min']:.2f} to "
        f"{result['over_generate']['max']:.2f})",
        f"first token over HTTP {1000 * first['http']:.1f} ms: {added['engine']:+.1f} ms to the "
        f"engine without HTTP, {added['stream_generate']:+.1f} ms to stream_generate",
    ]


if __name__ == "__main__":
    main()
