"""The page of `trimix serve` under axe, which looks for what keeps people out.

axe is not in the repository: `npm pack axe-core`, unpack it, and give TRIMIX_AXE the path of its
axe.min.js.
"""

import os
from pathlib import Path

import pytest
from browser import browser
from served import serving
from visitor import KAZAKH, MONGOLIAN, TIBETAN, UYGHUR, show, traced

AXE = Path(os.environ.get("TRIMIX_AXE", ""))
pytestmark = pytest.mark.skipif(
    not AXE.is_file(), reason="TRIMIX_AXE names no axe.min.js of `npm pack axe-core`"
)
MARKDOWN = """# A
### B
- *a* [b](https://example.org)

```py
c
```

| d | e | f | g |
|---|---|---|---|
| h | i | j | k |

> l
"""
STATES = {
    "answers": "",
    "why": "turns.flatMap(parts).forEach((t) => t.view.why.open = true)",
    "settings": "openSettings()",
    "chats": "$('settings').close(); openChats(); deleteChats(['x'], 'deletedAll')",
    "rename": "document.querySelector('#chat-list [aria-label]').click()",
    "key": "$('chats').close(); askKey(() => {})",
    "bars": "$('key').close(); newConversation(); bar('server', 'away'); bar('unkept', 'full')",
}


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with serving() as served, browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.url = served.url
        yield opened


def violations(window):
    return window.run(
        """return axe.run().then(({ violations }) => violations.map(({ id, nodes }) =>
          [id, nodes.map(({ html }) => html.slice(0, 120)).slice(0, 4)]))"""
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("language, width", [("en", 1280), ("ug", 390), ("bo", 390)])
def test_axe_finds_nothing(window, language, width, dark):
    texts = (KAZAKH, UYGHUR, TIBETAN, MONGOLIAN, MARKDOWN)
    turns = [traced(text, 5) for text in texts]
    turns.append({**turns[0], "beside": turns[1], "leftOut": 1})
    show(window, window.url, turns=turns, language=language)
    window.resize(width, 800, dark=dark)
    window.run(AXE.read_text(encoding="utf-8"))
    for name, state in STATES.items():
        window.run(state)
        assert violations(window) == [], name


def test_axe_would_find_something(window):
    show(window, window.url)
    window.run(AXE.read_text(encoding="utf-8") + "; $('send').textContent = ''")
    assert [name for name, _ in violations(window)] == ["button-name"]
