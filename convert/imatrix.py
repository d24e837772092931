"""Importance matrices: for each column of a weight matrix, the sum of its inputs' squares.

In llama.cpp's own GGUF form (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp), so that its
`llama-quantize --imatrix` reads ours, and we read what others made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys
from numpy.typing import NDArray

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.gguf_file import GGUFFile, TensorInfo, read_header

_SUMS, _COUNTS = ".in_sum2", ".counts"
_FLAW = "is no sound importance matrix"
_KEYS = (Keys.IMatrix.DATASETS, Keys.IMatrix.CHUNK_COUNT, Keys.IMatrix.CHUNK_SIZE)


@dataclass(frozen=True)
class Coverage:
    """How much of a model an importance matrix says something about."""

    n_entries: int
    n_matrices: int  # in the layers of the model
    n_missing: int  # of them, without an entry
    n_unreached: int  # experts that no token reached


@dataclass
class ImportanceMatrix:
    """Sums of squared inputs [n_matrices, n_in] and counts of rows [n_matrices], by weight name.

    Most weights are one matrix; experts are a stack of several. `datasets` are names of texts.
    """

    datasets: list[str]
    chunk_size: int
    n_chunks: int = 0
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, name: str, rows: NDArray[np.float32], which: NDArray[np.intp]) -> None:
        """Add rows [n, n_in], each to the matrix of the stack `name` that `which` [n] names."""
        for i in np.unique(which):
            chosen = rows if len(self.counts[name]) == 1 else rows[which == i]
            # float32 is exact enough for the rows of one call, and three times as fast.
            self.sums[name][i] += np.einsum("ti,ti->i", chosen, chosen)
            self.counts[name][i] += len(chosen)

    def means(self) -> dict[str, NDArray[np.float32]]:
        """What the quantizer wants: means of the squares; 1 for an expert that no token reached."""
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        return means

    def coverage(self, file: GGUFFile) -> Coverage:
        """Compare with a model. Raises ConversionError where an entry does not fit in it."""
        tensors = {tensor.name: tensor for tensor in file.tensors}
        for name, sums in self.sums.items():
            if name not in tensors:
                self._refuse_other(file, f"it has no {name}")
            n_in, _, *stack = (*tensors[name].shape, 1)
            if sums.size != n_in * math.prod(stack):
                found = f"{name} has {n_in * math.prod(stack)} columns, and the entry {sums.size}"
                self._refuse_other(file, found)
        matrices = layer_matrices(file)
        return Coverage(
            n_entries=len(self.sums),
            n_matrices=len(matrices),
            n_missing=len(matrices.keys() - self.sums.keys()),
            n_unreached=sum(int((counts == 0).sum()) for counts in self.counts.values()),
        )

    def _refuse_other(self, file: GGUFFile, why: str) -> NoReturn:
        raise ConversionError(
            f"the importance matrix is of another model than {file.path}: {why}; "
            "make one of this model with `trimix convert imatrix`"
        )


def layer_matrices(file: GGUFFile) -> dict[str, tuple[int, int]]:
    """The weight matrices of a model's layers: name -> (matrices in the stack, columns of each).

    Without output and embedding: llama.cpp measures neither, and rounds both without an entry.
    """
    return {
        tensor.name: (math.prod(tensor.shape[2:]), tensor.shape[0])
        for tensor in file.tensors
        if tensor.name.startswith("blk.")
        and tensor.name.endswith(".weight")
        and len(tensor.shape) > 1
    }


def write_imatrix(imatrix: ImportanceMatrix, path: Path) -> None:
    """Write an importance matrix to `path`. Raises ConversionError for infinite sums, OSError."""
    for name, sums in imatrix.sums.items():
        if not np.isfinite(sums).all():
            raise ConversionError(f"the inputs of {name} are not finite: the model is damaged")
    writer = GGUFWriter(None, GGUFType.IMATRIX)
    writer.kv_data[0].pop(Keys.General.ARCHITECTURE)  # llama.cpp's have none
    writer.add_type(GGUFType.IMATRIX)
    writer.add_array(Keys.IMatrix.DATASETS, imatrix.datasets)
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, imatrix.n_chunks)
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, imatrix.chunk_size)
    for name in sorted(imatrix.sums):
        writer.add_tensor(name + _SUMS, imatrix.sums[name].astype(np.float32))
        writer.add_tensor(name + _COUNTS, imatrix.counts[name][:, None].astype(np.float32))
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read and check an importance matrix. Raises ConversionError, ModelFileError."""
    if path.suffix == ".dat":
        raise ConversionError(
            f"{path} is in llama.cpp's older form; `llama-imatrix --in-file {path.name} "
            "-o NEW.gguf` brings it into the present one"
        )
    file = read_header(path)
    found = file.metadata.get("general.type")
    if found != GGUFType.IMATRIX:
        raise ConversionError(
            f"{path} is {f'of type {found!r}' if found else 'a model'}, expected an importance "
            "matrix; make one with `trimix convert imatrix`"
        )
    for key in _KEYS:
        if key not in file.metadata:
            raise ConversionError(f"{path} {_FLAW}: it has no {key}; make it again")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    names = sorted({name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in tensors})
    datasets, n_chunks, chunk_size = (_value(file, key) for key in _KEYS)
    imatrix = ImportanceMatrix(datasets, chunk_size, n_chunks)
    for name in names:
        sums, counts = (_read_tensor(path, tensors, name + end) for end in (_SUMS, _COUNTS))
        if not counts.size or sums.size % counts.size:
            raise ConversionError(
                f"{path} {_FLAW}: {name} has {sums.size} sums and {counts.size} counts"
            )
        imatrix.sums[name] = sums.reshape(counts.size, -1).astype(np.float64)
        imatrix.counts[name] = np.rint(np.minimum(counts, 1e15)).astype(np.int64)
    if not names:
        raise ConversionError(f"{path} {_FLAW}: it has no entries; make it again")
    return imatrix


def _value(file: GGUFFile, key: str) -> Any:
    """A value of the form; the table in gguf_types has checked its type."""
    if key != Keys.IMatrix.DATASETS:
        return file.metadata[key]
    return [name.decode("utf-8", "replace") for name in file.array(key) or ()]


def _read_tensor(path: Path, tensors: Mapping[str, TensorInfo], name: str) -> NDArray[np.float32]:
    """Numbers, none of them negative, [n]. Raises ConversionError."""
    tensor = tensors.get(name)
    if tensor is None or tensor.type != "F32":
        came = "nothing" if tensor is None else tensor.type
        raise ConversionError(f"{path} {_FLAW}: {name} is {came}, expected F32; make it again")
    numbers = np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.offset)
    if not np.isfinite(numbers).all() or (numbers < 0).any():
        raise ConversionError(
            f"{path} {_FLAW}: {name} holds a number that no sum of squares is; make it again"
        )
    return numbers


def quantization_keys(imatrix: ImportanceMatrix, path: Path) -> dict[str, str | int]:
    """What a quantized file says of its importance matrix, under llama.cpp's keys."""
    found: dict[str, str | int] = {
        "file": path.name,
        "dataset": next(iter(imatrix.datasets), ""),
        "entries_count": len(imatrix.sums),
        "chunks_count": imatrix.n_chunks,
    }
    return {f"quantize.imatrix.{key}": value for key, value in found.items() if value}
