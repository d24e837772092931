"""Run folders that are damaged, unfinished or of another run."""

import json
import math
import re

import pytest
from made_runs import made_lines, write_lines, write_run

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.run_files.loading import load_run


def spoil(key, value):
    """Set a field of line 3."""

    def spoiled(folder):
        lines = [
            json.loads(line) for line in (folder / "tumlu.jsonl").read_text("utf-8").splitlines()
        ]
        lines[2][key] = value
        write_lines(folder / "tumlu.jsonl", lines)

    return spoiled


def settings(**changed):
    def spoiled(folder):
        run = json.loads((folder / "run.json").read_text("utf-8"))
        (folder / "run.json").write_text(json.dumps(run | changed), "utf-8")

    return spoiled


def cut(folder):
    raw = (folder / "tumlu.jsonl").read_bytes()
    (folder / "tumlu.jsonl").write_bytes(raw[:-40])


FAULTS = {
    "no run.json": (lambda f: (f / "run.json").unlink(), "run.json is missing"),
    "run.json cut": (lambda f: (f / "run.json").write_text('{"format": 1,'), "is not JSON"),
    "another file": (lambda f: (f / "run.json").write_text("[1]"), "expected a JSON object"),
    "a later format": (settings(format=2), "format 2, expected 1"),
    "no seed": (settings(seed=None), "'seed' should be a number"),
    "no tasks": (settings(tasks=[]), "'tasks' should be names"),
    "an axis without 0": (settings(axis=[0.5, 1.0]), "'axis' should be"),
    "an axis of texts": (settings(axis=["0", "1"]), "'axis' should be"),
    "a task unknown": (settings(tasks=["tumblr"]), "no task 'tumblr'"),
    "a task not run": (settings(tasks=["tumlu", "copa"]), "copa.jsonl is missing or empty"),
    "nothing done": (lambda f: (f / "tumlu.jsonl").write_text(""), "is missing or empty"),
    "a line cut": (cut, "incomplete line; give the run's command again"),
    "a method not run": (settings(methods=["ppl", "ppl-other"]), ":1: the answer of"),
    "a single not run": (settings(singles={"big": {}}), "tumlu.big.jsonl is missing or empty"),
    "an id twice": (spoil("id", "q1"), r":3: example 'q1' occurs twice"),
    "an id as number": (spoil("id", 7), ":3: field 'id' should be a text"),
    "no reference": (spoil("references", []), ":3: the reference is missing"),
    "references of numbers": (spoil("references", [4]), ":3: field 'references' should be texts"),
    "an output of no weights": (spoil("outputs", {"large_ins": {"text": ""}}), ":3: field 'alpha'"),
    "nats of another axis": (spoil("nll", [[1.0] * 6] * 6), ":3: 'nll' should be 7 × 7"),
    "nats not finite": (spoil("nll", [[math.nan] * 7] * 7), ":3: 'nll' should be 7 × 7, finite"),
    "nats of texts": (spoil("nll", "none"), ":3: 'nll' should be"),
    "a choice not scored": (spoil("choice_nll", [[[1.0] * 7] * 7]), "should be 4 × 7 × 7"),
    "a token count": (spoil("n_scored", [3]), ":3: 'n_scored' should be a number"),
    "a grid's row short": (spoil("grid", [["A"] * 6] * 5), ":3: 'grid' should be 6 × 6 texts"),
    "a grid of numbers": (spoil("grid", [[1] * 6] * 6), ":3: 'grid' should be 6 × 6 texts"),
    "a grid of letters": (spoil("grid", ["ABCDEF"] * 6), ":3: 'grid' should be 6 × 6 texts"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_said_in_one_line(fault, rng, tmp_path):
    folder = write_run(tmp_path, {"tumlu": made_lines(rng, "tumlu", 4)})
    load_run(folder)
    harm, message = FAULTS[fault]
    harm(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_a_line_without_the_others_reading_is_damaged(rng, tmp_path):
    lines = made_lines(rng, "tumlu", 4)
    del lines[3]["nll"]
    with pytest.raises(DataError, match=":4: 'nll' should be 7 × 7"):
        load_run(write_run(tmp_path, {"tumlu": lines}))


@pytest.mark.parametrize(("n", "n_single", "file"), [(6, 4, "tumlu.big"), (4, 6, "tumlu")])
def test_missing_examples_are_counted_and_the_first_is_named(n, n_single, file, rng, tmp_path):
    folder = write_run(tmp_path, {"tumlu": made_lines(rng, "tumlu", n)}, singles={"big": {}})
    others = made_lines(rng, "tumlu", n_single, selecting=(), grid=False)
    for line in others:
        line["outputs"] = {"big": line["outputs"]["large_ins"]}
    write_lines(folder / "tumlu.big.jsonl", others)
    expected = rf"{re.escape(file)}\.jsonl lacks 2 of 6 examples, 'q4' first; give the run's"
    with pytest.raises(DataError, match=expected):
        load_run(folder)


def test_so_far_takes_tasks_that_were_begun_and_singles_that_are_as_far(rng, tmp_path):
    tasks = {"tumlu": made_lines(rng, "tumlu", 12), "kazqad": made_lines(rng, "kazqad", 6)}
    settings = {"singles": {"big": {}, "late": {}}, "n_questions": {"tumlu": 30, "kazqad": 6}}
    folder = write_run(tmp_path / "run", tasks, **settings)
    for single, n in {"big": 12, "late": 9}.items():
        lines = [
            {**line, "outputs": {single: {"text": "A", "n_tokens": 1, "alpha": 1.0, "beta": 0.0}}}
            for line in tasks["tumlu"][:n]
        ]
        write_lines(folder / f"tumlu.{single}.jsonl", lines)
    (folder / "kazqad.jsonl").write_text('{"id": "q0", "refe', "utf-8")
    run = load_run(folder, so_far=True)
    assert (run.record["tasks"], list(run.record["singles"])) == (["tumlu"], ["big"])
    whole = write_run(tmp_path / "whole", {"tumlu": tasks["tumlu"]}, n_questions={"tumlu": 12})
    expected = load_run(whole, so_far=True).tasks["tumlu"].texts
    assert expected == load_run(whole).tasks["tumlu"].texts
    assert {n: t for n, t in run.tasks["tumlu"].texts.items() if n != "big"} == expected


def test_text_may_hold_unicodes_line_separators(rng, tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and str.splitlines ends a line at them."""
    lines = made_lines(rng, "tumlu", 4, selecting=(), grid=False)
    lines[1]["outputs"]["ppl"] = lines[1]["outputs"]["small_cpt"]
    lines[1]["outputs"]["small_cpt"]["text"] = "A\u2028B\x85C"
    run = load_run(write_run(tmp_path, {"tumlu": lines}))
    assert run.tasks["tumlu"].texts["small_cpt"][1] == "A\u2028B\x85C"
