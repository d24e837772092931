"""Windows and macOS, as far as Linux can tell: our code without the names that they lack.

`other_system.py` takes them away. What no run reaches is held by reading the code itself.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import KAZAKH
from hf_checkpoint import checkpoint_folder
from other_system import LINUX_ONLY, MODULES, NAMES
from served import serving

from trimix_gguf.machine.files import put_in_place

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "helpers" / "other_system.py"
OURS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("trimix_gguf", "convert")
    for path in (ROOT / folder).rglob("*.py")
    if "nano" not in path.parts  # how the shipped models were trained, on Linux
)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems are their own test")


def on(system, *arguments):
    return [sys.executable, str(SCRIPT), system, *map(str, arguments)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run commands one after the other in one process of that system; each must succeed."""
    monkeypatch.setenv("TRIMIX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path / "cache"))

    def results(system, *commands):
        asked = [{"arguments": [*map(str, words)], "stdin": text} for words, text in commands]
        done = subprocess.run(on(system, json.dumps(asked)), capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        answers = json.loads(done.stdout)
        for (words, _), answer in zip(commands, answers, strict=True):
            assert answer["code"] == 0, f"{words}: {answer['err']}{answer['trace']}"
        return [answer["out"] for answer in answers]

    return results


def test_commands_run_on_windows(run, tmp_path):
    few = ("-n", "2", "--seed", "1", "--threads", "2")
    kept = (*few, "--prompt-cache", tmp_path / "kept", "--trace", tmp_path / "trace.jsonl")
    chat, schema = tmp_path / "chat.json", tmp_path / "schema.json"
    schema.write_text('{"enum": ["a", "b"]}', encoding="utf-8")
    out = run(
        "win32",
        (("--help",), ""),
        (("--version",), ""),
        (("list",), ""),
        (("show", "nano"), ""),
        (("doctor",), ""),
        (("plan",), ""),
        (("generate", KAZAKH, *kept), ""),
        (("generate", KAZAKH, *kept), ""),
        (("generate", *few, "--json-schema", schema), KAZAKH),
        (("score", "--threads", "2"), KAZAKH),
        (("chat", *few), f"Сәлем\n/save {chat}\n/load {chat}\n"),
        (("run", "-", "-o", tmp_path / "answers.jsonl.gz"), '{"prompt": "a", "max_tokens": 2}\n'),
    )
    assert "Commands:" in out[0] and "version" in out[1] and "nano" in out[2]
    assert out[6].strip() == out[7].strip() != ""
    assert "small_cpt" in out[9] and out[10].strip()
    assert (tmp_path / "cache" / "costs.json").is_file()
    assert (tmp_path / "answers.jsonl.gz").is_file() and not list(tmp_path.glob("*.part"))
    assert json.loads(chat.read_text(encoding="utf-8"))


def test_commands_run_on_macos(run):
    asked = ("generate", KAZAKH, "-n", "8", "--temperature", "0")
    doctor, answer = run("darwin", (("doctor",), ""), (asked, ""))
    assert "usable of" in doctor and answer.strip()


def test_files_are_made_moved_and_removed_on_windows(run, nano_files, tmp_path):
    """There a file that is open or mapped can be neither replaced nor removed."""
    small, checkpoint = nano_files["small_base"], tmp_path / "checkpoint"
    checkpoint_folder(small, checkpoint, "F16")
    gguf, tar, folder = tmp_path / "a.gguf", tmp_path / "t.tar", tmp_path / "exported"
    to_gguf = ("convert", "hf", checkpoint, "-o", gguf, "--type", "f16")
    merge = ("convert", "merge", "--method", "linear", checkpoint, checkpoint, "-o", tmp_path / "m")
    out = run(
        "win32",
        (("convert", "--help"), ""),
        (to_gguf, ""),
        ((*to_gguf, "--force"), ""),
        (("convert", "quantize", gguf, tmp_path / "q.gguf", "--type", "q8_0"), ""),
        (merge, ""),
        ((*merge, "--force"), ""),
        (("check", nano_files["large_ins"], small, tmp_path / "q.gguf"), ""),
        (("export", "nano", tar), ""),
        (("export", "nano", tar), ""),
        (("export", "nano", folder), ""),
        (("import", tar, "--name", "a"), ""),
        (("import", folder, "--name", "b"), ""),
        (("verify", "a"), ""),
        (("remove", "a"), ""),
        (("list",), ""),
    )
    assert "whole" in out[12]
    assert [line.split()[0] for line in out[14].splitlines()[1:3]] == ["nano", "b"]
    assert not list(tmp_path.rglob("*.part")) and not list((tmp_path / "home").rglob(".*"))


def test_the_server_starts_answers_and_stops_on_windows():
    with serving("--threads", "2", program=on("win32")) as served:
        answer = served.complete("Қазақ", max_tokens=2)
        assert answer["choices"][0]["text"]
        assert httpx.get(served.url).status_code == 200
    assert served.process.returncode == 0


# -- whether the taking away takes away -------------------------------------------------------

PROBE = """
import sys
sys.path.insert(0, {tests!r})
import other_system
other_system.take_away({system!r})
space = {{"__name__": "trimix_gguf.probe"}}
exec(compile(sys.argv[1], "probe", "exec"), space)
"""


@pytest.mark.parametrize(
    ("system", "code", "error"),
    [
        ("win32", "import os; os.fork()", "AttributeError"),
        ("win32", "from os import getuid", "ImportError"),
        ("win32", "import signal; signal.SIGKILL", "AttributeError"),
        ("win32", "def f():\n import fcntl\nf()", "ImportError"),
        ("win32", "import ctypes; ctypes.CDLL(None)", "TypeError"),
        ("win32", "import sys; sys.platform == 'win32' or 1 / 0", None),
        ("win32", "import os; os.getpid(); import signal; signal.SIGTERM", None),
        (
            "win32",
            "f = open('a', 'w', encoding='utf-8'); import os; os.replace('a', 'b')",
            "Permiss",
        ),
        ("win32", "f = open('a', 'w', encoding='utf-8'); import os; os.remove('a')", "Permission"),
        ("win32", "open('a', 'w').close(); import os; os.replace('a', 'b'); os.remove('b')", None),
        ("darwin", "import os; os.fork; os.sched_getaffinity(0)", "AttributeError"),
        ("darwin", "import os, fcntl, ctypes; os.getuid(); ctypes.CDLL(None)", None),
    ],
)
def test_what_a_system_lacks_is_not_there(system, code, error, tmp_path):
    probe = PROBE.format(tests=str(SCRIPT.parent), system=system)
    done = subprocess.run(
        [sys.executable, "-c", probe, code], cwd=tmp_path, capture_output=True, text=True
    )
    if error is None:
        assert done.returncode == 0, done.stderr
    else:
        assert error in done.stderr.splitlines()[-1]


def test_a_checkpoint_can_be_removed_once_it_is_converted(nano_files, tmp_path):
    """As `pull` does; on Windows a file that is still mapped would stay."""
    checkpoint_folder(nano_files["small_base"], tmp_path / "checkpoint", "F16")
    code = """
from pathlib import Path
from shutil import rmtree
from trimix_gguf.convert.hf import convert_hf
for type in ("f16", "q4_k_m"):
    convert_hf(Path("checkpoint"), Path(f"{type}.gguf"), type=type)
rmtree("checkpoint")
"""
    probe = PROBE.format(tests=str(SCRIPT.parent), system="win32")
    subprocess.run([sys.executable, "-c", probe, code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_memory_is_given_back_only_where_the_system_can(system, tmp_path):
    code = """
from trimix_gguf.machine import native
import numpy as np
native.return_freed()
native.drop_pages(np.zeros(1 << 20))
"""
    probe = PROBE.format(tests=str(SCRIPT.parent), system=system)
    subprocess.run([sys.executable, "-c", probe, code], check=True)


def test_a_file_that_a_scanner_holds_is_put_in_place_a_moment_later(tmp_path, monkeypatch):
    refusals, rename = [PermissionError(13, "in use")] * 3, os.replace

    def busy(source, target):
        if refusals:
            raise refusals.pop()
        rename(source, target)

    monkeypatch.setattr(os, "replace", busy)
    (tmp_path / "new").write_text("new", encoding="utf-8")
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    refusals += [PermissionError(13, "in use")] * 9
    with pytest.raises(PermissionError):
        put_in_place(tmp_path / "old", tmp_path / "other")
    assert refusals  # it does not try for ever


# -- what no run reaches: the code itself -----------------------------------------------------

POSIX_ONLY = {"os.symlink", "os.link", "os.kill"} | {
    f"{module}.{name}" for have in (NAMES, LINUX_ONLY) for module in have for name in have[module]
}
ROOTS = ("/proc", "/sys/", "/dev/", "/tmp", "/etc/")
# Where one of them is used, and what stands there for the systems that lack it.
GUARDED = {
    ("trimix_gguf/machine/threads.py", "os.sched_getaffinity"): "hasattr",
    ("trimix_gguf/machine/native.py", "ctypes.CDLL(None)"): "TypeError becomes OSError",
    ("trimix_gguf/machine/native.py", "mmap.MADV_DONTNEED"): "on Linux only",
    ("trimix_gguf/trios/creating.py", "os.link"): "AttributeError is suppressed",
    ("trimix_gguf/machine/processor.py", "'/proc/cpuinfo'"): "on Linux only",
    ("trimix_gguf/machine/memory.py", "import resource"): "not on Windows",
    ("trimix_gguf/machine/worker.py", "import resource"): "not on Windows",
    ("trimix_gguf/machine/worker.py", "os.nice"): "not on Windows",
    ("trimix_gguf/machine/worker.py", "signal.setitimer"): "not on Windows",
    ("trimix_gguf/machine/memory.py", "'/proc/self/status'"): "where it exists",
    ("trimix_gguf/machine/lending.py", "'/proc/'"): "on Linux only",
    ("trimix_gguf/machine/lending.py", "os.sysconf"): "on Linux only",
    ("trimix_gguf/cli/supervising.py", "os.getpgrp"): "not on Windows",
    ("trimix_gguf/cli/supervising.py", "'/dev/tty'"): "not on Windows",
    ("trimix_gguf/cli/supervising.py", "os.tcgetpgrp"): "not on Windows",
}
METHODS = {
    "add_signal_handler",
    "symlink_to",
    "hardlink_to",
    "rename",
    "lchmod",
    "is_mount",
    "owner",
}


def posix_only(tree):
    """What a module uses that not every system has: as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"import {node.module}"] if node.module in MODULES else [])
            named = {f"{node.module}.{a.name}" for a in node.names}
            yield from named & POSIX_ONLY
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in POSIX_ONLY or node.attr in METHODS:
                yield name
        elif isinstance(node, ast.Call) and ast.unparse(node).endswith("CDLL(None)"):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(ROOTS):
            yield repr(node.value)


def without_encoding(tree):
    """Calls that open a text in the encoding of the system: cp1251 here, UTF-8 there."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = {k.arg: k.value for k in node.keywords}
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        mode = _mode(node, called, named)
        # As a method or a function of that name; read_text of ours takes a file's name.
        texts = {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper"}
        is_text = called in texts and "b" not in mode
        is_text |= isinstance(node.func, ast.Attribute) and called in ("read_text", "write_text")
        is_text |= any(
            ast.unparse(named.get(k, node)) == "True" for k in ("text", "universal_newlines")
        )
        is_text &= "filename" not in named  # importlib.metadata's read_text
        if is_text and "encoding" not in named and not _of_another_kind(node):
            yield f"{node.lineno}: {ast.unparse(node)}"


def _mode(node, called, named):
    """Of an opening call: 'r' where it is not written."""
    if "mode" in named:
        return ast.unparse(named["mode"])
    method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in (
        "os",
        "io",
    )
    first = 0 if method or "Temporary" in called else 1
    default = "b" if "Temporary" in called else "r"
    return ast.unparse(node.args[first]) if len(node.args) > first else default


def _of_another_kind(node):
    """Calls named `open` that open no text: os.open, tarfile.open, what a BundleFile holds."""
    owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    return owner in ("os", "tarfile", "file") and not node.args[2:]


@pytest.mark.parametrize("path", OURS)
def test_posix_only_names_are_guarded(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    unguarded = [name for name in posix_only(tree) if (path, name) not in GUARDED]
    assert not unguarded, f"{path} uses {unguarded}: guard it, and say in GUARDED how"


def test_every_guard_still_has_something_to_guard():
    used = {
        (path, name)
        for path in OURS
        for name in posix_only(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    }
    assert GUARDED.keys() <= used


@pytest.mark.parametrize("path", OURS)
def test_texts_are_opened_in_utf_8(path):
    assert not list(without_encoding(ast.parse((ROOT / path).read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(p)", 1), ("open(p, 'rb')", 0), ("open(p, 'w')", 1), ("p.open('a')", 1),
        ("p.open('ab')", 0), ("p.read_text()", 1), ("p.write_text(t, encoding='utf-8')", 0),
        ("NamedTemporaryFile('w')", 1), ("NamedTemporaryFile()", 0), ("run(c, text=True)", 1),
        ("run(c, text=True, encoding='utf-8')", 0), ("os.open(p, os.O_RDONLY)", 0),
    ],
)  # fmt: skip
def test_an_encoding_that_is_left_out_is_seen(code, found):
    assert len(list(without_encoding(ast.parse(code)))) == found


@pytest.mark.parametrize(
    "code",
    ["import os\nos.fork()", "from os import fork", "import fcntl", "ctypes.CDLL(None)",
     "loop.add_signal_handler(2, f)", "p = '/proc/self/status'", "p.symlink_to(q)", "p.rename(q)"],
)  # fmt: skip
def test_a_posix_only_name_is_seen(code):
    assert len(list(posix_only(ast.parse(code)))) == 1
