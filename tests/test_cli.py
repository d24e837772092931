"""Each command driven as a user would, on real GGUF files."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import KAZAKH


def one_line_error(result, code=1):
    assert result.returncode == code, result.stderr.decode()
    assert len(result.stderr.decode().strip().splitlines()) == 1, result.stderr.decode()
    assert b"Traceback" not in result.stderr and result.stdout == b""
    return result.stderr.decode()


def test_generate_streams_text_and_says_its_weights(trimix):
    result = trimix(
        "generate",
        KAZAKH,
        "-n",
        "12",
        "--seed",
        "3",
        "--logit-bias",
        "0=-100",
        "--logit-bias",
        "3=-100",
    )
    assert result.returncode == 0 and result.stdout.decode().strip()
    assert "weights: alpha" in result.stderr.decode()


def test_generate_json_has_the_documented_keys(trimix):
    result = trimix("generate", "-", "-n", "8", "--json", "--seed", "3", stdin=KAZAKH.encode())
    report = json.loads(result.stdout)
    assert report["weights"]["alpha"] in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    assert report["weights"]["method"] == "auto"
    assert {"large_ins", "small_base", "small_cpt", "fused"} == report["perplexity"].keys()
    assert report["n_tokens"] <= 8 and report["finish_reason"] in ("length", "stop")
    assert {"ttft_s", "select_s", "prefill_tps"} <= report["speed"].keys()


def test_same_seed_same_text_and_trace_agrees(trimix, tmp_path):
    trace = tmp_path / "trace.jsonl"
    arguments = ("generate", KAZAKH, "-n", "10", "--seed", "5", "--weights", "0.1,0.9", "--json")
    plain, traced = trimix(*arguments), trimix(*arguments, "--trace", trace)
    assert json.loads(plain.stdout)["text"] == json.loads(traced.stdout)["text"]
    rows = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= json.loads(traced.stdout)["n_tokens"]
    for row in rows:
        assert set(row["probabilities"]) == {"large_ins", "small_cpt", "small_base", "fused"}
        assert all(0 <= p <= 1 for p in row["probabilities"].values())
        assert row["weights"] == {"alpha": 0.1, "beta": 0.9}


def test_json_schema_is_obeyed(trimix, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["sports", "travel"]}')
    result = trimix("generate", KAZAKH, "--json-schema", schema, "--seed", "1", "-n", "20")
    assert json.loads(result.stdout) in ("sports", "travel")


def test_score_table_json_and_plot(trimix, tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text(f"{KAZAKH}\n\nThe prince had come.\n", encoding="utf-8")
    plot = tmp_path / "surface.png"
    report = json.loads(trimix("score", text, "--json", "--plot", plot).stdout)
    assert report["n_texts"] == 2 and report["convention"] == "micro"
    lowest = min(min(row) for row in report["grid"]["mean_nll"])
    assert report["perplexity"]["fused"] == pytest.approx(2.718281828459045**lowest)
    assert plot.read_bytes().startswith(b"\x89PNG")
    continuous = json.loads(trimix("score", text, "--json", "--grid", "continuous").stdout)
    assert continuous["perplexity"]["fused"] <= report["perplexity"]["fused"] * (1 + 1e-6)


def test_high_perplexities_are_numbers_of_their_own_in_the_table(trimix):
    """Bug: beside each other, those above 99999 were written as one."""
    text = "ѪꙂ ꙆѮ".encode()  # letters that nobody taught it
    grid = json.loads(trimix("score", "--json", stdin=text).stdout)["grid"]
    assert max(map(max, grid["mean_nll"])) > math.log(1e6)
    rows = trimix("score", stdin=text).stdout.decode().splitlines()[-len(grid["alphas"]) :]
    for row, mean_nll in zip(rows, grid["mean_nll"], strict=True):
        shown = [float(cell) for cell in row.split()[1:]]
        assert shown == pytest.approx([math.exp(nll) for nll in mean_nll], abs=0.01)


def test_score_prints_its_table_where_the_picture_cannot_be_written(trimix, tmp_path):
    """All that was scored was lost."""
    done = trimix("score", "--plot", tmp_path / "nowhere" / "a.png", stdin=KAZAKH.encode())
    assert done.returncode == 1 and "nowhere" in done.stderr.decode()
    assert "small_cpt" in done.stdout.decode()


def test_weights_for_a_task_file_and_scored_spans(trimix, tmp_path):
    task = tmp_path / "task.txt"
    task.write_text(f"{KAZAKH}\n\n{KAZAKH} {KAZAKH}", encoding="utf-8")
    result = trimix("generate", KAZAKH, "--task", task, "-n", "2", "--json")
    assert json.loads(result.stdout)["weights"]["method"] == "auto"
    spans = json.loads(
        trimix("score", "--spans", "[[", "]]", "--json", stdin=b"one [[two three]] four").stdout
    )
    whole = json.loads(trimix("score", "--json", stdin=b"one two three four").stdout)
    assert 0 < spans["n_tokens"] < whole["n_tokens"]


def test_only_a_newline_ends_a_line_of_what_is_scored(trimix):
    """Bug: the line separator U+2028 within a text was scored as a newline."""
    one, two, three = (
        json.loads(trimix("score", "--json", stdin=f"Бір жол{end}екінші жол".encode()).stdout)
        for end in ("\u2028", "\r\n", "\n")
    )
    assert one["n_tokens"] > two["n_tokens"] == three["n_tokens"]


def test_doctor_names_build_devices_and_fit(trimix):
    report = json.loads(trimix("doctor", "--json").stdout)
    assert report["llama.cpp"]["llama-cpp-python"] and report["devices"]
    assert report["trio"]["fits"] == "yes"


def test_more_memory_than_the_machine_has_is_refused(trimix):
    result = trimix("generate", "a", "--n-ctx", 2_000_000_000)
    assert "turn down --n-ctx" in one_line_error(result)
    assert trimix("doctor", "--n-ctx", 2_000_000_000).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("generate", ""), b"", "empty"),
        (("generate",), b"\xff\xfe\xfa", "UTF-8"),
        (("generate", "a", "--weights", "nan,1"), b"", "finite"),
        (("generate", "a", "--weights", "0.1,inf"), b"", "finite"),
        (("generate", "a", "--weights", "much"), b"", "two numbers"),
        (("generate", "a", "--grid", "warm"), b"", "grid"),
        (("generate", "сөз " * 2000), b"", "--n-ctx"),
        (("generate", "a", "--trio", "nowhere"), b"", "no such file"),
        (("generate", "a", "--temperature", "-1"), b"", "temperature"),
        (("generate", "a", "--kv-type", "q9"), b"", "q9"),
        (("generate", "a", "--device", "NoSuchGPU"), b"", "NoSuchGPU"),
        (("score", "nowhere.txt"), b"", "nowhere.txt"),
        (("score",), b" \n\n ", "empty"),
        (("convert", "hf", "nowhere", "-o", "x.gguf"), b"", "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(trimix, arguments, stdin, words):
    assert words in one_line_error(trimix(*arguments, stdin=stdin))


def test_bad_grammar_is_one_line(trimix, tmp_path):
    grammar = tmp_path / "g.gbnf"
    grammar.write_text("root ::= (")
    assert "grammar" in one_line_error(
        trimix("generate", "a", "--weights", "1,0", "--grammar", grammar)
    )


def test_usage_errors_exit_2(trimix):
    assert trimix("generate", "a", "--bogus").returncode == 2
    assert trimix("generate", "a", "--large-ins", "x.gguf").returncode == 2
    assert trimix("nonsense").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("adapt", "own", "text.txt", "--minutes", "inf"),
        ("adapt", "own", "text.txt", "--learning-rate", "nan"),
        ("serve", "--host", "0.0.0.0", "--drain", "inf"),
        ("serve", "--timeout", "nan"),
        ("serve", "--read-timeout", "inf"),
        ("tune", "--minutes", "nan"),
    ],
)
def test_a_number_without_end_is_a_usage_error(trimix, arguments):
    """Bug: it was a traceback, after the text was read or when the server was to end."""
    result = trimix(*arguments)
    assert result.returncode == 2 and f"{arguments[-1]} is not a finite" in result.stderr.decode()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_that_training_does_not_take_is_a_usage_error(trimix, seed):
    """Bug: `adapt` read the text and prepared all of it, and then ended in a traceback."""
    result = trimix("adapt", "own", "text.txt", "--seed", seed)
    assert result.returncode == 2 and f"{seed} is not in the range" in result.stderr.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a", "-n"),
        ("generate", "a", "--n-draft"),
        ("generate", "a", "--score-tokens"),
        ("generate", "a", "--gpu-layers"),
        ("run", "in.jsonl", "-o", "out.jsonl", "--shard", "1/"),
        ("run", "in.jsonl", "-o", "out.jsonl", "--ray", "localhost:"),
    ],
)
def test_more_digits_than_python_reads_are_one_line(trimix, arguments):
    """Bug: it was a traceback. Python reads 4,300 digits of a number."""
    *before, last = arguments
    digits = "9" * 5000
    given = [*before, last + digits] if last[-1] in "/:" else [*arguments, digits]
    result = trimix(*given)
    assert result.returncode in (1, 2) and b"Traceback" not in result.stderr


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -100])
def test_a_cut_file_is_refused_before_llama_cpp_sees_it(trimix, tmp_path, nano_files, keep):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(nano_files["small_cpt"].read_bytes()[:keep])
    others = ("--large-ins", nano_files["large_ins"], "--small-base", nano_files["small_base"])
    assert "cut.gguf" in one_line_error(trimix("generate", "a", *others, "--small-cpt", cut))


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_keeps_what_was_printed_and_exits_130():
    command = [sys.executable, "-m", "trimix_gguf.cli", "generate", KAZAKH, "--weights", "0.1,0.9"]
    command += ["-n", "400", "--logit-bias", "0=-100", "--logit-bias", "3=-100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    assert process.returncode == 130 and first + rest
    assert b"Traceback" not in error


def test_help_loads_neither_llama_cpp_nor_numpy():
    code = (
        "import sys; sys.argv = ['trimix', '--help']\n"
        "from trimix_gguf.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'llama_cpp', 'numpy', 'rich'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_real_trio_refuses_another_family(trimix, real_files):
    smollm = real_files["large_ins"].parent / "smollm2-135m-instruct-q4_1.gguf"
    if not smollm.is_file():
        pytest.skip("SmolLM2 is not cached here")
    result = trimix(
        "generate", "a", "--large-ins", smollm, "--small-base", real_files["small_base"],
        "--small-cpt-lora", real_files["small_cpt_lora"],
    )  # fmt: skip
    assert "smollm" in one_line_error(result)


def test_layers_that_no_device_takes_are_said(trimix):
    """Bug: --gpu-layers went without a word where llama.cpp was built for the CPU only."""
    from trimix_gguf.machine import native

    if native.gpu_offload():
        pytest.skip("needs a llama.cpp without another device")
    arguments = ("generate", "a", "-n", "1", "--weights", "1,0", "--gpu-layers")
    done = trimix(*arguments, "large_ins=3")
    assert done.returncode == 0 and b"note: gpu layers of large_ins stay on the CPU" in done.stderr
    assert b"note" not in trimix(*arguments, "auto").stderr


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_the_newline_that_ends_a_file_is_not_part_of_the_prompt(trimix, tmp_path, end):
    """Bug: `echo … | trimix generate` answered another prompt than the same argument."""
    options = ("-n", 6, "--temperature", 0, "--weights", "0.5,0.5")
    said = trimix("generate", "Қазақстан", *options).stdout
    path = tmp_path / "prompt.txt"
    path.write_bytes(("Қазақстан" + end).encode())
    assert trimix("generate", *options, stdin=path.read_bytes()).stdout == said
    assert trimix("generate", "-f", path, *options).stdout == said
    path.write_bytes(("Қазақстан" + "\n\n").encode())
    more = json.loads(trimix("generate", "-f", path, "--json", *options).stdout)
    less = json.loads(trimix("generate", "Қазақстан", "--json", *options).stdout)
    assert more["n_prompt_tokens"] > less["n_prompt_tokens"]
