"""llama.cpp's own sampler chain, and its grammar, over fused logits."""

import ctypes
import json
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import SamplerError
from trimix_gguf.machine import native
from trimix_gguf.machine.native import lib

_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # llama_token_data
_DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's defaults


class Sampler:
    """Picks token ids from fused rows; the same seed and rows give the same ids.

    Defaults are llama.cpp's. `temperature` 0 is greedy, penalties, DRY and grammar still
    applied. Mirostat (1 or 2) takes the place of the cut-offs. `json_schema` is a schema as
    text or dict, `grammar` GBNF; at most one. `logit_bias` is id -> added logit. Raises
    SamplerError for a setting out of range, or a grammar that llama.cpp cannot parse.
    """

    def __init__(
        self,
        vocab: Any,
        n_vocab: int,
        *,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        penalty_last_n: int = 64,
        dry_multiplier: float = 0.0,
        dry_base: float = 1.75,
        dry_allowed_length: int = 2,
        dry_last_n: int = 1024,
        xtc_probability: float = 0.0,
        xtc_threshold: float = 0.1,
        mirostat: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        seed: int | None = None,
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        logit_bias: Mapping[int, float] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        _check(
            temperature=(temperature, 0, 100),
            top_p=(top_p, 0, 1),
            min_p=(min_p, 0, 1),
            repeat_penalty=(repeat_penalty, 1e-6, 1e6),
            xtc_probability=(xtc_probability, 0, 1),
            mirostat=(mirostat, 0, 2),
        )
        self.seed = secrets.randbelow(2**32 - 1) if seed is None else seed
        self.temperature = temperature
        self._n_vocab = n_vocab
        self._stop_ids = frozenset(stop_ids)
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._grammar = None
        add = lambda sampler: lib.llama_sampler_chain_add(self._chain, sampler)  # noqa: E731
        if logit_bias:
            biases = (lib.llama_logit_bias * len(logit_bias))(
                *(lib.llama_logit_bias(i, bias) for i, bias in logit_bias.items())
            )
            add(lib.llama_sampler_init_logit_bias(n_vocab, len(logit_bias), biases))
        if repeat_penalty != 1.0 or frequency_penalty or presence_penalty:
            add(
                lib.llama_sampler_init_penalties(
                    n_vocab, penalty_last_n, repeat_penalty, frequency_penalty, presence_penalty
                )
            )
        if dry_multiplier > 0:
            marks = (ctypes.c_char_p * len(_DRY_BREAKERS))(*(b.encode() for b in _DRY_BREAKERS))
            add(
                lib.llama_sampler_init_dry(
                    vocab,
                    dry_multiplier,
                    dry_base,
                    dry_allowed_length,
                    dry_last_n,
                    marks,
                    len(_DRY_BREAKERS),
                )
            )
        if temperature == 0:
            add(lib.llama_sampler_init_greedy())
        elif mirostat:
            add(lib.llama_sampler_init_temp(temperature))
            start = (self.seed, mirostat_tau, mirostat_eta)
            if mirostat == 1:
                add(lib.llama_sampler_init_mirostat(n_vocab, *start, 100))
            else:
                add(lib.llama_sampler_init_mirostat_v2(*start))
        else:
            add(lib.llama_sampler_init_top_k(top_k))
            add(lib.llama_sampler_init_top_p(top_p, 1))
            add(lib.llama_sampler_init_min_p(min_p, 1))
            if xtc_probability > 0:
                add(lib.llama_sampler_init_xtc(xtc_probability, xtc_threshold, 1, self.seed))
            add(lib.llama_sampler_init_temp(temperature))
            add(lib.llama_sampler_init_dist(self.seed))
        weakref.finalize(self, lib.llama_sampler_free, self._chain)
        text = _grammar_text(grammar, json_schema)
        if text is not None:
            with native.stderr_closed():
                self._grammar = lib.llama_sampler_init_grammar(vocab, text.encode(), b"root")
            if not self._grammar:
                raise SamplerError("llama.cpp cannot parse the grammar; check its GBNF")
            weakref.finalize(self, lib.llama_sampler_free, self._grammar)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._candidates = np.zeros(n_vocab, dtype=_CANDIDATE)

    def sample(self, fused: NDArray[np.float32]) -> int:
        """Pick from one fused row [n_vocab]; the caller tells by accept() what it took."""
        token = self._pick(fused, constrained=False)
        if self._grammar is not None and not self._allowed(token):
            token = self._pick(fused, constrained=True)
        return token

    def accept(self, token: int) -> None:
        """Tell penalties, DRY and the grammar that `token` is now part of the text."""
        lib.llama_sampler_accept(self._chain, token)
        if self._grammar is not None and token not in self._stop_ids:
            lib.llama_sampler_accept(self._grammar, token)

    def clone(self) -> "Sampler":
        """A copy in the same state, random stream included, that goes its own way."""
        twin = object.__new__(Sampler)
        twin.__dict__.update(self.__dict__)
        twin._chain = lib.llama_sampler_clone(self._chain)
        weakref.finalize(twin, lib.llama_sampler_free, twin._chain)
        if self._grammar is not None:
            twin._grammar = lib.llama_sampler_clone(self._grammar)
            weakref.finalize(twin, lib.llama_sampler_free, twin._grammar)
        return twin

    def read_prompt(self, ids: Sequence[int]) -> None:
        """Let penalties and DRY see the prompt, as llama.cpp does; a grammar starts after it."""
        for token in ids:
            lib.llama_sampler_accept(self._chain, token)

    def _pick(self, fused: NDArray[np.float32], constrained: bool) -> int:
        # Samplers sort and cut in place: ids and size are set anew for each row.
        self._candidates["id"] = self._ids
        self._candidates["logit"] = fused
        array = self._array(self._candidates)
        if constrained:
            lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        if array.selected < 0:
            raise SamplerError("the sampler picked nothing; loosen its cut-offs")
        picked = array.data[array.selected]
        if picked.logit == -np.inf:
            raise SamplerError("every token is ruled out by the grammar, biases or masks")
        return int(picked.id)

    def _allowed(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], dtype=_CANDIDATE)
        array = self._array(one)
        lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(array.data[0].logit != -np.inf)

    @staticmethod
    def _array(candidates: NDArray[Any]) -> Any:
        data = candidates.ctypes.data_as(lib.llama_token_data_p)
        return lib.llama_token_data_array(
            data=data, size=len(candidates), selected=-1, sorted=False
        )


def _check(**ranges: tuple[float, float, float]) -> None:
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise SamplerError(f"{name} is {value}; expected {low:g} to {high:g}")


def _grammar_text(grammar: str | None, schema: str | Mapping[str, Any] | None) -> str | None:
    if schema is None:
        return grammar
    if grammar is not None:
        raise SamplerError("give a grammar or a JSON schema, not both")
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        json.loads(text)
        return str(native.json_schema_to_gbnf(text))
    except (
        ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError,
    ) as error:  # fmt: skip
        raise SamplerError(f"the JSON schema cannot be used: {error}") from None
