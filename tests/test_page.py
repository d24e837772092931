"""The page of `trimix serve` in a real browser, against a real server: talking with it."""

import json
import os
import re
import signal

import httpx
import pytest
from served import ENDLESS, serving
from visitor import ENTER, GREEDY, KAZAKH, LONG, ask, ended, last_exchange, show, shown, traced

from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import TrioFile

WEIGHTS = {"alpha": 0.3, "beta": 0.5}
MAYOR = "Астана қаласының әкімі кім?"  # its answer has many tokens


@pytest.fixture(scope="module")
def server(endless_folder):
    with serving("--trio", endless_folder) as served:
        yield served


@pytest.fixture
def page(window, server):
    """The page as a newcomer sees it; in the end it has said nothing to the console."""
    show(window, server.url)
    yield window
    assert [e for e in window.log("browser") if "favicon" not in e["message"]] == []


def test_a_newcomer_reads_what_the_trio_is(page):
    about = TrioFile.read(NANO / "trio.toml").description
    seen = "const p = document.getElementById('described'); return !p.hidden && p.textContent"
    assert page.wait(f"{seen} === arguments[0]", f"nano: {about}")


# -- a conversation -------------------------------------------------------------------------


def test_an_answer_comes_in_steps_and_is_the_one_that_the_api_gives(page, server):
    page.run(
        """window.steps = new Set();
        new MutationObserver(() => steps.add(document.querySelector(".answer .text")?.textContent))
          .observe(document.getElementById("turns"), {subtree: true, characterData: true});"""
    )
    page.type("#question", MAYOR + ENTER)
    ended(page)
    _, text, _, _ = last_exchange(page)
    assert shown(page, "question") == MAYOR and shown(page, "answer") == text
    steps = page.run("return [...steps]")
    assert len(steps) > 3 and all(text.startswith(step) for step in steps)
    request = {"messages": [{"role": "user", "content": MAYOR}], "temperature": 0}
    request |= {"max_tokens": 24, "logprobs": True, "top_logprobs": 2}
    answer = server.post("/v1/chat/completions", request).json()["choices"][0]
    tokens = answer["logprobs"]["content"]
    top = [[t["logprob"] for t in token["top_logprobs"]] for token in tokens]
    # Which of two tokens that all but tie is picked may change as the prompt is known already.
    sure = next((i for i, (a, b) in enumerate(top) if a - b < 0.1), len(tokens))
    assert sure >= 3
    assert text.startswith("".join(token["token"] for token in tokens[:sure]))


def test_a_second_turn_goes_on_from_the_first_and_an_edited_question_begins_anew(page):
    ask(page, KAZAKH)
    first = shown(page, "answer")
    ask(page, "Алматы қаласы", n=2)
    sent, text, _, _ = last_exchange(page)
    assert [m["role"] for m in sent["messages"]] == ["user", "assistant", "user"]
    assert [m["content"] for m in sent["messages"]] == [KAZAKH, first, "Алматы қаласы"]
    assert shown(page, "answer", 2) == text
    page.click(".question button")
    page.run("document.querySelector('.edit textarea').value = 'Алматы қаласы'")
    page.type(".edit textarea", ENTER)
    page.wait("return turns.length === 1")  # once the server was found to be there
    ended(page)
    sent, text, _, _ = last_exchange(page)
    assert page.run("return turns.length") == 1
    assert [m["content"] for m in sent["messages"]] == ["Алматы қаласы"]
    assert shown(page, "question") == "Алматы қаласы" and shown(page, "answer") == text


def test_stop_keeps_what_came_and_ends_the_work_and_retry_asks_again(window, endless_folder):
    with serving("--trio", endless_folder, "--n-ctx", 4096) as served:
        show(window, served.url, maxTokens=3000, **LONG)
        cancelled = 'trimix_requests_finished_total{reason="cancelled"}'
        before = served.metrics().get(cancelled, 0)
        window.type("#question", KAZAKH + ENTER)
        window.wait("return turns[0].answer.text.length > 3")
        window.click("#stop")
        stopped = ended(window)["text"]
        assert window.text(".note") == "Stopped."
        served.wait_until(lambda metrics: metrics.get(cancelled, 0) == before + 1)
        assert shown(window, "answer") == stopped
        window.click(".retry button")
        window.wait("return turns[0].answer.end?.name === 'length'", seconds=60)
        _, text, _, _ = last_exchange(window)
        assert shown(window, "answer") == text and len(text) > len(stopped)


def test_copy_and_a_new_chat_and_where_things_are_kept(page, server):
    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite"], origin=server.url)
    ask(page, KAZAKH)
    page.click(".answer button")
    page.wait("return document.querySelector('.answer button').textContent === 'Copied'")
    assert page.run("return navigator.clipboard.readText()") == shown(page, "answer")
    page.open(server.url)  # the tab is loaded again
    assert shown(page, "question") == KAZAKH
    kept = page.run("return 'trimix.chat.' + chat.id")
    assert sorted(page.run("return Object.keys(localStorage)")) == [kept, "trimix.language"]
    page.click("#new")
    assert page.run("return document.querySelectorAll('.turn').length") == 0
    assert page.run("return localStorage[arguments[0]]", kept) is not None
    page.click("#undo")
    assert shown(page, "question") == KAZAKH


def test_settings_reach_the_server(window, server):
    show(window, server.url)
    window.click("#open-settings")
    window.click("[value=fixed]")
    for name, value in WEIGHTS.items():
        window.run("document.querySelector(arguments[0]).value = ''", f"[name={name}]")
        window.type(f"[name={name}]", str(value))
    window.type("[name=system]", "Be brief.")
    window.type("[name=maxTokens]", ENTER)
    answer = ask(window, KAZAKH)
    sent, text, mix, _ = last_exchange(window)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0, 24)
    assert answer["text"] == text
    assert answer["mix"]["weights"] == mix["weights"] == {**WEIGHTS, "method": "fixed"}
    window.click("#open-settings")
    window.click("[value=alone]")
    window.run("document.querySelector('[name=alone]').value = 'small_base'")
    window.click("#settings button.main")
    answer = ask(window, KAZAKH, n=2)
    assert answer["mix"]["weights"] == {"alpha": 0, "beta": 0, "method": "fixed"}
    assert set(answer["pieces"][0]["p"]) == {"small_base", "fused"}


def test_html_in_messages_is_text_and_every_request_goes_to_the_server(window, server):
    window.requests()
    evil = "<img src='http://evil.test/x' onerror='pwned=1'><script>pwned=1</script>&lt;<b>"
    show(window, server.url, turns=[traced(evil, 4)])
    ask(window, evil, n=2)
    assert shown(window, "answer") == shown(window, "question", 2) == evil
    found = "return document.querySelectorAll('#turns img, #turns script, #turns b').length"
    assert window.run(found) == 0 and window.run("return typeof pwned") == "undefined"
    asked = [address for address, _, _ in window.requests()]
    assert f"{server.url}/v1/chat/completions" in asked
    assert [url for url in asked if not url.startswith(server.url)] == []
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy and "http" not in policy
    refused = window.run("return fetch('http://127.0.0.1:9/').then(() => '', (e) => e.name)")
    assert refused == "TypeError"
    assert any("Content Security Policy" in e["message"] for e in window.log("browser"))


# -- when something fails -------------------------------------------------------------------


def test_events_are_read_wherever_the_bytes_are_cut(page, server):
    body = {"messages": [{"role": "user", "content": KAZAKH}], "temperature": 0, "stream": True}
    raw = server.post("/v1/chat/completions", {**body, "max_tokens": 24}).content
    assert b"\xd0" in raw and raw.endswith(b"data: [DONE]\n\n")
    lines = [line[6:] for line in raw.decode().split("\n") if line.startswith("data: {")]
    read = """const [bytes, size] = [Uint8Array.from(arguments[0]), arguments[1]];
        return (async () => {
          let at = 0;
          const stream = new ReadableStream({pull(out) {
            if (at < bytes.length) out.enqueue(bytes.slice(at, at += size)); else out.close(); }});
          const found = [];
          try { for await (const event of events(stream)) found.push(event); }
          catch (error) { found.push(error.failure); }
          return found;
        })()"""
    for size in (1, 2, 3, 7, 1000, len(raw)):
        assert page.run(read, list(raw), size) == [json.loads(line) for line in lines]
    found = page.run(read, list(raw[:-20]), 5)  # it ends before its end
    assert found == [*(json.loads(line) for line in lines[: len(found) - 1]), "cut"]
    windows_lines = raw.replace(b"\n", b"\r\n")
    assert page.run(read, list(windows_lines), 1) == [json.loads(line) for line in lines]


def test_a_conversation_that_fits_no_context_is_said_to(window, server):
    show(window, server.url)
    assert ask(window, KAZAKH * 60)["end"]["failure"] == "context"
    assert "too long" in window.text("[role=alert]")
    show(window, server.url, maxTokens=500, **LONG)
    assert ask(window, f"{KAZAKH} " * 36)["end"]["name"] == "context"


@pytest.mark.skipif(os.name == "nt", reason="signals, limits or pipes as POSIX has them")
def test_a_dead_server_is_one_plain_line_and_retry_asks_again(window, endless_folder):
    with serving("--trio", endless_folder) as served:
        show(window, served.url, language="kk", maxTokens=400, **LONG)
        window.type("#question", KAZAKH + ENTER)
        window.wait("return turns[0].answer.text")
        os.kill(served.process.pid, signal.SIGKILL)
        part = ended(window)
    texts = window.run("return TEXTS.kk")
    assert window.text("[role=alert]") == texts["cut"]
    assert part["text"] and shown(window, "answer") == part["text"]
    window.click(".retry button")
    window.wait("return $('status').textContent === say('away')")
    assert shown(window, "answer") == part["text"]  # it is not taken for nothing
    with serving("--port", served.port) as served:
        window.click(".retry button")
        window.wait("return turns[0].answer.end?.name")
        assert shown(window, "answer") == last_exchange(window)[1] != ""
        assert window.run("return document.querySelector('[role=alert]')") is None
    window.log("browser")  # Chromium itself notes the failed requests


def test_a_key_is_asked_for_a_busy_server_waited_for_and_a_trios_weights_kept(window, tmp_path):
    trio = tmp_path / "trio.toml"
    text = (NANO / "trio.toml").read_text(encoding="utf-8")
    text = text.replace("n_ctx = 512", "n_ctx = 512\nweights = [0.3, 0.9]")
    trio.write_text(re.sub('path = "', f'path = "{NANO}/', text), encoding="utf-8")
    limits = ("--api-key", "sesame", "--parallel", "1", "--queue", "3")
    with serving("--trio", trio, *limits) as served:
        window.open(served.url)
        window.wait("return $('key').open")
        window.type("#key input", "wrong" + ENTER)
        window.wait("return $('key').open && $('key-title').textContent === say('wrongKey')")
        window.type("#key input", "sesame" + ENTER)
        window.wait("return $('model').textContent === 'nano'")
        window.run("Object.assign(settings, arguments[0])", GREEDY)
        assert "sesame" not in window.run("return JSON.stringify(localStorage)")
        address, key = f"{served.url}/v1/completions", {"Authorization": "Bearer sesame"}
        body = {"prompt": KAZAKH, "max_tokens": 480, "n": 4, "stream": True, **ENDLESS}
        with httpx.stream("POST", address, json=body, headers=key, timeout=60) as held:
            parts = held.iter_bytes()  # held on to, or the answer would be given up
            next(parts)
            assert ask(window, KAZAKH)["end"] == {"failure": "busy", "detail": ""}
            assert window.text("[role=alert]") == window.run("return say('busy')")
        for _ in range(50):  # until the server has seen that the other one left
            window.click(".retry button")
            if "name" in (answer := ended(window))["end"]:
                break
        assert answer["text"]
        weights = {"alpha": 0.3, "beta": 0.9, "method": "fixed"}
        assert answer["mix"]["weights"] == weights and window.run("return settings.mix") == "fixed"
        window.click("#open-settings")
        window.click("[value=auto]")
        window.click("#settings button.main")
        assert ask(window, KAZAKH, n=2)["mix"]["weights"]["method"] == "auto"
    window.log("browser")  # Chromium itself notes what was refused


def test_a_key_that_cannot_be_or_cannot_be_kept(window):
    """Bug: a key in Cyrillic was taken for a server that is away, and never asked for again.

    Where the browser keeps nothing, the right key was asked for without end.
    """
    with serving("--api-key", "sesame") as served:
        window.open(served.url)
        window.wait("return $('key').open")
        window.run(
            """for (const name of ["getItem", "setItem"])
              Storage.prototype[name] = () => { throw new DOMException("", "SecurityError"); }"""
        )
        window.type("#key input", "құпия" + ENTER)
        window.wait("return $('key').open && $('key-title').textContent === say('wrongKey')")
        window.type("#key input", "sesame" + ENTER)
        window.wait("return !$('key').open && $('model').textContent === 'nano'")
        window.run("Object.assign(settings, arguments[0])", GREEDY)
        assert "name" in ask(window, KAZAKH)["end"]
    window.log("browser")  # Chromium itself notes what was refused
