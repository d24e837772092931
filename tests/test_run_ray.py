"""`trimix run --ray`: two processes of a cluster answer a file, and one of them is killed."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from served import PATIENCE_S
from test_run import mixed, one_line_error_after_bars, write

SMALL = ("--threads", "1", "--parallel", "2")  # groups of eight answers
has_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or not Path("/proc/self/environ").exists(),
    reason="ray is not installed, or there is no /proc",
)


def started(*arguments):
    command = [sys.executable, "-m", "trimix_gguf.cli", "run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def processes(name):
    """Ids of Ray's processes of that name that are of this test."""
    own = f"TRIMIX_CACHE={os.environ['TRIMIX_CACHE']}".encode()
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes().split(b"\0")[0]
            if name in title and own in (folder / "environ").read_bytes():
                yield int(folder.name)
        except OSError:
            continue


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def n_groups(journal):
    """How many groups of answers a journal has; an empty line ends its header and each of them."""
    return journal.read_bytes().count(b"\n\n") - 1 if journal.exists() else 0


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(a file of requests, the bytes that are answered without Ray)."""
    folder = tmp_path_factory.mktemp("asked")
    source, out = write(folder / "in.jsonl", mixed(40)), folder / "out.jsonl"
    process = started(source, "-o", out, *SMALL)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said.decode()
    return source, out.read_bytes()


@has_ray
def test_a_worker_that_is_killed_changes_nothing(asked, tmp_path):
    source, expected = asked
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    process = started(source, "-o", out, *SMALL, "--ray", "local", "--ray-workers", 2)
    wait_for(lambda: n_groups(journal), process)
    os.kill(wait_for(lambda: list(processes(b"ray::_Worker")), process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said.decode()
    assert out.read_bytes() == expected and not journal.exists()


@has_ray
def test_a_head_node_that_ends_is_one_line_and_its_answers_are_kept(asked, trimix, tmp_path):
    source, expected = asked
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    process = started(source, "-o", out, *SMALL, "--ray", "local")
    wait_for(lambda: n_groups(journal), process)
    os.kill(*processes(b"gcs_server"), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    assert "the head node of Ray at " in one_line_error_after_bars(done)
    assert n_groups(journal) and not out.exists()
    done = trimix("run", source, "-o", out, *SMALL)  # goes on, here without Ray
    assert done.returncode == 0 and out.read_bytes() == expected, done.stderr.decode()


@has_ray
def test_what_a_worker_finds_wrong_is_one_line(tmp_path):
    wrong = {"prompt": "a", "max_tokens": 4, "logit_bias": {"99999999": 1}}
    source = write(tmp_path / "in.jsonl", [*mixed(3), wrong, *mixed(0)])
    process = started(source, "-o", tmp_path / "out", *SMALL, "--ray", "local")
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    assert "in.jsonl, line 4: " in one_line_error_after_bars(done)


@has_ray
def test_no_head_node_is_one_line(trimix, tmp_path):
    source = write(tmp_path / "in.jsonl", mixed(1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for given, words in [(address, "no head node of Ray"), ("a", "not a HOST:PORT")]:
        done = trimix("run", source, "-o", tmp_path / "out", "--ray", given)
        assert words in one_line_error_after_bars(done) and given in done.stderr.decode()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_is_said_how_to_install_it(trimix, tmp_path):
    source = write(tmp_path / "in.jsonl", mixed(1))
    done = trimix("run", source, "-o", tmp_path / "out", "--ray", "auto")
    assert "pip install 'trimix-gguf[ray]'" in one_line_error_after_bars(done)


def test_workers_without_a_cluster_are_a_usage_error(trimix, tmp_path):
    source = write(tmp_path / "in.jsonl", mixed(1))
    done = trimix("run", source, "-o", tmp_path / "out", "--ray-workers", 2)
    assert done.returncode == 2 and b"--ray-workers goes with --ray" in done.stderr
