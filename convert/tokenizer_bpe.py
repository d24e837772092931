"""Byte-level BPE (Llama 3, SmolLM2, Qwen): tokens, merges and llama.cpp's pre-tokenizer."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from trimix_gguf.errors import ConversionError

from .tokens import Found, Token, Vocabulary, flat_steps, list_tokens, without_rows

DIGIT_SPLIT = r"\p{N}"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regexes that cut the text before BPE -> the name llama.cpp knows them by.
PRE_BY_SPLIT: dict[tuple[str | None, ...], str] = {
    (GPT2_SPLIT,): "gpt-2",
    (DIGIT_SPLIT, GPT2_SPLIT): "smollm",
    (QWEN2_SPLIT,): "qwen2",
    (QWEN35_SPLIT,): "qwen35",
    (LLAMA3_SPLIT,): "llama-bpe",
}
# What src/llama-vocab.cpp of llama.cpp knows, less the names that are not byte-level.
KNOWN_PRE = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r
    dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4
    f2llmv2 falcon falcon-h1 falcon3 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling
    granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es
    jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo
    laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b
    minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe
    seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken
    tiny_aya trillion ufakzeka viking youtu
"""


def read_byte_level_bpe(found: Found, pre: str | None) -> Vocabulary:
    """Read a tokenizer.json; `pre` names the pre-tokenizer instead of recognising it."""
    path, tokenizer, added, n_vocab = found
    model = tokenizer["model"]
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ConversionError(
                f"{path} marks words by {option}, which llama.cpp cannot do; "
                "expected byte-level BPE without it"
            )
    normalizer = _read_normalizer(path, tokenizer.get("normalizer"))
    _check_bytes(path, tokenizer)
    if normalizer == "nfc":
        for token in added.values():
            if not unicodedata.is_normalized("NFC", token.text):
                raise ConversionError(
                    f"{path} normalizes text to NFC, in which its token {token.text!r} is not; "
                    "llama.cpp would never find it"
                )
    pre = _recognise_pre(path, tokenizer) if pre is None else _check_pre(pre)
    entries = {id_: Token(text, TokenType.NORMAL) for text, id_ in model["vocab"].items()}
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=list_tokens(path, {**entries, **without_rows(added, n_vocab)}, n_vocab),
        merges=[" ".join(pair) for pair in read_merges(path, model)],
        normalizer=normalizer,
    )


def _check_bytes(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Raise ConversionError unless each text becomes pieces of bytes, and only by the merges."""
    model = tokenizer["model"]
    if model.get("dropout"):
        raise ConversionError(f"{path} drops merges at random (dropout); set it to null")
    steps = flat_steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel":
        raise ConversionError(
            f"{path} cuts text by {', '.join(map(str, kinds)) or 'nothing'}, expected ByteLevel as "
            "the last step; only byte-level BPE can be converted"
        )
    if steps[-1].get("add_prefix_space", True):
        raise ConversionError(
            f"{path} puts a space in front of text (add_prefix_space), which llama.cpp does not do "
            "for byte-level BPE; set it to false if ids may differ"
        )
    lacking = [letter for letter in byte_letters() if letter not in model["vocab"]]
    if model.get("unk_token") is not None and lacking:
        raise ConversionError(
            f"{path} has no token {lacking[0]!r} and spells such bytes as {model['unk_token']!r}, "
            "which llama.cpp does not do"
        )


def byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's alphabet, [256]."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def read_merges(path: Path, model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges, best first: older files store each as "a b", newer ones as the pair."""
    merges: dict[tuple[str, str], None] = {}
    for merge in model.get("merges", []):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not all(pair) or any(" " in part for part in pair):
            raise ConversionError(f"{path} has the merge {merge!r}, expected two pieces")
        if (known := (pair[0], pair[1])) in merges:
            raise ConversionError(
                f"{path} has the merge {' '.join(pair)!r} twice; download it again"
            )
        merges[known] = None
    return list(merges)


def _read_normalizer(path: Path, normalizer: Mapping[str, Any] | None) -> str:
    """What is done to a text first: "none" or "nfc". llama.cpp does nothing, so trio/model.py does.

    Most text is in NFC, but not all: Bengali and Tibetan letters are often typed composed, which
    NFC takes apart.
    """
    steps = flat_steps(normalizer, "normalizers")
    for step in steps:
        if step.get("type") != "NFC":
            raise ConversionError(
                f"{path} normalizes text with {step.get('type')}, which llama.cpp cannot do; "
                "expected no normalizer, or NFC"
            )
    return "nfc" if steps else "none"


def _check_pre(pre: str) -> str:
    known = KNOWN_PRE.split()
    if pre in known:
        return pre
    close = difflib.get_close_matches(pre, known, n=4, cutoff=0.4)
    close = close or sorted(PRE_BY_SPLIT.values())
    raise ConversionError(
        f"llama.cpp knows no pre-tokenizer {pre!r} of byte-level BPE; "
        f"names near it: {', '.join(close)}"
    )


def _recognise_pre(path: Path, tokenizer: Mapping[str, Any]) -> str:
    steps = flat_steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    name = PRE_BY_SPLIT.get(tuple(regex for step in steps for regex in _regexes(step)))
    ignores_merges = tokenizer["model"].get("ignore_merges")
    if name == "llama-bpe":
        # The same regex; but llama-bpe takes a word that is a token whole, whatever the merges.
        return "dbrx" if ignores_merges is False else name
    if name is None or ignores_merges:
        known = ", ".join(sorted(PRE_BY_SPLIT.values()))
        raise ConversionError(
            f"the pre-tokenizer of {path} is none of {known}; "
            "name the one that llama.cpp should use with --pre"
        )
    return name


def _regexes(step: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The regexes that a step applies; None for one that no table entry can mean."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return (GPT2_SPLIT,) if step.get("use_regex", True) else ()
    if kind == "Digits" and step.get("individual_digits"):
        return (DIGIT_SPLIT,)
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return (step.get("pattern", {}).get("Regex"),)
    return (None,)
