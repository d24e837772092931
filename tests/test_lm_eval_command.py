"""lm-evaluation-harness's own command: on a trio in its process, and on a trio behind HTTP."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("lm_eval")

from gguf import GGUFReader  # noqa: E402
from harness_tasks import write_tasks  # noqa: E402
from naive_mix import MIX, near  # noqa: E402
from served import serving  # noqa: E402

from trimix_gguf import Trio, Weights, select_weights  # noqa: E402
from trimix_gguf.errors import WeightsError  # noqa: E402
from trimix_gguf.evaluation.running.lm_eval_model import NamedTrioLM  # noqa: E402
from trimix_gguf.mixing.fusion import Mix  # noqa: E402
from trimix_gguf.roles import ROLES  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402

MODULE = "trimix_gguf.evaluation.running.lm_eval_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, and a trio of the shipped models with fixed weights.

    Its vocabulary adds no BOS: what lm-eval sends to a server never has one.
    """
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    text = f"version = 1\nname = 'fixed'\nn_ctx = 512\nweights = {[MIX.alpha, MIX.beta]}\n"
    for role in ROLES:
        copy = shutil.copy(NANO / f"{role}.gguf", folder)
        adds_bos = GGUFReader(copy, "r+").fields["tokenizer.ggml.add_bos_token"]
        adds_bos.parts[adds_bos.data[0]][0] = False
        text += f"[models.{role}]\npath = '{role}.gguf'\n"
    (folder / "fixed.toml").write_text(text, encoding="utf-8")
    return folder


def lm_eval(folder, out, *arguments):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", MODULE, "run", "--include_path", str(folder)]
    command += ["--log_samples", "--output_path", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})


def samples(folder, out, *arguments):
    """Each task's answers, in the order of its questions."""
    run = lm_eval(folder, out, "--tasks", "kk_choice,kk_rolling,kk_text", *arguments)
    assert run.returncode == 0, run.stderr[-2000:]
    answers = {}
    for file in out.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        answers[file.name.split("_20")[0]] = [row["resps"] for row in rows]
    return answers


def numbers(answers):
    return [float(number) for (answer,) in answers for number in [first(answer)]]


def first(answer):
    """The logprob of an answer, which is one number or a pair with `is_greedy`."""
    return answer if isinstance(answer, str) else answer[0]


def test_the_server_answers_as_the_trio_itself(folder, tmp_path):
    """Multiple choice, perplexity of whole texts and generation, each over HTTP."""
    trio = folder / "fixed.toml"
    here = samples(folder, tmp_path / "here", "--model", "trimix", "--model_args", f"trio={trio}")
    with serving("--trio", trio) as server:
        where = f"model=fixed,base_url={server.url}/v1/completions,tokenizer_backend=remote"
        where += ",max_length=511,custom_prefix_token_id=0"  # it takes an id of 0 for none
        over = ("--model", "local-completions", "--model_args", where)
        there = samples(folder, tmp_path / "there", *over)
    assert here.keys() == there.keys() and len(here) == 3
    assert there["samples_kk_text"] == here["samples_kk_text"]
    for task in ("samples_kk_choice", "samples_kk_rolling"):
        for mine, theirs in zip(here[task], there[task], strict=True):
            assert numbers(theirs) == near(numbers(mine)), task


def test_weights_by_name_and_a_wrong_trio(folder, tmp_path):
    task = ("--tasks", "kk_choice", "--model", "trimix", "--model_args")
    run = lm_eval(folder, tmp_path, *task, f"trio=nano,alpha={MIX.alpha},beta={MIX.beta}")
    assert run.returncode == 0 and "kk_choice" in run.stdout, run.stderr[-2000:]
    for wrong, words in (
        ("trio=nanoo", "did you mean nano?"),
        ("alpha=1", "give both or none"),
        ("method=pplx", "'pplx' does not choose"),
        ("methd=ppl", "methd is unknown"),
    ):
        run = lm_eval(folder, tmp_path, *task, wrong)
        assert run.returncode and words in run.stderr.splitlines()[-1]


def test_a_fixed_mix_by_its_name(folder):
    """Bug: any name that chooses nothing by a prompt, such as proxy-tuning, was taken for ppl."""
    for name, weights in (("proxy-tuning", Weights(1.0, 1.0)), ("large_ins", Weights(1.0, 0.0))):
        told = NamedTrioLM(trio=folder / "fixed.toml", method=name).get_model_info()["weights"]
        assert told == {"method": "fixed", **Mix.of(weights).to_json()}
    with Trio.nano(n_threads=1) as trio, pytest.raises(WeightsError, match="does not choose"):
        select_weights(trio, trio.prompt("Қазақстан"), method="proxy-tuning")


def test_the_harness_finds_the_model_by_its_entry_point():
    (found,) = (e for e in entry_points(group="lm_eval.models") if e.name == "trimix")
    assert found.load().__name__ == "NamedTrioLM"
