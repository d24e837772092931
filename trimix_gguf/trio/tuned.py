"""What `trimix tune` found out about a trio: which mix answers best, and by how much.

It counts for what was measured. Exercises with choices say nothing about free answers.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimix_gguf.errors import WeightsError
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.roles import ROLES, Role

VERSION = 2  # of the exercises and of the rule: a tuning of another version is not used
NOT_MEASURED = "not measured, so they stay close to large_ins"
POINTS = (*ROLES, "mix")  # whose answers a kind of exercise compares


@dataclass(frozen=True)
class Kind:
    """One kind of exercise: how many were asked, and the share answered right by each of POINTS."""

    n: int
    right: Mapping[str, float]

    def to_table(self) -> dict[str, Any]:
        """As a table of trio.toml."""
        return {"n": self.n, **{name: round(share, 4) for name, share in self.right.items()}}


@dataclass(frozen=True)
class Free:
    """What free answers said of the mix that answers best with choices.

    `weights` are its own, or None where it was not better: free answers stay close to large_ins.
    `n` answers were compared; `close` and `mix` are their likeness to the right ones, 0 … 1.
    """

    weights: Weights | None
    verdict: str
    n: int
    close: float
    mix: float

    def to_table(self) -> dict[str, Any]:
        """As a table of trio.toml."""
        figures = {"close": round(self.close, 4), "mix": round(self.mix, 4)}
        return {"weights": _pair(self.weights), "verdict": self.verdict, "n": self.n, **figures}

    @staticmethod
    def from_table(table: Any) -> "Free":
        """From what to_table gave; raises KeyError, TypeError or ValueError for anything else."""
        return Free(
            weights=_weights(table["weights"]),
            verdict=str(table["verdict"]),
            n=int(table["n"]),
            close=float(table["close"]),
            mix=float(table["mix"]),
        )


@dataclass(frozen=True)
class Tuning:
    """The mix that answers questions best, and what that rests on.

    `weights` and `verdict` are for questions with choices; `weights` is None where no model answers
    better than chance: there perplexity decides. `free` is for free answers, None where they were
    not measured. `models` are the SHA-256 of each role's file, of the adapter where small_cpt is
    one: the result holds for these files only. `kinds` has each kind of exercise by name.
    """

    weights: Weights | None
    verdict: str
    models: Mapping[Role, str]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    language: str = ""
    seed: int = 0
    version: int = VERSION
    free: Free | None = None

    def of(self, *, with_choices: bool) -> "Tuning | Free | None":
        """What it says of such questions; None: nothing, so they stay close to large_ins.

        Its `weights` are None where no model answers. There is nothing to lose: perplexity decides.
        """
        if with_choices or self.weights is None:
            return self
        return self.free if self.free is not None and self.free.weights is not None else None

    @property
    def words(self) -> str:
        """What follows from it, for questions with choices and for free answers."""
        if self.weights is None:
            return self.verdict
        free = NOT_MEASURED if self.free is None else self.free.verdict
        return f"with choices: {self.verdict}. Free answers: {free}"

    @property
    def n(self) -> int:
        """Exercises asked."""
        return sum(kind.n for kind in self.kinds.values())

    def to_table(self) -> dict[str, Any]:
        """As the table [tuning] of trio.toml, with a checksum of the rest."""
        table: dict[str, Any] = {
            "version": self.version,
            "weights": _pair(self.weights),
            "verdict": self.verdict,
            "language": self.language,
            "seed": self.seed,
            "models": dict(self.models),
        }
        if self.kinds:  # TOML has no empty table of tables
            table["kinds"] = {name: kind.to_table() for name, kind in self.kinds.items()}
        if self.free is not None:
            table["free"] = self.free.to_table()
        return {**table, "checksum": _checksum(table)}

    @staticmethod
    def from_table(table: Any) -> "Tuning":
        """From what to_table gave. Raises WeightsError where it was edited or is none."""
        edited = WeightsError(
            "it was edited, so it is no measurement any more; run `trimix tune` again, or remove "
            "[tuning] and set weights = [ALPHA, BETA]"
        )
        if not isinstance(table, dict):
            raise edited
        rest = {name: value for name, value in table.items() if name != "checksum"}
        if table.get("checksum") != _checksum(rest):
            raise edited
        try:
            return Tuning(
                weights=_weights(rest["weights"]),
                verdict=str(rest["verdict"]),
                models={role: str(rest["models"][role]) for role in ROLES},
                kinds={
                    name: Kind(int(kind["n"]), {p: float(kind[p]) for p in POINTS})
                    for name, kind in rest.get("kinds", {}).items()
                },
                language=str(rest["language"]),
                seed=int(rest["seed"]),
                version=int(rest["version"]),
                free=Free.from_table(rest["free"]) if "free" in rest else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise edited from None


def _pair(weights: Weights | None) -> list[float]:
    return [] if weights is None else [weights.alpha, weights.beta]


def _weights(pair: Any) -> Weights | None:
    return Weights(*map(float, pair)) if pair else None


def _checksum(table: Mapping[str, Any]) -> str:
    # Numbers as TOML and JSON both read them: 1 and 1.0 are the same to a person who edits.
    text = json.dumps(table, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
