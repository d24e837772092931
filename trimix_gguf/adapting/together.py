"""Several processes that train one model together, as torchrun and `accelerate launch` start them.

The first one reads, measures, says and writes; the others wait for it, and train beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from trimix_gguf.adapting.extras import need
from trimix_gguf.errors import TrimixError

_PATIENCE = timedelta(days=2)  # the first process reads all text while the others wait


@dataclass(frozen=True)
class Together:
    """This process among `size`; by itself unless join() says otherwise."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join() -> Together:
        """Wait for the processes that were started with this one. Raises TrimixError."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in os.environ:
            return Together()
        on_card = need("torch").cuda.is_available()
        state = need("accelerate").PartialState(cpu=not on_card, timeout=_PATIENCE)
        return Together(state.process_index, state.num_processes)

    def check_begun_by(self, size: int | None, folder: Path) -> None:
        """Raise TrimixError where a run goes on in more or fewer processes than it was begun in.

        Runs of earlier versions do not know their `size`.
        """
        if size not in (None, self.size):
            raise TrimixError(
                f"this run was begun in {size} processes, not {self.size}; start as many, or "
                f"remove {folder} to begin again"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            need("torch").distributed.barrier()

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """A block that the first goes through before the others, who find what it left."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def told(self, value: Any) -> Any:
        """What the first one gives, in all processes."""
        if self.size == 1:
            return value
        held = [value]
        need("torch").distributed.broadcast_object_list(held)
        return held[0]

    def leave(self) -> None:
        """Let the others end, before the first one goes on by itself."""
        if self.size > 1:
            self.wait()
            need("torch").distributed.destroy_process_group()
