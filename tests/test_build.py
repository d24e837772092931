"""The build decides by trying: what a compiler switches on is run before llama.cpp is built."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trimix_gguf.errors import BuildError
from trimix_gguf.machine import build

SCRIPT = Path(build.__file__)
GXX = shutil.which("g++")
X86 = os.uname().machine in ("x86_64", "i686") if hasattr(os, "uname") else False

needs_gxx = pytest.mark.skipif(GXX is None or not X86, reason="needs g++ on x86")


def script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.fixture
def compiler(tmp_path):
    """compiler(text) -> a C++ compiler of that shell text; its folder has a space and Cyrillic."""

    def make(text):
        folder = tmp_path / "менің құралдарым"
        folder.mkdir(exist_ok=True)
        path = folder / "cxx"
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
        return f"'{path}'"

    return make


@needs_gxx
def test_all_that_march_native_switches_on_runs_here():
    done = script("flags")
    assert done.returncode == 0 and done.stderr == ""
    assert "-mno-" not in done.stdout


@needs_gxx
@pytest.mark.parametrize(
    ("extra", "off"),
    [("-mamx-tile -mamx-int8", "-mno-amx-tile"), ("-mavx512fp16", "-mno-avx512fp16")],
)
def test_what_this_processor_lacks_is_switched_off_and_said(compiler, extra, off):
    """A compiler that believes in more than the processor has, as a stale cross build does."""
    flag = {"-mno-amx-tile": "amx_tile", "-mno-avx512fp16": "avx512_fp16"}[off]
    if flag in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip(f"this processor has {flag}")
    done = script("flags", CXX=compiler(f'exec {GXX} {extra} "$@"'))
    assert done.returncode == 0, done.stderr
    assert off in done.stdout
    assert done.stderr.count("\n") == 1 and "switched off" in done.stderr


@needs_gxx
def test_what_computes_wrongly_is_switched_off(compiler, tmp_path):
    """A multiplication that is a subtraction stands for a fault of compiler or processor."""
    (tmp_path / "wrong.h").write_text(
        "#include <immintrin.h>\n#define _mm256_maddubs_epi16 _mm256_sub_epi16\n", "utf-8"
    )
    done = script("flags", CXX=compiler(f'exec {GXX} -include {tmp_path}/wrong.h "$@"'))
    assert "-mno-avx2" in done.stdout and "avx2 is switched off: it computes wrongly" in done.stderr


@needs_gxx
def test_a_tile_configuration_is_stored_whole(tmp_path):
    """Bug: GCC dropped the rows' and columns' stores before ldtilecfg; the process died of SIGILL.

    The instruction is replaced by a call that prints what lies in memory: this needs no AMX.
    """
    program = """
#include <immintrin.h>
#include <cstdio>
extern "C" void see(const unsigned char *config) {
    for (int i = 0; i < 64; i++) std::printf("%d ", config[i]);
}
struct Config { unsigned char palette, start, none[14]; unsigned short columns[16];
                unsigned char rows[16]; };
__attribute__((noinline)) void configure() {
    alignas(64) Config config = {};
    config.palette = 1;
    config.rows[0] = 8; config.columns[0] = 64; config.rows[3] = 16;
    _tile_loadconfig(&config);
}
int main() { configure(); }
"""
    source, assembly = tmp_path / "tiles.cpp", tmp_path / "tiles.s"
    source.write_text(program, encoding="utf-8")

    def seen(*flags):
        command = [
            GXX,
            "-O3",
            "-fno-ipa-ra",
            "-mamx-tile",
            "-std=c++17",
            *flags,
            "-S",
            source,
            "-o",
            assembly,
        ]
        subprocess.run(list(map(str, command)), check=True)
        text = assembly.read_text(encoding="utf-8")
        # The call may change any register, but here nothing follows that needs one.
        text = re.sub(r"ldtilecfg\s+(\S+)", r"leaq \1, %rdi\n\tsubq $512, %rsp\n"
                      r"\tcall see\n\taddq $512, %rsp", text)  # fmt: skip
        assembly.write_text(text, encoding="utf-8")
        subprocess.run([GXX, assembly, "-o", tmp_path / "tiles"], check=True)
        printed = subprocess.run([tmp_path / "tiles"], check=True, capture_output=True).stdout
        return [int(byte) for byte in printed.split()]

    expected = [0] * 64
    expected[0], expected[16], expected[48], expected[51] = 1, 64, 8, 16
    assert seen("-include", build._HEADER) == expected


@needs_gxx
def test_the_header_may_lie_on_a_path_with_spaces_and_other_letters(tmp_path):
    folder = tmp_path / "менің бумам"
    shutil.copytree(SCRIPT.parent, folder / "trimix_gguf" / "machine")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(SCRIPT.parent.parent / name, folder / "trimix_gguf" / name)
    copied = folder / "trimix_gguf" / "machine" / "build.py"
    done = subprocess.run([sys.executable, copied, "flags"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert f'"{folder}/trimix_gguf/machine/tile_config.h"' in done.stdout


def test_the_users_own_cmake_arguments_come_last():
    flags = script("flags", CMAKE_ARGS="-DGGML_CUDA=on '-DX=a b'").stdout
    assert flags.endswith("-DGGML_CUDA=on '-DX=a b'\n")


def test_a_portable_build_chooses_at_run_time_and_knows_no_native_flag():
    flags = script("flags", "--portable").stdout
    for word in ("GGML_NATIVE=OFF", "GGML_BACKEND_DL=ON", "GGML_CPU_ALL_VARIANTS=ON"):
        assert f"-D{word}" in flags


OLD = 'case "$*" in *c++17*) echo "unrecognized option -std=c++17" >&2; exit 1;; esac; echo GCC 4.8'
FULL = 'echo "fatal error: error writing to /tmp/a.s: No space left on device" >&2; exit 1'


@pytest.mark.skipif(os.name == "nt", reason="CMake finds the compiler there")
@pytest.mark.parametrize(
    ("text", "said"),
    [(OLD, "GCC 4.8 cannot build a C++17 program; install GCC 9 or newer"), (FULL, "disk is full")],
)
def test_a_compiler_that_will_not_do_is_one_line(compiler, text, said):
    done = script("check", CXX=compiler(text))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and said in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="CMake finds the compiler there")
def test_no_compiler_is_one_line_that_says_how_to_get_one():
    done = script("check", PATH="/nonexistent", CXX="")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "apt install g++" in done.stderr


def test_an_old_python_is_one_line(monkeypatch):
    monkeypatch.setattr(build.sys, "version_info", (3, 10, 13))
    with pytest.raises(BuildError, match=r"Python 3\.10 is too old; install 3\.11"):
        build.check()


def test_a_full_disk_is_said_before_the_build(monkeypatch, tmp_path):
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 5))
    with pytest.raises(BuildError, match="needs 1 GB .* set TMPDIR"):
        build.check_disk(tmp_path)


def failing_pip(monkeypatch, text):
    """pip whose build prints `text` and fails."""
    program = f"import sys; sys.stdout.write({text!r}); sys.exit(1)"
    monkeypatch.setattr(build, "_pip", lambda *_: [sys.executable, "-c", program])


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("x.cpp:1: fatal error: cannot write: No space left on device\n", "the disk is full"),
        (
            "ERROR: Could not find a version that satisfies scikit-build-core\n",
            "is there a network",
        ),
        (
            "[1/2] c++\na.cpp:3:1: error: no such thing\n[2/2]\nFAILED\n",
            "a.cpp:3:1: error: no such",
        ),
        ("", "no reason given"),
    ],
)
def test_a_build_that_fails_is_one_line_with_its_reason_and_log(monkeypatch, tmp_path, log, said):
    failing_pip(monkeypatch, log)
    with pytest.raises(BuildError, match=said) as raised:
        build._build([], tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert Path(message.rpartition("log: ")[2].rstrip(")")).read_text(encoding="utf-8") == log


@needs_gxx
def test_a_kept_build_is_taken_for_the_same_flags_only(monkeypatch, tmp_path):
    """Bug: pip keeps a wheel by its source alone; another processor's was taken, and died."""
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PIP_NO_CACHE_DIR", raising=False)
    builds = []

    def built(arguments, work):
        builds.append(arguments)
        path = work / "llama_cpp_python-0-py3-none-any.whl"
        path.write_bytes(str(len(builds)).encode())
        return path

    monkeypatch.setattr(build, "_build", built)

    def wheel(**options):
        return build.wheel(tmp_path / "out", **{"portable": False, **options}).read_bytes()

    assert [wheel(), wheel()] == [b"1", b"1"]
    monkeypatch.setattr(build.processor, "describe", lambda: ("another", "sse2"))
    assert wheel() == b"2"
    assert wheel(fresh=True) == b"3" and wheel() == b"3"
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    assert wheel() == b"4"


def test_make_and_the_pages_know_no_flag_of_llama_cpp():
    """The flags stand in one place."""
    root = SCRIPT.parent.parent.parent
    for name in ("Makefile", "Dockerfile", ".ci/run"):
        if (path := root / name).is_file():
            assert not re.search(r"-D(GGML|LLAMA|LLAVA)", path.read_text(encoding="utf-8")), name
