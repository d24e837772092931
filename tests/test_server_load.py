"""Many clients of one server, those that leave, and how it ends."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import KAZAKH
from served import ENDLESS, TEXTS, error_of, events_of, serving


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 8) as served:
        yield served


# -- together -------------------------------------------------------------------------------


def test_eight_at_once_each_get_what_they_get_alone(server):
    settings = {"max_tokens": 24, "logprobs": 5, **ENDLESS}
    alone = [server.complete(text, **settings)["choices"][0] for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        started = threading.Barrier(len(TEXTS))

        def ask(text):
            started.wait()
            return server.complete(text, **settings)["choices"][0]

        together = list(pool.map(ask, TEXTS))
    assert len({choice["text"] for choice in alone}) > len(TEXTS) / 2
    for ours, theirs in zip(together, alone, strict=True):
        assert agree(ours["logprobs"], theirs["logprobs"])


def agree(ours, theirs):
    """The same tokens, up to where two of them all but tie (llama.cpp sums batches otherwise)."""
    for i, (token, other) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True)):
        if token != other:
            top = ours["top_logprobs"][i]
            return top[token] - top.get(other, -math.inf) < 0.1
    return True


def is_idle(metrics):
    return metrics["trimix_requests_running"] == metrics["trimix_requests_waiting"] == 0


def is_running(metrics):
    return metrics["trimix_requests_running"] == 1


def post_head(path, body):
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_place(server, stream):
    key = 'trimix_requests_finished_total{reason="cancelled"}'
    before = server.wait_until(is_idle).get(key, 0)
    body = json.dumps({"prompt": KAZAKH, "max_tokens": 4000, "stream": stream, **ENDLESS}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(post_head("/v1/completions", body) + body)
        server.wait_until(is_running)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert server.wait_until(is_idle)[key] == before + 1


def test_who_reads_nothing_holds_no_place_for_ever(trio):
    """More comes back than the system's buffers hold: the log-probabilities of long prompts."""
    ids = trio.models["large_ins"].tokenize(" ".join(TEXTS) * 40)[:1500]
    body = {"prompt": ids, "n": 8, "echo": True, "logprobs": 20, "max_tokens": 1000, "stream": True}
    raw = json.dumps({**body, "trimix": {"weights": [0, 1]}, **ENDLESS}).encode()
    with serving("--n-ctx", 24_000, "--read-timeout", 1) as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(post_head("/v1/completions", raw) + raw)
        served.wait_until(lambda m: m["trimix_requests_running"] > 0)
        ended = served.wait_until(is_idle)
    assert ended['trimix_requests_finished_total{reason="cancelled"}'] > 0


def test_too_many_are_told_to_come_again_and_time_is_limited():
    long = {"prompt": KAZAKH, "max_tokens": 8000, **ENDLESS}
    with serving("--n-ctx", 8192, "--parallel", 1, "--queue", 0, "--timeout", 2) as served:
        with ThreadPoolExecutor(1) as pool:
            streamed = pool.submit(served.post, "/v1/completions", {**long, "stream": True})
            served.wait_until(is_running)
            refused = served.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
            assert error_of(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
        *chunks, last = events_of(streamed.result().text)
        assert json.loads(last)["error"]["code"] == "timeout"
        assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        assert error_of(served.post("/v1/completions", long), 504)["code"] == "timeout"
        served.wait_until(is_idle)
        too_many = served.post("/v1/completions", {"prompt": "a", "n": 2})
        assert error_of(too_many, 400)["param"] == "n"
        assert served.complete("a", max_tokens=1)


# -- the end --------------------------------------------------------------------------------


def stream_lines(served, lines, **body):
    body = {"prompt": KAZAKH, "stream": True, **ENDLESS, **body}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        lines += response.iter_lines()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("sent", "drain", "n", "code"),
    [(signal.SIGTERM, 60, 300, 0), (signal.SIGINT, 60, 300, 130), (signal.SIGTERM, 0, 3900, 0)],
)
def test_what_runs_has_its_time_to_end(sent, drain, n, code):
    lines = []
    with serving("--n-ctx", 4096, "--drain", drain) as served:
        thread = threading.Thread(
            target=stream_lines, args=(served, lines), kwargs={"max_tokens": n}
        )
        thread.start()
        served.wait_until(lambda m: m["trimix_generated_tokens_total"] or is_running(m))
        served.process.send_signal(sent)
        thread.join(60)
        assert served.process.wait(60) == code
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
    events = [line.removeprefix("data: ") for line in lines if line]
    if drain:
        assert events[-1] == "[DONE]"
    else:
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_a_second_ctrl_c_does_not_wait():
    lines = []
    with serving("--n-ctx", 8192, "--drain", 600) as served:
        thread = threading.Thread(
            target=stream_lines, args=(served, lines), kwargs={"max_tokens": 8000}
        )
        thread.start()
        served.wait_until(is_running)
        served.process.send_signal(signal.SIGINT)
        while served.process.poll() is None and not refuses(served.port):
            time.sleep(0.02)  # until the first signal was taken in
        served.process.send_signal(signal.SIGINT)
        thread.join(60)
        assert served.process.wait(60) == 130
    assert "shutting_down" in [line for line in lines if line][-1]


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_port_that_is_taken_is_one_line(trimix, server):
    result = trimix("serve", "--port", server.port)
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 1 and len(lines) == 1 and "--port" in lines[0]


def test_help_of_serve_loads_no_server():
    code = (
        "import sys; sys.argv = ['trimix', 'serve', '--help']\n"
        "from trimix_gguf.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'llama_cpp', 'numpy', 'uvicorn', 'starlette'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
