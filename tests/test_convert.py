"""Conversion of small checkpoints written by hand: metadata, tensors, types."""

import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize
from zero_checkpoint import (
    CONFIG,
    END,
    EXPERTS,
    N_VOCAB,
    TOOL,
    become,
    byte_level,
    edit_json,
    write_json,
    write_safetensors,
)

from trimix_gguf.convert import writer
from trimix_gguf.convert.checkpoint import Checkpoint, to_bfloat16
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.tokenizer import read_tokenizer
from trimix_gguf.convert.tokenizer_bpe import LLAMA3_SPLIT
from trimix_gguf.errors import ConversionError


@pytest.mark.parametrize("differs", [None, 0, N_VOCAB - 1])
@pytest.mark.parametrize("type", ["f32", "q4_0"])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(folder, tmp_path, rng, type, differs):
    """CPT that saves embedding and head leaves "tied" in the config: the trained head was lost."""
    tensors = {name: ("F32", array.copy()) for name, array in Checkpoint(folder)}
    table = rng.standard_normal((N_VOCAB, 64)).astype("f4")
    head = table.copy()
    if differs is not None:
        head[differs, 5] += 1
    tensors |= {"model.embed_tokens.weight": ("F32", table), "lm_head.weight": ("F32", head)}
    write_safetensors(folder / "model.safetensors", tensors)
    convert_hf(folder, tmp_path / "x.gguf", type=type)
    stored = {t.name: t for t in GGUFReader(tmp_path / "x.gguf").tensors}
    assert ("output.weight" in stored) == (differs is not None)
    if differs is not None and type == "f32":
        assert np.array_equal(stored["output.weight"].data, head)


def test_tokenizer_metadata(folder):
    metadata = read_tokenizer(folder, CONFIG)
    assert (metadata.vocabulary.pre, metadata.vocabulary.merges) == ("qwen2", ["a b"])
    assert metadata.tokens[:6] == ["a", "b", "ab", END, TOOL, "[PAD5]"]
    assert [int(kind) for kind in metadata.types[:6]] == [1, 1, 1, 3, 4, 5]
    assert len(metadata.tokens) == len(metadata.types) == N_VOCAB
    assert (metadata.special_ids["eos"], metadata.add_bos, metadata.chat_template) == (
        3,
        False,
        None,
    )

    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    single = [{"SpecialToken": {"id": END}}, {"Sequence": {"id": "A"}}]
    post = {"type": "TemplateProcessing", "single": single}
    pre = byte_level(LLAMA3_SPLIT)
    edit_json(folder / "tokenizer.json", model=model, pre_tokenizer=pre, post_processor=post)
    edit_json(folder / "tokenizer_config.json", bos_token={"content": END}, chat_template="{{ x }}")
    metadata = read_tokenizer(folder, CONFIG)
    assert (metadata.vocabulary.pre, metadata.vocabulary.merges, metadata.add_bos) == (
        "llama-bpe",
        ["a b"],
        True,
    )
    assert metadata.chat_template == "{{ x }}"
    (folder / "chat_template.jinja").write_text("{{ y }}")
    assert read_tokenizer(folder, CONFIG).chat_template == "{{ y }}"
    edit_json(
        folder / "tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}
    )
    assert read_tokenizer(folder, CONFIG).vocabulary.pre == "gpt-2"
    edit_json(folder / "tokenizer.json", pre_tokenizer=byte_level("x+"))
    with pytest.raises(ConversionError, match="pre-tokenizer"):
        read_tokenizer(folder, CONFIG)
    assert read_tokenizer(folder, CONFIG, pre="qwen2").vocabulary.pre == "qwen2"


def test_stored_types_read_as_float32(tmp_path):
    values = np.array([[1.5, -2.0], [0.0, 3e4]], np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    tensors = {"a": ("F32", values), "b": ("F16", values.astype(np.float16)), "c": ("BF16", upper)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    for name, array in Checkpoint(tmp_path):
        assert array.dtype == np.float32
        # bfloat16 keeps 8 bits of mantissa: 3e4 is cut to 29952.
        np.testing.assert_allclose(array, values, rtol=2**-8 if name == "c" else 0)


def test_rows_that_no_q8_0_block_divides_stay_float16(folder, tmp_path):
    edit_json(folder / "config.json", intermediate_size=80)
    tensors = {name: ("F32", array) for name, array in Checkpoint(folder)}
    for module, shape in {"gate": (80, 64), "up": (80, 64), "down": (64, 80)}.items():
        zeros = np.zeros(shape, np.float32)
        tensors[f"model.layers.0.mlp.{module}_proj.weight"] = ("F32", zeros)
    write_safetensors(folder / "model.safetensors", tensors)
    calls = []
    convert_hf(folder, tmp_path / "m.gguf", progress=lambda *call: calls.append(call))
    stored = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16"
    assert stored["blk.0.ffn_up.weight"] == "Q8_0"
    assert stored["output_norm.weight"] == "F32"
    assert "output.weight" not in stored
    n_bytes = sum(t.n_bytes for t in GGUFReader(tmp_path / "m.gguf").tensors)
    assert len(calls) == 11 and calls[-1] == ("blk.0.ffn_down.weight", n_bytes, n_bytes)
    assert sorted(calls, key=lambda call: call[1]) == calls


def replace_modules(folder, dropped, added):
    """Drop the modules of layer 0 whose name holds `dropped`; `added` is name -> its weight."""
    tensors = {n: ("F32", a.copy()) for n, a in Checkpoint(folder) if dropped not in n}
    tensors |= {f"model.layers.0.{n}.weight": ("F32", array) for n, array in added.items()}
    write_safetensors(folder / "model.safetensors", tensors)


def test_experts_are_stacked_in_their_order(folder, tmp_path):
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    added = {
        f"mlp.experts.{i}.{module}": np.full(shape, i, np.float32)
        for i in range(8)
        for module, shape in shapes.items()
    }
    added["mlp.gate"] = np.ones((8, 64), np.float32)
    added |= {f"self_attn.{x}_norm": np.ones(16, np.float32) for x in "qk"}
    replace_modules(folder, "mlp.", added)
    become(folder, "Qwen3Moe", **EXPERTS)
    convert_hf(folder, tmp_path / "m.gguf", type="f16")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    for target, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
        stack = tensors[f"blk.0.ffn_{target}_exps.weight"].data
        assert stack.shape == (8, *shape)
        assert all((stack[i] == i).all() for i in range(8))
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_gemma(folder, tmp_path, prefix):
    """Sizes left to transformers, norms stored less one, and a vision tower to skip."""
    norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    added = {name: np.zeros(64, np.float32) for name in norms}
    added |= {f"self_attn.{x}_norm": np.zeros(256, np.float32) for x in "qk"}
    for module, n in (("q", 2048), ("k", 1024), ("v", 1024)):
        added[f"self_attn.{module}_proj"] = np.zeros((n, 64), np.float32)
    added["self_attn.o_proj"] = np.zeros((64, 2048), np.float32)
    replace_modules(folder, "self_attn", added)
    tensors = {n.replace("model.", prefix, 1): ("F32", a.copy()) for n, a in Checkpoint(folder)}
    tensors["vision_tower.patch.weight"] = ("F32", np.zeros(1, np.float32))
    write_safetensors(folder / "model.safetensors", tensors)
    text = {"vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 96}
    text |= {"num_hidden_layers": 1, "sliding_window": 32, "rope_scaling": None}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    write_json(folder / "config.json", config)
    convert_hf(folder, tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    assert (reader.get_tensor(1).name, set(reader.get_tensor(1).data)) == (
        "output_norm.weight",
        {1},
    )
    fields = {key: field.contents() for key, field in reader.fields.items()}
    expected = {"attention.head_count": 8, "attention.key_length": 256, "rope.freq_base": 1e6}
    expected |= {"rope.freq_base_swa": 1e4, "attention.sliding_window": 32}
    assert {key: fields[f"gemma3.{key}"] for key in expected} == expected
    assert "gemma3.attention.sliding_window_pattern" not in fields


def test_memory_stays_below_the_largest_tensor(folder, tmp_path):
    edit_json(folder / "config.json", intermediate_size=65536)
    shapes = {"gate_proj": (65536, 64), "up_proj": (65536, 64), "down_proj": (64, 65536)}
    added = {f"mlp.{module}": np.ones(shape, np.float32) for module, shape in shapes.items()}
    replace_modules(folder, "mlp.", added)
    tracemalloc.start()
    convert_hf(folder, tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 65536 * 64 * 4


@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0"])
def test_any_size_of_block_gives_the_same_file(folder, tmp_path, monkeypatch, type):
    rng = np.random.default_rng(0)
    tensors = {n: ("F32", rng.standard_normal(a.shape, "f4")) for n, a in Checkpoint(folder)}
    write_safetensors(folder / "model.safetensors", tensors)
    convert_hf(folder, tmp_path / "whole.gguf", type=type)
    monkeypatch.setattr(writer, "BLOCK_SIZE", 100)
    convert_hf(folder, tmp_path / "parts.gguf", type=type)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()


def test_rounding_is_that_of_ggml():
    """gguf.quants follows ggml bit for bit; ties, zeros and numbers too small are the traps."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((64, 64), "f4") * np.exp2(rng.integers(-30, 20, (64, 1)), dtype="f4")
    data[0] = 0
    data[1] = np.arange(64) - 31.5
    data[1, [0, 32]] = 127  # the scale is 1: the rest are ties
    data[2] = np.nextafter(data[1], 0)
    data[2, [0, 32]] = 127
    np.testing.assert_array_equal(
        writer.to_q8_0(data).reshape(64, -1), quantize(data, GGMLQuantizationType.Q8_0)
    )
    assert not writer.to_q8_0(np.full((1, 32), 1e-42, "f4"))[:, :2].any()
    data[3:5] = np.array([0x3F808000, 0x3F818000], np.uint32).view("f4")[:, None]
    np.testing.assert_array_equal(
        to_bfloat16(data).view(np.uint8), quantize(data, GGMLQuantizationType.BF16)
    )
