"""What the JSON files of checkpoints and adapters hold, as far as it is read here."""

from __future__ import annotations

from typing import Any

from trimix_gguf.machine.typed_json import NEEDED, Shape

_TEXT, _FLAG, _NUMBER = (None, str), (None, bool), (None, float)
_ADDED = {
    "id": int, "content": str, "special": _FLAG, "normalized": _FLAG, "single_word": _FLAG,
    "lstrip": _FLAG, "rstrip": _FLAG,
}  # fmt: skip
# Steps hold steps.
_STEP: dict[Any, Shape] = {
    "type": _TEXT, "behavior": _TEXT, "content": _TEXT, "prepend": _TEXT, "replacement": _TEXT,
    "prepend_scheme": _TEXT, "pattern": (None, {str: str}), "single": (None, [dict]),
}  # fmt: skip
_STEP |= dict.fromkeys(("normalizers", "pretokenizers", "processors"), [_STEP])

ROPE = {"rope_type": _TEXT, "type": _TEXT}
CONFIG = {
    "architectures": (None, [str]),
    "text_config": (None, dict),
    "rope_scaling": (None, ROPE),
    "rope_parameters": (None, dict),
    "layer_types": (None, [str]),
    "rms_norm_eps": _NUMBER,
    "final_logit_softcapping": _NUMBER,
    "eos_token_id": (None, int, [int]),
}
TOKENIZER = {
    "added_tokens": (None, [{**_ADDED, NEEDED: ("id", "content")}]),
    "normalizer": (None, _STEP),
    "pre_tokenizer": (None, _STEP),
    "post_processor": (None, _STEP),
    "model": (None, {
        "type": _TEXT, "vocab": (None, {str: int}, list), "merges": (None, [(str, [str])]),
        "unk_token": _TEXT, "dropout": _NUMBER, "byte_fallback": _FLAG, "ignore_merges": _FLAG,
    }),
}  # fmt: skip
_TOKEN = (None, str, {"content": str, NEEDED: ("content",)})
_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
TOKENIZER_CONFIG = {
    **{f"{role}_token": _TOKEN for role in _ROLES},
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), _FLAG),
    "added_tokens_decoder": (None, {str: {**_ADDED, NEEDED: ("content",)}}),
    "chat_template": (None, str, [{"name": str, "template": str}]),
}
ADDED_TOKENS = {str: int}
CHAT_TEMPLATE = {"chat_template": (None, str, [{"name": str, "template": str}])}
_PATTERN = (None, {str: float})
ADAPTER = {
    "peft_type": _TEXT,
    "bias": _TEXT,
    "rank_pattern": _PATTERN,
    "alpha_pattern": _PATTERN,
    "base_model_name_or_path": _TEXT,
    "init_lora_weights": (None, bool, str),
}
SHAPES: dict[str, Shape] = {  # by the file's name
    "config.json": CONFIG,
    "generation_config.json": {"eos_token_id": CONFIG["eos_token_id"]},
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "added_tokens.json": ADDED_TOKENS,
    "chat_template.json": CHAT_TEMPLATE,
    "adapter_config.json": ADAPTER,
    "model.safetensors.index.json": {"weight_map": {str: str}},
}
