"""Runs of different tasks, or different methods, in one report."""

import json

import pytest
from made_runs import made_lines, write_lines, write_run
from test_cli import one_line_error
from topics import arguments

from trimix_gguf.evaluation.reporting.predictions import join
from trimix_gguf.evaluation.reporting.report import summarize
from trimix_gguf.evaluation.run_files.loading import load_run


def test_two_runs_joined_are_one_run_of_both_tasks(rng, tmp_path):
    pytest.importorskip("scipy")
    tasks = {"tumlu": made_lines(rng, "tumlu"), "kazqad": made_lines(rng, "kazqad")}
    apart = [write_run(tmp_path / name, {name: lines}) for name, lines in tasks.items()]
    whole = summarize(load_run(write_run(tmp_path / "whole", tasks)), n_resamples=60)
    joined = summarize(join([load_run(folder) for folder in apart]), n_resamples=60)
    assert [run["tasks"] for run in joined["runs"]] == [["tumlu"], ["kazqad"]]
    assert joined == whole | {"runs": joined["runs"]}


@pytest.mark.parametrize("task", ["tumlu", "kazqad"])
def test_methods_that_came_later_stand_beside_the_others(trimix, rng, tmp_path, task):
    pytest.importorskip("scipy")
    whole = made_lines(rng, task)
    late = ("ppl-answers", "mi-answers", "contrastive")

    def part(has, *without):
        lines = [{k: v for k, v in line.items() if k not in without} for line in whole]
        for line in lines:
            line["outputs"] = {name: o for name, o in line["outputs"].items() if has(name)}
        return lines

    early = part(lambda name: name not in late, "grid")
    later = part(lambda name: name in (*late, "large_ins"), "nll", "n_scored", "choice_nll")
    for line in later:  # what both have is the first's
        line["outputs"]["large_ins"] = {**line["outputs"]["large_ins"], "text": "?"}
    folders = [
        write_run(tmp_path / name, {task: lines}, command=[name])
        for name, lines in (("whole", whole), ("early", early), ("later", later))
    ]
    summaries = [
        json.loads(trimix("eval", "report", *some, "--json").stdout)
        for some in (folders[:1], folders[1:])
    ]
    for summary in summaries:
        assert "upper-bound" in summary["methods"] and "mi" in summary["methods"]
        del summary["runs"]
    assert summaries[0]["tasks"][task]["methods"] == summaries[1]["tasks"][task]["methods"]
    assert summaries[0]["tasks"][task]["findings"] == summaries[1]["tasks"][task]["findings"]


def test_joined_from_the_command_line(trimix, rng, tmp_path):
    pytest.importorskip("scipy")
    lines = {name: made_lines(rng, name) for name in ("tumlu", "copa", "kazqad")}
    one = write_run(tmp_path / "one", {"tumlu": lines["tumlu"]}, command=["first"])
    two = write_run(
        tmp_path / "two", {"copa": lines["copa"], "kazqad": lines["kazqad"]},
        command=["second"], n_ctx=4096, n_questions={"copa": 24, "kazqad": 30},
    )  # fmt: skip
    result = trimix("eval", "report", one, two, "--so-far")
    assert result.returncode == 0, result.stderr.decode()
    text = result.stdout.decode()
    assert "| method | tumlu (accuracy) | copa (accuracy) | kazqad (exact match) | mean |" in text
    assert "Examples: tumlu 24; exemplars: as many as each task has; n_ctx 2048" in text
    assert "Examples: copa 24, kazqad 24 of 30 (unfinished); exemplars" in text and "4096" in text
    assert "first\nsecond" in text and text.count("sha256") == 1
    assert json.loads(trimix("eval", "report", one, two, "--so-far", "--json").stdout)["mean"]
    assert "unfinished: kazqad" in one_line_error(trimix("eval", "report", one, two))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 6}, "differ in seed"),
        ({"lang": "kk", "models": {"large_ins": {"file": "b.gguf"}}}, "differ in models"),
        ({"seed": 5}, "other questions of kazqad"),
    ],
)
def test_runs_that_cannot_stand_in_one_table(trimix, rng, tmp_path, other, said):
    one, two = (
        write_run(tmp_path / name, {"kazqad": made_lines(rng, "kazqad")}, **more)
        for name, more in (("a", {}), ("b", other))
    )
    error = one_line_error(trimix("eval", "report", one, two))
    assert said in error and str(one) in error and str(two) in error


FILES = [{"file": f"{name}.gguf", "sha256": name, "bytes": 1} for name in "abc"]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"singles": {"twin": FILES[0]}}, {"singles": {"twin": FILES[1]}}, "the file of twin"),
        ({"tuning": "a"}, {"tuning": None}, "tuning"),
        ({"chat": True, "chat_template": "a"}, {"chat": True, "chat_template": "b"},
         "chat_template"),
    ],
)  # fmt: skip
def test_one_name_is_one_thing_in_a_table(trimix, rng, tmp_path, one, other, said):
    """Bug: a mean over tasks took two models, or auto by two measurements, for one method."""
    pytest.importorskip("scipy")
    folders = []
    tasks = {"tumlu": {"chat": one.get("chat")}, "kazqad": one, "copa": other}
    for task, more in tasks.items():
        lines = made_lines(rng, task, selecting=("auto",), grid=False)
        folders.append(write_run(tmp_path / task, {task: lines}, **more))
        for single in more.get("singles", ()):
            for line in lines:
                line["outputs"] = {single: line["outputs"]["large_ins"]}
            write_lines(tmp_path / task / f"{task}.{single}.jsonl", lines)
    first, *pair = folders
    for some in (pair, folders):
        told = one_line_error(trimix("eval", "report", *some))
        assert f"{pair[0]} and {pair[1]} differ in {said}" in told
    assert trimix("eval", "report", first, pair[0]).returncode == 0


def test_a_fourth_model_that_one_run_reads_keeps_no_runs_apart(trimix, rng, tmp_path):
    """Bug: decoupled could not be added to the table of a run without it."""
    pytest.importorskip("scipy")
    lines = made_lines(rng, "kazqad", grid=False)
    with_fourth = {"models": {"large_ins": FILES[0], "large_base": FILES[1]}}
    for name, models in (("a", {"models": {"large_ins": FILES[0]}}), ("b", with_fourth)):
        write_run(tmp_path / name, {"kazqad": lines}, **models)
    assert trimix("eval", "report", tmp_path / "a", tmp_path / "b").returncode == 0
    write_run(tmp_path / "a", {"kazqad": lines}, models={**with_fourth["models"], "small_cpt": {}})
    assert "differ in models" in one_line_error(
        trimix("eval", "report", tmp_path / "a", tmp_path / "b")
    )


def test_own_questions_under_another_instruction_are_other_questions(trimix, task_file, tmp_path):
    """Bug: ids and references were compared, so the first's answers stood for both."""
    settings, *rows = task_file.read_text("utf-8").splitlines(keepends=True)
    other = tmp_path / "other" / task_file.name
    other.parent.mkdir()
    changed = json.loads(settings) | {"instruction": "Жауап бер."}
    other.write_text(json.dumps(changed) + "\n" + "".join(rows), "utf-8")
    for name, task in (("a", task_file), ("b", task_file), ("c", other)):
        asked = trimix(*arguments(task, tmp_path / name, "large_ins"), "--limit", 2)
        assert asked.returncode == 0, asked.stderr.decode()
    report = ("eval", "report", tmp_path / "a")
    assert trimix(*report, tmp_path / "b").returncode == 0
    assert "other questions of topics" in one_line_error(trimix(*report, tmp_path / "c"))
