"""The page of `trimix serve` in a real browser: a chat in two tabs, or left behind."""

import pytest
from served import serving
from visitor import ENTER, KAZAKH, LONG, show, shown


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


def test_a_page_that_is_left_in_the_middle_of_an_answer_keeps_what_came(window, server):
    """Bug: only the question was there when the page was loaded again."""
    show(window, server.url, maxTokens=400, **LONG)
    window.type("#question", KAZAKH + ENTER)
    came = window.wait("return turns[0]?.answer.text")
    window.open(server.url)
    assert shown(window, "answer").startswith(came)
