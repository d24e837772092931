"""The shape of the package: imports point up the list of layers, and the README agrees with it."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimix_gguf
from trimix_gguf.cli import COMMANDS
from trimix_gguf.cli.reference import PATH, reference

ROOT = Path(__file__).parent.parent
LAYERS = [
    "errors", "fusion", "gguf_file", "vocabulary", "memory", "native", "locking", "threads",
    "scoring", "sampling", "prompt", "model", "placement", "planner", "trio", "branches",
    "selection", "prompt_cache", "lookup", "speculative", "costs", "generation", "chat",
    "conversation", "request", "batching", "trios", "bench", "evaluation", "server", "cli",
]  # fmt: skip


def imported_layers(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "trimix_gguf" and len(parts) > 1 and parts[1] in LAYERS:
                yield parts[1]


FOLDERS = {"trios", "evaluation", "server", "cli"}


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "cli"])
def test_imports_point_up_the_layers(layer):
    folder = ROOT / "trimix_gguf" / layer
    for path in folder.rglob("*.py") if layer in FOLDERS else [folder.with_suffix(".py")]:
        for imported in imported_layers(path):
            allowed = LAYERS.index(layer) + (layer in FOLDERS)
            assert LAYERS.index(imported) < allowed, f"{path.name} imports {imported}"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_what_a_benchmark_takes_from_the_package_is_there(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimix_gguf"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(submodule)


def test_every_module_has_its_layer():
    modules = {p.stem for p in (ROOT / "trimix_gguf").glob("*.py")} - {"__init__"}
    assert modules == set(LAYERS) - FOLDERS


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
import trimix_gguf.native as native, llama_cpp, llama_cpp.llama_cpp as own
assert llama_cpp.Llama and own is native.lib
from trimix_gguf import Trio, TrimixError
from trimix_gguf.trio import NANO, trio_paths
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
