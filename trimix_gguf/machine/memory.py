"""What a trio needs in memory, layer by layer, and whether this machine has it."""

import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trimix_gguf.errors import MemoryNeededError, ModelError
from trimix_gguf.machine import container
from trimix_gguf.machine.gguf_file import GGUFFile, TensorInfo
from trimix_gguf.machine.loading import Loading
from trimix_gguf.machine.quantization import WEIGHT_TYPES
from trimix_gguf.roles import ROLES, Role

CTX_STEP = 256  # llama.cpp rounds a context up to a multiple of it
# Python, NumPy, llama.cpp's code and what scoring works with: about 50 MiB in four trios.
_BASE = 52 << 20
# Bytes of llama.cpp's tokenizer per token and per merge, fitted to those trios too.
_TOKEN, _MERGE = 240, 270
# Types that llama.cpp's CPU code rearranges for products, by ggml-cpu/repack.cpp: on ARM more.
_REPACKED = {"Q2_K", "Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
_REPACKED_ON_ARM = {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"}
_RANK = 64  # of an adapter that is not there yet
_INPUTS = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")


@dataclass(frozen=True)
class Need:
    """Bytes, by what they are for."""

    weights: int = 0
    kv: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.buffers

    def __add__(self, other: "Need") -> "Need":
        return Need(self.weights + other.weights, self.kv + other.kv, self.buffers + other.buffers)


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of one model and its context; repeating layers from first to last.

    Of n layers on a device the output layer is the first, then come the last ones: so llama.cpp
    counts. `embedding` stays in RAM. Where the file has no output table, the output layer reads
    the embedding's: a device needs a copy of those `tied` bytes, and the CPU one of `tied_ram`
    where it rearranges them.
    """

    embedding: int
    layers: tuple[int, ...]
    output: int
    kv: tuple[int, ...]
    rows: int  # logits as they are handed over
    compute: int  # work space of a step: wherever layers are, and in RAM at most as much
    compute_cpu: int  # of a step where no layer is on a device
    tied: int = 0
    tied_ram: int = 0
    keeps_output: bool = False  # in RAM, though it counts as a layer: see Loading

    @property
    def n_layers(self) -> int:
        """As llama.cpp counts them: with the output layer."""
        return len(self.layers) + 1

    def on_device(self, n: int) -> Need:
        """What `n` of the layers need where they are."""
        return self.part(self.n_layers - n, self.n_layers)

    def part(self, first: int, end: int) -> Need:
        """What the layers from `first` to before `end` need on one device."""
        if first == end:
            return Need()
        weights = sum(self.layers[first:end])
        if end == self.n_layers and not self.keeps_output:
            weights += self.output + self.tied
        return Need(weights, sum(self.kv[first:end]), self.compute)

    def in_ram(self, n: int) -> Need:
        """What stays in RAM where `n` of the layers are on a device."""
        first = self.n_layers - n if n else len(self.layers)
        output = 0 if n and not self.keeps_output else self.output + self.tied_ram
        weights = self.embedding + output + sum(self.layers[:first])
        compute = self.compute if n else self.compute_cpu
        return Need(weights, sum(self.kv[:first]), self.rows + compute)


@dataclass(frozen=True)
class Models:
    """The models of a trio, and how they are to be loaded."""

    files: Mapping[Role, GGUFFile]
    loadings: Mapping[Role, Loading]
    lora: GGUFFile | None = None
    present: frozenset[Path] = frozenset()  # files whose weights another trio has loaded


def by_role(models: Models) -> dict[Role, ModelMemory]:
    """Each role's bytes; weights that roles share are the first one's, an adapter small_cpt's.

    The weights of files that are `present`, for another trio, count nothing.
    """
    memories, seen, lora = {}, set(models.present), models.lora
    for role in sorted(models.files, key=ROLES.index):
        file = models.files[role]
        found = _model_memory(file, models.loadings.get(role, Loading()))
        if file.path in seen:
            none = (0,) * len(found.layers)
            found = replace(found, embedding=0, layers=none, output=0, tied=0, tied_ram=0)
        seen.add(file.path)
        if role == "small_cpt" and lora is not None:
            embedding, layers, output = _weights(lora.tensors, len(found.layers))
            found = replace(
                found,
                embedding=found.embedding + embedding,
                layers=tuple(a + b for a, b in zip(found.layers, layers, strict=True)),
                output=found.output + output,
            )
        memories[role] = found
    return memories


def program(models: Models) -> int:
    """Bytes of the process beside its models: code, and large_ins' tokenizer.

    Nothing where another trio has brought both: its large_ins is `present`.
    """
    large_ins = models.files[ROLES[0]]
    if large_ins.path in models.present:
        return 0
    n_tokens = large_ins.n_items("tokenizer.ggml.tokens")
    n_merges = large_ins.n_items("tokenizer.ggml.merges")
    return _BASE + _TOKEN * n_tokens + _MERGE * n_merges


def estimate(models: Models) -> dict[str, int]:
    """Bytes for 'weights' (each file once), 'kv' caches and 'buffers' of a trio on the CPU."""
    needs = [m.in_ram(0) for m in by_role(models).values()]
    need = sum(needs, Need(buffers=program(models)))
    return {"weights": need.weights, "kv": need.kv, "buffers": need.buffers}


def available() -> int:
    """Bytes of memory that this machine, or the container, can still give."""
    import psutil

    left = container.memory_left()
    free = int(psutil.virtual_memory().available)
    return free if left is None else min(free, left)


def total() -> int:
    """Bytes of memory that this machine has, or leaves to the container."""
    import psutil

    limit = container.memory_limit()
    has = int(psutil.virtual_memory().total)
    return has if limit is None else min(has, limit)


def address_limit() -> int | None:
    """Bytes of address space that a process may have (ulimit -v); None where any number."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def peak_rss() -> int:
    """Bytes that this process had resident at most."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    # Not ru_maxrss on Linux: a process inherits its parent's.
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_fits(models: Models) -> None:
    """Raise MemoryNeededError, saying how much is needed and what to turn down."""
    if any(loading.n_gpu_layers for loading in models.loadings.values()):
        return  # part of it goes to a device; llama.cpp says what does not fit there
    need, have = estimate(models), available()
    if sum(need.values()) > have:
        parts = ", ".join(f"{name} {in_gib(n)}" for name, n in need.items())
        mend = (
            "--n-ctx or the KV-cache type" if need["kv"] > need["weights"] / 4 else "quantization"
        )
        raise MemoryNeededError(
            f"this trio needs {in_gib(sum(need.values()))} ({parts}) and {in_gib(have)} is free; "
            f"turn down {mend}"
        )


def check_fits_beside(file: GGUFFile, loading: Loading) -> None:
    """Raise MemoryNeededError where one more model does not fit beside what is open."""
    if loading.n_gpu_layers:
        return
    need, have = _model_memory(file, loading).in_ram(0).total, available()
    if need > have:
        raise MemoryNeededError(
            f"{file.path.name} needs {in_gib(need)} beside the trio and {in_gib(have)} is free; "
            "turn down --n-ctx or quantization"
        )


def in_gib(n_bytes: int) -> str:
    """'1.50 GiB'."""
    return f"{n_bytes / (1 << 30):.2f} GiB"


# -- one model --------------------------------------------------------------------------------


def _model_memory(file: GGUFFile, loading: Loading) -> ModelMemory:
    n_ctx = -(-loading.n_ctx // CTX_STEP) * CTX_STEP
    n_batch = max(loading.n_batch, loading.n_window)
    embedding, layers, output = _weights(file.tensors, file.n_layer)
    try:
        kv = file.kv_bytes(n_ctx, loading.type_k, loading.type_v)
    except ValueError as error:
        raise ModelError(f"{file.path.name}: {error}") from None
    n_heads = max(sum(file.n_head_kv), 1)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    table = tensors.get("token_embd.weight")
    tied = table.n_bytes if table is not None and "output.weight" not in tensors else 0
    repacked = _REPACKED_ON_ARM if platform.machine().lower() in ("arm64", "aarch64") else _REPACKED
    rows = 4 * file.n_items("tokenizer.ggml.tokens") * loading.n_window

    def compute(offloaded: bool) -> int:
        flash = loading.has_flash_attention(offloaded=offloaded)
        output = rows + 16 * n_batch * file.n_embd
        return max(output, n_batch * _token_bytes(file, n_ctx, flash))

    return ModelMemory(
        embedding=embedding,
        layers=layers,
        output=output,
        kv=tuple(kv // n_heads * n for n in file.n_head_kv),
        rows=rows,
        compute=compute(offloaded=True),
        compute_cpu=compute(offloaded=False),
        tied=tied,
        tied_ram=tied if table is not None and table.type in repacked else 0,
    )


def _token_bytes(file: GGUFFile, n_ctx: int, flash: bool) -> int:
    """Work space per token in the feed-forward layer and the attention.

    As llama.cpp laid out five models' graphs, to 1 %; without flash attention every head's row
    of attention is there at once. A sliding-window model has two masks.
    """
    feed_forward = max(
        _most(file, "feed_forward_length"),
        _most(file, "expert_feed_forward_length") * _most(file, "expert_used_count"),
    )
    masks = 2 if _most(file, "attention.sliding_window") else 1
    if flash:
        attention = 2 * n_ctx * masks
    else:
        attention = 4 * n_ctx * (_most(file, "attention.head_count") + masks)
    return 4 * (3 * feed_forward + 4 * file.n_embd) + attention


def _weights(tensors: Iterable[TensorInfo], n_layer: int) -> tuple[int, tuple[int, ...], int]:
    """Bytes of input tables, of each repeating layer, and of all else: the output layer."""
    embedding = output = 0
    layers = [0] * n_layer
    for tensor in tensors:
        first, _, rest = tensor.name.partition(".")
        number = rest.partition(".")[0]
        if first == "blk" and number.isdecimal() and int(number) < n_layer:
            layers[int(number)] += tensor.n_bytes
        elif first in _INPUTS:
            embedding += tensor.n_bytes
        else:
            output += tensor.n_bytes
    return embedding, tuple(layers), output


def _most(file: GGUFFile, key: str) -> int:
    """A size that may differ by layer: the largest; 0 where the file has none."""
    found = file.metadata.get(f"{file.architecture}.{key}")
    sizes = found if isinstance(found, list) else [found]
    return max((size for size in sizes if type(size) is int), default=0)


# -- other forms of a model --------------------------------------------------------------------


def as_quantized(file: GGUFFile, name: str) -> GGUFFile:
    """About what `trimix convert quantize --type name` would make of a file.

    The output table, or the one that stands for it, is kept in q6_k or better.
    """
    tied = all(tensor.name != "output.weight" for tensor in file.tensors)
    table = "token_embd.weight" if tied else "output.weight"

    def smaller(tensor: TensorInfo) -> TensorInfo:
        if len(tensor.shape) < 2:
            return tensor
        kind = "q6_k" if tensor.name == table and name != "q8_0" else name
        n_bits = WEIGHT_TYPES[kind].bits[tensor.shape[0] % 256 != 0]
        return replace(tensor, n_bytes=int(math.prod(tensor.shape) * n_bits / 8))

    stem = re.sub(r"[-._]?(i?q\d\w*|b?f\d\d)$", "", file.path.stem, flags=re.IGNORECASE)
    return replace(
        file,
        path=file.path.with_name(f"{stem}-{name}.gguf"),
        tensors=tuple(smaller(tensor) for tensor in file.tensors),
    )


def adapter_of(file: GGUFFile) -> GGUFFile:
    """About what a LoRA adapter of rank 64 over every layer of `file` is, in F16."""
    pairs = [
        replace(t, name=f"{t.name}.lora_ab", n_bytes=2 * _RANK * sum(t.shape[:2]))
        for t in file.tensors
        if t.name.startswith("blk.") and len(t.shape) == 2
    ]
    return replace(file, tensors=tuple(pairs))
