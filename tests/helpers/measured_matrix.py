"""An importance matrix of nano's small_cpt, and changed copies of its file."""

import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from trimix_gguf.convert.imatrix import (
    read_imatrix,
    write_imatrix,
)
from trimix_gguf.machine.gguf_file import read_gguf
from trimix_gguf.trio.trio import NANO

TEXT = NANO / "text.txt"
N_TOKENS, N_CTX = 1000, 128
N_READ = N_TOKENS // N_CTX * N_CTX
MODEL = NANO / "small_cpt.gguf"
N_MATRICES = 7 * read_gguf(MODEL).n_layer


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The importance matrix of nano's small_cpt, made by the command."""
    out = tmp_path_factory.mktemp("measured") / "kk.imatrix.gguf"
    options = ["--tokens", str(N_TOKENS), "--ctx", str(N_CTX)]
    command = [*CONVERT, "imatrix", str(MODEL), str(TEXT), "-o", str(out), *options]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode().strip() == str(out)
    assert f"Tokens: {N_READ}/{N_READ}" in done.stderr.decode()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out


CONVERT = [sys.executable, "-m", "trimix_gguf.cli", "convert"]


def changed(measured, path, change):
    """`measured` with a change made to it, as another file."""
    imatrix = read_imatrix(measured)
    change(imatrix)
    write_imatrix(imatrix, path)
    return path


def contents(path):
    """A file's keys, and its tensors as they are stored."""
    reader = GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def write(path, keys, tensors):
    """A GGUF of these, whatever comes of it."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    kinds = {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}
    for key, value in keys.items():
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewritten(measured, path, change):
    """`measured` with `change` made to its keys and tensors."""
    keys, tensors = contents(measured)
    change(keys, tensors)
    return write(path, keys, tensors)


def wide_model(path):
    """A layer of random float32 with rows of 256, the blocks of the smallest types."""
    keys, _ = contents(MODEL)
    sizes = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 1}
    keys |= {f"llama.{key}": n for key, n in sizes.items()} | {"general.file_type": 0}
    n_heads = 256 // keys["llama.rope.dimension_count"]
    keys["llama.attention.head_count"] = keys["llama.attention.head_count_kv"] = n_heads
    shapes = {
        t.name: tuple(256 if n != 6144 else n for n in t.shape) for t in read_gguf(MODEL).tensors
    }
    rng = np.random.default_rng(0)
    tensors = {
        name: (np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.1, shape[::-1])).astype("f4")
        for name, shape in shapes.items()
        if not name.startswith("blk.") or name.startswith("blk.0.")
    }
    return write(path, keys, tensors)
