"""Models on several machines: `trimix worker` and --rpc, with workers on this one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import httpx
import numpy as np
import pytest
from conftest import KAZAKH
from served import ENDLESS, PATIENCE_S, error_of, serving
from test_cli import one_line_error
from workers import HAVE_WORKERS, lending

from trimix_gguf.errors import WorkerError
from trimix_gguf.machine import borrowing, rpc, self_test
from trimix_gguf.machine import lending as lending_room
from trimix_gguf.machine.borrowing import open_links, parse_workers
from trimix_gguf.machine.placement import MARGIN
from trimix_gguf.server.running import bind

pytestmark = HAVE_WORKERS
GREEDY = ("--temperature", "0", "--weights", "0.7,1", "--threads", "1")
LONG = ("--n-ctx", "3072")  # for answers that do not end before a worker does
LOGITS = """
import os, sys, numpy as np
from trimix_gguf import Trio
from trimix_gguf.machine import rpc
if rpc.is_engine():
    rpc.add_workers()
with Trio.nano(n_threads=1, n_gpu_layers="auto") as trio:
    print({role: model.device for role, model in trio.models.items()}, file=sys.stderr)
    trio.prefill(trio.prompt(sys.argv[2]))
    np.savez(sys.argv[1], **trio.rows())
"""


@contextmanager
def linked(endpoints):
    """The environment of an engine on these workers, which are ours within it."""
    links = open_links(parse_workers(endpoints), rpc.build())
    workers = [{"endpoint": link.endpoint, "devices": link.devices} for link in links]
    try:
        yield {**os.environ, rpc.WORKERS: json.dumps(workers)}
    finally:
        for link in links:
            link.close()


def logits(path, environment):
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, str(path), KAZAKH],
        env=environment,
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    return np.load(path), done.stderr.decode()


def megabytes(worker):
    """What an engine has sent and got, as the worker says when it has ended."""
    line = ""
    while "has ended" not in line:
        line = worker.process.stderr.readline().decode()
    return [float(n) for n in re.search(r"sent ([\d.]+) MB and got ([\d.]+) MB", line).groups()]


# -- the same answers ---------------------------------------------------------------------------


def test_logits_over_workers_are_those_of_one_machine(two, tmp_path):
    with linked(two) as environment:
        over, places = logits(tmp_path / "over.npz", environment)
    here, _ = logits(tmp_path / "here.npz", dict(os.environ))
    assert "'large_ins': 'RPC0', 'small_cpt': 'RPC1', 'small_base': 'CPU'" in places
    for role in here:
        assert np.abs(here[role] - over[role]).max() < 1e-4


def test_a_model_split_over_workers_has_the_same_logits(tmp_path):
    """Where neither worker has room for it: they lend 12 and 7.5 MB beside what is left free."""
    with lending() as one, lending() as other:
        with linked(f"{one.endpoint},{other.endpoint}") as environment:
            workers = json.loads(environment[rpc.WORKERS])
            for worker, free in zip(workers, (12 << 20, 15 << 19), strict=True):
                worker["devices"][0]["free"] = MARGIN + free
            environment[rpc.WORKERS] = json.dumps(workers)
            over, places = logits(tmp_path / "over.npz", environment)
        weights = [megabytes(worker)[0] for worker in (one, other)]
    here, _ = logits(tmp_path / "here.npz", dict(os.environ))
    assert "'large_ins': 'RPC1+RPC0'" in places
    assert 1 < weights[1] < 0.6 * weights[0]  # as the plan splits it, not in halves
    for role in here:
        assert np.abs(here[role] - over[role]).max() < 1e-4


def test_greedy_text_over_workers_is_that_of_one_machine(trimix, two, tmp_path):
    asked = ("generate", KAZAKH, "-n", "24", *GREEDY)
    here, over = trimix(*asked), trimix(*asked, "--rpc", two)
    assert over.returncode == 0 and over.stdout == here.stdout, over.stderr.decode()
    kept = ("--prompt-cache", tmp_path / "kept", "--rpc", two)  # read from the workers' memory
    assert [trimix(*asked, *kept).stdout for _ in range(2)] == [here.stdout] * 2


def test_a_plan_names_the_workers_and_what_goes_over_the_network(trimix, two):
    report = json.loads(trimix("plan", "--rpc", two, "--json").stdout)
    devices = {role: model["device"] for role, model in report["models"].items()}
    assert devices == {"large_ins": "RPC0", "small_cpt": "RPC1", "small_base": "CPU"}
    assert report["flags"] == f"--rpc {two}" and report["fits"]
    table = trimix("plan", "--rpc", two).stdout.decode()
    assert "network, for each token" in table and "output layer here" in table


def test_what_a_token_sends_is_about_what_the_plan_says(trimix):
    """By the worker's own count; the output layer stays here, so that no row of logits comes."""
    with lending() as worker:
        asked = ("--rpc", worker.endpoint)
        sent = {}
        for n in (20, 120):
            words = ("-n", n, *GREEDY, "--speculative", "off", "--json", *asked)
            done = trimix("generate", "Қазақстан", *words)
            n_tokens = json.loads(done.stdout)["n_tokens"]
            sent[n_tokens] = 1e6 * sum(megabytes(worker))
        report = json.loads(trimix("plan", *asked, "--json").stdout)
    (few, before), (many, after) = sorted(sent.items())
    assert many - few > 50
    per_token = (after - before) / (many - few)
    planned = report["models"]["large_ins"]["network_bytes_per_token"]
    assert 0.6 * planned < per_token < 1.6 * planned
    assert per_token < 4 * 6144  # a row of the nano trio's logits


def test_an_address_that_was_said_takes_connections_at_once():
    """Bug: it listened a moment after it had said so, and a quick engine was refused."""
    with bind("127.0.0.1", 0) as listener:
        lending_room.Lender(listener, None, list, print)
        socket.create_connection(listener.getsockname()).close()


# -- a worker that is lost ----------------------------------------------------------------------


def test_a_killed_worker_is_one_line_and_exit_1():
    with lending() as one, lending() as other:
        command = [sys.executable, "-m", "trimix_gguf.cli", "generate", KAZAKH, "-n", "3000"]
        asked = [*command, *GREEDY, *LONG, "--rpc", f"{one.endpoint},{other.endpoint}"]
        process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(40)  # it answers
        other.kill()
        _, error = process.communicate(timeout=PATIENCE_S)
    lines = [line for line in error.decode().splitlines() if not line.startswith("weights:")]
    assert process.returncode == 1 and len(lines) == 1, error.decode()
    assert lines[0].startswith(f"trimix: worker {other.endpoint} has ended; start it again there")


def test_a_server_that_loses_a_worker_says_so_and_serves_again_when_it_is_back():
    with ExitStack() as stack:
        worker = stack.enter_context(lending())
        served = stack.enter_context(serving("--threads", "1", *LONG, "--rpc", worker.endpoint))
        before = served.complete("Қазақ", max_tokens=4)
        answers = []

        def ask():
            body = {"prompt": "Қазақ", "max_tokens": 2500, "temperature": 0, **ENDLESS}
            answers.append(served.post("/v1/completions", body))

        asking = threading.Thread(target=ask)
        asking.start()
        served.wait_until(lambda m: m["trimix_requests_running"] > 0)
        worker.kill()
        asking.join()
        for response in (answers[0], served.post("/v1/completions", {"prompt": "a"})):
            error = error_of(response, 503)
            assert error["code"] == "worker_lost" and worker.endpoint in error["message"]
        health = httpx.get(f"{served.url}/health", timeout=PATIENCE_S)
        assert worker.endpoint in error_of(health, 503)["message"]
        stack.enter_context(lending("--port", str(worker.port)))
        deadline = time.monotonic() + PATIENCE_S
        while httpx.get(f"{served.url}/health", timeout=PATIENCE_S).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        after = served.complete("Қазақ", max_tokens=4)
        assert after["choices"] == before["choices"]


def test_a_signal_ends_a_server_whose_worker_is_away():
    with lending() as worker, serving("--rpc", worker.endpoint, "--threads", "1") as served:
        worker.kill()
        served.process.stderr.readline()
        served.process.send_signal(signal.SIGTERM)
        served.process.communicate(timeout=PATIENCE_S)
    assert served.process.returncode == 0


# -- what is refused ----------------------------------------------------------------------------


@contextmanager
def answering(text):
    """A program at a port of this machine that says `text` to everyone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work():
            while True:
                try:
                    link, _ = listener.accept()
                except OSError:
                    return
                with link:
                    link.recv(4096)
                    link.sendall(text.encode())

        threading.Thread(target=work, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def refused(trimix, endpoint):
    done = trimix("generate", KAZAKH, "--rpc", endpoint)
    assert done.returncode == 1
    return one_line_error(done)


def test_another_build_is_refused_on_both_sides(trimix, two):
    with pytest.raises(WorkerError, match=r"refuses: it has llama-cpp-python .* and this is older"):
        borrowing.Link(two.split(",")[0], "older")
    with answering('{"build": "newer", "devices": []}\n') as endpoint:
        line = refused(trimix, endpoint)
    assert f"worker {endpoint} has newer, and this is llama-cpp-python" in line


def test_what_does_not_answer_or_is_no_worker_is_one_line(trimix):
    with socket.socket() as bound:  # a port where nobody listens
        bound.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{bound.getsockname()[1]}"
        assert f"worker {endpoint}: connection refused; is `trimix worker`" in refused(
            trimix, endpoint
        )
    with answering("HTTP/1.1 400 Bad Request\r\n\r\n") as endpoint:
        assert f"{endpoint} does not answer as `trimix worker` does" in refused(trimix, endpoint)
    for wrong in ("host", "host:0", "[::1]:50052", "a:1,a:1", ","):
        assert "--rpc" in refused(trimix, wrong)


def test_llama_cpp_itself_is_refused_without_a_line_of_control(two):
    """Whoever has another build would otherwise reach the server past the comparison."""
    host, port = two.split(",")[0].split(":")
    said = b""
    with suppress(ConnectionResetError), socket.create_connection((host, int(port))) as link:
        link.sendall(bytes([14]) + (24).to_bytes(8, "little") + bytes(24))
        said = link.recv(1)
    assert said == b""


def test_a_worker_has_one_engine_at_a_time(trimix, two):
    with linked(two):
        assert "a worker has one engine at a time" in refused(trimix, two)
    assert trimix("plan", "--rpc", two).returncode == 0


def test_too_little_memory_is_one_line_before_anything_is_loaded(trimix, two):
    done = trimix("generate", KAZAKH, "--rpc", two, "--n-ctx", str(10**8))
    assert done.returncode == 1 and "this trio needs" in one_line_error(done)


def test_other_machines_are_let_in_only_where_that_is_asked_for(trimix):
    done = trimix("worker", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert b"a worker asks nobody for a password" in done.stderr
    with lending("--host", "0.0.0.0", "--insecure-lan") as worker:
        assert worker.endpoint.startswith("0.0.0.0:")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_worker_with_one_line(how):
    with lending() as worker:
        assert worker.end(how) == "trimix: the worker has ended\n"
    assert worker.process.returncode == (130 if how == signal.SIGINT else 0)


def test_without_the_library_one_line_says_how_to_build_it(trimix, monkeypatch, tmp_path):
    for file in self_test.library_folder().iterdir():
        if "ggml-rpc" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    for words in (("worker", "--port", "0"), ("generate", KAZAKH, "--rpc", "127.0.0.1:1")):
        done = trimix(*words)
        assert done.returncode == 1
        assert "trimix_gguf.machine.build install" in one_line_error(done)


# -- a model that no process has room for -------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is Linux's")
def test_a_model_that_no_process_has_room_for_answers_over_two_workers():
    """Its caches are what is large: the nano trio has few weights."""
    limit, n_ctx = 1900 << 20, "300000"
    words = ("generate", KAZAKH, "-n", "4", *GREEDY, "--n-ctx", n_ctx, "--flash-attn")
    command = ["sh", "-c", f'ulimit -v {limit >> 10}; exec "$@"', "sh"]
    command += [sys.executable, "-m", "trimix_gguf.cli", *words]
    here = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    assert here.returncode == 1 and b"failed to allocate" in here.stderr
    with lending(limit=limit) as one, lending(limit=limit) as other:
        command += ["--rpc", f"{one.endpoint},{other.endpoint}"]
        over = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    assert over.returncode == 0 and over.stdout.strip(), over.stderr.decode()
