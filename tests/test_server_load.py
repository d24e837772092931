"""Many clients of one server, those that leave, and how it ends."""

import asyncio
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
from contextlib import ExitStack, suppress

import httpx
import pytest
from conftest import KAZAKH
from served import ENDLESS, PATIENCE_S, TEXTS, error_of, events_of, serving
from starlette.requests import ClientDisconnect

from trimix_gguf import Weights
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.answering.request import Request
from trimix_gguf.errors import QueueFull
from trimix_gguf.server.events import Events
from trimix_gguf.trios.triofile import ModelEntry, TrioFile


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


def test_too_many_are_told_to_come_again():
    long = {"prompt": KAZAKH, "max_tokens": 8000, "stream": True, **ENDLESS}
    with serving("--n-ctx", 8192, "--parallel", 1, "--queue", 0) as served:
        assert served.health() == "ok"
        with httpx.stream("POST", f"{served.url}/v1/completions", json=long, timeout=PATIENCE_S):
            served.wait_until(is_running)
            assert served.health() == "busy"
            refused = served.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
            assert error_of(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
        served.wait_until(is_idle)
        too_many = served.post("/v1/completions", {"prompt": "a", "n": 2})
        assert error_of(too_many, 400)["param"] == "n"
        assert served.complete("a", max_tokens=1)


def test_the_time_of_an_answer_is_limited():
    long = {"prompt": KAZAKH, "max_tokens": 30_000, **ENDLESS}
    with serving("--n-ctx", 32_000, "--parallel", 1, "--timeout", 2) as served:
        text = ""
        while not text:  # its first token came too late
            streamed = served.post("/v1/completions", {**long, "stream": True})
            if streamed.status_code == 504:
                continue
            *chunks, last = events_of(streamed.text)
            assert json.loads(last)["error"]["code"] == "timeout"
            text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        assert error_of(served.post("/v1/completions", long), 504)["code"] == "timeout"
        served.wait_until(is_idle)


# -- what one asks costs the others little ----------------------------------------------------


def test_a_template_that_does_not_end_holds_nobody_up(nano_files, tmp_path):
    """Bug: it held the one thread that prepared all requests, and SIGTERM ended nothing."""
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    models = {role: ModelEntry(str(path)) for role, path in nano_files.items()}
    TrioFile(tmp_path, "loops", models, chat_template=loops).write()
    with serving("--trio", tmp_path) as served, ThreadPoolExecutor(8) as pool:
        body = {"messages": [{"role": "user", "content": "a"}]}
        chats = [pool.submit(served.post, "/v1/chat/completions", body) for _ in range(8)]
        assert served.complete("a", max_tokens=2, trimix={"weights": [0.3, 0.6]})
        assert not all(chat.done() for chat in chats)  # it did not wait for them
        for chat in chats:
            assert "refuses the messages" in error_of(chat.result(), 400)["message"]
        pool.submit(served.post, "/v1/chat/completions", body)
        served.process.send_signal(signal.SIGTERM)
    assert served.process.returncode == 0


def test_many_messages_are_refused_first(server):
    """Bug: 30,000 held all others for two minutes."""
    body = {"messages": [{"role": "user", "content": "a"}] * 30_000, "max_tokens": 1}
    error = error_of(server.post("/v1/chat/completions", body), 400)
    assert error["param"] == "messages" and "do not fit" in error["message"]


def test_idle_connections_make_room_for_who_asks(server):
    """Bug: as many as the system has files could be held open, and then nobody was answered."""
    with ExitStack() as stack:
        for i in range(300):
            address = ("127.0.0.1", server.port)
            made = stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            with suppress(OSError):  # some have been hung up on
                made.sendall(post_head("/v1/completions", b"{}") if i % 2 else b"")
        assert server.complete("a", max_tokens=1)


def test_nothing_is_prepared_for_whom_there_is_no_room(trio):
    batcher = Batcher(trio, n_parallel=1, n_queue=1)
    try:
        batcher.reserve(2)
        assert batcher.is_busy
        with pytest.raises(QueueFull):
            batcher.reserve(1)
        with pytest.raises(QueueFull):
            batcher.submit(Request("а", Weights(1, 0), max_tokens=1), print)
        ended = threading.Event()
        request = Request("а", Weights(1, 0), max_tokens=1)
        batcher.submit(request, lambda event: event.finish_reason and ended.set(), reserved=True)
        batcher.release(1)
        ended.wait(PATIENCE_S)

        async def ask():
            Events(batcher, fail, n=3, executor=None, receive=None, timeout_s=1)

        def fail():
            raise AssertionError("it was prepared")

        with pytest.raises(QueueFull):
            asyncio.run(ask())
    finally:
        batcher.close()
    trio.forget()


@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_sent_whole_wakes_the_loop_for_its_first_token_and_its_end(trio, whole):
    batcher, woken = Batcher(trio, n_parallel=2, drafts=False), []
    request = Request.of(
        Request("Қазақ", Weights(1, 0), max_tokens=30), logit_bias={0: -100, 3: -100}
    )

    async def ask():
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(call, *given, **named):
            woken.append(call)
            return wake(call, *given, **named)

        receive = asyncio.Queue().get  # a client that says nothing more
        options = {"executor": None, "receive": receive, "timeout_s": 60, "whole": whole}
        events = Events(batcher, lambda: [request] * 2, n=2, **options)
        loop.call_soon_threadsafe = counted
        found = [event async for event in events]
        events.close()
        return found, [call for call in woken if call == events._deliver]

    try:
        found, deliveries = asyncio.run(ask())
    finally:
        batcher.close()
        trio.forget()
    assert sum(event.n_tokens or 0 for _, event in found if event.finish_reason) == 60
    assert len(found) > 40 and len({index for index, _ in found}) == 2
    assert len(deliveries) <= 6 if whole else len(deliveries) > 40


def test_the_tokens_of_a_whole_answer_that_is_cut_off_are_known(trio):
    """Bug: the log and the metrics had one of them."""
    batcher = Batcher(trio, n_parallel=2, drafts=False)
    request = Request.of(
        Request("Қазақ", Weights(1, 0), max_tokens=400), logit_bias={0: -100, 3: -100}
    )

    async def ask():
        leaves, found = asyncio.Queue(), []
        options = {"executor": None, "receive": leaves.get, "timeout_s": 60, "whole": True}
        events = Events(batcher, lambda: [request], n=1, **options)
        with pytest.raises(ClientDisconnect):
            async for _, event in events:
                found.append(event)
                async with asyncio.timeout(60):
                    while len(found) == 1 and len(events._came) < 20:
                        await asyncio.sleep(0.001)
                leaves.put_nowait({"type": "http.disconnect"})
        events.close()
        return found

    try:
        assert asyncio.run(ask())[-1].n_tokens > 20
    finally:
        batcher.close()
        trio.forget()


# -- the end --------------------------------------------------------------------------------


def stream_lines(served, lines, **body):
    body = {"prompt": KAZAKH, "stream": True, **ENDLESS, **body}
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=body, timeout=PATIENCE_S
    ) as response:
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
        thread.join(PATIENCE_S)
        assert served.process.wait(PATIENCE_S) == code
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
    events = [line.removeprefix("data: ") for line in lines if line]
    if drain:
        assert events[-1] == "[DONE]"
    else:
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
def test_while_answers_end_new_requests_are_told_to_come_again():
    """Bug: the port was closed at once, and requests on open connections broke off."""
    lines = []
    with serving("--n-ctx", 8192, "--drain", 600) as served:
        with httpx.Client(base_url=served.url, timeout=PATIENCE_S) as client:
            assert client.get("/health").status_code == 200  # this connection stays open
            thread = threading.Thread(
                target=stream_lines, args=(served, lines), kwargs={"max_tokens": 1200}
            )
            thread.start()
            served.wait_until(is_running)
            served.process.send_signal(signal.SIGTERM)
            while not refuses(served):
                time.sleep(0.02)
            body = {"messages": [{"role": "user", "content": KAZAKH}], "max_tokens": 1}
            for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
                for ask in (client.post, httpx.post):
                    url = path if ask == client.post else served.url + path
                    told = ask(url, json=body, timeout=PATIENCE_S)
                    assert told.status_code == 503 and told.headers["retry-after"] == "5"
            assert served.metrics()["trimix_requests_running"] == 1
        thread.join(PATIENCE_S)
        assert served.process.wait(PATIENCE_S) == 0
    assert [line for line in lines if line][-1] == "data: [DONE]"


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
        while served.process.poll() is None and not refuses(served):
            time.sleep(0.02)  # until the first signal was taken in
        served.process.send_signal(signal.SIGINT)
        thread.join(PATIENCE_S)
        assert served.process.wait(PATIENCE_S) == 130
    assert "shutting_down" in [line for line in lines if line][-1]


HANGING = """
import sys, time
from trimix_gguf.answering import batching
from trimix_gguf.answering.batching import Batcher
from trimix_gguf.server import running
running._GRACE_S = 0.5
batching.LONG_STEP_S = 0.0
Batcher._step = lambda self: time.sleep(10**6)
from trimix_gguf.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
@pytest.mark.parametrize("drain", [0, 10**11])
def test_sigterm_ends_a_server_whose_engine_hangs(drain):
    """The second one, where running answers have long; bug: that waited as long, too."""
    program = (sys.executable, "-c", HANGING)
    with serving("--drain", drain, program=program) as served, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.post, "/v1/completions", {"prompt": "a"})
        served.wait_until(is_running)
        assert served.health() == "busy"
        served.process.send_signal(signal.SIGTERM)
        if drain:
            while not refuses(served):
                time.sleep(0.02)
            served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE_S) == 128 + signal.SIGTERM
        assert error_of(asked.result(), 503)["code"] == "shutting_down"


def refuses(served):
    """Whether it takes no more requests."""
    return httpx.get(f"{served.url}/health", timeout=PATIENCE_S).status_code == 503


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
