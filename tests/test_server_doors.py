"""The doors for clients of Anthropic's API and of Ollama's: the same chat, in their forms."""

import json
import os
import signal
from contextlib import ExitStack
from itertools import pairwise

import httpx
import pytest
from conftest import KAZAKH
from served import ENDLESS, PATIENCE_S, broken, serving

from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

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
SAMPLED = [{"temperature": 0}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 7}]


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 4) as served:
        yield served


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


@pytest.mark.parametrize("path", BODIES)
def test_no_body_ends_in_a_mistake_of_the_server(server, path):
    shape = ollama_error if path.startswith("/api/") else anthropic_error
    for response in broken(server, path, BODIES[path]):
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
