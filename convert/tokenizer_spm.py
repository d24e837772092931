"""SentencePiece BPE (Llama 2, Gemma) for llama.cpp, which calls it SPM.

tokenizer.model is a protobuf message, described at
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto; of it a few
fields are read here. tokenizer.json holds the same vocabulary with merges instead of scores.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from trimix_gguf.errors import ConversionError

from .added_tokens import SPACE, check_spelled
from .checkpoint import check_inside
from .tokenizer_bpe import read_merges
from .tokens import Found, Token, Vocabulary, flat_steps, list_tokens, user_defined, without_rows

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
BPE = 2  # TrainerSpec.ModelType


def read_sentencepiece(found: Found, add_space_prefix: bool | None = None) -> Vocabulary:
    """Read a tokenizer.model; the added tokens replace its pieces.

    The tokenizer.json beside it, empty where there is none, must be the same. `add_space_prefix`
    overrules the file's own word on a space in front of text.
    """
    path = found.path
    pieces: list[Token] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        check_inside(path.parent, path)
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                pieces.append(_piece(dict(_fields(value))))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConversionError(f"{path} is not a SentencePiece model; download it again") from error
    if trainer.get(3) != BPE:
        raise ConversionError(
            f"{path} is not a BPE model of SentencePiece (unigram perhaps); "
            "only BPE has an equal in llama.cpp's models of this family"
        )
    # Fields left out are true by default: remove_extra_whitespaces and escape_whitespaces.
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24):
        raise ConversionError(
            f"{path} changes text before it is cut (normalization rule "
            f"{_text(normalizer.get(1))!r}), which llama.cpp does not do; "
            "expected rule 'identity' and no removal of extra whitespace"
        )
    own_prefix = bool(normalizer.get(3, 1))
    if found.tokenizer:
        prefix = own_prefix if add_space_prefix is None else None
        _check_same(found, pieces, prefix)
    if add_space_prefix is None:
        add_space_prefix = own_prefix
    return _vocabulary(found, dict(enumerate(pieces)), add_space_prefix)


def _check_same(found: Found, pieces: list[Token], prefix: bool | None) -> None:
    """Raise ConversionError where tokenizer.json, beside the tokenizer.model, is another one.

    A vocabulary that was extended is often saved to only one of the two.
    """
    path, tokenizer, added, _ = found
    vocab = (tokenizer.get("model") or {}).get("vocab")
    if not isinstance(vocab, dict):  # Unigram, or only added tokens
        return
    theirs = {id_: text for text, id_ in vocab.items() if id_ not in added}
    own = {id_: piece.text for id_, piece in enumerate(pieces) if id_ not in added}
    for id_ in sorted(theirs.keys() | own.keys()):
        one, other = theirs.get(id_), own.get(id_)
        if one is None or other is None or one.replace(SPACE, " ") != other.replace(SPACE, " "):
            raise ConversionError(
                f"token {id_} is {one!r} in tokenizer.json but {other!r} in {path}; take both from "
                "the checkpoint that the model was trained with, or remove the wrong one"
            )
    try:
        same = prefix is None or _read_space_prefix(path, tokenizer) == prefix
    except ConversionError:  # it has other steps than expected; tokenizer.model says what they do
        return
    if not same:
        raise ConversionError(
            f"tokenizer.json and {path} disagree on a space in front of text; set add_prefix_space "
            "in tokenizer_config.json to what the model was trained with"
        )


def read_sentencepiece_json(found: Found) -> Vocabulary:
    """Read a tokenizer.json, BPE with byte_fallback; scores come from the merges' order."""
    path, tokenizer, added, _ = found
    model = tokenizer["model"]
    add_space_prefix = _read_space_prefix(path, tokenizer)
    merges = read_merges(path, model)
    made = {left + right for left, right in merges}
    listed = tokenizer.get("added_tokens") or []
    check_spelled(path, listed, prefix=add_space_prefix, mergeable=made)
    # Matched in the text beforehand, so that no merge meets them.
    vocab = {text: id_ for text, id_ in model["vocab"].items() if id_ not in added}
    scores = _score_pieces(path, vocab, merges)
    entries = {}
    for text, id_ in vocab.items():
        if text in BYTES:
            entries[id_] = Token(text, TokenType.BYTE)
        elif text == model.get("unk_token"):
            entries[id_] = Token(text, TokenType.UNKNOWN)
        else:
            entries[id_] = Token(text, TokenType.NORMAL, scores[text])
    return _vocabulary(found, entries, add_space_prefix)


def _vocabulary(found: Found, entries: Mapping[int, Token], add_space_prefix: bool) -> Vocabulary:
    added = {
        i: user_defined(t.text, t.score) if t.type == TokenType.USER_DEFINED else t
        for i, t in without_rows(found.added, found.n_vocab).items()
    }
    tokens = list_tokens(found.path, {**entries, **added}, found.n_vocab)
    texts = {token.text for token in tokens}
    for name, byte in BYTES.items():
        # llama.cpp spells what no piece covers in bytes, and ends the process where one lacks.
        if name not in texts and not (byte < 128 and chr(byte) in texts):
            raise ConversionError(
                f"{found.path} has no token {name}: its model was trained without byte_fallback, "
                "which llama.cpp needs"
            )
    return Vocabulary("llama", "default", tokens, add_space_prefix=add_space_prefix)


def _piece(fields: Mapping[int, Any]) -> Token:
    text = fields[1].decode()
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    kind = TokenType(fields.get(3, TokenType.NORMAL))  # the same numbers in both formats
    return user_defined(text, score) if kind == TokenType.USER_DEFINED else Token(text, kind, score)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message: a varint as int, anything else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value: Any
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("the message is truncated")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the integer at `at`, seven bits a byte and the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def _read_space_prefix(path: Path, tokenizer: Mapping[str, Any]) -> bool:
    """Tell whether text gets a space in front; refuse what llama.cpp does not do to text."""
    prefix = spelled = False
    for part in flat_steps(tokenizer.get("normalizer"), "normalizers"):
        if part == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif part == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            spelled = True
        else:
            raise _unknown_step(path, part)
    for part in flat_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = part.get("type")
        if kind == "Metaspace" and part.get("replacement") == SPACE and part.get("split") is False:
            spelled, prefix = True, part.get("prepend_scheme") != "never"
        # Gemma's splits at spaces, of which the normalizer leaves none.
        elif not (kind == "Split" and part.get("pattern") == {"String": " "} and spelled):
            raise _unknown_step(path, part)
    if not spelled:
        raise ConversionError(f"{path} does not spell spaces as {SPACE}, as SentencePiece would")
    return prefix


def _unknown_step(path: Path, step: Mapping[str, Any]) -> ConversionError:
    return ConversionError(
        f"{path} changes or cuts text by {step.get('type')} in a way that llama.cpp cannot; "
        "expected what Llama 2 or Gemma do"
    )


def _score_pieces(
    path: Path, vocab: Mapping[str, int], merges: list[tuple[str, str]]
) -> dict[str, float]:
    """Score each piece by its place among the merges, the first 0, the next -1.

    llama.cpp merges whichever two neighbours make the piece that scores best. That is the same
    only if the merges of one piece stand together and are all the ways to make it of two pieces.
    """
    scores: dict[str, float] = {}
    n_merges: Counter[str] = Counter()
    previous = None
    for left, right in merges:
        piece = left + right
        if left not in vocab or right not in vocab or piece not in vocab:
            continue
        if piece != previous:
            if piece in scores:
                raise _more_than_an_order(path, piece)
            scores[piece] = -float(len(scores))
        n_merges[piece] += 1
        previous = piece
    for piece in vocab.keys() - BYTES.keys():
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        n_ways = sum(left in vocab and right in vocab for left, right in halves)
        if n_ways != n_merges[piece]:
            raise _more_than_an_order(path, piece)
    return {piece: scores.get(piece, -float(len(scores))) for piece in vocab}


def _more_than_an_order(path: Path, piece: str) -> ConversionError:
    return ConversionError(
        f"the merges of {path} are no order of pieces (see {piece!r}), so that llama.cpp would cut "
        "text otherwise; put the tokenizer.model that it was made from beside it"
    )
