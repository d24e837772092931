"""What was planned against what is taken: real memory, and the commands that plan."""

import json
import re
import subprocess
import sys
from typing import get_type_hints

import pytest
from conftest import KAZAKH
from test_cli import one_line_error

from trimix_gguf import Trio
from trimix_gguf.errors import MemoryNeededError, ModelError
from trimix_gguf.machine import memory, native
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.loading import AUTO, Loading, LoadingOptions
from trimix_gguf.machine.planner import place
from trimix_gguf.roles import ROLES

# -- real memory ------------------------------------------------------------------------------

PEAK = """
import json, re, sys
from pathlib import Path
from trimix_gguf import Trio, select_weights
with Trio.load(**json.loads(sys.argv[1])) as trio:
    select_weights(trio, trio.prompt(sys.argv[2] * 2))
    trio.rows()
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def measured_over_estimate(files, **options):
    """Peak resident memory of a process that scored a prompt, over the estimate."""
    lora = read_gguf(files["small_cpt_lora"]) if "small_cpt_lora" in files else None
    read = {role: read_gguf(files.get(role) or files["small_base"]) for role in ROLES}
    need = memory.estimate(memory.Models(read, dict.fromkeys(ROLES, Loading(**options)), lora))
    arguments = {**{role: str(path) for role, path in files.items()}, **options}
    command = [sys.executable, "-c", PEAK, json.dumps(arguments), KAZAKH]
    peak = int(subprocess.run(command, capture_output=True, check=True).stdout) * 1024
    return peak / sum(need.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_nano_trio_takes_what_was_estimated(nano_files):
    # Python and its libraries are most of it, and differ by version.
    assert 0.8 < measured_over_estimate(nano_files, n_ctx=512) < 1.1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_trio_takes_what_was_estimated(real_files):
    assert 0.96 < measured_over_estimate(real_files, n_ctx=2048) < 1.02


@pytest.mark.parametrize(
    ("options", "flash"),
    [
        (("--n-ctx", "300", "--kv-type", "q8_0"), True),  # a quantized V cache needs it
        (("--n-ctx", "8192"), False),
        (("--n-ctx", "8192", "--flash-attn"), True),
    ],
)
def test_llama_cpp_allocates_what_was_counted_for_the_attention_it_has(trimix, options, flash):
    log = trimix("generate", KAZAKH, "-n", "1", "--verbose", *options).stderr.decode()
    assert set(re.findall(r"flash_attn += (\w+)", log)) == {"enabled" if flash else "disabled"}

    def logged(what):
        sizes = re.findall(rf"{what} buffer size =\s+([\d.]+) MiB", log)
        return sum(float(size) for size in sizes) * (1 << 20)

    report = json.loads(trimix("plan", *options, "--json").stdout)
    ram = report["devices"]["RAM"]
    assert logged("model") == pytest.approx(ram["weights"], rel=0.01)
    assert logged("KV") == pytest.approx(ram["kv"], rel=0.01)
    own = sum(m["in_ram"]["buffers"] for m in report["models"].values())
    assert 0.7 * own < logged("output") + logged("compute") < 1.01 * own


# -- auto, and the command --------------------------------------------------------------------


def test_auto_without_a_card_is_no_layers(nano_files):
    if len([d for d in native.devices() if d.kind != "CPU"]):
        pytest.skip("this build has a card")
    files = {role: read_gguf(path) for role, path in nano_files.items()}
    asked = {"large_ins": {"n_gpu_layers": AUTO}, "small_cpt": {"n_gpu_layers": 3}}
    placed = place(files, asked, None)
    assert [placed[role]["n_gpu_layers"] for role in ROLES] == [0, 0, 0]
    assert place(files, {"small_cpt": {"n_gpu_layers": 3}}, None)["small_cpt"] == {
        "n_gpu_layers": 3
    }
    with Trio.load(**nano_files, n_ctx=64, n_gpu_layers=AUTO, device="CPU") as opened:
        assert {m.device for m in opened.models.values()} == {"CPU"}
        assert {m.n_gpu_layers for m in opened.models.values()} == {0}
    with pytest.raises(ModelError, match="'much'.*'auto'"):
        Trio.load(**nano_files, n_gpu_layers="much")
    with pytest.raises(MemoryNeededError, match="--n-ctx"):
        Trio.load(**nano_files, n_gpu_layers=AUTO, n_ctx=1 << 30)


def test_generate_with_auto_says_what_was_chosen_and_answers_the_same(trimix):
    arguments = ("generate", KAZAKH, "-n", "6", "--temperature", "0", "--weights", "0.1,0.9")
    auto = trimix(*arguments, "--gpu-layers", "large-ins=auto", "--verbose")
    assert auto.returncode == 0 and auto.stdout == trimix(*arguments).stdout
    assert "layers offloaded: large_ins 0" in auto.stderr.decode()
    wrong = trimix(*arguments, "--gpu-layers", "much")
    assert wrong.returncode == 2 and b"much" in wrong.stderr


def test_plan_for_this_machine_and_doctor_agree(trimix):
    result = trimix("plan")
    assert result.returncode == 0 and result.stderr == b""
    lines = result.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == list(ROLES)
    assert "it fits: --gpu-layers" in lines[-1]
    report = json.loads(trimix("plan", "--json").stdout)
    doctor = json.loads(trimix("doctor", "--json").stdout)["trio"]
    assert report["fits"] and doctor["fits"] == "yes"
    alone = not any(m["n_gpu_layers"] for m in report["models"].values())
    assert (doctor["auto layers"] == "all on CPU") == alone


def test_plan_for_assumed_cards_whole_in_part_and_not_at_all(trimix):
    def planned(*arguments):
        return json.loads(trimix("plan", "--json", "--assume-ram", "8", *arguments).stdout)

    whole = planned("--assume-gpu", "1")
    assert {m["device"] for m in whole["models"].values()} == {"GPU0"}
    assert all(m["n_gpu_layers"] == m["n_layers"] for m in whole["models"].values())
    most = {role: model["n_layers"] for role, model in whole["models"].items()}
    assert whole["flags"].split() == [
        "--gpu-layers", f"large-ins={most['large_ins']}",
        "--gpu-layers", f"small-cpt={most['small_cpt']}",
        "--gpu-layers", f"small-base={most['small_base']}",
    ]  # fmt: skip
    part = planned("--assume-gpu", "0.51", "--assume-gpu", "0.505")
    assert 0 < part["models"]["large_ins"]["n_gpu_layers"] < most["large_ins"]
    assert part["models"]["large_ins"]["device"] == "GPU0"
    assert part["models"]["small_cpt"]["device"] != "GPU0"
    assert part["devices"]["GPU0"]["needed"] <= part["devices"]["GPU0"]["usable"]
    none = planned("--assume-gpu", "0.4")
    assert none["flags"] == "--gpu-layers 0" and none["fits"]
    fixed = planned("--assume-gpu", "1", "--gpu-layers", "large-ins=2")
    assert fixed["models"]["large_ins"]["n_gpu_layers"] == 2


def test_plan_that_fits_nowhere_advises_and_what_it_advises_fits(trimix):
    machine = ("--assume-ram", "0.125", "--n-ctx", "16384")
    result = trimix("plan", *machine)
    assert result.returncode == 1 and b"RAM" in result.stdout
    error = result.stderr.decode()
    assert len(error.strip().splitlines()) == 1 and "would do" in error
    advised = re.search(r"^ +--n-ctx (\d+)$", result.stdout.decode(), re.M)[1]
    there = ("plan", "--assume-ram", "0.125", "--n-ctx")
    assert trimix(*there, advised).returncode == 0
    assert trimix(*there, int(advised) + 256).returncode == 1
    report = json.loads(trimix("plan", *machine, "--json").stdout)
    assert not report["fits"] and any(change["suffices"] for change in report["advice"])
    none = trimix("plan", "--assume-ram", "0")
    assert none.returncode == 1 and b"smaller trio" in none.stderr


@pytest.mark.parametrize("amount", ["nan", "-1", "inf", "1e30"])
def test_amounts_that_are_no_memory_are_usage_errors(trimix, amount):
    result = trimix("plan", "--assume-ram", amount)
    assert result.returncode == 2 and b"Traceback" not in result.stderr


def test_a_device_that_is_not_here_is_one_line(trimix):
    assert "NoSuchGPU" in one_line_error(trimix("plan", "--device", "NoSuchGPU"))
    kinds = one_line_error(trimix("plan", "--kv-type", "q9"))
    assert "q9" in kinds


def test_options_of_loading_are_its_fields():
    assert get_type_hints(LoadingOptions) == get_type_hints(Loading)
    with pytest.raises(TypeError, match="n_threds"):
        Trio.nano(n_threds=2)
