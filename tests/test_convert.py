"""Conversion of small checkpoints written by hand: metadata, types, refusals, clean-up."""

import json
import struct
from collections import namedtuple

import numpy as np
import pytest
from gguf import GGUFReader
from trimix_gguf.convert.checkpoint import Checkpoint
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, read_tokenizer

from trimix_gguf.errors import ConversionError

N_VOCAB = 512
END, TOOL = "<|end|>", "<tool>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def byte_level(split):
    """A tokenizer.json's pre_tokenizer: cut by `split`, then map bytes to letters."""
    parts = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": parts}


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path, **changes):
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


@pytest.fixture
def folder(tmp_path):
    """A one-layer checkpoint of zeros and a four-token tokenizer, written without torch."""
    folder = tmp_path / "model"
    folder.mkdir()
    shapes = {"model.embed_tokens": (N_VOCAB, 64), "model.norm": (64,)}
    layer = {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
    layer |= {"self_attn.q_proj": (64, 64), "self_attn.o_proj": (64, 64)}
    layer |= {"self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
    layer |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    shapes |= {f"model.layers.0.{module}": shape for module, shape in layer.items()}
    tensors = {f"{m}.weight": ("F32", np.zeros(s, np.float32)) for m, s in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", CONFIG)
    added = [
        {"id": 3, "content": END, "special": True},
        {"id": 4, "content": TOOL, "special": False},
    ]
    tokenizer = {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level(QWEN2_SPLIT),
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"eos_token": END})
    return folder


def test_tokenizer_metadata(folder):
    metadata = read_tokenizer(folder, CONFIG)
    assert (metadata.pre, metadata.merges) == ("qwen2", ["a b"])
    assert metadata.tokens[:6] == ["a", "b", "ab", END, TOOL, "[PAD5]"]
    assert [int(kind) for kind in metadata.types[:6]] == [1, 1, 1, 3, 4, 5]
    assert len(metadata.tokens) == len(metadata.types) == N_VOCAB
    assert (metadata.eos_id, metadata.add_bos, metadata.chat_template) == (3, False, None)

    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    single = [{"SpecialToken": {"id": END}}, {"Sequence": {"id": "A"}}]
    post = {"type": "TemplateProcessing", "single": single}
    pre = byte_level(LLAMA3_SPLIT)
    edit_json(folder / "tokenizer.json", model=model, pre_tokenizer=pre, post_processor=post)
    edit_json(folder / "tokenizer_config.json", bos_token={"content": END}, chat_template="{{ x }}")
    metadata = read_tokenizer(folder, CONFIG)
    assert (metadata.pre, metadata.merges, metadata.add_bos) == ("llama-bpe", ["a b"], True)
    assert metadata.chat_template == "{{ x }}"
    (folder / "chat_template.jinja").write_text("{{ y }}")
    assert read_tokenizer(folder, CONFIG).chat_template == "{{ y }}"
    edit_json(
        folder / "tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}
    )
    assert read_tokenizer(folder, CONFIG).pre == "gpt-2"
    edit_json(folder / "tokenizer.json", pre_tokenizer=byte_level("x+"))
    with pytest.raises(ConversionError, match="pre-tokenizer"):
        read_tokenizer(folder, CONFIG)
    assert read_tokenizer(folder, CONFIG, pre="qwen2").pre == "qwen2"


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
    assert [call[1:] for call in calls] == [(i, 11) for i in range(1, 12)]


REFUSALS = {
    "config.json is missing": lambda f: (f / "config.json").unlink(),
    "pickled": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "holds neither": lambda f: (f / "model.safetensors").unlink(),
    "truncated": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-1]
    ),
    "within its header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7),
    "is a GPT2LMHeadModel": lambda f: edit_json(
        f / "config.json", architectures=["GPT2LMHeadModel"]
    ),
    r"is \[96, 64\], but config": lambda f: edit_json(f / "config.json", intermediate_size=64),
    "the weights lack": lambda f: edit_json(f / "config.json", num_hidden_layers=2),
    "which the weights lack": lambda f: edit_json(f / "config.json", tie_word_embeddings=False),
    "does not imply": lambda f: (
        edit_json(f / "config.json", tie_word_embeddings=True)
        or write_safetensors(
            f / "model.safetensors",
            {n: ("F32", a.copy()) for n, a in Checkpoint(f)} | {"x": ("F32", np.zeros(1, "f4"))},
        )
    ),
    "scales rope": lambda f: edit_json(f / "config.json", rope_scaling={"type": "yarn"}),
    "expected byte-level BPE": lambda f: edit_json(f / "tokenizer.json", model={"type": "Unigram"}),
    "shard .* is missing": lambda f: (
        (f / "model.safetensors").unlink(),
        write_json(f / "model.safetensors.index.json", {"weight_map": {"a": "x.safetensors"}}),
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_are_one_line_and_leave_nothing(folder, tmp_path, message):
    REFUSALS[message](folder)
    with pytest.raises(ConversionError, match=message) as caught:
        convert_hf(folder, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_existing_output_needs_force(folder, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"kept")
    with pytest.raises(ConversionError, match="exists"):
        convert_hf(folder, out)
    assert out.read_bytes() == b"kept"
    convert_hf(folder, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_interruption_leaves_nothing(folder, tmp_path):
    def interrupt(*_):
        assert len(list(tmp_path.glob(".m.gguf.*.part"))) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_hf(folder, tmp_path / "m.gguf", progress=interrupt)
    assert list(tmp_path.iterdir()) == [folder]


def test_damaged_values_and_a_full_disk_leave_nothing(folder, tmp_path, monkeypatch):
    tensors = {name: ("F32", array.copy()) for name, array in Checkpoint(folder)}
    matrix = tensors["model.embed_tokens.weight"][1]
    for value, message in ((np.nan, "holds NaN"), (1e5, "overflows float16")):
        matrix[3, 3] = value
        write_safetensors(folder / "model.safetensors", tensors)
        with pytest.raises(ConversionError, match=message):
            convert_hf(folder, tmp_path / "m.gguf", type="f16")
    usage = namedtuple("usage", "free")(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match="GB free"):
        convert_hf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [folder]
