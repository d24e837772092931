"""`trimix serve` as a user starts it: a process of its own, at a free port."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

# For what never comes; a busy machine may take long for what does.
PATIENCE_S = 600
# The nano trio ends a text by id 0; without it, answers are as long as they may be.
ENDLESS = {"logit_bias": {"0": -100, "3": -100}}
TEXTS = [
    "Қазақстан Республикасының Үкіметі",
    "Бүгін Алматыда жаңа мектеп ашылды, ал",
    "The prince had come to",
    "Абай Құнанбайұлы — қазақтың ұлы ақыны. Ол",
    "Президент Астанада сөз сөйледі.",
    "Ауа райы бүгін жылы болады",
    "Once upon a time there was a",
    "Мектеп оқушылары кітап оқиды, себебі",
]


# Values that a field does not have.
WRONG = [
    -2.5, 2**70, "warm", "", [], [[]], [None], {}, {"a": 1}, [{"a": []}], True, None,
    [{"type": "function", "function": {"name": "a"}}],
]  # fmt: skip


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S, **options)

    def complete(self, prompt, **body):
        """The JSON of a completion that must succeed."""
        response = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def health(self):
        return httpx.get(f"{self.url}/health", timeout=PATIENCE_S).json()["status"]

    def metrics(self, **headers):
        """Samples of /metrics by name and labels."""
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=PATIENCE_S).text
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def wait_until(self, condition):
        """The metrics, once `condition` holds for them."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(found := self.metrics()):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found


@contextmanager
def serving(*arguments, program=(sys.executable, "-m", "trimix_gguf.cli")):
    """A server, ready; afterwards it is ended as a service manager would, and left no trace."""
    command = [*program, "serve", "--port", "0"]
    process = subprocess.Popen([*command, *map(str, arguments)], stderr=subprocess.PIPE)
    line = process.stderr.readline().decode()
    found = re.search(r"http://\S+:(\d+)", line)
    try:
        assert found, line + process.stderr.read().decode()
        yield Served(process, int(found[1]))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=PATIENCE_S)
    assert b"Traceback" not in error, error.decode()


def events_of(text):
    """The payloads of a server-sent stream, whose shape is checked."""
    *blocks, end = text.split("\n\n")
    assert end == "" and blocks
    assert all(re.fullmatch(r"data: [^\n]+", block) for block in blocks), text
    return [block.removeprefix("data: ") for block in blocks]


def error_of(response, status):
    """The error object of a refusal, in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


def places(value, at=()):
    """The way to every value inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, dict | list) else ():
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


def broken(server, path, good):
    """The refusals of a good body with one value at a time replaced by a wrong one."""
    with httpx.Client(timeout=PATIENCE_S) as client:
        for *way, last in places(good):
            for wrong in WRONG:
                body = json.loads(json.dumps(good))
                inner = body
                for key in way:
                    inner = inner[key]
                inner[last] = wrong
                response = client.post(server.url + path, json=body)
                assert response.status_code < 500, (body, response.text)
                if response.status_code >= 400:
                    yield response
