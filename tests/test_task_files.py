"""What is said of a bad file of a task."""

import json

import pytest
from made_tasks import load, write_json, write_jsonl, write_kazakh, write_milic, xcopa

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks import custom_task
from trimix_gguf.evaluation.tasks.rows import read_json, read_jsonl, read_tsv

pytestmark = pytest.mark.usefixtures("hub_cache")


def broken(path, edit):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    edit(rows)
    return write_jsonl(path, rows)


@pytest.mark.parametrize(
    ("name", "lang", "relative", "edit", "said"),
    [
        ("belebele", "kk", "kaz_Cyrl.jsonl", lambda r: r[2].pop("mc_answer3"),
         r"kaz_Cyrl\.jsonl:3: field 'mc_answer3' is missing; it has flores_passage, question"),
        ("belebele", "kk", "kaz_Cyrl.jsonl", lambda r: r[2].update(correct_answer_num=5),
         r":3: field 'correct_answer_num' should be one of 1, 2, 3, 4; got 5"),
        ("tumlu", "kk", "eval/kk/tumlu/test.jsonl", lambda r: r[9].update(answer="E"),
         r"test\.jsonl:10: field 'answer' should be one of A, B, C, D; got 'E'"),
        ("tumlu", "kk", "eval/kk/tumlu/dev.jsonl", lambda r: r[0].update(choices="аб"),
         r"dev\.jsonl:1: field 'choices' should be a list, got a text"),
        ("kazqad", "kk", "eval/kk/kazqad/validation.jsonl",
         lambda r: r[1]["answers"].update(answer_start=[0, 0]),
         r"validation\.jsonl:2: field 'answers': 'жауап1' does not stand at character 0"),
        ("kazqad", "kk", "eval/kk/kazqad/validation.jsonl",
         lambda r: r[1]["answers"].pop("answer_start"), r":2: field 'answers' should have as many"),
        ("kazqad", "kk", "eval/kk/kazqad/validation.jsonl", lambda r: r.__delitem__(slice(15, 99)),
         r"validation\.jsonl:15: too few rows: the last 20"),
        ("copa", "kk", "eval/kk/kkCOPA.jsonl", lambda r: r[3].update({"asks-for_eng": "why"}),
         r":4: field 'asks-for_eng' should be one of cause, effect; got 'why'"),
        ("copa", "ta", "eval/ta/test.jsonl", lambda r: r[1].update(label=None),
         r"test\.jsonl:2: field 'label' is missing"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(name, lang, relative, edit, said, tmp_path):
    write_kazakh(tmp_path)
    for part in ("val", "test"):
        write_jsonl(tmp_path / f"eval/ta/{part}.jsonl", [xcopa(part, n) for n in range(3)])
    load(name, lang, tmp_path)
    broken(tmp_path / relative, edit)
    with pytest.raises(DataError, match=said):
        load(name, lang, tmp_path)


def test_spaces_around_a_name_change_nothing(tmp_path):
    """Bug: they were let through, and the report of a finished run ended in a traceback."""
    rows = [{"question": "2 + 2?", "answer": "4"}]
    for metrics in (["f1", "bleu"], [" f1", "bleu ", "f1"]):
        path = write_jsonl(tmp_path / "q.jsonl", [{"metrics": metrics}, *rows])
        assert custom_task(path).metrics == ("f1", "bleu")
    write_kazakh(tmp_path)
    whole = load("copa", "kk", tmp_path)
    path = tmp_path / "eval/kk/kkCOPA.jsonl"
    broken(path, lambda r: r[3].update({"asks-for_eng": f" {r[3]['asks-for_eng']}"}))
    assert load("copa", "kk", tmp_path) == whole


def test_a_bad_item_of_milic_is_named(tmp_path):
    write_milic(tmp_path)
    path = tmp_path / "data/text_classification/ug/test.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[4]["label"] = {"zh": "标"}
    write_json(path, rows)
    with pytest.raises(DataError, match=r"test\.json, item 5: field 'label\.en' is missing"):
        load("milic-text-classification", "ug", tmp_path)
    path = tmp_path / "data/math/ug/train_1.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    del rows[1]["cot"]
    write_json(path, rows)
    with pytest.raises(DataError, match=r"train_1\.json, item 2: field 'cot' is missing; it has"):
        load("milic-math", "ug", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "x"}\n{"a": \n', r"f:2: not JSON: Expecting value, column 7"),
        (b'{"a": "x"}\n\n{"a": "\xd0"}\n', r"f:3: not UTF-8; save the file as UTF-8"),
        (b'{"a": "x"}\n["x"]\n', r"f:2: expected a JSON object, got a list"),
        (b'{"b": "x"}\n', r"f:1: field 'a' is missing; it has b"),
        (b'{"a": ""}\n', r"f:1: field 'a' is missing"),
        (b'{"a": 7}\n', r"f:1: field 'a' should be a text, got a number"),
        (b"\n", r"f has no rows"),
    ],
)
def test_bad_jsonl(content, said, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_jsonl(path, {"a": str})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}', r"f: expected a JSON list of objects, got an object"),
        (b'[\n {"a": "x"},\n {"a": }\n]', r"f:3: not JSON: Expecting value, column 8"),
        (b'[{"a": "x"}, {"b": 1}]', r"f, item 2: field 'a' is missing; it has b"),
        (b'[{"a": "x"}, 3]', r"f, item 2: expected a JSON object, got a number"),
        (b"[]", r"f has no rows"),
    ],
)
def test_bad_json(content, said, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_json(path, {"a": str})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a\tb\nx\n", r"f:2: expected 2 columns \(a, b\), got 1"),
        ("a\tc\nx\ty\n", r"f:2: field 'b' is missing; it has a, c"),
        ('a\tb\nx\t"y\nz\tz\n', r"f:3: not tab-separated values: unexpected end of data"),
        ("a\tb\nx\t\n", r"f:2: field 'b' is missing"),
        ("a\tb\n", r"f has no rows"),
    ],
)
def test_bad_tsv(content, said, tmp_path):
    path = tmp_path / "f"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_tsv(path, ("a", "b"), quoted=True)


def test_windows_files_and_unicode_line_ends_are_read_whole(tmp_path):
    path = tmp_path / "f"
    path.write_bytes('\ufeff{"a": "бір\u2028екі"}\r\n{"a": "үш\x85"}\r\n'.encode())
    assert [row["a"] for _, row in read_jsonl(path, {"a": str})] == ["бір\u2028екі", "үш\x85"]
    path.write_bytes(b'a\tb\r\n"x\ty"\r\n')
    assert read_tsv(path, ("a", "b"))[0][1] == {"a": '"x', "b": 'y"'}


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_jsonl(tmp_path, {})
