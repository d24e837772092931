"""tokenizer.json (byte-level BPE) as GGUF tokenizer metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from trimix_gguf.errors import ConversionError

from .checkpoint import read_json

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regexes that cut the text before BPE -> the name llama.cpp knows them by.
PRE_BY_SPLIT = {
    (GPT2_SPLIT,): "gpt-2",
    (QWEN2_SPLIT,): "qwen2",
    (LLAMA3_SPLIT,): "llama-bpe",
}


@dataclass(frozen=True)
class TokenizerMetadata:
    """What a GGUF says of its tokenizer; `tokens` and `types` are [n_vocab]."""

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    bos_id: int
    eos_id: int
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add every tokenizer key to `writer`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos_id)
        writer.add_eos_token_id(self.eos_id)
        if self.pad_id is not None:
            writer.add_pad_token_id(self.pad_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(
    folder: Path, config: dict[str, Any], *, pre: str | None = None
) -> TokenizerMetadata:
    """Read the tokenizer of a checkpoint folder whose config.json is `config`.

    `pre` names the pre-tokenizer for llama.cpp instead of recognising it. Raises ConversionError.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConversionError(
            f"{path} is a {model.get('type')} tokenizer, expected byte-level BPE; "
            "only byte-level BPE can be converted"
        )
    _check_normalizer(path, tokenizer.get("normalizer"))
    recognised = _recognise_pre(path, tokenizer.get("pre_tokenizer"), pre)
    tokens, types = _list_tokens(path, tokenizer, int(config["vocab_size"]))
    ids = {text: id_ for id_, text in enumerate(tokens)}

    eos_id = _special_id("eos", settings, config, ids)
    if eos_id is None:
        raise ConversionError(
            f"neither {settings_path.name} nor config.json names an end-of-sequence token; "
            "set eos_token in tokenizer_config.json"
        )
    bos_id = _special_id("bos", settings, config, ids)
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        add_bos = bos_id is not None and _prepends(tokenizer.get("post_processor"), tokens[bos_id])
    if add_bos and bos_id is None:
        raise ConversionError(
            f"{settings_path} asks for a BOS token but names none; set bos_token there"
        )
    return TokenizerMetadata(
        pre=recognised,
        tokens=tokens,
        types=types,
        merges=[_merge_text(path, merge) for merge in model.get("merges", [])],
        # Without the key llama.cpp takes id 11, an ordinary token, for BOS.
        bos_id=eos_id if bos_id is None else bos_id,
        eos_id=eos_id,
        pad_id=_special_id("pad", settings, config, ids),
        add_bos=bool(add_bos),
        add_eos=bool(settings.get("add_eos_token", False)),
        chat_template=_read_chat_template(folder, settings),
    )


def _check_normalizer(path: Path, normalizer: dict[str, Any] | None) -> None:
    # NFC passes: llama.cpp has no normalizer, and text is nearly always in NFC already.
    if normalizer is None or normalizer.get("type") == "NFC":
        return
    if normalizer.get("type") == "Sequence":
        for part in normalizer.get("normalizers", []):
            _check_normalizer(path, part)
        return
    raise ConversionError(
        f"{path} normalizes text with {normalizer.get('type')}, which llama.cpp cannot do; "
        "expected no normalizer, or NFC"
    )


def _recognise_pre(path: Path, pre_tokenizer: dict[str, Any] | None, pre: str | None) -> str:
    if pre is not None:
        return pre
    splits = _splits(pre_tokenizer)
    if splits is None or splits not in PRE_BY_SPLIT:
        known = ", ".join(sorted(PRE_BY_SPLIT.values()))
        raise ConversionError(
            f"the pre-tokenizer of {path} is none of {known}; "
            "name the one that llama.cpp should use with pre="
        )
    return PRE_BY_SPLIT[splits]


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Return the regexes applied in turn, or None for a step that no table entry can mean."""
    if pre_tokenizer is None:
        return None
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = [_splits(part) for part in pre_tokenizer.get("pretokenizers", [])]
        if not parts or any(part is None for part in parts):
            return None
        return tuple(regex for part in parts if part is not None for regex in part)
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space", True):
        return (GPT2_SPLIT,) if pre_tokenizer.get("use_regex", True) else ()
    if kind == "Split" and pre_tokenizer.get("behavior") == "Isolated":
        regex = pre_tokenizer.get("pattern", {}).get("Regex")
        return (regex,) if regex and not pre_tokenizer.get("invert") else None
    return None


def _list_tokens(
    path: Path, tokenizer: dict[str, Any], n_vocab: int
) -> tuple[list[str], list[TokenType]]:
    """Return text and type for ids 0 .. n_vocab - 1; ids that no token has are padding."""
    entries = {id_: (text, TokenType.NORMAL) for text, id_ in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        entries[added["id"]] = (added["content"], kind)
    last = max(entries, default=-1)
    if last >= n_vocab:
        raise ConversionError(
            f"{path} has token id {last}, but vocab_size in config.json is {n_vocab}; "
            "the tokenizer belongs to another model"
        )
    listed = [entries.get(id_, (f"[PAD{id_}]", TokenType.UNUSED)) for id_ in range(n_vocab)]
    return [text for text, _ in listed], [kind for _, kind in listed]


def _merge_text(path: Path, merge: Any) -> str:
    """Return a merge as "a b": older files store that string, newer ones the pair."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2 or not all(pair) or any(" " in part for part in pair):
        raise ConversionError(f"{path} has the merge {merge!r}, expected two byte-level pieces")
    return " ".join(pair)


def _special_id(
    role: str, settings: dict[str, Any], config: dict[str, Any], ids: dict[str, int]
) -> int | None:
    token = settings.get(f"{role}_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None:
        if text not in ids:
            raise ConversionError(
                f"{role}_token {text!r} of tokenizer_config.json is not in tokenizer.json; "
                "the two belong to different models"
            )
        return ids[text]
    id_ = config.get(f"{role}_token_id")
    if isinstance(id_, list):  # several ends of generation: the first is the main one
        id_ = id_[0] if id_ else None
    return id_ if isinstance(id_, int) and 0 <= id_ < len(ids) else None


def _prepends(processor: dict[str, Any] | None, text: str) -> bool:
    """Tell whether the post-processor puts the token `text` before a single sequence."""
    if processor is None:
        return False
    if processor.get("type") == "Sequence":
        return any(_prepends(part, text) for part in processor.get("processors", []))
    single = processor.get("single") or []
    first = single[0] if isinstance(single, list) and single else {}
    return processor.get("type") == "TemplateProcessing" and (
        first.get("SpecialToken", {}).get("id") == text
    )


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # named templates: GGUF's main key holds the default one
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
