"""Read and check the structure of a GGUF file without llama.cpp.

llama.cpp ends the whole process on some damaged files, so a file is checked here first: its
header, metadata and tensor table are read, its weights are not. Source: ggml/docs/gguf.md and
ggml/src/gguf.cpp.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from trimix_gguf.errors import ModelFileError
from trimix_gguf.machine.gguf_types import (
    NO_WEIGHTS,
    row_bytes,
    tensor_types,
    value_types,
    wrong_type,
)
from trimix_gguf.machine.parts import parts_of

MAGIC = b"GGUF"
# llama.cpp's LLAMA_MAX_LAYERS, GGML_MAX_DIMS and GGML_MAX_NAME less its terminating zero.
MAX_LAYERS, MAX_DIMS, MAX_TENSOR_NAME = 512, 4, 63
MAX_LISTED = MAX_LAYERS  # per-layer values such as head_count_kv are arrays this long
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_LOOKS_LIKE = (
    (rb"version https://git-lfs", "a git-lfs pointer; run `git lfs pull` for the model itself"),
    (rb"PK\x03\x04", "a zip archive or PyTorch checkpoint; convert it to GGUF"),
    (
        rb"\s*<(!doctype|!DOCTYPE|html|\?xml)",
        "a web page saved in the model's place; download it again",
    ),
    (rb"(?s:.{8})\{", "a safetensors file; convert it to GGUF"),
    (rb"\s*\{", "a JSON text, perhaps a server's error message; download it again"),
    (rb"\0{16}", "all zeros, as an unfinished download; download it again"),
)


@dataclass(frozen=True)
class GGUFArray:
    """Stands for a metadata array too long to keep; `value_type` is a GGUFValueType name."""

    value_type: str
    length: int
    offset: int  # of the first item, from the file's start
    n_bytes: int


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table; `shape` is innermost first, `offset` from its file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What a sound GGUF file declares; of a split model, what all parts declare.

    `path` is the first part, which has the metadata. The properties raise ModelFileError where
    the file lacks the key they need.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    file_size: int

    @property
    def architecture(self) -> str:
        """The model family, as 'qwen2'; empty in a later part of a split model."""
        return str(self.metadata.get("general.architecture") or "")

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_weights(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def n_ctx_train(self) -> int:
        """The longest context that it was trained for, in tokens."""
        return self._size("context_length")

    @property
    def n_embd(self) -> int:
        """Numbers in a token's embedding."""
        return self._size("embedding_length")

    @property
    def n_layer(self) -> int:
        """Repeating layers."""
        n_layer = self._size("block_count")
        if n_layer > MAX_LAYERS:
            _refuse(self.path, f"declares {n_layer} layers; llama.cpp takes at most {MAX_LAYERS}")
        return n_layer

    @property
    def n_head_kv(self) -> tuple[int, ...]:
        """Key-value heads of each layer; as many as query heads where the file does not say."""
        given = self._hparam("attention.head_count_kv") is not None
        return self._by_layer("attention.head_count_kv" if given else "attention.head_count")

    def kv_bytes(self, n_ctx: int, type_k: str = "f16", type_v: str = "f16") -> int:
        """Bytes of key-value cache for `n_ctx` positions, every layer holding all of them.

        An upper bound for sliding-window models. Raises ValueError for a type that does not
        exist or whose blocks do not divide a head.
        """
        # Layers without attention declare no heads; the size comes from one that has some.
        n_head = next((n for n in self._by_layer("attention.head_count") if n), 1)
        n_bytes = 0
        for key, type_name in (("key_length", type_k), ("value_length", type_v)):
            given = self._hparam(f"attention.{key}") is not None
            length = self._size(f"attention.{key}") if given else self.n_embd // n_head
            n_bytes += n_ctx * sum(self.n_head_kv) * row_bytes(length, type_name)
        return n_bytes

    def array(self, key: str) -> list[Any] | None:
        """A metadata array whole: numbers, or strings as bytes; None where the key is absent."""
        found = self.metadata.get(key)
        if not isinstance(found, GGUFArray):
            return found and [v.encode() if isinstance(v, str) else v for v in found]
        form = next(f for name, f in value_types().values() if name == found.value_type)
        with open(self.path, "rb") as file:
            file.seek(found.offset)
            if form is not None:
                raw = file.read(found.length * form.size)
                return [item[0] for item in form.iter_unpack(raw)]
            return [file.read(_U64.unpack(file.read(8))[0]) for _ in range(found.length)]

    def special_id(self, name: str) -> int | None:
        """The id that a file names as its "bos", "eos", "padding", and so on.

        None for an id that no token has: llama.cpp ignores it as well.
        """
        found = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        n_tokens = self.n_items("tokenizer.ggml.tokens")
        return found if type(found) is int and 0 <= found < n_tokens else None

    def n_items(self, key: str) -> int:
        """Length of a metadata array; 0 where the key is absent."""
        found = self.metadata.get(key)
        return found.length if isinstance(found, GGUFArray) else len(found or ())

    def agrees_on(self, key: str, other: GGUFFile) -> bool:
        """Whether two files have the same under a metadata key; long arrays byte for byte."""
        mine, theirs = self.metadata.get(key), other.metadata.get(key)
        if not isinstance(mine, GGUFArray) or not isinstance(theirs, GGUFArray):
            return bool(mine == theirs)
        if (mine.value_type, mine.n_bytes) != (theirs.value_type, theirs.n_bytes):
            return False
        with open(self.path, "rb") as a, open(other.path, "rb") as b:
            a.seek(mine.offset)
            b.seek(theirs.offset)
            return a.read(mine.n_bytes) == b.read(theirs.n_bytes)

    def _hparam(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def _size(self, key: str) -> int:
        value = self._hparam(key)
        if type(value) is not int or value < 0:
            found = "no such key" if value is None else repr(value)[:80]
            _refuse(self.path, f"expected a size in '{self.architecture}.{key}', found {found}")
        return value

    def _by_layer(self, key: str) -> tuple[int, ...]:
        values, n_layer = self._hparam(key), self.n_layer
        if not isinstance(values, list):
            return (self._size(key),) * n_layer
        if len(values) < n_layer or any(type(v) is not int or v < 0 for v in values):
            _refuse(self.path, f"expected {n_layer} sizes in '{self.architecture}.{key}'")
        return tuple(values[:n_layer])


def read_gguf(path: Path) -> GGUFFile:
    """Read and check a GGUF file's header, metadata and tensor table; of a split model, all parts.

    Raises ModelFileError, one line that names the file, where it is not a sound GGUF file.
    """
    first, *others = parts_of(path)
    file = read_header(path)
    _check_part(file, 0, n_parts=len(others) + 1)
    if file.metadata.get("general.type") == "adapter" and others:
        _refuse(path, "is an adapter in several files, which llama.cpp does not read; merge them")
    named = file.metadata.get("general.architecture")
    if not isinstance(named, str) or not named:
        _refuse(path, "has no general.architecture; convert it again")
    if len(named.encode()) > MAX_TENSOR_NAME:  # llama.cpp's settings take keys of 127 bytes
        _refuse(path, f"has the unknown architecture {named[:40]}…; convert it again")
    if not others:
        return file
    rows, n_bytes = {tensor.name: tensor for tensor in file.tensors}, file.file_size
    for i, other in enumerate(others, 1):
        part = read_header(other)
        _check_part(part, i, n_parts=len(others) + 1)
        for tensor in part.tensors:
            if tensor.name in rows:
                _refuse(other, f"tensor {tensor.name!r} is in an earlier part too; split it again")
            rows[tensor.name] = tensor
        n_bytes += part.file_size
    n_tensors = file.metadata.get("split.tensors.count")
    if n_tensors != len(rows):
        found = f"the parts hold {len(rows)} tensors, and the first names {n_tensors!r}"
        _refuse(path, f"{found}; get all parts of one model")
    return replace(file, tensors=tuple(rows.values()), file_size=n_bytes)


def _check_part(file: GGUFFile, index: int, n_parts: int) -> None:
    """Refuse a file that is not this part of a model, by what it says itself."""
    number, count = (file.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
    if index == 0 and number != 0:
        _refuse(file.path, "holds a later part; give the first file of this split model")
    if number != index or (count or 1) != n_parts:
        called = f"{index + 1} of {n_parts}" if n_parts > 1 else "a whole model"
        held = f"number {number!r} from 0 of {count!r}" if count else "a whole model"
        _refuse(
            file.path,
            f"is {called} by its name, and {held} by its content; rename it: "
            "the first of three files is called NAME-00001-of-00003.gguf",
        )


def read_header(path: Path) -> GGUFFile:
    """As read_gguf, for one GGUF file of any kind: it need not be a model."""
    try:
        if path.exists() and not path.is_file():
            _refuse(path, "is a directory; give a file" if path.is_dir() else "is not a file")
        if path.exists() and not path.stat().st_size:
            _refuse(path, "is empty; download it again")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _read(_Cursor(path, data))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        _refuse(path, "no such file" if missing else f"cannot be read: {error.strerror}")


def _read(cursor: _Cursor) -> GGUFFile:
    path, head = cursor.path, cursor.data[:512]
    if not head.startswith(MAGIC) and not MAGIC.startswith(head):
        looks = next((text for form, text in _LOOKS_LIKE if re.match(form, head)), None)
        found = f"it looks like {looks}" if looks else f"it starts with {head[:8]!r}"
        _refuse(path, f"is not a GGUF file: {found}")
    cursor.pos = len(MAGIC)
    version = cursor.number(_U32, "the header")
    if version not in (2, 3):
        swapped = version and version & 0xFFFF == 0
        mend = "it is big-endian, get the little-endian file" if swapped else "convert it again"
        _refuse(path, f"is GGUF version {version:#x}, expected 2 or 3; {mend}")
    n_tensors, n_keys = cursor.number(_U64, "the header"), cursor.number(_U64, "the header")
    # A key takes at least 8 + 4 + 1 bytes, a row of the tensor table 8 + 4 + 4 + 8.
    cursor.need(n_keys * 13 + n_tensors * 24, "the header")
    metadata = _read_metadata(cursor, n_keys)
    tensors = _read_tensors(cursor, n_tensors, metadata.get("general.alignment", 32))
    return GGUFFile(path, version, metadata, tensors, file_size=cursor.size)


class _Cursor:
    """A place in the file; every read is checked against the file's size before it is made."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.pos = path, data, len(data), 0

    def need(self, n_bytes: int, what: str) -> None:
        if self.pos + n_bytes > self.size:
            found = f"expected at least {self.pos + n_bytes} bytes, has {self.size}"
            _refuse(self.path, f"is cut off or damaged in {what}: {found}; download it again")

    def number(self, form: struct.Struct, what: str) -> Any:
        self.need(form.size, what)
        self.pos += form.size
        return form.unpack_from(self.data, self.pos - form.size)[0]

    def string(self, what: str, errors: str = "strict") -> str:
        n_bytes = self.number(_U64, what)
        self.need(n_bytes, what)
        self.pos += n_bytes
        try:
            return self.data[self.pos - n_bytes : self.pos].decode(errors=errors)
        except UnicodeDecodeError:
            _refuse(self.path, f"{what} is not UTF-8, the file is damaged; download it again")

    def value(self, form: struct.Struct | None, what: str) -> Any:
        return self.number(form, what) if form else self.string(what, errors="replace")

    def skip_strings(self, n: int, what: str) -> None:
        # Written out for speed: vocabularies and their merges are 300,000 strings.
        pos, last, data, unpack = self.pos, self.size - 8, self.data, _U64.unpack_from
        for _ in range(n):
            if pos > last:
                self.pos = pos
                self.need(8, what)
            pos += 8 + unpack(data, pos)[0]
        self.pos = pos
        self.need(0, what)


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(n_keys):
        key = cursor.string(f"the name of metadata key {index}")
        what = f"metadata key {key[:80]!r}"
        if key in metadata:
            _refuse(cursor.path, f"{what} is there twice; convert it again")
        name, form = _value_type(cursor, what)
        metadata[key] = _read_array(cursor, what) if name == "ARRAY" else cursor.value(form, what)
        if (expected := wrong_type(key, name, metadata[key])) is not None:
            _refuse(cursor.path, f"{what} is a {name.lower()}; expected {expected}")
    return metadata


def _read_array(cursor: _Cursor, what: str) -> list[Any] | GGUFArray:
    name, form = _value_type(cursor, what)
    if name == "ARRAY":
        _refuse(cursor.path, f"{what} is an array of arrays, which llama.cpp does not read")
    length = cursor.number(_U64, what)
    cursor.need(length * (form or _U64).size, what)
    if length <= MAX_LISTED:
        return [cursor.value(form, what) for _ in range(length)]
    offset = cursor.pos
    if form:
        cursor.pos += length * form.size
    else:
        cursor.skip_strings(length, what)
    return GGUFArray(name, length, offset, cursor.pos - offset)


def _value_type(cursor: _Cursor, what: str) -> tuple[str, struct.Struct | None]:
    value_type = cursor.number(_U32, what)
    if value_type not in value_types():
        _refuse(cursor.path, f"{what} has the unknown value type {value_type}; download it again")
    return value_types()[value_type]


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: Any) -> tuple[TensorInfo, ...]:
    path = cursor.path
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        _refuse(path, f"general.alignment is {repr(alignment)[:80]}; expected a power of two")
    rows: dict[str, TensorInfo] = {}
    end = n_used = 0  # end of the tensors so far, with and without padding
    for index in range(n_tensors):
        tensor = _read_tensor_info(cursor, index)
        what = f"tensor {tensor.name!r}"
        if tensor.name in rows:
            _refuse(path, f"{what} is there twice; convert it again")
        if tensor.offset != end:  # gguf.cpp wants each tensor right after the one before it
            flaw = "overlaps the one before it" if tensor.offset < end else "follows a gap"
            flaw = "is misaligned" if tensor.offset % alignment else flaw
            _refuse(path, f"{what} {flaw}: starts at {tensor.offset}, expected {end}")
        rows[tensor.name] = tensor
        n_used = end + tensor.n_bytes
        end = -(-n_used // alignment) * alignment
    start = cursor.pos = -(-cursor.pos // alignment) * alignment
    if n_used:  # Padding after the last tensor may be absent: nothing reads it.
        cursor.need(n_used, "the weights")
    return tuple(replace(tensor, offset=start + tensor.offset) for tensor in rows.values())


def _read_tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    """One row as it is stored: its offset counts from the start of the weights."""
    name = cursor.string(f"the name of tensor {index}")
    what = f"tensor {name[:80]!r}"
    n_dims = cursor.number(_U32, what)
    if len(name.encode()) > MAX_TENSOR_NAME or n_dims > MAX_DIMS:
        limits = f"{MAX_DIMS} dimensions and a name of {MAX_TENSOR_NAME} bytes"
        _refuse(cursor.path, f"{what} has {n_dims} dimensions; llama.cpp takes at most {limits}")
    shape = tuple(cursor.number(_U64, what) for _ in range(n_dims))
    type_id, offset = cursor.number(_U32, what), cursor.number(_U64, what)
    if type_id not in tensor_types():
        _refuse(cursor.path, f"{what} has the unknown type {type_id}: damaged, or newer than gguf")
    type_name, block, block_bytes = tensor_types()[type_id]
    if type_name in NO_WEIGHTS:
        _refuse(cursor.path, f"{what} is {type_name}, in which no model's weights are")
    if (shape[0] if shape else 1) % block:
        _refuse(cursor.path, f"{what} has shape {shape}; {type_name} wants rows of {block}s")
    return TensorInfo(name, shape, type_name, offset, math.prod(shape) // block * block_bytes)


def _refuse(path: Path, flaw: str) -> NoReturn:
    raise ModelFileError(" ".join(f"{path}: {flaw}".splitlines())) from None
