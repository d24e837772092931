"""The law of tokenizers: for any tokenizer and text, ids are transformers' or it is refused."""

import json
import random
import unicodedata
from contextlib import closing

import numpy as np
import pytest
from gguf import TokenType
from rebuild import (
    BYTE_LEVEL,
    DIGITS,
    FROM_SPACE,
    PRE,
    SPACE,
    merges_of,
    sentencepiece_model,
    sequence,
    write_json,
)  # fmt: skip

from trimix_gguf.convert.checkpoint import StoredTensor, write_safetensors
from trimix_gguf.convert.hf import convert_hf
from trimix_gguf.convert.tokenizer import read_tokenizer
from trimix_gguf.convert.tokenizer_bpe import byte_letters
from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.loading import Loading
from trimix_gguf.trio.model import Model

tokenizers = pytest.importorskip("tokenizers", reason="the oracle is Hugging Face's tokenizers")

LETTERS = byte_letters()
WORDS = ["й", "и\u0306", "Қазақ", "қала", "дом", "домик", "ё", "\u09df", "\u09a1\u09bc", "ো",
         "the", "don't", "'S", "I'LL", "12", "٣", "2024", "x_", "—",
         ",", ".", "汉字", "🙂", "½", "ﬁ"]  # fmt: skip
GAPS = ["", " ", "  ", "\n", " \n", "\t", "\r\n\n", "\xa0", "   "]
MARKS = ["<|end|>", "<pad>", "<x>", "дом", "the", "[A]", "[A]B", "]B[", " x", "ab", "bc", "▁▁"]
NORMALIZERS = [*[None, {"type": "NFC"}] * 4, {"type": "NFD"}, {"type": "Lowercase"},
               {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
               {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "StripAccents"}]},
               {"type": "Strip", "strip_left": True, "strip_right": False}]  # fmt: skip


def texts(rng, added):
    """Words, gaps and marks in any order, composed and taken apart."""
    for _ in range(60):
        parts = rng.choices([*WORDS, *added, *MARKS], k=rng.randint(0, 9))
        text = "".join(part + rng.choice(GAPS) for part in parts)
        yield (
            unicodedata.normalize(rng.choice(["NFC", "NFD"]), text) if rng.random() < 0.3 else text
        )


def merged(rng, units, n):
    """Units and `n` merges of them, as a vocabulary and its merges: what words are made of."""
    words = [[LETTERS[b] for b in f" {word}".encode()] for word in WORDS] if units else []
    vocab, merges = list(units), []
    for _ in range(n):
        pairs = sorted({pair for word in words for pair in zip(word, word[1:], strict=False)})
        if not pairs:
            break
        left, right = rng.choice(pairs)
        merges.append([left, right])
        if left + right not in vocab:
            vocab.append(left + right)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
                i += 1
    return {text: i for i, text in enumerate(vocab)}, merges


def added_tokens(rng, first, texts):
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    for i, text in enumerate(texts):
        entry = {"id": first + i, "content": text, "special": rng.random() < 0.5}
        odds = (0.03, 0.1, 0.1, 0.5)
        yield entry | {f: rng.random() < odd for f, odd in zip(flags, odds, strict=True)}


def byte_level(rng):
    """Any tokenizer.json of byte-level BPE; many are what no model has."""
    units = [x for x in LETTERS if rng.random() < 0.999]
    vocab, merges = merged(rng, units, rng.randint(0, 150))
    if rng.random() < 0.05 and merges:
        merges.append(rng.choice(merges))
    pre = dict(rng.choice(list(PRE.values())))
    if rng.random() < 0.1:
        pre = rng.choice([
            BYTE_LEVEL | {"use_regex": True, "add_prefix_space": True},
            sequence(BYTE_LEVEL | {"use_regex": False}, DIGITS),
            {"type": "Whitespace"}, sequence(*pre.get("pretokenizers", [pre]), pre), None,
        ])  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": None,
             "ignore_merges": rng.random() < 0.3, "fuse_unk": False}  # fmt: skip
    if rng.random() < 0.05:
        model["unk_token"] = LETTERS[65]
    return {"model": model, "pre_tokenizer": pre, "normalizer": rng.choice(NORMALIZERS)}


def write(folder, tokenizer, added, n_vocab):
    folder.mkdir(exist_ok=True)
    tokenizer |= {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    tokenizer |= {"added_tokens": added, "decoder": None}
    write_json(folder / "tokenizer.json", tokenizer)
    end = next(a["content"] for a in added if a["special"])
    write_json(folder / "tokenizer_config.json", {"eos_token": end, "bos_token": end})
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": n_vocab}
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}
    write_json(folder / "config.json", config | sizes | {"tie_word_embeddings": True})
    shapes = {"model.embed_tokens": (n_vocab, 32), "model.norm": (32,)}
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    shapes |= {f"model.layers.0.{name}": (32, 32) for name in layer}
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes |= {f"model.layers.0.{name}": (32,) for name in norms}
    path = folder / "model.safetensors"
    tensors = {f"{name}.weight": StoredTensor(path, 0, s, "F32") for name, s in shapes.items()}
    write_safetensors(path, tensors, lambda name: np.ones(tensors[name].shape, "f4"))


def sentencepiece(rng):
    """Any tokenizer.json of SentencePiece's BPE, with bytes for what no piece has."""
    letters = sorted(set("".join(WORDS)) | {SPACE})
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces = list(letters)
    for word in rng.choices(WORDS, k=rng.randint(0, 20)):
        for n in range(2, rng.randint(1, len(word)) + 2):
            pieces += [(SPACE + word)[:n]] * ((SPACE + word)[:n] not in pieces)
    merges = merges_of(pieces)
    vocab += pieces[len(letters) :]
    to_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = [[to_space], [prepend, to_space]] * 3 + [[to_space, {"type": "NFC"}], [prepend]]
    steps = rng.choice(steps)
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate(vocab)}, "merges": merges,
             "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}  # fmt: skip
    return {
        "model": model,
        "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": steps},
    }


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_ids_are_those_of_transformers_or_the_conversion_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMIX_SELF_TEST", "0")  # a child for each file would take minutes
    outcomes = {"same": 0, "refused": 0, "no tokenizer": 0}
    reasons = []
    for seed in range(80):
        rng = random.Random(seed)
        tokenizer = kind(rng)
        n = len(tokenizer["model"]["vocab"])
        marks = rng.sample(MARKS, rng.randint(0, 4))
        added = [{"id": n, "content": "</e>", "special": True, "normalized": False}]
        added = [a | dict.fromkeys(("single_word", "lstrip", "rstrip"), False) for a in added]
        added += added_tokens(rng, n + 1, marks)
        folder, out = tmp_path / f"{seed}", tmp_path / "x.gguf"
        write(folder, tokenizer, added, n + len(added))
        try:
            fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception:  # of no other class
            outcomes["no tokenizer"] += 1
            continue
        try:
            convert_hf(folder, out, type="f32", force=True)
        except ConversionError as error:
            outcomes["refused"] += 1
            reasons.append(str(error).replace(str(folder), ""))
            continue
        with closing(Model(out, Loading(n_ctx=64))) as model:
            for text in texts(rng, marks):
                ours = model.tokenize(model.normalize(text), special=True)
                theirs = fast.encode(text, add_special_tokens=False).ids
                facts = json.dumps({k: v for k, v in tokenizer.items() if k != "model"})
                assert ours == theirs, (seed, text, facts)
        outcomes["same"] += 1
    print(outcomes, *reasons, sep="\n")
    assert outcomes["same"] > 20, outcomes


# -- what each of these is, by itself -----------------------------------------------------------


@pytest.fixture
def model_of(tmp_path, monkeypatch):
    """model_of(tokenizer, *added, config…) -> the runtime's Model of a checkpoint with it."""
    monkeypatch.setenv("TRIMIX_SELF_TEST", "0")
    opened = []

    def make(made, *added, **files):
        n = len(made["model"]["vocab"])
        end = {"id": n, "content": "</e>", "special": True, "normalized": False}
        added = [end, *({"id": n + 1 + i, "special": False, **a} for i, a in enumerate(added))]
        write(tmp_path / "m", made, added, files.pop("n_vocab", n + len(added)))
        for name, changes in files.items():
            path = tmp_path / "m" / f"{name}.json"
            old = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            write_json(path, old | changes)
        convert_hf(tmp_path / "m", tmp_path / "x.gguf", type="f32", force=True)
        opened.append(Model(tmp_path / "x.gguf", Loading(n_ctx=64)))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


def gpt2(**changes):
    vocab, merges = merged(random.Random(0), LETTERS, 200)
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {"model": model, "pre_tokenizer": PRE["gpt-2"], "normalizer": None} | changes


@pytest.mark.parametrize(
    ("pre", "normalizer", "expected"),
    [("gpt-2", "NFC", "й"), ("gpt-2", None, "и\u0306"), ("qwen2", None, "и\u0306"),
     ("qwen2", "NFC", "й")],
)  # fmt: skip
def test_text_is_normalized_as_the_tokenizer_says(model_of, pre, normalizer, expected):
    """NFC was lost for all but Qwen's pre-tokenizer, and done for Qwen's even where it is not."""
    step = None if normalizer is None else {"type": normalizer}
    model = model_of(gpt2(pre_tokenizer=PRE[pre], normalizer=step))
    assert model.normalize("и\u0306") == expected


def test_added_tokens_take_the_spaces_beside_them(model_of):
    flags = {"content": "<x>", "lstrip": True, "rstrip": True}
    model = model_of(gpt2(), flags, {"content": "<y>"})
    x, y = (model.n_vocab - 2, model.n_vocab - 1)
    assert model.tokenize(" \n<x>  <y> ") == [x, y, *model.tokenize(" ")]
    assert model.n_vocab - 3 not in model.tokenize("a </e> ")  # a control token is text
    assert model.tokenize("</e>", special=True) == [model.n_vocab - 3]


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ([{"content": "дом", "single_word": True}], "only as a whole word"),
        ([{"content": "ab"}, {"content": "bcd"}], "overlap in 'abcd'"),
        ([{"content": "<a>", "rstrip": True}, {"content": " b"}], "which has one at its end"),
        ([{"content": ""}], "of 0 letters"),
        ([{"content": "a" * 3000}], "of 3000 letters"),
        (
            [{"content": "ab" * i} for i in range(1, 60)]
            + [{"content": "b" + "ab" * i} for i in range(60)],
            "too many added tokens|overlap in",
        ),
    ],
)
def test_what_would_be_matched_elsewhere_is_refused(model_of, added, words):
    with pytest.raises(ConversionError, match=words):
        model_of(gpt2(), *added)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text with Lowercase"),
        ({"normalizer": {"type": "NFC"}}, "in which its token 'и\u0306' is not"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "expected ByteLevel as the last step"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"post_processor": {"type": "BertProcessing"}}, "adds by BertProcessing"),
    ],
)
def test_what_no_runtime_of_ours_does_is_refused(model_of, change, words):
    added = [{"content": "и\u0306"}] if "NFC" in str(change) else []
    with pytest.raises(ConversionError, match=words):
        model_of(gpt2(), *added, tokenizer=change)


def test_every_id_that_ends_a_text_ends_it(model_of):
    """GGUF has a key for one; Llama 3's and many chat models' configs name several."""
    model = model_of(
        gpt2(), config={"eos_token_id": [3, 4]}, generation_config={"eos_token_id": [5, 10**6]}
    )
    assert {3, 4, 5} <= model.end_of_generation() <= set(range(model.n_vocab))


def test_a_pad_token_past_the_last_row_is_left_out(model_of):
    n_vocab = len(gpt2()["model"]["vocab"]) + 1
    model = model_of(gpt2(), {"content": "<pad>", "special": True}, n_vocab=n_vocab)
    assert model.n_vocab == n_vocab
    with pytest.raises(ConversionError, match="belongs to another model"):
        model_of(gpt2(), {"content": "text"}, n_vocab=n_vocab)


def test_two_tokenizer_files_that_disagree_are_refused(tmp_path):
    """A vocabulary that was extended in one of them lost its new tokens without a word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, "a"]
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * 2
    listed = [(text, 0.0, kind) for text, kind in zip(pieces, kinds, strict=True)]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(listed, add_dummy_prefix=True))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "<s>"})
    vocab = {text: i for i, text in enumerate(pieces)}
    steps = [{"type": "Prepend", "prepend": SPACE}, FROM_SPACE]
    normalizer = {"type": "Sequence", "normalizers": steps}

    def read(vocab, normalizer=normalizer):
        model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []}
        write_json(tmp_path / "tokenizer.json", {"model": model, "normalizer": normalizer})
        return read_tokenizer(tmp_path, {"vocab_size": 300})

    assert read(vocab).tokens[:3] == pieces[:3]
    with pytest.raises(ConversionError, match="token 261 is 'new' in tokenizer.json but None"):
        read(vocab | {"new": 261})
    with pytest.raises(ConversionError, match="token 260 is 'b' in tokenizer.json but 'a'"):
        read({**{t: i for t, i in vocab.items() if t != "a"}, "b": 260})
    with pytest.raises(ConversionError, match="disagree on a space in front"):
        read(vocab, FROM_SPACE)
