"""The page of `trimix serve` in a real browser: what it shows, to whom, in which script."""

import io
import re
import unicodedata

import pytest
from PIL import Image, ImageChops, ImageFilter
from served import serving
from visitor import (
    END,
    ESCAPE,
    KAZAKH,
    LEFT,
    MONGOLIAN,
    RIGHT,
    ROLES,
    TAB,
    TIBETAN,
    UYGHUR,
    ask,
    last_exchange,
    show,
    shown,
    traced,
)

from trimix_gguf.server.document import FOLDER


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture
def page(window, server):
    """The page as a newcomer sees it; in the end it has said nothing to the console."""
    show(window, server.url)
    yield window
    assert [e for e in window.log("browser") if "favicon" not in e["message"]] == []


# -- what each model said -------------------------------------------------------------------


def test_each_tokens_colour_is_its_models_shares_and_its_numbers_are_the_traces(page):
    ask(page, KAZAKH)
    _, _, _, tokens = last_exchange(page)
    marks = page.run(
        """const names = new Map([...CSS.highlights].map(([name, ranges]) => [ranges, name]));
        return turns[0].view.marks.map((m) => [m.range.toString(), names.get(m.highlight)])"""
    )
    assert "".join(text for text, _ in marks) == shown(page, "answer")
    assert [text for text, _ in marks] == [token["text"] for token in tokens]
    for (_, name), token in zip(marks, tokens, strict=True):
        p = [token["probabilities"].get(role, 0) for role in ROLES]
        parts = [int(n) for n in name.removeprefix("mix-").split("-")]
        assert sum(parts) == 6
        for n, share in zip(parts, p, strict=True):
            assert abs(n / 6 - share / sum(p)) <= 1 / 6

    def numbers(token):
        p = token["probabilities"]
        return [page.run("return percent(arguments[0])", p[r]) for r in (*ROLES, "fused") if r in p]

    def card():
        return page.run("return [...document.querySelectorAll('#card td')].map(c => c.textContent)")

    x, y = page.run(
        """const r = turns[0].view.marks[4].range.getClientRects()[0];
        return [r.x + r.width / 2, r.y + r.height / 2]"""
    )
    page.point(x, y)
    assert card() == numbers(tokens[4])
    page.press(ESCAPE)
    assert page.run("return document.getElementById('card').hidden")
    page.run("document.querySelector('.answer .text').focus()")
    page.press(END, LEFT)
    assert card() == numbers(tokens[-2])
    assert all(n in page.run("return $('status').textContent") for n in numbers(tokens[-2]))
    page.click("summary")
    page.wait("return document.querySelector('[type=range]')")
    page.type("[type=range]", RIGHT * 3)
    said = page.run("return document.querySelector('[type=range]').getAttribute('aria-valuetext')")
    assert all(number in said for number in numbers(tokens[3]))


def test_colours_go_and_come_and_move_no_letter(window, server):
    show(window, server.url, turns=[traced(UYGHUR, 2), traced(UYGHUR, 99)])

    places = """return turns.map((turn) => {
        const text = document.createTreeWalker(turn.view.body, NodeFilter.SHOW_TEXT).nextNode();
        const range = new Range();
        return [...text.data].map((_, i) => {
          range.setStart(text, 0);
          range.setEnd(text, i + 1);
          return [...range.getClientRects()].map((r) => [r.width, r.left]) }) })"""
    found, pictures = [], []
    for colours in (True, False):
        found += window.run(places)
        pictures.append(
            Image.open(io.BytesIO(window.screenshot())).convert("L").crop((0, 0, 1280, 690))
        )
        colourful = window.run("return document.documentElement.classList.contains('coloured')")
        assert colourful == colours
        window.click("#colours")
    # Cut in twos or whole, coloured or not, every letter has its place.
    cut, whole, cut_plain, whole_plain = found
    assert cut == whole == cut_plain == whole_plain
    # Nor is there ink where there was none, but for what smooths its edges.
    ink, grey = ([p.point(lambda v, n=n: 255 * (v < n)) for p in pictures] for n in (60, 120))
    for one, other in ((ink[0], grey[1]), (ink[1], grey[0])):
        assert one.getbbox() is not None
        assert ImageChops.subtract(one, other.filter(ImageFilter.MaxFilter(3))).getbbox() is None


def test_pieces_never_part_a_character(page):
    """Bytes of one character, and the stacked letters of Tibetan, are one piece: the product."""
    pieces = page.run(
        """const answer = {pieces: []};
        const letters = [...arguments[0]].map((letter) => [letter, 0.5]);
        for (const [text, p] of [["a", 0.5], ["", 0.5], ["", 0.25], ["қ", 0.5], ...letters])
          addToken(answer, {text, probabilities: {fused: p}});
        return answer.pieces.map(({text, p}) => [text, p.fused])""",
        TIBETAN,
    )
    assert pieces[:2] == [["a", 0.5], ["қ", 0.5 * 0.25 * 0.5]]
    assert "".join(text for text, _ in pieces[2:]) == TIBETAN
    for text, p in pieces[2:]:
        assert not unicodedata.category(text[0]).startswith("M") and p == 0.5 ** len(text)


def test_the_surface_marks_the_weights_that_were_said_where_perplexity_is_lowest(page):
    ask(page, KAZAKH)
    _, _, mix, _ = last_exchange(page)
    page.click("summary")
    page.wait("return document.querySelector('svg')")
    inside = page.run(
        """const mark = document.querySelector(".chosen circle").getBoundingClientRect();
        const [x, y] = [mark.x + mark.width / 2, mark.y + mark.height / 2];
        return [...document.querySelectorAll(".cell")].filter((cell) => {
          const r = cell.getBoundingClientRect();
          return r.left < x && x < r.right && r.top < y && y < r.bottom
        }).map((c) => [+c.dataset.alpha, +c.dataset.beta, +c.getAttribute("fill-opacity")])"""
    )
    weights, grid = mix["weights"], mix["grid"]
    assert [cell[:2] for cell in inside] == [[weights["alpha"], weights["beta"]]]
    opacities = page.run(
        "return [...document.querySelectorAll('.cell')].map((c) => +c.getAttribute('fill-opacity'))"
    )
    flat = [value for row in grid["mean_nll"] for value in row]
    assert len(opacities) == len(flat) and inside[0][2] == max(opacities)
    order = sorted(range(len(flat)), key=lambda i: flat[i])
    assert all(opacities[i] >= opacities[j] for i, j in zip(order, order[1:], strict=False))
    cells = page.run(
        """return [...document.querySelectorAll(".why tbody tr")].slice(0, 4)
          .map((row) => [row.dataset.name, row.lastChild.textContent])"""
    )
    written = {
        name: page.run("return number(arguments[0])", p) for name, p in mix["perplexity"].items()
    }
    assert dict(cells) == written


# -- languages and scripts ------------------------------------------------------------------


def test_every_language_has_all_words_with_the_same_places_and_says_who_checked_it(page):
    texts = page.run("return TEXTS")
    assert page.run("return Object.keys(TEXTS)") == [
        "en",
        "kk",
        "ug",
        "bo",
        "mn",
        "bn",
        "ta",
        "te",
        "or",
    ]
    english = texts["en"]
    for code, words in texts.items():
        assert words.keys() == english.keys(), code
        assert words["reviewed"] == (code == "en") and len(words["examples"]) == 3
        for name, text in words.items():
            if isinstance(text, str) and name != "dir":
                assert text.strip() and (code == "en" or text != english[name]), (code, name)
                assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", english[name]))
        source = (FOLDER / "texts" / f"{code}.js").read_text(encoding="utf-8")
        assert source.startswith("// No speaker has checked") == (not words["reviewed"])
        page.run("setLanguage(arguments[0])", code)
        told = page.run("return $('unreviewed').hidden ? null : $('unreviewed').textContent")
        assert told == (None if words["reviewed"] else words["unreviewed"])
        assert page.run("return [document.documentElement.lang, $('send').textContent]") == [
            code,
            words["send"],
        ]


def test_uyghur_turns_the_page_round_and_is_remembered(page, server):
    texts = page.run("return TEXTS")
    assert len({frozenset(texts[name]) for name in texts}) == 1
    page.run("const s = $('language'); s.value = 'ug'; s.dispatchEvent(new Event('change'))")
    for _ in range(2):
        assert (
            page.run("return document.documentElement.dir + document.documentElement.lang")
            == "rtlug"
        )
        assert page.text("#send") == texts["ug"]["send"]
        assert page.run("return getComputedStyle($('question')).direction") == "rtl"
        page.open(server.url)
    page.type("#question", "Hello")
    assert page.run("return getComputedStyle($('question')).direction") == "ltr"


def test_each_message_has_the_direction_and_setting_of_its_script(window, server):
    show(window, server.url, turns=[traced(t, 3) for t in (KAZAKH, UYGHUR, TIBETAN, MONGOLIAN)])
    styles = window.run(
        """return [...document.querySelectorAll(".answer .text")].map((t) => {
          const s = getComputedStyle(t); return [s.direction, s.writingMode] })"""
    )
    flat = "horizontal-tb"
    assert styles == [["ltr", flat], ["rtl", flat], ["ltr", flat], ["ltr", "vertical-lr"]]


# -- narrow, readable, reachable ------------------------------------------------------------


MARKDOWN = f"""# {UYGHUR}

```py
{"code" * 60}
```

| {" | ".join("abc")} |
|-|-|-|
| {" | ".join([KAZAKH] * 3)} |

- [{KAZAKH}](https://example.org/{"a" * 99})
  1. {"b" * 99} `{"c" * 99}`
"""


@pytest.mark.parametrize("width", [320, 390])
@pytest.mark.parametrize("language", ["en", "kk", "ug", "bo", "mn", "bn", "ta", "te", "or"])
def test_nothing_sticks_out_of_a_telephone(window, server, language, width):
    texts = ["a" * 300, UYGHUR * 3, MONGOLIAN * 9, MARKDOWN]
    kept = [traced(text, 9 - i) for i, text in enumerate(texts)]
    kept.append({**kept[0], "beside": kept[1], "leftOut": 2})
    for turns in ([], kept):
        show(window, server.url, turns=turns, language=language)
        window.resize(width, 640, touch=True)
        for state in (
            "",
            "turns.flatMap(parts).forEach((t) => t.view.why.open = true)",
            "openSettings()",
            "$('settings').close(); openChats(); deleteChats(keptIds(), 'deletedAll')",
            "$('chats').close(); bar('server', 'away'); bar('unkept', 'storageFull')",
        ):
            window.run(state)
            out = window.run(
                """const [limit] = arguments;
                const out = [...document.querySelectorAll("body *")].filter((e) => {
                  const {width, left, right} = e.getBoundingClientRect();
                  const isOut = left < -1 || right > limit + 1;
                  return width > 1 && isOut && !e.closest(".unseen") });
                const wide = document.documentElement.scrollWidth;
                return [wide, out.map((e) => e.outerHTML.slice(0, 90))]""",
                width,
            )
            assert out == [width, []], state


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page):
    ask(page, KAZAKH)
    page.click("summary")
    page.wait("return document.querySelector('[type=range]')")
    choose = "document.querySelector('[value={}]').click()"
    for state in ("", "openSettings()", choose.format("fixed"), choose.format("alone")):
        page.run(state)
        nodes = page.cdp("Accessibility.getFullAXTree")["nodes"]
        kinds = {
            "button",
            "textbox",
            "combobox",
            "checkbox",
            "radio",
            "slider",
            "spinbutton",
            "image",
        }
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in kinds
        ]
        assert len(named) >= 5 and all(name.strip() for _, name in named), named
    page.press(ESCAPE)
    page.run("window.scrollTo(0, 0); document.activeElement.blur()")
    reached = set()
    for _ in range(20):
        page.press(TAB)
        reached.add(
            page.run(
                """const e = document.activeElement;
                if (e === document.body) return "none";
                const seen = getComputedStyle(e).outlineStyle !== "none";
                return seen ? e.id || e.type || e.tagName + e.className : "unseen " + e.outerHTML"""
            )
        )
    wanted = {"language", "new", "open-settings", "range", "question", "send", "colours", "SUMMARY"}
    assert wanted <= reached and not [name for name in reached if name.startswith("unseen")]


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_is_behind_it(window, server, dark):
    """WCAG's AA: 4.5 to 1, also on each of the colours that a token can have."""
    show(window, server.url, turns=[traced(KAZAKH, 3)])
    window.resize(1280, 800, dark=dark)
    window.run("openSettings(); turns[0].view.why.open = true")
    poor = window.run(
        """const read = (c) => c.match(/[\\d.]+/g).map(Number);
        const over = ([r, g, b, a = 1], under) =>
          [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = (c) => [0.2126, 0.7152, 0.0722]
          .reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
        const contrast = (a, b) => {
          const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
          return (x + 0.05) / (y + 0.05); };
        const behind = (e) => {
          const own = read(getComputedStyle(e).backgroundColor);
          return own[3] === 0 ? behind(e.parentElement) : over(own, [0, 0, 0]); };
        const poor = [], words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        let n = 0;
        for (let text; (text = words.nextNode());) {
          const e = text.parentElement;
          if (!text.data.trim() || !e.checkVisibility()) continue;
          if (e.closest("script, svg, .unseen")) continue;
          const ink = read(getComputedStyle(e).color), ratio = contrast(ink, behind(e));
          n++;
          if (ratio < 4.5) poor.push([text.data, ratio]);
        }
        const body = document.querySelector(".answer .text");
        const ink = read(getComputedStyle(body).color);
        for (const {style, selectorText} of document.adoptedStyleSheets[0].cssRules) {
          const ratio = contrast(ink, over(read(style.backgroundColor), behind(body)));
          n++;
          if (ratio < 4.5) poor.push([selectorText, ratio]);
        }
        return n > 60 ? poor : n"""
    )
    assert poor == []
