"""The rows of a vocabulary: the text, type and score of every id, and the added tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gguf import TokenType

from trimix_gguf.errors import ConversionError

from .added_tokens import SPACE, check_entries, read_entries

# Added tokens that are not marked special, but are not text either, as in llama.cpp's converter.
CONTROL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
CONTROL_AFFIXES = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


class Token(NamedTuple):
    """One row; a score orders SentencePiece's merges, BPE has no use for it."""

    text: str
    type: TokenType
    score: float = 0.0


class Found(NamedTuple):
    """What a vocabulary is read from; `added` are the added tokens by id."""

    path: Path  # tokenizer.json, or tokenizer.model
    tokenizer: Mapping[str, Any]  # what tokenizer.json holds; empty where there is none
    added: Mapping[int, Token]
    n_vocab: int


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer without its special ids, in llama.cpp's terms; `tokens` is [n_vocab]."""

    model: str  # the algorithm: "gpt2" is byte-level BPE, "llama" SentencePiece's BPE
    pre: str
    tokens: list[Token]
    merges: list[str] | None = None
    normalizer: str = "none"  # or "nfc": what the runtime does to a text first
    add_space_prefix: bool | None = None


def flat_steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """What a part of tokenizer.json does, step by step; a Sequence has its steps under `key`."""
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [one for part in step.get(key, []) for one in flat_steps(part, key)]
    return [step]


def read_added_tokens(
    folder: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[int, Token]:
    """Return the tokens that are matched in the text before anything else, by id.

    Raises ConversionError where files disagree, or llama.cpp would match in other places.
    """
    entries = read_entries(folder, tokenizer, settings)
    check_entries(folder, entries)
    return {id_: _added_token(entry) for id_, entry in entries.items()}


def without_rows(added: Mapping[int, Token], n_vocab: int) -> dict[int, Token]:
    """The added tokens that the model has a row for, or that a text may hold.

    A pad token is often listed past the last row; so is <image_soft_token> of Gemma 3.
    """
    return {i: t for i, t in added.items() if i < n_vocab or t.type != TokenType.CONTROL}


def _added_token(entry: Mapping[str, Any]) -> Token:
    text = entry["content"]
    if entry.get("special") or text in CONTROL_TEXTS:
        return Token(text, TokenType.CONTROL, -1000.0)
    if any(text.startswith(start) and text.endswith(end) for start, end in CONTROL_AFFIXES):
        return Token(text, TokenType.CONTROL, -1000.0)
    return Token(text, TokenType.USER_DEFINED, -1000.0)


def user_defined(text: str, score: float) -> Token:
    """A token matched as it stands; llama.cpp looks for it before it spells spaces as ▁."""
    return Token(text.replace(SPACE, " "), TokenType.USER_DEFINED, score)


def list_tokens(path: Path, entries: Mapping[int, Token], n_vocab: int) -> list[Token]:
    """Return the rows of ids 0 .. n_vocab - 1; ids that no token has are padding."""
    last = max(entries, default=-1)
    if last >= n_vocab:
        raise ConversionError(
            f"{path} has token id {last}, but vocab_size in config.json is {n_vocab}; "
            "the tokenizer belongs to another model"
        )
    listed = [
        entries.get(id_) or Token(f"[PAD{id_}]", TokenType.UNUSED, -10000.0)
        for id_ in range(n_vocab)
    ]
    first: dict[str, int] = {}
    for id_, token in enumerate(listed):
        # llama.cpp aborts the process where two ids have one text.
        if first.setdefault(token.text, id_) != id_:
            raise ConversionError(
                f"{path} has {token.text!r} as both token {first[token.text]} and token {id_}; "
                "llama.cpp needs them to differ"
            )
    return listed
