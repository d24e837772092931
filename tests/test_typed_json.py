"""JSON by others fits the shape that is expected, or is refused in words."""

import json
import os
import re
from pathlib import Path

import pytest

import trimix_gguf
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.typed_json import NEEDED, misfit, parse

SHAPE = {"a": int, "b": (None, [float]), "c": {str: bool}, "d": {"e": str, NEEDED: ("e",)}}


@pytest.mark.parametrize(
    "value",
    [{}, {"a": 1, "b": None}, {"b": [1, 2.5]}, {"c": {"x": True}}, {"d": {"e": ""}, "z": 1}],
)
def test_what_fits(value):
    assert parse(json.dumps(value), SHAPE) == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "it is [], expected an object"),
        ({"a": True}, "a is True, expected a whole number"),
        ({"a": 1.5}, "a is 1.5, expected a whole number"),
        ({"b": [1, "x"]}, "b[1] is 'x', expected a number"),
        ({"b": [10**400]}, "expected a number"),
        ({"c": {"x": 1}}, "c.x is 1, expected true or false"),
        ({"d": {}}, "d has no 'e'"),
        ({"d": {"e": "\x1b[2J" * 99, "": 5}, "a": "\x1b"}, "a is '\\x1b', expected a whole number"),
    ],
)
def test_what_does_not_fit(value, words):
    assert words in misfit(value, SHAPE)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "", b"\xff"])
def test_what_is_no_json(text):
    with pytest.raises(ValueError):
        parse(text, object)


WRONG = {
    "config.json": ("eos_token_id", {"a": 1}),
    "tokenizer.json": ("added_tokens", [{"id": 3}]),
    "tokenizer_config.json": ("added_tokens_decoder", {"x": {"content": "x"}}),
    "generation_config.json": ("eos_token_id", "5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_of_a_checkpoint_with_other_values_are_refused(folder, tmp_path, name):
    path = folder / name
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    key, value = WRONG[name]
    path.write_text(json.dumps(old | {key: value}), encoding="utf-8")
    with pytest.raises(ConversionError) as caught:
        convert_hf(folder, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
@pytest.mark.parametrize(
    "name", ["config.json", "chat_template.jinja", "tokenizer.json", "model.safetensors"]
)
def test_nothing_from_outside_a_checkpoint_is_read(folder, tmp_path, name):
    """Bug: a link in a stranger's folder put any file of the user's into the GGUF."""
    outside = tmp_path / "secret"
    if (folder / name).is_file():
        (folder / name).rename(outside)
    else:
        outside.write_text("secret")
    (folder / name).symlink_to(outside)
    with pytest.raises(ConversionError, match="leads out of"):
        convert_hf(folder, tmp_path / "x.gguf")


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
def test_a_snapshot_of_the_hubs_cache_is_read(folder, tmp_path):
    cache = tmp_path / "models--x--y"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    convert_hf(snapshot, tmp_path / "x.gguf")
    assert read_gguf(tmp_path / "x.gguf").architecture == "llama"


# Our own lines between our own processes, and the server's reader of requests, which counts levels.
OTHER_READERS = {"machine/typed_json.py", "machine/worker.py", "server/bodies.py", "trio/trial.py"}


def test_no_other_reader_meets_files():
    """json.loads of what json.dumps wrote just before is a copy, not a file."""
    package = Path(trimix_gguf.__file__).parent
    calls = re.compile(r"json\.loads?\((?!json\.dumps)")
    found = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if calls.search(file.read_text("utf-8"))
    }
    assert found == OTHER_READERS


HOSTILE = {
    "deep": "[" * 100_000,
    "digits": '{"id": ' + "9" * 5000 + "}",
    "half a pair": r'{"text": "\ud800"}',
}
READERS = {
    "eval": lambda f: ("eval", "--tasks", f, "--out", f.parent / "out"),
    "adapt": lambda f: ("adapt", "x", f, "--dry-run"),
    "run": lambda f: ("run", f, "-o", f.parent / "answers.jsonl"),
    "schema": lambda f: ("generate", "а", "--json-schema", f),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_hostile_json_is_one_line_for_every_command(reader, text, tmp_path, trimix):
    file = tmp_path / "hostile.jsonl"
    file.write_text(text + "\n", encoding="utf-8")
    result = trimix(*READERS[reader](file))
    assert result.returncode in (1, 2)
    assert result.stdout == b""
    (line,) = [
        line
        for line in result.stderr.decode().splitlines()
        if any(word in line for word in ("hostile", "schema", "the text holds no letters"))
    ]
    assert len(line) < 400
    assert b"Traceback" not in result.stderr
