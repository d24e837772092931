"""`trimix run`, by its command: the answers of a file, their order, and what a kill leaves."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import KAZAKH
from served import ENDLESS, TEXTS, serving
from test_cli import one_line_error

from trimix_gguf import Weights, generate

FIXED = {"temperature": 0, "max_tokens": 8, "trimix": {"weights": [0.1, 0.9]}, **ENDLESS}
SMALL = ("--threads", "2", "--parallel", "2")  # groups of eight answers


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, where the commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, lines):
    """JSON lines; a text is written as it is."""
    texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def answers_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_of(answer):
    return answer["response"]["choices"][0]["text"]


def many(n, **fields):
    """`n` requests, some with a prefix in common, so that their order in the file is not sorted."""
    made = random.Random(3)
    return [
        {"id": f"q{i}", "prompt": f"{made.choice(TEXTS)} {made.choice(TEXTS)}", **FIXED, **fields}
        for i in range(n)
    ]


def mixed(n):
    """Requests whose answers show each rounding, in chosen weights, log-probabilities and draws."""
    kinds = [
        {"max_tokens": 24, "logprobs": 2, "temperature": 0, "trimix": {"method": "ppl"}},
        {"max_tokens": 9, "temperature": 1.0, "trimix": {"trace": True}, "n": 2},
        {"max_tokens": 16, "temperature": 0, "logprobs": 1, "echo": True},
        {"max_tokens": 40, "temperature": 0.7, "seed": 5, "trimix": {"weights": [0.5, 0.5]}},
    ]
    return [{**line, "trimix": {}, **kinds[i % 4], **ENDLESS} for i, line in enumerate(many(n))]


def one_line_error_after_bars(result):
    """The error of a run that showed how far it was before."""
    assert result.returncode == 1 and result.stdout == b"" and b"Traceback" not in result.stderr
    (line,) = [x for x in result.stderr.decode().splitlines() if x.startswith("trimix: ")]
    return line


# -- answers --------------------------------------------------------------------------------


def test_answers_have_the_order_and_the_ids_of_the_lines(trimix, place):
    lines = [*many(9), {"prompt": "The prince", **FIXED}, "", {**many(1)[0], "id": 7}]
    write(place / "in.jsonl", lines)
    done = trimix("run", "in.jsonl", "-o", "out.jsonl", *SMALL)
    assert done.returncode == 0 and done.stdout == b"", done.stderr.decode()
    found = answers_of(place / "out.jsonl")
    assert [a["id"] for a in found] == [*(f"q{i}" for i in range(9)), 10, 7]
    assert all(a["response"]["usage"]["completion_tokens"] == 8 for a in found)
    assert len({a["response"]["id"] for a in found}) == len(found)
    assert text_of(found[0]) == text_of(found[-1])  # the same request
    assert "Answering: 11/11" in done.stderr.decode()
    assert sorted(p.name for p in place.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_an_answer_is_what_generate_and_the_server_say(trimix, place, trio):
    prompts = [{"id": i, "prompt": text, **FIXED} for i, text in enumerate(TEXTS)]
    asks_by_chat = {"messages": [{"role": "user", "content": KAZAKH}], **FIXED}
    write(place / "in.jsonl", [*prompts, {"id": "chat", **asks_by_chat}])
    # One at a time, as the others answer them: beside others a near tie may fall the other way.
    done = trimix("run", "in.jsonl", "-o", "out.jsonl", "--threads", "2", "--parallel", "1")
    assert done.returncode == 0, done.stderr.decode()
    *found, chat = answers_of(place / "out.jsonl")
    options = {"temperature": 0, "max_tokens": 8, "logit_bias": {0: -100.0}, "speculative": "off"}
    said = [generate(trio, t, weights=Weights(0.1, 0.9), **options).text for t in TEXTS]
    assert [text_of(a) for a in found] == said
    with serving("--threads", "2") as served:
        completions = [served.complete(text, **FIXED) for text in TEXTS]
        by_chat = served.post("/v1/chat/completions", asks_by_chat).json()
    for answer, body in zip([*found, chat], [*completions, by_chat], strict=True):
        ours = answer["response"]
        assert set(body) == set(ours) and body["trimix"] == ours["trimix"]
        assert body["choices"] == ours["choices"] and body["model"] == ours["model"]


def test_a_schema_holds_and_a_scoring_request_only_scores(trimix, place):
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"enum": ["иә", "жоқ"]}},
    }
    known = "Әкем кеше үйге кеш келді."  # such sentences small_cpt knows better
    scoring = {"prompt": known, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    write(
        place / "in.jsonl",
        [
            {"prompt": KAZAKH, "response_format": schema, "max_tokens": 20},
            {**scoring, "trimix": {"weights": [1, 0]}},
            {**scoring, "trimix": {"weights": [0, 1]}},
            {**FIXED, "prompt": KAZAKH, "trimix": {"weights": [0.1, 0.9], "trace": True}},
        ],
    )
    done = trimix("run", "in.jsonl", "-o", "out.jsonl", *SMALL)
    assert done.returncode == 0, done.stderr.decode()
    held, large, small, traced = answers_of(place / "out.jsonl")
    assert json.loads(text_of(held)) in ("иә", "жоқ")
    assert text_of(large) == known and large["response"]["usage"]["completion_tokens"] == 0
    nll = [
        -sum(a["response"]["choices"][0]["logprobs"]["token_logprobs"][1:]) for a in (large, small)
    ]
    assert nll[1] < nll[0]
    tokens = traced["response"]["trimix"]["tokens"]
    assert (
        len(tokens) == 8
        and {"large_ins", "small_cpt", "fused"} == tokens[0]["probabilities"].keys()
    )


def test_lines_of_openais_batches_get_their_answers(trimix, place):
    def batch(name, path, **body):
        body = {"model": "gpt-4o", "temperature": 0, "max_tokens": 4, **body}
        return {"custom_id": name, "method": "POST", "url": f"/v1/{path}", "body": body}

    asked = {"messages": [{"role": "user", "content": "Сәлем"}]}
    write(
        place / "in.jsonl",
        [
            batch("a", "completions", prompt=KAZAKH),
            batch("b", "chat/completions", **asked),
            batch("c", "completions", prompt=KAZAKH, wrong=1),
            {**batch("d", "completions", prompt=KAZAKH), "url": "/v1/embeddings"},
        ],
    )
    done = trimix("run", "in.jsonl", "-o", "o", "--name", "gpt-4o", "--skip-bad", *SMALL)
    assert done.returncode == 0 and "2 of 4 lines were wrong" in done.stderr.decode()
    *good, wrong, elsewhere = answers_of(place / "o")
    for line, name in zip(good, ("a", "b"), strict=True):
        assert line.keys() == {"id", "custom_id", "response", "error"} and line["error"] is None
        assert line["custom_id"] == name and line["response"]["status_code"] == 200
        assert line["response"]["body"]["model"] == "gpt-4o"
    assert good[1]["response"]["body"]["object"] == "chat.completion"
    assert wrong["response"] is None and "'wrong'" in wrong["error"]["message"].replace('"', "'")
    assert elsewhere["custom_id"] == "d" and "/v1/completions" in elsewhere["error"]["message"]


def test_a_request_without_a_seed_gets_one_from_the_run_and_its_id(trimix, place):
    drawn = {"prompt": KAZAKH, "max_tokens": 12, **ENDLESS}
    write(place / "in.jsonl", [{**drawn, "id": "a"}, {**drawn, "id": "b"}])
    for out, seed in (("one", "0"), ("two", "0"), ("other", "1")):
        assert trimix("run", "in.jsonl", "-o", out, "--seed", seed, *SMALL).returncode == 0
    one, two, other = (answers_of(place / name) for name in ("one", "two", "other"))
    assert (
        one == two and text_of(one[0]) != text_of(one[1]) and text_of(one[0]) != text_of(other[0])
    )


# -- streams and packed files ---------------------------------------------------------------


def test_pipes_and_packed_files_hold_the_same_answers(trimix, place):
    zstandard = pytest.importorskip("zstandard")
    raw = write(place / "in.jsonl", mixed(10)).read_bytes()
    (place / "in.jsonl.gz").write_bytes(gzip.compress(raw))
    (place / "in.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    piped = trimix("run", "-", "-o", "-", *SMALL, stdin=raw)
    assert piped.returncode == 0, piped.stderr.decode()
    assert [json.loads(line)["id"] for line in piped.stdout.splitlines()] == [
        f"q{i}" for i in range(10)
    ]
    for source, out in (("in.jsonl.gz", "out.jsonl.zst"), ("in.jsonl.zst", "out.jsonl.gz")):
        assert trimix("run", source, "-o", out, *SMALL).returncode == 0
    unpacked = (
        zstandard.ZstdDecompressor()
        .decompressobj()
        .decompress((place / "out.jsonl.zst").read_bytes())
    )
    assert unpacked == gzip.decompress((place / "out.jsonl.gz").read_bytes()) == piped.stdout


# -- a kill ---------------------------------------------------------------------------------


def whole_groups(journal):
    return journal.read_bytes().count(b"\n\n") - 1 if journal.exists() else -1  # the header's


def killed(command, journal, n_groups, delay):
    """Start a run, and kill it a moment after it has answered so many groups."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trimix_gguf.cli", *command], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while whole_groups(journal) < n_groups and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(trimix, place):
    write(place / "in.jsonl", mixed(40))
    whole = trimix("run", "in.jsonl", "-o", "whole", *SMALL)
    assert whole.returncode == 0, whole.stderr.decode()
    n_choices = [len(a["response"]["choices"]) for a in answers_of(place / "whole")]
    assert n_choices == [1, 2, 1, 1] * 10
    command, journal = ("run", "in.jsonl", "-o", "out", *SMALL), place / "out.part"
    moment = random.Random(os.urandom(8))
    for n_groups in (0, 1, 3):
        killed(command, journal, n_groups, moment.uniform(0, 0.2))
        assert not (place / "out").exists()
        with journal.open("ab") as file:  # what a kill within a write leaves
            file.write(b"".join(b'%d {"id": "half"}\n' % i for i in range(1, 41)) + b'41 {"id"')
    kept = whole_groups(journal)
    done = trimix(*command)
    assert done.returncode == 0 and kept >= 3, done.stderr.decode()
    assert (place / "out").read_bytes() == (place / "whole").read_bytes()
    assert f"Answering: 0/{40}" not in done.stderr.decode()  # it did not begin again
    assert sorted(p.name for p in place.iterdir()) == ["in.jsonl", "out", "whole"]


def test_a_run_of_other_prompts_or_settings_is_refused_by_what_differs(trimix, place):
    command = ("run", "in.jsonl", "-o", "out", *SMALL)
    write(place / "in.jsonl", many(30, max_tokens=40))
    killed(command, place / "out.part", 1, 0)
    said = one_line_error_after_bars(trimix(*command, "--seed", "4"))
    assert "other --seed;" in said and "--force" in said
    write(place / "in.jsonl", many(6))
    assert "other prompts, --name;" in one_line_error_after_bars(trimix(*command, "--name", "x"))
    begun = trimix(*command, "--force")
    assert begun.returncode == 0 and len(answers_of(place / "out")) == 6
    assert "out exists; choose another name, or --force" in one_line_error(trimix(*command))
    assert sorted(p.name for p in place.iterdir()) == ["in.jsonl", "out"]
    assert "holds the prompts" in one_line_error(trimix("run", "in.jsonl", "-o", "in.jsonl"))


# -- shards ---------------------------------------------------------------------------------


def test_the_shards_in_their_order_are_the_whole(trimix, place):
    write(place / "in.jsonl", many(11)[:-1] + [{**FIXED, "prompt": "Абай"}])
    assert trimix("run", "in.jsonl", "-o", "whole", *SMALL).returncode == 0
    parts = b""
    for i in (1, 2, 3):
        assert trimix("run", "in.jsonl", "-o", f"p{i}", "--shard", f"{i}/3", *SMALL).returncode == 0
        parts += (place / f"p{i}").read_bytes()
    ids = Counter(json.loads(line)["id"] for line in parts.splitlines())
    assert ids == Counter([*(f"q{i}" for i in range(10)), 11])
    assert parts == (place / "whole").read_bytes()
    assert trimix("run", "in.jsonl", "-o", "p", "--shard", "4/3").returncode == 2
