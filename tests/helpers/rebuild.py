"""Tokenizers as Hugging Face folders, rebuilt from what GGUF files hold, and as GGUF files again.

The folder of a GGUF has what its publisher's checkpoint had, as far as ids depend on it: the
vocabulary, the merges or scores, the added tokens and the known steps before BPE.
"""

import json
import struct
from contextlib import contextmanager

from gguf import GGUFWriter, TokenType

from trimix_gguf.convert.tokenizer import read_tokenizer
from trimix_gguf.convert.tokenizer_bpe import LLAMA3_SPLIT, QWEN2_SPLIT, QWEN35_SPLIT
from trimix_gguf.machine.native import lib as llama_cpp

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
TO_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
FROM_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def split(regex):
    """A tokenizer.json's pre_tokenizer: cut by `regex`, then map bytes to letters."""
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return sequence(cut, BYTE_LEVEL | {"use_regex": False})


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def prepend(text, source):
    """The post_processor that puts the token `text` in front."""
    special, sequence = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A"}}
    sequence["Sequence"]["type_id"] = 0
    ids = {"id": text, "ids": [source.texts.index(text)], "tokens": [text]}
    pair = [special, sequence, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": [special, sequence], "pair": pair}
    return template | {"special_tokens": {text: ids}}


PRE = {
    "gpt-2": BYTE_LEVEL | {"use_regex": True},
    "smollm": sequence(DIGITS, BYTE_LEVEL | {"use_regex": True}),
    "qwen2": split(QWEN2_SPLIT),
    "qwen35": split(QWEN35_SPLIT),
    "llama-bpe": split(LLAMA3_SPLIT),
}


class Source:
    """The tokenizer of a GGUF: [n_vocab] texts, types and scores, merges, settings."""

    def __init__(self, file):
        def read(key):
            return file.array(f"tokenizer.ggml.{key}") or []

        self.metadata = file.metadata
        self.texts = [text.decode() for text in read("tokens")]
        self.types = [TokenType(kind) for kind in read("token_type")]
        self.merges = [merge.decode() for merge in read("merges")]
        self.scores = read("scores")
        self.pre = self.setting("pre")
        self.config = {"vocab_size": len(self.texts)}

    def setting(self, key):
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def vocab(self):
        """tokenizer.json's vocabulary, where SentencePiece spells spaces as it does in pieces."""
        spell = SPACE if self.setting("model") == "llama" else " "
        pairs = enumerate(zip(self.texts, self.types, strict=True))
        return {
            text.replace(" ", spell): id_ for id_, (text, kind) in pairs if kind != TokenType.UNUSED
        }

    def added(self, *, kinds=(TokenType.CONTROL, TokenType.USER_DEFINED)):
        """tokenizer.json's added_tokens."""
        flags = ("normalized", "single_word", "lstrip", "rstrip")
        return [
            {"id": id_, "content": text, "special": self.types[id_] != TokenType.USER_DEFINED}
            | dict.fromkeys(flags, False)
            for text, id_ in self.vocab().items()
            if self.types[id_] in kinds
        ]

    def write_settings(self, folder, **settings):
        for role, key in ROLES.items():
            id_ = self.setting(f"{key}_token_id")
            settings[f"{role}_token"] = None if id_ is None else self.texts[id_]
        settings["add_bos_token"] = self.setting("add_bos_token")
        settings["chat_template"] = self.metadata.get("tokenizer.chat_template")
        write_json(folder / "tokenizer_config.json", settings)


def byte_level_folder(source, folder):
    """Qwen, SmolLM2 and Llama 3: tokenizer.json and tokenizer_config.json."""
    bos = source.texts[source.setting("bos_token_id")]
    adds_bos = source.setting("add_bos_token") or source.pre == "llama-bpe"
    tokenizer = {
        "version": "1.0",
        "added_tokens": source.added(),
        "normalizer": {"type": "NFC"} if "qwen" in source.pre else None,
        "pre_tokenizer": PRE[source.pre],
        "post_processor": prepend(bos, source) if adds_bos else BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": source.vocab(),
            "merges": source.merges,
            "ignore_merges": source.pre == "llama-bpe",
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    source.write_settings(folder)


def sentencepiece_folder(source, folder):
    """Gemma and Llama 2: tokenizer.model, and the added tokens in tokenizer_config.json."""
    unknown = source.texts[source.setting("unknown_token_id")]
    core = {source.texts[source.setting(f"{role}_token_id")] for role in ("bos", "eos")}
    pieces = []
    for text, kind, score in zip(source.texts, source.types, source.scores, strict=True):
        if text == unknown:
            kind = TokenType.UNKNOWN
        elif kind == TokenType.CONTROL and text not in core:
            kind = TokenType.USER_DEFINED
        pieces.append((text.replace(" ", SPACE), score, kind))
    prefix = source.setting("add_space_prefix") is not False
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces, add_dummy_prefix=prefix))
    source.write_settings(folder, added_tokens_decoder={a["id"]: a for a in source.added()})


def sentencepiece_json_folder(source, folder):
    """The same as a tokenizer.json alone, with merges instead of scores."""
    prefix = source.setting("add_space_prefix") is not False
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    unknown = source.texts[source.setting("unknown_token_id")]
    vocab, mergeable = source.vocab(), (TokenType.NORMAL, TokenType.USER_DEFINED)
    pieces = [text for text, id_ in vocab.items() if source.types[id_] in mergeable]
    tokenizer = sentencepiece_json(
        vocab, merges_of(pieces), unknown, prefix=prefix, added=source.added(kinds=kinds)
    )
    write_json(folder / "tokenizer.json", tokenizer)
    source.write_settings(folder)


def merges_of(pieces):
    """The merges that make `pieces`, which come best first: all the ways to make each."""
    known = set(pieces)
    return [
        [piece[:i], piece[i:]]
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]


def sentencepiece_json(vocab, merges, unknown, *, prefix, added):
    """SentencePiece's BPE as transformers writes it for Gemma, or with `prefix` for Llama 2."""
    steps = [{"type": "Prepend", "prepend": SPACE}, FROM_SPACE]
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps} if prefix else FROM_SPACE,
        "pre_tokenizer": None if prefix else cut | {"invert": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [TO_SPACE, {"type": "ByteFallback"}]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def sentencepiece_model(pieces, *, add_dummy_prefix, normalizer=b"", trainer=b""):
    """A SentencePiece ModelProto of (text, score, type): BPE and no normalization.

    `normalizer` and `trainer` are fields that add to those or take their place.
    """
    message = []
    for text, score, kind in pieces:
        piece = field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
        message.append(field(1, piece + field(3, int(kind))))
    unknown = next(i for i, (_, _, kind) in enumerate(pieces) if kind == TokenType.UNKNOWN)
    bpe = field(3, 2) + field(35, 1) + field(40, unknown)
    identity = field(1, b"identity") + field(4, 0)
    if not add_dummy_prefix:  # true where it is left out
        identity += field(3, 0)
    return b"".join([*message, field(2, bpe + trainer), field(3, identity + normalizer)])


def field(number, value):
    """One protobuf field: an int as a varint, bytes with their length in front."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(folder, name="tokenizer.json", **changes):
    write_json(folder / name, read_json(folder / name) | changes)


def convert(folder, config):
    return write_gguf(read_tokenizer(folder, config), folder / "vocab.gguf")


def write_gguf(metadata, path):
    """Write a GGUF that holds a vocabulary alone."""
    writer = GGUFWriter(path, "llama")
    metadata.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@contextmanager
def tokenizer_of(path):
    """Yield tokenize(text, parse_special) of llama.cpp for the vocabulary in a GGUF."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refused {path}"
    vocab = llama_cpp.llama_model_get_vocab(model)
    buffer = (llama_cpp.llama_token * 5000)()

    def tokenize(text, parse_special):
        raw = text.encode()
        n = llama_cpp.llama_tokenize(
            vocab, raw, len(raw), buffer, len(buffer), False, parse_special
        )
        return buffer[:n]

    yield tokenize
    llama_cpp.llama_model_free(model)
