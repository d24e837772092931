"""From a checkpoint folder to a running trio, each command as a user would type it."""

import json
import shutil

import numpy as np
import pytest
from conftest import KAZAKH
from gguf import LlamaFileType
from hf_checkpoint import checkpoint_folder
from test_cli import one_line_error

from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.machine.quantization import WEIGHT_TYPES
from trimix_gguf.trio.trio import NANO


@pytest.fixture(scope="module")
def folders(tmp_path_factory, nano_files):
    """The shipped trio as checkpoint folders."""
    root = tmp_path_factory.mktemp("checkpoints")
    for role, path in nano_files.items():
        checkpoint_folder(path, root / role, "F32")
    return {role: root / role for role in nano_files}


def types(path):
    return {tensor.type for tensor in read_gguf(path).tensors}


def test_a_folder_becomes_the_trio_it_came_from(trimix, folders, nano_files, tmp_path):
    """GGUF -> checkpoint -> GGUF: weights, tokenizer and all, the perplexities are the same."""
    for role, folder in folders.items():
        result = trimix("convert", "hf", folder, "-o", tmp_path / f"{role}.gguf", "--type", "q8_0")
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout.decode().strip() == str(tmp_path / f"{role}.gguf")
    check = trimix("check", *(tmp_path / f"{r}.gguf" for r in nano_files), "--n-ctx", "512")
    assert check.returncode == 0 and b"make a trio" in check.stdout
    text = tmp_path / "text.txt"
    text.write_text(KAZAKH, encoding="utf-8")
    ours, shipped = (
        json.loads(trimix("score", text, "--json", *where).stdout)["perplexity"]
        for where in (("--trio", tmp_path), ())
    )
    for name, value in shipped.items():
        assert ours[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("type", ["q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k"])
def test_quantized_types_straight_and_by_way_of_a_file(trimix, folders, tmp_path, type):
    straight, whole, by_way = (tmp_path / f"{n}.gguf" for n in ("straight", "whole", "by_way"))
    folder = folders["large_ins"]
    assert trimix("convert", "hf", folder, "-o", straight, "--type", type).returncode == 0
    assert trimix("convert", "hf", folder, "-o", whole, "--type", "f32").returncode == 0
    assert trimix("convert", "quantize", whole, by_way, "--type", type).returncode == 0
    assert types(straight) == types(by_way) != types(whole) == {"F32"}
    assert straight.stat().st_size < whole.stat().st_size / 3
    assert {p.name for p in tmp_path.iterdir()} == {"straight.gguf", "whole.gguf", "by_way.gguf"}
    one, other = (read_gguf(p) for p in (straight, by_way))
    assert [t.name for t in one.tensors] == [t.name for t in other.tensors]


def test_merged_folders_convert_too(trimix, folders, tmp_path):
    small = folders["small_base"], folders["small_cpt"]
    merged, out = tmp_path / "merged", tmp_path / "merged.gguf"
    for method, more in (("linear", ()), ("ties", ("--base", small[0], "--density", "0.5"))):
        models = small if method == "linear" else small[1:]
        command = ("convert", "merge", "--method", method, *models, "-o", merged, "--force", *more)
        result = trimix(*command)
        assert result.returncode == 0, result.stderr.decode()
        result = trimix("convert", "hf", merged, "-o", out, "--force")
        assert result.returncode == 0, result.stderr.decode()
    assert trimix("check", out, out, out, "--n-ctx", "512").returncode == 0


def test_an_adapter_beside_and_merged_into_its_base(trimix, folders, tmp_path):
    """Both ways give the same perplexity, and not the base's."""
    from trimix_gguf.convert.checkpoint import StoredTensor, write_safetensors

    base, adapter = folders["small_base"], tmp_path / "adapter"
    adapter.mkdir()
    rng, shapes, model = np.random.default_rng(0), {}, read_gguf(NANO / "small_base.gguf")
    for layer in range(model.n_layer):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        shapes |= {f"{prefix}A.weight": (4, model.n_embd), f"{prefix}B.weight": (model.n_embd, 4)}
    stored = {n: StoredTensor(adapter, 0, shape, "F32") for n, shape in shapes.items()}
    data = {n: 0.3 * rng.standard_normal(shape, "f4") for n, shape in shapes.items()}
    write_safetensors(adapter / "adapter_model.safetensors", stored, data.__getitem__)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ways = {"lora": "a.gguf", "merge-lora": "m.gguf"}
    for command, name in ways.items():
        result = trimix(
            "convert", command, adapter, "--base", base, "-o", tmp_path / name, "--type", "f32"
        )
        assert result.returncode == 0, result.stderr.decode()
    assert trimix("convert", "hf", base, "-o", tmp_path / "b.gguf", "--type", "f32").returncode == 0
    trio = ("--large-ins", tmp_path / "b.gguf", "--small-base", tmp_path / "b.gguf")
    perplexity = {}
    for name, small in {
        "beside": ("--small-cpt-lora", tmp_path / "a.gguf"),
        "merged": ("--small-cpt", tmp_path / "m.gguf"),
    }.items():
        score = trimix("score", *trio, *small, "--json", stdin=KAZAKH.encode())
        assert score.returncode == 0, score.stderr.decode()
        perplexity[name] = json.loads(score.stdout)["perplexity"]
    beside, merged = perplexity["beside"], perplexity["merged"]
    assert merged["small_cpt"] == pytest.approx(beside["small_cpt"], rel=1e-3)
    assert merged["small_cpt"] != pytest.approx(merged["small_base"], rel=1e-2)
    assert trimix("check", *(trio[1], trio[3]), tmp_path / "a.gguf").returncode == 0


def test_bad_input_is_one_line_and_leaves_nothing(trimix, folders, nano_files, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["small_base"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "out.gguf"
    assert "truncated" in one_line_error(trimix("convert", "hf", broken, "-o", out))
    assert "truncated" in one_line_error(
        trimix("convert", "hf", broken, "-o", out, "--type", "q4_k_m")
    )
    assert "config.json" in one_line_error(trimix("convert", "hf", tmp_path, "-o", out))
    small = nano_files["small_base"]
    quantize = ("convert", "quantize", small, out, "--type", "q4_0")
    assert "quantized already" in one_line_error(trimix(*quantize))
    again = ("convert", "quantize", small, small, "--type", "q4_0", "--requantize", "--force")
    assert "file to be read" in one_line_error(trimix(*again))
    kept = ("convert", "hf", folders["small_base"], "-o", weights)
    assert "--force" in one_line_error(trimix(*kept))
    assert "not a GGUF" in one_line_error(
        trimix("convert", "quantize", weights, out, "--type", "q4_0")
    )
    assert {p.name for p in tmp_path.iterdir()} == {"broken"}
    assert trimix("convert", "hf", broken, "-o", out, "--type", "q3").returncode == 2


def test_no_command_replaces_a_file_that_it_reads(trimix, folders, nano_files, tmp_path):
    """Bug: --force with a mistyped -o ended in the loss of a text, a matrix or a checkpoint."""
    folder, adapter = tmp_path / "checkpoint", tmp_path / "adapter"
    shutil.copytree(folders["small_base"], folder)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    model, text, matrix = (tmp_path / name for name in ("m.gguf", "text.txt", "matrix.gguf"))
    shutil.copy(nano_files["small_base"], model)
    text.write_text("Қазақстан Республикасының Үкіметі. " * 100, encoding="utf-8")
    measured = ("convert", "imatrix", model, text, "--ctx", 32, "--tokens", 64)
    assert trimix(*measured, "-o", matrix).returncode == 0
    quantized = ("convert", "quantize", model, matrix, "--type", "q4_0", "--requantize")
    attempts = [
        *((*measured, "-o", out) for out in (text, model)),
        (*measured, "--lora", matrix, "-o", matrix),
        (*quantized, "--imatrix", matrix),
        *(("convert", "hf", folder, "-o", out) for out in folder.iterdir()),
        *(
            ("convert", name, adapter, "--base", folder, "-o", out)
            for name in ("lora", "merge-lora")
            for out in (adapter / "adapter_config.json", folder / "config.json")
        ),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for attempt in attempts:
        assert "file to be read" in one_line_error(trimix(*attempt, "--force"))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_check_names_what_is_wrong(trimix, nano_files, real_files, tmp_path):
    large, base, cpt = (nano_files[role] for role in ("large_ins", "small_base", "small_cpt"))
    assert "give the large model first" in one_line_error(trimix("check", base, large, large))
    assert "small_base after more training" in one_line_error(trimix("check", large, base, large))
    assert "convert both with one tokenizer" in one_line_error(
        trimix("check", real_files["large_ins"], base, cpt)
    )
    adapter = real_files["small_cpt_lora"]
    assert "trained on" in one_line_error(trimix("check", large, base, adapter))
    real = trimix("check", *real_files.values(), "--json")
    assert real.returncode == 0
    report = json.loads(real.stdout)
    assert report["n_common"] == 151936 and report["models"]["small_cpt"]["type"] == "adapter"
    assert len(report["tokens_per_character"]) >= 8


def test_the_table_of_types_has_llama_cpps_numbers_and_goes_from_large_to_small():
    for name, kind in WEIGHT_TYPES.items():
        named = "ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"
        assert LlamaFileType[named] == kind.file_type
        assert kind.bits[0] / 8 <= kind.bytes_in_file < 1.05 * kind.bits[0] / 8 + 0.01
    sizes = [kind.bits[0] for kind in WEIGHT_TYPES.values()]
    assert sizes == sorted(sizes, reverse=True)
