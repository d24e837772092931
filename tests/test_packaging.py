"""What a package promises: its dependencies, its entry points, its continuous integration."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "PIL": "pillow", "yaml": "pyyaml"}
# Where a module of an extra may be imported: what needs it says which extra to install.
PLACES = {
    "trimix_gguf/adapting": ("adapt",),
    "trimix_gguf/evaluation": ("eval", "lm-eval"),
    "trimix_gguf/cli/options.py": ("plot",),
    "trimix_gguf/machine/packed.py": ("adapt",),
    "trimix_gguf/machine/cluster.py": ("ray",),
    "convert/nano": ("train",),
    "convert/training.py": ("train",),
    "tests": ("adapt", "dev", "eval", "lm-eval", "oracle"),
    "benchmarks": ("adapt", "dev", "eval", "oracle"),
}


def names(requirements):
    return {re.match(r"[\w.-]+", text)[0].lower() for text in requirements}


@cache
def third_parties(folder):
    """(file, distribution) of each import that is neither the standard library's nor ours."""
    files = sorted((ROOT / folder).rglob("*.py"))
    own = {path.stem for other in ("tests", "benchmarks") for path in (ROOT / other).rglob("*.py")}
    own |= sys.stdlib_module_names | {"trimix_gguf", "conversion", "corpus"}  # found by sys.path
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - own:
                distribution = DISTRIBUTIONS.get(top, top.replace("_", "-"))
                found.add((path.relative_to(ROOT).as_posix(), distribution))
    return sorted(found)


@pytest.mark.parametrize("folder", ["trimix_gguf", "convert", "tests", "benchmarks"])
def test_what_is_imported_is_declared(folder):
    """Bug: filelock and h11 were there only as long as other packages asked for them."""
    declared, undeclared = names(PROJECT["dependencies"]), []
    for path, distribution in third_parties(folder):
        extras = (extra for place in PLACES if path.startswith(place) for extra in PLACES[place])
        allowed = declared | {name for extra in extras for name in names(EXTRAS[extra])}
        if distribution not in allowed:
            undeclared.append((path, distribution))
    assert not undeclared


def test_floors_have_no_known_escapes():
    """Bug: with Jinja 3.1.5 the template of a GGUF read the environment (CVE-2025-27516)."""
    (floor,) = [d for d in PROJECT["dependencies"] if d.startswith("jinja2")]
    assert floor == "jinja2>=3.1.6"


def test_what_is_declared_is_imported():
    imported = {name for folder in ("trimix_gguf", "convert") for _, name in third_parties(folder)}
    loaded_by_name = {"llama-cpp-python"}  # native.py, without its own start
    assert names(PROJECT["dependencies"]) - imported == loaded_by_name


def test_the_extras_of_developers_are_enough_for_the_suite():
    assert names(EXTRAS["eval"]) >= {"sacrebleu", "rouge-score", "scipy", "matplotlib"}
    assert "trimix-gguf[eval]" in EXTRAS["dev"]


def test_classifiers_name_what_the_integration_runs():
    named = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert named == set(_jobs()["test"]["strategy"]["matrix"]["python"])
    assert PROJECT["authors"] == [{"name": "trimix-gguf developers"}]
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())


def test_the_citation_names_this_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == PROJECT["version"] and cited["title"] == PROJECT["name"]
    assert cited["license"] == PROJECT["license"] and cited["authors"] == PROJECT["authors"]
    (paper,) = cited["references"]
    assert {"type": "url", "value": PROJECT["urls"]["Paper"], "description": "arXiv"} in paper[
        "identifiers"
    ]
    assert paper["year"] == 2026 and paper["title"] and paper["authors"]


# -- the sdist --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The folder that an sdist of these files unpacks to."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


def test_the_sdist_has_what_the_tests_need(sdist):
    """Bug: setuptools takes tests/test_*.py by itself, and neither conftest.py nor the helpers."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert (sdist / path.relative_to(ROOT)).is_file(), path
    for name in ("CITATION.cff", "CHANGELOG.md", "ARCHITECTURE.md", "Makefile", ".ci/run"):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.pyc"))
    # -P: the package as it is installed, which has trimix_gguf.convert.
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "tests/test_demo.py"]
    found = subprocess.run(command, cwd=sdist, capture_output=True, text=True, encoding="utf-8")
    assert found.returncode == 0 and "test_demo.py" in found.stdout, found.stdout + found.stderr


# -- entry points -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["trimix_gguf", "trimix_gguf.cli"])
def test_the_program_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split() == ["trimix,", "version", PROJECT["version"]]
    assert importlib.metadata.version("trimix-gguf") == PROJECT["version"]


def complete(line, **environment):
    """What a shell gets for a line; `line` is None for the script that it reads at its start."""
    given = {"_TRIMIX_COMPLETE": "bash_source"}
    if line is not None:
        words = line.split(" ")
        given = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        given["_TRIMIX_COMPLETE"] = "bash_complete"
    command = [sys.executable, "-m", "trimix_gguf"]
    done = subprocess.run(command, env={**os.environ, **given, **environment}, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    return done.stdout.decode()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_has_a_script_for_each_shell(shell):
    if shell == "bash" and not Path("/bin/bash").exists():
        pytest.skip("click asks bash for its version")
    script = complete(None, _TRIMIX_COMPLETE=f"{shell}_source")
    assert "_TRIMIX_COMPLETE" in script and "trimix" in script


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("trimix gen", ["generate"]),
        ("trimix s", ["serve", "score", "show"]),
        ("trimix generate --max-t", ["--max-tokens"]),
        ("trimix convert mer", ["merge", "merge-lora"]),
        ("trimix convert hf --type q4", ["q4_0", "q4_k_m"]),
        ("trimix nothing", []),
    ],
)
def test_commands_and_options_are_completed(line, found):
    completed = [text.partition(",")[2] for text in complete(line).split()]
    assert sorted(completed) == sorted(found)


# -- continuous integration -------------------------------------------------------------------


def _jobs():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["jobs"]


def test_the_integration_runs_what_the_readme_says_on_every_system():
    job = _jobs()["test"]
    assert {name.partition("-")[0] for name in job["strategy"]["matrix"]["os"]} == {
        "ubuntu", "macos", "windows",
    }  # fmt: skip
    steps = [step for step in job["steps"] if "run" in step]
    posix = [s["run"] for s in steps if s["if"] == "runner.os != 'Windows'"]
    windows = "\n".join(s["run"] for s in steps if s["if"] == "runner.os == 'Windows'")
    assert posix == ["make demo", "make test"] and len(steps) == 4
    for part in ("-m venv .venv", "build.py install", "trimix demo", "-m pytest"):
        assert part in windows


def test_the_changelog_has_the_form_that_it_names():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n") and "\n## [Unreleased]\n" in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= kinds
