"""llama.cpp's grammars (GBNF): which tokens may come next.

Some grammars double what llama.cpp keeps at each token, or have it end the process. So a grammar
is first walked in a child process, over the small vocabulary of nano, at random and within limits.
"""

import ctypes
import random
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import SamplerError
from trimix_gguf.machine import native
from trimix_gguf.machine.native import lib
from trimix_gguf.machine.worker import CPU_S, TooCostly, Worker, answer_calls

CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # llama_token_data
_VOCABULARY = Path(__file__).parent.parent / "nano" / "small_base.gguf"
_N_WALKS, _N_STEPS = 6, 40
_walker = Worker("trimix_gguf.mixing.grammar", most=1)


def candidate_array(candidates: NDArray[Any]) -> Any:
    """Candidates as llama.cpp's llama_token_data_array, without a copy."""
    data = candidates.ctypes.data_as(lib.llama_token_data_p)
    return lib.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


class Grammar:
    """A text that follows a grammar, so far."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        weakref.finalize(self, lib.llama_sampler_free, handle)

    @classmethod
    def parse(cls, vocab: Any, text: str) -> "Grammar":
        """A grammar at its beginning; raises SamplerError where it is none, or too costly."""
        _check(text)
        return cls(_parsed(vocab, text))

    def apply(self, candidates: NDArray[Any]) -> None:
        """Set the logits of tokens that may not come next to minus infinity. SamplerError."""
        array, started = candidate_array(candidates), thread_time()
        lib.llama_sampler_apply(self._handle, ctypes.byref(array))
        _check_time(started)

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""
        one = np.array([(token, 1.0, 0.0)], dtype=CANDIDATE)
        self.apply(one)
        return bool(one["logit"][0] != -np.inf)

    def accept(self, token: int) -> None:
        """Take a token into the text. SamplerError."""
        started = thread_time()
        lib.llama_sampler_accept(self._handle, token)
        _check_time(started)

    def clone(self) -> "Grammar":
        """An independent copy in the same state."""
        return Grammar(lib.llama_sampler_clone(self._handle))


def _parsed(vocab: Any, text: str) -> Any:
    grammar = None
    if text:  # llama.cpp takes an empty one for none
        with native.stderr_closed():
            grammar = lib.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    if not grammar:
        raise SamplerError("llama.cpp cannot parse the grammar; check its GBNF")
    return grammar


def _check_time(started: float) -> None:
    """Of the thread, so that a busy machine changes nothing."""
    if thread_time() - started > CPU_S:
        raise SamplerError(f"the grammar costs more than {CPU_S:g} s per token; make it less vague")


@lru_cache(64)
def _check(text: str) -> None:
    """Raise SamplerError for a grammar that a child process cannot walk within its limits."""
    try:
        error = _walker.call(text)
    except TooCostly:
        raise SamplerError(
            f"the grammar is too costly: walking it took more than {CPU_S:g} s, or too much memory"
        ) from None
    if error:
        raise SamplerError(error)


# -- the child --------------------------------------------------------------------------------


def main() -> None:
    """Walk the grammars that the parent process asks about."""
    with native.vocabulary(str(_VOCABULARY)) as vocab:
        answer_calls(lambda text: _walk(vocab, text))


def _walk(vocab: Any, text: str) -> str:
    """Why a grammar cannot be used; empty where it can."""
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    ids = np.arange(n_vocab, dtype=np.int32)
    ends = {i for i in range(n_vocab) if lib.llama_vocab_is_eog(vocab, i)}
    try:
        start = Grammar(_parsed(vocab, text))
    except SamplerError as error:
        return str(error)
    for seed in range(_N_WALKS):
        draw, grammar = random.Random(seed), start.clone()
        for _ in range(_N_STEPS):
            allowed: Sequence[int] = [i for i in _allowed(grammar, ids) if i not in ends]
            if not allowed:
                break
            grammar.accept(draw.choice(allowed))
    return ""


def _allowed(grammar: Grammar, ids: NDArray[np.int32]) -> list[int]:
    candidates = np.zeros(len(ids), dtype=CANDIDATE)
    candidates["id"] = ids
    grammar.apply(candidates)
    return [int(i) for i in np.flatnonzero(candidates["logit"] == 0)]
