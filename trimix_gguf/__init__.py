"""Mix the next-token logits of three GGUF models: large_ins, small_cpt and small_base."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimix_gguf.errors import TrimixError
    from trimix_gguf.fusion import Weights
    from trimix_gguf.generation import generate, stream_generate
    from trimix_gguf.sampling import Sampler
    from trimix_gguf.selection import score, select_weights
    from trimix_gguf.trio import Trio

_HOME = {
    "Sampler": "sampling",
    "TrimixError": "errors",
    "Trio": "trio",
    "Weights": "fusion",
    "generate": "generation",
    "score": "selection",
    "select_weights": "selection",
    "stream_generate": "generation",
}
__all__ = [
    "Sampler",
    "TrimixError",
    "Trio",
    "Weights",
    "generate",
    "score",
    "select_weights",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `trimix --help` must not load llama.cpp."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
