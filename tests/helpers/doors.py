"""Requests of Anthropic's and Ollama's clients, and what their errors look like."""

import json

from conftest import KAZAKH

TOLD = "Қысқа жауап бер."
CHAT = [{"role": "user", "content": KAZAKH}]
ASKED = [{"role": "system", "content": TOLD}, *CHAT]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Алматы", "Астана"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"name": "choose", "description": "Қала", "input_schema": CITY}
OTHER = {"name": "other", "input_schema": {"type": "object"}}
FUNCTION = {"type": "function", "function": {"name": "choose", "parameters": CITY}}
SAMPLED = [{"temperature": 0}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 21}]


def message(server, **fields):
    return server.post("/v1/messages", {"messages": CHAT, "max_tokens": 4, **fields})


def lines_of(text):
    """The objects of a stream as Ollama sends it."""
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def named_events(text):
    """(name, object) of a stream as Anthropic sends it, whose shape is checked."""
    *blocks, end = text.split("\n\n")
    assert end == ""
    events = []
    for block in blocks:
        first, second = block.split("\n")
        value = json.loads(second.removeprefix("data: "))
        assert first == f"event: {value['type']}"
        events.append(value)
    return events


def anthropic_error(response, status):
    """The error object of a refusal, in Anthropic's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"type", "error"} and body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]


def ollama_error(response, status):
    """The text of a refusal, in Ollama's shape."""
    assert response.status_code == status, response.text
    (text,) = response.json().values()
    assert response.json().keys() == {"error"} and text and "\n" not in text
    return text
