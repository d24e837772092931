"""Methods are named in two tables, and a plausibility mask never parts from its weights."""

import ast
import json
import subprocess
import sys
from typing import get_args

import pytest
from conftest import KAZAKH, ROOT
from test_cli import one_line_error

from trimix_gguf import Trio, Weights, generate
from trimix_gguf.answering.conversation import Conversation
from trimix_gguf.choosing.methods import CHOOSING, ChosenBy, evaluated_methods, runtime_methods
from trimix_gguf.mixing.fusion import METHODS, Mix
from trimix_gguf.roles import ROLES
from trimix_gguf.trios.triofile import ModelEntry, TrioFile

TABLES = {"mixing/fusion.py", "choosing/methods.py"}
# Hot, so that a mask changes what is said.
HOT = ("-n", "12", "--seed", "5", "--threads", "1", "--temperature", "2", "--speculative", "off")
SAMPLING = {"max_tokens": 12, "seed": 5, "temperature": 2.0, "speculative": "off"}


# -- the tables -----------------------------------------------------------------------------


def test_a_new_row_appears_in_every_list():
    code = """
from trimix_gguf.mixing import fusion
fusion.METHODS["made-up"] = fusion.Mix(fusion.Weights(0.5, 0.5), 0.2)
from trimix_gguf.choosing import methods
methods.CHOOSING["by-dice"] = methods.Choosing("dice", "runtime")
methods.CHOOSING["by-luck"] = methods.Choosing("luck", "task")
from pathlib import Path
from trimix_gguf.cli.chat import chat
from trimix_gguf.cli.generate import generate
from trimix_gguf.server.openai import parse_chat
from trimix_gguf.server.errors import RequestError
from trimix_gguf.trios.triofile import parse_trio
from trimix_gguf.evaluation.names.compared import check_methods
models = "".join(f"[models.{role}]\\n" for role in ("large_ins", "small_cpt", "small_base"))
for name in ("made-up", "by-dice"):
    for command in (chat, generate):
        (option,) = (p for p in command.params if p.name == "method")
        assert name in option.type.choices
    asked = {"messages": [{"role": "user", "content": "a"}], "trimix": {"method": name}}
    parse_chat(asked)
    trio = parse_trio(f'version = 1\\nname = "a"\\nmethod = "{name}"\\n{models}', Path("trio.toml"))
    assert (trio.fixed_mix == fusion.METHODS["made-up"]) is (name == "made-up")
check_methods(("made-up", "by-dice", "by-luck"))
assert "by-luck" not in option.type.choices
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_list_of_methods_stands_beside_the_tables():
    names = {*evaluated_methods(), *CHOOSING} - {*ROLES}  # a role is a method too

    def named(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {part.strip() for part in node.value.split(",")} & names
        return set()

    lists = (ast.List, ast.Tuple, ast.Set)
    for path in (ROOT / "trimix_gguf").glob("*/**/*.py"):
        if str(path.relative_to(ROOT / "trimix_gguf")) in TABLES:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            children = node.elts if isinstance(node, lists) else []
            children = node.keys if isinstance(node, ast.Dict) else children
            found = set().union(named(node), *map(named, children))
            assert len(found) < 2, f"{path.name}:{node.lineno} lists methods: {sorted(found)}"


def test_the_type_hint_names_the_methods_that_choose_for_any_prompt():
    assert get_args(ChosenBy) == tuple(n for n in runtime_methods() if n not in METHODS)
    assert not CHOOSING.keys() & METHODS.keys()
    assert all("\n" not in row.by for row in CHOOSING.values())


# -- a mask and its weights -----------------------------------------------------------------


def said(*questions, **options):
    """What the Python API answers with the settings of HOT."""
    with Trio.nano(n_threads=1) as trio:
        conversation = Conversation(trio, **SAMPLING, **options)
        return ["".join(r.text for r in conversation.say(q)).strip() for q in questions]


@pytest.mark.parametrize("command, weights", [("auto", None), ("0.1,0.9", Weights(0.1, 0.9))])
def test_a_chat_that_leaves_contrastive_leaves_its_mask(trimix, command, weights):
    """Bug: `/weights auto` kept the threshold of `--method contrastive`."""
    stdin = f"/weights {command}\n{KAZAKH}\n".encode()
    unmasked, masked = (
        said(KAZAKH, weights=weights),
        said(KAZAKH, weights=weights, plausibility_threshold=0.1),
    )
    assert unmasked != masked
    result = trimix("chat", *HOT, "--method", "contrastive", stdin=stdin)
    assert result.stdout.decode().splitlines()[-1].strip() == unmasked[0]
    # One that the user gives belongs to all answers.
    result = trimix(
        "chat", *HOT, "--method", "contrastive", "--plausibility-threshold", "0.1", stdin=stdin
    )
    assert result.stdout.decode().splitlines()[-1].strip() == masked[0]


def test_a_chat_keeps_a_held_mask_through_its_file(trimix, tmp_path):
    """Bug: /save wrote a chat's weights without their threshold."""
    path = tmp_path / "chat.json"
    stdin = f"{KAZAKH}\n/weights hold\n/save {path}\n".encode()
    assert trimix("chat", *HOT, "--method", "contrastive", stdin=stdin).returncode == 0
    held = {"alpha": 1.5, "beta": 0.0, "plausibility_threshold": 0.1}
    assert json.loads(path.read_text("utf-8"))["weights"] == held
    result = trimix("chat", *HOT, "--load", path, stdin=b"/weights\n")
    assert result.stdout.decode().strip() == "weights: alpha 1.5, beta 0, threshold 0.1, held"


def test_a_task_chooses_weights_or_they_are_fixed(trimix, tmp_path):
    """Bug: beside `--task`, `--method contrastive` quietly became ppl; `--weights` was ignored."""
    task = tmp_path / "task.txt"
    task.write_text(f"{KAZAKH}\n", encoding="utf-8")
    arguments = ("generate", KAZAKH, *HOT, "--task", task, "--json")

    def answer(*more):
        return json.loads(trimix(*arguments, *more).stdout)

    for fixed in (("--method", "contrastive"), ("--method", "large_ins"), ("--weights", "1,0")):
        refused = trimix(*arguments, *fixed)
        assert refused.returncode == 2 and b"give --task or --" in refused.stderr
    chosen, masked = answer(), answer("--plausibility-threshold", "0.1")
    assert "plausibility_threshold" not in chosen["weights"]
    assert masked["weights"]["plausibility_threshold"] == 0.1 and masked["text"] != chosen["text"]
    asked, by_default = answer("--method", "auto")["weights"], chosen["weights"]
    assert asked == by_default and asked["method"] == "auto"
    assert answer("--method", "ppl")["weights"]["method"] == "ppl"


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("fixed", [("--method", "large_ins"), ("--weights", "1,0")], ids=str)
@pytest.mark.parametrize(
    "asked", [("--grid", "0.1,0.5"), ("--last", "5"), ("--score-tokens", "9")], ids=str
)
def test_weights_are_fixed_or_chosen(trimix, command, fixed, asked):
    """Bug: what says how a prompt chooses weights was ignored beside fixed ones."""
    refused = trimix(command, *(["a"] if command == "generate" else []), *fixed, *asked)
    assert refused.returncode == 2
    assert f"give {asked[0]} or {fixed[0]}" in refused.stderr.decode()


def test_average_goes_with_a_task(trimix):
    """Bug: `generate --average` without a task had no effect, and nothing said so."""
    refused = trimix("generate", "a", "--average", "micro")
    assert refused.returncode == 2 and b"--average goes with --task" in refused.stderr


@pytest.mark.parametrize(
    "asked", [("--grid", "0.1,0.5"), ("--last", "5"), ("--score-tokens", "9")], ids=str
)
def test_a_prompt_chooses_in_place_of_a_trios_fixed_weights(trimix, contrastive_trio, asked):
    """Bug: only `--grid` did; a trio with weights of its own took no notice of the others."""
    result = trimix("generate", KAZAKH, *HOT, "--trio", contrastive_trio, "--json", *asked)
    assert json.loads(result.stdout)["weights"]["method"] == "auto"


@pytest.fixture
def contrastive_trio(tmp_path, nano_files):
    """A trio file that asks for the masked method."""
    models = {role: ModelEntry(path=str(path)) for role, path in nano_files.items()}
    TrioFile(folder=tmp_path, name="masked", models=models, method="contrastive").write()
    return tmp_path


def test_bench_measures_the_trios_own_mask(trimix, contrastive_trio):
    """Bug: `trimix bench` decoded a contrastive trio's weights without their mask."""
    small = ("--threads", "1", "--n-prompt", "16", "--n-tokens", "4", "--repeats", "1")
    result = trimix("bench", "--trio", contrastive_trio, *small, "--json")
    weights = json.loads(result.stdout)["weights"]
    expected = {"alpha": 1.5, "beta": 0.0, "plausibility_threshold": 0.1, "method": "fixed"}
    assert weights == expected


def test_score_refuses_a_mix_that_masks(trimix, contrastive_trio, nano_files):
    """Bug: `trimix score` gave a contrastive trio's perplexity as if nothing was masked."""
    refused = trimix("score", "--trio", contrastive_trio, stdin=KAZAKH.encode())
    assert "plausibility threshold" in one_line_error(refused)
    files = [part for r, p in nano_files.items() for part in (f"--{r.replace('_', '-')}", p)]
    assert trimix("score", *files, stdin=KAZAKH.encode()).returncode == 0


@pytest.mark.parametrize(
    "method, weights",
    [
        ("contrastive", {"method": "fixed", **METHODS["contrastive"].to_json()}),
        ("ent", {"method": "ent", "unprompted": {"alpha": 0.1, "beta": 0.9}, "chosen": []}),
    ],
)
def test_the_harness_mixes_as_the_trio_file_says(
    tmp_path, nano_files, monkeypatch, method, weights
):
    """Bug: `trimix eval --harness` scored a contrastive trio without its mask, and ent by ppl."""
    pytest.importorskip("lm_eval")
    from trimix_gguf.cli import trimix
    from trimix_gguf.evaluation.running import harness

    models = {role: ModelEntry(path=str(path)) for role, path in nano_files.items()}
    TrioFile(folder=tmp_path, name="made", models=models, method=method).write()
    given = []
    monkeypatch.setattr(
        harness, "run_harness", lambda lm, *a, **o: given.append(lm.get_model_info()) or {}
    )
    monkeypatch.setattr(harness, "make_table", lambda results: "")
    trimix(["eval", "--harness", "any", "--trio", str(tmp_path)], standalone_mode=False)
    assert [info["weights"] for info in given] == [weights]


def test_a_threshold_can_be_an_option_or_part_of_the_mix(trio):
    options = {"temperature": 2.0, "seed": 5, "max_tokens": 12}
    weights, masked = Weights(0.1, 0.9), Mix(Weights(0.1, 0.9), 0.1)
    whole = generate(trio, KAZAKH, weights=masked, **options)
    option = generate(trio, KAZAKH, weights=weights, plausibility_threshold=0.1, **options)
    without = generate(trio, KAZAKH, weights=masked, plausibility_threshold=0.0, **options)
    pair = generate(trio, KAZAKH, weights=weights, **options)
    assert option.text == whole.text != pair.text == without.text
    assert option.selection == whole.selection and whole.selection.mix == masked
    again = generate(trio, KAZAKH, weights=whole.selection, **options)
    assert again.text == whole.text
