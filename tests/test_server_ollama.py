"""Ollama's routes: what its clients find, set and are refused."""

import json

import httpx
import pytest
from conftest import KAZAKH
from doors import (
    CHAT,
    CITY,
    ollama_error,
)
from served import ENDLESS, serving

from trimix_gguf.trio.trio import NANO


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 4) as served:
        yield served


# -- Ollama ---------------------------------------------------------------------------------


def test_ollamas_clients_find_the_trio(server):
    (tag,) = httpx.get(f"{server.url}/api/tags").json()["models"]
    assert tag["name"] == tag["model"] == "nano" and tag["details"]["format"] == "gguf"
    assert tag["size"] == sum(path.stat().st_size for path in NANO.glob("*.gguf"))
    assert len(tag["digest"]) == 64 and tag["modified_at"]
    (loaded,) = httpx.get(f"{server.url}/api/ps").json()["models"]
    assert loaded["name"] == "nano" and loaded["context_length"] == 4096
    shown = server.post("/api/show", {"model": "nano:latest"}).json()
    assert shown["model_info"]["trimix.context_length"] == 4096 and shown["template"]
    assert shown["capabilities"] == ["completion"]
    assert httpx.get(f"{server.url}/api/version").json().keys() == {"version"}
    assert httpx.head(server.url).status_code == 200


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_a_call_without_a_question_loads_the_trio(server, path):
    told = server.post(path, {"model": "nano"}).json()
    assert told["done"] is True and told["done_reason"] == "load"


@pytest.mark.parametrize("form", ["json", CITY])
def test_ollamas_format_makes_the_answer_valid(server, form):
    asked = {"messages": CHAT, "format": form, "stream": False}
    asked["options"] = {"num_predict": 200, "seed": 1, "temperature": 0}
    told = server.post("/api/chat", asked).json()
    if told["done_reason"] == "stop":
        assert isinstance(json.loads(told["message"]["content"]), dict)
    assert form == "json" or told["done_reason"] == "stop"


def test_what_ollamas_clients_set_is_used(server):
    def text(**options):
        asked = {"prompt": KAZAKH, "raw": True, "stream": False}
        asked["options"] = {"num_predict": 24, "temperature": 0, **ENDLESS, **options}
        return server.post("/api/generate", asked).json()["response"]

    plain = text()
    assert text(repeat_penalty=1.8) != plain
    assert text(repeat_penalty=1.8, repeat_last_n=0) == plain
    whole = text(repeat_penalty=1.8, repeat_last_n=2**31 - 1)  # llama.cpp would fill 8 GiB
    assert whole == text(repeat_penalty=1.8, repeat_last_n=-1) != plain
    assert text(stop=[plain[5:8]]) == plain[:5]


def test_what_the_server_sets_itself_is_ignored_and_named(server):
    asked = {"messages": CHAT, "stream": False, "keep_alive": "5m"}
    asked["options"] = {"num_predict": 1, "num_ctx": 9, "typical_p": 1}
    response = server.post("/api/chat", asked)
    names = response.headers["x-trimix-ignored"].split(", ")
    assert sorted(names) == ["keep_alive", "options.num_ctx", "options.typical_p"]


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
        ("/api/chat", {"messages": "a"}, "messages"),
        ("/api/chat", {"options": 1}, "options"),
        ("/api/chat", {"options": {"num_predict": 0}}, "options.num_predict"),
        ("/api/chat", {"options": {"temperature": -1}}, "options.temperature"),
        ("/api/chat", {"format": "xml"}, "format"),
        ("/api/chat", {"think": True}, "think"),
        ("/api/chat", {"logprobs": True}, "logprobs"),
        ("/api/generate", {"images": ["x"]}, "images"),
        ("/api/generate", {"suffix": "x"}, "suffix"),
        ("/api/generate", {"template": "x"}, "template"),
        ("/api/generate", {"context": [1]}, "context"),
        ("/api/generate", {"stream": 1}, "stream"),
    ],
)
def test_what_ollama_has_and_trimix_has_not_is_refused_by_name(server, path, fields, words):
    body = {"messages": CHAT} if path == "/api/chat" else {"prompt": "a"}
    assert words in ollama_error(server.post(path, {**body, **fields}), 400)


@pytest.mark.parametrize(
    "name", ["pull", "push", "create", "copy", "delete", "embed", "embeddings"]
)
def test_routes_of_ollama_that_are_not_here_say_why(server, name):
    text = ollama_error(server.post(f"/api/{name}", {"model": "a"}), 404)
    assert f"/api/{name} is not supported: " in text
