"""The shape of the package: imports point up the list of layers, and the README agrees with it."""

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trimix_gguf
from trimix_gguf.cli import COMMANDS
from trimix_gguf.cli.reference import PATH, reference

ROOT = Path(__file__).parent.parent
ROOMS = [
    "errors", "roles", "machine", "mixing", "trio", "choosing", "answering", "trios", "bench",
    "evaluation", "server", "cli",
]  # fmt: skip


def imported_modules(path):
    """Every dotted name that a file may import, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def files_of(room):
    folder = ROOT / "trimix_gguf" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_up_the_rooms(room):
    for path in files_of(room):
        for name in imported_modules(path):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "trimix_gguf" and other in ROOMS:
                assert ROOMS.index(other) <= ROOMS.index(room), f"{path.name} imports {name}"


@pytest.mark.parametrize("room", [r for r in ROOMS if (ROOT / "trimix_gguf" / r).is_dir()])
def test_modules_of_a_room_import_each_other_one_way(room):
    files = {f"trimix_gguf.{room}.{path.stem}": path for path in files_of(room)}
    graph = {name: {i for i in imported_modules(path) if i in files and i != name}
             for name, path in files.items()}  # fmt: skip
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_what_a_benchmark_takes_from_the_package_is_there(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimix_gguf"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(submodule)


def test_every_module_has_its_room():
    package = ROOT / "trimix_gguf"
    rooms = {p.parent.name for p in package.glob("*/__init__.py")}
    assert rooms | {p.stem for p in package.glob("*.py")} - {"__init__", "__main__"} == set(ROOMS)


def test_llama_cpp_is_imported_in_one_place():
    found = {
        path.name
        for path in (ROOT / "trimix_gguf").rglob("*.py")
        if re.search(r"^ *(import|from) llama_cpp|_bindings\(", path.read_text("utf-8"), re.M)
    }
    assert found == {"native.py"}


def test_llama_cpp_can_be_imported_whole_beside_it_and_errors_still_say_why(tmp_path):
    """Bug: whoever imported llama_cpp later took over llama.cpp's log, and our errors' reasons."""
    program = """
import trimix_gguf.machine.native as native, llama_cpp, llama_cpp.llama_cpp as own
assert llama_cpp.Llama and own is native.lib
from trimix_gguf import Trio, TrimixError
from trimix_gguf.trio.trio import NANO, trio_paths
try:
    files = {**trio_paths(NANO), "small_cpt": None, "small_cpt_lora": NANO / "small_cpt.gguf"}
    Trio.load(**files)
except TrimixError as error:
    assert "gave no reason" not in str(error), error
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert b"not an adapter" in done.stdout and done.stderr == b""


def test_public_names_resolve_and_stand_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in trimix_gguf.__all__:
        assert getattr(trimix_gguf, name) is not None
        assert f"`{name}`" in readme, f"README does not name {name}"


def test_readme_names_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"trimix {command}" in readme, f"README does not name trimix {command}"


def test_the_reference_of_commands_is_what_help_says():
    assert PATH.read_text(encoding="utf-8") == reference(), "run `make reference`"
    for command in COMMANDS:
        assert f"\n## trimix {command}\n" in reference()
