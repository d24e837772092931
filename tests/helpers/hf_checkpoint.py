"""A Hugging Face checkpoint made from a Llama or Qwen2 GGUF: its weights, dequantized.

    python tests/helpers/hf_checkpoint.py model.gguf FOLDER

For tests and benchmarks of the converter, and for running the same weights in transformers,
where no checkpoint can be had.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from rebuild import Source, byte_level_folder, write_json

from trimix_gguf.convert.architectures import ARCHITECTURES, OUTER
from trimix_gguf.convert.checkpoint import StoredTensor, write_safetensors
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("gguf", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("--dtype", choices=["BF16", "F16", "F32"], default="BF16")
    options = options.parse_args()
    checkpoint_folder(options.gguf, options.folder, options.dtype)
    print(options.folder)


def checkpoint_folder(gguf: Path, folder: Path, dtype: str) -> None:
    """Write config, tokenizer and weights of `gguf` to `folder`, the head tied."""
    file = read_gguf(gguf)
    if file.architecture not in CLASSES:
        raise SystemExit(f"{gguf} is a {file.architecture}; expected one of {', '.join(CLASSES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(file)
    write_json(folder / "config.json", config)
    byte_level_folder(Source(file), folder)
    write_weights(gguf, config, folder / "model.safetensors", dtype)


def read_config(file: GGUFFile) -> dict[str, object]:
    def value(key: str) -> object:
        return file.metadata[f"{file.architecture}.{key}"]

    return {
        "architectures": [CLASSES[file.architecture]],
        "model_type": file.architecture,
        "hidden_act": "silu",
        "hidden_size": file.n_embd,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": file.n_layer,
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": file.n_ctx_train,
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("rope.freq_base"),
        "vocab_size": len(file.array("tokenizer.ggml.tokens") or ()),
        "bos_token_id": file.metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": file.metadata["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": True,
    }


def write_weights(path: Path, config: dict[str, object], out: Path, dtype: str) -> None:
    architecture = ARCHITECTURES[config["architectures"][0]]
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    names = {f"{target}.weight": f"model.{module}.weight" for module, (target, _) in OUTER.items()}
    permuted = set()
    for i in range(config["num_hidden_layers"]):
        for module, (target, _) in architecture.layer_modules.items():
            for part in ("weight", "bias"):
                names[f"blk.{i}.{target}.{part}"] = f"model.layers.{i}.{module}.{part}"
                if module in architecture.permuted:
                    permuted.add(f"model.layers.{i}.{module}.{part}")
    # Of a tied matrix that is stored twice, the copy that keeps more bits.
    head = tensors.pop(HEAD, None)
    if head is not None and head.n_bytes > tensors[EMBEDDING].n_bytes:
        tensors[EMBEDDING] = head
    by_source = {names[target]: tensor for target, tensor in tensors.items()}
    stored = {
        source: StoredTensor(out, 0, tuple(int(n) for n in reversed(tensor.shape)), dtype)
        for source, tensor in by_source.items()
    }

    def load(source: str) -> np.ndarray:
        tensor = by_source[source]
        data = dequantize(tensor.data, tensor.tensor_type).reshape(stored[source].shape)
        if source not in permuted:
            return data
        # llama.cpp's pairs (x0 y0 x1 y1 ..) back to rope halves (x0 x1 .. | y0 y1 ..), by head.
        n_pairs = config["hidden_size"] // config["num_attention_heads"] // 2
        return data.reshape(-1, n_pairs, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)

    write_safetensors(out, stored, load)


if __name__ == "__main__":
    main()
