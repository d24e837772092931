"""`trimix eval --ray`: the processes of a cluster answer questions, and one of them is killed."""

import json
import shutil

import pytest
from clusters import ended, has_no_ray, has_ray, kill_one, no_head, started, wait_for
from test_run import one_line_error_after_bars
from topics import TOPICS, arguments

METHODS = "ppl,ppl-task,mi-answers,token,upper-bound"  # four questions are answered together
KEPT = ("topics.jsonl", "topics.twin.jsonl", "topics.sample.jsonl", "topics.exemplars.json")


def n_lines(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def asked(tmp_path_factory, nano_files):
    """(the command without its folder, the folder of a run without Ray, what that run said)."""
    folder = tmp_path_factory.mktemp("asked")
    rows = [{"instruction": "Classify.", "language": "kk", "max_tokens": 8}]
    for i, (label, text) in enumerate([*TOPICS.items()] * 11):
        row = {"question": f"Text: {text} {i}\nTopic:", "choices": list(TOPICS), "answer": label}
        rows.append(row | ({"exemplar": True} if i < 2 else {}))
    task = folder / "topics.jsonl"
    task.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    *command, _ = arguments(task, "", METHODS)
    command = [*command[:-1], "--single", f"twin={nano_files['small_cpt']}", "-o"]
    done = ended(started(*command, folder / "run"))
    assert done.returncode == 0, done.stderr.decode()
    return command, folder / "run", done.stdout


def report(trimix, folder):
    return trimix("eval", "report", folder, "--csv").stdout


@has_ray
def test_a_worker_that_is_killed_changes_nothing(asked, trimix, tmp_path):
    command, expected, said = asked
    process = started(*command, tmp_path / "run", "--ray", "local", "--ray-workers", 2)
    wait_for(lambda: n_lines(tmp_path / "run" / "topics.jsonl"), process)
    kill_one(process, b"ray::_Worker")
    done = ended(process)
    assert done.returncode == 0 and done.stdout == said, done.stderr.decode()
    for name in KEPT:
        assert (tmp_path / "run" / name).read_bytes() == (expected / name).read_bytes()
    ours, theirs = (
        json.loads((x / "run.json").read_text("utf-8")) for x in (tmp_path / "run", expected)
    )
    assert {**ours, "command": theirs["command"]} == theirs
    assert report(trimix, tmp_path / "run") == report(trimix, expected)


@has_ray
def test_a_head_node_that_ends_is_one_line_and_its_lines_are_kept(asked, trimix, tmp_path):
    command, expected, _ = asked
    lines = tmp_path / "run" / "topics.jsonl"
    process = started(*command, tmp_path / "run", "--ray", "local")
    wait_for(lambda: n_lines(lines), process)
    kill_one(process, b"gcs_server")
    assert "the head node of Ray at " in one_line_error_after_bars(ended(process))
    assert 0 < n_lines(lines) < 20
    assert trimix(*command, tmp_path / "run").returncode == 0  # goes on, here without Ray
    assert lines.read_bytes() == (expected / "topics.jsonl").read_bytes()


def test_lines_that_came_in_another_order_are_put_in_order(asked, trimix, tmp_path):
    """As where one process was slower than another, and the run ended before it could sort."""
    command, expected, _ = asked
    shutil.copytree(expected, tmp_path / "run")
    file = tmp_path / "run" / "topics.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    for kept in (whole[::-1], whole[:3:-1]):
        file.write_bytes(b"".join(kept))
        assert trimix(*command, tmp_path / "run").returncode == 0
        assert file.read_bytes() == b"".join(whole)


@has_ray
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--exemplars", 9), "topics has 2 exemplars; 9 are wanted"),
        (("--ray-workers", 10**4), "CPUs for 10000 processes; give a lower --ray-workers"),
    ],
)
def test_what_is_wrong_is_one_line(asked, tmp_path, given, said):
    command, *_ = asked
    done = ended(started(*command, tmp_path / "run", "--ray", "local", *given))
    assert said in one_line_error_after_bars(done)


@has_ray
def test_no_head_node_is_one_line(asked, trimix, tmp_path):
    command, *_ = asked
    for given, words in [(no_head(), "no head node of Ray"), ("a", "not a HOST:PORT")]:
        done = trimix(*command, tmp_path / "run", "--ray", given)
        assert words in one_line_error_after_bars(done) and given in done.stderr.decode()


@has_no_ray
def test_without_ray_it_is_said_how_to_install_it(asked, trimix, tmp_path):
    command, *_ = asked
    done = trimix(*command, tmp_path / "run", "--ray", "auto")
    assert "pip install 'trimix-gguf[ray]'" in one_line_error_after_bars(done)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--ray-workers", 2), b"--ray-workers goes with --ray"),
        (("--ray", "auto", "--race"), b"--race needs the answers before"),
        (("--ray", "auto", "--harness", "x"), b"--ray does not go with --harness"),
        (("--ray", "auto", "--rpc", "127.0.0.1:1"), b"give --ray, or --rpc, not both"),
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(asked, trimix, tmp_path, given, said):
    command, *_ = asked
    done = trimix(*command, tmp_path / "run", *given)
    assert done.returncode == 2 and said in done.stderr
