"""A thousand malformed requests from a seeded generator: each is refused, and the server lives."""

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import KAZAKH
from served import ENDLESS, PATIENCE_S, serving

N_REQUESTS = 1000
N_SLOW = 8
READ_TIMEOUT_S = 1.0
BODY_LIMIT = 20_000
COMPLETION = {"prompt": KAZAKH, "max_tokens": 2, "temperature": 0.5, "stop": ["."], "n": 1}
CHAT = {"messages": [{"role": "user", "content": KAZAKH}], "max_tokens": 2, "top_p": 0.9}
GOOD = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
# Of no field the right type and range, but of those that may be anything or null.
WRONG = [
    -2.5, 1e300, 2**70, "warm", "", "\u0000", [], [[]], [None], [1.5], {}, {"a": 1}, [{"a": []}],
]  # fmt: skip
FITTING = {
    "prompt": ("warm", "\u0000"), "stop": ("warm", "", "\u0000", []), "logit_bias": ({},),
    "messages": (), "model": ("",), "trimix": ({},), "stream_options": (),
}  # fmt: skip
FIELDS = (
    "max_tokens", "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty",
    "logit_bias", "stop", "stream", "response_format", "trimix", "model", "stream_options",
)  # fmt: skip
SCHEMAS = [
    {"type": "nonsense"}, {"pattern": "^{$"}, {"pattern": "a++"}, {"$ref": "#/nowhere"},
    {"$ref": "https://evil.test/schema"}, {"type": "string", "maxLength": 10**30}, [], "object",
    {"type": "array", "items": {}, "minItems": -1}, {"properties": 3}, {"enum": 5},
    {"anyOf": [{"pattern": "^(?=a)$"}]}, {"type": "string", "pattern": "^*$"},
]  # fmt: skip


def wrong_type(rng, path, body):
    names = [*FIELDS, *body] + (["logprobs", "echo"] if "prompt" in body else ["top_logprobs"])
    name = rng.choice(names)
    value = rng.choice([v for v in WRONG if v not in FITTING.get(name, ())])
    return request(path, {**body, name: value})


def unknown_field(rng, path, body):
    name = "".join(rng.choices("abcxyzқәі_", k=rng.randint(3, 12)))
    place = rng.choice([(), ("trimix",)])
    body = {**body, "trimix": {name: 1}} if place else {**body, name: rng.choice(WRONG)}
    return request(path, body)


def truncated(rng, path, body):
    raw = json.dumps(body, ensure_ascii=False).encode()
    return request(path, raw[: rng.randrange(len(raw))])


def bad_utf8(rng, path, body):
    raw = bytearray(json.dumps(body, ensure_ascii=False).encode())
    at = rng.randrange(len(raw) + 1)
    raw[at:at] = rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80"])
    return request(path, bytes(raw))


def not_json(rng, path, body):
    text = json.dumps(body)
    return request(path, rng.choice([
        b"", b"null", b"[]", b'"text"', b"7", b"{]", b"{'a': 1}", b"\xef\xbb\xbf" + text.encode(),
        text.encode("utf-16"), text.replace("0.", "0.0.").encode() + b"}",
        f'{{"metadata": {rng.choice(["NaN", "-Infinity", "1e999", "1" * 5000])}, '.encode()
        + text[1:].encode(), b'{"prompt": "\\ud800"}', text.encode() * 2,
    ]))  # fmt: skip


def nested(rng, path, body):
    depth = rng.choice([70, 900, 9_000])
    inner = rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
    return request(path, b'{"prompt": ' + inner[: BODY_LIMIT - 100] + b"}")


def huge(rng, path, body):
    raw = json.dumps({**body, "user": "x" * rng.randint(BODY_LIMIT, 40 * BODY_LIMIT)}).encode()
    path = rng.choice([path, path, "/v1/nowhere"])
    extra = rng.choice([None, None, "Host: evil.test", "Content-Encoding: br"])
    if rng.random() < 0.5:
        return request(path, raw, extra=extra)
    size = rng.choice([1000, 60_000])
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    chunks = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)
    return request(path, chunks + b"0\r\n\r\n", length="Transfer-Encoding: chunked", extra=extra)


def too_much(rng, path, body):
    if "prompt" not in body:
        return request(path, {**body, "messages": body["messages"] * 60})
    return request(path, {**body, **rng.choice([
        {"prompt": "сөз " * 1500}, {"prompt": [5] * 5000}, {"prompt": ["a"] * 60}, {"n": 90},
        {"prompt": [10**6]}, {"logprobs": 21}, {"best_of": 2}, {"suffix": "x"}, {"prompt": [-3, 4]},
    ])})  # fmt: skip


def bad_schema(rng, path, body):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": rng.choice(SCHEMAS)}}
    return request(path, {**body, "response_format": form})


def wrong_route(rng, path, body):
    method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "BREW"])
    other = rng.choice(["/v1", "/v1/embeddings", "/v1/completions//", "//", "/%00", "/..%2f/etc"])
    path, method = rng.choice(
        [(path, method), (other, "POST"), (f"/v1/models/{rng.random()}", "GET")]
    )
    return request(path, body, method=method)


def wrong_headers(rng, path, body):
    line = rng.choice([
        "Host: evil.test", "Origin: http://evil.test", "Content-Encoding: br",
        "Content-Length: 7\r\nContent-Length: 8", "Content-Length: -5", "Content-Length: ten",
        "No colon", "Transfer-Encoding: gzip", f"X: {'y' * 500_000}", "Host: a\r\nHost: b",
        "Content-Encoding: gzip",
    ])  # fmt: skip
    return request(path, body, extra=line)


def not_http(rng, path, body):
    return rng.choice([
        b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" * 40, b"GET /\r\n\r\n", b"G" * 200_000,
        b"\x00" * 300 + b"\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n",
        request(path, b"zz\r\n{}\r\n0\r\n\r\n", length="Transfer-Encoding: chunked"),
    ])  # fmt: skip


KINDS = [
    wrong_type, wrong_type, wrong_type, unknown_field, truncated, bad_utf8, not_json, nested, huge,
    too_much, bad_schema, wrong_route, wrong_headers, not_http,
]  # fmt: skip


def request(path, body, *, method="POST", length=None, extra=None):
    """The bytes of a request; `extra` stands instead of the header of its name."""
    raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    lines = ["Host: localhost", "Content-Type: application/json", "Connection: close"]
    lines.append(length or f"Content-Length: {len(raw)}")
    if extra is not None:
        lines = [line for line in lines if line.split(":")[0] != extra.split(":")[0]] + [extra]
    return (
        f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n" + raw
    )


def exchange(port, parts, *, pause_s=0.0):
    """Send parts one by one; everything that comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer


def check_refusal(answer, sent):
    """A 4xx with OpenAI's error object, and no more; its status."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    assert 400 <= status < 500, (sent[:300], answer[:300])
    assert b"content-type: application/json" in head.lower(), (sent[:300], answer[:300])
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    assert len(error["message"]) < 1000
    return status


@pytest.fixture(scope="module")
def server():
    limits = ("--body-limit", BODY_LIMIT, "--read-timeout", PATIENCE_S, "--strict")
    with serving("--n-ctx", 1024, *limits) as served:
        yield served


@pytest.fixture(scope="module")
def impatient():
    """Waits a second for a request; a busy machine may be too slow for that too."""
    with serving("--n-ctx", 1024, "--read-timeout", READ_TIMEOUT_S) as served:
        yield served


def test_a_thousand_malformed_requests(server):
    rng = random.Random(20260418)
    before = server.complete(KAZAKH, max_tokens=8, **ENDLESS)["choices"][0]["text"]
    statuses = {}
    for i in range(N_REQUESTS):
        kind = KINDS[i % len(KINDS)]
        sent = kind(rng, *rng.choice(list(GOOD.items())))
        status = check_refusal(exchange(server.port, [sent]), sent)
        statuses.setdefault(kind.__name__, set()).add(status)
    assert statuses["truncated"] == statuses["bad_utf8"] == statuses["nested"] == {400}
    assert statuses["wrong_type"] <= {400, 404}  # a model that is not here
    assert statuses["unknown_field"] == statuses["too_much"] == statuses["bad_schema"] == {400}
    assert statuses["huge"] == {403, 404, 413, 415} and statuses["wrong_route"] == {404, 405}
    assert statuses["wrong_headers"] == {400, 403, 415, 431} and statuses["not_http"] == {400, 431}
    assert server.complete(KAZAKH, max_tokens=8, **ENDLESS)["choices"][0]["text"] == before
    metrics = server.metrics()
    assert metrics["trimix_requests_running"] == metrics["trimix_requests_waiting"] == 0


def test_slow_senders_are_not_waited_for_and_hold_nobody_up(impatient):
    server = impatient
    rng = random.Random(7)
    whole = request("/v1/completions", COMPLETION)
    head_end = whole.index(b"\r\n\r\n")

    def send_slowly(i):
        cut = rng.randrange(5, head_end) if i % 2 else rng.randrange(head_end + 5, len(whole))
        return exchange(server.port, [whole[:cut]])

    with ThreadPoolExecutor(N_SLOW) as pool:
        slow = [pool.submit(send_slowly, i) for i in range(N_SLOW)]
        while server.post("/v1/completions", {"prompt": "а", "max_tokens": 2}).status_code == 408:
            pass
        for answer in slow:
            assert check_refusal(answer.result(), whole) == 408
    assert server.health() == "ok"


def test_who_never_asks_is_hung_up_on(impatient):
    assert exchange(impatient.port, []) == b""


def test_a_body_that_comes_in_pieces_is_whole(server):
    sent = request("/v1/completions", COMPLETION)
    parts = [sent[i : i + 40] for i in range(0, len(sent), 40)]
    assert exchange(server.port, parts, pause_s=0.01).startswith(b"HTTP/1.1 200 ")
