"""The shape of the package: imports point up the list of rooms, and the documents agree with it."""

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
from made_runs import made_lines, write_run

import trimix_gguf
from trimix_gguf.cli import COMMANDS
from trimix_gguf.cli.reference import PATH, reference

ROOT = Path(__file__).parent.parent
ROOMS = [
    "errors", "roles", "machine", "mixing", "trio", "choosing", "answering", "tuning", "trios",
    "bench", "evaluation", "adapting", "server", "runs", "cli",
]  # fmt: skip
EVALUATION = ["names", "tasks", "run_files", "reporting", "running"]  # rooms within evaluation
MODELS = ("trio", "answering", "machine.native")  # what brings llama.cpp


def imported_modules(path):
    """Every dotted name that a file may import, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        yield from imported_names(node)


def imported_names(node):
    if isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


def imported_at_once(path):
    """The dotted names that importing a file imports: not those in functions or for type hints."""
    body = list(ast.parse(path.read_text(encoding="utf-8")).body)
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            body += [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            body += node.body
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_names(node)


def files_of(room):
    folder = ROOT / "trimix_gguf" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def dotted(path):
    """A file's name as an import has it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
    files = {dotted(path): path for path in files_of(room) if path.stem != "__init__"}
    graph = {name: {i for i in imported_modules(path) if i in files and i != name}
             for name, path in files.items()}  # fmt: skip
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_a_report_reaches_no_model():
    """By the imports, through any module; what functions import later is the next test's."""
    files = {dotted(path): path for path in (ROOT / "trimix_gguf").rglob("*.py")}
    reached = {name for name in files if name.startswith("trimix_gguf.evaluation.reporting")}
    todo = list(reached)
    while todo:
        name = todo.pop()
        parts = [i.split(".") for i in imported_at_once(files[name])]
        imported = {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}  # packages too
        found = imported & files.keys() - reached
        models = [i for i in found if i.removeprefix("trimix_gguf.").startswith(MODELS)]
        # trios is a thing with a name: it begins as trio does.
        models = [i for i in models if not i.startswith("trimix_gguf.trios")]
        assert not models, f"{name} imports {models}"
        reached |= found
        todo += found
    assert "trimix_gguf.evaluation.tasks.sources" in reached  # it looked through other rooms


def test_a_report_is_printed_where_llama_cpp_is_absent(tmp_path):
    run = write_run(tmp_path / "run", {"tumlu": made_lines(np.random.default_rng(1), "tumlu")})
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llama_cpp":
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from trimix_gguf.cli import trimix
trimix(["eval", "report", {str(run)!r}, "--choice-scoring"], standalone_mode=False)
ours = [name.removeprefix("trimix_gguf.") for name in sys.modules]
models = [name for name in ours if name.startswith({MODELS!r}) and not name.startswith("trios")]
assert not models, models
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"| method |" in done.stdout


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


def pages_of_users():
    """README and the help pages: what a user may have read."""
    paths = [ROOT / "README.md", *sorted((ROOT / "trimix_gguf/help").glob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def test_public_names_resolve_and_a_page_names_them():
    text = pages_of_users()
    for name in trimix_gguf.__all__:
        assert getattr(trimix_gguf, name) is not None
        assert f"`{name}`" in text, f"neither README nor a help page names {name}"


def test_a_page_names_every_command():
    text = pages_of_users()
    for command in COMMANDS:
        named = f"trimix {command}" in text
        assert named, f"neither README nor a help page names trimix {command}"


def test_the_reference_of_commands_is_what_help_says():
    assert PATH.read_text(encoding="utf-8") == reference(), "run `make reference`"
    for command in COMMANDS:
        assert f"\n## trimix {command}\n" in reference()


# -- public functions -----------------------------------------------------------------------


def public_functions(path):
    """(dotted name, node) of the functions, methods and classes that a module offers."""
    waiting = [("", node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    while waiting:
        owner, node = waiting.pop()
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield f"{owner}{node.name}", node
            if isinstance(node, ast.ClassDef):
                waiting += [(f"{owner}{node.name}.", inner) for inner in node.body]


@pytest.mark.parametrize("room", ["answering", "mixing", "server"])
def test_what_a_room_offers_has_a_docstring_and_typed_arguments(room):
    for path in files_of(room):
        for name, node in public_functions(path):
            assert ast.get_docstring(node), f"{path.name}: {name} has no docstring"
            rest = None if isinstance(node, ast.ClassDef) else node.args.kwarg
            typed = rest is None or ast.unparse(rest.annotation) != "Any"
            assert typed, f"{path.name}: {name} takes **{rest.arg} of any kind"


@pytest.mark.parametrize("room", ["answering", "mixing", "server"])
def test_functions_of_a_room_are_short(room):
    for path in files_of(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                n_arguments = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
                assert n_lines <= 60, f"{path.name}: {node.name} has {n_lines} lines"
                assert n_arguments <= 12, f"{path.name}: {node.name} has {n_arguments} arguments"


# -- ARCHITECTURE.md ------------------------------------------------------------------------


def sections():
    """Heading -> text, of ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rooms_imported(room, rooms=ROOMS, package="trimix_gguf"):
    """Other rooms that a room imports from, in the order of `rooms`."""
    files = files_of(f"{package}.{room}".replace(".", "/").removeprefix("trimix_gguf/"))
    names = {name for path in files for name in imported_modules(path)}
    inside = {n.removeprefix(f"{package}.") for n in names if n.startswith(f"{package}.")}
    found = {name.split(".")[0] for name in inside} - {room}
    return [other for other in rooms if other in found]


@pytest.mark.parametrize(
    "section, rooms, package",
    [("Rooms", ROOMS, "trimix_gguf"), ("evaluation", EVALUATION, "trimix_gguf.evaluation")],
)
def test_the_drawing_of_the_rooms_is_what_the_code_imports(section, rooms, package):
    drawn = re.search(r"```\n(.*?)```", sections()[section], re.S)[1].splitlines()
    arrows = {line.split()[0]: line.partition("<-")[2].split() for line in drawn}
    assert list(arrows) == rooms, "the drawing's rooms are not those of the code, in their order"
    for room in rooms:
        imported = rooms_imported(room, rooms, package)
        line = " ".join([f"{room:<11}", "<-", *imported])
        assert arrows[room] == imported, f"ARCHITECTURE.md should draw: {line}"
        above = rooms[: rooms.index(room)]
        assert set(imported) <= set(above), f"{room} imports from a room below it"


def test_evaluation_has_only_its_rooms():
    folder = ROOT / "trimix_gguf/evaluation"
    assert sorted(p.parent.name for p in folder.glob("*/__init__.py")) == sorted(EVALUATION)
    assert [path.name for path in folder.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", [*ROOMS, "convert"])
def test_architecture_has_a_section_for_every_room_with_its_modules(room):
    assert room in sections(), f"ARCHITECTURE.md has no section ## {room}"
    folder = ROOT / ("convert" if room == "convert" else f"trimix_gguf/{room}")
    there = {
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*.py")
        if not path.stem.startswith("__")
    }
    bullets = re.findall(r"^\* ((?:`[a-z0-9_/]+`,?\s+)*`[a-z0-9_/]+`): \S", sections()[room], re.M)
    named = set(re.findall(r"`([a-z0-9_/]+)`", " ".join(bullets)))
    missing, gone = sorted(there - named), sorted(named - there)
    assert not missing, f"ARCHITECTURE.md, ## {room}: no line for {', '.join(missing)}"
    assert not gone, f"ARCHITECTURE.md, ## {room}: there is no module {', '.join(gone)}"


def test_what_architecture_says_where_to_find_is_there():
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`", sections()["Where to find"])
    assert len(places) > 10
    for path, dotted in places:
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        for name in dotted.split("."):
            found = [node for node in body if getattr(node, "name", None) == name]
            assert found, f"ARCHITECTURE.md: there is no {dotted} in {path}"
            body = found[0].body


# -- size and description of the code -------------------------------------------------------


def functions(body, prefix=""):
    """(dotted name, node) of functions and methods, those in functions left out."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}{node.name}.")


CHECKED = [*(ROOT / "convert").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
for checked_room in ("roles", "machine", "trio", "trios", "bench", "adapting", "runs", "cli"):
    CHECKED += files_of(checked_room)


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short_and_public_ones_are_described(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for name, node in functions(ast.parse(text).body):
        assert node.end_lineno - node.lineno < 60, f"{name} has more than 60 lines"
        n_parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        assert n_parameters <= 12, f"{name} has {n_parameters} parameters"
        is_public = not any(part.startswith("_") for part in name.split("."))
        assert not is_public or ast.get_docstring(node), f"{name} has no docstring"
