"""The page of `trimix serve` in a real browser: long chats, two columns, a server that is away."""

import http.server
import os
import signal
import threading

import httpx
import pytest
from languages import options
from served import ENDLESS, serving
from visitor import ENTER, GREEDY, KAZAKH, LONG, ask, ended, last_exchange, show, shown, traced


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


def exchanges(window):
    """The bodies of the questions since the last call, in order."""
    sent = [body for url, body, _ in window.requests() if url.endswith("/v1/chat/completions")]
    return window.run("return arguments[0].map((body) => JSON.parse(body))", sent)


# -- what the context holds -----------------------------------------------------------------


def test_the_oldest_turns_are_left_out_before_the_context_is_full(window, server):
    show(window, server.url)
    window.requests()
    n = 0
    while not window.run("return turns.at(-1)?.leftOut > 0"):
        n += 1
        assert n < 30
        answer = ask(window, f"{n}. {KAZAKH}", n)
        assert "failure" not in answer["end"], answer
    *before, last = exchanges(window)
    assert len(before) == n - 1  # the server refused none
    left_out = window.run("return turns.at(-1).leftOut")
    said = [m["content"] for m in last["messages"] if m["role"] == "user"]
    assert said == [f"{i}. {KAZAKH}" for i in range(left_out + 1, n + 1)]
    # Half of the context is free again, as in `trimix chat`.
    used, n_ctx = window.run("return [turns.at(-1).answer.usage.prompt, models[0].max_model_len]")
    before = window.run("return turns.at(-2).answer.usage.prompt")
    assert used < n_ctx * 0.6 and n_ctx / 2 < before < n_ctx
    told = window.run("return say('leftOut', { n: arguments[0] })", left_out)
    notes = "return [...document.querySelectorAll('.left-out')].map((p) => p.textContent)"
    assert window.run(notes) == [""] * (n - 1) + [told]
    ask(window, "Алматы", n + 1)  # what was left out stays so, and it is said once
    assert window.run("return turns.at(-1).leftOut") == left_out
    assert window.run(notes) == [""] * (n - 1) + [told, ""]
    assert all(shown(window, "question", i + 1) == f"{i + 1}. {KAZAKH}" for i in range(n))


def test_turns_whose_size_is_not_known_are_left_out_when_the_server_refuses(window, server):
    show(window, server.url, turns=[traced(KAZAKH * 20, 9) for _ in range(6)])
    window.requests()
    answer = ask(window, KAZAKH, 7)
    assert "failure" not in answer["end"]
    tries = [len(sent["messages"]) for sent in exchanges(window)]
    assert tries[0] == 13 and len(tries) > 1 and sorted(tries, reverse=True) == tries
    assert window.run("return turns[6].leftOut") == (13 - tries[-1]) // 2 > 0
    show(window, server.url, turns=[traced(KAZAKH, 9)])
    assert ask(window, KAZAKH * 60, 2)["end"]["failure"] == "context"
    assert window.text("[role=alert]") == window.run("return say('tooLong')")
    window.log("browser")  # Chromium itself notes what was refused


# -- an answer that repeated itself ---------------------------------------------------------


def test_the_page_says_that_the_large_model_went_on_by_itself(window, looping_folder):
    with serving("--trio", looping_folder, "--threads", 1) as served:
        show(window, served.url, maxTokens=160)
        answer = ask(window, "Қазақстан Республикасының Үкіметі бүгін жаңа заң жобасын қарады.")
        assert answer["mix"]["guard"] > 0
        window.run("turns[0].view.why.open = true")
        window.wait("return turns[0].view.why.querySelector('table')")
        told = "return [...turns[0].view.why.querySelectorAll('p')].map((p) => p.textContent)"
        assert window.run("return say('guarded')") in window.run(told)
        # The tuning counts for choices only, or for free answers too: the page says which.
        said = window.run("return document.getElementById('tuned').textContent")
        assert said.endswith("Free answers: small_cpt is better")


# -- only the large model beside the mix ----------------------------------------------------


def test_only_the_large_model_answers_beside_the_mix(window, server):
    show(window, server.url)
    window.click("#beside")
    window.requests()
    ask(window, KAZAKH)
    mix, large = exchanges(window)
    assert (
        large["trimix"] == {"trace": True, "method": "large_ins"} and "method" not in mix["trimix"]
    )
    assert {**mix, "trimix": 0} == {**large, "trimix": 0}
    weights = window.run("return parts(turns[0]).map((p) => p.answer.mix.weights)")
    assert weights[1] == {"alpha": 1, "beta": 0, "method": "fixed"} != weights[0]
    texts = window.run("return parts(turns[0]).map((p) => p.answer.text)")
    assert [shown(window, "answer", 1), shown(window, "answer", 2)] == texts
    places = (
        "return [...document.querySelectorAll('.answer')].map((e) => e.getBoundingClientRect())"
    )
    one, other = window.run(places)
    assert one["right"] <= other["left"] and abs(one["top"] - other["top"]) < 1
    window.resize(599, 800)
    one, other = window.run(places)
    assert one["bottom"] <= other["top"] and one["left"] == other["left"]
    window.open(server.url)  # the switch and both answers are kept
    assert window.run("return parts(turns[0]).map((p) => p.answer.text)") == texts
    window.resize(1280, 800)
    window.run("turns[0].beside.view.why.open = true")
    window.wait("return turns[0].beside.view.why.querySelector('table')")
    ask(window, "Алматы", n=2)
    sent = exchanges(window)
    said = [[m["content"] for m in body["messages"]] for body in sent[-2:]]
    assert said == [[KAZAKH, texts[0], "Алматы"]] * 2  # both read what the mix said
    window.click("#beside")
    ask(window, "Алматы", n=3)
    assert window.run("return parts(turns[2]).length") == 1


def test_stop_ends_both_answers(window, endless_folder):
    with serving("--trio", endless_folder, "--n-ctx", 4096) as served:
        show(window, served.url, beside=True, maxTokens=3000, **LONG)
        window.type("#question", KAZAKH + ENTER)
        window.wait("return turns[0].answer.text")
        window.click("#stop")
        ended(window)
    assert window.run("return parts(turns[0]).map((p) => p.answer.end.name)") == ["stopped"] * 2


# -- a page without questions ---------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "kk", "bo"])
def test_an_example_is_written_into_the_field_in_the_language_of_the_page(window, server, language):
    show(window, server.url, language=language)
    examples = window.run("return TEXTS[arguments[0]].examples", language)
    assert len(examples) == 3
    window.click("#examples li:nth-child(2) button")
    assert window.run("return $('question').value") == examples[1]
    assert window.run("return [document.activeElement.id, turns.length]") == ["question", 0]


def test_examples_are_in_the_language_of_the_trio(window, languages):
    with serving(*options(languages.values())) as served:
        show(window, served.url, language="en")
        window.wait("return !$('trios').hidden")
        first = "return [$('examples').textContent, $('examples').querySelector('button').lang]"
        for code in ("auto", "nano-ug", "nano-kk", "auto"):
            window.run(
                "$('trio').value = arguments[0]; $('trio').dispatchEvent(new Event('change'))", code
            )
            language = {"nano-ug": "ug", "nano-kk": "kk"}.get(code, "en")
            words = window.run("return TEXTS[arguments[0]].examples.join('')", language)
            assert window.run(first) == [words, language]


# -- a server that is away, or busy ---------------------------------------------------------


def test_what_is_written_outlives_the_page(window, server):
    show(window, server.url)
    window.type("#question", "Сәлем, әлем")
    window.open(server.url)
    assert window.run("return $('question').value") == "Сәлем, әлем"
    ask(window, KAZAKH)
    window.open(server.url)
    assert window.run("return $('question').value") == ""


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_a_server_that_goes_away_is_looked_for_and_said_to_be_back(window):
    with serving() as served:
        show(window, served.url)
        ask(window, KAZAKH)
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait()
    assert ask(window, "Алматы", n=2)["end"]["failure"] == "gone"
    words = "return $('server').hidden ? null : $('server').textContent"
    assert window.run(words) == window.run("return say('away')")
    window.run("setLanguage('ug')")
    assert window.run(words) == window.run("return TEXTS.ug.away")
    window.run("setLanguage('en')")
    window.type("#question", "Астана" + ENTER)
    window.wait("return $('status').textContent === say('away')")
    assert window.run("return [$('question').value, turns.length]") == ["Астана", 2]
    # So does an edited question; the later ones, which it would end, stay as well.
    window.run("editQuestion(turns[0])")
    window.type(".edit textarea", "Шымкент" + ENTER)
    window.run("return new Promise((next) => setTimeout(next, 500))")
    assert window.run("return turns.map((t) => t.question)") == [KAZAKH, "Алматы"]
    assert "Шымкент" in window.run("return document.querySelector('.edit textarea').value")
    window.open("about:blank")  # the page is left, and opened again: nothing is lost
    with serving("--port", served.port) as served:
        window.open(served.url)
        assert window.run("return [$('question').value, turns.length]") == ["Астана", 2]
        assert window.text("[role=alert]") == window.run("return say('gone')")
        window.run("notice('gone')")
        window.wait("return $('server').textContent === say('back')", seconds=60)
        assert window.run("return [trouble, running]") == [None, None]
        window.type("#question", ENTER)
        ended(window, 3)
        assert window.run("return $('server').hidden")
        assert [m["content"] for m in last_exchange(window)[0]["messages"]][-1] == "Астана"
    window.log("browser")  # Chromium itself notes the failed requests


def test_a_busy_server_is_said_to_be_free_when_it_is(window):
    with serving("--parallel", "1", "--queue", "3") as served:
        show(window, served.url)
        body = {"prompt": KAZAKH, "max_tokens": 480, "n": 4, "stream": True, **ENDLESS}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as held:
            parts = held.iter_bytes()  # held on to, or the answer would be given up
            next(parts)
            assert ask(window, KAZAKH)["end"]["failure"] == "busy"
            assert window.text("#server span") == window.run("return say('full')")
        window.wait("return $('server').textContent === say('free')", seconds=60)
        assert window.run("return turns[0].question") == KAZAKH
        window.run("Object.assign(settings, arguments[0])", GREEDY)
        window.click(".retry button")
        window.wait("return turns[0].answer.end?.name", seconds=60)
    window.log("browser")  # Chromium itself notes what was refused


class Proxy(http.server.BaseHTTPRequestHandler):
    """A proxy whose server is gone."""

    def do_GET(self):
        self.send_response(502)
        self.end_headers()
        self.wfile.write(b"<html><h1>502 Bad Gateway</h1></html>")

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *arguments):
        pass


def test_an_answer_stays_while_the_server_behind_a_proxy_is_gone(window):
    """Bug: a proxy's 502 was not said to be a server that is away; "Try again" took the answer."""
    with serving() as served:
        show(window, served.url)
        ask(window, KAZAKH)
        served.process.terminate()
        served.process.wait()
    answer = window.run("return turns[0].answer.text")
    address = ("127.0.0.1", served.port)
    with http.server.ThreadingHTTPServer(address, Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        try:
            window.click(".retry button")
            window.wait("return $('status').textContent === say('away')")
            window.run("notice(null)")  # as if nobody had looked yet
            assert ask(window, "Алматы", n=2)["end"]["failure"] == "gone"
            assert window.text("#server span") == window.run("return say('away')")
            window.run("notice(null); editQuestion(turns[0])")
            window.type(".edit textarea", "Шымкент" + ENTER)
            window.wait("return trouble?.name === 'gone'")
        finally:
            proxy.shutdown()
    assert window.run("return turns.map((t) => t.question)") == [KAZAKH, "Алматы"]
    assert answer and window.run("return turns[0].answer.text") == answer
    window.log("browser")  # Chromium itself notes the failed requests
