"""An oracle that leaves grid points which fell behind."""

import json

import numpy as np
import pytest
from made_runs import made_lines, write_run
from test_cli import one_line_error
from test_conversation import exact_files  # noqa: F401
from topics import arguments

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.names.settings import RACE_P
from trimix_gguf.evaluation.reporting.report import summarize
from trimix_gguf.evaluation.run_files.loading import load_run
from trimix_gguf.evaluation.running.racing import FEWEST, still_racing
from trimix_gguf.evaluation.tasks.task import Task
from trimix_gguf.roles import ROLES

TASK = Task("counting", ("kk",), "Count.", ("f1",), 8, lambda *_: None)
WORDS = ["бір", "екі", "үш", "төрт", "бес", "алты", "жеті", "сегіз", "тоғыз", "он"]


def lines_of(n_words):
    """Lines whose texts have the first n_words [n, 6, 6] of the reference's words; -1: left."""
    return [
        {
            "id": f"{i}",
            "references": [" ".join(WORDS)],
            "grid": [[" ".join(WORDS[:n]) if n >= 0 else None for n in row] for row in one],
        }
        for i, one in enumerate(n_words.tolist())
    ]


def f1(n_words):
    return 200 * n_words / (n_words + len(WORDS))


@pytest.mark.parametrize("n", [FEWEST, 12, 60])
def test_a_point_is_left_where_a_paired_t_test_tells_it_apart(n):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    skill = rng.integers(0, 5, (6, 6))
    n_words = np.clip(rng.integers(2, 5, (n, 1, 1)) + skill + rng.integers(-1, 2, (n, 6, 6)), 0, 10)
    scores = f1(n_words)
    a, b = np.unravel_index(scores.mean(axis=0).argmax(), (6, 6))
    p = stats.ttest_rel(scores[:, a, b, None, None], scores, alternative="greater").pvalue
    racing = still_racing(TASK, lines_of(n_words))
    np.testing.assert_array_equal(racing, ~(p < RACE_P))
    assert racing[a, b] and 0 < racing.sum() < 36


def test_nobody_is_left_before_there_is_something_to_tell_by():
    n_words = np.zeros((FEWEST, 6, 6), int)
    n_words[:, 2, 3] = 10
    assert still_racing(TASK, []).all()
    assert still_racing(TASK, lines_of(n_words[:-1])).all()
    assert np.argwhere(still_racing(TASK, lines_of(n_words))).tolist() == [[2, 3]]
    assert still_racing(TASK, lines_of(np.zeros((9, 6, 6), int))).all()  # all alike


def test_who_was_left_does_not_come_back_nor_lead():
    n_words = np.full((20, 6, 6), 3)
    n_words[:10, 0, 0], n_words[10:, 0, 0] = 10, -1
    racing = still_racing(TASK, lines_of(n_words))
    assert not racing[0, 0] and racing.sum() == 35


def free_answers(path, answers):
    """A user's own task: sentences to go on with."""
    rows = [{"instruction": "Go on.", "metrics": ["chrf++"], "max_tokens": 12}]
    rng = np.random.default_rng(1)
    for at, answer in enumerate(answers):
        said = " ".join(rng.permutation(WORDS)[:3])
        rows.append({"question": f"{said} {at}", "answer": answer, "exemplar": at < 2})
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


def test_a_race_from_the_command_line(trimix, exact_files, tmp_path):  # noqa: F811
    """Its points answer as they would without it, a stopped one goes on as if it had not been."""
    pytest.importorskip("sacrebleu")
    task = free_answers(tmp_path / "free.jsonl", ["Алматы."] * 18)

    files = [word for r in ROLES for word in (f"--{r.replace('_', '-')}", exact_files[r])]

    def run(name, *more, methods="large_ins,upper-bound"):
        result = trimix(*arguments(task, tmp_path / name, methods), *files, *more)
        assert result.returncode == 0, result.stderr.decode()
        text = (tmp_path / name / "free.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    said = [line["outputs"]["large_ins"]["text"] for line in run("said")]
    free_answers(task, ["Алматы."] * 2 + said)  # so that large_ins is right, and some points not
    whole, raced = run("whole"), run("raced", "--race")
    n_racing = [sum(t is not None for row in line["grid"] for t in row) for line in raced]
    assert n_racing[0] == 36 > n_racing[-1] > 0 and n_racing == sorted(n_racing, reverse=True)
    for ours, theirs in zip(raced, whole, strict=True):
        for mine, all_of_it in zip(ours["grid"], theirs["grid"], strict=True):
            assert all(text in (None, other) for text, other in zip(mine, all_of_it, strict=True))

    file = tmp_path / "raced" / "free.jsonl"
    before = file.read_bytes()
    for n in (3, 13):
        file.write_bytes(b"".join(before.splitlines(keepends=True)[:n]) + b'{"id')
        run("raced", "--race")
        assert file.read_bytes() == before
    given = [*arguments(task, tmp_path / "raced", "large_ins,upper-bound"), *files]
    first, *others = before.splitlines(keepends=True)[:9]
    damaged = json.dumps(json.loads(first) | {"grid": [["x"] * 6] * 5}).encode() + b"\n"
    file.write_bytes(damaged + b"".join(others))
    refused = trimix(*given, "--race")
    *_, last = refused.stderr.decode().splitlines()  # above it, how far the run was
    assert refused.returncode == 1 and last.startswith("trimix: '")
    assert "has no answers of the grid" in last
    file.write_bytes(before)
    assert "other race" in one_line_error(trimix(*given))
    refused = trimix(*arguments(task, tmp_path / "none", "ppl"), "--race")
    assert refused.returncode == 2 and b"upper-bound" in refused.stderr
    report = trimix("eval", "report", tmp_path / "raced").stdout.decode()
    assert "| upper-bound (oracle) |" in report and "paired t test" in report


def test_the_upper_bound_of_a_race_is_the_best_that_finished(rng, tmp_path):
    pytest.importorskip("scipy")
    lines = made_lines(rng, "kazqad", 12)
    for at, line in enumerate(lines):
        right, wrong = line["references"][0], "жоқ"
        line["grid"] = [[wrong] * 6 for _ in range(6)]
        line["grid"][4][1] = right if at < 9 else wrong
        line["grid"][5][5] = right if at < 10 else None  # better, but left
    task = summarize(load_run(write_run(tmp_path, {"kazqad": lines}, race=True)))["tasks"]["kazqad"]
    found = task["methods"]["upper-bound"]
    assert found["metrics"]["exact_match"]["value"] == pytest.approx(75)
    assert (found["alpha"], found["beta"]) == pytest.approx((0.9, 0.3))
    assert task["findings"]["surface"] is None


@pytest.mark.parametrize(
    ("task", "race", "left", "said"),
    [
        ("kazqad", False, 1, "6 × 6 texts"),  # without a race nobody is left
        ("tumlu", True, 1, "6 × 6 texts"),  # nor where there are choices
        ("kazqad", True, 36, "no point of 'grid' has all answers"),
    ],
)
def test_answers_that_should_be_there_are_missed(task, race, left, said, rng, tmp_path):
    lines = made_lines(rng, task, 12)
    for at in range(left):
        lines[-1]["grid"][at // 6][at % 6] = None
    with pytest.raises(DataError, match=said):
        load_run(write_run(tmp_path, {task: lines}, race=race))
