"""Who may ask the server, and what it refuses."""

import signal
import socket

import httpx
import pytest
from conftest import KAZAKH
from served import error_of, serving
from test_cli import one_line_error

CHAT = [{"role": "system", "content": "Қысқа жауап бер."}, {"role": "user", "content": KAZAKH}]


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 8, "--strict") as served:
        yield served


# -- who may ask ----------------------------------------------------------------------------


def test_key_and_origins():
    page = {"Origin": "http://page.example"}
    with serving("--api-key", "sesame", "--cors", "http://page.example") as served:
        for path in ("/v1/models", "/metrics", "/nowhere"):
            for value in ("", "sesame", "Bearer", "Bearer wrong", "Bearer sésame", "Basic sesame"):
                refused = httpx.get(served.url + path, headers={"Authorization": value.encode()})
                assert error_of(refused, 401)["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
        key = {"Authorization": "Bearer sesame"}
        allowed = httpx.get(f"{served.url}/v1/models", headers={**key, **page})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == page["Origin"]
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        asked = {**page, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization, content-type"
        preflight = httpx.options(f"{served.url}/v1/completions", headers=asked)
        assert preflight.status_code == 204
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        other = httpx.get(f"{served.url}/v1/models", headers={**key, "Origin": "http://evil.test"})
        assert error_of(other, 403)["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in other.headers


def test_a_new_key_is_made_for_each_run_unless_one_is_given(monkeypatch):
    with serving("--new-key") as served:
        name, _, key = served.process.stderr.readline().decode().strip().partition(": ")
        assert name == "key" and len(key) > 20
        assert error_of(httpx.get(f"{served.url}/v1/models"), 401)
        held = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{served.url}/v1/models", headers=held).status_code == 200
    with serving("--new-key") as served:
        assert served.process.stderr.readline() != f"key: {key}\n".encode()
    monkeypatch.setenv("TRIMIX_API_KEY", "sesame")
    with serving("--new-key") as served:
        held = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{served.url}/v1/models", headers=held).status_code == 200


def test_no_new_key_is_made_beside_a_file_of_keys(tmp_path):
    """Bug: it was printed, and whoever read it there was let in beside those of the file."""
    keys = tmp_path / "keys"
    keys.write_text("ann sesame\n", encoding="utf-8")
    with serving("--new-key", "--api-key-file", keys, "--log-file", tmp_path / "log") as served:
        held = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{served.url}/v1/models", headers=held).status_code == 200
        served.process.send_signal(signal.SIGTERM)
        assert "key: " not in served.process.stderr.read().decode()


@pytest.mark.parametrize("host", ["evil.test", "evil.test:80", "127.0.0.1.evil.test", "[::2]:1"])
def test_a_name_that_was_made_to_lead_here_is_refused(server, host):
    refused = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
    assert error_of(refused, 403)["code"] == "host_not_allowed"


def test_pages_of_this_server_alone_may_use_it(server):
    def status(origin):
        return httpx.get(f"{server.url}/v1/models", headers={"Origin": origin}).status_code

    assert status(server.url) == 200
    assert {status("null"), status("http://127.0.0.1:1"), status("http://evil.test")} == {403}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--host", "192.0.2.1"), "--no-auth"),
        (("--api-key", ""), "--api-key"),
        (("--api-key", "k", "--no-auth"), "not both"),
        (("--cors", "page.example"), "not an origin"),
        (("--new-key", "--no-auth"), "not both"),
        (("--port", "65536"), "65535"),
    ],
)
def test_what_would_open_the_machine_is_a_usage_error(trimix, arguments, words):
    result = trimix("serve", *arguments)
    assert result.returncode == 2 and words in result.stderr.decode()


def test_an_address_that_cannot_be_had_names_the_option_to_change(trimix):
    """Bug: where the host is not this machine's, the advice was to choose another port."""
    away = one_line_error(trimix("serve", "--host", "192.0.2.1", "--no-auth", "--port", 0))
    assert "--host" in away and "--port" not in away
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "another --port" in one_line_error(trimix("serve", "--port", port))


# -- refusals -------------------------------------------------------------------------------

MESSAGES = {"messages": CHAT}
PROMPT = {"prompt": "Қазақстан"}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("chat/completions", {}, "messages", "list of messages"),
        ("chat/completions", {"messages": []}, "messages", "one at least"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role",
         "one of system"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "a string"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0]", "only text"),
        ("chat/completions", {**MESSAGES, "tools": [{}]}, "tools", "not supported"),
        ("chat/completions", {**MESSAGES, "functions": [{}]}, "functions", "not supported"),
        ("chat/completions", {**MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ("chat/completions", {**MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs",
         "0 to 20"),
        ("chat/completions", {**MESSAGES, "max_tokens": 1, "max_completion_tokens": 2},
         "max_tokens", "differ"),
        ("chat/completions", {**MESSAGES, "response_format": {"type": "xml"}},
         "response_format.type", "one of text"),
        ("chat/completions", {**MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"schema": {"pattern": "^a++$"}}}},
         "response_format.json_schema.schema", "quantifier"),
        ("chat/completions", {**MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
         "response_format.json_schema.schema", "JSON schema"),
        ("completions", {}, "prompt", "expected a string"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": [1, "a"]}, "prompt", "a list of strings"),
        ("completions", {"prompt": [-1]}, "prompt", "not a token"),
        ("completions", {"prompt": [10**9]}, "prompt", "not a token"),
        ("completions", {"prompt": "сөз " * 5000}, "prompt", "shorten it"),
        ("completions", {**PROMPT, "min_tokens": 5}, "min_tokens", "not supported"),
        ("completions", {**PROMPT, "guided_json": {"a": 1}}, "guided_json", "response_format"),
        ("completions", {**PROMPT, "repeat_penalty": 1, "repetition_penalty": 2},
         "repetition_penalty", "differ"),
        ("completions", {**PROMPT, "suffix": "b"}, "suffix", "not supported"),
        ("completions", {**PROMPT, "best_of": 2}, "best_of", "ask for n"),
        ("completions", {**PROMPT, "max_tokens": -2}, "max_tokens", "an integer"),
        ("completions", {**PROMPT, "max_tokens": True}, "max_tokens", "an integer"),
        ("completions", {**PROMPT, "temperature": "hot"}, "temperature", "a number"),
        ("completions", {**PROMPT, "stop": [""]}, "stop", "not empty"),
        ("completions", {**PROMPT, "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ("completions", {**PROMPT, "logit_bias": {"999999": 1}}, "logit_bias", "not a token"),
        ("completions", {**PROMPT, "stream_options": {}}, "stream_options", "stream: true"),
        ("completions", {**PROMPT, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("completions", {**PROMPT, "trimix": {"weights": [1]}}, "trimix.weights", "two numbers"),
        ("completions", {**PROMPT, "trimix": {"weights": [1e9, 0]}}, "trimix.weights", "1e6"),
        ("completions", {**PROMPT, "trimix": {"method": "best"}}, "trimix.method", "one of auto"),
        ("completions", {**PROMPT, "trimix": {"colour": 1}}, "trimix.colour", "unknown field"),
    ],
)  # fmt: skip
def test_a_bad_request_names_what_is_wrong(server, path, body, param, words):
    error = error_of(server.post(f"/v1/{path}", body), 400)
    assert error["param"] == param and words in error["message"], error


def test_a_prompt_that_is_too_long_has_its_code(server):
    refused = server.post("/v1/completions", {"prompt": "сөз " * 5000})
    assert error_of(refused, 400)["code"] == "context_length_exceeded"


def test_fields_that_change_nothing_are_let_through(server):
    ignored = {"user": "me", "metadata": {}, "store": False, "service_tier": "auto", "seed": None}
    ignored |= {"model": "default", "best_of": 1, "suffix": None, "stop": None, "logit_bias": {}}
    assert server.complete(KAZAKH, max_tokens=1, **ignored)
    chat = {"messages": CHAT, "max_completion_tokens": 1, "tools": [], "tool_choice": "none"}
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Сә"}, {"type": "text", "text": "лем"}],
        }
    ]
    for body in (chat, {**chat, "messages": parts}, {**chat, "response_format": {"type": "text"}}):
        assert server.post("/v1/chat/completions", body).status_code == 200


def test_wrong_paths_methods_and_models(server):
    assert error_of(server.post("/v1/chat/completions", {**MESSAGES, "model": "gpt-4"}), 404)
    assert error_of(httpx.get(f"{server.url}/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(httpx.get(f"{server.url}/v1/models//"), 404)
    assert error_of(httpx.get(f"{server.url}/v1/models/gpt"), 404)["code"] == "model_not_found"
    wrong = httpx.get(f"{server.url}/v1/completions")
    assert error_of(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


def test_the_page_is_served_where_there_is_one(server):
    page = httpx.get(server.url)
    if page.status_code == 200:
        assert page.headers["content-type"].startswith("text/html") and "<html" in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
    else:
        error_of(page, 404)
