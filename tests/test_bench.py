"""trimix bench: what it reports, and the arithmetic behind; nothing here is timed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from summed import grid_nll

from trimix_gguf import Trio, stream_generate
from trimix_gguf.answering.drafting import Drafting
from trimix_gguf.bench import measuring as bench
from trimix_gguf.bench import timing
from trimix_gguf.cli.bench import people
from trimix_gguf.machine.gguf_file import GGUFFile, TensorInfo
from trimix_gguf.mixing.fusion import Mix, Weights
from trimix_gguf.roles import ROLES

SMALL = ("--threads", "1", "--n-prompt", "24", "--n-tokens", "12", "--repeats", "2")


@pytest.fixture(scope="module")
def trio():
    """Its own, on one thread: it stays quick where other processes keep the cores busy."""
    with Trio.nano(n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def report():
    """One run of the command, its picture beside it."""
    command = [sys.executable, "-m", "trimix_gguf.cli", "bench", *SMALL, "--json"]
    result = subprocess.run(command, capture_output=True, timeout=120)
    assert result.returncode == 0 and result.stderr == b"", result.stderr.decode()
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_json_has_the_documented_keys(report):
    for role in ROLES:
        assert report[role]["prefill_tps"] > 0 and report[role]["decode_tps"] > 0
    assert report["lockstep"]["decode_tps"] > 0 and report["lockstep"]["overhead"] >= 1
    drafted = report["speculative"]
    assert drafted["decode_tps"] > 0 and drafted["n_draft"] >= 0
    assert drafted["acceptance"] is None or 0 <= drafted["acceptance"] <= 1
    assert drafted["tokens_per_round"] >= 1
    assert report["speculative_over_lockstep"] > 0
    assert report["grid"]["over_naive"] > 0 and report["grid"]["share_of_prefill"] > 0
    assert all(report["memory"][key] > 0 for key in ("peak_rss", "files", "kv"))
    assert list(report["answer_s"]) == list(timing.CONFIGURATIONS)
    assert all(list(parts) == list(timing.PARTS) for parts in report["answer_s"].values())


def test_json_names_machine_build_and_files(report, nano_files):
    assert report["machine"]["cpu"] and report["machine"]["llama-cpp-python"]
    assert report["machine"]["threads"] == dict.fromkeys(ROLES, 1)
    sizes = {role: path.stat().st_size for role, path in nano_files.items()}
    assert {role: file["size"] for role, file in report["files"].items()} == sizes
    assert report["memory"]["files"] == sum(sizes.values()) < report["memory"]["peak_rss"]
    assert report["files"]["large_ins"]["types"][0] == "Q8_0"
    assert (report["n_prompt_tokens"], report["n_tokens"], report["repeats"]) == (24, 12, 2)
    same = report["same_text"]
    assert same is True or same["gap"] < 0.05  # a batch may flip two tokens that all but tie


def test_table_and_plot_with_fixed_weights(trimix, tmp_path):
    text, plot = tmp_path / "text.txt", tmp_path / "bars.png"
    text.write_text("Абай — ақын. ", encoding="utf-8")
    arguments = ("--weights", "0.3,0.9", "--prompt", text, "--plot", plot)
    result = trimix("bench", *SMALL, *arguments)
    words = result.stdout.decode()
    assert result.returncode == 0, result.stderr.decode()
    assert "24 prompt tokens" in words and "alpha 0.3, beta 0.9 (fixed)" in words
    assert re.search(r"all of it +\S+ s 100.0% +\S+ s 100.0%", words)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "much"), "two numbers"),
        (("--prompt", "nowhere.txt"), "nowhere.txt"),
        (("--n-prompt", "500", "--n-tokens", "20"), "--n-ctx"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(trimix, arguments, words):
    result = trimix("bench", "--threads", "1", *arguments)
    assert result.returncode == 1 and result.stdout == b""
    (line,) = result.stderr.decode().splitlines()
    assert words in line


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_exits_130():
    command = [sys.executable, "-m", "trimix_gguf.cli", "bench", "--threads", "1"]
    command += ["--repeats", "1000", "--verbose"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not process.stderr.readline().startswith(b"models run"):
            assert process.poll() is None
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in error


def test_people_are_those_whose_answers_fill_seven_tenths_of_the_time():
    assert "30 people who each ask once in 5 minutes" in people(7.0)
    assert "60 people" in people(3.5) and "nobody" in people(301)


def test_only_tensors_that_a_token_reads_whole_count():
    def file(**sizes):
        names = {"embedding": "token_embd.weight", "output": "output.weight", "up": "ffn_up.weight"}
        tensors = (TensorInfo(names[n], (size,), "I8", 0, size) for n, size in sizes.items())
        return GGUFFile(Path("a.gguf"), 3, {}, tuple(tensors), 0)

    assert bench.read_bytes(file(embedding=100, output=10, up=1)) == 11
    assert bench.read_bytes(file(embedding=100, up=1)) == 101  # tied: it is the output too


def test_of_experts_only_those_count_that_a_token_asks():
    """Bug: the floor of such a model was several times what a step was measured to take."""
    names = ("blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_shexp.weight")
    tensors = tuple(TensorInfo(name, (800,), "I8", 0, 800) for name in names)
    moe = {"expert_count": 8, "expert_used_count": 2}
    known = {"general.architecture": "moe", **{f"moe.{key}": n for key, n in moe.items()}}
    assert bench.read_bytes(GGUFFile(Path("a.gguf"), 3, known, tensors, 0)) == 800 + 200 + 800


def test_floor_is_the_active_weights_over_the_bandwidth(trio, monkeypatch):
    monkeypatch.setattr(bench, "bandwidth", lambda: 2e9)
    read = {role: bench.read_bytes(model.file) for role, model in trio.models.items()}
    found = bench.floor(trio, Mix(Weights(0.1, 0.9)), seconds=0.004)
    assert found["bytes_per_token"] == read["large_ins"] + read["small_cpt"]
    assert found["floor_ms"] == pytest.approx(found["bytes_per_token"] / 2e6)
    assert found["measured_ms"] == pytest.approx(4.0) and found["gb_per_s"] == 2.0


def test_texts_part_at_the_first_other_token(trio):
    assert bench.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert bench.first_difference([1, 2, 3], [1, 5, 6]) == 1
    prompt, mix = bench.bench_prompt(trio, n_tokens=20), Mix(Weights(0.3, 0.9))
    runs = [run(tokens=[4, 5, 6]), run(tokens=[4, 9, 6])]
    pairs = [once(lockstep=runs[0], speculative=other) for other in (runs[0], runs[1])]
    assert bench.same_text(trio, prompt, mix, pairs[:1]) is True
    parted = bench.same_text(trio, prompt, mix, pairs)
    assert parted["index"] == 1 and parted["gap"] > 0


def test_speculation_is_counted_by_rounds():
    # Drafts of 2, 0 and 3 gave 3, 1 and 2 tokens: three of five were kept.
    drafted = run(tokens=range(6), seconds=1.0, n_drafted=[2, 0, 3])
    lockstep = run(tokens=range(6), seconds=2.0, inside=1.5)
    found = bench.speeds([once(lockstep=lockstep, speculative=drafted)], n_prompt=10)
    assert found["speculative_over_lockstep"] == 2.0
    assert found["speculative"]["acceptance"] == 0.6
    assert found["speculative"]["tokens_per_round"] == 2.0
    assert found["speculative"]["n_draft"] == 2
    assert found["lockstep"]["outside_share"] == 0.25


def test_overlapping_decodes_count_once():
    assert bench.covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (1.5, 1.6)]) == 4.0


def test_the_naive_form_scores_as_the_fast_one():
    rng = np.random.default_rng(0)
    rows = {role: rng.normal(size=(5, 300)).astype(np.float32) for role in ROLES}
    settings = {"targets": np.arange(5), "alphas": (0.1, 1.0), "betas": (0.3, 0.9)}
    assert bench.naive_nll(**rows, **settings) == pytest.approx(grid_nll(**rows, **settings))


def test_prompt_is_cut_and_repeated(trio):
    whole = bench.bench_prompt(trio, "Абай — ақын.")
    ids = whole.segments[-1].ids["large_ins"]
    for n in (5, 100):
        prompt = bench.bench_prompt(trio, "Абай — ақын.", n)
        found = prompt.segments[-1].ids["large_ins"]
        assert prompt.n_tokens() == n and found == (ids * 100)[: len(found)]


def test_end_of_generation_does_not_cut_a_run(trio):
    """small_base alone would end at once; the measurement goes on, and restores Model.decode."""
    prompt = bench.bench_prompt(trio, n_tokens=40)
    drafting = Drafting(never=True)
    found = bench.decode(trio, prompt, Mix(Weights(0, 0)), drafting=drafting, n_tokens=80)
    assert len(found.tokens) == 80 and not trio.end_of_generation & set(found.tokens)
    assert all("decode" not in vars(model) for model in trio.models.values())


def test_a_masked_mix_is_decoded_with_its_mask(trio):
    """Bug: only the weights of contrastive decoding were measured."""
    # Far enough from large_ins that the likeliest token is often one that the mask takes away.
    contrastive, prompt = Mix(Weights(6, 0), 0.1), bench.bench_prompt(trio, n_tokens=90)
    masked, unmasked = (
        bench.decode(trio, prompt, mix, drafting=Drafting(never=True), n_tokens=16).tokens
        for mix in (contrastive, Mix(contrastive.weights))
    )
    endless = dict.fromkeys(trio.end_of_generation, -1e9)
    options = {"temperature": 0, "max_tokens": 16, "logit_bias": endless, "speculative": "off"}
    stream = stream_generate(trio, prompt, weights=contrastive, **options)
    assert masked == [t.id for event in stream for t in event.tokens] != unmasked


def run(tokens, seconds=1.0, inside=1.0, n_drafted=(0,)):
    return bench.Run(list(tokens), seconds, inside, list(n_drafted))


def once(**runs):
    """A repeat whose other forms took a second."""
    alone = {role: run([1]) for role in ROLES}
    return bench.Repeat(dict.fromkeys(ROLES, 1.0), alone, speed={}, grid={}, **runs)
