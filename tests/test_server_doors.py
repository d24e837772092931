"""The doors for clients of Anthropic's API and of Ollama's: the same chat, in their forms."""

import json
import os
import signal
from contextlib import ExitStack

import httpx
import pytest
from conftest import KAZAKH
from doors import (
    ASKED,
    CHAT,
    CITY,
    FUNCTION,
    SAMPLED,
    TOLD,
    TOOL,
    anthropic_error,
    lines_of,
    message,
    named_events,
    ollama_error,
)
from served import ENDLESS, PATIENCE_S, broken, serving


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 4) as served:
        yield served


# -- the same answer ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SAMPLED, ids=["greedy", "sampled"])
def chatted(request, server):
    """(how to sample, the answer of /v1/chat/completions)."""
    body = {"messages": ASKED, "max_tokens": 16, **request.param}
    return request.param, server.post("/v1/chat/completions", body).json()


def test_a_message_is_the_chats_answer(server, chatted):
    how, expected = chatted
    text, usage = expected["choices"][0]["message"]["content"], expected["usage"]
    reason = expected["choices"][0]["finish_reason"]
    asked = {"system": TOLD, "max_tokens": 16, **how}
    whole = message(server, **asked).json()
    assert whole["content"] == [{"type": "text", "text": text}] and whole["model"] == "nano"
    assert whole["role"] == "assistant" and whole["type"] == "message" and whole["id"]
    assert whole["stop_reason"] == {"stop": "end_turn", "length": "max_tokens"}[reason]
    counted = whole["usage"]
    assert counted["input_tokens"] + counted["cache_read_input_tokens"] == usage["prompt_tokens"]
    assert counted["output_tokens"] == usage["completion_tokens"]
    assert whole["trimix"]["weights"] == expected["trimix"]["weights"]
    parts = [{"type": "text", "text": KAZAKH, "cache_control": {"type": "ephemeral"}}]
    asked |= {"system": [{"type": "text", "text": TOLD}]}
    asked["messages"] = [{"role": "user", "content": parts}]
    assert message(server, **asked).json()["content"] == whole["content"]
    events = named_events(message(server, stream=True, **asked).text)
    deltas = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(deltas) == text and events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2]["usage"]["output_tokens"] == usage["completion_tokens"]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollamas_answer_is_the_chats(server, chatted, path):
    how, expected = chatted
    text, usage = expected["choices"][0]["message"]["content"], expected["usage"]
    asked = {"model": "nano:latest", "options": {"num_predict": 16, **how}}
    if path == "/api/chat":
        asked["messages"] = ASKED
    else:
        asked |= {"system": TOLD, "prompt": KAZAKH}
    whole = server.post(path, {**asked, "stream": False})
    told = whole.json()

    def text_of(line):
        return line["message"]["content"] if path == "/api/chat" else line["response"]

    assert text_of(told) == text and "x-trimix-ignored" not in whole.headers
    reason = expected["choices"][0]["finish_reason"]
    streamed = server.post(path, asked)
    assert streamed.headers["content-type"] == "application/x-ndjson"
    *lines, last = lines_of(streamed.text)
    assert "".join(map(text_of, lines)) == text and text_of(last) == ""
    assert not any(line["done"] for line in lines)
    for end in (told, last):
        assert end["done"] is True and end["done_reason"] == reason and end["model"] == "nano"
        assert end["prompt_eval_count"] == usage["prompt_tokens"]
        assert end["eval_count"] == usage["completion_tokens"]
        spans = [end[f"{name}_duration"] for name in ("load", "prompt_eval", "eval")]
        assert all(type(n) is int and n > 0 for n in spans) and sum(spans) <= end["total_duration"]
    for value in (told, lines[0]):
        assert value["trimix"]["weights"] == expected["trimix"]["weights"]


def test_a_raw_text_goes_on_as_a_completion(server):
    whole = server.complete(KAZAKH, max_tokens=8, seed=1)
    asked = {"prompt": KAZAKH, "raw": True, "stream": False}
    asked["options"] = {"num_predict": 8, "temperature": 0}
    assert server.post("/api/generate", asked).json()["response"] == whole["choices"][0]["text"]


def test_the_mix_of_a_call_can_be_set_through_every_door(server):
    mix = {"weights": [0, 1]}
    expected = {"alpha": 0.0, "beta": 1.0, "method": "fixed"}
    asked = {"messages": CHAT, "stream": False, "options": {"num_predict": 2, "trimix": mix}}
    assert server.post("/api/chat", asked).json()["trimix"]["weights"] == expected
    assert message(server, trimix=mix).json()["trimix"]["weights"] == expected
    wrong = {"messages": CHAT, "options": {"trimix": {"wieghts": 1}}}
    assert "options.trimix.wieghts" in ollama_error(server.post("/api/chat", wrong), 400)


# -- bad bodies, and what breaks off --------------------------------------------------------

BODIES = {
    "/v1/messages": {
        "system": [{"type": "text", "text": "a"}], "stop_sequences": ["b"], "max_tokens": 1,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "name": "a", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "content": "a"}]},
        ],
        "tools": [TOOL], "tool_choice": {"type": "tool", "name": "choose"},
        "output_config": {}, "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {"messages": CHAT, "system": "a", "tools": []},
    "/api/chat": {
        "messages": [
            *CHAT,
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": {}}}]},
            {"role": "tool", "content": "a", "tool_name": "a"},
        ],
        "tools": [FUNCTION], "format": CITY, "options": {"num_predict": 1, "stop": ["a"]},
        "stream": False, "keep_alive": 1, "think": False,
    },
    "/api/generate": {"prompt": "a", "system": "b", "raw": False, "options": {"num_predict": 1}},
    "/api/show": {"model": "nano"},
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """A server whose longest answers are short: some bodies set no limit."""
    with serving("--n-ctx", 128) as served:
        yield served


@pytest.mark.parametrize("path", BODIES)
def test_no_body_ends_in_a_mistake_of_the_server(small, path):
    shape = ollama_error if path.startswith("/api/") else anthropic_error
    for response in broken(small, path, BODIES[path]):
        shape(response, response.status_code)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
def test_a_stream_that_fails_ends_in_the_apis_error():
    long = {"messages": CHAT, "stream": True, "max_tokens": 8000, **ENDLESS}
    asked = {"messages": CHAT, "options": {"num_predict": 8000, **ENDLESS}}
    with serving("--n-ctx", 16384, "--drain", 0) as served, ExitStack() as stack:
        texts = []
        for path, body in [("/v1/messages", long), ("/api/chat", asked)]:
            answer = httpx.stream("POST", served.url + path, json=body, timeout=PATIENCE_S)
            texts.append(stack.enter_context(answer).iter_text())
        begun = [next(text) for text in texts]
        served.process.send_signal(signal.SIGTERM)
        whole = ["".join([first, *rest]) for first, rest in zip(begun, texts, strict=True)]
    events, lines = named_events(whole[0]), lines_of(whole[1])
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "overloaded_error"
    assert not any(line["done"] for line in lines[:-1]) and len(lines) > 1
    assert lines[-1] == {"error": "the server is shutting down"}


def test_fields_that_are_not_known(server):
    assert message(server, weather=1).headers["x-trimix-ignored"] == "weather"
    with serving("--strict") as strict:
        assert "weather" in anthropic_error(message(strict, weather=1), 400)["message"]
        asked = {"messages": CHAT, "options": {"weather": 1}}
        assert "options.weather" in ollama_error(strict.post("/api/chat", asked), 400)


# -- their own clients ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_anthropics_own_client(server):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
    asked = {"model": "nano", "messages": CHAT, "system": TOLD, "max_tokens": 12}
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        whole = client.messages.create(**asked, extra_body={"temperature": 0})
        with client.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == whole.content[0].text == final.content[0].text
        assert final.stop_reason == whole.stop_reason and final.usage.output_tokens > 0
        counted = client.messages.count_tokens(model="nano", messages=CHAT, system=TOLD)
        assert counted.input_tokens >= whole.usage.input_tokens > 0
        asked |= {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "choose"}}
        with client.messages.stream(**{**asked, "max_tokens": 99}) as stream:
            (block,) = stream.get_final_message().content
        assert block.type == "tool_use" and block.input["city"] in ("Алматы", "Астана")
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            client.messages.create(**asked, extra_body={"temperature": 9})


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_ollamas_own_client(server):
    ollama = pytest.importorskip("ollama", reason="ollama is not installed")
    options = {"num_predict": 12, "temperature": 0}
    with ollama.Client(host=server.url) as client:
        assert [model.model for model in client.list().models] == ["nano"]
        assert client.show("nano").capabilities == ["completion"]
        assert client.ps().models[0].name == "nano"
        whole = client.chat("nano", ASKED, options=options)
        parts = list(client.chat("nano", ASKED, options=options, stream=True))
        assert "".join(part.message.content for part in parts) == whole.message.content
        assert parts[-1].done and parts[-1].eval_count == whole.eval_count
        assert whole.done_reason in ("stop", "length") and whole.total_duration > 0
        generated = client.generate("nano", KAZAKH, system=TOLD, options=options)
        assert generated.response == whole.message.content
        told = client.chat("nano", CHAT, format=CITY, options={"num_predict": 99})
        assert json.loads(told.message.content)["city"] in ("Алматы", "Астана")
        with pytest.raises(ollama.ResponseError, match="/api/embed is not supported"):
            client.embed("nano", "a")
