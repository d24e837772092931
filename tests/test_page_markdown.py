"""The page of `trimix serve` in a real browser: Markdown in answers, also where it is hostile."""

import random

import pytest
from browser import browser
from served import serving
from visitor import show, traced

RENDER = """
const [text, cuts] = [arguments[0], arguments[1]];
const view = { body: textBody("", { dir: "ltr" }), grown: nothingGrown() };
for (const cut of cuts) grow(view, text.slice(0, cut), false);
grow(view, text, true);
"""
HTML = "return view.body.innerHTML"
SEEN = """
const copy = view.body.cloneNode(true);
for (const part of copy.querySelectorAll("[hidden]")) part.remove();
const names = "dir|rel|target|title|type|class|aria-label|tabindex|scope|data-open";
return copy.innerHTML.replace(new RegExp(` (${names})="[^"]*"`, "g"), "")
  .replaceAll("<button></button>", "");
"""
CASES = {
    "two words": "<p>two words</p>",
    "```\r\na\r\n```\r\nb\r\n": "<div><pre><code>a\r\n</code></pre></div><p>b</p>",
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "*a* _b_ **c** __d__ ~~e~~ ***f***": "<p><em>a</em> <em>b</em> <strong>c</strong> "
    "<strong>d</strong> <del>e</del> <em><strong>f</strong></em></p>",
    "2 * 3 * 4, snake_case_name, a * b": "<p>2 * 3 * 4, snake_case_name, a * b</p>",
    "**a _b** c_": "<p><strong>a _b</strong> c_</p>",
    "**сөз**дер": "<p><strong>сөз</strong>дер</p>",
    r"\*a\* \q": r"<p>*a* \q</p>",
    "a `*b*` ``c ` d`` `e": "<p>a <code>*b*</code> <code>c ` d</code> `e</p>",
    "# A\n## B ##\n#c": "<h3>A</h3><h3>B ##</h3><p>#c</p>",
    "```py\na = '*'\n\n# b\n```\nc": "<div><pre><code>a = '*'\n\n# b\n</code></pre></div><p>c</p>",
    "~~~\n```\n~~~": "<div><pre><code>```\n</code></pre></div>",
    "```\nopen": "<div><pre><code>open</code></pre></div>",
    "a\n***\nb": "<p>a</p><div><hr></div><p>b</p>",
    "> a\n> > *b*\n>\n> c\nd": "<blockquote><p>a</p><blockquote><p><em>b</em></p></blockquote>"
    "<p>c</p></blockquote><p>d</p>",
    "- a\n- b\n  - c\n\n  d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul>"
    "<p>d</p></li><li><p>e</p></li></ul>",
    "3. a\n4. b\n   ```\n   c\n   ```": '<ol start="3"><li><p>a</p></li><li><p>b</p><div><pre>'
    "<code>c\n</code></pre></div></li></ol>",
    "born in\n1985. And": "<p>born in\n1985. And</p>",
    "| a | b |\n|---|:-:|\n| *c* | `d` |\n| e |\n": "<div><table><thead><tr><th>a</th>"
    "<th>b</th></tr></thead><tbody><tr><td><em>c</em></td><td><code>d</code></td></tr>"
    "<tr><td>e</td><td></td></tr></tbody></table></div>",
    "| a | b |\nc": "<p>| a | b |</p><p>c</p>",
    "[a *b*](https://x.org/y_(z))": '<p><a href="https://x.org/y_(z)">a <em>b</em></a>'
    "<bdi>https://x.org/y_(z)</bdi></p>",
    "<mailto:a@x.org> ![b](http://x.org)": '<p><a href="mailto:a@x.org">mailto:a@x.org</a> '
    '<a href="http://x.org/">b</a><bdi>http://x.org</bdi></p>',
    '[a](https://x.org "t") [b] (c)': '<p><a href="https://x.org/">a</a>'
    "<bdi>https://x.org</bdi> [b] (c)</p>",
    "&lt; <b> &amp;": "<p>&amp;lt; &lt;b&gt; &amp;amp;</p>",
}
BAD_LINKS = [
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    "data:text/html,x",
    "vbscript:x",
    "//x.org",
    "/v1",
    "file:///etc/passwd",
    "blob:https://x.org/1",
    "https:x.org",
    "http://",
    "java\tscript:x",
    "https://bank.org@x.org",
    "https://x.org/\u202egro.knab",
    "\x01javascript:x",
    "x.org",
]
N = 100_000
HOSTILE = {
    **{sign * 2 + " run": sign * N for sign in "*_[]>`~<|#-+!(\\1 \n"},
    **{
        repr(part): part * (N // len(part))
        for part in (
            "*a ",
            "*a",
            "a* ",
            "**a*",
            "_a ",
            "[a](",
            "[a",
            "](",
            "![",
            "`a``b",
            "<http://",
            "> ",
            "- ",
            "1. ",
            "  ",
            "\\*",
            "***a ",
            "~~a",
            "[*a](b)",
            "```\n",
            "~~~\n```\n",
            "- a\n",
            "> a\n",
            "|-",
            "|a|\n|-|\n",
            "# a\n",
            "a\n\n",
            "[a](http://x.org/(",
            "`",
            "<a",
            "*_~`[<",
            " * ",
            "- - ",
            "-\n",
            "1.\n\n",
            ">>\n",
            "    - a\n",
            "|\n",
            "[a](http://x.org) ",
            "(((",
            "a|b\n",
        )
    },
    "deep list": "".join(" " * 2 * i + "- a\n" for i in range(440)),
    "lengths of ticks": "".join("`" * i + " " for i in range(1, 440)),
    "wide table": "|a" * 9000 + "\n" + "|-" * 9000 + "\n" + "|b" * 9000,
}
EVIL = """# <script>pwned = 1</script>
<img src=x onerror="pwned=1"> <svg/onload=pwned=1> <iframe srcdoc="<script>parent.pwned=1</script>">
[a](javascript:pwned=1) [b](http://x.org" onclick="pwned=1) <javascript:pwned=1>
![i](http://evil.test/x.png) ![j](data:image/svg+xml,<svg onload=pwned=1>)
```"><script>pwned=1</script>
</code></pre><script>pwned=1</script>
```
| <style>*{display:none}</style> | `<b onclick=pwned=1>` |
|---|---|
| [k](https://x.org/"><script>pwned=1</script>) | </td></table><script>pwned=1</script> |
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with serving() as served, browser(tmp_path_factory.mktemp("profile")) as opened:
        show(opened, served.url)
        opened.url = served.url
        yield opened


def some_text(chance):
    """Markdown at random: signs, words and line ends."""
    parts = [
        "*",
        "**",
        "***",
        "_",
        "__",
        "~~",
        "`",
        "``",
        "[",
        "]",
        "](http://x.org/a)",
        "(",
        ")",
        "!",
        "<",
        "<http://x.org>",
        ">",
        "> ",
        "- ",
        "-",
        "---",
        "* ",
        "1. ",
        "2) ",
        "1",
        "#",
        "## ",
        "|",
        " | ",
        "|--|--|",
        "```",
        "```py",
        "~~~",
        "\\",
        "\n",
        "\n",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " ",
        "  ",
        "    ",
        "\t",
        "a",
        "сөз",
        "long words of a line",
        "བོད་",
        "😀",
        "&lt;",
        "<b>",
    ]
    return "".join(chance.choices(parts, k=chance.randint(1, 60)))


@pytest.mark.parametrize("source", CASES)
def test_what_markdown_becomes(window, source):
    assert window.run(RENDER + SEEN, source, []) == CASES[source]


def test_an_answer_says_its_source_and_is_the_same_in_one_piece_or_in_many(window):
    """So a token has its place in the page, whatever is hidden; and only the open block changes."""
    chance = random.Random(3)
    texts = [*CASES, EVIL, *(some_text(chance) for _ in range(400))]
    compare = """
    const step = (text, cuts) => {
      const view = { body: textBody("", { dir: "ltr" }), grown: nothingGrown() };
      for (const cut of cuts) grow(view, text.slice(0, cut), false);
      grow(view, text, true);
      return view.body;
    };
    const wrong = [];
    for (const [text, cuts] of arguments[0]) {
      const [whole, parts] = [step(text, []), step(text, cuts)];
      const same = whole.innerHTML === parts.innerHTML;
      if (whole.textContent !== text || !same) wrong.push([text, whole.innerHTML, parts.innerHTML]);
    }
    return wrong"""
    units = [len(text.encode("utf-16-le")) // 2 for text in texts]
    steps = [
        [text, sorted(chance.sample(range(n + 1), chance.randint(1, n + 1)))]
        for text, n in zip(texts, units, strict=True)
    ]
    assert window.run(compare, steps) == []
    each = [[text, list(range(n))] for text, n in zip(texts, units, strict=True)]
    assert window.run(compare, each) == []


@pytest.mark.parametrize("address", BAD_LINKS)
def test_a_link_leads_to_the_web_or_to_a_mailbox_and_nowhere_else(window, address):
    for source in (f"[a]({address})", f"<{address}>", f"![a]({address})"):
        assert window.run(RENDER + "return view.body.querySelectorAll('a').length", source, []) == 0


def test_a_link_says_where_it_leads_and_tells_nothing_of_this_page(window):
    found = window.run(
        RENDER + "const a = view.body.querySelector('a');"
        "return [a.href, a.rel, a.target, a.title, view.body.querySelector('.target').textContent]",
        "[my bank](https://аpple.com/x)",
        [],
    )
    address = "https://xn--pple-43d.com/x"
    assert found == [
        address,
        "noopener noreferrer",
        "_blank",
        address,
        "https://аpple.com/x",
    ]


def test_no_answer_runs_a_script_or_loads_anything(window):
    window.requests()
    show(window, window.url, turns=[traced(EVIL, 3), traced(EVIL * 3, 50)])
    assert window.run("return typeof pwned") == "undefined"
    tags = window.run(
        "return [...new Set([...document.querySelectorAll('.answer .text *')].map(e => e.tagName))]"
    )
    assert (
        " ".join(sorted(tags)) == "A BDI BUTTON CODE DIV H3 P PRE SPAN TABLE TBODY TD TH THEAD TR"
    )
    names = window.run(
        """return [...new Set([...document.querySelectorAll(".answer .text *")]
          .flatMap((e) => e.getAttributeNames()))].sort()"""
    )
    assert names == [
        "aria-label",
        "class",
        "dir",
        "hidden",
        "href",
        "rel",
        "scope",
        "target",
        "title",
        "type",
    ]
    assert [url for url, _, _ in window.requests() if not url.startswith(window.url)] == []
    assert [e for e in window.log("browser") if "favicon" not in e["message"]] == []


@pytest.mark.parametrize("name", HOSTILE)
def test_long_hostile_text_is_shown_in_bounded_work(window, name):
    """What is quadratic does not end within the browser's limit for a script: 30 s."""
    text = HOSTILE[name]
    said, depth = window.run(
        RENDER
        + """
        let depth = 0;
        for (const e of view.body.querySelectorAll("*")) {
          let n = 0;
          for (let up = e; up !== view.body; up = up.parentElement) n++;
          depth = Math.max(depth, n);
        }
        return [view.body.textContent === text, depth]""",
        text,
        [],
    )
    assert said and depth < 60
    part = text[: N // 5]
    said, written = window.run(
        RENDER + "return [view.body.textContent === text, view.grown.nWritten]",
        part,
        list(range(0, len(part), 40)),
    )
    # Each block is written again once it grew by an eighth: nine times its length in all.
    assert said and written < 12 * len(part) + 2000 * 60


def test_tokens_keep_their_places_through_markdown(window):
    text = (
        "## Тақырып\n\n- **бір** `код`\n- [сілтеме](https://x.org)\n\n| а | ә |\n|--|--|\n| б | в |"
    )
    show(window, window.url, turns=[traced(text, 4)])
    marks = window.run("return turns[0].view.marks.map((m) => m.range.toString())")
    pieces = window.run("return turns[0].answer.pieces.map((p) => p.text)")
    assert marks == pieces and "".join(marks) == text
    x, y = window.run(
        """const r = document.querySelector(".answer strong").getBoundingClientRect();
        return [r.x + r.width / 2, r.y + r.height / 2]"""
    )
    window.point(x, y)
    assert window.run("return $('card').hidden") is False
    grown = window.run(
        """const turn = { answer: { text: "", pieces: [], end: null } };
        turn.view = { body: element("div"), grown: nothingGrown(), n: 0, covered: 0, marks: [] };
        for (const piece of turns[0].answer.pieces) {
          turn.answer.text += piece.text;
          turn.answer.pieces.push(piece);
          unpaintFrom(turn, grow(turn.view, turn.answer.text, false));
          paint(turn);
        }
        turn.answer.end = {};
        unpaintFrom(turn, grow(turn.view, turn.answer.text, true));
        paint(turn);
        const found = turn.view.marks.map((m) => m.range.toString());
        unpaint(turn);
        return found"""
    )
    assert grown == pieces


def test_code_has_a_button_that_copies_it_without_what_is_around_it(window):
    code = "a = 1\n\nif a:\n    b\n"
    quoted = "".join(f"> {line}\n" for line in f"```py\n{code}```".split("\n"))
    show(window, window.url, turns=[traced(quoted, 9)])
    window.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite"], origin=window.url)
    assert (
        window.run("return getComputedStyle($('turns').querySelector('.copy'), '::before').content")
        == '"Copy the code"'
    )
    window.click(".copy")
    window.wait("return $('status').textContent === 'Copied'")
    assert window.run("return navigator.clipboard.readText()") == code
