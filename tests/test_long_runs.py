"""Long words: std::regex in llama.cpp needs stack for each of their letters."""

import random
import subprocess
import sys

import pytest
from conftest import KAZAKH

from trimix_gguf.machine.native import MOST_RUN, cut_runs
from trimix_gguf.trio.trio import NANO

PROGRAM = """
import sys, threading
from trimix_gguf.machine.loading import Loading
from trimix_gguf.trio.model import Model
model = Model(sys.argv[1], Loading(n_ctx=64))
def go():
    for text in ("a" * 300_000, *(c * 40_000 for c in "ә 7.\\n")):
        ids = model.tokenize(text)
        assert b"".join(map(model.piece, ids)).decode() == text
threading.stack_size(1 << 20)  # as on Windows
thread = threading.Thread(target=go)
thread.start()
thread.join()
print("whole")
"""


@pytest.mark.parametrize("name", [b"bloom", b"qwen2"])
def test_a_long_word_does_not_end_the_process(tmp_path, name):
    """Bug: 30 kB of letters, a request of anyone, overflowed the stack of the server."""
    path = tmp_path / "model.gguf"
    path.write_bytes((NANO / "small_cpt.gguf").read_bytes().replace(b"qwen2", name))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == b"whole", done.stderr[-500:]


def test_texts_without_long_words_are_not_cut():
    for text in ("", KAZAKH * 1000, "a" * MOST_RUN, " " * MOST_RUN + "a" * MOST_RUN):
        assert cut_runs(text) == [text]


def test_long_words_are_cut_where_tokenizers_cut_too():
    rng = random.Random(0)
    for alphabet in ("ab", "a.", "ка, ", "कि", "7a-", "\n \t", "文字。"):
        text = "".join(rng.choices(alphabet, k=9000))
        parts = cut_runs(text)
        assert "".join(parts) == text
        for part in parts:
            assert all(len(word) <= MOST_RUN for word in part.split())
    word = "жақсы," * 1000
    assert all(part.startswith(",") for part in cut_runs(word)[1:])
    assert not any(part.startswith("\u093f") for part in cut_runs("कि" * 3000))
