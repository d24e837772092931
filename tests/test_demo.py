"""trimix demo, a newcomer's first command; and nano, which is named a toy wherever it is met."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import httpx
import pytest
from conftest import ROOT
from served import serving
from test_cli import one_line_error
from test_help import parse

from trimix_gguf import Weights, generate, score
from trimix_gguf.choosing.selection import SINGLE
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

NAMES = ["large_ins", "small_cpt", "small_base", "mix"]
ABOUT = TrioFile.read(NANO / "trio.toml").description


def shown(trimix, *arguments):
    result = trimix("demo", *arguments)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


@pytest.fixture
def own_trio(tmp_path, nano_files):
    """Write a trio file of nano's models, and give its folder."""

    def write(**settings):
        models = {role: ModelEntry(str(path)) for role, path in nano_files.items()}
        TrioFile(tmp_path, "own", models, n_ctx=512, **settings).write()
        return tmp_path

    return write


def test_each_model_and_the_mix_answer_a_text_and_a_question(trimix):
    started = time.perf_counter()
    text = shown(trimix)
    assert time.perf_counter() - started < 10
    assert "\x1b" not in text and text == shown(trimix)
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    for kind in ("text", "question"):
        form = rf"^{kind} .*perplexity  answer\n((?:\S.*\n)+?)weights: (.*)$"
        table = re.search(form, text, re.M)
        rows = [re.match(r"(\w+) +(\d+\.\d\d)  \S", line) for line in table[1].splitlines()]
        assert [row[1] for row in rows] == NAMES
        perplexities = [float(row[2]) for row in rows]
        assert perplexities[-1] == min(perplexities)
        assert re.match(r"alpha \S+, beta \S+; a (text|question)[ ;]", table[2])


def test_its_numbers_are_those_of_score_and_generate(trimix, trio):
    report = json.loads(shown(trimix, "--json"))
    assert list(report) == ["trio", "about", "text", "question"]
    assert report["trio"] == "nano" and report["about"] == ABOUT
    assert report["text"]["weights"]["reason"] == "a text that goes on; lowest perplexity"
    assert report["question"]["weights"]["reason"].startswith("a question; none of the models")
    for kind in ("text", "question"):
        one = report[kind]
        weights = Weights(one["weights"]["alpha"], one["weights"]["beta"])
        scored = score(trio, trio.prompt(one["prompt"]), also=[weights])
        for name, w in {**SINGLE, "fused": weights}.items():
            answer = one["answers"][name]
            assert answer["perplexity"] == pytest.approx(scored.perplexity(w), rel=1e-3)
            if name != "fused":
                said = generate(trio, one["prompt"], weights=w, temperature=0, max_tokens=24)
                assert answer["text"] == said.text


def test_the_next_commands_are_there(trimix, own_trio):
    folder = own_trio(languages=("kk",))
    for arguments in ((), ("--trio", folder)):
        _, _, told = shown(trimix, *arguments).partition("next:\n")
        commands = [re.split(r"  +", line.strip())[0] for line in told.splitlines()]
        assert len(commands) >= 4
        for command in commands:
            words = shlex.split(command)[1:]
            parse(words)
            assert words[0] in ("list", "help") or tuple(words[1:]) == tuple(map(str, arguments))


def test_the_trios_own_mix_is_shown(trimix, own_trio):
    text = shown(trimix, "--trio", own_trio(weights=Weights(0.1, 0.9), languages=("kk",)))
    assert text.count("weights: alpha 0.1, beta 0.9; fixed by the trio") == 2
    masked = json.loads(shown(trimix, "--trio", own_trio(method="contrastive"), "--json"))
    assert masked["text"]["answers"]["fused"]["perplexity"] is None
    by_answers = shown(trimix, "--trio", own_trio(method="ppl-answers"))
    assert by_answers.count("; a text that goes on; lowest perplexity\n") == 1
    by_entropy = shown(trimix, "--trio", own_trio(method="ent"))
    assert by_entropy.count("; lowest entropy of the first token (TriMix-ENT)\n") == 2


def test_texts_of_ones_own_and_a_trio_of_another_language(trimix, own_trio):
    folder = own_trio(languages=("ug",))
    told = trimix("demo", "--trio", folder)
    assert "language is ug; --text and --question" in told.stderr.decode()
    own = trimix("demo", "--trio", folder, "--text", "Астана", "--question", "2 + 2?", "--json")
    assert own.stderr == b""
    report = json.loads(own.stdout)
    assert [report[kind]["prompt"] for kind in ("text", "question")] == ["Астана", "2 + 2?"]
    assert "no such file" in one_line_error(trimix("demo", "--trio", "nowhere"))


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminal")
def test_on_a_terminal_the_table_has_its_width():
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    command = [sys.executable, "-m", "trimix_gguf.cli", "demo"]
    subprocess.run(command, env=environment, stdout=theirs, timeout=60, check=True)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "\x1b[1m" in seen and "perplexity" in seen
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen)
    tables = re.findall(r"^(?:text|question) .*?(?=^weights)", plain, re.M | re.S)
    assert len(tables) == 2 and all(len(line) <= 60 for t in tables for line in t.splitlines())


# -- nano is a toy ----------------------------------------------------------------------------


def test_nano_is_named_a_toy_where_it_is_met(trimix):
    """By one text, its trio file's. test_cli_chat.py and test_page.py look for it there."""
    assert "toy" in ABOUT and "`trimix list`" in ABOUT
    for command in (("list",), ("show", "nano"), ("demo",)):
        assert ABOUT in trimix(*command).stdout.decode(), command
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"nano: {ABOUT}." in readme
    with serving() as server:
        (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["trimix"]["description"] == ABOUT
