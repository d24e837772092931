"""The chat driven as a user would: lines through a pipe, and keys at a terminal."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import KAZAKH
from test_cli import one_line_error

from trimix_gguf import Trio, Weights
from trimix_gguf.answering.conversation import Conversation
from trimix_gguf.cli.chat import _Session
from trimix_gguf.trio.trio import NANO
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

# Without drafts, whose number goes by the time that batches take: near ties would fall by that too.
ANSWERS = ("-n", "8", "--seed", "5", "--threads", "1", "--speculative", "off")
pty = pytest.importorskip("pty", reason="needs terminals")


def lines(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


def in_python(*questions, template=None, **options):
    """The answers that the Python API gives with the same settings."""
    with Trio.nano(n_threads=1, chat_template=template) as trio:
        conversation = Conversation(trio, max_tokens=8, seed=5, speculative="off", **options)
        said = ["".join(r.text for r in conversation.say(q)) for q in questions]
    return [text.lstrip() for text in said]


def test_each_piped_line_is_answered_with_those_before_it_in_mind(trimix):
    result = trimix("chat", *ANSWERS, "--system", "Жүйе", stdin=lines(KAZAKH, "", "Қалайсыз?"))
    assert result.returncode == 0, result.stderr.decode()
    expected = in_python(KAZAKH, "Қалайсыз?", system="Жүйе")
    assert result.stdout.decode() == "".join(f"{text}\n" for text in expected)
    told = result.stderr.decode().splitlines()
    assert sum("weights: alpha" in line and "(auto)" in line for line in told) == 2
    assert "\x1b" not in result.stderr.decode() + result.stdout.decode()


def test_a_saved_chat_goes_on_in_another_process(trimix, tmp_path):
    path = tmp_path / "chat.json"
    whole = trimix("chat", *ANSWERS, stdin=lines(KAZAKH, f"/save {path}", "Қалайсыз?"))
    assert whole.returncode == 0 and whole.stdout.count(b"\n") == 2
    rest = trimix("chat", *ANSWERS, "--load", path, stdin=lines("Қалайсыз?"))
    assert whole.stdout.endswith(rest.stdout) and rest.stdout.strip()
    later = trimix("chat", *ANSWERS, stdin=lines(f"/load {path}", "Қалайсыз?", f"/save {path}"))
    assert later.returncode == 0 and later.stdout == rest.stdout
    saved = json.loads(path.read_text("utf-8"))
    assert [m["content"] for m in saved["messages"] if m["role"] == "user"] == [KAZAKH, "Қалайсыз?"]
    refused = trimix("chat", stdin=lines(f"/save {path}"))
    assert "exists already" in one_line_error(refused)


def test_commands_change_the_chat(trimix, tmp_path):
    path, told = tmp_path / "chat.json", tmp_path / "told.txt"
    told.write_text("Сен ақынсың.\n", encoding="utf-8")
    result = trimix(
        "chat", *ANSWERS,
        stdin=lines(
            KAZAKH, "/weights hold", "Бір", "/weights 0.1,0.9", "Екі", "/weights auto", "Үш",
            "/undo", "/edit Төрт", "/retry", f"/system @{told}", "//exit", f"/save {path}",
            "/reset", "/undo", "/help", "/exit", "never read",
        ),
    )  # fmt: skip
    out, notes = result.stdout.decode(), result.stderr.decode().splitlines()
    used = [re.search(r"alpha (\S+), beta (\S+) \((\w+)\)", n) for n in notes if "alpha" in n]
    used = [match.groups() for match in used]
    assert len(used) == 7 and used[0] == used[1]
    assert used[2] == ("0.1", "0.9", "fixed") and {u[2] for u in used[3:]} == {"auto"}
    assert "held" in out and "/retry" in out and "removed: Үш" in notes
    saved = json.loads(path.read_text("utf-8"))["messages"]
    assert saved[0] == {"role": "system", "content": "Сен ақынсың."}
    asked = [m["content"] for m in saved if m["role"] == "user"]
    assert asked == [KAZAKH, "Бір", "Төрт", "/exit"]
    assert result.returncode == 1 and notes[-1].startswith("trimix: nothing was said yet")


def test_why_names_the_models_of_the_mix(trimix):
    result = trimix("chat", *ANSWERS, "--weights", "0.1,0.9", stdin=lines(KAZAKH, "/why"))
    answer, header, *rows = result.stdout.decode().splitlines()
    assert header.split() == ["token", "large_ins", "small_cpt", "mix", "spoke"]
    tokens = rows[: rows.index("alpha 0.1, beta 0.9, 8 tokens")]
    assert len(tokens) == 8 and all(row.split()[-1] in header for row in tokens)
    assert "".join(row.split()[0] for row in tokens).replace("·", " ").strip() == answer.strip()
    shares = re.findall(r"(\d+) % of the pull", result.stdout.decode())
    assert sum(map(int, shares)) == 100


def test_mistakes_cost_a_line_each_and_the_chat_goes_on(trimix, tmp_path):
    wrong = ["/bogus", "/why", "/retry", "/save", "/load nowhere.json", "/weights much", "/undo x"]
    result = trimix("chat", *ANSWERS, stdin=lines(*wrong, "сөз " * 2000, KAZAKH))
    told = result.stderr.decode().splitlines()
    errors = [line for line in told if line.startswith("trimix: ")]
    assert len(errors) == len(wrong) + 1 and result.returncode == 1
    for error, words in zip(errors, ("/bogus", "no answer", "nothing", "FILE", "nowhere", "much",
                                     "takes no argument", "--n-ctx"), strict=True):  # fmt: skip
        assert words in error
    assert result.stdout.decode() == in_python(KAZAKH)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("--load", "nowhere.json"), b"", "nowhere.json"),
        (("--system", "@nowhere.txt"), b"", "nowhere.txt"),
        ((), b"\xff\xfe\xfa\n", "UTF-8"),
        (("--weights", "nan,1"), b"", "finite"),
        (("--trio", "nowhere"), b"", "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(trimix, arguments, stdin, words):
    assert words in one_line_error(trimix("chat", *arguments, stdin=stdin))


def test_a_name_that_no_file_can_have_costs_a_line(trimix):
    """Bug: a NUL in what was piped in ended the chat in a traceback."""
    wrong = ["/save a\0b", "/load a\0b", "/system @a\0b"]
    result = trimix("chat", stdin=lines(*wrong, "/help"))
    told = result.stderr.decode().splitlines()
    assert len(told) == len(wrong) and all("NUL" in line for line in told)
    assert b"/help" in result.stdout and result.returncode == 1


def test_a_file_of_the_home_folder_says_the_system_message(trimix, tmp_path, monkeypatch):
    """Bug: `/save ~/…` knew the home folder, `/system @~/…` did not; no shell expands that."""
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    (tmp_path / "told.txt").write_text("Сен ақынсың.\n", encoding="utf-8")
    commands = lines("/system @~/told.txt", "/save ~/chat.json")
    assert trimix("chat", "--system", "@~/told.txt", stdin=commands).returncode == 0
    saved = json.loads((tmp_path / "chat.json").read_text("utf-8"))["messages"]
    assert [message["content"] for message in saved] == ["Сен ақынсың."]


def test_nothing_to_say_is_no_error(trimix):
    result = trimix("chat")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert trimix("chat", "--bogus").returncode == 2


# -- a terminal -----------------------------------------------------------------------------


class Terminal:
    """A chat at a pseudo-terminal: keys in, what is seen out."""

    def __init__(self, *arguments, **environment):
        import fcntl
        import termios

        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "trimix_gguf.cli", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", **environment},
        )  # fmt: skip
        os.close(slave)
        self._raw, self._at = b"", 0

    def press(self, keys):
        os.write(self.master, keys.encode())

    def enter(self, keys, until):
        """Press keys and Enter at the prompt; back at it when `until` is seen."""
        self.skip()
        self.press(f"{keys}\n")
        self.wait_for(until)
        self.wait_for("\r\n> ")

    @property
    def seen(self):
        """What was written since the last skip(), without colours and the like."""
        text = self._raw[self._at :].decode("utf-8", "ignore")
        text = text.replace(">\b\x1b[2C", "> ")  # how the prompt is drawn
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)

    def skip(self):
        """Look only at what comes from now on."""
        self._at = len(self._raw)

    def wait_for(self, words, seconds=120, meanwhile=lambda: None):
        """Until these words are seen, or with "" anything; the test fails without.

        `meanwhile` is done at each second of silence: a signal may come just before it is waited
        for.
        """
        deadline = time.monotonic() + seconds
        while words not in self.seen or not self.seen.strip():
            assert time.monotonic() < deadline, f"no {words!r} in {self.seen!r}"
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self._raw += os.read(self.master, 65536)
                except OSError:  # Linux says so when the other side is closed
                    pytest.fail(f"ended without {words!r}: {self.seen!r}")
            else:
                meanwhile()

    def end(self, seconds=120):
        """Exit code, after all that was written has been read."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                ready = select.select([self.master], [], [], 1)[0]
                if ready and not os.read(self.master, 65536):
                    break
        return self.process.wait(60)


@pytest.fixture
def terminal():
    opened = []

    def start(*arguments, **environment):
        opened.append(Terminal(*arguments, **environment))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        os.close(one.master)


@pytest.fixture
def endless(trio):
    """Options that keep the models from ending an answer."""
    return [f"--logit-bias={i}=-100" for i in trio.end_of_generation]


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_lines_are_edited_by_letters_and_ctrl_d_leaves(terminal, endless, tmp_path, locale):
    path = tmp_path / "chat.json"
    chat = terminal(*ANSWERS, *endless, LC_ALL=locale)
    chat.wait_for("> ")
    chat.enter("Слемм\x7f" + "\x1b[D" * 3 + "ә" + "\x05!", "stopped after 8 tokens")
    chat.enter(f"/save {path}", "saved to")
    chat.enter("\x1b[A\x1b[A", "stopped after 8 tokens")  # two lines back in the history
    chat.enter(f"/save {path}", "saved to")
    chat.press("\x04")
    assert chat.end() == 0
    saved = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["content"] for m in saved[::2]] == ["Сәлем!", "Сәлем!"]


def test_a_message_may_have_several_lines_and_commands_are_completed(terminal, tmp_path):
    path = tmp_path / "chat.json"
    chat = terminal(*ANSWERS)
    chat.wait_for("> ")
    chat.enter("Сәлем,\x1b\rдосым", "weights:")
    chat.enter("\x1b[200~Екі\nжол\x1b[201~", "weights:")
    chat.skip()
    chat.press("/sa\t")
    chat.wait_for("/save")
    chat.enter(f" {path}", "saved to")
    saved = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["content"] for m in saved[::2]] == ["Сәлем,\nдосым", "Екі\nжол"]


def test_ctrl_c_stops_an_answer_and_not_the_chat(terminal, endless, tmp_path):
    path = tmp_path / "chat.json"
    chat = terminal("--n-ctx", 8192, "-n", 8000, "--weights", "0.1,0.9", *endless)
    chat.wait_for("> ")
    chat.skip()
    chat.press("typed in vain\x03")
    way_out = "Ctrl-D or /exit leaves; /help lists the commands\r\n> "
    chat.wait_for(way_out, meanwhile=lambda: chat.press("\x03"))
    for question in ("Сәлем", "Қалайсыз?"):
        chat.skip()
        chat.press(f"{question}\n")
        chat.wait_for("(fixed)\r\n")
        chat.skip()
        chat.wait_for("")
        chat.press("\x03")
        chat.wait_for("stopped; the text so far is kept")
        chat.wait_for("\r\n> ")
    chat.enter(f"/save {path}", "saved to")
    chat.press("/exit\n")
    assert chat.end() == 0
    saved = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["content"] for m in saved[::2]] == ["Сәлем", "Қалайсыз?"]
    assert all(m["content"] and m["ids"] for m in saved[1::2])


def test_ctrl_c_amid_decoding_waits_so_that_the_caches_stay(trio, monkeypatch, capsys):
    session = _Session(Conversation(trio, max_tokens=30, weights=Weights(0.1, 0.9), seed=1))
    session.by_hand = True
    model, n = trio.models["small_cpt"], 0

    def interrupted(entries, decode=model._decode):
        nonlocal n
        rows, n = decode(entries), n + 1
        if n == 5:
            signal.raise_signal(signal.SIGINT)
        return rows

    trio.forget()
    monkeypatch.setattr(model, "_decode", interrupted)
    session.answer(session.conversation.say, KAZAKH)
    assert "stopped; the text so far is kept" in capsys.readouterr().err
    (exchange,) = session.conversation.exchanges
    held = trio.ids["small_cpt"][-len(exchange.ids) :]
    assert exchange.ids and n < 30 and list(exchange.ids)[:-1] == held[1:]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_chat_begins_with_what_the_trio_is(terminal):
    chat = terminal()
    chat.wait_for("\n> ")
    about = TrioFile.read(NANO / "trio.toml").description
    assert chat.seen.startswith(f"nano: {about}\r\nCtrl-D or /exit leaves")
    chat.press("\x04")
    assert chat.end() == 0


def test_sigterm_ends_it(terminal):
    chat = terminal()
    chat.wait_for("\n> ")
    chat.process.terminate()
    assert chat.end() == 130


# -- real models ----------------------------------------------------------------------------


def test_real_models_chat(trimix, real_files, tmp_path):
    path = tmp_path / "chat.json"
    files = [x for role, p in real_files.items() for x in (f"--{role.replace('_', '-')}", p)]
    result = trimix(
        "chat", *files, "--n-ctx", 512, "-n", 24, "--temperature", 0, "--weights", "1,0",
        stdin=lines("What is the capital of France? One word.", "And of Italy?", f"/save {path}"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    first, second = result.stdout.decode().splitlines()
    assert "Paris" in first and "Rome" in second and "<|" not in first + second
    ids = [m["ids"] for m in json.loads(path.read_text("utf-8"))["messages"] if "ids" in m]
    assert len(ids) == 2 and all(ids)


def test_the_chat_template_of_a_trio_file_is_followed(trimix, tmp_path, nano_files):
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant> "
    models = {role: ModelEntry(str(path)) for role, path in nano_files.items()}
    tuning = TrioFile.read(NANO / "trio.toml").tuning
    TrioFile(tmp_path, "own", models, chat_template=template, tuning=tuning).write()
    result = trimix("chat", *ANSWERS, "--trio", tmp_path, "--n-ctx", 512, stdin=lines(KAZAKH))
    (own,) = in_python(KAZAKH, template=template)
    assert result.stdout.decode() == f"{own}\n" != f"{in_python(KAZAKH)[0]}\n"
