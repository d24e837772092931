"""The page of `trimix serve` in a real browser: a chat in two tabs, or left behind."""

import pytest
from served import serving
from visitor import ENTER, KAZAKH, LONG, ended, show, shown, traced


@pytest.fixture(scope="module")
def server(endless_folder):
    with serving("--trio", endless_folder, "--n-ctx", 4096) as served:
        yield served


def test_a_page_that_is_left_in_the_middle_of_an_answer_keeps_what_came(window, server):
    """Bug: only the question was there when the page was loaded again."""
    show(window, server.url, maxTokens=3000, **LONG)
    window.type("#question", KAZAKH + ENTER)
    came = window.wait("return turns[0]?.answer.text")
    window.open(server.url)
    assert shown(window, "answer").startswith(came)


def in_another_tab(window, question):
    """What a tab does that asks more in the chat of this one."""
    window.run(
        """const { chat: there, turns: before } = kept(chat.id);
        const more = { ...before[0], question: arguments[0] };
        const frame = Object.assign(document.createElement("iframe"), { src: "about:blank" });
        document.body.append(frame);
        frame.contentWindow.localStorage[CHAT_KEY + chat.id] = packed(there, [...before, more])""",
        question,
    )


def all_questions(window):
    found = window.run("return keptIds().map((id) => kept(id).turns.map((t) => t.question))")
    return sorted(found)


def test_two_tabs_with_one_chat_show_the_same(window, server):
    show(window, server.url, turns=[traced(KAZAKH, 3)])
    in_another_tab(window, "there")
    window.wait("return document.querySelectorAll('.turn').length === 2")


def test_two_tabs_that_go_on_with_one_chat_lose_nothing(window, server):
    """Bug: the tab whose answer ended last put its own state in the place of the other's."""
    show(window, server.url, turns=[traced(KAZAKH, 3)], maxTokens=3000, **LONG)
    window.type("#question", KAZAKH + ENTER)
    window.wait("return turns[1]?.answer.text")
    in_another_tab(window, "there")
    window.click("#stop")
    text = ended(window, 2)["text"]
    assert all_questions(window) == [["?", KAZAKH], ["?", KAZAKH, "there"]]
    window.open(server.url)
    assert shown(window, "question", 2) == KAZAKH and shown(window, "answer", 2) == text


def test_what_is_written_into_a_question_outlives_another_tabs_answer(window, server):
    """Bug: the field with the question that was edited vanished as another tab kept the chat."""
    show(window, server.url, turns=[traced(KAZAKH, 3)])
    window.run("editQuestion(turns[0]); document.querySelector('.edit textarea').value = 'edited'")
    in_another_tab(window, "there")
    window.run("return new Promise((next) => setTimeout(next, 200))")
    window.run("document.querySelector('.edit').requestSubmit()")
    window.wait("return turns[0].question === 'edited'")  # once the server was found to be there
    ended(window)
    assert all_questions(window) == [["?", "there"], ["edited"]]


def test_what_is_written_into_a_question_outlives_a_change_of_the_language(window, server):
    """Bug: the field with the question that was edited vanished."""
    show(window, server.url, turns=[traced(KAZAKH, 3)])
    window.run("editQuestion(turns[0])")
    window.type(".edit textarea", " edited")
    window.run("setLanguage('kk')")
    assert window.run("return document.querySelector('.edit textarea').value") == "? edited"
    window.run("document.querySelector('.edit [type=button]').click()")
    assert window.text(".question .actions") == window.run("return TEXTS.kk.edit")


def test_undo_puts_no_deleted_chat_over_what_another_tab_kept_of_it_since(window, server):
    """Bug: an answer that ended in another tab after the chat was deleted here was lost."""
    show(window, server.url, turns=[traced(KAZAKH, 3)])
    window.run(
        """const [key, text] = [CHAT_KEY + chat.id, keptText(chat.id)];
        deleteChats(keptIds(), "deletedAll");
        localStorage[key] = text.replace('"?"', '"later"');
        undo()"""
    )
    assert all_questions(window) == [["later"]]
