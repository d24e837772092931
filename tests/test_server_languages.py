"""A server of several trios, through the CLI's process: names, the choice by letters, loading."""

import json
import threading

import httpx
import psutil
import pytest
from languages import CODES, QUESTIONS, ask, options, text_of
from served import ENDLESS, error_of, events_of, serving

NAMES = [f"nano-{code}" for code in CODES]
QUESTION = QUESTIONS["kk"]


@pytest.fixture(scope="module")
def server(languages):
    with serving(*options(languages.values()), "--threads", 1) as served:
        yield served


@pytest.fixture(scope="module")
def alone(languages):
    """Code -> the greedy answer of a server with that trio only, and its memory."""
    found = {}
    for code, folder in languages.items():
        with serving("--trio", folder, "--threads", 1) as served:
            found[code] = text_of(ask(served, None, QUESTION))
    return found


def get(served, path):
    return httpx.get(served.url + path, timeout=60)


# -- which trio -------------------------------------------------------------------------------


def test_each_trio_answers_as_a_server_of_its_own_also_all_at_once(server, alone):
    assert len(set(alone.values())) == len(CODES)
    one_by_one = {code: text_of(ask(server, f"nano-{code}", QUESTION)) for code in CODES}
    assert one_by_one == alone
    together = {}

    def work(code):
        together[code] = text_of(ask(server, code, QUESTION))  # by its language

    threads = [threading.Thread(target=work, args=(code,)) for code in CODES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_answers_say_whose_they_are_on_every_route(server):
    answer = ask(server, "ug", QUESTION)
    assert answer["model"] == "nano-ug" and answer["trimix"]["trio"] == "nano-ug"
    assert ask(server, None, QUESTION)["model"] == "nano-kk"  # the first one, by default
    assert ask(server, "default", QUESTION)["model"] == "nano-kk"
    body = {"model": "nano-bo", "max_tokens": 2, **ENDLESS}
    completed = server.complete(QUESTION, **body)
    assert (completed["model"], completed["trimix"]["trio"]) == ("nano-bo", "nano-bo")
    answered = server.post("/v1/responses", {"model": "bo", "input": QUESTION}).json()
    assert (answered["model"], answered["trimix"]["trio"]) == ("nano-bo", "nano-bo")
    streamed = server.post("/v1/completions", {**body, "prompt": QUESTION, "stream": True})
    first = json.loads(events_of(streamed.text)[0])
    assert first["model"] == "nano-bo" and first["trimix"]["trio"] == "nano-bo"


def test_the_list_of_models_has_all_and_an_unknown_name_is_refused_with_them(server):
    models = get(server, "/v1/models").json()["data"]
    assert [model["id"] for model in models] == NAMES
    assert [model["trimix"]["languages"] for model in models] == [[code] for code in CODES]
    assert {model["max_model_len"] for model in models} == {512}
    told = [model["trimix"]["description"] for model in models]
    assert told == [None, "Үштік: ug", "Үштік: bo"]
    assert get(server, "/v1/models/nano-ug").json() == models[1]
    assert get(server, "/v1/models/bo").json()["id"] == "nano-bo"
    for response in (
        get(server, "/v1/models/gpt-4"),
        server.post("/v1/completions", {"model": "gpt-4", "prompt": "a"}),
        server.post("/v1/responses", {"model": "gpt-4", "input": "a"}),
        server.post("/tokenize", {"model": "gpt-4", "content": "a"}),
    ):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert all(name in error["message"] for name in NAMES)


def test_auto_goes_by_the_letters_of_the_question_and_only_auto(server):
    for code, question in QUESTIONS.items():
        answer = ask(server, "auto", question, max_tokens=1)
        assert answer["model"] == answer["trimix"]["trio"] == f"nano-{code}"
        assert ask(server, None, question, max_tokens=1)["model"] == "nano-kk"
    said = [
        {"role": "user", "content": QUESTIONS["bo"]},
        {"role": "assistant", "content": QUESTIONS["bo"]},
        {"role": "user", "content": QUESTIONS["ug"]},
    ]
    assert ask(server, "auto", "", max_tokens=1, messages=said)["model"] == "nano-ug"
    body = {"model": "auto", "max_tokens": 1, "prompt": QUESTIONS["bo"]}
    assert server.post("/v1/completions", body).json()["model"] == "nano-bo"
    assert server.post("/tokenize", {"model": "auto", "content": "a"}).status_code == 200


def test_one_trio_answers_to_any_name_as_before(languages):
    with serving("--trio", languages["ug"]) as served:
        answer = ask(served, "auto", QUESTIONS["bo"], max_tokens=1)
        assert answer["model"] == "nano-ug" and "trio" not in answer["trimix"]
        response = served.post("/v1/completions", {"model": "kk", "prompt": "a", "max_tokens": 1})
        assert response.status_code == 200 and response.headers["X-Trimix-Ignored"] == "model"
        (model,) = get(served, "/v1/models").json()["data"]
        assert model["trimix"].keys() == {"description", "weights", "tuning"}


# -- what it costs, and what it counts ----------------------------------------------------------


def test_weights_are_in_memory_once(languages, nano_files):
    """A trio more adds its caches: about as much as nano's weights, which would come on top."""

    def resident(codes):
        """Bytes of a new server that has answered once from each."""
        with serving(*options(languages[code] for code in codes), "--threads", 1) as served:
            for code in codes:
                ask(served, code if len(codes) > 1 else None, QUESTION)
            return psutil.Process(served.process.pid).memory_info().rss

    weights = sum(nano_files[role].stat().st_size for role in ("large_ins", "small_base"))
    assert resident(CODES) - resident(CODES[:1]) < 3 * weights  # 4 and more if each had its own


def test_metrics_and_health_add_up_over_the_trios(server):
    before = server.metrics()
    for name in NAMES:
        ask(server, name, QUESTION, max_tokens=5)
    after = server.metrics()
    assert after["trimix_generated_tokens_total"] - before["trimix_generated_tokens_total"] == 15
    finished = 'trimix_requests_finished_total{reason="length"}'
    assert after[finished] - before.get(finished, 0) == 3
    assert after["trimix_requests_running"] == 0 and server.health() == "ok"


# -- trios that share nothing ---------------------------------------------------------------------


def test_trios_that_share_nothing_are_loaded_when_asked_for_and_dropped_for_others(
    languages, strangers
):
    folders = [languages["kk"], languages["ug"], *strangers.values()]
    expected = {}
    for name, folder in strangers.items():
        with serving("--trio", folder, "--threads", 1) as served:
            expected[name] = text_of(ask(served, None, QUESTION))
    with serving(*options(folders), "--max-loaded", 1, "--threads", 1) as served:
        expected["kk"] = text_of(ask(served, "kk", QUESTION))
        assert [m["id"] for m in get(served, "/v1/models").json()["data"]] == [
            "nano-kk", "nano-ug", "one", "two",
        ]  # fmt: skip
        n_tokens = served.metrics()["trimix_generated_tokens_total"]
        for _ in range(2):
            for name, text in expected.items():
                assert text_of(ask(served, name, QUESTION)) == text, name
        assert served.metrics()["trimix_generated_tokens_total"] == n_tokens + 6 * 24


def test_requests_for_more_trios_than_may_be_loaded_are_all_answered(languages, strangers):
    folders = [languages["kk"], *strangers.values()]
    names = ["nano-kk", "one", "two"] * 3
    answers = {}
    with serving(*options(folders), "--max-loaded", 1, "--threads", 1) as served:

        def work(i):
            answers[i] = ask(served, names[i], QUESTION, max_tokens=8)["model"]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == dict(enumerate(names))


def test_options_of_several_trios_are_checked(trimix, languages):
    some = options(languages.values())
    for wrong, words in {
        ("--name", "x"): b"--name is for one trio",
        ("--large-ins", "x"): b"not both",
        tuple(options([languages["kk"]])): b"two trios are called nano-kk",
    }.items():
        done = trimix("serve", *some, *wrong, "--port", 0)
        assert done.returncode == 2 and words in done.stderr, done.stderr
