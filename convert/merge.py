"""Merge the parameters of same-size checkpoints: linear, task arithmetic, TIES.

The arithmetic and its words (weight, density, lambda) are mergekit's, and of two papers: Ilharco
et al. 2023, "Editing Models with Task Arithmetic" (arXiv 2212.04089), and Yadav et al. 2023,
"TIES-Merging" (arXiv 2306.01708).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.files import ByteProgress, advancing, put_in_place, temporary_path

from .checkpoint import (
    INDEX,
    STORED_DTYPES,
    WEIGHTS,
    Checkpoint,
    StoredTensor,
    read_json,
    write_safetensors,
)
from .output import check_free_space, refuse_second

METHODS = ("linear", "task-arithmetic", "ties")
# The name that --dtype takes -> safetensors' and torch's.
DTYPES = {"f32": ("F32", "float32"), "f16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}
MAX_SHARD_BYTES = 4_000_000_000
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Two models that differ here can have tensors of the same shapes.
COMPARED_CONFIG = ("architectures", "num_attention_heads")


def average(tensors: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Return Σ wᵢ·tensorᵢ / Σ wᵢ."""
    total = sum(w * tensor for w, tensor in zip(weights, tensors, strict=True))
    return np.asarray(total) / sum(weights)


def add_task_vectors(
    base: np.ndarray, tensors: Iterable[np.ndarray], weights: Sequence[float], lambda_: float
) -> np.ndarray:
    """Return base + λ·Σ wᵢ·(tensorᵢ − base)."""
    change = sum(w * (tensor - base) for w, tensor in zip(weights, tensors, strict=True))
    return base + lambda_ * np.asarray(change)


def ties(
    base: np.ndarray,
    tensors: Iterable[np.ndarray],
    weights: Sequence[float],
    lambda_: float,
    density: float,
) -> np.ndarray:
    """Return base + λ times the disjoint mean of the trimmed differences.

    Trim each difference, elect a sign for each number by the weighted sum (a sum of zero elects
    plus), then average over the models that agree with it, by their weights.
    """
    changes = []
    for weight, tensor in zip(weights, tensors, strict=True):
        change = trim(tensor - base, density)
        change *= weight
        changes.append(change)
    elected = np.asarray(sum(changes)) >= 0
    merged, divisor = np.zeros_like(base), np.zeros_like(base)
    for weight, change in zip(weights, changes, strict=True):
        agrees = np.where(elected, change > 0, change < 0)
        np.add(merged, change, out=merged, where=agrees)
        np.add(divisor, weight, out=divisor, where=agrees)
    divisor[divisor == 0] = 1
    merged *= lambda_
    merged /= divisor
    merged += base
    return merged


def trim(change: np.ndarray, density: float) -> np.ndarray:
    """Return `change` with all but its max(1, int(density·n)) largest magnitudes set to 0.

    Of equal magnitudes at the limit, the first are kept. `change` is altered.
    """
    n_dropped = change.size - max(1, int(density * change.size))
    if n_dropped <= 0:
        return change
    magnitudes = np.abs(change).ravel()
    limit = np.partition(magnitudes, n_dropped)[n_dropped]
    kept = magnitudes > limit
    n_missing = change.size - n_dropped - np.count_nonzero(kept)
    kept[np.flatnonzero(magnitudes == limit)[:n_missing]] = True
    change *= kept.reshape(change.shape)
    return change


def merge_checkpoints(
    folders: Sequence[Path],
    out_dir: Path,
    *,
    method: str,
    base: Path | None = None,
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    density: float = 0.2,
    dtype: str | None = None,
    force: bool = False,
    progress: ByteProgress | None = None,
) -> None:
    """Merge the checkpoints in `folders` into the new checkpoint folder `out_dir`.

    `method` is one of METHODS. task-arithmetic and ties need `base`, the checkpoint that all
    `folders` started from; linear takes none. `weights` has one number a folder, all 1 unless
    given: linear and ties divide by their sum (ties: over the models that agree), task-arithmetic
    does not. `lambda_` scales what task-arithmetic and ties add to the base. `density` is the
    share of each tensor's differences that ties keeps; 0.2 is the paper's (mergekit trims
    nothing unless told).

    Config, tokenizer and the dtype of each tensor come from `base`, or for linear from the first
    folder; `dtype` (f32, f16, bf16) stores all tensors alike. `force` replaces a checkpoint
    folder, but no folder that holds other things. `progress` gets (tensor name, bytes done,
    bytes in all). On failure, Ctrl-C included, nothing is left. Memory: for ties, about one
    float32 tensor a model and six more, of the largest; otherwise five. Raises ConversionError.
    """
    folders, out = [Path(folder) for folder in folders], Path(out_dir).absolute()
    weights = [1.0] * len(folders) if weights is None else list(weights)
    _check_settings(folders, method, base, weights, lambda_, density, dtype)
    reference = Path(base) if base is not None else folders[0]
    if out.resolve() in [folder.resolve() for folder in [reference, *folders]]:
        raise ConversionError(f"{out} is a folder to be read; choose another name")
    models = [Checkpoint(folder) for folder in folders]
    first = Checkpoint(reference)
    for model in models:
        _check_same_kind(model, first)
    tensors = first.tensors
    if dtype is not None:
        tensors = {name: replace(t, dtype=DTYPES[dtype][0]) for name, t in tensors.items()}

    def merged(name: str) -> np.ndarray:
        each = (model.read(name) for model in models)
        if method == "linear":
            return average(each, weights)
        if method == "task-arithmetic":
            return add_task_vectors(first.read(name), each, weights, lambda_)
        return ties(first.read(name), each, weights, lambda_, density)

    extras = [reference / name for name in COPIED if (reference / name).is_file()]
    n_bytes = sum(tensor.n_bytes for tensor in tensors.values())
    n_bytes += sum(extra.stat().st_size for extra in extras) + 1024 * len(tensors)
    with _whole_folder(out, n_bytes=n_bytes, force=force) as partial:
        for extra in extras:
            shutil.copyfile(extra, partial / extra.name)
        if dtype is not None:
            _set_dtype(partial / "config.json", DTYPES[dtype][1])
        _write_shards(partial, tensors, merged, progress)


def _check_settings(
    folders: list[Path],
    method: str,
    base: Path | None,
    weights: list[float],
    lambda_: float,
    density: float,
    dtype: str | None,
) -> None:
    if method not in METHODS:
        raise ConversionError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "linear" and base is not None:
        raise ConversionError("linear averages its models and takes no base; leave the base out")
    if method != "linear" and base is None:
        raise ConversionError(f"{method} needs a base: the checkpoint that the models started from")
    n_models = len(folders) + (base is not None)
    if n_models < 2 or not folders:
        raise ConversionError(f"got {n_models} model to merge, expected at least two")
    if len(weights) != len(folders):
        raise ConversionError(
            f"got {len(weights)} weights for {len(folders)} models; give one a model, base aside"
        )
    if not all(math.isfinite(number) for number in [*weights, lambda_]):
        raise ConversionError(f"weights {weights} and lambda {lambda_} must be finite numbers")
    if method == "linear" and sum(weights) == 0:
        raise ConversionError(f"weights {weights} add up to 0; linear divides by their sum")
    if not 0 < density <= 1:
        raise ConversionError(f"density is {density}, expected more than 0 and at most 1")
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")


def _check_same_kind(model: Checkpoint, first: Checkpoint) -> None:
    """Raise ConversionError at the first difference that makes a sum of the two meaningless."""
    config, expected = (read_json(c.folder / "config.json") for c in (model, first))
    for key in COMPARED_CONFIG:
        if config.get(key) != expected.get(key):
            raise ConversionError(
                f"{model.folder} has {key} = {config.get(key)}, but {first.folder} has "
                f"{expected.get(key)}; merge models of one architecture and size"
            )
    for name in sorted(first.tensors.keys() ^ model.tensors.keys()):
        lacking, having = (model, first) if name in first.tensors else (first, model)
        raise ConversionError(
            f"{lacking.folder} lacks {name}, which {having.folder} has; "
            "merge models of one architecture, saved in the same way"
        )
    for name, tensor in first.tensors.items():
        if model.tensors[name].shape != tensor.shape:
            raise ConversionError(
                f"{name} is {list(model.tensors[name].shape)} in {model.folder}, but "
                f"{list(tensor.shape)} in {first.folder}; merge models of one size"
            )
        if tensor.dtype not in STORED_DTYPES:
            raise ConversionError(
                f"{name} is stored as {tensor.dtype} in {first.folder}, expected one of "
                f"{', '.join(STORED_DTYPES)}; start from the unquantized checkpoint"
            )
    _check_same_tokens(model.folder, first.folder)


def _check_same_tokens(folder: Path, first: Path) -> None:
    if not (first / "tokenizer.json").is_file():
        _check_same_sentencepiece(folder, first)
        return
    tokens, expected = _read_tokens(folder), _read_tokens(first)
    if tokens == expected:
        return
    id_ = min(i for i in tokens | expected if tokens.get(i) != expected.get(i))
    raise ConversionError(
        f"token {id_} is {tokens.get(id_)!r} in {folder}, but {expected.get(id_)!r} in {first}; "
        "merge models of one tokenizer"
    )


def _check_same_sentencepiece(folder: Path, first: Path) -> None:
    paths = [path / "tokenizer.model" for path in (folder, first)]
    if not all(path.is_file() for path in paths) or (
        paths[0].read_bytes() != paths[1].read_bytes()
    ):
        raise ConversionError(
            f"{folder} and {first} have neither the same tokenizer.json nor the same "
            "tokenizer.model; merge models of one tokenizer"
        )


def _read_tokens(folder: Path) -> dict[int, str]:
    """Return the token text of every id in tokenizer.json."""
    tokenizer = read_json(folder / "tokenizer.json")
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # Unigram: [text, score], in the order of the ids
        tokens = {id_: text for id_, (text, _) in enumerate(vocab)}
    else:
        tokens = {id_: text for text, id_ in vocab.items()}
    added = tokenizer.get("added_tokens") or []
    return tokens | {token["id"]: token["content"] for token in added}


def _set_dtype(path: Path, dtype: str) -> None:
    config = read_json(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, dtype)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_shards(
    folder: Path,
    tensors: dict[str, StoredTensor],
    load: Callable[[str], np.ndarray],
    progress: ByteProgress | None,
) -> None:
    """Write the files that save_pretrained would: one, or numbered shards and their index."""
    shards = _split(tensors)
    total = sum(tensor.n_bytes for tensor in tensors.values())
    advance = advancing(progress, total)

    def load_and_tell(name: str) -> np.ndarray:
        data = load(name)
        advance(name, tensors[name].n_bytes)
        return data

    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, tensors, load_and_tell)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, load_and_tell)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: dict[str, StoredTensor]) -> list[dict[str, StoredTensor]]:
    shards: list[dict[str, StoredTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.n_bytes > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.n_bytes
    return shards


@contextmanager
def _whole_folder(out: Path, *, n_bytes: int, force: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, and rename it to `out` once the block is done.

    The counterpart of `whole_output`; an old `out` stays in place until the new one is whole.
    """
    if out.exists() or out.is_symlink():
        if not force:
            raise ConversionError(f"{out} exists; choose another name, or --force to replace it")
        _check_replaceable(out)
    check_free_space(out.parent, n_bytes)
    with temporary_path(out, "part") as partial, temporary_path(out, "old") as old:
        try:
            partial.mkdir()
            refuse_second(out)
            yield partial
            if out.exists():  # a folder cannot be renamed onto one that holds files
                if not force:
                    raise ConversionError(f"{out} has come meanwhile; choose another name")
                put_in_place(out, old)
            put_in_place(partial, out)
        except OSError as error:
            raise ConversionError(f"cannot write {out}: {error.strerror or error}") from error
        finally:
            if old.exists() and not out.exists():
                put_in_place(old, out)


def _check_replaceable(out: Path) -> None:
    """Raise ConversionError unless `out` is a folder of nothing but a checkpoint's files."""
    if out.is_symlink() or not out.is_dir():
        raise ConversionError(f"{out} is not a folder; choose another name")
    for entry in sorted(out.iterdir()):
        weights = entry.name == INDEX or entry.match("model*.safetensors")
        if not entry.is_file() or not (weights or entry.name in COPIED):
            raise ConversionError(
                f"{out} holds {entry.name}, which is no part of a checkpoint; choose another name"
            )
