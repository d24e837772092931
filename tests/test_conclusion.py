"""What a run says in the end: which method to use, and whether its questions can tell."""

import json

import pytest
from made_runs import made_lines, right, said, share, write_run
from test_cli import one_line_error
from topics import arguments

from trimix_gguf.evaluation.reporting.conclusion import conclude
from trimix_gguf.evaluation.reporting.statistics import Difference, paired_difference

pytest.importorskip("scipy")
TESTED = ("auto", "ppl", "ent", "proxy-tuning")


def lines_of(rng, n, n_right):
    """Lines of `n` questions; each method named answers the first so many of them rightly."""
    lines = made_lines(rng, "tumlu", n, selecting=(), grid=False)
    for at, line in enumerate(lines):
        output, line["references"] = line["outputs"]["large_ins"], ["A"]
        line["outputs"] = {
            name: output | {"text": "A" if at < count else "B"} for name, count in n_right.items()
        }
    return lines


@pytest.mark.parametrize(
    ("n", "n_right", "sentence"),
    [
        (60, {"large_ins": 30, "auto": 50}, "use auto: it is above large_ins (p 0.001)"),
        (60, {"large_ins": 30, "auto": 31, "ppl": 31},
         "use auto; 60 questions cannot tell it from large_ins"),
        (60, {"large_ins": 30, "auto": 10}, "use large_ins: auto is below it (p 0.001)"),
        (60, {"large_ins": 30, "auto": 30, "ppl": 55, "ent": 31},
         "use ppl: it is above large_ins (p 0.002, corrected for 2 methods)"),
        (60, {"large_ins": 30, "auto": 50, "ppl": 55}, "use auto: it is above large_ins (p 0.001)"),
        (60, {"large_ins": 30, "ppl": 31}, "use large_ins; 60 questions cannot tell ppl from it"),
        (12, {"large_ins": 0, "auto": 12}, "too few questions (12) to say anything"),
        (60, {"large_ins": 30}, "compare large_ins and auto (--methods) to learn which one to use"),
        (60, {"auto": 30}, "compare large_ins and auto (--methods) to learn which one to use"),
    ],
)  # fmt: skip
def test_a_report_ends_in_one_sentence(trimix, rng, tmp_path, n, n_right, sentence):
    folder = write_run(tmp_path / "run", {"tumlu": lines_of(rng, n, n_right)})
    assert trimix("eval", "report", folder).stdout.decode().splitlines()[-1] == sentence
    report = json.loads(trimix("eval", "report", folder, "--json").stdout)
    assert report["mean"]["conclusion"]["sentence"] == sentence


def test_its_test_is_the_paired_one_of_the_report(trimix, rng, tmp_path):
    lines = made_lines(rng, "tumlu", 80, selecting=("auto",), grid=False)
    folder = write_run(tmp_path / "run", {"tumlu": lines})
    found = json.loads(trimix("eval", "report", folder, "--json").stdout)["mean"]["conclusion"]
    ours, theirs = (right(lines, said(lines, name)) for name in ("auto", "large_ins"))
    assert found["n_questions"] == 80 and found["method"] == "auto"
    assert found["p"] == pytest.approx(paired_difference(ours, theirs, share, seed=5).p)


def test_the_best_of_many_has_to_be_better_than_the_only_one():
    """By p-values of 0.02: enough for auto, not for the best of three others."""

    def against(ours, theirs):
        assert theirs == "large_ins"
        return Difference(values[ours] - values[theirs], 0.0, 9.0, 0.02)

    values = {"large_ins": 50.0, "auto": 50.0, "ppl": 55.0, "ent": 51.0, "proxy-tuning": 51.0}
    found = conclude(values, against, n=60, level=0.95)
    assert found["sentence"] == "use auto; 60 questions cannot tell it from large_ins"
    values["auto"] = 55.0
    assert "use auto: it is above" in conclude(values, against, n=60, level=0.95)["sentence"]


@pytest.mark.parametrize("method", ["auto", "ppl"])
def test_a_method_compared_by_itself_has_to_be_better_too(method):
    """Bug: without others, a p-value of 0.9 was corrected for no method, to 0."""
    found = conclude(
        {"large_ins": 50.0, method: 50.1},
        lambda *_: Difference(0.1, -3.0, 3.0, 0.9),
        n=200,
        level=0.95,
    )
    assert found["p"] == 0.9 and "cannot tell" in found["sentence"]


def test_what_nobody_can_use_is_not_named():
    """Oracles know the labels, a --single is another model, calibrated scores are a report's."""
    values = dict.fromkeys(("upper-bound", "twin", "ppl+cal"), 99.0) | {"large_ins": 1.0}
    found = conclude(values, lambda *_: Difference(98.0, 98.0, 98.0, 0.001), n=60, level=0.95)
    assert found["method"] is None


# -- trimix eval ------------------------------------------------------------------------------


def without_language(given):
    at = given.index("--lang")
    return [*given[:at], *given[at + 2 :]]


def test_a_run_ends_in_that_sentence_and_the_task_file_names_the_language(
    trimix, task_file, tmp_path
):
    out = tmp_path / "run"
    given = arguments(task_file, out, "large_ins,auto")
    result = trimix(*without_language(given))
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == "too few questions (6) to say anything\n"
    assert f"trimix eval report {out}" in result.stderr.decode()
    assert json.loads((out / "run.json").read_text("utf-8"))["lang"] == "kk"
    assert trimix(*given).returncode == 0  # it is the same run


def test_a_language_that_is_not_named_or_not_one_is_refused(trimix, task_file, tmp_path):
    silent, other = tmp_path / "silent.jsonl", tmp_path / "other.jsonl"
    rows = task_file.read_text("utf-8").splitlines()
    silent.write_text("\n".join(rows[1:]), "utf-8")
    other.write_text("\n".join([rows[0].replace('"kk"', '"ug"'), *rows[1:]]), "utf-8")
    given = without_language(arguments(silent, tmp_path / "run", "large_ins"))
    for tasks in (str(silent), "sib200"):
        result = trimix(*given, "--tasks", tasks)
        assert result.returncode == 2 and b"give --lang" in result.stderr
    both = f"{task_file},{other}"
    assert "topics.jsonl kk, other.jsonl ug" in one_line_error(trimix(*given, "--tasks", both))


def test_without_a_network_a_dataset_is_one_line_and_soon(trimix, tmp_path, monkeypatch):
    """Bug: half a minute of retries and a dozen lines came before it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    given = ("eval", "--lang", "kk", "--tasks", "sib200", "-o", tmp_path / "run")
    for name, value in (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
        said = one_line_error(trimix(*given, timeout=15))
        assert "Davlan/sib200" in said and "network" in said
