"""llama.cpp's own sampler chain over fused logits, within a grammar or a JSON schema."""

import ctypes
import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import ModelError, NothingAllowed, SamplerError
from trimix_gguf.machine.native import lib
from trimix_gguf.mixing.fusion import NOT_FINITE
from trimix_gguf.mixing.grammar import CANDIDATE, Grammar, candidate_array
from trimix_gguf.mixing.masks import SchemaMask, TokenTree
from trimix_gguf.mixing.sampling import MOST_LAST_N, N_SEEDS, Sampling

_LEAST_SHARE = 1e-30  # of the top probability: far below what is ever picked, above underflow
_COLDEST = 1e-6  # below it is greedy: llama.cpp's sorting loses logits above 3e8
_DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's defaults


class Sampler:
    """Picks token ids from fused rows; the same seed and rows give the same ids.

    `stop_ids` end a text, and the grammar never sees them. `tree` makes what a JSON schema needs.
    Raises SamplerError for a grammar or a JSON schema that cannot be used.
    """

    def __init__(
        self,
        vocab: Any,
        n_vocab: int,
        sampling: Sampling,
        *,
        stop_ids: Sequence[int] = (),
        tree: Callable[[], TokenTree] | None = None,
    ) -> None:
        self.seed = secrets.randbelow(N_SEEDS) if sampling.seed is None else sampling.seed
        self._stop_ids = frozenset(stop_ids)
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        weakref.finalize(self, lib.llama_sampler_free, self._chain)
        changing = _adjusters(vocab, n_vocab, sampling)
        for link in (*changing, *_pickers(n_vocab, sampling, self.seed)):
            lib.llama_sampler_chain_add(self._chain, link)
        self._rules: Grammar | _Schema | None = None  # what the text has to follow
        if sampling.json_schema is not None:
            if tree is None:
                raise SamplerError("a JSON schema needs the tokens: tree=lambda: trio.token_tree")
            self._rules = _Schema(SchemaMask(tree(), sampling.json_schema), self._stop_ids)
        elif sampling.grammar is not None:
            self._rules = Grammar.parse(vocab, sampling.grammar)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._candidates = np.zeros(n_vocab, dtype=CANDIDATE)

    def sample(self, fused: NDArray[np.float32]) -> int:
        """Pick from one fused row [n_vocab]; accept() then tells which token was taken.

        Raises ModelError where the row has NaN or +inf: llama.cpp would pick some token. Raises
        NothingAllowed where no token is left.
        """
        if not fused.max() < np.inf:  # NaN is the maximum of its row
            raise ModelError(NOT_FINITE)
        token = self._pick(fused, constrained=False)
        if self._rules is not None and not self._rules.allows(token):
            token = self._pick(fused, constrained=True)
        return token

    def accept(self, token: int) -> None:
        """Tell penalties, DRY and the grammar that `token` is now part of the text."""
        lib.llama_sampler_accept(self._chain, token)
        if self._rules is not None and token not in self._stop_ids:
            self._rules.accept(token)

    def clone(self) -> "Sampler":
        """An independent copy in the same state, random stream included."""
        twin = object.__new__(Sampler)
        twin.__dict__.update(self.__dict__)
        twin._chain = lib.llama_sampler_clone(self._chain)
        weakref.finalize(twin, lib.llama_sampler_free, twin._chain)
        twin._rules = self._rules and self._rules.clone()
        return twin

    def read_prompt(self, ids: Sequence[int]) -> None:
        """Let penalties and DRY see the prompt, as llama.cpp does; a grammar starts after it."""
        for token in ids:
            lib.llama_sampler_accept(self._chain, token)

    def _pick(self, fused: NDArray[np.float32], constrained: bool) -> int:
        # Samplers sort and cut in place, so ids and size are set for each row.
        self._candidates["id"] = self._ids
        self._candidates["logit"] = fused
        if constrained:
            assert self._rules is not None
            self._rules.apply(self._candidates)
        array = candidate_array(self._candidates)
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        if array.selected < 0:
            raise SamplerError("the sampler picked nothing; loosen its cut-offs")
        picked = array.data[array.selected]
        if picked.logit == -np.inf:
            raise NothingAllowed("every token is ruled out by the grammar, biases or masks")
        return int(picked.id)


class _Schema:
    """A JSON schema: as a Grammar; a text may end where it is valid."""

    def __init__(self, mask: SchemaMask, stop_ids: frozenset[int]) -> None:
        self._mask, self._stop_ids = mask, stop_ids

    def apply(self, candidates: NDArray[Any]) -> None:
        """Set the logits of tokens that may not come next to minus infinity."""
        allowed = self._mask.allowed()
        allowed[list(self._stop_ids)] = self._mask.may_end
        candidates["logit"][~allowed] = -np.inf

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""
        return self._mask.may_end if token in self._stop_ids else self._mask.allows(token)

    def accept(self, token: int) -> None:
        """Take a token into the text."""
        self._mask.accept(token)

    def clone(self) -> "_Schema":
        """An independent copy in the same state."""
        return _Schema(self._mask.clone(), self._stop_ids)


def _adjusters(vocab: Any, n_vocab: int, sampling: Sampling) -> Iterator[Any]:
    """The links of the chain that change logits: biases, penalties, DRY."""
    s = sampling
    if s.logit_bias:
        if wrong := [i for i in s.logit_bias if not 0 <= i < n_vocab]:
            raise SamplerError(f"a bias is for token {wrong[0]}; there are 0 to {n_vocab - 1}")
        biases = (lib.llama_logit_bias * len(s.logit_bias))(
            *(lib.llama_logit_bias(i, bias) for i, bias in s.logit_bias.items())
        )
        yield lib.llama_sampler_init_logit_bias(n_vocab, len(s.logit_bias), biases)
    if s.repeat_penalty != 1.0 or s.frequency_penalty or s.presence_penalty:
        penalties = (s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
        yield lib.llama_sampler_init_penalties(n_vocab, _last_n(s.penalty_last_n), *penalties)
    if s.dry_multiplier > 0:
        settings = (s.dry_multiplier, s.dry_base, s.dry_allowed_length, _last_n(s.dry_last_n))
        marks = (ctypes.c_char_p * len(_DRY_BREAKERS))(*(b.encode() for b in _DRY_BREAKERS))
        yield lib.llama_sampler_init_dry(vocab, *settings, marks, len(_DRY_BREAKERS))


def _last_n(given: int) -> int:
    return MOST_LAST_N if given == -1 else given


def _pickers(n_vocab: int, sampling: Sampling, seed: int) -> Iterator[Any]:
    """The links of the chain that cut tokens off, and the last one, which picks."""
    s = sampling
    if s.temperature < _COLDEST:
        yield lib.llama_sampler_init_greedy()
    elif s.mirostat:
        yield lib.llama_sampler_init_temp(s.temperature)
        start = (seed, s.mirostat_tau, s.mirostat_eta)
        if s.mirostat == 1:
            # It divides by the likeliest 100's probabilities; by 0, it always took the likeliest.
            yield lib.llama_sampler_init_min_p(_LEAST_SHARE, 1)
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
