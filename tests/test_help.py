"""README and help pages: their commands run, their options exist, their links lead somewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import KAZAKH, ROOT
from hf_checkpoint import checkpoint_folder
from made_tasks import write_all
from test_cli import one_line_error

from trimix_gguf.cli import COMMANDS
from trimix_gguf.cli import trimix as program
from trimix_gguf.cli.help import FOLDER, TOPICS, page, summary
from trimix_gguf.evaluation.tasks.custom import custom_task
from trimix_gguf.mixing.sampling import Sampling
from trimix_gguf.trio.trio import NANO

README = ROOT / "README.md"
PAGES = [README, *(FOLDER / f"{topic}.md" for topic in TOPICS)]
LINKED = [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
WIDTH = 78  # of code in a page: a terminal has 80 columns, and rich indents it by one
TRIO = "qwen2.5-1.5b-3b-ug"  # in the pages; here it is nano under that name
ADAPTED = "my-language"  # what `trimix adapt` makes in the pages; nano here too
STICK = "/media/stick"
QUESTIONS = "questions.jsonl"  # what evaluation.md shows first

# Commands that begin so are parsed but do not run, for this reason.
NOT_RUN = {
    "adapt": "needs the extra `adapt`; test_adapting.py runs it",
    "pull": "needs the Hugging Face hub",
    "serve": "runs until somebody stops it",
    "run --ray": "needs a Ray cluster, as test_run_ray.py has",
    "eval --ray": "needs a Ray cluster, as test_eval_ray.py has",
    "worker": "runs until somebody stops it, as test_rpc.py does",
    "plan --rpc": "needs workers, as test_rpc.py has them",
    "generate --rpc": "needs workers, as test_rpc.py has them",
    "doctor --mend": "may build llama.cpp",
    "export nano": "packs the program, as test_program.py does",
    "tune": "measures for minutes, as test_tuning.py does",
    "eval --harness": "needs lm-evaluation-harness and its data",
}
ANOTHERS = {"CUDA0": "a graphics card"}  # words of commands that need what a test does not have
SHORT = {  # added to a command, so that it takes little time
    "generate": "-n 4 --threads 1",
    "chat": "-n 4 --threads 1",
    "bench": "--n-prompt 16 --n-tokens 4 --repeats 1",
    "score": "--threads 1",
    "run": "--threads 1",
    "eval": "--threads 1 --methods large_ins,ppl --limit 2 --exemplars 1",
}
# Options in the text that belong to other programs.
FOREIGN = {"--help": "click", "--portable": "machine/build.py", "--install": "xcode-select"}
FOREIGN |= {"--array": "sbatch", "--model": "lm_eval", "--nproc-per-node": "torchrun"}
FOREIGN |= dict.fromkeys(
    ("--rm", "--read-only", "--tmpfs", "--cap-drop", "--user", "--time"), "docker"
)


def blocks(path):
    """(number of the first line, language, text) of every fenced block of a page."""
    start, language, held = None, "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.fullmatch(r"```(\w*)", line)
        if fence is None:
            held.append(line)
        elif start is None:
            start, language, held = number + 1, fence[1], []
        else:
            yield start, language, "\n".join(held)
            start = None
    assert start is None, f"{path.name}: the block from line {start} on has no end"


def commands(path):
    """(where it stands, its words) of every line of a page that runs trimix."""
    for start, language, text in blocks(path):
        if language in ("", "sh", "powershell"):
            joined = text.replace("\\\n", "")
            for line in joined.splitlines():
                if line.startswith(("trimix ", "python -m trimix_gguf")):
                    words = shlex.split(line, comments=True)
                    skipped = 1 if words[0] == "trimix" else 3
                    yield f"{path.name}, block at line {start}: {line.strip()}", words[skipped:]


def begins(words, known):
    """The key of `known` that the words begin with: its command, and its option anywhere."""
    for key in known:
        first, *rest = key.split()
        if words[0] == first and all(word in words for word in rest):
            return key
    return None


def parse(words):
    """As click does before it runs a command: raises UsageError for what is not there."""
    context = program.make_context("trimix", list(words))
    while isinstance(context.command, click.Group) and (rest := remaining(context)):
        _, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(command.name, rest, parent=context)


def remaining(context):
    return [*context._protected_args, *context.args]


def stands_in(words, folder):
    """(words, stdin) with the stick's folder put in, and what shortens the command added."""
    words = [word.replace(STICK, str(folder / "stick")) for word in words]
    stdin = None
    if "<" in words:
        at = words.index("<")
        stdin = Path(words[at + 1]).read_bytes()
        words = words[:at]
    if words[:2] != ["eval", "report"]:
        words += SHORT.get(words[0], "").split()
    return words, stdin


def json_blocks(path):
    return [text for _, language, text in blocks(path) if language == "json"]


@pytest.fixture(scope="module")
def material(tmp_path_factory, nano_files, checkpoint, adapter):
    """The files that the pages name."""
    folder = tmp_path_factory.mktemp("material")
    for name in ("stick", "trio", "mine"):
        (folder / name).mkdir()
    for role in ("large_ins", "small_cpt"):
        checkpoint_folder(nano_files[role], folder / role.replace("_", "-"), "F16")
    (folder / "small-base").symlink_to(checkpoint)
    (folder / "kk-adapter").symlink_to(adapter)
    for name, role in {
        "qwen2.5-3b-instruct-q4_k_m": "large_ins",
        "qwen2.5-1.5b-q4_k_m": "small_base",
        "qwen2.5-1.5b-kk-cpt-q4_k_m": "small_cpt",
    }.items():
        (folder / f"{name}.gguf").symlink_to(nano_files[role])
    for name in ("kazakh.txt", "questions.txt"):
        (folder / name).write_text(KAZAKH + "\n", encoding="utf-8")
    (folder / "kk.txt").write_bytes((NANO / "text.txt").read_bytes())
    (folder / "prompts.txt").write_text(f"{KAZAKH}\n\nАстана\n", encoding="utf-8")
    (folder / "prompts.jsonl").write_text(json_blocks(FOLDER / "many-prompts.md")[0], "utf-8")
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    batch["body"] = {"model": "gpt-4o", "prompt": KAZAKH, "max_tokens": 4}
    (folder / "batch.jsonl").write_text(json.dumps(batch), encoding="utf-8")
    (folder / "schema.json").write_text('{"enum": ["иә", "жоқ"]}', encoding="utf-8")
    shown = json_blocks(FOLDER / "evaluation.md")[0]
    (folder / QUESTIONS).write_text(shown, encoding="utf-8")
    write_all(folder / "DATA")
    return folder


@pytest.fixture
def place(material, tmp_path, monkeypatch):
    """A folder with those files, where a page's commands run, and a home with two trios."""
    folder = tmp_path / "a folder"
    shutil.copytree(material, folder, symlinks=True)
    home = tmp_path / "home"
    for name in (TRIO, ADAPTED):
        shutil.copytree(NANO, home / "trios" / name)
        file = home / "trios" / name / "trio.toml"
        named = file.read_text(encoding="utf-8").replace('name = "nano"', f'name = "{name}"')
        file.write_text(named, encoding="utf-8")
    monkeypatch.setenv("TRIMIX_HOME", str(home))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_names_no_command_or_option_that_is_not_there(path):
    for where, words in commands(path):
        try:
            parse([word for word in words[: words.index("<")]] if "<" in words else words)
        except click.UsageError as error:
            pytest.fail(f"{where}: {error.format_message()}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_run(path, place):
    for where, words in commands(path):
        if begins(words, NOT_RUN) or set(ANOTHERS) & {w.partition("=")[2] for w in words}:
            continue
        words, stdin = stands_in(words, place)
        done = CliRunner().invoke(program, words, input=stdin)
        assert done.exit_code == 0, f"{where}: {done.output or done.exception!r}"


def test_what_does_not_run_is_in_the_pages():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    for key in NOT_RUN:
        assert re.search(rf"^trimix {key}\b|`trimix {key}\b", text, re.M), f"no page has {key}"


def test_most_commands_of_the_pages_run():
    ran = [w for path in PAGES for _, w in commands(path) if not begins(w, NOT_RUN)]
    assert len(ran) > 40 and {words[0] for words in ran} >= {"generate", "chat", "eval", "convert"}


@pytest.mark.parametrize(
    "path, start, text",
    [(p, start, text) for p in PAGES for start, lang, text in blocks(p) if lang == "python"],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_the_python_of_a_page_runs(path, start, text, capsys):
    exec(compile("\n" * (start - 1) + text, path, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_the_tasks_that_the_evaluation_page_shows_are_tasks(tmp_path):
    for text in json_blocks(FOLDER / "evaluation.md"):
        (tmp_path / QUESTIONS).write_text(text, encoding="utf-8")
        dataset = custom_task(tmp_path / QUESTIONS).load(tmp_path, "kk", 0)
        assert dataset.examples and dataset.exemplars


def test_the_request_that_the_server_page_shows_is_json():
    (text,) = json_blocks(FOLDER / "serve.md")
    assert {"messages", "trimix"} == json.loads(text).keys()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_options_in_a_pages_sentences_are_there(path):
    every = {name for command in all_commands(program) for p in command.params for name in p.opts}
    every |= {name for c in all_commands(program) for p in c.params for name in p.secondary_opts}
    for span in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
        if span.startswith(("pip ", ".venv/bin/pip ", "sudo ", "lm_eval ")):
            continue
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", span):
            assert option in every | FOREIGN.keys(), f"{path.name}: {span}"
        if span.startswith("trimix ") and span.split()[1].islower():
            assert span.split()[1] in COMMANDS, f"{path.name}: {span}"


def all_commands(command):
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from all_commands(command.get_command(context, name))


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.stem)
def test_relative_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def test_every_option_has_a_help_text():
    for command in all_commands(program):
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"trimix {command.name}: {option.opts[-1]} has no help text"


@pytest.mark.parametrize("field", fields(Sampling), ids=lambda field: field.name)
def test_every_setting_of_the_sampler_is_an_option_of_generate(field):
    options = {option.name: option for option in program.get_command(None, "generate").params}
    option = options[field.name]
    if field.type in (int, float):
        kinds = {int: click.types.IntParamType, float: click.types.FloatParamType}
        assert isinstance(option.type, kinds[field.type])
        told = re.search(r"Default (\d+(?:\.\d+)?)", option.help)
        assert told is None or float(told[1]) == field.default, option.help
        assert told or not field.default, f"{field.name}: the help does not tell the default"


# -- trimix help ----------------------------------------------------------------------------


def test_every_page_is_a_topic_with_a_title_and_a_summary():
    assert {path.stem for path in FOLDER.iterdir()} == set(TOPICS)
    for topic in TOPICS:
        title, empty, first, after, *_ = page(topic).splitlines()
        assert title.startswith("# ") and empty == after == "" and first == summary(topic)
        assert len(first) <= WIDTH - 16 and first.endswith("."), f"{topic}: {first}"


@pytest.mark.parametrize("topic", TOPICS)
def test_a_pages_code_fits_a_terminal(topic):
    for start, _, text in blocks(FOLDER / f"{topic}.md"):
        for number, line in enumerate(text.splitlines(), start):
            assert len(line) <= WIDTH, f"{topic}.md:{number} has {len(line)} columns"


def test_the_wheel_ships_the_pages_and_readme_links_to_them():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "help/*.md" in settings["tool"]["setuptools"]["package-data"]["trimix_gguf"]
    readme = README.read_text(encoding="utf-8")
    for topic in TOPICS:
        assert f"](trimix_gguf/help/{topic}.md)" in readme, f"README does not link to {topic}"


def test_without_a_topic_the_pages_are_listed(trimix):
    listed = trimix("help").stdout.decode().splitlines()
    assert [line.split()[0] for line in listed[2:]] == list(TOPICS)
    assert all(line.endswith(summary(t)) for line, t in zip(listed[2:], TOPICS, strict=True))


def test_through_a_pipe_a_page_is_as_it_is_written(trimix):
    assert trimix("help", "limits").stdout == (FOLDER / "limits.md").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminal")
def test_on_a_terminal_a_page_is_formatted():
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "PAGER": "cat", "TERM": "xterm"}
    command = [sys.executable, "-m", "trimix_gguf.cli", "help", "limits"]
    subprocess.run(command, env=environment, stdout=theirs, stdin=theirs, timeout=60, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "Limits" in shown and "# Limits" not in shown and "`lstrip`" not in shown


def test_the_name_of_a_command_shows_its_options(trimix):
    shown = trimix("help", "generate").stdout.decode()
    assert "--temperature" in shown and "generate [OPTIONS] [PROMPT]" in shown


@pytest.mark.parametrize("typed, nearest", [("servr", "serve"), ("own_models", "own-models")])
def test_an_unknown_topic_is_one_line_with_the_nearest(trimix, typed, nearest):
    said = one_line_error(trimix("help", typed))
    assert f"did you mean {nearest}?" in said and all(topic in said for topic in TOPICS)


def test_a_topic_like_no_other_gets_the_list(trimix):
    said = one_line_error(trimix("help", "zzzz"))
    assert "did you mean" not in said and "install" in said
