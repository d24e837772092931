"""trimix eval, driven as a user would, on the nano trio."""

import json
import re
from dataclasses import fields

import pytest
from conftest import REAL
from test_cli import one_line_error
from topics import arguments

from trimix_gguf.cli.bars import count_bar
from trimix_gguf.cli.evaluate import evaluate
from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.trio.trio import NANO


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
