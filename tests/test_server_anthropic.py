"""Anthropic's messages: streams, tools, formats, and errors in their shape."""

import json

import httpx
import pytest
from doors import (
    CHAT,
    CITY,
    FUNCTION,
    OTHER,
    TOLD,
    TOOL,
    anthropic_error,
    message,
    named_events,
)
from served import ENDLESS, PATIENCE_S, serving


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 4) as served:
        yield served


# -- Anthropic ------------------------------------------------------------------------------


def test_a_streamed_message_has_anthropics_events(server):
    events = named_events(message(server, stream=True, max_tokens=3, **ENDLESS).text)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None
    assert start["usage"]["input_tokens"] + start["usage"]["cache_read_input_tokens"] > 0
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}


def test_a_stop_sequence_is_named(server):
    asked = {"max_tokens": 99, "temperature": 0, "stop_sequences": ["\0", " "], **ENDLESS}
    cut = message(server, **asked).json()
    assert cut["stop_reason"] == "stop_sequence" and cut["stop_sequence"] == " "
    assert cut["content"][0]["text"] and " " not in cut["content"][0]["text"]
    events = named_events(message(server, **asked, stream=True).text)
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": " "}


@pytest.mark.parametrize(
    ("tools", "choice"),
    [([OTHER, TOOL], {"type": "tool", "name": "choose"}), ([TOOL], {"type": "any"})],
)
def test_a_tool_that_must_be_used_is_used(server, tools, choice):
    asked = {"tools": tools, "tool_choice": choice, "seed": 3, "max_tokens": 99}
    whole = message(server, **asked).json()
    (block,) = whole["content"]
    assert whole["stop_reason"] == "tool_use" and block["type"] == "tool_use" and block["id"]
    assert block["name"] == "choose" and block["input"]["city"] in ("Алматы", "Астана")
    events = named_events(message(server, **asked, stream=True).text)
    assert events[1]["content_block"] | {"id": 0} == {**block, "input": {}, "id": 0}
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert json.loads("".join(d["partial_json"] for d in deltas)) == block["input"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    cut = message(server, **{**asked, "max_tokens": 1}).json()
    assert cut["stop_reason"] == "max_tokens" and cut["content"][0]["input"] == {}
    same = {"type": "function", "function": {"name": "choose"}}
    functions = {"tools": [FUNCTION], "tool_choice": same, "seed": 3, "max_tokens": 99}
    chatted = server.post("/v1/chat/completions", {"messages": CHAT, **functions}).json()
    (call,) = chatted["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == block["input"]


def test_a_tools_use_and_its_result_can_be_sent_back(server):
    used = {"type": "tool_use", "id": "x", "name": "choose", "input": {"city": "Алматы"}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "a"}]}
    messages = [
        *CHAT,
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, used]},
        {"role": "user", "content": [result]},
    ]
    answer = message(server, messages=messages, tools=[TOOL])
    assert answer.status_code == 200 and answer.headers["x-trimix-ignored"] == "tools"


def test_a_format_makes_the_answer_valid(server):
    form = {"format": {"type": "json_schema", "schema": CITY}}
    whole = message(server, output_config=form, max_tokens=99).json()
    assert json.loads(whole["content"][0]["text"])["city"] in ("Алматы", "Астана")


def test_tokens_are_counted_before_an_answer(server):
    asked = {"system": TOLD, "messages": CHAT}
    counted = server.post("/v1/messages/count_tokens", asked).json()
    usage = message(server, **asked).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "a"}]}, "last message"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content[0]"),
        ({"system": 1}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"temperature": "warm"}, "temperature"),
        ({"tools": [TOOL, OTHER], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "a"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"mcp_servers": [{"url": "a"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
def test_a_message_that_cannot_be_is_refused_by_name(server, fields, words):
    error = anthropic_error(message(server, **fields), 400)
    assert words in error["message"] and error["type"] == "invalid_request_error"


def test_errors_of_anthropics_routes_have_their_shape(server):
    url = f"{server.url}/v1/messages"
    assert anthropic_error(httpx.post(url, content=b"{"), 400)["type"] == "invalid_request_error"
    assert "POST" in anthropic_error(httpx.get(url), 405)["message"]
    assert anthropic_error(httpx.post(f"{url}/batches"), 404)["type"] == "not_found_error"
    long = httpx.post(url, content=b" " * (2 << 20), timeout=PATIENCE_S)
    assert anthropic_error(long, 413)["type"] == "request_too_large"
    with serving("--api-key", "secret") as served:
        assert anthropic_error(message(served), 401)["type"] == "authentication_error"
        for held in ({"X-Api-Key": "secret"}, {"Authorization": "Bearer secret"}):
            body = {"messages": CHAT, "max_tokens": 1}
            assert served.post("/v1/messages", body, headers=held).status_code == 200
        for held in ({"X-Api-Key": "wrong"}, {"X-Api-Key": ""}):
            assert served.post("/v1/messages", body, headers=held).status_code == 401
