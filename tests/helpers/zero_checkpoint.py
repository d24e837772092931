"""A one-layer checkpoint of zeros with a tokenizer of five tokens, written without torch."""

import json
import struct

import numpy as np
import pytest

from trimix_gguf.convert.tokenizer_bpe import QWEN2_SPLIT

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

EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "head_dim": 16,
}
HEADS = {"head_dim": 256, "query_pre_attn_scalar": 256}


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


def become(folder, family, **changes):
    edit_json(folder / "config.json", architectures=[f"{family}ForCausalLM"], **changes)


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
