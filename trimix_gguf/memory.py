"""What a trio needs in memory, and whether this machine has it."""

from collections.abc import Mapping
from typing import Any

from trimix_gguf.errors import MemoryNeededError, ModelError
from trimix_gguf.gguf_file import GGUFFile

N_CTX = 2048  # positions of a context, where none are asked for
N_WINDOW = 32  # most rows of logits held at once
N_BATCH = 128  # tokens read at once where only the last row is wanted
_BASE = 120 << 20  # Python, NumPy and llama.cpp's code


def estimate(
    files: Mapping[str, GGUFFile], options: Mapping[str, dict[str, Any]], lora: GGUFFile | None
) -> dict[str, int]:
    """Bytes for 'weights' (each file once), 'kv' caches and 'buffers' of a trio."""
    weights = sum({f.path: f.weight_bytes for f in files.values()}.values())
    kv = buffers = 0
    for role, file in files.items():
        own = options.get(role, {})
        try:
            kv += file.kv_bytes(
                own.get("n_ctx", N_CTX),
                own.get("type_k", "f16"),
                own.get("type_v", "f16"),
            )
        except ValueError as error:
            raise ModelError(f"{file.path.name}: {error}") from None
        n_vocab = len(file.array("tokenizer.ggml.tokens") or ())
        # llama.cpp's logits, and the same again while its graph computes them.
        buffers += 2 * 4 * n_vocab * own.get("n_window", N_WINDOW)
    return {
        "weights": weights + (lora.weight_bytes if lora else 0),
        "kv": kv,
        "buffers": buffers + _BASE,
    }


def available() -> int:
    """Bytes of memory that this machine can still give."""
    import psutil

    return int(psutil.virtual_memory().available)


def check_fits(
    files: Mapping[str, GGUFFile], options: Mapping[str, dict[str, Any]], lora: GGUFFile | None
) -> None:
    """Raise MemoryNeededError, saying how much is needed and what to turn down."""
    if any(own.get("n_gpu_layers") for own in options.values()):
        return  # part of it goes to a device; llama.cpp says what does not fit there
    need, have = estimate(files, options, lora), available()
    if sum(need.values()) > have:
        parts = ", ".join(f"{name} {in_gib(n)}" for name, n in need.items())
        mend = (
            "--n-ctx or the KV-cache type" if need["kv"] > need["weights"] / 4 else "quantization"
        )
        raise MemoryNeededError(
            f"this trio needs {in_gib(sum(need.values()))} ({parts}) and {in_gib(have)} is free; "
            f"turn down {mend}"
        )


def in_gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"
