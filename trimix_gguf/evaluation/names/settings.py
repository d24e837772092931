"""What a run is told beside the models and the data."""

from dataclasses import dataclass
from typing import TypedDict

# One-sided p of the paired t test below which a race leaves a grid point.
RACE_P = 0.005


class RunSettingsRecord(TypedDict):
    """RunSettings in run.json. A flag that was not given is None, as in runs before it existed."""

    methods: list[str]
    seed: int
    limit: int | None
    n_exemplars: int | None
    chat: bool
    fill_loops: bool | None
    race: bool | None


@dataclass(frozen=True)
class RunSettings:
    """What an answer depends on; the command line fills it in, and it is passed on whole.

    `limit` questions per task are drawn with the `seed`; `n_exemplars` None: the task's number.
    `chat`: large_ins reads its chat template around each prompt. `fill_loops`: answers that only
    repeat themselves are filled up, not decoded. `race`: with free text, the oracle leaves grid
    points that fell behind.
    """

    methods: tuple[str, ...]
    seed: int = 0
    limit: int | None = None
    n_exemplars: int | None = None
    chat: bool = False
    fill_loops: bool = False
    race: bool = False

    def to_json(self) -> RunSettingsRecord:
        """The settings as run.json has them."""
        return {
            "methods": list(self.methods),
            "seed": self.seed,
            "limit": self.limit,
            "n_exemplars": self.n_exemplars,
            "chat": self.chat,
            "fill_loops": self.fill_loops or None,
            "race": self.race or None,
        }
