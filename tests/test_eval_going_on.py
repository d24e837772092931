"""A run of trimix eval that goes on: what it keeps, and what it refuses to be mixed with."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from made_tasks import write_sib200
from test_cli import one_line_error
from topics import arguments

from trimix_gguf.evaluation.run_files.lines import finished
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import ModelEntry, TrioFile


@pytest.mark.skipif(os.name == "nt", reason="signals, limits or pipes as POSIX has them")
def test_a_run_killed_twenty_times_ends_with_the_same_file(trimix, task_file, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    methods = "ppl,ppl-answers,ppl-task,mi-answers,token,proxy-tuning"
    unbroken = trimix(*arguments(task_file, whole, methods))
    assert unbroken.returncode == 0
    assert "a sample for ppl-task: 5/6" in unbroken.stderr.decode()
    assert "exemplars for mi-answers: 3/3" in unbroken.stderr.decode()
    rng, kills = random.Random(7), 0
    command = [sys.executable, "-m", "trimix_gguf.cli", *arguments(task_file, broken, methods)]
    while kills < 20:
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.6))
        started.send_signal(signal.SIGKILL)
        started.wait()
        kills += 1
    assert trimix(*arguments(task_file, broken, methods)).returncode == 0
    for name in ("topics.jsonl", "topics.sample.jsonl", "topics.exemplars.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_line_cut_short_by_a_kill_is_written_anew(trimix, task_file, tmp_path):
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins,ppl")
    assert trimix(*given).returncode == 0
    file = out / "topics.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for n in (1, 4, 5):  # in and between the groups that are answered together
        file.write_bytes(b"".join(lines[:n]) + lines[n][:20])
        assert trimix(*given).returncode == 0
        assert file.read_bytes() == whole


def test_a_run_with_the_earlier_continuous_is_reported_and_not_gone_on_with(
    trimix, task_file, tmp_path
):
    """Its weights were looked for over another range: both in one file would be neither."""
    pytest.importorskip("sacrebleu")
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins,continuous")
    assert trimix(*given).returncode == 0
    settings = json.loads((out / "run.json").read_text("utf-8"))
    assert settings.pop("continuous_range") == [-0.5, 1.5]
    (out / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "continuous_range" in one_line_error(trimix(*given))
    report = trimix("eval", "report", out, "--json")
    assert report.returncode == 0, report.stderr.decode()
    assert "continuous" in json.loads(report.stdout)["methods"]


def test_two_runs_do_not_write_one_folder(trimix, task_file, tmp_path):
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins,ppl")
    assert trimix(*given).returncode == 0
    before = (out / "topics.jsonl").read_bytes()
    first_line = before[: before.index(b"\n") + 1]
    (out / "topics.jsonl").write_bytes(first_line)
    with FileLock(out / ".lock"):
        refused = trimix(*given)
    assert "another run" in one_line_error(refused)
    assert (out / "topics.jsonl").read_bytes() == first_line
    assert trimix(*given).returncode == 0
    assert (out / "topics.jsonl").read_bytes() == before


def test_an_answer_with_a_line_end_of_its_own_breaks_no_resumed_run(tmp_path):
    """finished cut lines at U+2028, and took the file for another program's."""
    out = tmp_path / "topics.jsonl"
    line = json.dumps(
        {"id": "7", "outputs": {"ppl": {"text": "a\u2028b\u0085c"}}}, ensure_ascii=False
    )
    out.write_text(line + "\n", encoding="utf-8")
    assert set(finished(out)) == {"7"}


def test_an_unfinished_run_is_not_reported(trimix, task_file, tmp_path):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "run"
    assert trimix(*arguments(task_file, out, "large_ins")).returncode == 0
    file = out / "topics.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:4]))
    assert "4 of 6" in one_line_error(trimix("eval", "report", out))
    with file.open("ab") as running:
        running.write('{"id": "5", "жарт'.encode()[:-1])
    result = trimix("eval", "report", out, "--so-far")
    assert result.returncode == 0, result.stderr.decode()
    assert "topics 4 of 6 (unfinished)" in result.stdout.decode()
    file.write_bytes(b"")
    assert "no answers yet" in one_line_error(trimix("eval", "report", out, "--so-far"))


def test_a_chat_follows_the_template_of_the_trio_file(trimix, task_file, tmp_path, nano_files):
    """One that adds nothing to a message changes nothing; the template in the model does."""
    models = {role: ModelEntry(str(path)) for role, path in nano_files.items()}
    empty = "{% for m in messages %}{{ m.content }}{% endfor %}"
    TrioFile(tmp_path, "empty", models, chat_template=empty).write()
    lines = {}
    for name, more in {
        "plain": (),
        "empty": ("--chat", "--trio", tmp_path),
        "built-in": ("--chat",),
    }.items():
        given = [*arguments(task_file, tmp_path / name, "ppl,large_ins"), "--n-ctx", 512, *more]
        result = trimix(*given)
        assert result.returncode == 0, result.stderr.decode()
        lines[name] = (tmp_path / name / "topics.jsonl").read_text("utf-8")
    assert lines["empty"] == lines["plain"] != lines["built-in"]
    changed = trimix(*given[:-1], "--chat", "--trio", tmp_path)
    assert "other chat_template" in one_line_error(changed)


def test_other_settings_are_not_mixed_into_a_run(trimix, task_file, tmp_path):
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins")
    assert trimix(*given).returncode == 0
    message = one_line_error(trimix(*given, "--seed", "1"))
    assert "other seed" in message
    assert "other fill_loops" in one_line_error(trimix(*given, "--fill-loops"))
    assert trimix(*given, "--n-ctx", "400").returncode == 0  # what fits is the same there


def test_a_run_does_not_continue_with_another_tuning(trimix, task_file, tmp_path):
    """Bug: auto answered the rest of the questions by what another `trimix tune` had measured."""
    out, trio = tmp_path / "run", tmp_path / "trio"
    shutil.copytree(NANO, trio)
    given = [*arguments(task_file, out, "large_ins,auto"), "--trio", trio]
    assert trimix(*given).returncode == 0
    untuned = (trio / "trio.toml").read_text("utf-8").split("\n[tuning]")[0]
    (trio / "trio.toml").write_text(untuned + "\n", "utf-8")
    trimix("generate", "2 + 2 = ?", "-n", 1, "--trio", trio)  # says, once, that it is not tuned
    assert "other tuning" in one_line_error(trimix(*given))
    settings = json.loads((out / "run.json").read_text("utf-8"))
    del settings["tuning"]  # as earlier versions wrote it
    (out / "run.json").write_text(json.dumps(settings), "utf-8")
    assert trimix(*given).returncode == 0
    without = [*arguments(task_file, tmp_path / "other", "large_ins,ppl"), "--trio", trio]
    assert trimix(*without).returncode == 0
    shutil.copy(NANO / "trio.toml", trio)
    assert trimix(*without).returncode == 0  # no method answers by it
    (out / "run.json").write_text("[]", "utf-8")
    assert "run.json is damaged" in one_line_error(trimix(*given))


def test_a_run_keeps_its_questions(trimix, task_file, tmp_path):
    """Bug: a file changed in between was asked from there on, and a moved one gave no report."""
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins,auto")
    assert trimix(*given).returncode == 0
    lines = (out / "topics.jsonl").read_bytes()
    (out / "topics.jsonl").write_bytes(lines[: lines.index(b"\n") + 1])
    asked = task_file.read_bytes()
    task_file.write_bytes(asked.replace("Сайлау өтті.".encode(), "Сайлау болды.".encode()))
    assert "the file of topics has changed" in one_line_error(trimix(*given))
    task_file.write_bytes(asked)
    assert trimix(*given).returncode == 0
    assert (out / "topics.jsonl").read_bytes() == lines
    report = trimix("eval", "report", out)
    task_file.rename(tmp_path / "elsewhere.jsonl")
    assert report.returncode == 0
    assert trimix("eval", "report", out).stdout == report.stdout


def test_a_run_does_not_continue_with_another_folder_of_data(trimix, tmp_path):
    """Bug: questions of one `--data` and of another stood in one file."""
    out, data = tmp_path / "run", tmp_path / "data"
    write_sib200(data)
    shutil.copytree(data, tmp_path / "copy")
    given = ["eval", "--tasks", "sib200", "--methods", "large_ins", "--limit", 2, "-o", out]
    given += ["--lang", "kk", "--exemplars", 0]
    assert trimix(*given, "--data", data).returncode == 0
    assert trimix(*given, "--data", tmp_path / "copy").returncode == 0  # the same, elsewhere
    test = data / "eval/kk/sib200/test.tsv"
    test.write_text(test.read_text("utf-8").replace("Мәтін", "Сөйлем"), "utf-8")
    assert "other data" in one_line_error(trimix(*given, "--data", data))
    settings = json.loads((out / "run.json").read_text("utf-8"))
    del settings["data"]  # as earlier versions wrote it
    (out / "run.json").write_text(json.dumps(settings), "utf-8")
    assert trimix(*given, "--data", data).returncode == 0


def test_a_run_goes_on_where_its_task_file_has_another_place(trimix, task_file, tmp_path):
    """Bug: copied to another machine, a run was one with other task_files."""
    out = tmp_path / "run"
    assert trimix(*arguments(task_file, out, "large_ins")).returncode == 0
    lines = (out / "topics.jsonl").read_bytes()
    (out / "topics.jsonl").write_bytes(lines[: lines.index(b"\n") + 1])
    moved = tmp_path / "moved" / task_file.name
    moved.parent.mkdir()
    task_file.rename(moved)
    assert trimix(*arguments(moved, out, "large_ins")).returncode == 0
    assert (out / "topics.jsonl").read_bytes() == lines
    moved.write_bytes(moved.read_bytes() + b"\n")
    said = one_line_error(trimix(*arguments(moved, out, "large_ins")))
    assert "the file of topics has changed" in said
