"""trimix eval, driven as a user would, on the nano trio."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from conftest import REAL
from filelock import FileLock
from made_tasks import write_sib200
from test_cli import one_line_error
from topics import arguments

from trimix_gguf.cli.bars import count_bar
from trimix_gguf.cli.evaluate import evaluate
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.run_files.lines import finished
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import ModelEntry, TrioFile


def test_a_comparison_from_the_command_line(trimix, task_file, tmp_path):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "run"
    result = trimix(*arguments(task_file, out))
    assert result.returncode == 0, result.stderr.decode()
    lines = [json.loads(line) for line in (out / "topics.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 6
    assert all(len(line["grid"]) == len(line["grid"][0]) == 6 for line in lines)
    report = trimix("eval", "report", out, "--json")
    assert report.returncode == 0, report.stderr.decode()
    table = trimix("eval", "report", out)
    assert b"upper-bound" in table.stdout and b"proxy-tuning" in table.stdout
    assert not {p.name for p in out.iterdir()} - {
        ".lock",
        "run.json",
        "topics.jsonl",
        "topics.sample.jsonl",
        "topics.task.jsonl",
    }


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


def test_one_more_model_by_itself(trimix, task_file, tmp_path, nano_files):
    """It may be added to a run that is finished, whose other answers stay as they are."""
    out, given = tmp_path / "run", arguments(task_file, tmp_path / "run", "large_ins")
    assert trimix(*given).returncode == 0
    before = (out / "topics.jsonl").read_bytes()
    result = trimix(*given, "--single", f"twin={nano_files['large_ins']}")
    assert result.returncode == 0, result.stderr.decode()
    assert (out / "topics.jsonl").read_bytes() == before
    report = trimix("eval", "report", out).stdout.decode()
    assert "| twin |" in report and "--single" in report
    other = f"twin={nano_files['small_base']}"
    for changed in ((), ("--single", other)):  # none, and another by that name
        assert "other singles" in one_line_error(trimix(*given, *changed))
    ours, twins = (
        [json.loads(line) for line in (out / f"topics{end}.jsonl").read_text("utf-8").splitlines()]
        for end in ("", ".twin")
    )
    for line, twin in zip(ours, twins, strict=True):
        assert twin["outputs"]["twin"] == line["outputs"]["large_ins"]


def test_answers_that_only_repeat_themselves_need_not_be_decoded(trimix, tmp_path):
    """A small real model, made to go on and on: the texts stay, the run's settings tell."""
    model = REAL / "smollm2-135m-instruct-q4_1.gguf"
    if not model.is_file():
        pytest.skip(f"a real model is not cached here: {model.name}")
    rows = [{"instruction": "Sing.", "max_tokens": 200}]
    for song in ("do re mi fa so, ", "no, no, never, "):
        rows.append({"question": song, "answer": song * 12, "exemplar": True})
        rows.append({"question": f"oh {song}", "answer": "x"})
    task = tmp_path / "songs.jsonl"
    task.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    models = [x for r in ("large-ins", "small-base", "small-cpt") for x in (f"--{r}", model)]
    outputs = {}
    for name, more in {"decoded": (), "filled": ("--fill-loops",)}.items():
        given = [*arguments(task, tmp_path / name, "large_ins"), *models, "--n-ctx", 512]
        result = trimix(*given, *more)
        assert result.returncode == 0, result.stderr.decode()
        lines = (tmp_path / name / "songs.jsonl").read_text("utf-8").splitlines()
        outputs[name] = [json.loads(line)["outputs"]["large_ins"] for line in lines]
    n_filled = [output.pop("n_filled", 0) for output in outputs["filled"]]
    assert outputs["filled"] == outputs["decoded"]
    assert sum(n_filled) > sum(output["n_tokens"] for output in outputs["filled"]) / 3
    assert "filled up" in trimix("eval", "report", tmp_path / "filled").stdout.decode()


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


@pytest.mark.parametrize(
    ("singles", "said"),
    [
        (("folder/x=y.gguf",), "leave out the folder"),
        (("x=y.gguf", "x=z.gguf"), "x is given twice"),
        (("sample=y.gguf",), "topics.sample.jsonl for two things"),
    ],
)
def test_a_single_that_has_no_file_of_its_own_is_refused_at_once(
    trimix, task_file, tmp_path, singles, said
):
    given = [part for single in singles for part in ("--single", single)]
    result = trimix(*arguments(task_file, tmp_path / "run", "large_ins"), *given)
    assert result.returncode in (1, 2) and said in result.stderr.decode()
    assert not (tmp_path / "run").exists()


def test_a_single_that_cannot_be_loaded_is_refused_at_once(trimix, task_file, tmp_path):
    """Bug: it was after the trio's answers, and the run could end neither with nor without it."""
    whole, broken = NANO / "large_ins.gguf", tmp_path / "twin.gguf"
    for content in (b"junk", whole.read_bytes()[:-1000]):
        broken.write_bytes(content)
        given = arguments(task_file, tmp_path / "run", "large_ins")
        said = one_line_error(trimix(*given, "--single", f"twin={broken}"))
        assert "twin.gguf" in said and not (tmp_path / "run").exists()


def test_two_tasks_of_one_name_are_not_taken_for_one(trimix, task_file, tmp_path):
    """Bug: only the second one was asked, without a word."""
    other = tmp_path / "other" / task_file.name
    other.parent.mkdir()
    other.write_text('{"question": "2 + 2?", "answer": "4"}\n', "utf-8")
    result = trimix(*arguments(f"{task_file},{other}", tmp_path / "run", "large_ins"))
    assert "topics.jsonl for two things; rename" in one_line_error(result)


def test_every_setting_of_a_run_is_an_option_and_is_kept():
    names = {field.name for field in fields(RunSettings)}
    assert names <= {option.name for option in evaluate.params}
    assert RunSettings((), race=True).to_json().keys() == names


def test_options_of_the_harness_are_not_passed_over(trimix, task_file, tmp_path):
    result = trimix(*arguments(task_file, tmp_path / "run"), "--weights", "0.1,0.9")
    assert result.returncode == 2 and b"goes with --harness" in result.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--methods", "ppl"), b"--methods does not go with --harness"),
        (("--seed", "0"), b"--seed does not go with --harness"),
        (("--large-base", "x.gguf"), b"--large-base does not go with --harness"),
    ],
)
def test_options_that_the_harness_does_not_read_are_refused(trimix, given, said):
    """Bug: they were passed over without a word."""
    result = trimix("eval", "--harness", "any", *given)
    assert result.returncode == 2 and said in result.stderr


def test_a_harness_run_knows_at_once_that_its_folder_is_a_file(trimix, tmp_path):
    """Bug: the results of hours were lost, for they were written first and printed last."""
    (tmp_path / "out").write_text("", "utf-8")
    message = one_line_error(trimix("eval", "--harness", "any", "-o", tmp_path / "out"))
    assert str(tmp_path / "out") in message


@pytest.mark.parametrize(("option", "given"), [("methods", ""), ("methods", ","), ("tasks", ",")])
def test_an_empty_list_is_a_usage_error(trimix, task_file, tmp_path, option, given):
    result = trimix(*arguments(task_file, tmp_path / "run"), f"--{option}", given)
    assert result.returncode == 2 and f"give --{option}" in result.stderr.decode()


def test_a_picture_that_cannot_be_drawn_is_told_after_the_table(trimix, task_file, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "run"
    assert trimix(*arguments(task_file, out, "large_ins,auto")).returncode == 0
    result = trimix("eval", "report", out, "--plot", tmp_path / "run.xyz")
    assert result.returncode == 2 and b"Traceback" not in result.stderr
    assert "no picture 'xyz'" in result.stderr.decode() and b"## Conventions" in result.stdout
    assert trimix("eval", "report", out, "--plot", tmp_path / "run.PNG").returncode == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--tasks", "sib2000"), "sib200, flores"),
        (("--methods", "best"), "proxy-tuning"),
        (("--tasks", "sib200", "--lang", "xx"), "kk"),
        (("--exemplars", "9"), "3 exemplars"),
        (("--n-ctx", "128"), "1 would"),
    ],
)
def test_bad_input_is_one_line_that_names_what_there_is(trimix, task_file, tmp_path, changed, said):
    message = one_line_error(trimix(*arguments(task_file, tmp_path / "run"), *changed))
    assert said in message


def test_a_question_that_does_not_fit_by_itself_is_not_told_to_go_without_exemplars(
    trimix, task_file, tmp_path
):
    """Bug: of no exemplars it said that 0 would fit."""
    given = [*arguments(task_file, tmp_path / "run", "large_ins"), "--exemplars", 0, "--n-ctx"]
    said = one_line_error(trimix(*given, 32))
    needed = int(re.search(r"even without exemplars .* a context of (\d+)", said)[1])
    assert needed > 32 and trimix(*given, needed).returncode == 0


@pytest.mark.parametrize("together", [1, 3, 4, 8])
def test_a_log_is_told_of_each_tenth(together, capsys):
    """However many questions end at once."""
    with count_bar("topics") as shown:
        for done in (*range(0, 100, together), 100):
            shown(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "topics: 100/100"
