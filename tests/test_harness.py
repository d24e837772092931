"""The harness's own tasks over the shipped trio, against naive loops; no network."""

import json
import subprocess
import sys

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")

from harness_tasks import STOPS, TEXTS, write_tasks  # noqa: E402
from naive_mix import CHOICES, MIX, encode, naive, naive_pair, near  # noqa: E402

from trimix_gguf import TrimixError, Trio, generate  # noqa: E402
from trimix_gguf.evaluation.running.harness import TrimixLM, run_harness  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True, scope="module")
def offline():
    """Modules that are loaded have read the variables already."""
    import datasets.config
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def results(trio, folder, offline):
    here = {"include_path": folder, "include_defaults": False}
    return run_harness(TrimixLM(trio, MIX), ["kk_*"], **here, bootstrap_iters=0)


@pytest.fixture(scope="module")
def trio():
    """One thread: these are many small decodes, which two on a busy machine wait for."""
    with Trio.nano(n_threads=1) as opened:
        yield opened


def test_accuracy_is_that_of_a_naive_loop(trio, results):
    right = []
    for (question, choices, label), sample in zip(
        CHOICES, results["samples"]["kk_choice"], strict=True
    ):
        context = f"Сұрақ: {question}\nЖауап:"
        scores = [naive_pair(trio, context, f" {choice}", MIX) for choice in choices]
        harness_scores = [response[0] for (response,) in sample["resps"]]
        assert harness_scores == near([score for score, _ in scores])
        assert [response[1] for (response,) in sample["resps"]] == [g for _, g in scores]
        right.append(max(range(4), key=harness_scores.__getitem__) == label)
    assert results["results"]["kk_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_perplexity_is_that_of_a_naive_loop(trio, results):
    bos = trio.models["large_ins"].bos
    logprob = sum(naive(trio, bos, encode(trio, text)[1:], MIX)[0] for text in TEXTS)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    bits = results["results"]["kk_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-logprob / n_bytes / np.log(2), abs=2e-3)


def test_generated_text_is_that_of_generate(trio, results):
    for (question, _, _), sample in zip(CHOICES, results["samples"]["kk_text"], strict=False):
        alone = generate(
            trio, question, weights=MIX, temperature=0, stop=STOPS, max_tokens=12, speculative="off"
        )
        assert sample["resps"] == [[alone.text]]


def test_results_say_which_weights(results):
    assert results["config"]["weights"] == {"method": "fixed", "alpha": 0.3, "beta": 0.9}
    assert results["config"]["models"]["small_cpt"] == "small_cpt.gguf"
    json.dumps(results["config"])


def test_limit_and_simple_evaluate_itself(trio, folder, results):
    from lm_eval.tasks import TaskManager

    whole = results["samples"]["kk_choice"]
    again = lm_eval.simple_evaluate(
        TrimixLM(trio, MIX),
        tasks=["kk_choice"],
        limit=2,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )["samples"]["kk_choice"]
    assert [s["resps"] for s in again] == [s["resps"] for s in whole[:2]]


def test_a_task_that_is_not_there(trio, folder):
    here = {"include_path": folder, "include_defaults": False}
    with pytest.raises(TrimixError, match="no task 'kk_choise'; did you mean kk_choice") as caught:
        run_harness(TrimixLM(trio), ["kk_text", "kk_choise"], **here)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrimixError, match="no harness task was named"):
        run_harness(TrimixLM(trio), [], **here)


def test_a_task_whose_data_is_not_there(trio, folder, tmp_path):
    config = json.loads((folder / "kk_text.yaml").read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "none.jsonl")}}
    (tmp_path / "kk_text.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TrimixError, match="cannot read the data of its task: .*none.jsonl") as e:
        run_harness(TrimixLM(trio), ["kk_text"], include_path=tmp_path, include_defaults=False)
    assert "\n" not in str(e.value)


def test_without_lm_eval_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None; import trimix_gguf.evaluation.running.harness"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "TrimixError: the harness needs lm-eval: pip install 'trimix-gguf[lm-eval]'"
        in (run.stderr.splitlines()[-1])
    )


def test_tasks_in_chat(trio, folder):
    results = run_harness(
        TrimixLM(trio, MIX), ["kk_text"], limit=1, include_path=folder, include_defaults=False,
        apply_chat_template=True, bootstrap_iters=0,
    )  # fmt: skip
    (sample,) = results["samples"]["kk_text"]
    lm = TrimixLM(trio, MIX)
    asked = lm.apply_chat_template([{"role": "user", "content": CHOICES[0][0]}])
    assert sample["arguments"][0][0] == asked
    prompt = trio.prompt(asked, special=True)
    options = {"temperature": 0, "stop": STOPS, "max_tokens": 12, "speculative": "off"}
    assert sample["resps"] == [[generate(trio, prompt, weights=MIX, **options).text]]


def test_the_command_prints_the_harness_table_and_keeps_its_results(
    trimix, folder, tmp_path, results
):
    out = tmp_path / "out"
    run = trimix(
        "eval", "--harness", "kk_choice", "--harness-path", folder, "--weights", "0.3,0.9",
        "--threads", "1", "-o", out,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    assert "|kk_choice|" in run.stdout.decode()
    kept = json.loads((out / "harness.json").read_text("utf-8"))["results"]["kk_choice"]
    assert kept["acc,none"] == results["results"]["kk_choice"]["acc,none"]
