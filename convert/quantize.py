"""Quantize a GGUF file with llama.cpp's own quantizer.

It runs in a child process: llama.cpp cannot be interrupted while it works, and ends its process
on some inputs. Run as a module, this file is that child.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gguf import LlamaFileType

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf

from .output import whole_output

TYPES = {
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
FLOATS = ("F32", "F16", "BF16")
# About the most that a whole file takes: q8_0's blocks, and below it a mix of up to q6_k.
BYTES_PER_WEIGHT = {"q8_0": 34 / 32}
MOST_BELOW_Q8_0 = 0.85
_TENSOR = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- ")


def quantize_gguf(
    source: Path,
    out: Path,
    *,
    type: str,
    requantize: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write `source` to `out` with its matrices as `type`, one of TYPES.

    A source that is quantized already is refused unless `requantize`: it loses twice. `progress`
    gets (tensor name, bytes read, bytes in all). Raises ConversionError, ModelFileError.
    """
    if type not in TYPES:
        raise ConversionError(f"unknown type {type!r}; choose one of {', '.join(TYPES)}")
    file = read_gguf(source)
    if not requantize:
        _refuse_quantized(file)
    n_weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
    head = file.file_size - file.weight_bytes
    n_bytes = int(n_weights * BYTES_PER_WEIGHT.get(type, MOST_BELOW_Q8_0)) + head
    if out.exists() and out.samefile(source):
        raise ConversionError(f"{out} is the file to be read; choose another name")
    with whole_output(out, n_bytes=n_bytes, force=force) as partial:
        _run_child(file, partial, type, requantize, progress)


def _refuse_quantized(file: GGUFFile) -> None:
    found = next((t for t in file.tensors if t.type not in FLOATS), None)
    if found is not None:
        raise ConversionError(
            f"{file.path} is quantized already ({found.name} is {found.type}); "
            "start from f16, bf16 or f32, or --requantize to lose some quality twice"
        )


def _run_child(
    file: GGUFFile,
    out: Path,
    type: str,
    requantize: bool,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    sizes = {tensor.name: tensor.n_bytes for tensor in file.tensors}
    arguments = [str(file.path), str(out), str(int(TYPES[type])), str(int(requantize))]
    # UTF-8 mode: elsewhere than on Linux its stderr would have another encoding.
    command = [sys.executable, "-X", "utf8", "-m", "trimix_gguf.convert.quantize", *arguments]
    n_done, last = 0, "it gave no reason"
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    assert child.stderr is not None
    try:
        for line in child.stderr:
            last = line.strip() or last
            tensor = _TENSOR.match(line)
            if tensor and progress is not None:
                n_done += sizes.get(tensor[1], 0)
                progress(tensor[1], n_done, file.weight_bytes)
    except BaseException:
        child.kill()
        raise
    finally:
        code = child.wait()
        child.stderr.close()
    if code != 0:
        raise ConversionError(f"llama.cpp could not quantize {file.path}: {last}")


def main(source: str, out: str, file_type: str, requantize: str) -> int:
    """The child: llama.cpp's own log goes to stderr, line by line."""
    from trimix_gguf.machine import native

    native.set_verbose(True)
    return native.quantize(source, out, int(file_type), requantize=requantize == "1")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
