"""A Hugging Face checkpoint folder: its JSON files and its safetensors, read tensor by tensor.

The layout of a safetensors file (an 8-byte little-endian header length, a JSON header, raw
little-endian data) is described at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.typed_json import parse

from .shapes import SHAPES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PICKLES = ("*.bin", "*.pt", "*.pth")
LARGEST = {"F32": 3.4028235e38, "F16": 65504.0, "BF16": 3.3895314e38}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, byte offset, shape and safetensors dtype name."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * np.dtype(STORED_DTYPES[self.dtype]).itemsize


class TensorSource(Protocol):
    """Where a conversion reads: a checkpoint, or one with an adapter's changes made."""

    tensors: dict[str, StoredTensor]
    own_head: bool  # the output head is stored apart, even if the config says that it is tied

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return one tensor as float32, or some `rows` of it."""
        ...


class Checkpoint:
    """The tensors of a folder, listed from the headers; data is mapped only in `read`."""

    own_head = False

    def __init__(self, folder: Path, weights: str = WEIGHTS) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        index = folder / f"{weights}.index.json"
        if (folder / weights).is_file():
            self.tensors = _read_header(folder / weights)
        elif index.is_file():
            self.tensors = _read_shards(folder, index)
        elif any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise ConversionError(
                f"{folder} holds only pickled weights, which can run code when opened; "
                "save them again with save_pretrained(..., safe_serialization=True)"
            )
        else:
            raise ConversionError(
                f"{folder} holds neither {weights} nor {index.name}; download the weights as well"
            )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return one tensor as float32, or some `rows` of it; a view where it is stored so."""
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
        )[rows]
        if stored.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            wide = data.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return np.asarray(data).astype(np.float32, copy=False)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in self.tensors:
            yield name, self.read(name)


def write_safetensors(
    path: Path, tensors: Mapping[str, StoredTensor], load: Callable[[str], np.ndarray]
) -> None:
    """Write `path` one tensor at a time: `load(name)` is float32, `tensors` says what to store.

    Only their shapes and dtypes are looked at. Raises ConversionError where a value does not fit
    its dtype, OSError.
    """
    # Wide dtypes first, which keeps each tensor aligned to its own size.
    names = sorted(tensors, key=lambda n: (-np.dtype(STORED_DTYPES[tensors[n].dtype]).itemsize, n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in names:
        stored, begin = tensors[name], end
        end += stored.n_bytes
        shape, offsets = list(stored.shape), [begin, end]
        header[name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_pack(name, load(name), tensors[name].dtype).data)


def _pack(name: str, data: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 to a stored dtype, to even on a tie; ConversionError where it cannot be."""
    # Written so that NaN fails as well.
    if data.size and not max(data.max(), -data.min()) <= LARGEST[dtype]:
        raise ConversionError(
            f"{name} holds NaN, infinity or more than {dtype}'s {LARGEST[dtype]:g}; "
            "store a wider type, or look for the damaged checkpoint"
        )
    data = np.ascontiguousarray(data)
    return to_bfloat16(data) if dtype == "BF16" else data.astype(STORED_DTYPES[dtype], copy=False)


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """Round finite float32 to the upper half of its bits, uint16; to even on a tie."""
    bits = data.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype("<u2")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, which fits shapes.SHAPES.

    Raises ConversionError if it is missing, is not one, or holds other kinds of values.
    """
    if not path.exists():
        raise ConversionError(
            f"{path} is missing; give the folder that save_pretrained or a download made"
        )
    try:
        value: dict[str, Any] = parse(read_text(path), SHAPES.get(path.name, {}))
    except ValueError as error:
        raise ConversionError(f"{path}: not such JSON: {error}; download it again") from None
    return value


def read_text(path: Path) -> str:
    """Return the text of a file of a checkpoint; raises ConversionError."""
    check_inside(path.parent, path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read ({error}); download it again") from None


def check_inside(folder: Path, path: Path) -> None:
    """Raise ConversionError where a file leads out of its folder by a link.

    What a stranger's folder links to could be any file of the user's, and would be in the output.
    The hub's own cache keeps the files of a snapshot in a folder beside it.
    """
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise ConversionError(f"{path} leads out of {folder} by a link; copy the file there")


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if weight_map is None:
        raise ConversionError(f"{index} has no weight_map; download it again")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        # An index names files beside it; anything else could reach outside the folder.
        if Path(shard).name != shard:
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
    check_inside(path.parent, path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConversionError(f"{path} is truncated within its header; download it again")
        if length > MAX_HEADER_BYTES:
            raise ConversionError(f"{path} is not a safetensors file; download it again")
        raw = file.read(length)
    try:
        entries = parse(raw, object)
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
    stored = StoredTensor(path=path, offset=start + begin, shape=shape, dtype=dtype)
    if dtype in STORED_DTYPES and end - begin != stored.n_bytes:
        raise ValueError("data_offsets disagree with shape")
    return stored
