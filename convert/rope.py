"""Rotary position embeddings: what config.json asks for, and how a GGUF file says it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from trimix_gguf.errors import ConversionError

# The kinds of scaling that llama.cpp knows -> the numbers that each needs.
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(config: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Return rope_type, rope_theta and the scaling's own numbers, old and new configs alike.

    `known` names the rope types that llama.cpp computes for this architecture. `local_theta` is
    there where the config has a base of its own for sliding-window layers. Raises ConversionError.
    """
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10000.0)}
    local: dict[str, Any] = {"rope_theta": config.get("rope_local_base_freq")}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        rope.update(_given(given.get("full_attention", given)))
        local.update(_given(given.get("sliding_attention")))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in known:
        raise ConversionError(
            f"config.json scales rope by {rope['rope_type']!r}, expected one of "
            f"{', '.join(known)}; llama.cpp computes no other for this architecture"
        )
    if local.get("rope_type", "default") != "default":
        raise ConversionError(
            f"config.json scales rope by {local['rope_type']!r} in sliding-window layers, "
            "expected 'default'; llama.cpp scales only the others"
        )
    if "rope_local_base_freq" in config:
        rope["local_theta"] = local["rope_theta"]
    numbers = ("rope_theta", *NEEDED[rope["rope_type"]])
    for key in numbers + (("local_theta",) if "local_theta" in rope else ()):
        value = rope.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ConversionError(f"config.json has {key} = {value!r}, expected a number > 0")
    _check_fixed(rope)
    return rope


def _given(section: Any) -> dict[str, Any]:
    return {key: value for key, value in (section or {}).items() if value is not None}


def _check_fixed(rope: dict[str, Any]) -> None:
    """Refuse the settings that llama.cpp computes with one value only."""
    fixed: dict[str, float] = {"partial_rotary_factor": 1.0}
    if rope["rope_type"] == "yarn":
        fixed |= {"attention_factor": 1.0 + 0.1 * math.log(max(rope["factor"], 1.0))}
        fixed |= {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 0}
    for key, expected in fixed.items():
        came = rope.get(key, expected)
        if not isinstance(came, int | float) or not math.isclose(came, expected, rel_tol=1e-6):
            raise ConversionError(
                f"config.json has {key} = {came!r}, expected {expected:.7g}, the one value "
                "that llama.cpp computes rope with; remove the key if the model works without"
            )


def write_rope(writer: GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    """Add every rope key to `writer`; llama3's factors are a tensor instead."""
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "local_theta" in rope:
        # gguf 0.17 has no method for this key.
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", float(rope["local_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


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
    factors: np.ndarray = (1.0 / ((1.0 - kept) / factor + kept)).astype(np.float32)
    return factors
