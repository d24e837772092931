"""A GGUF with other weights: all else, the vocabulary above all, is as in the file before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.files import ByteProgress
from trimix_gguf.machine.quantization import DIRECT, WEIGHT_TYPES

from .architectures import read_config, read_sizes
from .checkpoint import Checkpoint
from .output import whole_output
from .plan import plan_tensors
from .writer import NO_FACTORS, QUANTIZATION_VERSION, ROPE_FACTORS, write_gguf

# Written anew: they say what the weights are stored as, or come from the writer itself.
_OWN = ("general.architecture", "general.file_type", "general.quantization_version", "general.name")


def regraft(
    base: Path,
    model_dir: Path,
    out: Path,
    *,
    type: str = "q8_0",
    name: str | None = None,
    force: bool = False,
    progress: ByteProgress | None = None,
) -> None:
    """Write the weights in `model_dir` to `out`, with the metadata of the GGUF `base`.

    For a checkpoint that came from this GGUF and has no tokenizer of its own; of the folder, only
    config.json and the weights are read. `type` as convert_hf's, but no quantizer's. Raises
    ConversionError.
    """
    if type not in DIRECT:
        raise ConversionError(f"type {type!r} is not written here; one of {', '.join(DIRECT)}")
    architecture, config = read_config(model_dir)
    checkpoint = Checkpoint(model_dir)
    stored_as = GGMLQuantizationType[type.upper()]
    sizes = read_sizes(architecture, config)
    plan = plan_tensors(architecture, config, sizes, checkpoint, stored_as)
    reader = GGUFReader(base)
    n_bytes = sum(tensor.n_bytes for tensor in plan) + 128 * len(plan) + reader.data_offset
    with whole_output(out, n_bytes=n_bytes, force=force) as path:
        writer = GGUFWriter(None, architecture.gguf)
        writer.add_name(name or model_dir.resolve().name)
        writer.add_file_type(WEIGHT_TYPES[type].file_type)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in _OWN:
                _copy(writer, field)
        factors = next((t.data for t in reader.tensors if t.name == ROPE_FACTORS), NO_FACTORS)
        write_gguf(writer, path, checkpoint, plan, factors=np.array(factors), progress=progress)


def _copy(writer: GGUFWriter, field: Any) -> None:
    kind, *rest = field.types
    if kind == GGUFValueType.ARRAY:
        writer.add_key_value(field.name, field.contents(), kind, sub_type=rest[-1])
    else:
        writer.add_key_value(field.name, field.contents(), kind)
