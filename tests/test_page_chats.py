"""The page of `trimix serve` in a real browser: several chats, kept there, and files of them."""

import json

import pytest
from served import serving
from visitor import ENTER, KAZAKH, LONG, UYGHUR, ask, ended, show, shown, traced

CLICK_UNDO = "document.getElementById('undo').click()"


@pytest.fixture(scope="module")
def server(endless_folder):
    with serving("--trio", endless_folder, "--n-ctx", 4096) as served:
        yield served


@pytest.fixture
def page(window, server):
    """Two chats, one of them on the page; in the end it has said nothing to the console."""
    show(window, server.url, turns=[traced(UYGHUR, 3)])
    window.run(
        "newConversation(); turns = arguments[0]; keepChat(); forgetUndo()", [traced(KAZAKH, 3)]
    )
    window.open(server.url)
    yield window
    assert [e for e in window.log("browser") if "favicon" not in e["message"]] == []


def listed(window):
    """The titles in the list of chats."""
    window.run("if (!$('chats').open) openChats()")
    return window.run(
        "return [...document.querySelectorAll('#chat-list .title')].map((b) => b.textContent)"
    )


def everything(window):
    """What the browser keeps of chats, by place."""
    return window.run(
        """return ["localStorage", "sessionStorage"].map((place) =>
          Object.fromEntries(chatKeys(place).map((key) => [key, window[place][key]])))"""
    )


def press(window, name, row=1):
    """A button of a row of the list, by the name of its words."""
    window.run(
        """[...document.querySelectorAll("#chat-list li")][arguments[1] - 1]
          .querySelector(`[aria-label^="${say(arguments[0])}"]`).click()""",
        name,
        row,
    )


def rename(window, title, row=1):
    press(window, "rename", row)
    window.run("document.querySelector('.rename input').value = ''")
    window.type(".rename input", title + ENTER)


def test_chats_are_listed_opened_and_renamed_and_outlive_the_tab(page, server):
    assert listed(page) == ["?", "?"]
    rename(page, "Бірінші")
    rename(page, "ئىككىنچى", row=2)
    assert listed(page) == ["Бірінші", "ئىككىنچى"]
    page.run("document.querySelectorAll('#chat-list .title')[1].click()")
    assert shown(page, "answer") == UYGHUR
    page.run("sessionStorage.clear()")  # another tab
    page.open(server.url)
    assert page.run("return turns.length") == 0
    assert listed(page) == ["Бірінші", "ئىككىنچى"]
    page.click("#chat-list .title")
    assert shown(page, "answer") == KAZAKH
    page.open(server.url)  # the same tab again
    assert shown(page, "answer") == KAZAKH
    assert page.run("return turns[0].answer.pieces.length") == len(
        traced(KAZAKH, 3)["answer"]["pieces"]
    )


def test_a_deleted_chat_comes_back_and_so_do_all(page):
    rename(page, "one") if listed(page) else None
    before = everything(page)
    press(page, "delete")
    assert listed(page) == ["?"] and page.run("return turns.length") == 0
    assert page.run("return $('chats').contains($('undone')) && !$('undone').hidden")
    page.click("#undo")
    assert listed(page) == ["one", "?"] and everything(page) == before
    assert shown(page, "answer") == KAZAKH
    page.click("#delete-all")
    assert listed(page) == [] and everything(page) == [{}, {}]
    page.click("#chats-done")
    page.click("#undo")  # it has come to the page with the end of the list
    assert listed(page) == ["one", "?"] and everything(page) == before


def test_a_new_chat_ends_the_answer_and_is_undone(window, server):
    show(window, server.url, maxTokens=3000, **LONG)
    window.type("#question", KAZAKH + ENTER)
    window.wait("return turns[0].answer.text")
    window.click("#new")
    assert window.run("return [turns.length, running, $('welcome').hidden]") == [0, None, False]
    window.click("#undo")
    assert window.text(".note") == "Stopped." and shown(window, "question") == KAZAKH
    assert window.run("return $('undone').hidden")
    window.click("#new")
    window.run("settings.maxTokens = 4")
    ask(window, "?")  # a question ends what can be undone
    assert window.run("return $('undone').hidden") and len(listed(window)) == 2


def test_an_exported_file_is_imported_elsewhere(page, server, tmp_path):
    page.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    rename(page, "one") if listed(page) else None
    before = page.run("return keptIds().map(keptText)")
    page.click("#export-all")
    page.wait("return fetch('health').then(() => true)")  # the download is asked for
    for _ in range(200):
        if files := list(tmp_path.glob("trimix-chats-*.json")):
            break
        page.run("return new Promise((next) => setTimeout(next, 50))")
    saved = json.loads(files[0].read_text(encoding="utf-8"))
    assert (saved["format"], saved["version"], len(saved["chats"])) == ("trimix-chats", 1, 2)
    for expected in ("2", "0"):  # what is here already is not added again
        if expected == "2":
            page.click("#delete-all")
        page.run("$('chats-note').textContent = ''")
        page.type("#import-file", str(files[0]))
        page.wait(
            "return $('chats-note').textContent === say('imported', {n: arguments[0]})", expected
        )
        assert sorted(page.run("return keptIds().map(keptText)")) == sorted(before)
    assert listed(page) == ["one", "?"]


def damaged(text):
    """Files that are no chats, or no longer."""
    good = json.loads(text)
    yield from (
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"messages": []}',
        text[:-9],
        text.replace("{", "[", 3),
    )
    for change in (
        {"format": "x"},
        {"version": 2},
        {"chats": {}},
        {"chats": [*good["chats"], None]},
    ):
        yield json.dumps({**good, **change})
    for path, value in (
        ("title", 3),
        ("time", "x"),
        ("time", 9e15),  # no date is so late
        ("turns", None),
        ("turns.0.question", None),
        ("turns.0.leftOut", 9),
        ("turns.0.answer", None),
        ("turns.0.answer.text", {}),
        ("turns.0.answer.pieces", [["a", 1]]),
        ("turns.0.answer.pieces", [[1, 1, 1, 1, 1]]),
        ("turns.0.answer.pieces", [["a", 1, "b", 1, 1]]),
        ("turns.0.answer.mix", {"weights": 1}),
        ("turns.0.answer.mix.weights.alpha", "<b>"),
        ("turns.0.answer.end", {"failure": "x"}),
        ("turns.0.answer.mix.grid", {"alphas": [1], "betas": [1], "mean_nll": [[1, 2]]}),
        ("turns.0.beside", 7),
        ("turns.0.answer.usage", {}),
        ("version", None),
    ):
        file = json.loads(text)
        *parents, last = path.split(".")
        at = file["chats"][1]  # the first one is good
        for name in parents:
            at = at[int(name) if name.isdigit() else name]
        at[last] = value
        yield json.dumps(file)


def test_a_damaged_or_foreign_file_is_one_line_and_changes_nothing(page, tmp_path):
    text = page.run(
        """return JSON.stringify({format: FILE_FORMAT, version: CHAT_VERSION,
          chats: keptIds().map((id) => JSON.parse(keptText(id)))})"""
    )
    listed(page)
    before = everything(page)
    file = tmp_path / "chats.json"
    n = 0
    for bad in damaged(text):
        file.write_text(bad, encoding="utf-8")
        page.run("$('chats-note').textContent = ''")
        page.type("#import-file", str(file))
        told = page.wait("return $('chats-note').textContent")
        assert told == page.run("return say('notChats', {name: 'chats.json'})"), bad
        assert everything(page) == before
        n += 1
    assert n > 25
    file.write_text(text, encoding="utf-8")
    page.run("$('chats-note').textContent = ''")
    page.type("#import-file", str(file))
    assert page.wait("return $('chats-note').textContent") == "Chats imported: 0."


def test_what_is_kept_of_a_chat_that_is_damaged_breaks_nothing(page, server):
    page.run("localStorage['trimix.chat.x'] = '{'; localStorage['trimix.chat.y'] = 'null'")
    page.run("localStorage['trimix.chat.' + chat.id] = '[]'")
    page.open(server.url)
    assert page.run("return turns.length") == 0 and listed(page) == ["?"]


@pytest.mark.parametrize("language", ["en", "ug"])
def test_a_full_browser_is_said_to_be_and_the_chat_lives_while_the_tab_does(
    window, server, language
):
    show(window, server.url, language=language)
    window.run("localStorage['trimix.chat.big'] = 'a'.repeat(MOST_CHARS - 100)")
    ask(window, KAZAKH)
    told = window.run("return say('storageFull')")
    assert window.text("#unkept span") == told
    window.open(server.url)
    assert shown(window, "question") == KAZAKH
    window.run("delete localStorage['trimix.chat.big']")
    ask(window, "?", n=2)
    assert window.run("return $('unkept').hidden")
    here, tab = everything(window)
    assert len(here) == 1 and tab == {}
    # An import that has no room leaves nothing behind.
    window.run("localStorage['trimix.chat.big'] = 'a'.repeat(MOST_CHARS - 10000)")
    before = everything(window)
    said = window.run(
        """const more = { version: 1, title: "a".repeat(199), time: 1, turns: [] };
        const chats = Array.from({ length: 60 }, (_, i) => ({ ...more, time: i }));
        const text = JSON.stringify({ format: FILE_FORMAT, version: CHAT_VERSION, chats });
        return importChats(new File([text], "x.json"))"""
    )
    assert said.startswith(told) and everything(window) == before


def test_there_are_at_most_so_many_chats(window, server):
    show(window, server.url)
    window.run("for (let i = 0; i < MOST_CHATS; i++) localStorage[CHAT_KEY + i] = '{}'")
    ask(window, KAZAKH)
    assert window.text("#unkept span") == window.run("return say('storageFull')")


def test_where_the_browser_keeps_nothing_the_page_says_so_and_works(window, server):
    show(window, server.url)
    window.run("Storage.prototype.setItem = () => { throw new DOMException('', 'SecurityError') }")
    ask(window, KAZAKH)
    assert window.text("#unkept span") == window.run("return say('storageBlocked')")
    window.click("#new")
    window.click("#undo")
    assert shown(window, "question") == KAZAKH


def test_chats_may_be_kept_for_this_tab_only(page, server):
    listed(page)
    here, tab = everything(page)
    assert len(here) == 2 and tab == {}
    page.click("#keep")
    assert everything(page) == [{}, here]
    page.click("#chats-done")
    page.open(server.url)
    page.click("#new")
    assert page.run("return $('privacy').textContent.endsWith(say('keptShort'))")
    listed(page)
    page.click("#keep")
    assert everything(page) == [here, {}]
    assert page.run("return $('privacy').textContent.endsWith(say('keptLong'))")


def exported(window):
    """The text of the file that all chats would be saved to."""
    return window.run(
        """const made = URL.createObjectURL;
        let file;
        URL.createObjectURL = (blob) => { file = blob; return "data:,"; };
        exportChats(keptIds());
        URL.createObjectURL = made;
        return file.text()"""
    )


def imported(window, text):
    """What an import of a file with this text says."""
    return window.run("return importChats(new File([arguments[0]], 'x.json'))", text)


def test_a_file_of_chats_that_are_here_adds_none(window, server):
    """Bug: an answer of the server says more than is read from a file, so it was added again."""
    show(window, server.url, mix="auto")
    ask(window, KAZAKH)
    assert imported(window, exported(window)) == "Chats imported: 0."


@pytest.mark.parametrize("bad", ["{", '{"version": 2}', "null"])
def test_what_is_exported_can_be_imported_whatever_is_kept(page, bad):
    """Bug: with one damaged chat the file of all chats was refused as damaged."""
    text = page.run("localStorage['trimix.chat.x'] = arguments[0]", bad) or exported(page)
    page.run("deleteChats(keptIds(), 'deletedAll')")
    assert imported(page, text) == "Chats imported: 2."


def test_a_chat_whose_names_every_object_has_is_shown(page, server):
    """Bug: an answer that ended by "constructor" stopped the page, whenever it was loaded."""
    page.run(
        """const saved = JSON.parse(keptText(chat.id)), { answer } = saved.turns[0];
        answer.end = { name: "constructor" };
        answer.mix.weights.method = "toString";
        localStorage[CHAT_KEY + chat.id] = JSON.stringify(saved)"""
    )
    page.open(server.url)
    assert shown(page, "answer") == KAZAKH
    page.click(".why summary")
    assert page.run("return say('byHand')") in page.text(".why div")


def test_a_chat_that_is_renamed_while_it_is_answered_keeps_the_answer(window, server):
    """Bug: the chat was kept as it was when its row was listed."""
    show(window, server.url, maxTokens=100, **LONG)
    window.type("#question", KAZAKH + ENTER)
    window.wait("return turns[0]?.answer.text")
    listed(window)
    press(window, "rename")
    text = ended(window)["text"]
    window.run("document.querySelector('.rename').requestSubmit()")
    window.open(server.url)
    assert shown(window, "answer") == text


def test_chats_for_which_a_tab_has_no_room_are_not_lost(page):
    """Bug: they were deleted from the browser before the tab had taken them."""
    before = page.run("return keptIds().map(keptText).sort()")
    page.run("sessionStorage['trimix.chat.big'] = 'a'.repeat(MOST_CHARS - 100)")
    page.run("moveChats(false); delete sessionStorage['trimix.chat.big']")
    assert page.run("return keptIds().map(keptText).sort()") == before
    assert page.text("#unkept span") == page.run("return say('storageFull')")


def test_a_title_ends_with_a_whole_character(page):
    """Bug: half of a character that is a pair in UTF-16 was shown as a white box."""
    title = "return titleOf({chat, turns: [{question: arguments[0]}]}).isWellFormed()"
    assert all(page.run(title, "a" * n + "\N{BOOKS}" * 99) for n in (0, 1, 58, 59, 60))


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago"])
def test_an_exported_file_has_the_date_of_the_place(page, zone):
    """Bug: it was the date of Greenwich. One of these two zones has another one at any time."""
    page.cdp("Emulation.setTimezoneOverride", timezoneId=zone)
    name, *date = page.run(
        """let name;
        HTMLAnchorElement.prototype.click = function () { name = this.download; };
        exportChats(keptIds());
        const now = new Date();
        return [name, now.getFullYear(), now.getMonth() + 1, now.getDate()]"""
    )
    page.cdp("Emulation.setTimezoneOverride", timezoneId="")
    assert name == "trimix-chats-{:04}-{:02}-{:02}.json".format(*date)


def test_escape_within_an_input_method_closes_no_field(page):
    """Bug: Escape, which takes back a word that is being composed, threw away what was written.

    Safari sends it when the word is composed, as key 229.
    """
    listed(page)
    press(page, "rename")
    page.run("editQuestion(turns[0])")
    for field in (".rename input", ".edit textarea"):
        for composing in ({"isComposing": True}, {"keyCode": 229}, {}):
            page.run(
                """const about = { key: "Escape", bubbles: true, cancelable: true };
                document.querySelector(arguments[0]).dispatchEvent(
                  new KeyboardEvent("keydown", { ...about, ...arguments[1] }))""",
                field,
                composing,
            )
            assert page.run("return !!document.querySelector(arguments[0])", field) == bool(
                composing
            )


def test_a_full_browser_is_said_to_be_by_any_browser(window, server):
    """Bug: Firefox has another name for it, and was said to keep nothing at all."""
    show(window, server.url)
    for name in ("QuotaExceededError", "NS_ERROR_DOM_QUOTA_REACHED"):
        window.run(
            """const [name] = arguments;
            Storage.prototype.setItem = () => { throw new DOMException("", name); }""",
            name,
        )
        assert window.run("return put('localStorage', 'x', '')") == "storageFull"
