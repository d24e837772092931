"""llama.cpp's own sampler chain, and its grammar, over fused logits."""

import ctypes
import json
import secrets
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import SamplerError
from trimix_gguf.machine import native
from trimix_gguf.machine.native import lib
from trimix_gguf.mixing.sampling import N_SEEDS, Sampling

_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # llama_token_data
_DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's defaults


class Sampler:
    """Picks token ids from fused rows; the same seed and rows give the same ids.

    `stop_ids` end a text, and the grammar never sees them. Raises SamplerError for a grammar or a
    JSON schema that llama.cpp cannot use.
    """

    def __init__(
        self, vocab: Any, n_vocab: int, sampling: Sampling, *, stop_ids: Sequence[int] = ()
    ) -> None:
        self.seed = secrets.randbelow(N_SEEDS) if sampling.seed is None else sampling.seed
        self._stop_ids = frozenset(stop_ids)
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        weakref.finalize(self, lib.llama_sampler_free, self._chain)
        changing = _adjusters(vocab, n_vocab, sampling)
        for link in (*changing, *_pickers(n_vocab, sampling, self.seed)):
            lib.llama_sampler_chain_add(self._chain, link)
        self._grammar = _grammar(vocab, sampling)
        if self._grammar is not None:
            weakref.finalize(self, lib.llama_sampler_free, self._grammar)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._candidates = np.zeros(n_vocab, dtype=_CANDIDATE)

    def sample(self, fused: NDArray[np.float32]) -> int:
        """Pick from one fused row [n_vocab]; accept() then tells which token was taken."""
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
        """An independent copy in the same state, random stream included."""
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
        # Samplers sort and cut in place, so ids and size are set for each row.
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


def _adjusters(vocab: Any, n_vocab: int, sampling: Sampling) -> Iterator[Any]:
    """The links of the chain that change logits: biases, penalties, DRY."""
    s = sampling
    if s.logit_bias:
        biases = (lib.llama_logit_bias * len(s.logit_bias))(
            *(lib.llama_logit_bias(i, bias) for i, bias in s.logit_bias.items())
        )
        yield lib.llama_sampler_init_logit_bias(n_vocab, len(s.logit_bias), biases)
    if s.repeat_penalty != 1.0 or s.frequency_penalty or s.presence_penalty:
        penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        yield lib.llama_sampler_init_penalties(n_vocab, s.penalty_last_n, *penalties)
    if s.dry_multiplier > 0:
        settings = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_last_n)
        marks = (ctypes.c_char_p * len(_DRY_BREAKERS))(*(b.encode() for b in _DRY_BREAKERS))
        yield lib.llama_sampler_init_dry(vocab, *settings, marks, len(_DRY_BREAKERS))


def _pickers(n_vocab: int, sampling: Sampling, seed: int) -> Iterator[Any]:
    """The links of the chain that cut tokens off, and the last one, which picks."""
    s = sampling
    if s.temperature == 0:
        yield lib.llama_sampler_init_greedy()
    elif s.mirostat:
        yield lib.llama_sampler_init_temp(s.temperature)
        start = (seed, s.mirostat_tau, s.mirostat_eta)
        if s.mirostat == 1:
            yield lib.llama_sampler_init_mirostat(n_vocab, *start, 100)
        else:
            yield lib.llama_sampler_init_mirostat_v2(*start)
    else:
        yield lib.llama_sampler_init_top_k(s.top_k)
        yield lib.llama_sampler_init_top_p(s.top_p, 1)
        yield lib.llama_sampler_init_min_p(s.min_p, 1)
        if s.xtc_probability > 0:
            yield lib.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 1, seed)
        yield lib.llama_sampler_init_temp(s.temperature)
        yield lib.llama_sampler_init_dist(seed)


def _grammar(vocab: Any, sampling: Sampling) -> Any:
    """llama.cpp's sampler for the grammar or the schema; None where there is neither."""
    text = sampling.grammar if sampling.json_schema is None else _gbnf(sampling.json_schema)
    if text is None:
        return None
    with native.stderr_closed():
        grammar = lib.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    if not grammar:
        raise SamplerError("llama.cpp cannot parse the grammar; check its GBNF")
    return grammar


def _gbnf(schema: object) -> str:
    """A JSON schema, as text or dict, as a grammar."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        json.loads(text)
        return str(native.json_schema_to_gbnf(text))
    except (
        ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError,
    ) as error:  # fmt: skip
        raise SamplerError(f"the JSON schema cannot be used: {error}") from None
