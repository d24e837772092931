"""How a model is trained: steps, rows, and the learning rate of each step."""

import math
from dataclasses import dataclass

from trimix_gguf.adapting.outlook import FEWEST_ROWS, MOST_ROWS_AT_ONCE


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The rate rises for `n_warm_up` steps, then falls by a cosine."""

    n_steps: int
    learning_rate: float
    dtype: str
    seed: int = 0
    n_warm_up: int = 10
    final_share: float = 0.05
    rows_per_step: int = FEWEST_ROWS
    rows_at_once: int = MOST_ROWS_AT_ONCE
    steps_between_looks: int = 20
    save_every_s: float = 300.0
    n_halvings: int = 0  # of the rate, after a loss that was not a number
    n_processes: int = 1

    @property
    def passes_per_step(self) -> int:
        """Forward and backward passes of one process, before the numbers change."""
        return self.rows_per_step // self.rows_at_once // self.n_processes

    def slope(self, step: int) -> float:
        """What the learning rate is multiplied by at a step."""
        angle = math.pi * min(step / max(self.n_steps, 1), 1.0)
        falling = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(angle))
        return 0.5**self.n_halvings * min(1.0, (step + 1) / max(self.n_warm_up, 1)) * falling

    def has_look(self, step: int) -> bool:
        """Whether the model is measured after a step: now and then, and after the last one."""
        return step % self.steps_between_looks == 0 or step >= self.n_steps

    def looks_left(self, step: int) -> int:
        """How many measurements come after that of a step."""
        n_all = -(-self.n_steps // self.steps_between_looks)
        return 0 if step >= self.n_steps else n_all - step // self.steps_between_looks
