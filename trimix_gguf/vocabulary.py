"""The vocabulary contract: the models of a trio speak the same tokens, or are refused."""

from collections.abc import Mapping
from typing import Any

from trimix_gguf.errors import VocabularyMismatch
from trimix_gguf.gguf_file import GGUFFile

_NORMAL, _UNUSED = 1, 5  # llama.cpp's token types; padding is unused
# Pre-tokenizers that add BOS where a file does not say (llama.cpp, src/llama-vocab.cpp).
_ADD_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
    + ("jina-v5-nano", "tekken", "chameleon")
)


def check_contract(files: Mapping[str, GGUFFile]) -> int:
    """The number of ids that all share; raises VocabularyMismatch naming the first difference.

    Compared: tokenizer model and pre-tokenizer, text, type and score of every id below the
    smallest vocabulary, merges, BOS and EOS where they are added. Sizes may differ by padding.
    """
    (first, reference), *others = files.items()
    known = _Vocabulary(reference)
    n_common = len(known.tokens)
    for role, file in others:
        if file.path == reference.path:
            continue
        other = _Vocabulary(file)
        flaw = _first_difference(first, known, role, other)
        if flaw is not None:
            raise VocabularyMismatch(f"{flaw}; convert both with one tokenizer")
        n_common = min(n_common, len(other.tokens))
    return n_common


class _Vocabulary:
    """What a GGUF says about its tokenizer."""

    def __init__(self, file: GGUFFile) -> None:
        self.metadata = file.metadata
        self.tokens: list[bytes] = file.array("tokenizer.ggml.tokens") or []
        # As llama.cpp reads an absent array; BPE has no use for scores.
        n, bpe = len(self.tokens), self.setting("model") == "gpt2"
        self.types: list[int] = file.array("tokenizer.ggml.token_type") or [_NORMAL] * n
        scores = None if bpe else file.array("tokenizer.ggml.scores")
        self.scores: list[float] = scores or [0.0] * n
        self.merges: list[bytes] = file.array("tokenizer.ggml.merges") or []
        if not self.tokens:
            raise VocabularyMismatch(f"{file.path.name} holds no vocabulary; convert it again")
        if not n == len(self.types) == len(self.scores):
            raise VocabularyMismatch(
                f"{file.path.name} has {n} tokens, {len(self.types)} types and "
                f"{len(self.scores)} scores; convert it again"
            )

    def setting(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def adds(self, key: str) -> bool:
        """Whether prompts get BOS or EOS, as llama.cpp decides where the file does not say."""
        added = self.setting(f"add_{key}_token")
        if added is None and key == "bos":
            return self.setting("model") == "llama" or self.setting("pre") in _ADD_BOS
        return bool(added)


def _first_difference(a_role: str, a: _Vocabulary, b_role: str, b: _Vocabulary) -> str | None:
    for key, what in (("model", "tokenizer model"), ("pre", "pre-tokenizer")):
        if a.setting(key) != b.setting(key):
            return f"{what} is {b.setting(key)!r} in {b_role} but {a.setting(key)!r} in {a_role}"
    n = min(len(a.tokens), len(b.tokens))
    for what, x, y in (
        ("token", a.tokens, b.tokens),
        ("type of token", a.types, b.types),
        ("score of token", a.scores, b.scores),
    ):
        if x[:n] != y[:n]:
            i = next(i for i, (u, v) in enumerate(zip(x, y, strict=False)) if u != v)
            return f"{what} {i} is {_show(y[i])} in {b_role} but {_show(x[i])} in {a_role}"
    if a.merges != b.merges:
        pairs = enumerate(zip(a.merges, b.merges, strict=False))
        i = next((i for i, (u, v) in pairs if u != v), min(len(a.merges), len(b.merges)))
        return f"merge {i} of {b_role} differs from that of {a_role}"
    for role, longer in ((a_role, a), (b_role, b)):
        for i in range(n, len(longer.tokens)):
            if not (longer.types and longer.types[i] == _UNUSED):
                return f"{role} has {_show(longer.tokens[i])} as token {i}, past the other's {n}"
    for key in ("bos", "eos"):
        if a.adds(key) != b.adds(key):
            return f"add_{key}_token is {b.adds(key)} in {b_role} but {a.adds(key)} in {a_role}"
        x, y = a.setting(f"{key}_token_id"), b.setting(f"{key}_token_id")
        if a.adds(key) and x != y:
            return f"{key}_token_id is {y} in {b_role} but {x} in {a_role}"
    return None


def _show(value: Any) -> str:
    return repr(value.decode("utf-8", errors="replace")) if isinstance(value, bytes) else str(value)
