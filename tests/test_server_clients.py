"""What clients of other servers send, and what they expect to get."""

import gzip
import json
from typing import Literal

import httpx
import openai
import pytest
from conftest import KAZAKH
from pydantic import BaseModel
from served import ENDLESS, TEXTS, broken, error_of, serving

CHAT = [{"role": "user", "content": KAZAKH}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Алматы", "Астана"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "choose", "parameters": CITY}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "choose"}}


class City(BaseModel):
    """A city's name."""

    city: Literal["Алматы", "Астана"]


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 4) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def chat(server, **fields):
    body = {"messages": CHAT, "max_tokens": 4, **fields}
    return server.post("/v1/chat/completions", body)


# -- fields ---------------------------------------------------------------------------------


def test_unknown_fields_are_ignored_and_named(server):
    message = {"role": "user", "content": "a", "weather": 1}
    extra = {"temprature": 1, "typical_p": 0.9, "slot": None, "messages": [message]}
    response = chat(server, **extra, model="gpt-4")
    assert response.status_code == 200 and response.json()["model"] == "nano"
    names = response.headers["x-trimix-ignored"].split(", ")
    assert sorted(names) == ["messages[0].weather", "model", "temprature", "typical_p"]
    assert "x-trimix-ignored" not in chat(server).headers
    with serving("--strict") as strict:
        assert error_of(chat(strict, temprature=1), 400)["param"] == "temprature"
        assert error_of(chat(strict, model="gpt-4"), 404)["code"] == "model_not_found"
        assert error_of(chat(strict, tools=[TOOL]), 400)["param"] == "tools"


def test_names_of_ignored_fields_cannot_break_the_header(server):
    names = {f"a\r\nX-Evil: {i}": 1 for i in range(500)} | {"қ" * 9000: 1}
    response = chat(server, **names)
    told = response.headers["x-trimix-ignored"]
    assert response.status_code == 200 and "x-evil" not in response.headers
    assert len(told) < 2000 and told.isascii() and told.isprintable()
    assert told.endswith("and 485 more")


@pytest.mark.parametrize("field", ["min_tokens", "ignore_eos", "guided_json", "grammar"])
def test_what_would_change_the_answer_is_refused_by_name(server, field):
    assert error_of(chat(server, **{field: 1}), 400)["param"] == field
    assert chat(server, **{field: None}).status_code == 200


def test_a_typing_error_in_our_own_object_is_refused(server):
    assert error_of(chat(server, trimix={"wieghts": [1, 0]}), 400)["param"] == "trimix.wieghts"


def test_repetition_penalty_is_repeat_penalty(server):
    def text(**fields):
        body = {"prompt": TEXTS[0], "max_tokens": 24, "temperature": 0, **ENDLESS, **fields}
        return server.post("/v1/completions", body).json()["choices"][0]["text"]

    assert text(repetition_penalty=1.8) == text(repeat_penalty=1.8) != text()


def test_no_limit_is_as_many_tokens_as_the_context_holds():
    with serving("--n-ctx", 256, "--parallel", 4) as served:
        body = {"prompt": KAZAKH, "max_tokens": -1, **ENDLESS}
        most = served.post("/v1/completions", body).json()
        share = served.post("/v1/completions", {**body, "max_tokens": None}).json()
    n_prompt = most["usage"]["prompt_tokens"]
    assert most["usage"]["completion_tokens"] >= 256 - n_prompt
    assert most["trimix"]["finish_reason"] == "context"
    assert share["usage"]["completion_tokens"] == 256 // 4


def test_a_slash_at_the_end_of_a_path_changes_nothing(server):
    assert httpx.get(f"{server.url}/v1/models/").json()["data"][0]["id"] == "nano"
    assert httpx.get(f"{server.url}/v1/models/nano/").json()["id"] == "nano"
    body = {"prompt": KAZAKH, "max_tokens": 1}
    assert server.post("/v1/completions/", body).status_code == 200


# -- tools ----------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
def test_tools_that_may_be_called_are_not_used(server, choice):
    response = chat(server, tools=[TOOL], **choice)
    assert response.status_code == 200 and response.headers["x-trimix-ignored"] == "tools"
    assert "tool_calls" not in response.json()["choices"][0]["message"]


@pytest.mark.parametrize("tools, choice", [([OTHER, TOOL], NAMED), ([TOOL], "required")])
def test_a_function_that_must_be_called_is_called(server, client, tools, choice):
    """As instructor asks by default."""
    settings = {"model": "nano", "messages": CHAT, "tools": tools, "tool_choice": choice, "seed": 3}
    whole = client.chat.completions.create(**settings).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert call.function.name == "choose" and call.type == "function" and call.id
    assert json.loads(call.function.arguments)["city"] in ("Алматы", "Астана")
    with client.chat.completions.stream(**settings) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert streamed.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, OTHER], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required"}, "tools"),
        ({"tools": [OTHER], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": NAMED, "response_format": {"type": "json_object"}},
         "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "b"}}}],
          "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [{"type": "web_search"}], "tool_choice": NAMED}, "tools[0].type"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_is_refused_by_name(server, fields, param):
    assert error_of(chat(server, **fields), 400)["param"] == param


def test_a_call_that_is_cut_off_says_so(server):
    call = {"tools": [TOOL], "tool_choice": NAMED, "max_tokens": 1}
    assert chat(server, **call).json()["choices"][0]["finish_reason"] == "length"


def test_a_call_and_its_result_can_be_sent_back(server):
    calls = [{"id": "x", "type": "function", "function": {"name": "choose", "arguments": "{}"}}]
    result = {"role": "tool", "tool_call_id": "x", "content": "not valid"}
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": calls}, result]
    assert chat(server, messages=messages).status_code == 200
    assert error_of(chat(server, messages=[*CHAT, result]), 400)["param"] == "messages[1].role"


def test_parse_gives_objects(client):
    answer = client.chat.completions.parse(
        model="nano", messages=CHAT, response_format=City, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    tool = openai.pydantic_function_tool(City)
    answer = client.chat.completions.parse(
        model="nano", messages=CHAT, tools=[tool], tool_choice="required", max_tokens=200, seed=1
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)


@pytest.mark.filterwarnings("ignore")  # of theirs
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor_gives_objects(server, mode):
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    base = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    asking = instructor.from_openai(base, mode=getattr(instructor.Mode, mode))
    settings = {"model": "nano", "messages": CHAT, "max_tokens": 200, "seed": 1}
    assert isinstance(asking.chat.completions.create(response_model=City, **settings), City)


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_litellm_gets_an_answer(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    place = {"api_base": f"{server.url}/v1", "api_key": "unused", "model": "openai/nano"}
    answer = litellm.completion(messages=CHAT, max_tokens=4, **place)
    assert answer.choices[0].message.content


# -- responses ------------------------------------------------------------------------------


def test_a_response_is_the_chats_answer(client):
    settings = {"model": "nano", "temperature": 0}
    told = [{"role": "system", "content": "Қысқа жауап бер."}, *CHAT]
    chatted = client.chat.completions.create(messages=told, max_tokens=12, **settings)
    settings |= {"instructions": "Қысқа жауап бер.", "max_output_tokens": 12}
    whole = client.responses.create(input=KAZAKH, **settings)
    assert whole.output_text == chatted.choices[0].message.content
    assert whole.usage.input_tokens == chatted.usage.prompt_tokens
    assert whole.usage.output_tokens == chatted.usage.completion_tokens
    parts = [{"role": "user", "content": [{"type": "input_text", "text": KAZAKH}]}]
    assert client.responses.create(input=parts, **settings).output_text == whole.output_text
    cut = chatted.choices[0].finish_reason == "length"
    assert whole.status == ("incomplete" if cut else "completed")


def test_a_streamed_response_has_openais_events(client):
    settings = {"model": "nano", "input": KAZAKH, "temperature": 0, "max_output_tokens": 12}
    events = list(client.responses.create(**settings, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert (
        text == events[-1].response.output_text == client.responses.create(**settings).output_text
    )


def test_a_response_can_be_parsed(client):
    settings = {"model": "nano", "input": KAZAKH, "text_format": City, "temperature": 0}
    answer = client.responses.parse(**settings)
    assert answer.status == "completed" and isinstance(answer.output_parsed, City)
    with client.responses.stream(**settings) as stream:
        assert stream.get_final_response().output_parsed == answer.output_parsed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "b"}}}},
         "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
def test_a_response_that_cannot_be_is_refused_by_name(server, fields, param):
    body = {"input": "a", "max_output_tokens": 2, **fields}
    assert error_of(server.post("/v1/responses", body), 400)["param"] == param


BODIES = {
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        "text": {"format": {"type": "json_schema", "schema": CITY}},
        "instructions": "a", "max_output_tokens": 1, "tools": [], "tool_choice": "auto",
    },
    "/v1/chat/completions": {
        "messages": [*CHAT, {"role": "assistant", "tool_calls": [{"function": {"arguments": ""}}]}],
        "tools": [TOOL], "tool_choice": NAMED, "max_tokens": 1,
    },
    "/tokenize": {"prompt": "a", "parse_special": True, "add_special_tokens": True},
    "/detokenize": {"tokens": [1]},
}  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
def test_no_body_ends_in_a_mistake_of_the_server(server, path):
    """Bug: a schema whose `required` held a list got status 500."""
    for response in broken(server, path, BODIES[path]):
        error_of(response, response.status_code)


# -- the tokenizer --------------------------------------------------------------------------


def test_lm_evaluation_harness_finds_its_tokenizer(server, trio):
    """The requests of its RemoteTokenizer, for which the end of a text must be one token."""
    model = trio.models["large_ins"]
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] and info["chat_template"] == model.chat_template
    assert info.keys() >= {"tokenizer_class", "bos_token", "pad_token"}

    def encode(text):
        body = {"prompt": text, "add_special_tokens": False}
        return server.post("/tokenize", body).json()["tokens"]

    assert encode(KAZAKH) == model.tokenize(KAZAKH)
    assert encode(info["eos_token"]) == [model.special_tokens()["eos"]]
    assert server.post("/detokenize", {"tokens": encode(KAZAKH)}).json()["prompt"] == KAZAKH
    body = {"prompt": info["eos_token"], "parse_special": False}
    assert len(server.post("/tokenize", body).json()["tokens"]) > 1


# -- bodies ---------------------------------------------------------------------------------


def send(server, raw, encoding):
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    return httpx.post(f"{server.url}/v1/completions", content=raw, headers=headers, timeout=60)


def test_a_packed_body_is_unpacked_within_limits(server):
    raw = json.dumps({"prompt": KAZAKH, "max_tokens": 1}).encode()
    assert send(server, gzip.compress(raw), "gzip").status_code == 200
    bomb = gzip.compress(b" " * (1 << 28))
    assert len(bomb) < 1 << 20
    assert error_of(send(server, bomb, "gzip"), 413)["code"] == "body_too_long"
    assert error_of(send(server, raw, "br"), 415)["code"] == "unsupported_encoding"
    for other in (raw, gzip.compress(raw)[:-9], gzip.compress(raw) + b"a", b""):
        assert "gzip" in error_of(send(server, other, "gzip"), 400)["message"]
