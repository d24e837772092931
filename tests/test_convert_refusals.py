"""What a conversion refuses, and that it leaves nothing half."""

import os
from collections import namedtuple

import numpy as np
import pytest
from zero_checkpoint import EXPERTS, HEADS, become, edit_json, write_json, write_safetensors

from trimix_gguf.convert.checkpoint import Checkpoint
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.errors import ConversionError

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
    "layers.1.input_layernorm.weight, which the weights lack": lambda f: edit_json(
        f / "config.json", num_hidden_layers=2
    ),
    "implies lm_head.weight, which": lambda f: edit_json(
        f / "config.json", tie_word_embeddings=False
    ),
    "does not imply": lambda f: (
        edit_json(f / "config.json", tie_word_embeddings=True)
        or write_safetensors(
            f / "model.safetensors",
            {n: ("F32", a.copy()) for n, a in Checkpoint(f)} | {"x": ("F32", np.zeros(1, "f4"))},
        )
    ),
    r"num_hidden_layers = 1e\+09, expected at most 512": lambda f: edit_json(
        f / "config.json", num_hidden_layers=10**9
    ),
    r"vocab_size = 1e\+30": lambda f: edit_json(f / "config.json", vocab_size=10**30),
    "nested too deep": lambda f: (f / "config.json").write_text("[" * 100_000),
    "scales rope": lambda f: edit_json(f / "config.json", rope_scaling={"type": "dynamic"}),
    "factor = None": lambda f: edit_json(f / "config.json", rope_scaling={"type": "yarn"}),
    "beta_fast = 16": lambda f: edit_yarn(f, beta_fast=16),
    "attention_factor = 2.0, expected 1.138629": lambda f: edit_yarn(f, attention_factor=2.0),
    "truncate = False": lambda f: edit_yarn(f, truncate=False),
    "partial_rotary_factor": lambda f: edit_json(
        f / "config.json", rope_parameters={"partial_rotary_factor": 0.5}
    ),
    "hidden_act = 'gelu'": lambda f: edit_json(f / "config.json", hidden_act="gelu"),
    "1 layers with a sliding window": lambda f: become(f, "Qwen2", use_sliding_window=True),
    "2 layer_types, expected 1": lambda f: become(f, "Qwen3", layer_types=["full_attention"] * 2),
    "attention_bias = True": lambda f: become(f, "Qwen3", attention_bias=True),
    "norm_topk_prob = False": lambda f: become(f, "Qwen3Moe"),
    "mlp_only_layers": lambda f: become(f, "Qwen3Moe", norm_topk_prob=True, mlp_only_layers=[0]),
    "num_experts = None": lambda f: become(f, "Qwen3Moe", norm_topk_prob=True),
    "uses 9 of 8 experts": lambda f: become(f, "Qwen3Moe", **EXPERTS | {"num_experts_per_tok": 9}),
    "implies model.layers.0.self_attn.q_norm": lambda f: become(f, "Qwen3", head_dim=16),
    "query_pre_attn_scalar = 16, expected 256": lambda f: become(
        f, "Gemma3", query_pre_attn_scalar=16
    ),
    "sliding_window_pattern = 0": lambda f: become(f, "Gemma3", sliding_window_pattern=0, **HEADS),
    "sliding_window = 'x'": lambda f: become(f, "Gemma3", sliding_window="x", **HEADS),
    "attn_logit_softcapping = 50.0": lambda f: become(f, "Gemma3", attn_logit_softcapping=50.0),
    "'linear' in sliding-window": lambda f: become(
        f, "Gemma3", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 8.0}}
    ),
    "expected byte-level BPE": lambda f: edit_json(f / "tokenizer.json", model={"type": "Unigram"}),
    "shard .* is missing": lambda f: (
        (f / "model.safetensors").unlink(),
        write_json(f / "model.safetensors.index.json", {"weight_map": {"a": "x.safetensors"}}),
    ),
}


def edit_yarn(folder, **changes):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_json(folder / "config.json", rope_scaling=yarn | changes)


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


@pytest.mark.parametrize("type", ["f32", "q4_0"])
@pytest.mark.parametrize("force", [False, True])
def test_of_two_conversions_to_one_output_the_second_is_refused(folder, tmp_path, type, force):
    """Bug: both wrote it, and both said that it was theirs."""
    out, other = tmp_path / "m.gguf", tmp_path / f".m.gguf.{os.getppid()}-0.part"
    other.touch()
    with pytest.raises(ConversionError, match=f"process {os.getppid()} is writing"):
        convert_hf(folder, out, type=type, force=force)
    other.unlink()
    come = []

    def comes(*_):
        out.write_bytes(b"other")
        come.append(1)

    if not force:
        with pytest.raises(ConversionError, match="exists"):
            convert_hf(folder, out, type=type, progress=comes)
        assert come and out.read_bytes() == b"other" and set(tmp_path.iterdir()) == {folder, out}


def test_interruption_leaves_nothing(folder, tmp_path):
    def interrupt(*_):
        assert len(list(tmp_path.glob(".m.gguf.*.part"))) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_hf(folder, tmp_path / "m.gguf", progress=interrupt)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(os.name == "nt", reason="signals, limits or pipes as POSIX has them")
def test_damaged_values_and_a_full_disk_leave_nothing(folder, tmp_path, monkeypatch):
    import resource

    tensors = {name: ("F32", array.copy()) for name, array in Checkpoint(folder)}
    matrix = tensors["model.embed_tokens.weight"][1]
    for value, type, message in (
        (np.nan, "f32", "holds NaN"),
        (-np.inf, "bf16", "holds NaN or inf"),
        (1e5, "f16", "overflows F16: it holds 100000"),
        (1e7, "q8_0", "overflows Q8_0"),
    ):
        matrix[3, 3] = value
        write_safetensors(folder / "model.safetensors", tensors)
        with pytest.raises(ConversionError, match=message):
            convert_hf(folder, tmp_path / "m.gguf", type=type)
    matrix[3, 3] = 0
    write_safetensors(folder / "model.safetensors", tensors)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ConversionError, match="cannot write"):
            convert_hf(folder, tmp_path / "m.gguf", type="q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [folder]
    usage = namedtuple("usage", "free")(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match="MB free"):
        convert_hf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [folder]
