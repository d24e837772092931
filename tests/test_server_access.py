"""What an administrator sets: names, proxies, keys for each person, and what the log says."""

import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
from conftest import KAZAKH
from served import ENDLESS, PATIENCE_S, error_of, serving

from trimix_gguf.cli.help import FOLDER
from trimix_gguf.server.keys import Keys
from trimix_gguf.server.log import Log

SMALL = {"prompt": KAZAKH, "max_tokens": 3, "temperature": 0}
LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (?P<client>\S+) (?P<key>\S+) (?P<method>\S+) "
    r"(?P<path>\S+) (?P<status>\d+) (?P<ms>\d+) ms (?P<prompt>\d+)\+(?P<answer>\d+) tokens"
    r"(?: ignored: (?P<ignored>.+))?"
)


def lines_of(path, n):
    """The first n lines of a log, once they are written."""
    deadline = time.monotonic() + PATIENCE_S
    while len(lines := path.read_text(encoding="utf-8").splitlines()) < n:
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    return found


# -- the log --------------------------------------------------------------------------------


def test_the_log_has_a_line_per_request_and_no_text(tmp_path):
    log = tmp_path / "log"
    with serving("--log-file", log) as served:
        whole = served.post("/v1/completions", SMALL).json()
        served.post("/v1/completions?secret=1", {**SMALL, "stream": True, "weather": 1})
        httpx.get(f"{served.url}/a%0Ab%1B[31m%20c")
        served.health()
        served.metrics()
        served.post("/v1/completions", {"prompt": 1})
        found = lines_of(log, 4)
    usage = whole["usage"]
    tokens = (str(usage["prompt_tokens"]), str(usage["completion_tokens"]))
    assert [m["status"] for m in found] == ["200", "200", "404", "400"]
    assert [(m["prompt"], m["answer"]) for m in found] == [tokens, tokens, ("0", "0"), ("0", "0")]
    assert {m["client"] for m in found} == {"127.0.0.1"} and {m["key"] for m in found} == {"-"}
    assert [m["ignored"] for m in found] == [None, "weather", None, None]
    assert found[2]["path"] == "/a%0Ab%1B%5B31m%20c"
    text = log.read_text(encoding="utf-8")
    assert "secret" not in text and KAZAKH[:8] not in text


def test_the_log_is_standard_error_by_default():
    with serving() as served:
        served.post("/v1/completions", SMALL)
        while not LINE.fullmatch(line := served.process.stderr.readline().decode().rstrip("\n")):
            assert line, "the server has ended"  # what it says of the trio's tuning comes first


def test_a_log_that_nobody_reads_holds_nothing_up():
    with serving() as served:  # its standard error is a pipe of 64 kB
        with httpx.Client(base_url=served.url) as client:
            for _ in range(1500):
                assert client.get(f"/{'a' * 200}").status_code == 404
        assert served.complete(KAZAKH, max_tokens=1)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not move a file that is open")
def test_a_log_that_was_moved_begins_again(tmp_path):
    """As logrotate does."""
    log = Log(tmp_path / "log")
    log.write("one")
    while (tmp_path / "log").read_text(encoding="utf-8") != "one\n":
        time.sleep(0.01)
    (tmp_path / "log").replace(tmp_path / "log.1")
    log.write("two")
    log.close()
    assert (tmp_path / "log").read_text(encoding="utf-8") == "two\n"
    assert (tmp_path / "log.1").read_text(encoding="utf-8") == "one\n"


# -- names and proxies ----------------------------------------------------------------------


def test_a_proxys_name_is_let_in():
    """Bug: behind nginx as it is installed every POST of a page got 403."""
    with serving("--allowed-host", "AI.example.org") as served:

        def status(**headers):
            return httpx.get(f"{served.url}/v1/models", headers=headers).status_code

        assert status(Host="ai.example.org") == status(Host="ai.example.org:8443") == 200
        assert status(Origin="http://ai.example.org") == 200  # Host is that of the address
        assert status(Host="ai.example.org", Origin="https://ai.example.org") == 200
        assert status(Host="evil.test") == status(Origin="http://evil.test") == 403
        assert status(Origin="http://ai.example.org.evil.test") == 403
        assert status(Origin="null") == 403


@pytest.mark.parametrize(
    ("proxies", "told", "client"),
    [
        ([], "192.0.2.7", "127.0.0.1"),
        (["127.0.0.1"], "192.0.2.7", "192.0.2.7"),
        (["127.0.0.0/8"], "203.0.113.9, 192.0.2.7", "192.0.2.7"),  # the first is anyone's claim
        (["127.0.0.1", "192.0.2.0/24"], "203.0.113.9, 192.0.2.7", "203.0.113.9"),
        (["127.0.0.1"], "2001:db8::1", "2001:db8::1"),
        (["127.0.0.1"], "[2001:db8::1]:4711", "2001:db8::1"),
        (["127.0.0.1"], "a b\x1b", "127.0.0.1"),
        (["10.0.0.0/8"], "192.0.2.7", "127.0.0.1"),
    ],
)
def test_a_client_is_whom_a_trusted_proxy_names(proxies, told, client):
    from ipaddress import ip_network

    from trimix_gguf.server.clients import client_of

    scope = {"client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", told.encode())]}
    assert client_of({"type": "http", **scope}, [ip_network(p) for p in proxies]) == client


def test_the_log_names_the_client_of_a_trusted_proxy(tmp_path):
    told = {"X-Forwarded-For": "192.0.2.7"}
    with serving("--log-file", tmp_path / "a", "--trusted-proxy", "127.0.0.1") as served:
        httpx.get(f"{served.url}/v1/models", headers=told)
        assert lines_of(tmp_path / "a", 1)[0]["client"] == "192.0.2.7"
    with serving("--log-file", tmp_path / "b") as served:
        httpx.get(f"{served.url}/v1/models", headers=told)
        assert lines_of(tmp_path / "b", 1)[0]["client"] == "127.0.0.1"


# -- keys -----------------------------------------------------------------------------------


def status_of(served, key):
    held = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{served.url}/v1/models", headers=held).status_code


def test_each_person_has_a_key_and_the_file_is_read_again(tmp_path):
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text("# ours\naigul first\n\nсәуле second\nthird\n", encoding="utf-8")
    with serving("--api-key-file", keys, "--api-key", "zeroth", "--log-file", log) as served:
        known = ("first", "second", "third", "zeroth")
        assert {status_of(served, key) for key in known} == {200}
        wrong = ("none", "aigul", "first second", "fourth")
        assert {status_of(served, key) for key in wrong} == {401}
        assert [m["key"] for m in lines_of(log, 8)] == [
            *("aigul", "сәуле", "key-5", "-"),
            *"----",
        ]
        held = {"Authorization": "Bearer second"}
        usage = served.post("/v1/completions", SMALL, headers=held).json()["usage"]
        counted = served.metrics(Authorization="Bearer first")
        name = 'trimix_key_tokens_total{key="сәуле",kind="%s"}'
        assert counted[name % "prompt"] == usage["prompt_tokens"]
        assert counted[name % "generated"] == usage["completion_tokens"]
        keys.write_text("aigul first\nfourth\n", encoding="utf-8")
        assert status_of(served, "fourth") == status_of(served, "first") == 200
        assert status_of(served, "second") == 401
        keys.write_text("a b c\n", encoding="utf-8")  # the earlier ones stay
        assert status_of(served, "fourth") == 200
        keys.unlink()
        assert status_of(served, "fourth") == 200 and status_of(served, "zeroth") == 200
        keys.write_text("aigul fifth\n", encoding="utf-8")
        assert status_of(served, "fifth") == 200 and status_of(served, "fourth") == 401


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "has no key"), ("# a\n", "has no key"), ("a b c", "line 1"), ("a\nb қ\n", "line 2")],
)
def test_a_file_of_keys_that_cannot_be_used_is_one_line(trimix, tmp_path, text, words):
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    result = trimix("serve", "--api-key-file", tmp_path / "keys")
    said = result.stderr.decode()
    assert result.returncode == 1 and words in said and said.count("\n") == 1
    assert "қ" not in said


def test_a_file_of_keys_may_begin_with_a_mark_as_windows_writes_it(tmp_path):
    """Bug: its first line was refused, also a comment."""
    (tmp_path / "keys").write_text("# ours\naigul first\n", encoding="utf-8-sig")
    assert Keys(None, tmp_path / "keys").name_of(b"first") == "aigul"


def test_no_file_of_keys_is_one_line(trimix, tmp_path):
    result = trimix("serve", "--api-key-file", tmp_path / "none")
    assert result.returncode == 1 and result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--allowed-host", "http://a"), "not a name"),
        (("--allowed-host", "*"), "not a name"),
        (("--trusted-proxy", "proxy"), "not an address"),
        (("--trusted-proxy", "10.0.0.1/8"), "not an address"),
        (("--api-key-file", "k", "--no-auth"), "not both"),
    ],
)
def test_wrong_settings_are_usage_errors(trimix, arguments, words):
    result = trimix("serve", *arguments)
    assert result.returncode == 2 and words in result.stderr.decode()


def test_a_log_that_cannot_be_written_is_one_line(trimix, tmp_path):
    result = trimix("serve", "--log-file", tmp_path / "none" / "log")
    assert result.returncode == 1 and b"--log-file" in result.stderr


# -- shares ---------------------------------------------------------------------------------


def test_one_client_cannot_take_every_place(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a first\nb second\n", encoding="utf-8")
    long = {"prompt": KAZAKH, "max_tokens": 400, "stream": True, **ENDLESS}
    held, other = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    with serving(
        "--api-key-file", keys, "--per-client", 1, "--parallel", 4, "--n-ctx", 2048
    ) as served:
        url = f"{served.url}/v1/completions"
        with httpx.stream("POST", url, json=long, headers=held, timeout=PATIENCE_S) as first:
            lines = first.iter_lines()
            assert next(lines)
            refused = served.post("/v1/completions", SMALL, headers=held)
            assert error_of(refused, 429)["code"] == "queue_full"
            assert served.post("/v1/completions", SMALL, headers=other).status_code == 200
        deadline = time.monotonic() + PATIENCE_S
        while served.post("/v1/completions", SMALL, headers=held).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# -- recipes --------------------------------------------------------------------------------


def recipe(language):
    """The block of the help page in that language."""
    text = (FOLDER / "serve.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.S)
    return block


@contextmanager
def behind(folder, to_configuration, command):
    """A server behind a proxy, whose configuration is made for (its port, the server's)."""
    names = ("--allowed-host", "ai.example.org", "--trusted-proxy", "127.0.0.1")
    with serving(*names, "--log-file", folder / "log") as served, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        text = to_configuration(port, served.port)
        (folder / "configuration").write_text(text, encoding="utf-8")
        environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as proxy:
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                proxy.terminate()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_recipe_for_nginx_works(tmp_path):
    """The block of the help page as it is, but for the ports."""

    def configuration(port, of_server):
        block = recipe("nginx").replace("listen 80;", f"listen 127.0.0.1:{port};")
        block = block.replace("127.0.0.1:8080", f"127.0.0.1:{of_server}")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {tmp_path};" for kind in kinds)
        head = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\nevents {{}}\n"
        return f"{head}http {{ access_log off; {paths}\n{block} }}\n"

    command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "configuration")]
    with behind(tmp_path, configuration, command) as url:
        ask_through(url)
    assert {m["client"] for m in lines_of(tmp_path / "log", 2)} == {"203.0.113.9"}


@pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")
def test_the_recipe_for_caddy_works(tmp_path):
    """The block of the help page, without HTTPS, for which it would need the name."""

    def configuration(port, of_server):
        block = recipe("caddy").replace("ai.example.org", f"http://ai.example.org:{port}")
        block = block.replace("127.0.0.1:8080", f"127.0.0.1:{of_server}")
        return f"{{\n admin off\n}}\n{block}"

    command = ["caddy", "run", "--adapter", "caddyfile"]
    command += ["--config", str(tmp_path / "configuration")]
    with behind(tmp_path, configuration, command) as url:
        ask_through(url)
    # It believes no X-Forwarded-For that a client sends, and writes its own.
    assert {m["client"] for m in lines_of(tmp_path / "log", 2)} == {"127.0.0.1"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_recipe_for_systemd_is_a_unit(tmp_path):
    unit = tmp_path / "trimix.service"
    text = recipe("ini").replace("/opt/trimix/.venv/bin/trimix", "/bin/sh")
    unit.write_text(text.replace("User=trimix", "User=root"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, timeout=60)
    assert done.returncode == 0 and unit.name.encode() not in done.stderr, done.stderr.decode()


def ask_through(url):
    """A page's POST as a browser sends it, and a stream that comes in parts."""
    page = {"Host": "ai.example.org", "Origin": "http://ai.example.org"}
    page["X-Forwarded-For"] = "203.0.113.9"  # as another proxy before this one would
    deadline = time.monotonic() + 60  # a proxy that refuses its settings never listens
    while True:
        try:
            whole = httpx.post(f"{url}/v1/completions", json=SMALL, headers=page, timeout=60)
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert whole.status_code == 200, whole.text
    body = {"prompt": KAZAKH, "max_tokens": 60, "stream": True, **ENDLESS}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=page) as stream:
        parts = [part for part in stream.iter_raw() if part.strip()]
    assert len(parts) > 5 and b"[DONE]" in parts[-1]
