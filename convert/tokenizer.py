"""A checkpoint's tokenizer as GGUF metadata: vocabulary, special ids, chat template.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.vocabulary import END_IDS, NORMALIZER, STRIPPING, usual_normalizer

from .added_tokens import read_entries
from .checkpoint import check_inside, read_json, read_text
from .tokenizer_bpe import read_byte_level_bpe
from .tokenizer_spm import read_sentencepiece, read_sentencepiece_json
from .tokens import Found, Token, Vocabulary, flat_steps, read_added_tokens

ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
# One template, or several: {"name": ..., "template": ...}.
ChatTemplate = str | list[dict[str, str]]


@dataclass(frozen=True)
class TokenizerMetadata:
    """What a GGUF says of its tokenizer; `special_ids` holds an id by role ("bos", "pad", ...)."""

    vocabulary: Vocabulary
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: ChatTemplate | None
    end_ids: tuple[int, ...] = ()  # beside "eos", by config.json and generation_config.json
    stripping: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # ids by STRIPPING

    @property
    def tokens(self) -> list[str]:
        """The text of every id."""
        return [token.text for token in self.vocabulary.tokens]

    @property
    def types(self) -> list[TokenType]:
        """The type of every id."""
        return [token.type for token in self.vocabulary.tokens]

    def write(self, writer: GGUFWriter) -> None:
        """Add every tokenizer key to `writer`."""
        vocabulary = self.vocabulary
        writer.add_tokenizer_model(vocabulary.model)
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if vocabulary.merges is None:
            writer.add_token_scores([token.score for token in vocabulary.tokens])
        else:
            writer.add_token_merges(vocabulary.merges)
        if vocabulary.add_space_prefix is not None:
            writer.add_add_space_prefix(vocabulary.add_space_prefix)
        for role, id_ in self.special_ids.items():
            getattr(writer, f"add_{role}_token_id")(id_)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
        # What GGUF has no key for; trio/model.py reads these.
        if self.end_ids:
            writer.add_array(END_IDS, list(self.end_ids))
        for flag, ids in self.stripping.items():
            if ids:
                writer.add_array(STRIPPING[flag], list(ids))
        if vocabulary.normalizer != usual_normalizer(vocabulary.pre):
            writer.add_string(NORMALIZER, vocabulary.normalizer)


def read_tokenizer(
    folder: Path, config: dict[str, Any], *, pre: str | None = None
) -> TokenizerMetadata:
    """Read the tokenizer of a checkpoint folder whose config.json is `config`.

    `pre` names the pre-tokenizer for llama.cpp instead of recognising it. Raises ConversionError.
    """
    tokenizer = _read_optional_json(folder / "tokenizer.json")
    settings = _read_optional_json(folder / "tokenizer_config.json")
    vocabulary = _read_vocabulary(folder, tokenizer, settings, int(config["vocab_size"]), pre)
    special_ids = _find_special_ids(vocabulary.tokens, settings, config)
    ends = _end_ids(folder, config, len(vocabulary.tokens)) - {special_ids["eos"]}
    _check_post_processor(folder, tokenizer.get("post_processor"))
    texts = {role: vocabulary.tokens[id_].text for role, id_ in special_ids.items()}
    add_bos = _adds("bos", texts.get("bos"), tokenizer, settings, vocabulary.model == "llama")
    if add_bos and "bos" not in special_ids:
        raise ConversionError(
            f"prompts begin with a BOS token by the tokenizer of {folder}, but no file names it; "
            "set bos_token in tokenizer_config.json"
        )
    # Without the key llama.cpp takes some ordinary token for BOS.
    special_ids.setdefault("bos", special_ids["eos"])
    return TokenizerMetadata(
        vocabulary=vocabulary,
        special_ids=special_ids,
        add_bos=add_bos,
        add_eos=_adds("eos", texts["eos"], tokenizer, settings, False),
        chat_template=_read_chat_template(folder, settings),
        end_ids=tuple(sorted(ends)),
        stripping=_read_stripping(folder, tokenizer, settings, len(vocabulary.tokens)),
    )


def _read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_vocabulary(
    folder: Path,
    tokenizer: dict[str, Any],
    settings: dict[str, Any],
    n_vocab: int,
    pre: str | None,
) -> Vocabulary:
    """Choose the reader: tokenizer.model comes first, except beside byte-level BPE.

    Llama 3's tokenizer.model is not a SentencePiece model, but another form of its tokenizer.json.
    """
    path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    model = tokenizer.get("model") or {}
    own = model.get("type") == "BPE" and not model_path.is_file()
    if own and not isinstance(model.get("vocab"), dict):
        raise ConversionError(f"{path} has no vocabulary; download it again")
    found = Found(path, tokenizer, read_added_tokens(folder, tokenizer, settings), n_vocab)
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        if settings.get("add_prefix_space"):
            raise ConversionError(
                f"{folder} puts a space in front of text (add_prefix_space), which llama.cpp does "
                "not do for byte-level BPE; set it to false if ids may differ"
            )
        return read_byte_level_bpe(found, pre)
    if pre is not None:
        raise ConversionError(
            f"a pre-tokenizer (--pre {pre}) is for byte-level BPE, which {folder} does not hold; "
            "leave it out"
        )
    if model_path.is_file():
        prefix = settings.get("add_prefix_space")  # transformers lets it overrule the file
        return read_sentencepiece(found._replace(path=model_path), prefix)
    if not tokenizer:
        raise ConversionError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model; download one of them"
        )
    if model.get("type") != "BPE":
        raise ConversionError(
            f"{path} is a {model.get('type')} tokenizer, expected byte-level BPE or "
            "SentencePiece's BPE; no other kind can be converted"
        )
    return read_sentencepiece_json(found)


def _read_stripping(
    folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any], n_tokens: int
) -> dict[str, tuple[int, ...]]:
    """The ids of added tokens that take the spaces on one side with them."""
    entries = read_entries(folder, tokenizer, settings)
    return {
        flag: tuple(sorted(i for i, e in entries.items() if e.get(flag) and i < n_tokens))
        for flag in STRIPPING
    }


def _end_ids(folder: Path, config: dict[str, Any], n_tokens: int) -> set[int]:
    """Every id that ends a text for transformers: config.json and generation_config.json."""
    found: set[int] = set()
    for settings in (config, _read_optional_json(folder / "generation_config.json")):
        ids = settings.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        found |= {i for i in ids if type(i) is int and 0 <= i < n_tokens}
    return found


def _find_special_ids(
    tokens: list[Token], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    ids = {token.text: id_ for id_, token in enumerate(tokens)}
    found: dict[str, int] = {}
    for role in ROLES:
        text = settings.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text is not None and text not in ids and role in ("bos", "eos"):
            raise ConversionError(
                f"{role}_token {text!r} of tokenizer_config.json is not in the tokenizer; "
                "the two belong to different models"
            )
        id_ = ids.get(text) if text is not None else config.get(f"{role}_token_id")
        if isinstance(id_, list):  # several ends of generation: the first is the main one
            id_ = id_[0] if id_ else None
        if isinstance(id_, int) and 0 <= id_ < len(tokens):
            found[role] = id_
    unknown = (id_ for id_, token in enumerate(tokens) if token.type == TokenType.UNKNOWN)
    if "unk" not in found and (id_ := next(unknown, None)) is not None:
        found["unk"] = id_
    if "eos" not in found:
        raise ConversionError(
            "neither tokenizer_config.json nor config.json names an end-of-sequence token; "
            "set eos_token in tokenizer_config.json"
        )
    return found


def _adds(
    role: str,
    text: str | None,
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    default: bool,
) -> bool:
    """Tell whether a prompt gets the token `text` in front ("bos") or behind ("eos").

    The post-processor says what really happens; a setting that disagrees is not in force.
    """
    processor = tokenizer.get("post_processor")
    if processor is not None:
        return text is not None and text in _template_ends(processor, 0 if role == "bos" else -1)
    setting = settings.get(f"add_{role}_token")
    return default if setting is None else bool(setting)


def _check_post_processor(folder: Path, processor: Mapping[str, Any] | None) -> None:
    """Raise ConversionError for one that does more than a token in front and one behind."""
    for step in flat_steps(processor, "processors"):
        kind, kinds = step.get("type"), ""
        if kind == "TemplateProcessing":
            single = step.get("single") or []
            kinds = "".join("S" if "SpecialToken" in item else "A" for item in single)
        if kind != "ByteLevel" and kinds not in ("A", "SA", "AS", "SAS"):
            raise ConversionError(
                f"the tokenizer of {folder} adds by {kind} what llama.cpp cannot add; "
                "expected a BOS token in front, an EOS token behind, or neither"
            )


def _template_ends(processor: Mapping[str, Any], at: int) -> set[str]:
    """Return the special tokens that a post-processor puts first (at = 0) or last (at = -1)."""
    steps = flat_steps(processor, "processors")
    templates = [step.get("single") for step in steps if step.get("type") == "TemplateProcessing"]
    ends = [items[at].get("SpecialToken") for items in templates if items]
    return {special["id"] for special in ends if special}


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        template = read_text(path)
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        for other in others:
            check_inside(folder, other)
        named = {"default": template} | {p.stem: read_text(p) for p in others}
        if others:
            return [{"name": name, "template": text} for name, text in named.items()]
        return template
    found = settings.get("chat_template")
    if found is None:  # processors of image models keep theirs in a file of its own
        found = _read_optional_json(folder / "chat_template.json").get("chat_template")
    return found
