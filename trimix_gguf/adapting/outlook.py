"""What adapting will take on this machine, said before it starts: time, memory, disk, and use."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from trimix_gguf.adapting.bases import Base
from trimix_gguf.errors import MemoryNeededError, TrimixError

GIB = 1 << 30
EPOCHS = 3  # times that text is read, where neither tokens nor minutes are given
RANK = 32
FEWEST_ROWS, MOST_ROWS = 2, 64  # of a step
ENOUGH_STEPS = 4000  # more rows make a step only where as many steps are left
MOST_ROWS_AT_ONCE = 2  # whose intermediate results are in memory together
COMFORTABLE = 6 * GIB
STATES = 2  # kept on disk
_PROGRAM = 0.5e9  # bytes of Python with PyTorch
_EFFICIENCY = 0.5  # of what one matrix product reaches, in a training step
_USUAL_PRODUCTS = 1.2e11  # per second, of a laptop's processor
_ENOUGH = (  # tokens from which on -> what to expect
    (20_000_000, "plenty: more text will help less than a larger small model"),
    (3_000_000, "good: fluent sentences; the mix should answer better than without it"),
    (500_000, "fair: the words and their forms; knowledge of the world only from the large model"),
    (100_000, "little: spelling and common words; expect a lower perplexity, few better answers"),
    (0, "too little to teach a language: use it to try the way, and gather 100,000 tokens or more"),
)


@dataclass(frozen=True)
class Way:
    """What of a base is trained, and the bytes of a number in it."""

    dtype_bytes: int
    rank: int = RANK
    full: bool = False
    embeddings: bool = False

    def n_trained(self, base: Base) -> int:
        """Numbers that change: all, or those of a LoRA."""
        if self.full:
            return base.file.n_weights
        outer = ("token_embd.weight", "output.weight") if self.embeddings else ()
        return sum(
            self.rank * sum(t.shape)
            for t in base.file.tensors
            if (t.name.startswith("blk.") and len(t.shape) == 2) or t.name in outer
        )


@dataclass(frozen=True)
class Outlook:
    """About what a run takes: `n_tokens` read in all, seconds, bytes."""

    n_tokens: int
    seconds: float
    memory: float
    disk: float
    free_memory: float
    free_disk: float

    def lines(self) -> list[str]:
        """In words."""
        return [
            f"to learn  {self.n_tokens:,} tokens: about {in_words(self.seconds)} on this machine",
            f"memory    about {self.memory / GIB:.1f} GiB, {self.free_memory / GIB:.1f} free; "
            f"disk about {self.disk / GIB:.1f} GiB, {self.free_disk / GIB:.1f} free",
        ]

    def check(self) -> None:
        """Raise MemoryNeededError or TrimixError where the machine is too small."""
        if self.memory > self.free_memory:
            raise MemoryNeededError(
                f"adapting needs about {self.memory / GIB:.1f} GiB of memory, and "
                f"{self.free_memory / GIB:.1f} are free; close programs, lower --rank, or take a "
                "smaller --base"
            )
        if self.disk > self.free_disk:
            raise TrimixError(
                f"adapting needs about {self.disk / GIB:.1f} GiB of disk, and "
                f"{self.free_disk / GIB:.1f} are free; free some, or set --work to another disk"
            )


def look_ahead(
    base: Base,
    work: Path,
    way: Way,
    *,
    n_tokens: int,
    n_characters: int,
    n_processes: int = 1,
    tokens_per_second: float | None = None,
) -> Outlook:
    """Estimate a run in the folder `work`, of which a part may be done."""
    trained = way.n_trained(base)
    each = rows_per_step(n_tokens, base.n_block, n_processes) // n_processes
    memory = n_processes * memory_needed(base, way, min(each, rows_at_once(base, way)))
    # What the run wrote before is a part of what it needs; a converted base is not.
    held = sum(f.stat().st_size for f in work.rglob("*") if f.is_file() and f.suffix != ".gguf")
    return Outlook(
        n_tokens=n_tokens,
        seconds=n_tokens / (tokens_per_second or guessed_speed(base, way)),
        memory=memory,
        disk=STATES * 12 * trained + 10 * 4 * trained + 5 * n_tokens + 4 * n_characters,
        free_memory=psutil.virtual_memory().available,
        free_disk=shutil.disk_usage(_existing(work)).free + held,
    )


def guessed_speed(base: Base, way: Way, products_per_second: float | None = None) -> float:
    """Tokens per second before any are measured, from what one matrix product reaches."""
    # Forward, and back to the inputs; with all weights also to these. Two for a weight each.
    products = products_per_second or _USUAL_PRODUCTS
    return _EFFICIENCY * products / ((6 if way.full else 4) * n_in_layers(base))


def memory_needed(base: Base, way: Way, n_rows: int) -> float:
    """Bytes of a training step that has `n_rows` rows in memory together."""
    file, n = base.file, base.file.n_weights
    n_ff = int(file.metadata.get(f"{file.architecture}.feed_forward_length", 4 * file.n_embd))
    # Numbers that a token leaves in a layer for the way back, as benchmarks/adapt_memory.py saw.
    per_token = file.n_layer * (20 * file.n_embd + 10 * n_ff)
    kept = n_rows * base.n_block * per_token * (2 if way.dtype_bytes == 2 else 3.2)
    n_occurring = min(8192, file.n_items("tokenizer.ggml.tokens"))
    logits = 3 * 4 * n_rows * base.n_block * n_occurring
    weights = n * (4 if way.full else way.dtype_bytes)
    return _PROGRAM + weights + 16 * way.n_trained(base) + kept + logits


def rows_per_step(n_tokens: int, n_block: int, n_processes: int = 1) -> int:
    """Rows of `n_block` tokens that one step learns from; `n_processes` share them evenly.

    Few, where there is little to read: half way through 65,536 tokens, steps of two rows had
    brought a 0.5B further than steps of four.
    """
    n_rows = n_processes
    while n_rows < FEWEST_ROWS or (
        2 * n_rows <= MOST_ROWS and n_tokens >= ENOUGH_STEPS * 2 * n_rows * n_block
    ):
        n_rows *= 2
    return n_rows


def rows_at_once(base: Base, way: Way) -> int:
    """The most rows, up to MOST_ROWS_AT_ONCE, that a laptop with COMFORTABLE memory takes."""
    return MOST_ROWS_AT_ONCE if memory_needed(base, way, MOST_ROWS_AT_ONCE) <= COMFORTABLE else 1


def n_in_layers(base: Base) -> int:
    """Numbers in the matrices of the layers, which every token is multiplied by."""
    return sum(
        t.shape[0] * t.shape[1]
        for t in base.file.tensors
        if t.name.startswith("blk.") and len(t.shape) == 2
    )


def suffices(n_tokens: int) -> str:
    """What to expect of so many different tokens."""
    return next(text for least, text in _ENOUGH if n_tokens >= least)


def in_words(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds" if round(seconds) != 1 else "1 second"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
