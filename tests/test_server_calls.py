"""Tools that the chat template offers, and calls that a model writes."""

from itertools import pairwise

import pytest
from doors import CHAT, FUNCTION, TOOL
from served import serving

from trimix_gguf.trios.triofile import ModelEntry, TrioFile


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 4) as served:
        yield served


# -- tools that the chat template offers ----------------------------------------------------

TEMPLATE = (
    "{% if tools %}{{ '<|user|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ 'answer by <tool_call>' }}{{ '<|end|>' }}{% endif %}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def offering(tmp_path_factory, nano_files):
    """A server whose chat template offers tools."""
    folder = tmp_path_factory.mktemp("offering")
    models = {role: ModelEntry(str(path)) for role, path in nano_files.items()}
    TrioFile(folder, "offering", models, chat_template=TEMPLATE).write()
    with serving("--trio", folder, "--n-ctx", 4096) as served:
        yield served


def test_a_template_that_offers_tools_gets_them(offering):
    """A model that is not taught to call answers with text."""
    asked = {"messages": CHAT, "max_tokens": 2}

    def n_prompt(**fields):
        response = offering.post("/v1/chat/completions", {**asked, **fields})
        assert "x-trimix-ignored" not in response.headers
        return response.json()["usage"]["prompt_tokens"]

    plain, offered = n_prompt(), n_prompt(tools=[FUNCTION], tool_choice="auto")
    assert offered > plain + 20
    counted = offering.post("/v1/messages/count_tokens", {"messages": CHAT, "tools": [TOOL]}).json()
    assert counted["input_tokens"] >= offered  # it also describes the tool
    body = {"messages": CHAT, "tools": [FUNCTION], "options": {"num_predict": 2}, "stream": False}
    assert offering.post("/api/chat", body).json()["prompt_eval_count"] == offered
    assert offering.post("/api/show", {"model": "offering"}).json()["capabilities"][-1] == "tools"
    ignored = offering.post("/v1/chat/completions", {**asked, "tools": [{"type": "web_search"}]})
    assert ignored.headers["x-trimix-ignored"] == "tools"
    ignored = offering.post(
        "/v1/chat/completions", {**asked, "tools": [FUNCTION], "tool_choice": "none"}
    )
    assert ignored.json()["usage"]["prompt_tokens"] == plain


def test_earlier_calls_are_written_as_the_template_has_them():
    from trimix_gguf.server.anthropic import parse_message
    from trimix_gguf.server.messages import as_read
    from trimix_gguf.server.openai import parse_chat

    function = {"name": "choose", "arguments": '{"city": "Алматы"}'}
    calls = [{"id": "x", "type": "function", "function": function}]
    results = [{"role": "tool", "content": text, "tool_call_id": "x"} for text in "ab"]
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    parsed = parse_chat({"messages": messages, "tools": [FUNCTION]}).messages
    called = '<tool_call>\n{"name": "choose", "arguments": {"city": "Алматы"}}\n</tool_call>'
    came = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in "ab")
    assert as_read(parsed, with_calls=True)[1:] == [
        {"role": "assistant", "content": called},
        {"role": "user", "content": came},
    ]
    assert [m["content"] for m in as_read(parsed, with_calls=False)[1:]] == [
        function["arguments"],
        *"ab",
    ]
    used = {"type": "tool_use", "id": "x", "name": "choose", "input": {"city": "Алматы"}}
    blocks = [{"type": "tool_result", "tool_use_id": "x", "content": text} for text in "ab"]
    same = [*CHAT, {"role": "assistant", "content": [used]}, {"role": "user", "content": blocks}]
    body = {"messages": same, "max_tokens": 1, "tools": [TOOL]}
    assert as_read(parse_message(body).messages, with_calls=True) == as_read(
        parsed, with_calls=True
    )


CALL = '<tool_call>\n{"name": "choose", "arguments": {"city": "Алматы"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "shown", "n_calls"),
    [
        (CALL, "", 1),
        (f"Қазір.\n\n{CALL}\n{CALL}\n", "Қазір.", 2),
        (f"{CALL} соңы", f"{CALL} соңы", 0),
        ("a < b <tool", "a < b <tool", 0),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", 0),
        ('<tool_call>{"name": "choose"', '<tool_call>{"name": "choose"', 0),
        (CALL.replace("choose", "other"), CALL.replace("choose", "other"), 0),
        ("a  \n", "a  \n", 0),
        (CALL.replace('"choose"', '["choose"]'), None, 0),
        ("<tool_call>" + "[" * 5000 + "</tool_call>", None, 0),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text, shown, n_calls):
    from trimix_gguf.server.calls import CallFinder

    for size in (1, 2, 7, len(text)):
        cuts = [*range(0, len(text), size), len(text)]
        finder, pieces = CallFinder({"choose"}), []
        for start, end in pairwise(cuts):
            pieces.append(finder.push(text[start:end], ends=end == len(text)))
        assert "".join(pieces) == (text if shown is None else shown)
        assert [call.values for call in finder.calls] == [{"city": "Алматы"}] * n_calls


def replies(trio, kind, parse, body):
    """(the whole reply, the text of the stream) where a model has written CALL, bit by bit."""
    from trimix_gguf.answering.request import Event
    from trimix_gguf.choosing.selection import Selection
    from trimix_gguf.mixing.fusion import Mix, Weights

    selection = Selection(Mix.of(Weights(1, 0)), "fixed")
    text, told = f"Қазір. {CALL}", []
    for stream in (False, True):
        reply = kind(parse({**body, "stream": stream}), trio, model="m")
        parts = [text[i : i + 3] for i in range(0, len(text), 3)]
        chunks = [c for p in parts for c in reply.take(0, Event(p, selection=selection))]
        chunks += reply.take(0, Event(selection=selection, finish_reason="stop"))
        told.append(chunks if stream else reply.body())
    return told


def test_a_call_that_a_model_writes_is_a_call_through_every_door(trio):
    from trimix_gguf.server.anthropic import MessageReply, parse_message
    from trimix_gguf.server.ollama import OllamaReply, parse_ollama_chat
    from trimix_gguf.server.openai import parse_chat
    from trimix_gguf.server.replies import Reply

    body = {"messages": CHAT, "tools": [FUNCTION]}
    whole, chunks = replies(trio, Reply, parse_chat, body)
    choice = whole["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Қазір." and choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "choose"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Қазір."
    assert deltas[-1]["tool_calls"][0]["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    body = {"messages": CHAT, "tools": [TOOL], "max_tokens": 99}
    whole, events = replies(trio, MessageReply, parse_message, body)
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"]
    assert whole["content"][1]["input"] == {"city": "Алматы"} and whole["stop_reason"] == "tool_use"
    kinds = [(e["type"], e["index"]) for e in events if "index" in e]
    assert kinds[-4:] == [
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
    ]

    body = {"messages": CHAT, "tools": [FUNCTION]}
    whole, lines = replies(trio, OllamaReply, parse_ollama_chat, body)
    expected = [{"function": {"name": "choose", "arguments": {"city": "Алматы"}}}]
    assert whole["message"]["tool_calls"] == lines[-2]["message"]["tool_calls"] == expected
    assert "".join(line["message"]["content"] for line in lines) == "Қазір."
