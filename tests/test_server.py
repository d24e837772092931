"""The HTTP interface, driven through the CLI's process by the clients that people have."""

import json
import math
import re
import shutil
import subprocess

import httpx
import openai
import pytest
from conftest import KAZAKH
from served import ENDLESS, TEXTS, error_of, events_of, serving

from trimix_gguf import Weights, score
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

CHAT = [{"role": "system", "content": "Қысқа жауап бер."}, {"role": "user", "content": KAZAKH}]


@pytest.fixture(scope="module")
def server():
    with serving("--n-ctx", 4096, "--parallel", 8) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


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
        client.models.retrieve("gpt-4")
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
    chosen = {"alpha": lowest[1], "beta": lowest[2], "method": "auto"}
    assert mix["weights"] == {**chosen, "reason": "a text that goes on; lowest perplexity"}
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


def chat_of(*messages):
    return {"messages": list(messages), "max_tokens": 4}


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PART = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    "body",
    [
        {**chat_of(ASK), "stop": ""},
        {**chat_of(ASK), "seed": -1},
        {**chat_of(ASK), "top_k": 40, "min_p": 0.1, "repeat_penalty": 1.1},
        {**chat_of(ASK), "top_k": -1},
        {**chat_of(ASK), "chat_template_kwargs": {"enable_thinking": False}},
        {**chat_of(ASK, ANSWER, ASK), "max_tokens": -1, "stop": [" ", "а", "е", "і", "ы", "\n"]},
        chat_of({"role": "user", "content": [PART]}),
        chat_of(ASK, {**ANSWER, "content": None}, ASK),
        chat_of(ASK, {**ANSWER, "reasoning_content": "c"}, ASK),
    ],
    ids=lambda body: str(sorted(body))[:50],
)
def test_what_clients_send_is_taken(server, body):
    """Bug: usual fields were refused."""
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text


def test_fields_that_clients_send_mean_what_they_say(server):
    def text(**fields):
        body = {"prompt": TEXTS[0], "max_tokens": 16, **ENDLESS, **fields}
        return server.post("/v1/completions", body).json()["choices"][0]["text"]

    assert text(top_k=1, seed=1) == text(top_k=1, seed=2) == text(temperature=0)
    assert text(top_k=1, seed=1) != text(top_k=-1, seed=1)
    assert len({text(seed=-1) for _ in range(4)}) > 1


def test_variables_reach_the_template(nano_files, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ hint }}"
    models = {role: ModelEntry(str(path)) for role, path in nano_files.items()}
    TrioFile(tmp_path, "hinted", models, chat_template=template).write()
    with serving("--trio", tmp_path) as served:

        def n_prompt(**fields):
            reply = served.post("/v1/chat/completions", {**chat_of(ASK), **fields}).json()
            return reply["usage"]["prompt_tokens"]

        assert n_prompt(chat_template_kwargs={"hint": "бір екі үш"}) > n_prompt() + 2


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
        assert model["id"] == "kazakh-test" and model["trimix"]["weights"] == [0.2, 0.7]
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
