"""Added tokens: those that are cut out of a text before anything else.

transformers and llama.cpp look for them in different ways. What would give other ids is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimix_gguf.errors import ConversionError

from .checkpoint import read_json

SPACE = "▁"  # how SentencePiece spells a space
# Comparing all ways in which tokens overlap takes time; Gemma's runs of spaces do in 200.
MOST_LETTERS, MOST_MEETINGS = 128, 1000
Entry = Mapping[str, Any]  # of tokenizer.json's added_tokens: id, content, special, …


def read_entries(
    folder: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """The added tokens of a folder's files, by id.

    An entry of tokenizer.json goes before one of tokenizer_config.json.
    """
    entries: dict[int, dict[str, Any]] = {}
    path = folder / "added_tokens.json"
    if path.is_file():
        entries |= {id_: {"content": text} for text, id_ in read_json(path).items()}
    decoder = settings.get("added_tokens_decoder") or {}
    if wrong := next((id_ for id_ in decoder if not id_.isdecimal() or len(id_) > 9), None):
        raise ConversionError(f"{folder}/tokenizer_config.json has the token id {wrong[:40]!r}")
    entries |= {int(id_): entry for id_, entry in decoder.items()}
    return entries | {entry["id"]: entry for entry in tokenizer.get("added_tokens") or []}


def check_entries(folder: Path, entries: Mapping[int, Entry]) -> None:
    """Raise ConversionError for tokens that llama.cpp would match in other places."""
    for entry in entries.values():
        if entry.get("single_word"):
            raise ConversionError(
                f"the tokenizer of {folder} matches {entry['content']!r} only as a whole word "
                "(single_word), which llama.cpp cannot; set it to false if ids may differ"
            )
        if not 0 < len(entry["content"]) <= MOST_LETTERS:
            raise ConversionError(
                f"the tokenizer of {folder} has an added token of {len(entry['content'])} letters, "
                f"expected 1 to {MOST_LETTERS}"
            )
    strips = [e for e in entries.values() if e.get("lstrip") or e.get("rstrip")]
    spaced = [e for e in entries.values() if e["content"].strip() != e["content"]]
    if strips and spaced:
        raise ConversionError(
            f"the tokenizer of {folder} has {strips[0]['content']!r}, which takes the spaces "
            f"beside it, and {spaced[0]['content']!r}, which has one at its end; remove one of them"
        )
    by_text = {entry["content"]: _is_normalized(entry) for entry in entries.values()}
    for n, text in enumerate(_meetings(by_text)):
        if n == MOST_MEETINGS:
            raise ConversionError(f"too many added tokens of {folder} overlap each other")
        first = {t for t, normalized in by_text.items() if not normalized}
        theirs = _leftmost(text, first)
        theirs = [
            part
            for piece in theirs
            for part in ([piece] if piece in first else _leftmost(piece, by_text))
        ]
        if theirs != _longest_first(text, by_text):
            raise ConversionError(
                f"added tokens of {folder} overlap in {text!r}, where llama.cpp would cut them in "
                "another way than transformers; remove one of them"
            )


def check_spelled(
    path: Path, entries: Iterable[Entry], *, prefix: bool, mergeable: Collection[str]
) -> None:
    """Raise ConversionError for tokens that SentencePiece's spelling of spaces changes.

    transformers spells spaces as ▁, with one more in front where `prefix`, before it looks for
    the tokens that are "normalized"; llama.cpp looks first. `mergeable` are the pieces that
    merges make: for them it comes to the same.
    """
    for entry in entries:
        text, spaces = entry["content"], SPACE in entry["content"] or " " in entry["content"]
        strips = entry.get("lstrip") or entry.get("rstrip")
        if _is_normalized(entry) and (prefix or spaces or strips):
            raise ConversionError(
                f"{path} looks for its token {text!r} in text whose spaces are spelled as {SPACE} "
                '("normalized"), which llama.cpp does not; put the tokenizer.model beside it, or '
                "set normalized to false if ids may differ"
            )
        if SPACE in text and text not in mergeable:
            raise ConversionError(
                f"{path} has the token {text!r}, which no merge makes; llama.cpp would find it in "
                "spaces, and transformers does not"
            )


def _is_normalized(entry: Entry) -> bool:
    """Whether transformers looks for it only after those that are not."""
    return bool(entry.get("normalized", not entry.get("special")))


def _meetings(texts: Collection[str]) -> Iterator[str]:
    """The texts in which two tokens overlap: one's end is the other's beginning, or inside it."""
    by_start: dict[str, list[str]] = {}
    for text in texts:
        for n in range(1, len(text) + 1):
            by_start.setdefault(text[:n], []).append(text)
    seen = set()
    for text in texts:
        for start in range(len(text)):
            for other in by_start.get(text[start:], ()):
                if (start or other != text) and (whole := text[:start] + other) not in seen:
                    seen.add(whole)
                    yield whole
        for start in range(1, len(text)):
            for end in range(start + 1, len(text)):
                if text[start:end] in texts and text not in seen:
                    seen.add(text)
                    yield text


def _leftmost(text: str, tokens: Collection[str]) -> list[str]:
    """Cut as transformers does: at each place the longest token, from left to right."""
    parts, at, plain = [], 0, 0
    longest = max(map(len, tokens), default=0)
    while at < len(text):
        sizes = range(min(longest, len(text) - at), 0, -1)
        size = next((n for n in sizes if text[at : at + n] in tokens), 0)
        if size:
            parts += [text[plain:at]] * (plain < at) + [text[at : at + size]]
            plain = at = at + size
        else:
            at += 1
    return parts + [text[plain:]] * (plain < len(text))


def _longest_first(text: str, tokens: Collection[str]) -> list[str]:
    """Cut as llama.cpp does: the longest token wherever it is, then the next one in the rest."""
    parts = [(text, False)]
    for token in sorted(tokens, key=lambda t: -len(t.encode())):
        cut = []
        for part, done in parts:
            pieces = [part] if done else part.split(token)
            for i, piece in enumerate(pieces):
                cut += [(token, True)] * (i > 0) + [(piece, done)] * bool(piece)
        parts = cut
    return [part for part, _ in parts]
