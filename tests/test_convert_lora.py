"""LoRA: adapters against PEFT's logits and llama.cpp's own file, and what is refused."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from llama_oracle import llama_logits

from trimix_gguf.convert.adapter import Adapter
from trimix_gguf.convert.check import check_trio
from trimix_gguf.convert.checkpoint import StoredTensor, write_safetensors
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.lora import convert_lora, merge_lora
from trimix_gguf.errors import ConversionError, ModelFileError

SHARED = Path(__file__).parent.parent.parent / "shared" / "models"
SHARED_MODELS = Path(os.environ.get("TRIMIX_SHARED_MODELS", SHARED))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.down_proj": 2},
    "alpha_pattern": {"k_proj": 1, "layers.0.mlp.gate_proj": 24},
}
# What both an adapter and a merge can say, then what only a merge can.
CASES = {
    "llama": ("llama untied", {}),
    "llama embeddings": ("llama untied", {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
    "llama patterns": ("llama", PATTERNS),
    "llama rslora patterns": ("llama", {"use_rslora": True, **PATTERNS}),
    "qwen2": ("qwen2", {}),
    "qwen2 rslora": ("qwen2", {"use_rslora": True}),
    "qwen3moe": ("qwen3moe", {"target_modules": LINEAR[:4]}),
    "gemma3": ("gemma3", {}),
}
MERGE_CASES = {
    "dora": ("llama", {"use_dora": True}),
    "modules_to_save": ("llama untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, embedding alone": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, head alone": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied, both saved": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied pair": ("llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}


def save_peft(folder, name, **settings):
    """Save base and adapter in `folder`, both random; return PEFT's float32 logits and the ids."""
    for module in ("torch", "transformers", "tokenizers"):
        pytest.importorskip(module, reason=f"the logits oracle needs {module}")
    peft = pytest.importorskip("peft", reason="the adapter's oracle is PEFT")
    import torch
    from tiny_checkpoints import N_VOCAB, logits_of, save_model, save_tokenizer

    from trimix_gguf.convert.tokenizer_bpe import QWEN2_SPLIT

    (folder / "base").mkdir()
    base = save_model(folder / "base", name)
    save_tokenizer(folder / "base", QWEN2_SPLIT)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | settings
    settings |= {"init_lora_weights": "gaussian"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers, and about tied embeddings
        model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    ids = np.random.default_rng(1).integers(0, N_VOCAB, 40).tolist()
    return logits_of(model, ids), ids


@pytest.mark.parametrize("case", [*CASES, *MERGE_CASES])
def test_logits_equal_those_of_peft(tmp_path, case):
    name, settings = (CASES | MERGE_CASES)[case]
    expected, ids = save_peft(tmp_path, name, **settings)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    convert_hf(base, tmp_path / "base.gguf", type="f32")
    plain = llama_logits(tmp_path / "base.gguf", ids)
    assert np.abs(plain - expected).max() > 0.5  # the adapter matters
    merge_lora(adapter, base, tmp_path / "merged.gguf", type="f32")
    found = {"merged": llama_logits(tmp_path / "merged.gguf", ids)}
    if case in CASES:
        convert_lora(adapter, base, tmp_path / "a.gguf", type="f32")
        found["adapter"] = llama_logits(tmp_path / "base.gguf", ids, tmp_path / "a.gguf")
    for way, logits in found.items():
        largest = np.abs(logits - expected).max()
        print(f"{case}, {way}: largest difference {largest:.1e}")
        # ggml looks Gemma's GELU up in a table of float16.
        assert largest <= (3e-3 if name == "gemma3" else 1e-3), way


def test_an_adapter_of_embeddings_makes_a_trio_with_its_base_only(tmp_path, nano_files):
    """`check` and `create` looked at the wrong side of its pair, and refused it."""
    save_peft(tmp_path, "llama untied", target_modules=["q_proj", "embed_tokens", "lm_head"])
    base, adapter = tmp_path / "base.gguf", tmp_path / "a.gguf"
    convert_hf(tmp_path / "base", base)
    convert_lora(tmp_path / "adapter", tmp_path / "base", adapter)
    report = check_trio(large_ins=base, small_cpt=adapter, small_base=base, n_ctx=64)
    assert report["models"]["small_cpt"]["type"] == "adapter"
    with pytest.raises(ModelFileError, match="adapts token_embd.weight of"):
        check_trio(**{**nano_files, "small_cpt": adapter})


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_only_a_merge_can_say_is_refused_for_an_adapter(tmp_path, settings):
    save_peft(tmp_path, "llama untied", **settings)
    with pytest.raises(ConversionError, match="use merge-lora"):
        convert_lora(tmp_path / "adapter", tmp_path / "base", tmp_path / "a.gguf")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_side_of_tied_embeddings_is_refused_for_an_adapter(tmp_path, module):
    save_peft(tmp_path, "llama", target_modules=["q_proj", module])
    with pytest.raises(ConversionError, match="use merge-lora"):
        convert_lora(tmp_path / "adapter", tmp_path / "base", tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_equals_the_file_that_llama_cpp_made(tmp_path):
    shipped = SHARED_MODELS / "kk-cpt-lora-f16.gguf"
    if not shipped.is_file():
        pytest.skip(f"{shipped} is not here; set TRIMIX_SHARED_MODELS")
    config = {  # Qwen2.5-Coder-0.5B
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert_lora(SHARED_MODELS / "kk-cpt-lora-peft", tmp_path, tmp_path / "a.gguf")
    ours, theirs = GGUFReader(tmp_path / "a.gguf"), GGUFReader(shipped)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[key].contents() == theirs.fields[key].contents()
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type
        np.testing.assert_array_equal(tensor.shape, expected[tensor.name].shape)
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].data)


# From here on, without torch: a base that is a config alone, and adapters written by hand.

Q = "model.layers.0.self_attn.q_proj"
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/base",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["q_proj"],
    "bias": "none",
}


def save_adapter(folder, shapes, prefix="base_model.model.", **config):
    """Save an adapter of counting numbers: `shapes` by name, less PEFT's prefix."""
    folder.mkdir(exist_ok=True)
    shapes = {f"{prefix}{name}": shape for name, shape in shapes.items()}
    tensors = {name: StoredTensor(folder, 0, shape, "F32") for name, shape in shapes.items()}
    write_safetensors(
        folder / "adapter_model.safetensors",
        tensors,
        lambda name: np.arange(np.prod(shapes[name]), dtype=np.float32).reshape(shapes[name]),
    )
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def pair(module, n_out, n_in, rank=2):
    return {f"{module}.lora_A.weight": (rank, n_in), f"{module}.lora_B.weight": (n_out, rank)}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    return folder


def test_rows_of_q_are_reordered_by_head_and_alpha_is_the_first_pair_s(base, tmp_path):
    v = "model.layers.0.self_attn.v_proj"
    shapes = pair(Q, 8, 8) | pair(v, 4, 8, rank=4)
    settings = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 6}}
    adapter = save_adapter(tmp_path / "adapter", shapes, **settings)
    calls = []
    out = tmp_path / "a.gguf"
    convert_lora(adapter, base, out, type="f32", progress=lambda *call: calls.append(call))
    file = GGUFReader(out)
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    assert file.fields["adapter.lora.alpha"].contents() == 3
    # Heads of four rows: x0 x1 y0 y1 -> x0 y0 x1 y1.
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)[[0, 2, 1, 3, 4, 6, 5, 7]]
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], rows)
    np.testing.assert_array_equal(
        tensors["blk.0.attn_q.weight.lora_a"], np.arange(16).reshape(2, 8)
    )
    np.testing.assert_array_equal(
        tensors["blk.0.attn_v.weight.lora_b"], 6 / 3 * np.arange(16).reshape(4, 4)
    )
    assert calls[-1][1] == calls[-1][2] == 4 * (16 + 16 + 32 + 16)


REFUSALS = {
    "peft_type 'IA3'": (pair(Q, 8, 8), {"peft_type": "IA3"}),
    "bias 'lora_only'": (pair(Q, 8, 8), {"bias": "lora_only"}),
    "sets fan_in_fan_out": (pair(Q, 8, 8), {"fan_in_fan_out": True}),
    "sets target_parameters": (pair(Q, 8, 8), {"target_parameters": ["experts.gate_up_proj"]}),
    "init_lora_weights = 'pissa'": (pair(Q, 8, 8), {"init_lora_weights": "pissa"}),
    r"lora_E, which is no part": (pair(Q, 8, 8) | {f"{Q}.lora_E": (2, 1)}, {}),
    "no whole LoRA pair": ({f"{Q}.lora_A.weight": (2, 8)}, {}),
    "is no whole LoRA": (pair(Q, 8, 8), {"use_dora": True}),
    "replaces lm_head as a whole": ({"lm_head.weight": (32, 8)}, {}),
    "holds no LoRA pair": ({"lm_head.base_layer.weight": (32, 8)}, {}),
    "has ranks 4 and 4, but .* implies 2": (pair(Q, 8, 8, rank=4), {}),
    r"q_proj lora_alpha = 0": (pair(Q, 8, 8), {"lora_alpha": 0}),
    "no regular expression": (pair(Q, 8, 8), {"alpha_pattern": {"q(": 3}}),
    r"q_proj as \[16, 8\], but .* has it as \[8, 8\]": (pair(Q, 16, 8), {}),
    r"has no such matrix; .*\(some/base\)": (pair(Q.replace("0", "1"), 8, 8), {}),
    "one expert of several": (pair("model.layers.0.mlp.experts.0.up_proj", 8, 8), {}),
    "shares between input and output": (
        {f"model.embed_tokens.lora_embedding_{m}": s for m, s in (("A", (2, 32)), ("B", (8, 2)))},
        {"tied": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_are_one_line_and_leave_nothing(base, tmp_path, message):
    shapes, settings = REFUSALS[message]
    if settings.get("tied"):
        (base / "config.json").write_text(json.dumps(BASE | {"tie_word_embeddings": True}))
    adapter = save_adapter(tmp_path / "adapter", shapes, **settings)
    with pytest.raises(ConversionError, match=message) as caught:
        convert_lora(adapter, base, tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == {base, adapter}


def test_existing_files_interruption_and_types(base, tmp_path):
    adapter, out = save_adapter(tmp_path / "adapter", pair(Q, 8, 8)), tmp_path / "a.gguf"

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_lora(adapter, base, out, progress=interrupt)
    with pytest.raises(ConversionError, match="unknown type 'q8_0'"):
        convert_lora(adapter, base, out, type="q8_0")
    assert set(tmp_path.iterdir()) == {base, adapter}
    out.write_bytes(b"kept")
    with pytest.raises(ConversionError, match="exists"):
        convert_lora(adapter, base, out)
    assert out.read_bytes() == b"kept"
    convert_lora(adapter, base, out, force=True)
    assert {tensor.tensor_type.name for tensor in GGUFReader(out).tensors} == {"F16"}
    with pytest.raises(ConversionError, match=r"base holds neither model\.safetensors"):
        merge_lora(adapter, base, tmp_path / "m.gguf")


def test_an_adapter_that_is_not_there_or_pickled_is_refused(base, tmp_path):
    with pytest.raises(ConversionError, match=r"adapter_config\.json is missing"):
        convert_lora(tmp_path, base, tmp_path / "a.gguf")
    adapter = save_adapter(tmp_path / "adapter", pair(Q, 8, 8))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConversionError, match="pickled"):
        Adapter(adapter)


@pytest.mark.parametrize(("name", "prefix"), [(".default", "base_model.model."), ("", "")])
def test_usual_names_of_pairs_are_read(base, tmp_path, name, prefix):
    """Bug: an adapter's name in the tensors was taken for a module that is replaced as a whole."""
    shapes, folder = pair(Q, 8, 8), tmp_path / "a"
    convert_lora(save_adapter(folder, shapes), base, tmp_path / "plain.gguf")
    renamed = {text.replace(".weight", f"{name}.weight"): s for text, s in shapes.items()}
    convert_lora(save_adapter(folder, renamed, prefix), base, tmp_path / "other.gguf")
    assert (tmp_path / "other.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({f"{Q}.lora_a": (8, 2), f"{Q}.lora_b": (2, 8)}, "as MLX names an adapter"),
        ({f"{Q}.lora_A.{x}.weight": (2, 8) for x in "ab"}, "holds 2 adapters: a, b"),
        ({f"{'q' * 400}.lora_A.weight": (2, 8)}, "a name of over 300 letters"),
        ({"lm_head.modules_to_save.weight": (32, 8)}, "replaces lm_head as a whole"),
        ({"model.embed_tokens.weight": (36, 8)}, "has 36 rows in .* has 32: tokens were added"),
    ],
)
def test_other_names_are_refused_with_the_true_reason(base, tmp_path, names, words):
    prefix = "" if "MLX" in words else "base_model.model."
    folder = save_adapter(tmp_path / "adapter", names, prefix)
    with pytest.raises(ConversionError, match=words):
        convert_lora(folder, base, tmp_path / "a.gguf")


@pytest.mark.parametrize("pattern", ["([a-z_.0-9]+)+X", "(a|aa)+", ".*.*.*x", "q_proj" * 100])
def test_patterns_that_could_take_for_ever_are_refused(base, tmp_path, pattern):
    adapter = save_adapter(tmp_path / "a", pair(Q, 8, 8), rank_pattern={pattern: 2})
    with pytest.raises(ConversionError, match="no regular expression that is read here"):
        convert_lora(adapter, base, tmp_path / "a.gguf")


@pytest.mark.parametrize("pattern", [r"layers\.\d+\.self_attn.*q_proj", f"^{Q}$"])
def test_plain_patterns_are_read(base, tmp_path, pattern):
    adapter = save_adapter(tmp_path / "a", pair(Q, 8, 8), r=7, rank_pattern={pattern: 2})
    convert_lora(adapter, base, tmp_path / "a.gguf")
