"""Mix the next-token logits of three GGUF models: large_ins, small_cpt and small_base."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimix_gguf.answering.generation import generate, stream_generate
    from trimix_gguf.answering.request import Event, Request
    from trimix_gguf.choosing.score import score
    from trimix_gguf.choosing.selection import select_weights
    from trimix_gguf.errors import TrimixError
    from trimix_gguf.mixing.fusion import Weights
    from trimix_gguf.mixing.sampler import Sampler
    from trimix_gguf.mixing.sampling import Sampling
    from trimix_gguf.trio.trio import Trio

_HOME = {
    "Event": "answering.request",
    "Request": "answering.request",
    "Sampler": "mixing.sampler",
    "Sampling": "mixing.sampling",
    "TrimixError": "errors",
    "Trio": "trio.trio",
    "Weights": "mixing.fusion",
    "generate": "answering.generation",
    "score": "choosing.score",
    "select_weights": "choosing.selection",
    "stream_generate": "answering.generation",
}
__all__ = [
    "Event",
    "Request",
    "Sampler",
    "Sampling",
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
