"""Conversion against its oracles: transformers for logits, tokenizers for token ids."""

import json

import llama_cpp
import numpy as np
import pytest
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.tokenizer import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT

torch = pytest.importorskip("torch", reason="the logits oracle needs torch")
transformers = pytest.importorskip("transformers", reason="the logits oracle needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="the tokenization oracle needs tokenizers")

N_VOCAB = 512
N_TOKENS = 100
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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "llama3_rope": {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "linear_rope": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "biased": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
}
# Bounds on the root mean square and the largest difference of a logit; logits spread over 13.
# llama.cpp rounds the activations too: to float16, bfloat16 or 8 bits.
BOUNDS = {"f32": (1e-4, 1e-3), "f16": (0.01, 0.06), "bf16": (0.06, 0.5), "q8_0": (0.2, 2.0)}


def save_tokenizer(folder, split):
    """Train a small byte-level BPE on LINES and save it in `folder`; N_VOCAB leaves padding."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    parts = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        regex = tokenizers.Regex(split)
        parts.insert(0, tokenizers.pre_tokenizers.Split(regex, behavior="isolated"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=N_VOCAB - 20,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*LINES, *LINES], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(TOOL, special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.dumps({"eos_token": END, "bos_token": END})
    (folder / "tokenizer_config.json").write_text(settings)
    return tokenizer


def save_model(folder, **changes):
    """Save a small random LlamaForCausalLM with grouped-query attention in `folder`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **changes,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # all ones or zeros would hide a mix-up
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load(path, **options):
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    for name, value in options.items():
        setattr(params, name, value)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refused {path}"
    return model


def llama_logits(path, ids):
    """Return llama.cpp's logits [n_tokens, n_vocab] for `ids`, one decode each."""
    model = load(path)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    # A float16 cache or flash attention alone differs by 0.04, far more than float32 does.
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    rows = []
    for token in ids:
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        assert llama_cpp.llama_decode(context, batch) == 0
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        rows.append(np.ctypeslib.as_array(pointer, shape=(N_VOCAB,)).copy())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(rows)


@pytest.mark.parametrize("type", BOUNDS)
@pytest.mark.parametrize("variant", MODELS)
def test_logits_equal_those_of_transformers(tmp_path, variant, type):
    oracle = save_model(tmp_path, **MODELS[variant])
    save_tokenizer(tmp_path, QWEN2_SPLIT)
    ids = np.random.default_rng(1).integers(0, N_VOCAB, N_TOKENS).tolist()
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].float().numpy()
    convert_hf(tmp_path, tmp_path / "m.gguf", type=type)
    difference = llama_logits(tmp_path / "m.gguf", ids) - expected
    rms, largest = np.sqrt(np.mean(difference**2)), np.abs(difference).max()
    print(f"{variant} {type}: rms difference {rms:.1e}, largest {largest:.1e}")
    assert rms <= BOUNDS[type][0]
    assert largest <= BOUNDS[type][1]


def test_sharded_bfloat16(tmp_path):
    model = save_model(tmp_path).to(torch.bfloat16)
    save_tokenizer(tmp_path, QWEN2_SPLIT)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    # Loaded anew: the cast above rounded the rope frequencies as well.
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = list(range(40, 60))
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    convert_hf(tmp_path, tmp_path / "m.gguf", type="f32")
    assert np.abs(llama_logits(tmp_path / "m.gguf", ids) - expected).max() <= 1e-3


@pytest.mark.parametrize("split", [QWEN2_SPLIT, LLAMA3_SPLIT, GPT2_SPLIT, None])
def test_token_ids_equal_those_of_tokenizers(tmp_path, split):
    save_model(tmp_path)
    oracle = save_tokenizer(tmp_path, split)
    convert_hf(tmp_path, tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf", vocab_only=True)
    vocab = llama_cpp.llama_model_get_vocab(model)
    buffer = (llama_cpp.llama_token * 1000)()
    for line in LINES:
        text = line.encode()
        n = llama_cpp.llama_tokenize(vocab, text, len(text), buffer, len(buffer), False, True)
        assert buffer[:n] == oracle.encode(line, add_special_tokens=False).ids, line
    llama_cpp.llama_model_free(model)
