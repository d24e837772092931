"""Before llama.cpp is loaded, a child process tries it; a crash is met as one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from trimix_gguf.cli import trimix as trimix_command
from trimix_gguf.errors import BuildError
from trimix_gguf.machine import build, processor, self_test
from trimix_gguf.machine.folders import cache_folder
from trimix_gguf.trio.trio import NANO

FAKE = """
#include <stdlib.h>
struct batch { int n_tokens; void *token, *embd, *pos, *n_seq_id, *seq_id, *logits; };
void *dlsym(void *, const char *);
#define NEXT ((void *) -1l)
static void die(void) { __asm__ volatile("ud2"); }
#ifdef AT_LOAD
__attribute__((constructor)) static void load(void) { die(); }
#endif
int llama_decode(void *context, struct batch batch) {
#ifdef AT_BATCH
    if (batch.n_tokens >= AT_BATCH) die();
#endif
    return ((int (*)(void *, struct batch)) dlsym(NEXT, "llama_decode"))(context, batch);
}
#ifdef WRONG
float *llama_get_logits(void *context) {
    float *rows = ((float *(*)(void *)) dlsym(NEXT, "llama_get_logits"))(context);
    for (int i = 0; i < 512; i++) rows[i] *= 1.5f;
    return rows;
}
#endif
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """broken(flag) -> environment of a process whose libllama.so is broken in that way."""
    compiler = shutil.which("gcc")
    real = self_test.library_folder() / "libllama.so.0"
    if compiler is None or not real.is_file():
        pytest.skip("needs gcc, and a llama.cpp that was built for this machine only")

    def make(flag):
        folder = tmp_path_factory.mktemp("broken")
        package, libraries = folder / "llama_cpp", folder / "llama_cpp" / "lib"
        shutil.copytree(real.parent.parent, package, ignore=shutil.ignore_patterns("lib"))
        libraries.mkdir()
        for path in real.parent.iterdir():
            (libraries / path.name).symlink_to(path)
        (libraries / "libllama.so").unlink()
        (folder / "fake.c").write_text(FAKE, encoding="utf-8")
        command = [compiler, "-shared", "-fPIC", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"]
        command += [f"-D{flag}", folder / "fake.c", libraries / "libllama.so.0"]
        subprocess.run([*map(str, command), "-o", str(libraries / "libllama.so")], check=True)
        cache = folder / "cache"
        return {**os.environ, "PYTHONPATH": str(folder), "TRIMIX_CACHE": str(cache)}

    return make


COMMANDS = {
    "generate": ["generate", "Қазақ", "--max-tokens", "2"],
    "chat": ["chat"],
    "serve": ["serve", "--port", "0"],
    "score": ["score", "-"],
    "bench": ["bench"],
    "plan": ["plan"],
    "doctor": ["doctor"],
    "check": [
        "check",
        *(str(NANO / f"{r}.gguf") for r in ("large_ins", "small_base", "small_cpt")),
    ],
    "eval": ["eval", "--lang", "kk", "--tasks", "TASKS", "-o", "OUT"],
}


def run(arguments, environment):
    command = [sys.executable, "-m", "trimix_gguf.cli", *arguments]
    return subprocess.run(
        command, env=environment, input=b"x\n", capture_output=True, timeout=120
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "stage"),
    [
        ("AT_LOAD", b"died of SIGILL while loading"),
        ("AT_BATCH=1", b"died of SIGILL while reading 1 token "),
        ("AT_BATCH=64", b"died of SIGILL while reading 64 tokens"),
        ("WRONG", b"computes wrongly while reading 1 token "),
    ],
)
def test_a_broken_llama_cpp_is_one_line_that_names_cause_place_and_mend(broken, flag, stage):
    done = run(COMMANDS["generate"], broken(flag))
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.count(b"\n") == 1 and stage in done.stderr
    assert b"trimix doctor --mend" in done.stderr and b"lib" in done.stderr


@pytest.fixture(scope="module")
def dying(broken):
    return broken("AT_BATCH=64")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_models_says_so(dying, command, task_file, tmp_path):
    places = {"TASKS": str(task_file), "OUT": str(tmp_path / "out")}
    done = run([places.get(word, word) for word in COMMANDS[command]], dying)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(b"\n") == 1 and b"died of SIGILL" in done.stderr


def test_python_gets_it_as_an_error_of_ours(dying):
    program = """
import trimix_gguf
try:
    trimix_gguf.Trio
except trimix_gguf.TrimixError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], env=dying, capture_output=True)
    assert done.stdout == b"BuildError\n", done.stderr


def test_zero_skips_it(dying):
    skipped = {**dying, "TRIMIX_SELF_TEST": "0"}
    assert run(["plan"], skipped).returncode == 0  # it loads llama.cpp, and decodes nothing


@pytest.mark.parametrize("held", [b"", b"\xff", b"[]", b"[" * 100_000, None])
def test_a_damaged_or_foreign_verdict_is_tried_again_and_replaced(held, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path))
    monkeypatch.delenv("TRIMIX_SELF_TEST", raising=False)
    kept = cache_folder() / "self_test.txt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    other = self_test.fingerprint().replace(".so", ".dll").encode()
    kept.write_bytes(other if held is None else held)
    runs = []
    monkeypatch.setattr(self_test, "run", lambda real=self_test.run: (runs.append(1), real()))
    self_test.require()
    self_test.require()
    assert runs == [1]


def test_other_libraries_or_another_processor_are_tried_anew(monkeypatch, tmp_path):
    libraries = tmp_path / "lib"
    libraries.mkdir()
    (libraries / "libllama.so").write_bytes(b"1")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(libraries))
    seen = [self_test.fingerprint()]
    (libraries / "libllama.so").write_bytes(b"2")
    seen.append(self_test.fingerprint())
    monkeypatch.setattr(self_test.processor, "describe", lambda: ("another", "sse2"))
    seen.append(self_test.fingerprint())
    assert len(set(seen)) == 3


def test_a_library_that_is_missing_is_named(tmp_path):
    """What a slim system without libgomp gives: the loader's reason, in one line."""
    package = Path(self_test.library_folder()).parent
    shutil.copytree(package, tmp_path / "llama_cpp", ignore=shutil.ignore_patterns("lib"))
    (tmp_path / "llama_cpp" / "lib").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRIMIX_CACHE": str(tmp_path / "c")}
    done = run(COMMANDS["generate"], environment)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"cannot be used: FileNotFoundError: Shared library" in done.stderr


def test_doctor_tries_it_anew_and_names_it(trimix):
    done = trimix("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["self-test"]["result"].startswith("passed")
    assert report["self-test"]["llama.cpp"] == str(self_test.library_folder())


@pytest.mark.parametrize("flags", ["avx2", "avx2 amx_tile amx_int8"])
@pytest.mark.parametrize("n_bad", range(5))
def test_mend_builds_in_other_ways_for_as_long_as_it_fails(n_bad, flags, monkeypatch):
    ways = [{"portable": False}, {"portable": False, "amx": False}, {"portable": True}]
    ways = [way for way in ways if "amx" in flags or "amx" not in way]
    built, outcomes = [], iter([False] * n_bad + [True] * 9)

    def run():
        if not next(outcomes):
            raise BuildError("llama.cpp died of SIGILL")

    monkeypatch.setattr(self_test, "run", run)
    monkeypatch.setattr(build, "install", lambda **how: built.append(how))
    monkeypatch.setattr(processor, "describe", lambda: ("a processor", flags))
    done = CliRunner().invoke(trimix_command, ["doctor", "--mend", "--json"])
    assert built == [{**way, "fresh": True} for way in ways[:n_bad]]
    assert isinstance(done.exception, BuildError) is (n_bad > len(ways))
    if n_bad <= len(ways):
        assert done.exit_code == 0 and '"result": "passed' in done.stdout
