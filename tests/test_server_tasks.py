"""`trimix serve --task`: a task whose weights are chosen once, for the requests that name it."""

import json

import httpx
import pytest
from conftest import KAZAKH
from served import error_of, serving

from trimix_gguf import Trio
from trimix_gguf.choosing.methods import INFORMATIVE
from trimix_gguf.cli.served_trios import groups_of
from trimix_gguf.evaluation.running.file_weights import weights_of_file
from trimix_gguf.trio.trio import NANO

ROWS = [
    {"question": "Қазақстанның астанасы?", "choices": ["Алматы", "Астана"], "answer": "B"},
    {"question": "2 + 2 = ?", "choices": ["3", "4", "5"], "answer": "B"},
    {"question": "Жыл қай айда басталады?", "choices": ["Қаңтар", "Мамыр"], "answer": "A"},
]
CHAT = {"messages": [{"role": "user", "content": KAZAKH}], "max_tokens": 2}
NAMED = {"trimix": {"task": "exam"}}
TASK_METHODS = {"exam.jsonl": INFORMATIVE, "texts.txt": "ppl"}


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    file = tmp_path_factory.mktemp("task") / "exam.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def server(exam):
    options = ("--task", exam, "--task-method", INFORMATIVE, "--threads", 1)
    with serving("--trio", NANO, *options) as served:
        yield served


@pytest.fixture(scope="module")
def expected(exam):
    with Trio.nano(n_threads=1) as trio:
        return weights_of_file(trio, exam, INFORMATIVE, lambda *_: None).to_json()


def weights(response):
    assert response.status_code == 200, response.text
    return response.json()["trimix"]["weights"]


def test_requests_that_name_it_get_its_weights_and_others_their_own(server, expected):
    own = weights(server.post("/v1/chat/completions", CHAT))
    found = weights(server.post("/v1/chat/completions", {**CHAT, **NAMED}))
    assert "exam" in found.pop("reason")
    assert found == expected != own
    assert weights(server.post("/v1/chat/completions", CHAT)) == own
    answer = server.post("/v1/chat/completions", {**CHAT, **NAMED}).json()["trimix"]
    assert answer["grid"] is None  # that of the file would be no prompt's


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": KAZAKH, "max_tokens": 2, **NAMED}),
        ("/v1/responses", {"input": KAZAKH, "max_output_tokens": 16, **NAMED}),
        ("/v1/messages", {**CHAT, **NAMED}),
    ],
)
def test_every_door_takes_it(server, expected, path, body):
    assert weights(server.post(path, body))["alpha"] == expected["alpha"]
    refused = server.post(path, {**body, "trimix": {"task": "other"}})
    assert refused.status_code == 404 and "other" in refused.text


def test_ollamas_clients_name_it_among_their_options(server):
    body = {"model": "nano", "prompt": KAZAKH, "stream": False, "options": {"num_predict": 2}}
    body["options"] |= NAMED
    assert server.post("/api/generate", body).status_code == 200
    body["options"] |= {"trimix": {"task": "other"}}
    assert server.post("/api/generate", body).status_code == 404


def test_the_list_of_models_names_it(server):
    [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["trimix"]["task"] == "exam"


@pytest.mark.parametrize("other", [{"weights": [1, 0]}, {"method": "auto"}])
def test_a_task_beside_weights_or_a_method_is_refused(server, other):
    body = {**CHAT, "trimix": {"task": "exam", **other}}
    error = error_of(server.post("/v1/chat/completions", body), 400)
    assert "not both" in error["message"] and error["param"] == "trimix.task"


def test_a_task_that_is_not_here_is_refused_with_the_one_that_is(server):
    body = {**CHAT, "trimix": {"task": "quiz"}}
    error = error_of(server.post("/v1/chat/completions", body), 404)
    assert "'exam'" in error["message"] and error["param"] == "trimix.task"


def test_without_a_task_the_mend_is_named(trimix, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": KAZAKH, **NAMED}), encoding="utf-8")
    result = trimix("run", file, "-o", tmp_path / "out.jsonl")
    assert result.returncode == 1
    assert b"trimix serve --task" in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "more", "code", "said"),
    [
        ("absent.jsonl", None, (), 1, b"absent.jsonl"),
        ("bad.jsonl", "{", (), 1, b"bad.jsonl"),
        ("empty.txt", "", (), 1, b"no text"),
        ("a.txt", KAZAKH, ("--task-method", INFORMATIVE), 2, b"JSON lines"),
        ("a.txt", KAZAKH, ("--task-method", "ppl-answers"), 2, b"JSON lines"),
        ("a.txt", KAZAKH, ("--task-method", "token"), 2, b"--task-method"),
        ("-", None, (), 2, b"a file"),
        (None, None, ("--task-method", "ppl"), 2, b"goes with --task"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    trimix, tmp_path, name, text, more, code, said
):
    file = name if name in (None, "-") else tmp_path / name
    if text is not None:
        file.write_text(text, encoding="utf-8")
    task = () if file is None else ("--task", file)
    result = trimix("serve", "--port", "0", *task, *more)
    assert result.returncode == code
    assert said in result.stderr.strip().splitlines()[-1]


def test_a_trio_that_is_loaded_again_reads_the_file_no_more(exam, tmp_path):
    """And the weights stay the same, whatever happened to the file."""
    file = tmp_path / "exam.jsonl"
    file.write_bytes(exam.read_bytes())
    [group] = groups_of([{"trio": str(NANO)}], task=str(file))
    [entry] = group.entries
    with Trio.nano(n_threads=1) as trio:
        first = entry.task.choose(trio, lambda: None)
        assert not trio.sequences.ids(0)["large_ins"]
        file.unlink()
    with Trio.nano(n_threads=1) as trio:
        assert entry.task.choose(trio, lambda: None) is first


@pytest.mark.parametrize("name", ["exam.jsonl", "texts.txt"])
def test_what_the_watch_raises_ends_the_choice(exam, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(exam.read_bytes() if name.endswith("jsonl") else KAZAKH.encode())
    [group] = groups_of([{"trio": str(NANO)}], task=str(file), task_method=TASK_METHODS[name])

    def leave():
        raise KeyboardInterrupt

    with Trio.nano(n_threads=1) as trio, pytest.raises(KeyboardInterrupt):
        group.entries[0].task.choose(trio, leave)
