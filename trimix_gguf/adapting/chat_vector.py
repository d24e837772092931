"""The chat vector: what an instruct model has over its base, added to a taught model.

Huang et al., "Chat Vector" (ACL 2024): weights + (instruct − base), tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimix_gguf.adapting.bases import Base, given_base, load_base
from trimix_gguf.adapting.extras import need
from trimix_gguf.errors import ConversionError


def find_instruct(given: Path, base: Base, work: Path) -> Base:
    """The instruct model: a GGUF, or a folder, which is converted to know its tensors.

    Raises ConversionError where its tensors are not shaped like the base's.
    """
    instruct = given_base(given, work / "instruct.gguf")
    shapes, others = _shapes(base), _shapes(instruct)
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            raise ConversionError(
                f"--instruct {given} is no instruct model of {base.gguf.name}: {name} is "
                f"{_shown(others.get(name))}, in the base {_shown(shapes.get(name))}"
            )
    return instruct


def add_chat_vector(taught: Any, instruct: Base, base: Base, say: Callable[[str], None]) -> None:
    """Add (instruct − base) to a transformers model in float32, in place; one of them at a time."""
    torch = need("torch")
    with torch.no_grad():
        for sign, model in ((1.0, instruct), (-1.0, base)):
            say(f"chat vector: {'+' if sign > 0 else '−'} {(model.folder or model.gguf).name}")
            # Each name: a head of its own here may be that model's embeddings.
            named = load_base(model, "float32").named_parameters(remove_duplicate=False)
            numbers = dict(named)
            for name, weights in taught.named_parameters():
                weights.add_(numbers[name], alpha=sign)


def _shapes(model: Base) -> dict[str, tuple[int, ...]]:
    # A head that is stored though it is tied says nothing new; a scale of RoPE is no weight.
    left_out = ("output.weight", "rope_freqs.weight")
    return {t.name: tuple(t.shape) for t in model.file.tensors if t.name not in left_out}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " × ".join(map(str, shape))
