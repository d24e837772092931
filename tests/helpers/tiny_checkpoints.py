"""Tiny random checkpoints of every architecture that can be converted; needs torch to make them."""

import json

import numpy as np
import tokenizers
import torch
import transformers

N_VOCAB = 512
END, TOOL = "<|end|>", "<tool>"
LINES = [
    "Қазақстан — Орталық Азиядағы мемлекет, 2024 жылы.",
    "The quick brown fox doesn't jump over 12345 dogs!",
    "شىنجاڭ ئۇيغۇر تىلى — تۈركىي تىللارنىڭ بىرى.",
    "བོད་ཀྱི་སྐད་ཡིག་ནི་ཡག་པོ་འདུག།",
    "emoji 👩‍👩‍👧 🏳️‍🌈 and 🙂",
    "many    spaces\tand tabs  ",
    "one\ntwo\n\n\n three\r\n  four",
    f"a{END}b {TOOL} c",
    " ",
]
SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA3 = {
    # The default; at 0.2 the logits are 3e-3 off, by ggml's GELU from a table of float16.
    "initializer_range": 0.02,
    "num_hidden_layers": 7,  # the sixth attends to everything
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}
# As published configs of Gemma 3 4B: the rest is left to transformers.
GEMMA3_PUBLISHED = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 16,
}
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {}),
    "llama llama3 rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE}),
    "llama biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3 pattern": (
        "Gemma3",
        GEMMA3 | {"sliding_window_pattern": 2, "final_logit_softcapping": 20.0},
    ),
    "gemma3 multimodal": ("Gemma3Multimodal", {}),
}


def save_tokenizer(folder, split, *, full=False):
    """Train a small byte-level BPE on LINES and save it in `folder`; `full` leaves no padding."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    parts = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        regex = tokenizers.Regex(split)
        parts.insert(0, tokenizers.pre_tokenizers.Split(regex, behavior="isolated"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=N_VOCAB - 20,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*LINES, *LINES], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(TOOL, special=False, normalized=False)])
    if full:
        n_missing = N_VOCAB - tokenizer.get_vocab_size()
        tokenizer.add_tokens([f"<extra{i}>" for i in range(n_missing)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.dumps({"eos_token": END, "bos_token": END})
    (folder / "tokenizer_config.json").write_text(settings)
    return tokenizer


def save_model(folder, name="llama"):
    """Save the small random model `name` of MODELS in `folder`, and return it."""
    torch.manual_seed(0)
    family, changes = MODELS[name]
    if family == "Gemma3Multimodal":
        model = _multimodal_gemma3()
    else:
        config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        config = getattr(transformers, config_class)(**{**SIZES, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # All ones or zeros would hide a mix-up.
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if family == "Gemma3Multimodal":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["text_config"] = GEMMA3_PUBLISHED
        (folder / "config.json").write_text(json.dumps(config))
    return model


def _multimodal_gemma3():
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = transformers.Gemma3TextConfig(**GEMMA3_PUBLISHED, initializer_range=0.02)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def logits_of(model, ids):
    """Return transformers' logits [n_tokens, n_vocab] for `ids`, float32."""
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([ids])).logits[0].float())
