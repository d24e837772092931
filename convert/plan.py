"""Every tensor of the output, and the tensors of the checkpoint it is made from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape

from trimix_gguf.errors import ConversionError

from .architectures import OUTER, ROUTER, Architecture
from .checkpoint import TensorSource

Q8_0_BLOCK = 32
BLOCK_SIZE = 200_000  # numbers: as float32 they fit in the cache of a core


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: one tensor of the checkpoint, or the stack of several.

    `head_dim` > 0 means reorder the rows, head by head; `offset` is added to each number.
    """

    sources: tuple[str, ...]
    target: str
    shape: tuple[int, ...]
    stored_as: GGMLQuantizationType
    head_dim: int = 0
    offset: float = 0.0

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of each of its sources."""
        return self.shape[-2:]

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes in the output."""
        return math.prod(quant_shape_to_byte_shape(self.shape, self.stored_as))


def plan_tensors(
    architecture: Architecture,
    config: dict[str, Any],
    sizes: dict[str, int],
    checkpoint: TensorSource,
    stored_as: GGMLQuantizationType,
) -> list[PlannedTensor]:
    """List what to write, having checked that the checkpoint holds just that."""
    flagged = (
        m for flag, ms in architecture.flagged_biases.items() if config.get(flag) for m in ms
    )
    biased = {*architecture.biases, *flagged}
    prefixes = architecture.prefixes
    found = (p for p in prefixes if f"{p}embed_tokens.weight" in checkpoint.tensors)
    prefix = next(found, next(iter(prefixes)))
    tied = bool(config.get("tie_word_embeddings", False)) and not (
        checkpoint.own_head or has_own_head(architecture, checkpoint)
    )
    plan = []

    def add(source: str, target: str, names: tuple[str, ...], permute: bool = False) -> None:
        shape = tuple(sizes[name] for name in names)
        n_sources = sizes["n_expert"] if "{}" in source else 1
        tensor = PlannedTensor(
            sources=tuple(source.format(i) for i in range(n_sources)),
            target=target,
            shape=shape,
            stored_as=_storage(target, shape, stored_as),
            head_dim=sizes["head_dim"] if permute else 0,
            offset=architecture.norm_offset if target.endswith("norm.weight") else 0.0,
        )
        plan.append(tensor)

    for module, (target, names) in OUTER.items():
        add(f"{prefix}{module}.weight", f"{target}.weight", names)
    if not tied:
        add(f"{prefixes[prefix]}.weight", "output.weight", ("n_vocab", "n_embd"))
    for i in range(sizes["n_layer"]):
        for module, (target, names) in architecture.layer_modules.items():
            permute = module in architecture.permuted
            source, target = f"{prefix}layers.{i}.{module}", f"blk.{i}.{target}"
            add(f"{source}.weight", f"{target}.weight", names, permute)
            if module in biased:
                add(f"{source}.bias", f"{target}.bias", names[:1], permute)

    # A tied head may be stored twice.
    ignored = (*architecture.skipped, *((f"{prefixes[prefix]}.weight",) if tied else ()))
    _check_against(checkpoint, plan, ignored)
    return plan


def has_own_head(architecture: Architecture, checkpoint: TensorSource) -> bool:
    """Whether an output head is stored that differs from the embedding.

    Such a head was trained: transformers keeps "tied" in the config of a model whose embedding
    and head were both saved by an adapter. Reads both in blocks of rows, until they differ.
    """
    for prefix, head in architecture.prefixes.items():
        names = f"{prefix}embed_tokens.weight", f"{head}.weight"
        if not all(name in checkpoint.tensors for name in names):
            continue
        embedding, own = (checkpoint.tensors[name].shape for name in names)
        if embedding != own or len(own) != 2:
            return True
        step = max(1, BLOCK_SIZE // max(1, own[1]))
        for start in range(0, own[0], step):
            rows = slice(start, start + step)
            one, other = (checkpoint.read(name, rows) for name in names)
            if not np.array_equal(one, other, equal_nan=True):
                return True
    return False


def _check_against(
    checkpoint: TensorSource, plan: list[PlannedTensor], ignored: tuple[str, ...]
) -> None:
    """Raise ConversionError unless the checkpoint holds what is planned, and nothing else.

    `ignored` are the beginnings of names that may be there as well.
    """
    shapes = {source: tensor.source_shape for tensor in plan for source in tensor.sources}
    for source, expected in shapes.items():
        if source not in checkpoint.tensors:
            raise _other_model(f"config.json implies {source}, which the weights lack; ")
        shape = checkpoint.tensors[source].shape
        if shape != expected:
            raise _other_model(
                f"{source} is {list(shape)}, but config.json implies {list(expected)}; "
            )
    for extra in sorted(set(checkpoint.tensors) - set(shapes)):
        # Rotary frequencies follow from the config.
        if not extra.startswith(ignored) and not extra.endswith("rotary_emb.inv_freq"):
            raise _other_model(
                f"the weights hold {extra}, which config.json does not imply; "
                "merge any adapter, and "
            )


def _other_model(amiss: str) -> ConversionError:
    return ConversionError(f"{amiss}download config and weights of the same model")


def _storage(
    target: str, shape: tuple[int, ...], wanted: GGMLQuantizationType
) -> GGMLQuantizationType:
    """Return the type that llama.cpp's converter gives a tensor."""
    if len(shape) == 1 or f".{ROUTER}." in target:
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and shape[-1] % Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return wanted
