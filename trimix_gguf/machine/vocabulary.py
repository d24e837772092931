"""The vocabulary contract: the models of a trio speak the same tokens, or are refused."""

from collections.abc import Mapping
from typing import Any, TypeVar

from trimix_gguf.errors import VocabularyMismatch
from trimix_gguf.machine.gguf_file import GGUFFile

_Name = TypeVar("_Name", bound=str)  # of a model: a role, or of one beside a trio

_PREFIX = "tokenizer.ggml."
# Keys of ours, for what GGUF has none: ids that end a text, what is done to a text first, and the
# ids of added tokens that take the spaces on one side with them.
END_IDS, NORMALIZER = "trimix.tokenizer.end_ids", "trimix.tokenizer.normalizer"
STRIPPING = {side: f"trimix.tokenizer.{side}" for side in ("lstrip", "rstrip")}
_ARRAYS = ("tokens", "token_type", "scores", "merges")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's token types; padding is unused
# Pre-tokenizers that add BOS where a file does not say (llama.cpp, src/llama-vocab.cpp).
_ADD_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
    + ("jina-v5-nano", "tekken", "chameleon")
)


def check_contract(files: Mapping[_Name, GGUFFile]) -> int:
    """The number of ids that all share; raises VocabularyMismatch naming the first difference.

    Compared: tokenizer model and pre-tokenizer, text, type and score of every id below the
    smallest vocabulary, merges, BOS and EOS where they are added. Sizes may differ by padding and
    control tokens.
    """
    for file in files.values():
        _check_sizes(file)
    (first, reference), *others = files.items()
    n_common = reference.n_items(f"{_PREFIX}tokens")
    for role, file in others:
        if file.path == reference.path:
            continue
        flaw = _first_difference(first, reference, role, file)
        if flaw is not None:
            raise VocabularyMismatch(f"{flaw}; convert both with one tokenizer")
        n_common = min(n_common, file.n_items(f"{_PREFIX}tokens"))
    return n_common


def _check_sizes(file: GGUFFile) -> None:
    tokens, types, scores = (
        file.n_items(f"{_PREFIX}{key}") for key in ("tokens", "token_type", "scores")
    )
    if not tokens:
        raise VocabularyMismatch(f"{file.path.name} holds no vocabulary; convert it again")
    if types not in (0, tokens) or scores not in (0, tokens):
        raise VocabularyMismatch(
            f"{file.path.name} has {tokens} tokens, {types} types and {scores} scores; "
            "convert it again"
        )


def _first_difference(a_role: str, a: GGUFFile, b_role: str, b: GGUFFile) -> str | None:
    for key, what in (("model", "tokenizer model"), ("pre", "pre-tokenizer")):
        x, y = _setting(a, key), _setting(b, key)
        if x != y:
            return f"{what} is {y!r} in {b_role} but {x!r} in {a_role}"
    if not all(a.agrees_on(f"{_PREFIX}{key}", b) for key in _ARRAYS):
        flaw = _token_difference(a_role, _Vocabulary(a), b_role, _Vocabulary(b))
        if flaw is not None:
            return flaw
    for key in ("bos", "eos"):
        if _adds(a, key) != _adds(b, key):
            return f"add_{key}_token is {_adds(b, key)} in {b_role} but {_adds(a, key)} in {a_role}"
        x, y = _setting(a, f"{key}_token_id"), _setting(b, f"{key}_token_id")
        if _adds(a, key) and x != y:
            return f"{key}_token_id is {y} in {b_role} but {x} in {a_role}"
    return None


def _setting(file: GGUFFile, key: str) -> Any:
    return file.metadata.get(f"{_PREFIX}{key}")


def _adds(file: GGUFFile, key: str) -> bool:
    """Whether prompts get BOS or EOS, as llama.cpp decides where the file does not say."""
    added = _setting(file, f"add_{key}_token")
    if added is None and key == "bos":
        return _setting(file, "model") == "llama" or _setting(file, "pre") in _ADD_BOS
    return bool(added)


def usual_normalizer(pre: str) -> str:
    """What models of a pre-tokenizer do to a text first, where a file does not say: "nfc", "none".

    Qwen's puts text in NFC: without it, most Bengali from the web is cut into other tokens.
    """
    return "nfc" if pre.startswith("qwen") else "none"


class _Vocabulary:
    """The tokens of a GGUF, read whole: 150,000 texts, so only where two files' bytes differ."""

    def __init__(self, file: GGUFFile) -> None:
        self.tokens: list[bytes] = file.array(f"{_PREFIX}tokens") or []
        # As llama.cpp reads an absent array; BPE has no use for scores.
        n, bpe = len(self.tokens), _setting(file, "model") == "gpt2"
        self.types: list[int] = file.array(f"{_PREFIX}token_type") or [_NORMAL] * n
        scores = None if bpe else file.array(f"{_PREFIX}scores")
        self.scores: list[float] = scores or [0.0] * n
        self.merges: list[bytes] = file.array(f"{_PREFIX}merges") or []


def _token_difference(a_role: str, a: _Vocabulary, b_role: str, b: _Vocabulary) -> str | None:
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
            # No text holds them: padding, or a mark such as Gemma 3's for images.
            if longer.types[i] not in (_CONTROL, _UNUSED):
                return f"{role} has {_show(longer.tokens[i])} as token {i}, past the other's {n}"
    return None


def _show(value: Any) -> str:
    return repr(value.decode("utf-8", errors="replace")) if isinstance(value, bytes) else str(value)
