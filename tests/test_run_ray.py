"""`trimix run --ray`: two processes of a cluster answer a file, and one of them is killed."""

import pytest
from clusters import ended, has_no_ray, has_ray, kill_one, no_head, started, wait_for
from test_run import mixed, one_line_error_after_bars, write

SMALL = ("--threads", "1", "--parallel", "2")  # groups of eight answers


def n_groups(journal):
    """How many groups of answers a journal has; an empty line ends its header and each of them."""
    return journal.read_bytes().count(b"\n\n") - 1 if journal.exists() else 0


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(a file of requests, the bytes that are answered without Ray)."""
    folder = tmp_path_factory.mktemp("asked")
    source, out = write(folder / "in.jsonl", mixed(40)), folder / "out.jsonl"
    done = ended(started("run", source, "-o", out, *SMALL))
    assert done.returncode == 0, done.stderr.decode()
    return source, out.read_bytes()


@has_ray
def test_a_worker_that_is_killed_changes_nothing(asked, tmp_path):
    source, expected = asked
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    process = started("run", source, "-o", out, *SMALL, "--ray", "local", "--ray-workers", 2)
    wait_for(lambda: n_groups(journal), process)
    kill_one(process, b"ray::_Worker")
    done = ended(process)
    assert done.returncode == 0, done.stderr.decode()
    assert out.read_bytes() == expected and not journal.exists()


@has_ray
def test_answers_on_standard_output_are_all_that_is_there(asked):
    """Ray printed there that a process was lost."""
    source, expected = asked
    process = started("run", source, "-o", "-", *SMALL, "--ray", "local", "--ray-workers", 2)
    first = process.stdout.readline()
    kill_one(process, b"ray::_Worker")
    done = ended(process)
    assert done.returncode == 0, done.stderr.decode()
    assert first + done.stdout == expected


@has_ray
def test_a_head_node_that_ends_is_one_line_and_its_answers_are_kept(asked, trimix, tmp_path):
    source, expected = asked
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    process = started("run", source, "-o", out, *SMALL, "--ray", "local")
    wait_for(lambda: n_groups(journal), process)
    kill_one(process, b"gcs_server")
    assert "the head node of Ray at " in one_line_error_after_bars(ended(process))
    assert n_groups(journal) and not out.exists()
    done = trimix("run", source, "-o", out, *SMALL)  # goes on, here without Ray
    assert done.returncode == 0 and out.read_bytes() == expected, done.stderr.decode()


@has_ray
def test_what_a_worker_finds_wrong_is_one_line(tmp_path):
    wrong = {"prompt": "a", "max_tokens": 4, "logit_bias": {"99999999": 1}}
    source = write(tmp_path / "in.jsonl", [*mixed(3), wrong, *mixed(0)])
    done = ended(started("run", source, "-o", tmp_path / "out", *SMALL, "--ray", "local"))
    assert "in.jsonl, line 4: " in one_line_error_after_bars(done)


@has_ray
def test_no_head_node_is_one_line(trimix, tmp_path):
    source = write(tmp_path / "in.jsonl", mixed(1))
    for given, words in [(no_head(), "no head node of Ray"), ("a", "not a HOST:PORT")]:
        done = trimix("run", source, "-o", tmp_path / "out", "--ray", given)
        assert words in one_line_error_after_bars(done) and given in done.stderr.decode()


@has_no_ray
def test_without_ray_it_is_said_how_to_install_it(trimix, tmp_path):
    source = write(tmp_path / "in.jsonl", mixed(1))
    done = trimix("run", source, "-o", tmp_path / "out", "--ray", "auto")
    assert "pip install 'trimix-gguf[ray]'" in one_line_error_after_bars(done)


def test_workers_without_a_cluster_are_a_usage_error(trimix, tmp_path):
    source = write(tmp_path / "in.jsonl", mixed(1))
    done = trimix("run", source, "-o", tmp_path / "out", "--ray-workers", 2)
    assert done.returncode == 2 and b"--ray-workers goes with --ray" in done.stderr
