"""The HTTP interface, driven through the CLI's process by the clients that people have."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from conftest import KAZAKH
from served import ENDLESS, serving

from trimix_gguf import Weights, score
from trimix_gguf.fusion import METHODS
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

TEXTS = [
    "Қазақстан Республикасының Үкіметі",
    "Бүгін Алматыда жаңа мектеп ашылды, ал",
    "The prince had come to",
    "Абай Құнанбайұлы — қазақтың ұлы ақыны. Ол",
    "Президент Астанада сөз сөйледі.",
    "Ауа райы бүгін жылы болады",
    "Once upon a time there was a",
    "Мектеп оқушылары кітап оқиды, себебі",
]
CHAT = [{"role": "system", "content": "Қысқа жауап бер."}, {"role": "user", "content": KAZAKH}]


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 8) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def events_of(text):
    """The payloads of a server-sent stream, whose shape is checked."""
    *blocks, end = text.split("\n\n")
    assert end == "" and blocks
    assert all(re.fullmatch(r"data: [^\n]+", block) for block in blocks), text
    return [block.removeprefix("data: ") for block in blocks]


def error_of(response, status):
    """The error object of a refusal, in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


# -- clients --------------------------------------------------------------------------------


def test_openai_client_chats_whole_and_streamed(client):
    settings = {"model": "nano", "messages": CHAT, "temperature": 0, "max_tokens": 12, **ENDLESS}
    whole = client.chat.completions.create(**settings)
    with client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    ) as stream:
        first, *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].message.content == text and text
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert whole.choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == 12
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens > 0  # what the first request read
    assert first.trimix["weights"] == whole.trimix["weights"]
    assert all(not hasattr(chunk, "trimix") for chunk in chunks)
    assert whole.object == "chat.completion" and first.object == "chat.completion.chunk"


def test_openai_client_completes_and_raises_what_is_refused(client):
    answer = client.completions.create(model="nano", prompt=KAZAKH, max_tokens=5, temperature=0)
    stream = client.completions.create(
        model="nano", prompt=KAZAKH, max_tokens=5, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="nano", prompt="a", temperature=7)
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_an_answer_and_a_stream(server):
    def curl(path, body):
        run = ["curl", "-sS", "-N", f"{server.url}{path}", "-d", json.dumps(body)]
        return subprocess.run(run, capture_output=True, check=True, timeout=60).stdout.decode()

    body = {"prompt": KAZAKH, "max_tokens": 6, "temperature": 0, **ENDLESS}
    whole = json.loads(curl("/v1/completions", body))
    *chunks, done = events_of(curl("/v1/completions", {**body, "stream": True}))
    assert done == "[DONE]"
    parts = [json.loads(chunk) for chunk in chunks]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
    assert "trimix" in parts[0] and not any("trimix" in part for part in parts[1:])
    assert len({part["id"] for part in parts}) == 1


def test_a_stream_has_no_line_ends_but_its_own(server):
    """Clients that cut text as str.splitlines does found halves of JSON."""
    prompt = "бір\u2028екі\u0085үш\u2029төрт\nбес"
    body = {"prompt": prompt, "echo": True, "max_tokens": 1, "stream": True, **ENDLESS}
    lines = server.post("/v1/completions", body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all(line == "" or line.startswith("data: ") for line in lines)
    assert chunks[0]["choices"][0]["text"] == prompt


@pytest.mark.skipif(shutil.which("llm") is None, reason="the llm command is not installed")
def test_llm_command_answers(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: nano\n  model_name: nano\n  api_base: {server.url}/v1\n"
        "  can_stream: true\n  api_key_name: none\n"
    )
    run = ["llm", "-m", "nano", "--key", "none", KAZAKH, "-o", "max_tokens", "8"]
    assert subprocess.run(run, capture_output=True, check=True, timeout=120).stdout.strip()


# -- what an answer says --------------------------------------------------------------------


def test_trimix_object_says_how_the_weights_were_chosen(server):
    mix = server.complete(KAZAKH, max_tokens=2)["trimix"]
    grid = mix["grid"]
    lowest = min(
        (nll, alpha, beta)
        for alpha, row in zip(grid["alphas"], grid["mean_nll"], strict=True)
        for beta, nll in zip(grid["betas"], row, strict=True)
    )
    assert mix["weights"] == {"alpha": lowest[1], "beta": lowest[2], "method": "ppl"}
    assert mix["perplexity"]["fused"] == pytest.approx(math.exp(lowest[0]))
    assert mix["perplexity"].keys() == {"large_ins", "small_cpt", "small_base", "fused"}
    fixed = server.complete(KAZAKH, max_tokens=2, trimix={"weights": [0.1, 0.9]})["trimix"]
    weights = {"alpha": 0.1, "beta": 0.9, "method": "fixed"}
    assert fixed == {"weights": weights, "perplexity": None, "grid": None}
    for name, method in METHODS.items():
        named = server.complete(KAZAKH, max_tokens=2, trimix={"method": name})["trimix"]["weights"]
        assert (named["alpha"], named["beta"]) == (method.weights.alpha, method.weights.beta)
    by_entropy = server.complete(KAZAKH, max_tokens=2, trimix={"method": "ent"})["trimix"]
    assert by_entropy["weights"]["method"] == "ent"


def test_trace_gives_each_token_its_probabilities(server):
    body = {"prompt": TEXTS[3], "max_tokens": 8, "temperature": 0, **ENDLESS}
    body["trimix"] = {"weights": [0.3, 0.3], "trace": True}
    whole = server.post("/v1/completions", body).json()
    *chunks, _ = events_of(server.post("/v1/completions", {**body, "stream": True}).text)
    streamed = [t for c in chunks for t in json.loads(c)["trimix"].get("tokens", ())]
    assert len(streamed) == 8
    assert "".join(token["text"] for token in streamed) == whole["choices"][0]["text"]
    for token, other in zip(streamed, whole["trimix"]["tokens"], strict=True):
        assert token["text"] == other["text"]
        assert token["probabilities"] == pytest.approx(other["probabilities"], rel=0.1)
        assert token["probabilities"].keys() == {"large_ins", "small_cpt", "small_base", "fused"}
        assert all(0 <= p <= 1 for p in token["probabilities"].values())


def test_logprobs_are_those_of_a_distribution(server):
    body = {"messages": CHAT, "max_tokens": 6, "temperature": 0, "logprobs": True, **ENDLESS}
    answer = server.post("/v1/chat/completions", {**body, "top_logprobs": 20}).json()
    message, entries = answer["choices"][0]["message"], answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == message["content"]
    for entry in entries:
        top = [alternative["logprob"] for alternative in entry["top_logprobs"]]
        assert len(top) == 20 and top == sorted(top, reverse=True)
        assert sum(math.exp(value) for value in top) <= 1 + 1e-9
    lists = server.complete(TEXTS[0], max_tokens=6, logprobs=3)["choices"][0]["logprobs"]
    for token, value, top in zip(
        lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True
    ):
        assert top[token] == value <= max(top.values()) and len(top) in (3, 4)
        assert sum(math.exp(other) for other in top.values()) <= 1 + 1e-9


def test_echoed_logprobs_are_the_perplexity_of_the_prompt(server, trio):
    answer = server.complete(KAZAKH, max_tokens=0, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert choice["text"] == KAZAKH and answer["usage"]["completion_tokens"] == 0
    values = choice["logprobs"]["token_logprobs"]
    assert values[0] is None and len(values) == answer["usage"]["prompt_tokens"]
    mean = -sum(values[1:]) / len(values[1:])
    assert math.exp(mean) == pytest.approx(answer["trimix"]["perplexity"]["fused"], rel=1e-3)
    weights = Weights(0.25, 0.6)
    fixed = server.complete(
        KAZAKH, max_tokens=3, echo=True, logprobs=1, trimix={"weights": [0.25, 0.6]}
    )["choices"][0]
    n = len(values)
    mean = -sum(fixed["logprobs"]["token_logprobs"][1:n]) / (n - 1)
    ours = score(trio, trio.prompt(KAZAKH), also=[weights]).perplexity(weights)
    assert math.exp(mean) == pytest.approx(ours, rel=1e-3)
    assert fixed["text"].startswith(KAZAKH)
    for at, token in zip(
        fixed["logprobs"]["text_offset"], fixed["logprobs"]["tokens"], strict=True
    ):
        assert token.startswith("bytes:") or fixed["text"][at:].startswith(token)


def test_a_prompt_is_the_same_as_text_ids_and_in_a_list(server, trio):
    model = trio.models["large_ins"]
    ids = [model.bos + model.tokenize(text) for text in TEXTS[:3]]
    alone = [server.complete(text, max_tokens=4, **ENDLESS) for text in TEXTS[:3]]
    texts = [answer["choices"][0]["text"] for answer in alone]
    for prompt in (TEXTS[:3], ids):
        together = server.complete(prompt, max_tokens=4, **ENDLESS)
        assert [choice["text"] for choice in together["choices"]] == texts
        assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
        assert [c["trimix"]["weights"] for c in together["choices"]] == [
            answer["trimix"]["weights"] for answer in alone
        ]
    one = server.complete(ids[1], max_tokens=4, echo=True, **ENDLESS)["choices"][0]
    assert one["text"] == TEXTS[1] + texts[1]


def test_n_answers_have_seeds_that_count_up(server):
    """All but a few: a batch's sums differ by a little, and so may a draw."""
    body = {"prompt": KAZAKH, "max_tokens": 1, "temperature": 1.5, **ENDLESS}
    several = server.post("/v1/completions", {**body, "n": 20, "seed": 5}).json()
    together = [choice["text"] for choice in several["choices"]]
    alone = [server.post("/v1/completions", {**body, "seed": seed}).json() for seed in range(5, 25)]
    same = [text == one["choices"][0]["text"] for text, one in zip(together, alone, strict=True)]
    assert sum(same) >= 16 and len(set(together)) > 5
    assert several["usage"]["completion_tokens"] == 20
    assert several["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]


def test_a_full_context_ends_an_answer_and_says_so():
    with serving("--n-ctx", 32) as served:
        choice = served.complete(KAZAKH, max_tokens=100, **ENDLESS)
        body = {"prompt": KAZAKH, "max_tokens": 100, "stream": True, **ENDLESS}
        *_, last, done = events_of(served.post("/v1/completions", body).text)
    assert choice["choices"][0]["finish_reason"] == "length"
    assert choice["trimix"]["finish_reason"] == "context"
    assert json.loads(last)["trimix"] == {"finish_reason": "context"} and done == "[DONE]"


def test_stop_ends_before_its_string(server):
    text = server.complete(TEXTS[3], max_tokens=24, **ENDLESS)["choices"][0]["text"]
    stop = text[5:7]
    choice = server.complete(TEXTS[3], max_tokens=24, stop=[stop], **ENDLESS)["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_json_is_what_was_asked_for(server):
    def answer(form):
        body = {"messages": CHAT, "max_tokens": 200, "seed": 1, "response_format": form}
        choice = server.post("/v1/chat/completions", body).json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    schema = {"type": "object", "properties": {"topic": {"enum": ["спорт", "саясат"]}}}
    schema |= {"required": ["topic"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "topic", "schema": schema}}
    text, reason = answer(form)
    assert reason == "stop" and json.loads(text)["topic"] in ("спорт", "саясат")
    text, _ = answer({"type": "json_object"})
    assert text.lstrip().startswith("{")


def test_tokenize_and_back(server, trio):
    model = trio.models["large_ins"]
    answer = server.post("/tokenize", {"content": KAZAKH, "add_special": True}).json()
    assert answer["tokens"] == model.bos + model.tokenize(KAZAKH)
    assert answer["count"] == len(answer["tokens"])
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json()["content"] == KAZAKH
    assert error_of(server.post("/detokenize", {"tokens": [10**6]}), 400)["param"] == "tokens"
    assert error_of(server.post("/tokenize", {"content": 3}), 400)["param"] == "content"


def test_a_trio_file_brings_name_and_weights(nano_files, tmp_path):
    models = {role: ModelEntry(str(path)) for role, path in nano_files.items()}
    TrioFile(tmp_path, "kazakh-test", models, weights=Weights(0.2, 0.7)).write()
    with serving("--trio", tmp_path) as served:
        (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert model["id"] == "kazakh-test" and model["trimix"] == {"weights": [0.2, 0.7]}
        answers = [
            served.complete(KAZAKH, max_tokens=1, model=name) for name in ("kazakh-test", "default")
        ]
        chosen = served.complete(KAZAKH, max_tokens=1, trimix={"method": "ppl"})
    for answer in answers:
        assert answer["model"] == "kazakh-test"
        weights = {"alpha": 0.2, "beta": 0.7, "method": "fixed"}
        assert answer["trimix"]["weights"] == weights
    assert chosen["trimix"]["weights"]["method"] == "ppl"
    TrioFile(tmp_path, "by-entropy", models, method="ent").write()
    with serving("--trio", tmp_path) as served:
        chosen = served.complete(KAZAKH, max_tokens=1)["trimix"]["weights"]
        fixed = served.complete(KAZAKH, max_tokens=1, trimix={"weights": [1, 0]})["trimix"]
    assert chosen["method"] == "ent" and fixed["weights"]["method"] == "fixed"


def test_metrics_are_well_formed_and_count(server):
    before = server.metrics()
    server.complete(KAZAKH, max_tokens=7, **ENDLESS)
    text, after = httpx.get(f"{server.url}/metrics").text, server.metrics()
    assert after["trimix_generated_tokens_total"] - before["trimix_generated_tokens_total"] == 7
    name = "trimix_time_to_first_token_seconds"
    assert after[f"{name}_count"] - before[f"{name}_count"] == 1
    buckets = [value for key, value in after.items() if key.startswith(f"{name}_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == after[f"{name}_count"]
    kinds = dict(re.findall(r"^# TYPE (\S+) (counter|gauge|histogram)$", text, re.M))
    assert kinds.keys() == set(re.findall(r"^# HELP (\S+) .", text, re.M))
    for sample in after:
        family = re.sub(r"\{.*|_(bucket|sum|count)$", "", re.sub(r"\{.*", "", sample))
        assert (kinds[family] == "counter") == family.endswith("_total"), sample


# -- together -------------------------------------------------------------------------------


def test_eight_at_once_each_get_what_they_get_alone(server):
    settings = {"max_tokens": 24, "logprobs": 5, **ENDLESS}
    alone = [server.complete(text, **settings)["choices"][0] for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        started = threading.Barrier(len(TEXTS))

        def ask(text):
            started.wait()
            return server.complete(text, **settings)["choices"][0]

        together = list(pool.map(ask, TEXTS))
    assert len({choice["text"] for choice in alone}) > len(TEXTS) / 2
    for ours, theirs in zip(together, alone, strict=True):
        assert agree(ours["logprobs"], theirs["logprobs"])


def agree(ours, theirs):
    """The same tokens, up to where two of them all but tie (llama.cpp sums batches otherwise)."""
    for i, (token, other) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True)):
        if token != other:
            top = ours["top_logprobs"][i]
            return top[token] - top.get(other, -math.inf) < 0.1
    return True


def is_idle(metrics):
    return metrics["trimix_requests_running"] == metrics["trimix_requests_waiting"] == 0


def is_running(metrics):
    return metrics["trimix_requests_running"] == 1


def post_head(path, body):
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_place(server, stream):
    key = 'trimix_requests_finished_total{reason="cancelled"}'
    before = server.wait_until(is_idle).get(key, 0)
    body = json.dumps({"prompt": KAZAKH, "max_tokens": 4000, "stream": stream, **ENDLESS}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(post_head("/v1/completions", body) + body)
        server.wait_until(is_running)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert server.wait_until(is_idle)[key] == before + 1


def test_who_reads_nothing_holds_no_place_for_ever(trio):
    """More comes back than the system's buffers hold: the log-probabilities of long prompts."""
    ids = trio.models["large_ins"].tokenize(" ".join(TEXTS) * 40)[:1500]
    body = {"prompt": ids, "n": 8, "echo": True, "logprobs": 20, "max_tokens": 1000, "stream": True}
    raw = json.dumps({**body, "trimix": {"weights": [0, 1]}, **ENDLESS}).encode()
    with serving("--n-ctx", 24_000, "--read-timeout", 1) as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(post_head("/v1/completions", raw) + raw)
        served.wait_until(lambda m: m["trimix_requests_running"] > 0)
        ended = served.wait_until(is_idle)
    assert ended['trimix_requests_finished_total{reason="cancelled"}'] > 0


def test_too_many_are_told_to_come_again_and_time_is_limited():
    long = {"prompt": KAZAKH, "max_tokens": 8000, **ENDLESS}
    with serving("--n-ctx", 8192, "--parallel", 1, "--queue", 0, "--timeout", 2) as served:
        with ThreadPoolExecutor(1) as pool:
            streamed = pool.submit(served.post, "/v1/completions", {**long, "stream": True})
            served.wait_until(is_running)
            refused = served.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
            assert error_of(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
        *chunks, last = events_of(streamed.result().text)
        assert json.loads(last)["error"]["code"] == "timeout"
        assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        assert error_of(served.post("/v1/completions", long), 504)["code"] == "timeout"
        served.wait_until(is_idle)
        too_many = served.post("/v1/completions", {"prompt": "a", "n": 2})
        assert error_of(too_many, 400)["param"] == "n"
        assert served.complete("a", max_tokens=1)


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
        (("--cors", "page.example"), "no origin"),
        (("--port", "65536"), "65535"),
    ],
)
def test_what_would_open_the_machine_is_a_usage_error(trimix, arguments, words):
    result = trimix("serve", *arguments)
    assert result.returncode == 2 and words in result.stderr.decode()


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
         "messages[0].content[0]", "text alone"),
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
            "type": "json_schema", "json_schema": {"schema": {"pattern": "^]$"}}}},
         "response_format.json_schema.schema", "do not pair"),
        ("chat/completions", {**MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
         None, "JSON schema"),
        ("completions", {}, "prompt", "expected a string"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": [1, "a"]}, "prompt", "a list of strings"),
        ("completions", {"prompt": [-1]}, "prompt", "no token"),
        ("completions", {"prompt": [10**9]}, "prompt", "no token"),
        ("completions", {"prompt": "сөз " * 5000}, "prompt", "shorten it"),
        ("completions", {**PROMPT, "suffix": "b"}, "suffix", "not supported"),
        ("completions", {**PROMPT, "best_of": 2}, "best_of", "ask for n"),
        ("completions", {**PROMPT, "max_tokens": -1}, "max_tokens", "an integer"),
        ("completions", {**PROMPT, "max_tokens": True}, "max_tokens", "an integer"),
        ("completions", {**PROMPT, "temperature": "hot"}, "temperature", "a number"),
        ("completions", {**PROMPT, "stop": [""]}, "stop", "not empty"),
        ("completions", {**PROMPT, "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ("completions", {**PROMPT, "logit_bias": {"999999": 1}}, "logit_bias", "no token"),
        ("completions", {**PROMPT, "stream_options": {}}, "stream_options", "stream: true"),
        ("completions", {**PROMPT, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("completions", {**PROMPT, "trimix": {"weights": [1]}}, "trimix.weights", "two numbers"),
        ("completions", {**PROMPT, "trimix": {"weights": [1e9, 0]}}, "trimix.weights", "1e6"),
        ("completions", {**PROMPT, "trimix": {"method": "best"}}, "trimix.method", "one of ppl"),
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
    assert error_of(httpx.get(f"{server.url}/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(httpx.get(f"{server.url}/v1/models/"), 404)
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


# -- the end --------------------------------------------------------------------------------


def stream_lines(served, lines, **body):
    body = {"prompt": KAZAKH, "stream": True, **ENDLESS, **body}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        lines += response.iter_lines()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("sent", "drain", "n", "code"),
    [(signal.SIGTERM, 60, 300, 0), (signal.SIGINT, 60, 300, 130), (signal.SIGTERM, 0, 3900, 0)],
)
def test_what_runs_has_its_time_to_end(sent, drain, n, code):
    lines = []
    with serving("--n-ctx", 4096, "--drain", drain) as served:
        thread = threading.Thread(
            target=stream_lines, args=(served, lines), kwargs={"max_tokens": n}
        )
        thread.start()
        served.wait_until(lambda m: m["trimix_generated_tokens_total"] or is_running(m))
        served.process.send_signal(sent)
        thread.join(60)
        assert served.process.wait(60) == code
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
    events = [line.removeprefix("data: ") for line in lines if line]
    if drain:
        assert events[-1] == "[DONE]"
    else:
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_a_second_ctrl_c_does_not_wait():
    lines = []
    with serving("--n-ctx", 8192, "--drain", 600) as served:
        thread = threading.Thread(
            target=stream_lines, args=(served, lines), kwargs={"max_tokens": 8000}
        )
        thread.start()
        served.wait_until(is_running)
        served.process.send_signal(signal.SIGINT)
        while served.process.poll() is None and not refuses(served.port):
            time.sleep(0.02)  # until the first signal was taken in
        served.process.send_signal(signal.SIGINT)
        thread.join(60)
        assert served.process.wait(60) == 130
    assert "shutting_down" in [line for line in lines if line][-1]


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_port_that_is_taken_is_one_line(trimix, server):
    result = trimix("serve", "--port", server.port)
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 1 and len(lines) == 1 and "--port" in lines[0]


def test_help_of_serve_loads_no_server():
    code = (
        "import sys; sys.argv = ['trimix', 'serve', '--help']\n"
        "from trimix_gguf.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'llama_cpp', 'numpy', 'uvicorn', 'starlette'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
