"""Which tokens may come next in a text that follows a JSON schema, by llguidance.

Every step has a limit of its own (llguidance's defaults: some 20 ms), so no schema can hold up
others that share the engine.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.errors import SchemaError
from trimix_gguf.mixing.schemas import MOST_PARTS, read_schema, reason, refused

_STACK = MOST_PARTS * (16 << 10)  # bytes; llguidance follows references by recursion
_MOST_STATES = 50_000  # of a lexer, 2 kB each
_MOST_KEPT = 8
_starting = threading.Lock()


class TokenTree:
    """The tokens of a vocabulary as llguidance reads them; it takes half a second for 150,000.

    `pieces` are their bytes; an empty one is never allowed.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.n_vocab = len(pieces)
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(pieces)))
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, rules: str) -> Any:
        """llguidance's matcher at the beginning of a text; the last few schemas are kept.

        Raises SchemaError.
        """
        with self._lock:
            if rules in self._kept:
                self._kept.move_to_end(rules)
                return self._kept[rules].deep_copy()
        made = _on_large_stack(lambda: _matcher(self._tokenizer, rules))
        if made.is_error():
            raise refused(reason(made.get_error()))
        with self._lock:
            self._kept[rules] = made
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return made.deep_copy()


class _Tokens:
    """What LLTokenizer asks of a tokenizer; its end of text is a token that no model has."""

    bos_token_id = None

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.tokens = [*pieces, b""]
        self.eos_token_id = len(pieces)
        self.special_token_ids = [i for i, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        return []  # a grammar without forced tokens asks for none


class SchemaMask:
    """A text that follows a schema, so far. Raises SchemaError where the schema cannot be used."""

    def __init__(self, tree: TokenTree, schema: object) -> None:
        self._n_vocab = tree.n_vocab
        self._matcher = tree.matcher(json.dumps(read_schema(schema)))
        self.allowed()  # the first step shows most of what is too costly

    def allowed(self) -> NDArray[np.bool_]:
        """bool [n_vocab]: tokens that may come next, ends of the text not among them."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: self._n_vocab]
        return allowed.astype(np.bool_)

    def allows(self, token: int) -> bool:
        """Whether this token may come next; quicker than all of them."""
        allowed = bool(self._matcher.validate_tokens([token]) == 1)
        self._check()
        return allowed

    @property
    def may_end(self) -> bool:
        """Whether the text so far is valid."""
        return bool(self._matcher.is_accepting())

    def accept(self, token: int) -> None:
        """Take a token that was allowed into the text."""
        self._matcher.consume_token(token)
        self._check()

    def clone(self) -> "SchemaMask":
        """An independent copy in the same state."""
        twin = object.__new__(SchemaMask)
        twin._n_vocab, twin._matcher = self._n_vocab, self._matcher.deep_copy()
        return twin

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SchemaError(
                f"the JSON schema is too complex: {reason(self._matcher.get_error())}"
            )


def _matcher(tokenizer: Any, rules: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    # Forced tokens would be those of a tokenizer: any that spell the text are fine.
    grammar = f'%llguidance {{"no_forcing": true}}\nstart: %json {rules}'
    limits = LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def _on_large_stack(call: Any) -> Any:
    """`call` in a thread whose stack no schema within limits overflows."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    with _starting:  # the size is one for the process
        before = threading.stack_size(_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return found[0]
