"""The tensors of a GGUF file: rows of a checkpoint brought into their order and their type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.files import ByteProgress, advancing
from trimix_gguf.machine.threads import available_cores

from .checkpoint import TensorSource, to_bfloat16
from .plan import BLOCK_SIZE, Q8_0_BLOCK, PlannedTensor

QUANTIZATION_VERSION = 2  # of the block layouts, as ggml counts them
F16_MAX = 65504.0
# The largest number of a type; a float16 scale goes with 127 at most.
LIMITS = {GGMLQuantizationType.F16: F16_MAX, GGMLQuantizationType.Q8_0: 127 * F16_MAX}
ROPE_FACTORS = "rope_freqs.weight"
NO_FACTORS = np.empty(0, np.float32)
MAX_THREADS = 4
ALMOST_HALF = np.nextafter(np.float32(0.5), np.float32(0))  # 0.5 would round 0.49999997 up


def write_gguf(
    writer: GGUFWriter,
    path: Path,
    source: TensorSource,
    plan: list[PlannedTensor],
    *,
    factors: np.ndarray = NO_FACTORS,
    progress: ByteProgress | None = None,
) -> None:
    """Write metadata and tensors to `path`; `factors` are rope's, if any. Closes `writer`.

    Some rows at a time, so that memory does not grow with a tensor. `progress` gets (tensor
    name, bytes done, bytes in all). Raises ConversionError, OSError.
    """
    _write_header(writer, path, plan, factors)
    advance = advancing(progress, sum(tensor.n_bytes for tensor in plan))
    with path.open("ab") as file, ThreadPoolExecutor(min(MAX_THREADS, available_cores())) as pool:
        _align(file, writer)
        file.write(factors.data)
        _align(file, writer)
        for tensor in plan:
            for block in pool.map(partial(_convert, source, tensor), _blocks(tensor)):
                file.write(block.data)
                advance(tensor.target, block.nbytes)
            _align(file, writer)


def _write_header(
    writer: GGUFWriter, path: Path, plan: list[PlannedTensor], factors: np.ndarray
) -> None:
    if factors.size:
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
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def _align(file: BinaryIO, writer: GGUFWriter) -> None:
    file.write(bytes(-file.tell() % writer.data_alignment))


def _blocks(tensor: PlannedTensor) -> Iterator[tuple[str, slice]]:
    """Cut the sources of a tensor into rows to convert at once, whole heads where they matter."""
    n_rows, *rest = tensor.source_shape
    unit = tensor.head_dim or 1
    step = unit * max(1, BLOCK_SIZE // (unit * math.prod(rest)))
    for name in tensor.sources:
        for start in range(0, n_rows, step):
            yield name, slice(start, min(start + step, n_rows))


def _convert(source: TensorSource, tensor: PlannedTensor, block: tuple[str, slice]) -> np.ndarray:
    """Read some rows and bring them into the order and the type that the output stores."""
    name, rows = block
    data = source.read(name, rows)
    largest = float(max(data.max(), -data.min()))
    if not math.isfinite(largest):
        raise ConversionError(f"{name} holds NaN or infinity; the checkpoint is damaged")
    if largest > LIMITS.get(tensor.stored_as, math.inf):
        raise ConversionError(
            f"{name} overflows {tensor.stored_as.name}: it holds {largest:.6g}, expected at most "
            f"{LIMITS[tensor.stored_as]:g}; convert to bf16 or f32 instead"
        )
    if tensor.offset:
        data = data + np.float32(tensor.offset)
    if tensor.head_dim:
        data = _interleave(data, tensor.head_dim)
    data = np.ascontiguousarray(data)
    if tensor.stored_as == GGMLQuantizationType.BF16:
        return to_bfloat16(data)
    if tensor.stored_as == GGMLQuantizationType.F16:
        return data.astype(np.float16)
    return to_q8_0(data) if tensor.stored_as == GGMLQuantizationType.Q8_0 else data


def to_q8_0(data: np.ndarray) -> np.ndarray:
    """Quantize float32 to blocks of a float16 scale and 32 int8, uint8 [n_blocks, 34].

    Bit for bit what ggml's quantize_row_q8_0_ref gives, in fewer passes than gguf's.
    """
    blocks = data.reshape(-1, Q8_0_BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    # A scale too small to have an inverse is 0 in float16: its numbers do not matter.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        numbers = blocks * np.where(scales == 0, np.float32(0), 1 / scales)
        # The cast cuts off: half away from zero is ggml's roundf.
        numbers += np.copysign(ALMOST_HALF, numbers)
        out = np.empty((len(blocks), 2 + Q8_0_BLOCK), np.uint8)
        out[:, :2] = scales.astype(np.float16).view(np.uint8)
        out[:, 2:] = numbers.astype(np.int8).view(np.uint8)
    return out


def _interleave(data: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows from rope halves (x0 x1 .. | y0 y1 ..) to pairs (x0 y0 x1 y1 ..), by head."""
    halves = data.reshape(-1, 2, head_dim // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)
