"""The page of the server as one document: what is joined, and under which policy it is sent."""

import base64
import hashlib
import re

import pytest

from trimix_gguf.server.document import FOLDER, document


def between(html, tag):
    return re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)


def test_the_page_is_one_document_and_its_policy_lets_only_its_own_parts_run():
    page, policy = document()
    html = page.decode()
    [style], [script] = between(html, "style"), between(html, "script")
    for part, name in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy
    assert "unsafe" not in policy and "default-src 'self'" in policy
    assert html.count("<script") == html.count("<style") == 1
    assert script.startswith('\n"use strict";\n') and script.rstrip().endswith("start();")


def test_every_file_of_the_page_is_in_the_document():
    html = document()[0].decode()
    files = [path for path in FOLDER.rglob("*.*") if path.suffix in (".js", ".css")]
    assert len(files) > 20
    for path in files:
        assert html.count(path.read_text(encoding="utf-8")) == 1, path


def test_the_document_asks_for_nothing_elsewhere():
    html = document()[0].decode()
    found = re.findall(r"""(?:src|href|url|import|action)\s*[=(]\s*["']?([^"'\s>)]+)""", html)
    assert [address for address in found if re.match(r"https?:|//", address)] == []
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
    ):
        assert word not in html


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.*")), ids=lambda path: path.name)
def test_files_of_the_page_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
