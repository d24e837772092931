"""What `trimix tune` found out about a trio: which mix answers best, and by how much."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimix_gguf.errors import WeightsError
from trimix_gguf.mixing.fusion import Weights
from trimix_gguf.roles import ROLES, Role

VERSION = 1  # of the exercises and of the rule: a tuning of another version is not used
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
class Tuning:
    """The mix that answers questions best, and what that rests on.

    `weights` is None where no model answers better than chance: there perplexity decides.
    `models` are the SHA-256 of each role's file, of the adapter where small_cpt is one: the
    result holds for these files only. `kinds` has each kind of exercise by name.
    """

    weights: Weights | None
    verdict: str
    models: Mapping[Role, str]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    language: str = ""
    seed: int = 0
    version: int = VERSION

    @property
    def n(self) -> int:
        """Exercises asked."""
        return sum(kind.n for kind in self.kinds.values())

    def to_table(self) -> dict[str, Any]:
        """As the table [tuning] of trio.toml, with a checksum of the rest."""
        w = self.weights
        table: dict[str, Any] = {
            "version": self.version,
            "weights": [] if w is None else [w.alpha, w.beta],
            "verdict": self.verdict,
            "language": self.language,
            "seed": self.seed,
            "models": dict(self.models),
        }
        if self.kinds:  # TOML has no empty table of tables
            table["kinds"] = {name: kind.to_table() for name, kind in self.kinds.items()}
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
                weights=Weights(*map(float, rest["weights"])) if rest["weights"] else None,
                verdict=str(rest["verdict"]),
                models={role: str(rest["models"][role]) for role in ROLES},
                kinds={
                    name: Kind(int(kind["n"]), {p: float(kind[p]) for p in POINTS})
                    for name, kind in rest.get("kinds", {}).items()
                },
                language=str(rest["language"]),
                seed=int(rest["seed"]),
                version=int(rest["version"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise edited from None


def _checksum(table: Mapping[str, Any]) -> str:
    # Numbers as TOML and JSON both read them: 1 and 1.0 are the same to a person who edits.
    text = json.dumps(table, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
