"""Mix the next-token logits of three GGUF models: large_ins, small_cpt and small_base."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` tells type checkers that a name is for others
    from trimix_gguf.answering.generation import generate as generate
    from trimix_gguf.answering.generation import stream_generate as stream_generate
    from trimix_gguf.answering.request import Event as Event
    from trimix_gguf.answering.request import Request as Request
    from trimix_gguf.choosing.score import score as score
    from trimix_gguf.choosing.selection import select_weights as select_weights
    from trimix_gguf.errors import TrimixError as TrimixError
    from trimix_gguf.mixing.fusion import Weights as Weights
    from trimix_gguf.mixing.sampler import Sampler as Sampler
    from trimix_gguf.mixing.sampling import Sampling as Sampling
    from trimix_gguf.trio.trio import Trio as Trio

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
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import on first use: `trimix --help` must not load llama.cpp."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
