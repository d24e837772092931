"""A Hugging Face checkpoint folder: its JSON files and its safetensors, read tensor by tensor.

The layout of a safetensors file (an 8-byte little-endian header length, a JSON header, raw
little-endian data) is described at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimix_gguf.errors import ConversionError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PICKLES = ("*.bin", "*.pt", "*.pth")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, byte offset, shape and safetensors dtype name."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder, listed from the headers alone; data is mapped only in `read`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        index = folder / INDEX
        if (folder / WEIGHTS).is_file():
            self.tensors = _read_header(folder / WEIGHTS)
        elif index.is_file():
            self.tensors = _read_shards(folder, index)
        elif any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise ConversionError(
                f"{folder} holds only pickled weights, which can run code when opened; "
                "save them again with save_pretrained(..., safe_serialization=True)"
            )
        else:
            raise ConversionError(
                f"{folder} holds neither {WEIGHTS} nor {INDEX}; download the weights as well"
            )

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32; a view of the file where it is stored that way."""
        stored = self.tensors[name]
        if stored.dtype not in STORED_DTYPES:
            raise ConversionError(
                f"{name} is stored as {stored.dtype}, expected one of "
                f"{', '.join(STORED_DTYPES)}; start from the unquantized checkpoint"
            )
        dtype = np.dtype(STORED_DTYPES[stored.dtype])
        if math.prod(stored.shape) == 0:
            return np.zeros(stored.shape, dtype=np.float32)
        data = np.memmap(
            stored.path, dtype=dtype, mode="r", offset=stored.offset, shape=stored.shape
        )
        if stored.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            wide = data.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return np.asarray(data).astype(np.float32, copy=False)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in self.tensors:
            yield name, self.read(name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; ConversionError if it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"{path} is missing; give the folder that save_pretrained or a download made"
        ) from None
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{path} cannot be read as JSON ({error}); download it again"
        ) from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} is not a JSON object; download it again")
    return value


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{index} has no weight_map; download it again")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        # An index names files beside it; anything else could reach outside the folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConversionError(f"{index} names {shard!r}, expected a file beside it")
        if shard not in headers:
            if not (folder / shard).is_file():
                raise ConversionError(f"shard {folder / shard} is missing; download it again")
            headers[shard] = _read_header(folder / shard)
        if name not in headers[shard]:
            raise ConversionError(f"{folder / shard} lacks {name}; download shard and index again")
        tensors[name] = headers[shard][name]
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConversionError(f"{path} is truncated within its header; download it again")
        if length > MAX_HEADER_BYTES:
            raise ConversionError(f"{path} is not a safetensors file; download it again")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _locate(path, 8 + length, entry) for name, entry in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConversionError(f"{path} has a damaged header; download it again") from error
    if end > size:
        raise ConversionError(
            f"{path} is truncated: {size} bytes, expected {end}; download it again"
        )
    return tensors


def _locate(path: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
    """Turn one header entry into a StoredTensor; ValueError if its numbers disagree."""
    shape = tuple(int(n) for n in entry["shape"])
    begin, end = entry["data_offsets"]
    dtype = entry["dtype"]
    if begin < 0 or end < begin or any(n < 0 for n in shape):
        raise ValueError("negative size")
    if dtype in STORED_DTYPES:
        expected = math.prod(shape) * np.dtype(STORED_DTYPES[dtype]).itemsize
        if end - begin != expected:
            raise ValueError("data_offsets disagree with shape")
    return StoredTensor(path=path, offset=start + begin, shape=shape, dtype=dtype)
