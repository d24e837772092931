"""Conversion against its oracles: transformers for logits, tokenizers for token ids."""

import numpy as np
import pytest
from llama_oracle import llama_logits, load

from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.tokenizer_bpe import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT
from trimix_gguf.machine.native import lib as llama_cpp

torch = pytest.importorskip("torch", reason="the logits oracle needs torch")
transformers = pytest.importorskip("transformers", reason="the logits oracle needs transformers")
pytest.importorskip("tokenizers", reason="the tokenization oracle needs tokenizers")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="comes with transformers")

from tiny_checkpoints import (  # noqa: E402
    LINES,
    MODELS,
    N_VOCAB,
    logits_of,
    save_model,
    save_tokenizer,
)

N_TOKENS = 100
# Bounds on the root mean square and the largest difference of a logit; logits spread over 13.
# llama.cpp rounds the activations too: to float16, bfloat16 or 8 bits.
BOUNDS = {"f32": (1e-4, 1e-3), "f16": (0.01, 0.06), "bf16": (0.06, 0.5), "q8_0": (0.2, 2.0)}


@pytest.mark.parametrize("type", BOUNDS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(tmp_path, name, type):
    oracle = save_model(tmp_path, name)
    save_tokenizer(tmp_path, QWEN2_SPLIT)
    ids = np.random.default_rng(1).integers(0, N_VOCAB, N_TOKENS).tolist()
    expected = logits_of(oracle, ids)
    convert_hf(tmp_path, tmp_path / "m.gguf", type=type)
    difference = llama_logits(tmp_path / "m.gguf", ids) - expected
    rms, largest = np.sqrt(np.mean(difference**2)), np.abs(difference).max()
    print(f"{name} {type}: rms difference {rms:.1e}, largest {largest:.1e}")
    # Rounding turns a near tie of the router into another expert.
    slack = 3 if name == "qwen3moe" and type != "f32" else 1
    assert rms <= slack * BOUNDS[type][0]
    assert largest <= slack * BOUNDS[type][1]


def test_the_sequence_reaches_every_expert(tmp_path):
    oracle = save_model(tmp_path, "qwen3moe")
    ids = np.random.default_rng(1).integers(0, N_VOCAB, N_TOKENS).tolist()
    with torch.no_grad():
        layers = oracle(torch.tensor([ids]), output_router_logits=True).router_logits
    for router in layers:
        assert set(router.topk(2).indices.flatten().tolist()) == set(range(4))


def test_both_layouts_of_a_multimodal_checkpoint(tmp_path):
    """Published Gemma 3 has language_model.model., transformers since 4.52 model.language_model."""
    save_model(tmp_path, "gemma3 multimodal")
    save_tokenizer(tmp_path, QWEN2_SPLIT)
    path = tmp_path / "model.safetensors"
    files = []
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("language_model.model.", "model.language_model."),
    ):
        tensors = safetensors_torch.load_file(path)
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        assert sum(name.startswith(new) for name in tensors) == 6 * 13 + 2
        safetensors_torch.save_file(tensors, path)
        convert_hf(tmp_path, tmp_path / "m.gguf", force=True)
        files.append((tmp_path / "m.gguf").read_bytes())
    assert files[0] == files[1]


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
