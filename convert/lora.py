"""PEFT LoRA adapters: to a GGUF adapter, or merged with their base into a whole GGUF.

A pair (A, B) of rank r changes a matrix W to W + scale·B·A, where scale is alpha / r, or
alpha / √r for rank-stabilised LoRA. llama.cpp applies one file-wide alpha over each pair's rank
(src/llama-adapter.h), so what a pair has beyond that goes into its B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import numpy as np
from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, Keys

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.files import ByteProgress
from trimix_gguf.machine.quantization import FLOATS

from .adapter import Adapter
from .architectures import OUTER, read_config, read_sizes
from .checkpoint import Checkpoint
from .hf import HfOptions, convert_hf
from .output import refuse_input, whole_output
from .plan import PlannedTensor, has_own_head
from .writer import QUANTIZATION_VERSION, write_gguf


class MergedCheckpoint(Checkpoint):
    """The base's weights with an adapter's changes made as they are read."""

    def __init__(self, base_dir: Path, adapter: Adapter) -> None:
        super().__init__(base_dir)
        self.adapter = adapter
        self._aliases: dict[str, str] = {}
        self._untie(base_dir)
        shapes = {name.removesuffix(".weight"): t.shape for name, t in self.tensors.items()}
        adapter.check_base(base_dir, shapes)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return one tensor, or some `rows` of it, as float32."""
        module = name.removesuffix(".weight")
        if module in self.adapter.replaced:
            return self.adapter.stored.read(self.adapter.replaced[module], rows)
        weight = super().read(self._aliases.get(name, name), rows)
        if module not in self.adapter.pairs:
            return weight
        pair = self.adapter.pairs[module]
        a, b = self.adapter.read_pair(module)
        merged: np.ndarray = b[rows] @ a
        merged *= pair.alpha / pair.rank
        merged += weight
        if pair.magnitude is not None:
            # DoRA (arXiv 2402.09353): the rows' lengths are trained on their own.
            lengths = np.linalg.norm(merged, axis=1)
            merged *= (self.adapter.stored.read(pair.magnitude, rows) / lengths)[:, None]
        return merged

    def _untie(self, base_dir: Path) -> None:
        """Give a tied head a matrix of its own where the adapter changes but one side of it.

        PEFT leaves the other side as it was, unless it was told to keep the two tied.
        """
        architecture, _ = read_config(base_dir)
        if not _adapted_tied(self.adapter, base_dir) or (
            has_own_head(architecture, Checkpoint(base_dir))
        ):
            return
        for prefix, head in architecture.prefixes.items():
            embedding = f"{prefix}embed_tokens.weight"
            if embedding not in self.tensors:
                continue
            if self.adapter.config.get("ensure_weight_tying"):
                self.adapter.pairs.pop(head, None)
                self.adapter.replaced.pop(head, None)
            else:
                self.own_head = True
                self.tensors[f"{head}.weight"] = self.tensors[embedding]
                self._aliases[f"{head}.weight"] = embedding


class GGUFPairs:
    """The pairs as llama.cpp wants them: `module`.lora_a and `module`.lora_b."""

    own_head = False

    def __init__(self, adapter: Adapter, alpha: float) -> None:
        self.adapter, self.alpha = adapter, alpha
        self.tensors = adapter.stored.tensors

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return one tensor, or some `rows` of it, as float32."""
        module, _, half = name.rpartition(".")
        a, b = self.adapter.read_pair(module)
        if self.adapter.pairs[module].is_embedding:
            a, b = b, a.T  # llama.cpp looks rows of lora_a up: llm_graph_context::build_inp_embd
        if half == "lora_a":
            return a[rows]
        return b[rows] * np.float32(self.adapter.pairs[module].alpha / self.alpha)


def convert_lora(
    adapter_dir: Path,
    base_dir: Path,
    out: Path,
    *,
    type: str = "f16",
    force: bool = False,
    progress: ByteProgress | None = None,
) -> None:
    """Write the PEFT adapter in `adapter_dir` to `out` as a GGUF adapter for llama.cpp.

    Of the base only config.json is read. `type` is f32, f16 or bf16. `progress` gets (tensor
    name, bytes done, bytes in all). Raises ConversionError, where `merge_lora` may still work.
    """
    adapter_dir, base_dir, out = Path(adapter_dir), Path(base_dir), Path(out)
    if type not in FLOATS:  # a rank is seldom a whole number of q8_0 blocks
        raise ConversionError(f"unknown type {type!r}; choose one of {', '.join(FLOATS)}")
    refuse_input(out, adapter_dir, base_dir)
    adapter = Adapter(adapter_dir)
    for module in adapter.replaced:
        if module.endswith(("embed_tokens", "lm_head")):
            adapter.refuse_other_rows(
                module, base_dir, read_sizes(*read_config(base_dir))["n_vocab"]
            )
        raise ConversionError(
            f"{adapter_dir} replaces {module} as a whole (modules_to_save), which a GGUF adapter "
            "cannot do; use merge-lora"
        )
    if adapter.config.get("use_dora"):
        raise ConversionError(
            f"{adapter_dir} is DoRA, which llama.cpp cannot apply; use merge-lora"
        )
    for module in _adapted_tied(adapter, base_dir):
        raise ConversionError(
            f"{adapter_dir} adapts {module}, which {base_dir} shares between input and output; "
            "llama.cpp would apply the pair at both, and ends its process: use merge-lora"
        )
    architecture, _ = read_config(base_dir)
    plan = _plan_pairs(adapter, base_dir, GGMLQuantizationType[type.upper()])
    # The first pair's, which for most adapters is everyone's.
    alpha = next(iter(adapter.pairs.values())).alpha
    n_bytes = sum(tensor.n_bytes for tensor in plan) + 256 * len(plan)
    with whole_output(out, n_bytes=n_bytes, force=force) as path:
        writer = GGUFWriter(None, architecture.gguf)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_name(adapter_dir.resolve().name)
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        write_gguf(writer, path, GGUFPairs(adapter, alpha), plan, progress=progress)


def merge_lora(adapter_dir: Path, base_dir: Path, out: Path, **options: Unpack[HfOptions]) -> None:
    """Write the base in `base_dir` with the adapter merged into it to `out`, as `convert_hf` does.

    `options` are its own too; without a `name` it is the adapter folder's. Beyond what
    `convert_lora` takes, DoRA and modules_to_save can be merged. The sums are float32, rounded
    once, to `type`; a tied head that is no longer like its embedding is stored apart. The
    tokenizer is the base's. Raises ConversionError.
    """
    base_dir = Path(base_dir)
    refuse_input(Path(out), Path(adapter_dir), base_dir)
    merged = MergedCheckpoint(base_dir, Adapter(Path(adapter_dir)))
    options["name"] = options.get("name") or merged.adapter.folder.resolve().name
    convert_hf(base_dir, out, checkpoint=merged, **options)


def _adapted_tied(adapter: Adapter, base_dir: Path) -> list[str]:
    """Return the adapted ones of embedding and head, where the base holds one matrix for both."""
    architecture, config = read_config(base_dir)
    if not config.get("tie_word_embeddings"):
        return []
    modules = {f"{prefix}embed_tokens" for prefix in architecture.prefixes}
    modules |= set(architecture.prefixes.values())
    return sorted(modules & {*adapter.pairs, *adapter.replaced})


def _plan_pairs(
    adapter: Adapter, base_dir: Path, stored_as: GGMLQuantizationType
) -> list[PlannedTensor]:
    """List the tensors of a GGUF adapter, having checked them against the base's config."""
    architecture, config = read_config(base_dir)
    sizes = read_sizes(architecture, config)
    targets: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    head_dims: dict[str, int] = {}

    def add(module: str, target: str, names: tuple[str, ...]) -> None:
        targets[module], shapes[module] = target, tuple(sizes[name] for name in names)

    for prefix, head in architecture.prefixes.items():
        for module, (target, names) in OUTER.items():
            add(f"{prefix}{module}", target, names)
        add(head, "output", ("n_vocab", "n_embd"))
        for i in range(sizes["n_layer"]):
            for module, (target, names) in architecture.layer_modules.items():
                add(f"{prefix}layers.{i}.{module}", f"blk.{i}.{target}", names)
                if module in architecture.permuted:
                    head_dims[f"{prefix}layers.{i}.{module}"] = sizes["head_dim"]

    for module in adapter.pairs:
        if ".experts." in module:
            raise ConversionError(
                f"{adapter.folder} adapts {module}, one expert of several, which a GGUF adapter "
                "cannot do; use merge-lora"
            )
    adapter.check_base(base_dir, shapes)
    plan = []
    for module in (module for module in targets if module in adapter.pairs):
        pair, target = adapter.pairs[module], f"{targets[module]}.weight"
        # llama.cpp's pair for embeddings changes the transpose, as PEFT's does.
        a, b = (pair.rank, pair.n_in), (pair.n_out, pair.rank)
        if pair.is_embedding:
            a, b = b, a[::-1]
        plan += [
            PlannedTensor((f"{module}.lora_a",), f"{target}.lora_a", a, stored_as),
            PlannedTensor(
                (f"{module}.lora_b",), f"{target}.lora_b", b, stored_as, head_dims.get(module, 0)
            ),
        ]
    return plan
