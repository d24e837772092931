"""What `trimix run` refuses: wrong lines, by their number, before anything is answered."""

import json
import os

import pytest
from test_cli import one_line_error
from test_run import FIXED, SMALL, answers_of, one_line_error_after_bars, text_of, write


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, where the commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


GOOD = {"id": "good", "prompt": "The prince", **FIXED}
GOOD_TOO = {**GOOD, "id": "good too"}
WRONG = {  # what a line holds -> what is said of it
    "{": "not JSON: Expecting property name",
    "[1]": "not a JSON object",
    '{"prompt": NaN}': "NaN",
    '{"prompt": "\\ud800"}': "surrogate",
    '{"id": "a", "max_tokens": 4}': "prompt is null",
    '{"prompt": "a", "max_tokns": 4}': "did you mean 'max_tokens'?",
    '{"prompt": "a", "temperature": 9}': "temperature is 9; expected a number from 0 to 2",
    '{"prompt": "a", "stream": true}': "stream",
    '{"prompt": "a", "model": "gpt-4o"}': "model 'gpt-4o' is not here; 'nano' is",
    '{"prompt": "a", "trimix": {"method": "magic"}}': "trimix.method",
    '{"prompt": "a", "id": 1.5}': "id is not a text or a whole number",
    '{"prompt": "a", "id": "a", "custom_id": "a"}': "id or custom_id",
    '{"prompt": [99999999]}': "99999999 is not a token",
    '{"messages": [{"role": "poet", "content": "a"}]}': "messages[0].role",
    '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}}': "method is null",
    '{"custom_id": "a", "method": "POST", "url": "/v1/completions"}': "body is null",
    json.dumps({"prompt": "a " * 3000}): "context",
    json.dumps(
        {
            "prompt": "a",
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"not": {}}},
            },
        }
    ): "not",
}


def distinct():
    """The wrong lines, each with an id of its own where it has one."""
    for i, text in enumerate(WRONG):
        yield text.replace('id": "a"', f'id": "a{i}"')


def test_skip_bad_leaves_an_error_for_each_wrong_line_and_answers_the_others(trimix, place):
    write(place / "in.jsonl", [GOOD, *distinct(), GOOD_TOO])
    done = trimix("run", "in.jsonl", "-o", "out", "--skip-bad", *SMALL)
    assert done.returncode == 0, done.stderr.decode()
    assert f"note: {len(WRONG)} of {len(WRONG) + 2} lines were wrong" in done.stderr.decode()
    good, *wrong, good_too = answers_of(place / "out")
    assert text_of(good) == text_of(good_too)
    for answer, said in zip(wrong, WRONG.values(), strict=True):
        assert "response" not in answer or answer["response"] is None
        assert said in answer["error"]["message"].replace('"', "'"), answer


@pytest.mark.parametrize("text", ["{", '{"prompt": [99999999]}'])
def test_the_first_wrong_line_ends_a_run_before_anything_is_answered(trimix, place, text):
    """One is seen as it is read, one only by the models."""
    write(place / "in.jsonl", [GOOD, "", text, text])
    said = one_line_error_after_bars(trimix("run", "in.jsonl", "-o", "out", *SMALL))
    assert "in.jsonl, line 3: " in said and WRONG[text] in said
    done = trimix("run", "in.jsonl", "-o", "-", *SMALL)
    assert one_line_error_after_bars(done) == said


def test_an_id_that_comes_twice_is_refused_with_both_lines(trimix, place):
    write(place / "in.jsonl", [GOOD, GOOD_TOO, {**GOOD, "id": None}, {**GOOD, "id": "3"}])
    said = one_line_error(trimix("run", "in.jsonl", "-o", "out", "--skip-bad"))
    assert "lines 3 and 4 have the same id '3'" in said
    assert [p.name for p in place.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("absent.jsonl", None, "cannot be read"),
        ("empty.jsonl", b"\n\n", "holds no request"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read"),
    ],
)
def test_a_file_without_requests_is_one_line(trimix, place, name, raw, said):
    if raw is not None:
        (place / name).write_bytes(raw)
    assert said in one_line_error(trimix("run", name, "-o", "out"))
    assert not (place / "out").exists()
    assert "no such folder" in one_line_error(trimix("run", name, "-o", "none/out"))


@pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
def test_an_output_that_is_no_file_is_refused_at_once_with_force_too(trimix, place, make):
    """Bug: a folder was an error when all was answered, and a device became a file."""
    if not hasattr(os, make):
        pytest.skip(f"this system has no {make}")
    getattr(os, make)("out")
    write(place / "in.jsonl", [GOOD])
    for more in ((), ("--force",)):
        said = one_line_error(trimix("run", "in.jsonl", "-o", "out", *SMALL, *more))
        assert "out is no file" in said and "--force" not in said
    assert sorted(p.name for p in place.iterdir()) == ["in.jsonl", "out"]
