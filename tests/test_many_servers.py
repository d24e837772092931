"""Several servers behind one address, by the recipes of the help page, while one of them ends."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx
import openai
import pytest
from served import ENDLESS, PATIENCE_S, TEXTS, Served, serving

from trimix_gguf.cli.help import page

BALANCERS = ["haproxy", "caddy"]
N_CLIENTS = 8
pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals")


def recipe(language):
    """The block of the help page in that language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", page("many-servers"), re.S)
    return block


def command(balancer, folder, port, servers, maxconn):
    """What starts a balancer with the page's recipe as it is, but for the addresses."""
    text = recipe(balancer).replace(":8080", f":{port}", 1)
    for server, address in zip(servers, ("192.0.2.11:8080", "192.0.2.12:8080"), strict=True):
        assert address in text
        text = text.replace(address, f"127.0.0.1:{server.port}")
    text = text.replace("maxconn 32", f"maxconn {maxconn}")
    path = folder / "configuration"
    if balancer == "haproxy":
        path.write_text(text.replace("bind :", "bind 127.0.0.1:"), encoding="utf-8")
        return ["haproxy", "-db", "-f", str(path)]
    head = "{\n admin off\n}\n"
    path.write_text(f"{head}http://127.0.0.1{text}", encoding="utf-8")
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(path)]


@dataclass
class Village:
    """Two servers, called one and two, and the address in front of them."""

    url: str
    servers: list[Served]


@contextmanager
def village(balancer, folder, *options, maxconn=32):
    if shutil.which(balancer) is None:
        pytest.skip(f"{balancer} is not installed")
    options = ("--n-ctx", 4096, "--parallel", 4, "--drain", 600, *options)
    with ExitStack() as stack:
        named = [
            serving(
                "--name",
                name,
                "--trusted-proxy",
                "127.0.0.1",
                "--log-file",
                folder / name,
                *options,
            )
            for name in ("one", "two")
        ]
        servers = [stack.enter_context(server) for server in named]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
        started = command(balancer, folder, port, servers, maxconn)
        with subprocess.Popen(started, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                deadline = time.monotonic() + PATIENCE_S
                while not answers(f"{url}/health"):
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
                yield Village(url, servers)
            finally:
                process.terminate()


def answers(url):
    try:
        return httpx.get(url, timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False


# -- where chats go -------------------------------------------------------------------------


def asked(i):
    """The body of a client's request."""
    messages = [{"role": "user", "content": TEXTS[i % len(TEXTS)]}]
    return {"messages": messages, "max_tokens": 8, "model": "nano", **ENDLESS}


@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_chat_stays_on_its_server_and_metrics_add_up(balancer, tmp_path):
    with village(balancer, tmp_path) as here, ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(timeout=PATIENCE_S)) for _ in range(N_CLIENTS)]
        sessions = [{"X-Session": f"chat-{i}"} for i in range(N_CLIENTS)]
        bodies, usages = [], []
        for _ in range(3):
            bodies.append(
                [
                    client.post(f"{here.url}/v1/chat/completions", json=asked(i)).json()
                    for i, client in enumerate(clients)
                ]
            )
            if balancer == "haproxy":  # clients without cookies
                bodies[-1] += [
                    httpx.post(
                        f"{here.url}/v1/chat/completions",
                        json=asked(i),
                        headers=session,
                        timeout=PATIENCE_S,
                    ).json()
                    for i, session in enumerate(sessions)
                ]
        names = [[body["model"] for body in several] for several in bodies]
        assert names[0] == names[1] == names[2]
        if balancer == "haproxy":
            assert set(names[0]) == {"one", "two"}
        usages = [body["usage"] for several in bodies for body in several]
        counted = [server.metrics() for server in here.servers]
        for ours, theirs in [("prompt", "prompt"), ("generated", "completion")]:
            total = sum(metrics[f"trimix_{ours}_tokens_total"] for metrics in counted)
            assert total == sum(usage[f"{theirs}_tokens"] for usage in usages)
        # The second and third time a server has read the question before.
        cached = sum(metrics["trimix_cached_tokens_total"] for metrics in counted)
        assert cached >= sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages) > 0
    logs = "".join((tmp_path / name).read_text("utf-8") for name in ("one", "two"))
    assert logs.count("/v1/chat/completions 200") == len(usages)


def test_requests_wait_in_haproxy_while_all_servers_are_full(tmp_path):
    full = ("--parallel", 2, "--queue", 1)
    with village("haproxy", tmp_path, *full, maxconn=2) as here:

        def status(i):
            url = f"{here.url}/v1/chat/completions"
            return httpx.post(url, json=asked(i), timeout=PATIENCE_S).status_code

        with ThreadPoolExecutor(4 * N_CLIENTS) as pool:
            assert set(pool.map(status, range(4 * N_CLIENTS))) == {200}


# -- while one ends -------------------------------------------------------------------------


@dataclass
class Crowd:
    """Clients that ask one thing after another, and twice more once it is the last time.

    Where a balancer `hides` that a server broke off, a stream without its end is a failure too.
    """

    url: str
    hides: bool
    failed: list[tuple[float, BaseException]] = field(default_factory=list)  # begun when, why
    models: dict[int, list[str]] = field(default_factory=dict)
    is_last: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self):
        """Half of them are OpenAI's client; the others read streams."""
        for i in range(N_CLIENTS):
            self.models[i] = []
            ask = self.whole if i % 2 else self.stream
            thread = threading.Thread(target=self.run, args=(i, ask))
            self.threads.append(thread)
            thread.start()

    def run(self, i, ask):
        n_left = 2
        base = f"{self.url}/v1"
        with openai.OpenAI(base_url=base, api_key="unused", timeout=PATIENCE_S) as client:
            while n_left:
                began, is_last = time.monotonic(), self.is_last.is_set()
                try:
                    self.models[i].append(ask(client, i))
                    n_left -= is_last
                except (openai.APIError, httpx.TransportError) as error:
                    self.failed.append((began, error))

    def whole(self, client, i):
        body = {**asked(i), "max_tokens": 40}
        extra = {"logit_bias": body.pop("logit_bias")}
        return client.chat.completions.create(**body, **extra).model

    def stream(self, client, i):
        body = {**asked(i), "max_tokens": 40, "stream": True}
        chunks = list(client.chat.completions.create(**body))
        # Broken off before its first event, or after some.
        if self.hides and (not chunks or chunks[-1].choices[0].finish_reason is None):
            raise httpx.RemoteProtocolError("the stream has no end")
        assert chunks[-1].choices[0].finish_reason == "length"
        return chunks[0].model

    def end(self):
        self.is_last.set()
        for thread in self.threads:
            thread.join(PATIENCE_S)


@contextmanager
def crowded(balancer, folder):
    """(clients, the server that answers at least two of them, the other's name)."""
    with village(balancer, folder) as here:
        crowd = Crowd(here.url, hides=balancer == "caddy")
        crowd.begin()
        # Either may have most of them.
        while not (busy := [server for server in here.servers if is_running(server.metrics())]):
            time.sleep(0.02)
        other = "two" if busy[0] is here.servers[0] else "one"
        yield crowd, busy[0], other


def is_running(metrics):
    return metrics["trimix_requests_running"] >= 2


@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_server_that_is_killed_loses_only_what_it_was_answering(balancer, tmp_path):
    with crowded(balancer, tmp_path) as (crowd, busy, other):
        busy.process.kill()
        busy.process.wait(PATIENCE_S)
        killed = time.monotonic()
        crowd.end()
        assert all(models[-2:] == [other] * 2 for models in crowd.models.values())
        assert all(began < killed for began, _ in crowd.failed), crowd.failed
        # OpenAI's client asked again by itself; what had begun to stream did not.
        assert len(crowd.failed) <= N_CLIENTS // 2


@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_server_that_is_told_to_end_loses_nothing(balancer, tmp_path):
    with crowded(balancer, tmp_path) as (crowd, busy, other):
        busy.process.send_signal(signal.SIGTERM)
        assert busy.process.wait(PATIENCE_S) == 0
        crowd.end()
        assert all(models[-2:] == [other] * 2 for models in crowd.models.values())
        assert not crowd.failed
