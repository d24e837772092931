"""The edge of the process: closed streams, readers that leave, arguments that are no text."""

import errno
import os
import subprocess
import sys

import pytest
from test_cli import one_line_error

from trimix_gguf.cli import streams

pytestmark = pytest.mark.skipif(os.name == "nt", reason="closes streams as POSIX has them")
SHORT = ("generate", "Қазақ", "-n", "2", "--seed", "1")
BYTES = "Привет".encode("cp1251")  # a terminal that is not set to UTF-8


def run(*arguments, closed=(), **options):
    """trimix in a process with some of the numbers 0, 1, 2 closed, as a service may start it."""

    def close():
        for number in closed:
            os.close(number)

    piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "trimix_gguf", *arguments]
    # As it is by default: what is printed goes out later, and fails later.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    settings = piped | {"env": environment} | options
    return subprocess.run(command, preexec_fn=close, timeout=120, **settings)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("arguments", [("list",), SHORT], ids=lambda words: words[0])
def test_closed_streams_are_like_empty_ones(arguments, closed):
    """Bug: Python has None in their place, and a traceback followed."""
    done = run(*arguments, closed=closed)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert bool(done.stdout) == (1 not in closed)


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_closed_stdin_holds_no_prompt(command):
    one_line_error(run(command, closed=(0,)))


def test_a_chat_with_closed_stdin_ends_at_once():
    done = run("chat", closed=(0,))
    assert done.returncode == 0 and done.stdout == b"" and b"Traceback" not in done.stderr


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """Bug: the first file opened was number 2, and llama.cpp's log would have gone into it."""
    trace = tmp_path / "trace.jsonl"
    done = run(*SHORT, "--verbose", "--trace", str(trace), closed=(0, 1, 2))
    assert done.returncode == 0
    assert trace.read_bytes().startswith(b"{") and b"llama" not in trace.read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this device")
@pytest.mark.parametrize("arguments", [("list",), SHORT], ids=lambda words: words[0])
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdout=full)
    *notes, last = done.stderr.decode().splitlines()
    assert done.returncode == 1 and "No space left" in last and len(notes) <= 1


def test_a_reader_that_left_ends_the_command_without_a_word():
    reading, writing = os.pipe()
    os.close(reading)
    done = run("list", "--presets", stdout=writing)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


def test_windows_says_invalid_argument_of_a_reader_that_left(monkeypatch):
    gone = OSError(errno.EINVAL, "Invalid argument")
    assert not streams.reader_is_gone(gone)
    monkeypatch.setattr(sys, "platform", "win32")
    assert streams.reader_is_gone(gone)
    assert not streams.reader_is_gone(OSError(errno.EINVAL, "Invalid argument", "a file"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", BYTES),
        ("generate", "a", "--stop", BYTES),
        ("generate", "a", "--spans", BYTES, "]]"),
        ("generate", "-f", BYTES),
        ("check", BYTES, "x", "y"),
        ("show", BYTES),
    ],
    ids=lambda words: " ".join(w for w in words if isinstance(w, str)),
)
def test_arguments_that_are_not_utf_8_are_one_line(arguments):
    error = one_line_error(run(*arguments))
    assert r"'\xcf\xf0\xe8\xe2\xe5\xf2'" in error and "is not UTF-8" in error


def test_a_message_with_what_is_no_text_is_shown(tmp_path):
    """Bug: the message of a file under such a folder could not be printed: `lost sys.stderr`."""
    folder = os.fsencode(tmp_path) + b"/" + BYTES
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes no such name")
    bad = os.path.join(os.fsdecode(folder), "trios", "bad")
    os.makedirs(bad)
    with open(os.path.join(bad, "trio.toml"), "w", encoding="utf-8") as file:
        file.write("version = 7")
    environment = {**os.environ, "TRIMIX_HOME": os.fsdecode(folder)}
    assert "is newer" in one_line_error(run("show", "bad", env=environment))
    listed = run("list", env=environment)
    assert listed.returncode == 0 and b"is newer" in listed.stdout, listed.stderr


def test_a_trio_is_loaded_from_a_folder_of_any_name(tmp_path):
    """Bug: llama.cpp got the file's name in UTF-8, which this one is not."""
    for folder in ("Қазақша үлгілер".encode(), BYTES):
        home = os.path.join(os.fsencode(tmp_path), folder)
        try:
            os.mkdir(home)
        except OSError:
            pytest.skip("this file system takes no such name")
        environment = {**os.environ, "TRIMIX_HOME": os.fsdecode(home)}
        run("export", "nano", str(tmp_path / "nano.tar"), env=environment)
        run("import", str(tmp_path / "nano.tar"), "--name", "mine", env=environment)
        done = run(*SHORT, "--trio", "mine", env=environment)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_half_a_surrogate_pair_in_json_is_one_line(tmp_path):
    """JSON can spell what is no character; it reached the tokenizer."""
    questions = tmp_path / "s.jsonl"
    questions.write_text(r'{"question": "\ud800", "answer": "a"}', encoding="utf-8")
    arguments = ("--lang", "kk", "--tasks", str(questions), "--methods", "ppl")
    error = one_line_error(run("eval", *arguments, "-o", str(tmp_path / "run")))
    assert "s.jsonl:1" in error and r"\ud800" in error
    whole = r'{"question": "\ud83d\ude00?", "answer": "a", "exemplar": true}'
    questions.write_text(whole, encoding="utf-8")
    assert "each of its rows" in one_line_error(run("eval", *arguments, "-o", str(tmp_path)))


def test_json_that_is_nested_too_deep_is_one_line(tmp_path):
    questions = tmp_path / "s.jsonl"
    questions.write_text("[" * 100_000, encoding="utf-8")
    arguments = ("--lang", "kk", "--tasks", str(questions), "--methods", "ppl")
    assert "s.jsonl:1" in one_line_error(run("eval", *arguments, "-o", str(tmp_path / "run")))


def test_more_threads_than_llama_cpp_can_start_are_refused():
    """Bug: it ended the process by a signal."""
    assert "100000 threads" in one_line_error(run("generate", "a", "--threads", "100000"))


def test_what_a_file_says_is_printed_without_control_characters(trimix, tmp_path):
    """Bug: a name in a stranger's file could clear the terminal, or write to it."""
    (tmp_path / "config.json").write_text('{"architectures": ["\\u001b[2J\\u202eX"]}')
    done = trimix("convert", "hf", tmp_path, "-o", tmp_path / "x.gguf")
    assert done.returncode == 1 and b"\x1b" not in done.stderr
    assert b"is a \\x1b[2J\\u202eX, expected" in done.stderr


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_terminal_gets_no_control_characters_of_an_answer(trio, at_terminal):
    """Bug: `generate` sent them on, and a terminal obeys them; through a pipe nothing is lost."""
    model = trio.models["large_ins"]
    escape = next(i for i in range(trio.n_vocab) if model.piece(i) == b"\x1b")
    chosen = ("--logit-bias", f"{escape}=1000", "--weights", "1,0", "--temperature", "0")
    master, slave = os.openpty()
    try:
        stdout = slave if at_terminal else subprocess.PIPE
        done = run("generate", "Қазақ", "-n", "2", *chosen, stdout=stdout)
        os.write(slave, b"end")
        seen = done.stdout if done.stdout is not None else os.read(master, 1000)
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 0, done.stderr
    assert (b"\x1b" in seen) != at_terminal
