"""The page of the server: the files of `page/`, joined into the one document that is sent."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "page"
_STYLE = re.compile(r'<link rel="stylesheet" href="([\w./-]+)">\n')
_SCRIPT = re.compile(r'<script src="([\w./-]+)"></script>\n')


@cache
def document() -> tuple[bytes, str]:
    """The document, and the Content-Security-Policy under which it is sent.

    page.html names its style and its scripts as a browser would read them. They become one
    <style> and one <script>, and the policy lets only these two run, by their hashes. The document
    asks only this server, and no other page may show it in a frame. Raises OSError.
    """
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    style = "\n" + "".join(map(_read, _STYLE.findall(html)))
    script = '\n"use strict";\n' + "\n".join(map(_read, _SCRIPT.findall(html)))
    html = _in_place(html, _STYLE, f"<style>{style}</style>\n")
    html = _in_place(html, _SCRIPT, f"<script>{script}</script>\n")
    policy = (
        f"default-src 'self'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _in_place(html: str, pattern: re.Pattern[str], joined: str) -> str:
    """`joined` where the first match is, and no other match."""
    first = pattern.search(html)
    assert first is not None
    rest = pattern.sub("", html[first.end() :])
    return html[: first.start()] + joined + rest


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
