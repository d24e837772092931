"""Convert a Hugging Face checkpoint folder to one GGUF file, block of rows by block of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from gguf import GGMLQuantizationType, GGUFWriter

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.files import ByteProgress, temporary_path
from trimix_gguf.machine.quantization import DIRECT, FLOATS, WEIGHT_TYPES

from .architectures import Architecture, read_config, read_sizes, sliding_layers
from .checkpoint import Checkpoint, TensorSource
from .output import refuse_existing, refuse_input, refuse_second, whole_output
from .plan import plan_tensors
from .quantize import quantize_gguf
from .rope import llama3_rope_factors, read_rope, write_rope
from .tokenizer import read_tokenizer
from .writer import NO_FACTORS, QUANTIZATION_VERSION, write_gguf


class HfOptions(TypedDict, total=False):
    """What convert_hf is told beside the weights and the output; it says what these are."""

    type: str
    pre: str | None
    name: str | None
    force: bool
    progress: ByteProgress | None


def convert_hf(
    model_dir: Path,
    out: Path,
    *,
    type: str = "q8_0",
    pre: str | None = None,
    name: str | None = None,
    checkpoint: TensorSource | None = None,
    force: bool = False,
    progress: ByteProgress | None = None,
) -> None:
    """Write the checkpoint in `model_dir` to `out` as GGUF; nothing is left there on failure.

    `type` is f32, f16, bf16 or q8_0, for matrices (vectors stay float32), or another of
    llama.cpp's quantizer: then a whole file in the checkpoint's own type is written first, beside
    `out`. `pre` overrides the recognised pre-tokenizer. `checkpoint` gives the weights in place
    of the folder's own. `progress` gets (tensor name, bytes done, bytes in all), for each of the
    two in turn. Memory stays below the largest tensor in float32. Raises ConversionError.
    """
    model_dir, out = Path(model_dir), Path(out)
    if type not in WEIGHT_TYPES:
        raise ConversionError(f"unknown type {type!r}; choose one of {', '.join(WEIGHT_TYPES)}")
    refuse_input(out, model_dir)
    name = name or model_dir.resolve().name
    if type in DIRECT:
        _write(model_dir, out, checkpoint, type, pre=pre, name=name, force=force, progress=progress)
        return
    source = checkpoint or Checkpoint(model_dir)
    refuse_existing(out, force)
    refuse_second(out)
    dtypes = {stored.dtype for stored in source.tensors.values()}
    unrounded = [kind for kind in FLOATS if kind.upper() in dtypes]  # what the checkpoint holds
    whole = unrounded[0] if len(unrounded) == 1 else "f32"
    with temporary_path(out, whole) as path:
        _write(model_dir, path, source, whole, pre=pre, name=name, force=True, progress=progress)
        quantize_gguf(path, out, type=type, force=force, progress=progress)


def _write(
    model_dir: Path,
    out: Path,
    checkpoint: TensorSource | None,
    type: str,
    *,
    pre: str | None,
    name: str,
    force: bool,
    progress: ByteProgress | None,
) -> None:
    """Write a checkpoint as GGUF in one of the types that need no quantizer."""
    stored_as = GGMLQuantizationType[type.upper()]
    architecture, config = read_config(model_dir)
    sizes, rope = read_sizes(architecture, config), read_rope(config, architecture.rope_types)
    sliding = sliding_layers(architecture, config, sizes["n_layer"])
    checkpoint = checkpoint or Checkpoint(model_dir)
    plan = plan_tensors(architecture, config, sizes, checkpoint, stored_as)
    tokenizer = read_tokenizer(model_dir, config, pre=pre)

    # A tokenizer file is larger than the same tokens and merges in GGUF.
    files = [model_dir / "tokenizer.json", model_dir / "tokenizer.model"]
    n_bytes = sum(tensor.n_bytes for tensor in plan) + 128 * len(plan)
    n_bytes += sum(file.stat().st_size for file in files if file.is_file())
    with whole_output(out, n_bytes=n_bytes, force=force) as path:
        writer = GGUFWriter(None, architecture.gguf)
        writer.add_name(name)
        writer.add_file_type(WEIGHT_TYPES[type].file_type)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        _add_hyperparameters(writer, architecture, config, sizes, sliding)
        write_rope(writer, rope, sizes["head_dim"])
        tokenizer.write(writer)
        factors = NO_FACTORS
        if rope["rope_type"] == "llama3":
            factors = llama3_rope_factors(rope, sizes["head_dim"])
        write_gguf(writer, path, checkpoint, plan, factors=factors, progress=progress)


def _add_hyperparameters(
    writer: GGUFWriter,
    architecture: Architecture,
    config: dict[str, Any],
    sizes: dict[str, int],
    sliding: list[bool],
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
    writer.add_vocab_size(sizes["n_vocab"])
    if architecture.has_experts:
        writer.add_expert_count(sizes["n_expert"])
        writer.add_expert_used_count(sizes["n_expert_used"])
        writer.add_expert_feed_forward_length(sizes["n_ff_exp"])
    if any(sliding):
        writer.add_sliding_window(int(config["sliding_window"]))
        if sliding != [(i + 1) % architecture.sliding_pattern != 0 for i in range(len(sliding))]:
            writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", sliding)
    if architecture.gguf == "gemma3" and "final_logit_softcapping" in config:
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
