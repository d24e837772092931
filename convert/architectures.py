"""What sets each model class apart, as a table, and the sizes its config.json gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from trimix_gguf.errors import ConversionError

from .checkpoint import read_json

# Hugging Face module -> GGUF module, and the sizes of its weight; a bias has the first of them.
# A {} in the name stands for the expert: llama.cpp wants a layer's experts in one tensor.
Modules = Mapping[str, tuple[str, tuple[str, ...]]]
OUTER: Modules = {
    "embed_tokens": ("token_embd", ("n_vocab", "n_embd")),
    "norm": ("output_norm", ("n_embd",)),
}
ATTENTION: Modules = {
    "input_layernorm": ("attn_norm", ("n_embd",)),
    "self_attn.q_proj": ("attn_q", ("n_q", "n_embd")),
    "self_attn.k_proj": ("attn_k", ("n_kv", "n_embd")),
    "self_attn.v_proj": ("attn_v", ("n_kv", "n_embd")),
    "self_attn.o_proj": ("attn_output", ("n_embd", "n_q")),
}
QK_NORMS: Modules = {
    "self_attn.q_norm": ("attn_q_norm", ("head_dim",)),
    "self_attn.k_norm": ("attn_k_norm", ("head_dim",)),
}
FFN_NORM: Modules = {"post_attention_layernorm": ("ffn_norm", ("n_embd",))}
# Gemma also normalises what each half of a layer adds.
GEMMA_NORMS: Modules = {
    "post_attention_layernorm": ("post_attention_norm", ("n_embd",)),
    "pre_feedforward_layernorm": ("ffn_norm", ("n_embd",)),
    "post_feedforward_layernorm": ("post_ffw_norm", ("n_embd",)),
}
MLP: Modules = {
    "mlp.gate_proj": ("ffn_gate", ("n_ff", "n_embd")),
    "mlp.up_proj": ("ffn_up", ("n_ff", "n_embd")),
    "mlp.down_proj": ("ffn_down", ("n_embd", "n_ff")),
}
ROUTER = "ffn_gate_inp"
EXPERTS: Modules = {
    "mlp.gate": (ROUTER, ("n_expert", "n_embd")),
    "mlp.experts.{}.gate_proj": ("ffn_gate_exps", ("n_expert", "n_ff_exp", "n_embd")),
    "mlp.experts.{}.up_proj": ("ffn_up_exps", ("n_expert", "n_ff_exp", "n_embd")),
    "mlp.experts.{}.down_proj": ("ffn_down_exps", ("n_expert", "n_embd", "n_ff_exp")),
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Architecture:
    """What sets one model class apart from a plain pre-norm decoder."""

    gguf: str
    layer_modules: Modules = field(default_factory=lambda: {**ATTENTION, **FFN_NORM, **MLP})
    # Modules with a bias: always, and when a config flag is set.
    biases: tuple[str, ...] = ()
    flagged_biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Modules whose rows llama.cpp wants in interleaved rope order.
    permuted: tuple[str, ...] = ()
    # Added to the weight of every norm.
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    # Of so many layers, llama.cpp lets all but the last attend within the sliding window only.
    sliding_pattern: int = 0
    # Keys that published configs leave to transformers.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Keys that llama.cpp computes with one value only.
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    # Where the decoder's tensors may lie -> the name of the output head there.
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"model.": "lm_head"})
    # Tensors of other parts than the language model.
    skipped: tuple[str, ...] = ()

    @property
    def has_experts(self) -> bool:
        """Whether its layers have experts, of which a router picks some."""
        return any("{}" in module for module in self.layer_modules)


GEMMA3 = Architecture(
    gguf="gemma3",
    layer_modules={**ATTENTION, **QK_NORMS, **GEMMA_NORMS, **MLP},
    norm_offset=1.0,
    rope_types=("default", "linear"),
    sliding_pattern=6,
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "tie_word_embeddings": True,
    },
    fixed={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
)
MOST_NUMBERS = 1 << 24  # of any size in config.json: far beyond every model
MOST = {  # llama.cpp's LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS; a context is in 32 bits
    "num_hidden_layers": 512,
    "num_experts": 512,
    "vocab_size": 1 << 22,
    "max_position_embeddings": (1 << 31) - 1,
}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        gguf="llama",
        flagged_biases={
            "attention_bias": (*QKV, "self_attn.o_proj"),
            "mlp_bias": tuple(MLP),
        },
        permuted=("self_attn.q_proj", "self_attn.k_proj"),
        rope_types=("default", "linear", "yarn", "llama3"),
    ),
    "Qwen2ForCausalLM": Architecture(gguf="qwen2", biases=QKV),
    "Qwen3ForCausalLM": Architecture(
        gguf="qwen3",
        layer_modules={**ATTENTION, **QK_NORMS, **FFN_NORM, **MLP},
        defaults={"head_dim": 128},
        fixed={"hidden_act": "silu", "attention_bias": False},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        gguf="qwen3moe",
        layer_modules={**ATTENTION, **QK_NORMS, **FFN_NORM, **EXPERTS},
        defaults={"norm_topk_prob": False},
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": replace(
        GEMMA3,
        prefixes={
            "language_model.model.": "language_model.lm_head",
            "model.language_model.": "lm_head",
        },
        skipped=tuple(
            f"{outer}{part}."
            for outer in ("", "model.")
            for part in ("vision_tower", "multi_modal_projector")
        ),
    ),
}


def read_config(model_dir: Path) -> tuple[Architecture, dict[str, Any]]:
    """Return the table's entry for the checkpoint in `model_dir`, and the language model's config.

    Defaults are filled in, and a multimodal model's text_config is lifted. Raises ConversionError.
    """
    config = read_json(model_dir / "config.json")
    names = config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ConversionError(
            f"{model_dir} is a {names[0]}, expected one of {', '.join(ARCHITECTURES)}; "
            "other architectures need llama.cpp's own converter"
        )
    architecture = ARCHITECTURES[names[0]]
    # To transformers, null is as good as absent.
    given = {**config, **(config.get("text_config") or {})}.items()
    config = {**architecture.defaults, **{k: v for k, v in given if v is not None}}
    for key, expected in architecture.fixed.items():
        if config.get(key, expected) != expected:
            raise ConversionError(
                f"config.json has {key} = {config[key]!r}, expected {expected!r}, the one value "
                f"that llama.cpp computes {architecture.gguf} with; this model cannot be converted"
            )
    return architecture, config


def read_sizes(architecture: Architecture, config: dict[str, Any]) -> dict[str, int]:
    """Return the sizes that the tables above are written in; ConversionError if one is amiss."""
    positive = partial(_positive, config)
    for key in ("rms_norm_eps", "final_logit_softcapping"):
        if not 0 <= config.get(key, 0) < 1e30:
            raise ConversionError(
                f"config.json has {key} = {config[key]!r}, expected a number >= 0"
            )
    n_embd, n_head = positive("hidden_size"), positive("num_attention_heads")
    n_head_kv = positive("num_key_value_heads", n_head)
    head_dim = positive("head_dim", n_embd // n_head)
    if head_dim % 2 or n_head % n_head_kv:
        raise ConversionError(
            f"config.json has {n_head} heads of {head_dim} for {n_head_kv} key-value heads; "
            "expected an even head size, and heads that divide evenly"
        )
    sizes = {
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
    if architecture.has_experts:
        sizes["n_expert"] = positive("num_experts", config.get("num_local_experts"))
        sizes["n_expert_used"] = positive("num_experts_per_tok")
        sizes["n_ff_exp"] = positive("moe_intermediate_size")
        if sizes["n_expert_used"] > sizes["n_expert"]:
            raise ConversionError(
                f"config.json uses {sizes['n_expert_used']} of {sizes['n_expert']} experts, "
                "expected no more than there are; download it again"
            )
    if architecture.gguf == "gemma3":
        # llama.cpp scales queries only by this; it knows the 27B by its 62 layers.
        scalar = n_embd // n_head if sizes["n_layer"] == 62 else head_dim
        if config["query_pre_attn_scalar"] != scalar:
            raise ConversionError(
                f"config.json has query_pre_attn_scalar = {config['query_pre_attn_scalar']!r}, "
                f"expected {scalar}, all that llama.cpp computes; this model cannot be converted"
            )
    return sizes


def _positive(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConversionError(
            f"config.json has {key} = {repr(value)[:80]}, expected a positive integer"
        )
    # Before anything is made of it: a tiny file could ask for all memory.
    if value > (most := MOST.get(key, MOST_NUMBERS)):
        raise ConversionError(f"config.json has {key} = {value:.6g}, expected at most {most}")
    return value


def sliding_layers(architecture: Architecture, config: dict[str, Any], n_layer: int) -> list[bool]:
    """Tell which layers attend within the sliding window only, [n_layer]; or ConversionError."""
    if "layer_types" in config:
        layers = [kind == "sliding_attention" for kind in config["layer_types"]]
    elif architecture.sliding_pattern:
        pattern = _positive(config, "sliding_window_pattern", architecture.sliding_pattern)
        layers = [(i + 1) % pattern != 0 for i in range(n_layer)]
    else:
        first = config.get("max_window_layers", 0) if config.get("use_sliding_window") else n_layer
        layers = [i >= first for i in range(n_layer)]
    if len(layers) != n_layer:
        raise ConversionError(
            f"config.json has {len(layers)} layer_types, expected {n_layer}, one for each layer"
        )
    if any(layers) and not architecture.sliding_pattern:
        raise ConversionError(
            f"config.json has {sum(layers)} layers with a sliding window, expected none; "
            f"llama.cpp computes {architecture.gguf} without: set use_sliding_window to false "
            "if its answers are good enough so"
        )
    if any(layers):
        _positive(config, "sliding_window")
    return layers
