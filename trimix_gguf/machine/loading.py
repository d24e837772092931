"""How a model is loaded: what llama.cpp calls model parameters and context parameters."""

from dataclasses import dataclass
from typing import TypedDict

from trimix_gguf.machine.quantization import FLOATS

N_CTX = 2048  # positions of a context
N_WINDOW = 64  # most rows of logits held at once: half as many read a prompt a fifth slower
N_BATCH = 128  # tokens read at once where only the last row is wanted
# Devices that workers lend: what llama.cpp calls them, with a number, and their kinds here.
REMOTE, REMOTE_CPU, REMOTE_GPU = "RPC", "remote CPU", "remote GPU"
AUTO = "auto"  # as n_gpu_layers: the planner decides


@dataclass(frozen=True)
class Loading:
    """How one model is loaded.

    `n_threads` 0 means every core that this process may use. `mmap` maps the file, which starts
    faster and shares pages, but counts the weights twice where llama.cpp repacks them. `device`
    is a name from `trimix doctor`; "CPU" leaves every other device unopened. `n_gpu_layers` -1
    is all, "auto" leaves it to the planner. `flash_attn` None chooses what is faster.
    `device` may name several with + between them: each has `split` layers, the first ones first.
    `keep_output` leaves the output layer in RAM, so that no row of logits comes from a worker.
    """

    n_ctx: int = N_CTX
    n_window: int = N_WINDOW
    n_batch: int = N_BATCH
    n_threads: int = 0
    n_gpu_layers: int | str = 0
    device: str | None = None
    split: tuple[int, ...] = ()
    keep_output: bool = False
    type_k: str = "f16"
    type_v: str = "f16"
    mmap: bool = False
    mlock: bool = False
    flash_attn: bool | None = None

    def has_flash_attention(self, *, offloaded: bool) -> bool:
        """Whether the context has flash attention, as far as can be told.

        Not on the CPU, where it takes up to three times as long (benchmarks/attention.py), unless
        a quantized V cache needs it; what is asked for goes first.
        """
        if self.flash_attn is None:
            return offloaded or self.type_v not in FLOATS
        return self.flash_attn


class LoadingOptions(TypedDict, total=False):
    """The fields of Loading that are given, as keyword arguments."""

    n_ctx: int
    n_window: int
    n_batch: int
    n_threads: int
    n_gpu_layers: int | str
    device: str | None
    split: tuple[int, ...]
    keep_output: bool
    type_k: str
    type_v: str
    mmap: bool
    mlock: bool
    flash_attn: bool | None
