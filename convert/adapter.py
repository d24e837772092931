"""A PEFT LoRA folder: adapter_config.json and adapter_model.safetensors, read pair by pair."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from trimix_gguf.errors import ConversionError

from .checkpoint import Checkpoint, read_json

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What follows a module's name in the weights -> what it is; NAME is an adapter's, which PEFT leaves
# out of its files and a plain state_dict does not. PEFT's pair for an embedding changes the
# transpose, [n_embd, n_vocab]: its A is our Bᵀ, its B our Aᵀ.
PARTS = {
    r"lora_A(\.NAME)?\.weight": "a",
    r"lora_B(\.NAME)?\.weight": "b",
    r"lora_embedding_B(\.NAME)?": "embedding_a",
    r"lora_embedding_A(\.NAME)?": "embedding_b",
    r"lora_magnitude_vector(\.NAME)?(\.weight)?": "magnitude",
    r"modules_to_save(\.NAME)?\.weight": "whole",
    # The base's own, which PEFT saves with adapted embeddings.
    r"(base_layer|original_module)\.weight": "base",
    r"weight": "whole",
}
_PARTS = [
    (re.compile(rf"(?P<module>.+)\.{form.replace('NAME', '(?P<name>[A-Za-z0-9_-]+)')}"), part)
    for form, part in PARTS.items()
]
_MLX = re.compile(r".+\.lora_[ab]")
MOST_NAME = 300  # characters of a module's name, or of a pattern for some
# Patterns that are read: names, digits, and at most two parts of any length.
_PLAIN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\.|(?:\\d|\[0-9\])\+?)*\$?")
# Settings that change what the tensors mean: understood only where they are unset.
UNSUPPORTED = (
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initial values that leave the base as it is; the others (PiSSA, OLoRA ..) take them out of it.
KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
MERGE_WITH_PEFT = "merge it with PEFT's merge_and_unload(), and convert the result"


@dataclass(frozen=True)
class Pair:
    """One adapted module: W [n_out, n_in] becomes W + alpha / rank · B·A.

    `a` and `b` name the stored tensors; an embedding's are transposed.
    """

    a: str
    b: str
    n_out: int
    n_in: int
    rank: int
    alpha: float
    is_embedding: bool
    magnitude: str | None  # DoRA's, [n_out]


class Adapter:
    """A PEFT folder, listed from its config and header: pairs, and modules replaced as a whole.

    `pairs` and `replaced` are by module of the base; `read_pair(module)` returns A [r, n_in] and
    B [n_out, r], float32. Raises ConversionError for what is not plain LoRA, DoRA or
    modules_to_save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "adapter_config.json")
        self._check_config()
        self.stored = Checkpoint(folder, WEIGHTS)
        # A pair is asked for once a block of rows.
        self.read_pair = lru_cache(maxsize=8)(self._read_pair)
        self.pairs: dict[str, Pair] = {}
        self.replaced: dict[str, str] = {}
        self._check_names()
        modules: dict[str, dict[str, str]] = {}
        for name in self.stored.tensors:
            module, part, _ = self._split(name)
            modules.setdefault(module, {})[part] = name
        for module, parts in modules.items():
            if parts.keys() == {"whole"}:
                self.replaced[module] = parts["whole"]
            elif parts.keys() != {"base"}:
                self.pairs[module] = self._pair(module, parts)
        if not self.pairs and not self.replaced:
            raise ConversionError(f"{folder / WEIGHTS} holds no LoRA pair; train or save it again")

    def check_base(self, base_dir: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ConversionError unless the base has every adapted module, with its shape.

        `shapes` are those of the base's weights, by module.
        """
        adapted = {module: (pair.n_out, pair.n_in) for module, pair in self.pairs.items()}
        stored = {module: self.stored.tensors[name].shape for module, name in self.replaced.items()}
        for module, shape in (adapted | stored).items():
            if shapes.get(module) == shape:
                continue
            came = f"has it as {list(shapes[module])}" if module in shapes else "has no such matrix"
            if module in self.replaced and module in shapes and shapes[module][1:] == shape[1:]:
                self.refuse_other_rows(module, base_dir, shapes[module][0])
            raise ConversionError(
                f"{self.folder} adapts {module} as {list(shape)}, but {base_dir} {came}; give the "
                f"base it was trained on ({self.config.get('base_model_name_or_path')})"
            )

    def refuse_other_rows(self, module: str, base_dir: Path, n_rows: int) -> None:
        """Raise ConversionError where a replaced matrix has not the base's `n_rows`."""
        own = self.stored.tensors[self.replaced[module]].shape[0]
        if own != n_rows:
            raise ConversionError(
                f"{self.folder} has {own} rows in {module} and {base_dir} has {n_rows}: tokens "
                "were added in training; resize the base for the adapter's tokenizer, and "
                f"{MERGE_WITH_PEFT}"
            )

    def _read_pair(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        pair = self.pairs[module]
        a, b = self.stored.read(pair.a), self.stored.read(pair.b)
        return (a.T, b.T) if pair.is_embedding else (a, b)

    def _check_config(self) -> None:
        path = self.folder / "adapter_config.json"
        if self.config.get("peft_type") != "LORA":
            raise _for_peft(
                f"{path} has peft_type {self.config.get('peft_type')!r}, expected 'LORA'"
            )
        if self.config.get("bias", "none") != "none":
            raise _for_peft(f"{path} has bias {self.config['bias']!r}, expected 'none'")
        for key in UNSUPPORTED:
            if self.config.get(key):
                raise _for_peft(
                    f"{path} sets {key} to {self.config[key]!r}, which is not plain LoRA"
                )
        if self.config.get("init_lora_weights") not in KEPT_BASE:
            raise ConversionError(
                f"{path} has init_lora_weights = {self.config['init_lora_weights']!r}, which "
                "changed the base as well; convert it to plain LoRA as PEFT's documentation says "
                "(save_pretrained with path_initial_model_for_weight_conversion)"
            )

    def _check_names(self) -> None:
        """Raise ConversionError where tensors are named as no single adapter of PEFT's is."""
        names = self.stored.tensors
        if any(len(name) > MOST_NAME for name in names):
            raise ConversionError(f"{self.folder / WEIGHTS} has a name of over {MOST_NAME} letters")
        if names and all(_MLX.fullmatch(name) for name in names):
            raise ConversionError(
                f"{self.folder / WEIGHTS} is named as MLX names an adapter (lora_a, lora_b), and "
                "MLX scales it in another way; fuse it with `mlx_lm.fuse --de-quantize`, and "
                "convert the result"
            )
        adapters = {adapter for name in names if (adapter := self._split(name)[2]) is not None}
        if len(adapters) > 1:
            raise ConversionError(
                f"{self.folder / WEIGHTS} holds {len(adapters)} adapters: "
                f"{', '.join(sorted(adapters))}; save one of them"
            )

    def _split(self, name: str) -> tuple[str, str, str | None]:
        """Cut a stored name into the base's module, what the tensor is to it, and the adapter."""
        for form, part in _PARTS:
            if match := form.fullmatch(name.removeprefix(PREFIX)):
                found = match.groupdict().get("name")
                return match["module"], part, found
        raise _for_peft(f"{self.folder / WEIGHTS} holds {name}, which is no part of a LoRA pair")

    def _pair(self, module: str, parts: dict[str, str]) -> Pair:
        is_embedding = "embedding_a" in parts
        needed = ["embedding_a", "embedding_b"] if is_embedding else ["a", "b"]
        needed += ["magnitude"] if self.config.get("use_dora") else []
        if parts.keys() - {"base"} != set(needed):
            raise ConversionError(
                f"{self.folder / WEIGHTS} holds {', '.join(parts.values())}, which is no whole "
                "LoRA pair; save the adapter again"
            )
        a, b = parts[needed[0]], parts[needed[1]]
        shapes = [self.stored.tensors[name].shape for name in (a, b)]
        if any(len(shape) != 2 for shape in shapes):
            raise ConversionError(f"{a} is {list(shapes[0])}, expected a matrix; save it again")
        if is_embedding:
            shapes = [shape[::-1] for shape in shapes]
        (rank, n_in), (n_out, inner) = shapes
        expected = self._setting("rank_pattern", "r", module)
        if not rank == inner == expected:
            raise ConversionError(
                f"the pair for {module} has ranks {rank} and {inner}, but adapter_config.json "
                f"implies {expected:g}; take config and weights from the same training"
            )
        alpha = self._setting("alpha_pattern", "lora_alpha", module)
        if self.config.get("use_rslora"):
            alpha *= math.sqrt(rank)
        return Pair(a, b, n_out, n_in, rank, alpha, is_embedding, parts.get("magnitude"))

    def _setting(self, pattern: str, default: str, module: str) -> float:
        """Return a module's own rank or alpha; a pattern's key is a regex for the name's end."""
        value = self.config.get(default)
        for key, given in (self.config.get(pattern) or {}).items():
            if _matches(key, module):
                value = given
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise ConversionError(
                f"{self.folder}/adapter_config.json gives {module} {default} = {value!r}, "
                "expected a number > 0 and < 10^6; take config and weights from the same training"
            )
        return value


def _for_peft(refused: str) -> ConversionError:
    return ConversionError(f"{refused}; {MERGE_WITH_PEFT}")


def _matches(pattern: str, module: str) -> bool:
    """Tell whether PEFT takes a key of rank_pattern or alpha_pattern to mean `module`.

    A pattern by others could take for ever: only plain ones are read.
    """
    n_open = pattern.count("*") + pattern.count("+")
    if len(pattern) > MOST_NAME or n_open > 2 or not _PLAIN.fullmatch(pattern):
        raise ConversionError(
            f"adapter_config.json has the pattern {pattern[:80]!r}, no regular expression that is "
            "read here: modules by name, \\d+ and .* are; write the modules' names"
        )
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
