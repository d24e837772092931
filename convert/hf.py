"""Convert a Hugging Face checkpoint folder to one GGUF file, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import quantize

from trimix_gguf.errors import ConversionError

from .architectures import (
    PlannedTensor,
    find_architecture,
    llama3_rope_factors,
    plan_tensors,
    read_rope,
    read_sizes,
)
from .checkpoint import Checkpoint, read_json
from .tokenizer import read_tokenizer

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
QUANTIZATION_VERSION = 2  # of the block layouts, as ggml counts them
F16_MAX = 65504.0
ROPE_FACTORS = "rope_freqs.weight"


def convert_hf(
    model_dir: Path,
    out: Path,
    *,
    type: str = "q8_0",
    pre: str | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write the checkpoint in `model_dir` to `out` as GGUF; nothing is left there on failure.

    `type` is f32, f16, bf16 or q8_0, for matrices; vectors stay float32. `pre` overrides the
    recognised pre-tokenizer. `progress` gets (tensor name, tensors done, tensors in all).
    Peak memory is a small multiple of the largest tensor. Raises ConversionError.
    """
    model_dir, out = Path(model_dir), Path(out)
    if type not in TYPES:
        raise ConversionError(f"unknown type {type!r}; choose one of {', '.join(TYPES)}")
    if out.exists() and not force:
        raise ConversionError(f"{out} exists; choose another name, or force to replace it")
    if not out.parent.is_dir():
        raise ConversionError(f"folder {out.parent} does not exist; create it first")
    stored_as, file_type = TYPES[type]
    config = read_json(model_dir / "config.json")
    architecture = find_architecture(model_dir, config)
    sizes, rope = read_sizes(config), read_rope(config)
    checkpoint = Checkpoint(model_dir)
    plan = plan_tensors(architecture, config, sizes, checkpoint, stored_as)
    tokenizer = read_tokenizer(model_dir, config, pre=pre)
    _check_free_space(out, plan, model_dir)

    writer = GGUFWriter(None, architecture.gguf)
    writer.add_name(name or model_dir.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    _add_hyperparameters(writer, config, sizes, rope)
    tokenizer.write(writer)
    factors = None
    if rope["rope_type"] == "llama3":
        factors = llama3_rope_factors(rope, sizes["head_dim"])

    # In the same folder, so that the final rename is atomic.
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        _write_file(writer, partial, checkpoint, plan, factors, progress)
        os.replace(partial, out)
    except OSError as error:
        raise ConversionError(f"cannot write {out}: {error}") from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _check_free_space(out: Path, plan: list[PlannedTensor], model_dir: Path) -> None:
    # tokenizer.json is larger than the same tokens and merges in GGUF.
    needed = sum(tensor.n_bytes for tensor in plan)
    needed += (model_dir / "tokenizer.json").stat().st_size + 64 * len(plan)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ConversionError(
            f"{out} needs {needed / 1e9:.2f} GB, but {out.parent} has {free / 1e9:.2f} GB free; "
            "free some space, or choose a smaller type"
        )


def _add_hyperparameters(
    writer: GGUFWriter, config: dict[str, Any], sizes: dict[str, int], rope: dict[str, Any]
) -> None:
    writer.add_context_length(sizes["n_ctx"])
    writer.add_embedding_length(sizes["n_embd"])
    writer.add_block_count(sizes["n_layer"])
    writer.add_feed_forward_length(sizes["n_ff"])
    writer.add_head_count(sizes["n_head"])
    writer.add_head_count_kv(sizes["n_head_kv"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(sizes["n_vocab"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _write_file(
    writer: GGUFWriter,
    path: Path,
    checkpoint: Checkpoint,
    plan: list[PlannedTensor],
    factors: np.ndarray | None,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in plan:
        # The writer takes shapes in elements for a dtype that is not uint8.
        writer.add_tensor_info(
            tensor.target,
            tensor.shape,
            np.dtype(np.float32),
            tensor.n_bytes,
            raw_dtype=tensor.stored_as,
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for n_done, tensor in enumerate(plan, start=1):
        writer.write_tensor_data(_load(checkpoint, tensor))
        if progress is not None:
            progress(tensor.target, n_done, len(plan))
    writer.close()


def _load(checkpoint: Checkpoint, tensor: PlannedTensor) -> np.ndarray:
    """Read one tensor and bring it into the order and the type that the output stores."""
    data = checkpoint.read(tensor.source)
    largest = float(max(data.max(), -data.min()))
    if not np.isfinite(largest):
        raise ConversionError(f"{tensor.source} holds NaN or infinity; the checkpoint is damaged")
    if tensor.stored_as == GGMLQuantizationType.F16 and largest > F16_MAX:
        raise ConversionError(f"{tensor.source} overflows float16; convert to bf16 or f32 instead")
    if tensor.n_head:
        data = _interleave(data, tensor.n_head)
    return quantize(np.ascontiguousarray(data), tensor.stored_as)


def _interleave(data: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder rows from rope halves (x0 x1 .. | y0 y1 ..) to pairs (x0 y0 x1 y1 ..), by head."""
    halves = data.reshape(n_head, 2, data.shape[0] // n_head // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)
