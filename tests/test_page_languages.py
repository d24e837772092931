"""The page of a server with several trios: the list, and who answers."""

import pytest
from languages import CODES, QUESTIONS, options
from served import serving
from visitor import GREEDY, ask, last_exchange, show


@pytest.fixture(scope="module")
def server(languages):
    with serving(*options(languages.values())) as served:
        yield served


def choices(window):
    return window.run("return [...$('trio').options].map((o) => [o.value, o.textContent])")


def test_the_page_lists_the_trios_and_asks_the_one_that_is_chosen(window, server):
    show(window, server.url)
    window.wait("return !$('trios').hidden && $('model').hidden")
    (auto, words), *listed = choices(window)
    assert auto == "auto" and words == window.run("return say('byLetters')")
    assert [name for name, _ in listed] == [f"nano-{code}" for code in CODES]
    own = {"kk": "Қазақша (", "ug": "ئۇيغۇرچە (", "bo": ""}
    for code, (name, label) in zip(CODES, listed, strict=True):
        assert own[code] in label and name in label
    window.run("$('trio').value = 'nano-bo'; $('trio').dispatchEvent(new Event('change'))")
    ask(window, QUESTIONS["kk"])
    sent, _, mix, _ = last_exchange(window)
    assert sent["model"] == "nano-bo" == mix["trio"]
    window.run("document.querySelector('.why').open = true")
    told = window.run("return say('answeredBy', { trio: 'nano-bo' })")
    found = "[...document.querySelectorAll('.why p')].some((p) => p.textContent === arguments[0])"
    window.wait(f"return {found}", told)
    window.open(server.url)  # it is remembered
    window.wait("return $('trio').value === 'nano-bo'")


def test_what_a_trio_says_of_itself_is_shown_while_it_is_chosen(window, server):
    show(window, server.url)
    window.wait("return !$('trios').hidden")
    seen = "const p = $('described'); return p.hidden ? null : p.textContent"
    described = {"auto": None, "nano-ug": "nano-ug: Үштік: ug", "nano-kk": None}
    for name, told in described.items():
        window.run(f"$('trio').value = '{name}'; $('trio').dispatchEvent(new Event('change'))")
        assert window.run(seen) == told, name


@pytest.mark.parametrize("code", CODES)
def test_by_default_the_letters_of_the_question_choose_in_any_language_of_the_page(
    window, server, code
):
    language = code if code in ("kk", "ug") else "en"
    show(window, server.url, language=language)
    window.wait("return !$('trios').hidden")
    assert choices(window)[0][1] == window.run(f"return TEXTS.{language}.byLetters")
    ask(window, QUESTIONS[code])
    sent, _, mix, _ = last_exchange(window)
    assert sent["model"] == "auto" and mix["trio"] == f"nano-{code}"


def test_with_one_trio_there_is_no_list_and_no_name_is_sent(window, languages):
    with serving("--trio", languages["ug"]) as served:
        show(window, served.url, **GREEDY)
        window.wait("return $('model').textContent === 'nano-ug'")
        assert window.run("return $('trios').hidden")
        ask(window, QUESTIONS["bo"])
        sent, _, mix, _ = last_exchange(window)
        assert "model" not in sent and "trio" not in mix


def test_a_trio_that_was_never_tuned_is_said_to_be_in_the_language_of_the_page(window, languages):
    """Bug: the words stayed in the language that the page had first."""
    with serving("--trio", languages["ug"]) as served:
        show(window, served.url)
        window.wait("return $('model').textContent === 'nano-ug'")
        for language in ("en", "kk"):
            window.run("setLanguage(arguments[0])", language)
            words = window.run("return TEXTS[arguments[0]].untuned", language)
            assert window.run("return $('tuned').textContent") == words


def test_a_server_that_comes_back_with_other_trios_is_asked_for_those(window, languages):
    """Bug: the page asked for a trio that was there before, and was told that there is none."""
    with serving(*options(languages.values())) as served:
        show(window, served.url, **GREEDY)
        window.run("remember('localStorage', 'trio', 'nano-bo')")
        window.open(served.url)
        window.wait("return $('trio').value === 'nano-bo'")
    with serving("--trio", languages["ug"], "--port", served.port):
        window.run("return greet()")
        assert window.run("return [$('trios').hidden, $('model').hidden]") == [True, False]
        assert "name" in ask(window, QUESTIONS["ug"])["end"]
    with serving(*options(languages.values()), "--port", served.port):
        window.run("return greet()")
        assert window.run("return [$('trios').hidden, $('model').hidden]") == [False, True]
        ask(window, QUESTIONS["bo"], n=2)
        assert last_exchange(window)[0]["model"] == "nano-bo"
