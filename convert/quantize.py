"""Quantize a GGUF file with llama.cpp's own quantizer.

It runs in a child process: llama.cpp cannot be interrupted while it works, and ends its process
on some inputs. Run as a module, this file is that child.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.files import ByteProgress, advancing
from trimix_gguf.machine.gguf_file import GGUFFile, read_gguf
from trimix_gguf.machine.quantization import CALIBRATED, FLOATS, QUANTIZED, WEIGHT_TYPES

from .imatrix import Coverage, quantization_keys, read_imatrix
from .output import refuse_input, whole_output

MOST_BELOW_Q8_0 = 0.85  # bytes per weight of a whole file, about: a mix of types up to q6_k
_TENSOR = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- ")


def quantize_gguf(
    source: Path,
    out: Path,
    *,
    type: str,
    requantize: bool = False,
    imatrix: Path | None = None,
    force: bool = False,
    progress: ByteProgress | None = None,
) -> Coverage | None:
    """Write `source` to `out` with its matrices as `type`, one of QUANTIZED or CALIBRATED.

    A source that is quantized already is refused unless `requantize`: it loses twice. `imatrix`
    is an importance matrix of the same model, which CALIBRATED types need; returns how much of the
    model it covers. `progress` gets (tensor name, bytes read, bytes in all). Raises
    ConversionError, ModelFileError.
    """
    _check_type(type, imatrix)
    file = read_gguf(source)
    if not requantize:
        _refuse_quantized(file)
    coverage = None if imatrix is None else read_imatrix(imatrix).coverage(file)
    head = file.file_size - file.weight_bytes
    per_weight = WEIGHT_TYPES[type].bits[0] / 8 if type == "q8_0" else MOST_BELOW_Q8_0
    n_bytes = int(file.n_weights * per_weight) + head
    refuse_input(out, source, *([] if imatrix is None else [imatrix]))
    file_type = CALIBRATED[type] if type in CALIBRATED else WEIGHT_TYPES[type].file_type
    with whole_output(out, n_bytes=n_bytes, force=force) as partial:
        arguments = [str(file.path), str(partial), str(file_type), str(int(requantize))]
        arguments += [] if imatrix is None else [str(imatrix)]
        _run_child(file, arguments, progress)
    return coverage


def _check_type(type: str, imatrix: Path | None) -> None:
    """Raise ConversionError for an unknown type, or one that does not go with `imatrix`."""
    if type not in (*QUANTIZED, *CALIBRATED):
        known = ", ".join((*QUANTIZED, *CALIBRATED))
        raise ConversionError(f"unknown type {type!r}; choose one of {known}")
    if type in CALIBRATED and imatrix is None:
        raise ConversionError(
            f"{type} needs an importance matrix: make one with `trimix convert imatrix`, and give "
            "it as --imatrix"
        )
    if type == "q8_0" and imatrix is not None:
        raise ConversionError("q8_0 makes no use of an importance matrix; leave it out")


def _refuse_quantized(file: GGUFFile) -> None:
    found = next((t for t in file.tensors if t.type.lower() not in FLOATS), None)
    if found is not None:
        raise ConversionError(
            f"{file.path} is quantized already ({found.name} is {found.type}); "
            "start from f16, bf16 or f32, or --requantize to lose some quality twice"
        )


def _run_child(file: GGUFFile, arguments: list[str], progress: ByteProgress | None) -> None:
    """Have main() quantize `file`; raises ConversionError where that fails."""
    sizes = {tensor.name: tensor.n_bytes for tensor in file.tensors}
    # UTF-8 mode: elsewhere than on Linux its stderr would have another encoding.
    command = [sys.executable, "-X", "utf8", "-m", "trimix_gguf.convert.quantize", *arguments]
    advance, last = advancing(progress, file.weight_bytes), "it gave no reason"
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
            if tensor:
                advance(tensor[1], sizes.get(tensor[1], 0))
    except BaseException:
        child.kill()
        raise
    finally:
        code = child.wait()
        child.stderr.close()
    if code != 0:
        raise ConversionError(f"llama.cpp could not quantize {file.path}: {last}")


def main(source: str, out: str, file_type: str, requantize: str, imatrix: str = "") -> int:
    """The child: llama.cpp's own log goes to stderr, line by line."""
    from trimix_gguf.machine import native

    means, keys = {}, {}
    if imatrix:
        read = read_imatrix(Path(imatrix))
        means, keys = read.means(), quantization_keys(read, Path(imatrix))
    native.set_verbose(True)
    again = requantize == "1"
    return native.quantize(source, out, int(file_type), requantize=again, imatrix=means, keys=keys)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
