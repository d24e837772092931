"""What a visitor of the page does and sees, for its tests; skips where no browser is."""

import json
import random

import pytest
from browser import BROWSER, DRIVER

if not (BROWSER and DRIVER):
    pytest.skip("there is no chromium, or no chromedriver", allow_module_level=True)

ROLES = ("large_ins", "small_cpt", "small_base")
KAZAKH = "Абай Құнанбаев туралы айтшы."
UYGHUR = "ئۇيغۇر تىلى — تۈركىي تىللار ئائىلىسىگە كىرىدىغان تىل بولۇپ، كۆپىنچە شىنجاڭدا سۆزلىنىدۇ."
TIBETAN = "བོད་ཀྱི་སྐད་ཡིག་བརྒྱད་སྒྲུབ་པ།"
MONGOLIAN = "ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ ᠪᠣᠯ ᠮᠣᠩᠭᠣᠯ ᠦᠨᠳᠦᠰᠦᠲᠡᠨ ᠦ ᠬᠡᠯᠡ ᠶᠤᠮ᠃"
ENTER, TAB, ESCAPE, LEFT, RIGHT, END = "\ue007", "\ue004", "\ue00c", "\ue012", "\ue014", "\ue010"
# Drawn answers may be empty, or so long that no second question fits behind them.
LONG = {"mix": "fixed", "alpha": 0.1, "beta": 0.9}  # of the endless trio: all tokens come
GREEDY = {"temperature": 0, "maxTokens": 24}


def show(window, url, *, turns=(), language="en", beside=False, **settings):
    """Open the page with what an earlier visit of this tab would have left."""
    window.resize(1280, 800)
    window.open(url)
    window.run(
        """localStorage.clear(); sessionStorage.clear();
        remember("localStorage", "language", arguments[1]);
        if (arguments[3]) remember("localStorage", "beside", true);
        remember("sessionStorage", "settings", arguments[2]);
        [chat, turns] = [newChat(), arguments[0]];
        keepChat();
        turns = [];""",
        turns,
        language,
        {**GREEDY, **settings},
        beside,
    )
    window.open(url)


def ask(window, question, n=1):
    """Have a question in the field, press Enter, and wait for the end of the n-th answer."""
    window.run("$('question').value = arguments[0]", question)
    window.type("#question", ENTER)
    return ended(window, n)


def ended(window, n=1):
    return window.wait(
        "const t = turns[arguments[0] - 1]; return !running && t?.answer.end && t.answer", n
    )


def last_exchange(window):
    """What was asked of the server last, and what it answered: its text, mix and tokens."""
    sent, request = [
        (body, request)
        for address, body, request in window.requests()
        if address.endswith("/v1/chat/completions")
    ][-1]
    lines = window.response(request).split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    chunks = [c for c in chunks if c["choices"]]  # the last one only counts tokens
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    tokens = [token for c in chunks[1:] for token in c["trimix"]["tokens"]]
    return json.loads(sent), text, chunks[0]["trimix"], tokens


def traced(text, n_most):
    """An answer that was cut into tokens at random, with probabilities; as a tab keeps it."""
    chance, pieces = random.Random(5), []
    while text:
        n = chance.randint(1, n_most)
        p = {role: chance.random() ** 2 for role in (*ROLES, "fused")}
        pieces.append({"text": text[:n], "p": p})
        text = text[n:]
    whole = "".join(piece["text"] for piece in pieces)
    mix = {"weights": {"alpha": 0.1, "beta": 0.9, "method": "fixed"}, "perplexity": None}
    end = {"name": "stop"}
    answer = {"text": whole, "pieces": pieces, "mix": {**mix, "grid": None}, "end": end}
    return {"question": "?", "answer": answer}


def shown(window, part, n=1):
    """The text of a turn's question or answer, as it stands in the page."""
    return window.run(
        "return document.querySelectorAll('.' + arguments[0] + ' .text')[arguments[1]].textContent",
        part,
        n - 1,
    )
