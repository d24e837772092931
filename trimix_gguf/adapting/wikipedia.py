"""Wikipedia's XML dumps: pages as plain text, read as a stream."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from trimix_gguf.errors import DataError

_LONGEST_PAGE = 2_000_000  # characters; beyond it lies no article
_GONE = re.compile(
    r"<!--.*?-->"
    r"|<ref[^<>]*/>"
    r"|<(ref|math|gallery|timeline|syntaxhighlight|source|nowiki|score|templatestyles)\b[^<>]*>"
    r".*?</\1>",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_OUTER_LINK = re.compile(r"\[(?:https?:)?//[^\s\]]*\s?([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_QUOTES = re.compile(r"'{2,}")
_SWITCH = re.compile(r"__[A-Z]+__")
_DEEPEST = 12  # nested templates and links


def read_pages(raw: IO[bytes], file: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of every article; raises DataError where the file is not a dump."""
    root: ElementTree.Element | None = None
    title, space, text, redirects, n_pages = "", "", "", False, 0
    try:
        for event, element in ElementTree.iterparse(raw, events=("start", "end")):
            if root is None:
                root = element
            name = element.tag.rpartition("}")[2]
            if event == "start":
                continue
            if name == "title":
                title = element.text or ""
            elif name == "ns":
                space = element.text or ""
            elif name == "redirect":
                redirects = True
            elif name == "text":
                text = element.text or ""
            elif name == "page":
                n_pages += 1
                if space == "0" and not redirects and 0 < len(text) <= _LONGEST_PAGE:
                    yield title, plain_text(text)
                text, redirects = "", False
                root.clear()  # else the whole dump would stay in memory
    except ElementTree.ParseError as error:
        raise DataError(f"{file} is not whole XML ({error}); get the dump again") from None
    if not n_pages:
        raise DataError(f"{file} holds no <page>; expected a dump named *-pages-articles.xml.bz2")


def plain_text(markup: str) -> str:
    """Wiki markup -> paragraphs: no templates, tables, notes, headings or lists of links."""
    text = _GONE.sub("", markup)
    text = _repeated(_TEMPLATE, "", text)
    text = _repeated(_TABLE, "", text)
    for _ in range(_DEEPEST):
        text, n_found = _LINK.subn(_link_text, text)
        if not n_found:
            break
    text = _OUTER_LINK.sub(r"\1", text)
    text = html.unescape(_TAG.sub("", text))
    text = _SWITCH.sub("", _QUOTES.sub("", text))
    lines = (_line(line) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _repeated(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """Replace the innermost first."""
    for _ in range(_DEEPEST):
        text, n_found = pattern.subn(replacement, text)
        if not n_found:
            break
    return text


def _link_text(link: re.Match[str]) -> str:
    target, _, shown = link[1].partition("|")
    if ":" in target.lstrip(":"):  # a file, a category, the same page in another language
        return ""
    return shown.rpartition("|")[2] or target.lstrip(":")


def _line(line: str) -> str:
    """A line of text without the marks of lists; '' for headings and rests of tables."""
    line = line.strip()
    if line.startswith(("=", "|", "!", "{", "}")):
        return ""
    return line.lstrip("*#:; ").strip()
