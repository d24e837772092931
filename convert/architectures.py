"""What a checkpoint's config implies: its sizes, and every tensor with its GGUF name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape

from trimix_gguf.errors import ConversionError

from .checkpoint import Checkpoint

Q8_0_BLOCK = 32

# Hugging Face module -> GGUF module, and the sizes of its weight; a bias has the first of them.
Modules = Mapping[str, tuple[str, tuple[str, ...]]]
OUTER_MODULES: Modules = {
    "model.embed_tokens": ("token_embd", ("n_vocab", "n_embd")),
    "model.norm": ("output_norm", ("n_embd",)),
    "lm_head": ("output", ("n_vocab", "n_embd")),
}
LAYER_MODULES: Modules = {
    "input_layernorm": ("attn_norm", ("n_embd",)),
    "self_attn.q_proj": ("attn_q", ("n_q", "n_embd")),
    "self_attn.k_proj": ("attn_k", ("n_kv", "n_embd")),
    "self_attn.v_proj": ("attn_v", ("n_kv", "n_embd")),
    "self_attn.o_proj": ("attn_output", ("n_embd", "n_q")),
    "post_attention_layernorm": ("ffn_norm", ("n_embd",)),
    "mlp.gate_proj": ("ffn_gate", ("n_ff", "n_embd")),
    "mlp.up_proj": ("ffn_up", ("n_ff", "n_embd")),
    "mlp.down_proj": ("ffn_down", ("n_embd", "n_ff")),
}


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart from a plain pre-norm decoder."""

    gguf: str
    layer_modules: Modules = field(default_factory=lambda: LAYER_MODULES)
    # A config flag -> the modules that have a bias when it is set.
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Modules whose rows llama.cpp wants in interleaved rope order -> which heads they hold.
    permuted: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        gguf="llama",
        biases={
            "attention_bias": tuple(f"self_attn.{name}_proj" for name in "qkvo"),
            "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        },
        permuted={"self_attn.q_proj": "n_head", "self_attn.k_proj": "n_head_kv"},
    ),
}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output; `n_head` > 0 means permute its rows, head by head."""

    source: str
    target: str
    shape: tuple[int, ...]
    stored_as: GGMLQuantizationType
    n_head: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(quant_shape_to_byte_shape(self.shape, self.stored_as))


def find_architecture(model_dir: Path, config: dict[str, Any]) -> Architecture:
    """Return the table entry for the config of `model_dir`; ConversionError if there is none."""
    names = config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ConversionError(
            f"{model_dir} is a {names[0]}, expected one of {', '.join(ARCHITECTURES)}; "
            "other architectures need llama.cpp's own converter"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"hidden_act is {config['hidden_act']!r}, expected 'silu'")
    return ARCHITECTURES[names[0]]


def read_sizes(config: dict[str, Any]) -> dict[str, int]:
    """Return the sizes that the tables above are written in; ConversionError if one is amiss."""

    def positive(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConversionError(f"config.json has {key} = {value!r}, expected a positive integer")
        return value

    n_embd, n_head = positive("hidden_size"), positive("num_attention_heads")
    n_head_kv = positive("num_key_value_heads", n_head)
    head_dim = positive("head_dim", n_embd // n_head)
    if head_dim % 2 or n_head % n_head_kv:
        raise ConversionError(
            f"config.json has {n_head} heads of {head_dim} for {n_head_kv} key-value heads; "
            "expected an even head size, and heads that divide evenly"
        )
    return {
        "n_vocab": positive("vocab_size"),
        "n_ctx": positive("max_position_embeddings"),
        "n_embd": n_embd,
        "n_layer": positive("num_hidden_layers"),
        "n_ff": positive("intermediate_size"),
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "head_dim": head_dim,
        "n_q": n_head * head_dim,
        "n_kv": n_head_kv * head_dim,
    }


def plan_tensors(
    architecture: Architecture,
    config: dict[str, Any],
    sizes: dict[str, int],
    checkpoint: Checkpoint,
    stored_as: GGMLQuantizationType,
) -> list[PlannedTensor]:
    """List what to write, having checked that the checkpoint holds just that."""
    biased = {m for flag, ms in architecture.biases.items() if config.get(flag) for m in ms}
    tied = bool(config.get("tie_word_embeddings", False))
    plan = []

    def add(source: str, target: str, names: tuple[str, ...], n_head: int = 0) -> None:
        shape = tuple(sizes[name] for name in names)
        plan.append(PlannedTensor(source, target, shape, _storage(shape, stored_as), n_head))

    for module, (target, names) in OUTER_MODULES.items():
        if not (tied and module == "lm_head"):
            add(f"{module}.weight", f"{target}.weight", names)
    for i in range(sizes["n_layer"]):
        for module, (target, names) in architecture.layer_modules.items():
            n_head = sizes.get(architecture.permuted.get(module, ""), 0)
            source, target = f"model.layers.{i}.{module}", f"blk.{i}.{target}"
            add(f"{source}.weight", f"{target}.weight", names, n_head)
            if module in biased:
                add(f"{source}.bias", f"{target}.bias", names[:1], n_head)

    for tensor in plan:
        if tensor.source not in checkpoint.tensors:
            raise ConversionError(
                f"config.json implies {tensor.source}, which the weights lack; "
                "download config and weights of the same model"
            )
        shape = checkpoint.tensors[tensor.source].shape
        if shape != tensor.shape:
            raise ConversionError(
                f"{tensor.source} is {list(shape)}, but config.json implies "
                f"{list(tensor.shape)}; download config and weights of the same model"
            )
    # A tied head may be stored twice; rotary frequencies follow from the config.
    planned = {tensor.source for tensor in plan} | ({"lm_head.weight"} if tied else set())
    for extra in sorted(set(checkpoint.tensors) - planned):
        if not extra.endswith("rotary_emb.inv_freq"):
            raise ConversionError(
                f"the weights hold {extra}, which config.json does not imply; "
                "merge any adapter, and download config and weights of the same model"
            )
    return plan


def _storage(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and shape[-1] % Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return rope_type, rope_theta and the scaling's own numbers, old and new configs alike."""
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta") or 10000.0}
    for key in ("rope_scaling", "rope_parameters"):
        rope.update({k: v for k, v in (config.get(key) or {}).items() if v is not None})
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if rope["rope_type"] not in needed:
        raise ConversionError(
            f"config.json scales rope by {rope['rope_type']!r}, expected one of "
            f"{', '.join(needed)}; llama.cpp's own converter may know it"
        )
    for key in ("rope_theta", *needed[rope["rope_type"]]):
        if not isinstance(rope.get(key), int | float) or rope[key] <= 0:
            raise ConversionError(
                f"config.json has {key} = {rope.get(key)!r}, expected a number > 0"
            )
    return rope


def llama3_rope_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Return what llama.cpp divides each rope frequency by, float32 [head_dim / 2].

    Llama 3.1's rule: long waves are slowed by `factor`, short ones kept, the rest blended.
    """
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    if high <= low:
        raise ConversionError(
            f"config.json has high_freq_factor {high}, expected more than low_freq_factor {low}"
        )
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / factor + kept)).astype(np.float32)
