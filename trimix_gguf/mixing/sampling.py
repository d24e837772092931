"""How tokens are picked: the settings of llama.cpp's sampler chain, their defaults and limits."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from trimix_gguf.errors import SamplerError

N_SEEDS = 2**32 - 1  # seeds are below it; llama.cpp takes this number itself for a random one


@dataclass(frozen=True)
class Sampling:
    """Settings of the chain; the defaults are llama.cpp's.

    `temperature` 0 is greedy; penalties, DRY, biases and a grammar still apply. Mirostat (1 or 2)
    replaces the cut-offs (top-k, top-p, min-p, XTC). `grammar` is GBNF, `json_schema` a schema as
    text or dict; give at most one of the two. `logit_bias` is id -> added logit; -inf rules it out.
    Without a `seed`, one is drawn. `penalty_last_n` and `dry_last_n` -1 are as many tokens as can
    be. Raises SamplerError where a setting is out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = 1024
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    grammar: str | None = None
    json_schema: str | Mapping[str, object] | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise SamplerError(f"{name} is {value}; expected {low:g} to {high:g}")
        if self.seed is not None and not 0 <= self.seed < N_SEEDS:  # llama.cpp keeps 32 bits of it
            raise SamplerError(f"seed is {self.seed}; expected 0 to {N_SEEDS - 1}, or None")
        for bias in (self.logit_bias or {}).values():
            if not bias <= _LARGE:  # also refuses NaN; llama.cpp's sorting loses logits above 3e8
                raise SamplerError(f"a bias is {bias}; expected at most {_LARGE:g}")
        if self.grammar is not None and self.json_schema is not None:
            raise SamplerError("give a grammar or a JSON schema, not both")


MOST_LAST_N = 2**16  # llama.cpp holds so many tokens from the start, and copies them for each draft
_LARGE = 1e6  # far beyond what makes sense, and far from where float32 ends
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (-1, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (1 / _LARGE, _LARGE),
    "frequency_penalty": (-_LARGE, _LARGE),
    "presence_penalty": (-_LARGE, _LARGE),
    "penalty_last_n": (-1, MOST_LAST_N),
    "dry_multiplier": (0, _LARGE),
    "dry_base": (0, _LARGE),
    "dry_allowed_length": (0, MOST_LAST_N),
    "dry_last_n": (-1, MOST_LAST_N),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "mirostat": (0, 2),
    "mirostat_tau": (0, _LARGE),
    "mirostat_eta": (0, _LARGE),
}
DEFAULTS = {field.name: field.default for field in fields(Sampling)}
