"""Documents that came before, exactly or nearly."""

from typing import Any

from trimix_gguf.adapting.extras import need
from trimix_gguf.adapting.grams import digest, grams, units_of

THRESHOLD = 0.8  # Jaccard similarity of word sequences, from which two documents are the same
N_WORDS = 5
_N_PERMUTATIONS = 64


class Exact:
    """Remembers documents by a hash of their words."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Whether no document before had these words in this order."""
        key = digest(" ".join(units_of(text)))
        found = key not in self._seen
        self._seen.add(key)
        return found


class Near:
    """Remembers documents by MinHash; about 6 KB each."""

    def __init__(self) -> None:
        self._minhash: Any = need("datasketch").MinHash
        self._index: Any = need("datasketch").MinHashLSH(
            threshold=THRESHOLD, num_perm=_N_PERMUTATIONS
        )
        self._n = 0

    def is_new(self, text: str) -> bool:
        """Whether no document before was nearly this one."""
        sketch = self._minhash(num_perm=_N_PERMUTATIONS)
        sketch.update_batch([gram.encode() for gram in set(grams(units_of(text), N_WORDS))])
        if self._index.query(sketch):
            return False
        self._index.insert(self._n, sketch, check_duplication=False)
        self._n += 1
        return True
