"""Token ids against their oracles: tokenizers and sentencepiece, and real GGUF files."""

import io
import os
import unicodedata
from itertools import chain
from pathlib import Path

import pytest
import rebuild
from gguf import TokenType
from rebuild import SPACE, convert, edit_json, read_json, tokenizer_of, write_json

from trimix_gguf.convert.tokenizer import read_tokenizer
from trimix_gguf.machine.gguf_file import read_gguf

tokenizers = pytest.importorskip("tokenizers", reason="the id oracles need tokenizers")
sentencepiece = pytest.importorskip("sentencepiece", reason="the id oracles need sentencepiece")

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("TRIMIX_DATA", ROOT.parent / "shared" / "data"))
MODELS = Path(os.environ.get("TRIMIX_MODELS", Path.home() / ".cache" / "trimix-models"))
LANGUAGES = ("kk", "ug", "bo", "mn", "bn", "ta", "te", "or", "en")
N_LINES = 250  # of each language

MARKS = "Қазақстан — й ё ї, Việt é ü ñ, বাংলা ো ড়, ଡ଼, தமிழ் ொ, Ελληνικά ά, 한국어"
TEXTS = [
    "The quick brown fox doesn't jump over 12345 dogs!",
    "Қазақстан — Орталық Азиядағы мемлекет, 2024 жылы.",
    "شىنجاڭ ئۇيغۇر تىلى — تۈركىي تىللارنىڭ بىرى.",
    "བོད་ཀྱི་སྐད་ཡིག་ནི་ཡག་པོ་འདུག།  ༄༅།། །།",
    "ᠮᠣᠩᠭᠣᠯ ᠬᠡᠯᠡ, Монгол хэл",
    "বাংলা ভাষা தமிழ் நாடு ஔ తెలుగు క్ష ଓଡ଼ିଆ क़िला",
    "Қазақ2024жыл中文ئۇيغۇرབོད་বাংলা",
    "I'LL we'Re 'S ’s it's’ don't",
    "3.14 1,234,567 ١٢٣٤ ২০২৪ ༢༠༢༤ Ⅷ ½ ² ①②",
    "100% $5 ₸5 #a @b c++ a_b-c http://a.b/c?d=e&f=g#h '''\"\"\"```",
    "def f(x):\n    return x  # y\n",
    "«»„“”—–…‥ ﬁ Ａｂｃ ｶﾅ ㌔ ﷺ اَلْعَرَبِيَّةُ",
    *(" ", "  ", "   ", " a", "a ", "  a  ", "a b  c   d    e     f", " " * 20 + "x", "   \n"),
    *("\t", "\t\t x\t\ty", "\n", "\n\n", "\n" * 40, "a\n\n\n\nb \n \n c", "x \t \n y"),
    *("\r\n", "one\r\ntwo\r\n\r\nthree\rfour", "\x00", "a\x00b", "\x01\x1b[0m\x7f", "\x0b\x0c x"),
    *("\x85\u2028\u2029x", "\xa0\u2003\u3000x", "\u200b\u200c\u200d\ufeffx", "a\xadb", "\ufffd"),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈🏴‍☠️ 🇰🇿🇲🇳 👍🏽", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣ ☎️ ©®™", "😀😃 😄  😁"),
    *("\u0301", "a\u0301e\u0301\u0301", "\u1100\u1161\u11a8", "𐍈𐌰 𝒳 𠮷 \U0010ffff", "Ⅳ Ǆ ǅ ʰ"),
    *("a" * 300, "ба" * 200, "1234567890" * 5, "Ġ Ċ ġ", "[PAD151700]", "<0x0A>"),
    *(unicodedata.normalize(form, MARKS) for form in ("NFC", "NFD", "NFKC", "NFKD")),
]
# Texts that spell special tokens of one vocabulary or another, or a space as SentencePiece does.
SPELLED = [
    "<s>",
    "</s>",
    "a</s>b",
    "<unk>",
    "a<bos>b",
    "<unused5>",
    "<|endoftext|>",
    "x <|im_end|> y",
]
SPELLED += ["<start_of_turn>user\n", "[multimodal]", "<tool_call>{}</tool_call>"]
LITERAL_SPACE = f" {SPACE} {SPACE}{SPACE}"
LONG_SPACES = "x" + " " * 70
ALL_TEXTS = [*TEXTS, *SPELLED, LITERAL_SPACE, LONG_SPACES]


def differing(folder, path, lines):
    """The lines whose ids differ between llama.cpp and the library that the folder is for."""
    if (folder / "tokenizer.model").is_file():
        # sentencepiece never reads control tokens in text.
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
        parse_special, oracle, normalize = False, processor.encode, str
    else:
        fast = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        nfc = read_json(folder / "tokenizer.json")["normalizer"] == {"type": "NFC"}
        parse_special = True

        def oracle(line):
            return fast.encode(line, add_special_tokens=False).ids

        def normalize(line):
            return unicodedata.normalize("NFC", line) if nfc else line

    with tokenizer_of(path) as tokenize:
        # llama.cpp has no normalizer: of Qwen's NFC it is spared here, and only of that.
        return {x for x in lines if tokenize(normalize(x), parse_special) != oracle(x)}


# --- Full vocabularies, rebuilt from GGUF files as the folders they were converted from ---

QWEN = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SMOLLM = "smollm2-135m-instruct-q4_1.gguf"
GEMMA = "gemma-3-270m-q4_k_m.gguf"
# Of the folder models/ in llama.cpp's source: copy them to run the tests on them.
LLAMA3, LLAMA2 = "ggml-vocab-llama-bpe.gguf", "ggml-vocab-llama-spm.gguf"
# The last item: texts whose ids are known to differ from the library's.
REAL = {
    # An ordinary token of Qwen's, which llama.cpp turns into a control token for its text.
    "qwen2.5": (QWEN, rebuild.byte_level_folder, {"</s>", "a</s>b"}),
    "smollm2": (SMOLLM, rebuild.byte_level_folder, set()),
    "llama3": (LLAMA3, rebuild.byte_level_folder, set()),
    "llama2": (LLAMA2, rebuild.sentencepiece_folder, set()),
    "llama2-json": (LLAMA2, rebuild.sentencepiece_json_folder, set()),
    "gemma3": (
        GEMMA,
        rebuild.sentencepiece_folder,
        # Its model spells them as user-defined; in GGUF they are control tokens, never text.
        {"</s>", "a</s>b", "<unused5>", "<start_of_turn>user\n"}
        # llama.cpp looks for runs of spaces before it spells spaces as ▁, and so misses these.
        | {LITERAL_SPACE},
    ),
    "gemma3-json": (
        GEMMA,
        rebuild.sentencepiece_json_folder,
        # tokenizers merges spaces in pairs, where sentencepiece takes the longest run, 31.
        {LITERAL_SPACE, LONG_SPACES},
    ),
}
# tokenizer.ggml keys that are not written, as they say what llama.cpp does without them.
UNWRITTEN = {"gemma3": {"add_sep_token"}, "smollm2": {"add_space_prefix"}}


@pytest.fixture(scope="module")
def real_lines():
    files = [DATA / "eval" / language / "flores200.txt" for language in LANGUAGES]
    if not all(path.is_file() for path in files):
        pytest.skip(f"the text in nine languages is not in {DATA}")
    lines = [path.read_text(encoding="utf-8").splitlines()[:N_LINES] for path in files]
    return list(chain.from_iterable(lines))


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    """(name, the original's Source, the rebuilt folder, the GGUF made of it)."""
    file, make, _ = REAL[request.param]
    if not (MODELS / file).is_file():
        pytest.skip(f"{file} is not in {MODELS}")
    folder = tmp_path_factory.mktemp(request.param)
    source = rebuild.Source(read_gguf(MODELS / file))
    make(source, folder)
    return request.param, source, folder, convert(folder, source.config)


def test_real_vocabularies_come_back(real):
    name, source, _, path = real
    made = rebuild.Source(read_gguf(path))
    assert made.texts == source.texts
    # transformers lists <unk> among the special tokens, which llama.cpp's converter calls control.
    expected = [TokenType.CONTROL, *source.types[1:]] if name == "llama2-json" else source.types
    assert made.types == expected
    assert made.merges == source.merges
    if source.scores and not name.endswith("json"):
        # Llama 2's GGUF is older than the score of -1000 that control tokens have now.
        assert [
            (x, y)
            for x, y, kind in zip(made.scores, source.scores, source.types, strict=True)
            if x != y and not (name == "llama2" and kind == TokenType.CONTROL)
        ] == []
    absent = UNWRITTEN.get(name.removesuffix("-json"), set())
    for key, value in source.metadata.items():
        stem = key.removeprefix("tokenizer.ggml.")
        if key.startswith("tokenizer.") and stem not in absent | {"tokens", "token_type", "scores"}:
            assert stem == "merges" or made.metadata[key] == value, key


def test_real_ids_equal_those_of_the_library(real, real_lines):
    name, _, folder, path = real
    assert differing(folder, path, real_lines + ALL_TEXTS) == REAL[name][2]


# --- Small vocabularies, trained here ---


def byte_level(folder, pre, **model):
    """Train byte-level BPE on TEXTS; `model` changes tokenizer.json's model."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([*TEXTS, *TEXTS], trainer)
    fast.add_tokens([tokenizers.AddedToken("<tool_call>", special=False, normalized=False)])
    fast.save(f"{folder}/tokenizer.json")
    edit_json(folder, pre_tokenizer=rebuild.PRE[pre])
    tokenizer = read_json(folder / "tokenizer.json")
    edit_json(folder, model=tokenizer["model"] | model)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    return {"vocab_size": 640}


@pytest.mark.parametrize("pre", rebuild.PRE)
def test_pre_tokenizers_are_recognised_and_cut_alike(tmp_path, pre):
    config = byte_level(tmp_path, pre, ignore_merges=pre == "llama-bpe")
    metadata = read_tokenizer(tmp_path, config)
    assert metadata.vocabulary.pre == pre
    # llama.cpp would take token 11 for a BOS that no key names.
    assert metadata.special_ids == {"eos": 0, "bos": 0} and not metadata.add_bos
    assert differing(tmp_path, convert(tmp_path, config), ALL_TEXTS) == set()


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_a_word_that_is_a_token_is_taken_whole_only_if_merges_are_ignored(tmp_path, ignore_merges):
    config = byte_level(tmp_path, "llama-bpe", ignore_merges=ignore_merges)
    tokenizer = read_json(tmp_path / "tokenizer.json")
    tokenizer["model"]["vocab"]["Ġunmergeable"] = 630
    write_json(tmp_path / "tokenizer.json", tokenizer)
    assert read_tokenizer(tmp_path, config).vocabulary.pre == (
        "llama-bpe" if ignore_merges else "dbrx"
    )
    path = convert(tmp_path, config)
    assert differing(tmp_path, path, [*TEXTS, "an unmergeable word"]) == set()
    with tokenizer_of(path) as tokenize:
        assert (630 in tokenize("an unmergeable word", True)) is ignore_merges


def test_nfc_is_left_to_the_caller(tmp_path):
    """llama.cpp has no normalizer: Qwen's ids equal those of tokenizers on text in NFC alone."""
    config = byte_level(tmp_path, "qwen2")
    edit_json(tmp_path, normalizer={"type": "NFC"})
    path = convert(tmp_path, config)
    assert differing(tmp_path, path, ALL_TEXTS) == set()
    fast = tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
    with tokenizer_of(path) as tokenize:
        # NFC takes these Bengali and Tibetan letters apart, and puts the Cyrillic one together.
        for text in ("\u09df", "\u0f43", "и\u0306"):
            assert tokenize(text, True) != fast.encode(text, add_special_tokens=False).ids


def test_stripping_added_tokens_is_left_out(tmp_path):
    """As in llama.cpp's converter: GGUF cannot say that a token takes the spaces beside it."""
    config = byte_level(tmp_path, "qwen2")
    tokenizer = read_json(tmp_path / "tokenizer.json")
    for added in tokenizer["added_tokens"]:
        added |= {"lstrip": True, "rstrip": True}
    write_json(tmp_path / "tokenizer.json", tokenizer)
    texts = ["a<tool_call>b", "a <tool_call> b"]
    assert differing(tmp_path, convert(tmp_path, config), texts) == {"a <tool_call> b"}


SYMBOLS = ["\n\n", SPACE * 2, SPACE * 4, "<tool_call>"]


def train_sentencepiece(folder, **options):
    """Train SentencePiece BPE on TEXTS; rare characters are left to bytes."""
    out = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "character_coverage": 0.98, "vocab_size": 700}
    settings |= {"hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2} | options
    lines = [line for text in TEXTS * 3 for line in text.splitlines() if "\0" not in line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, **settings
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    return processor, {"vocab_size": len(processor) + 5, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("prefix", "symbols", "different"),
    # llama.cpp finds symbols of spaces before it spells spaces as ▁. With a space put in front as
    # well it would differ more, but no model of the four families has both.
    [(True, [], set()), (False, [], set()), (False, SYMBOLS, {LITERAL_SPACE})],
    ids=["llama", "gemma", "gemma-symbols"],
)
def test_sentencepiece_cuts_alike(tmp_path, prefix, symbols, different):
    processor, config = train_sentencepiece(
        tmp_path, add_dummy_prefix=prefix, user_defined_symbols=symbols
    )
    metadata = read_tokenizer(tmp_path, config)
    assert metadata.vocabulary.add_space_prefix is prefix
    # As the library reads the file.
    for id_, token in enumerate(metadata.vocabulary.tokens[: len(processor)]):
        assert token.text.replace(" ", SPACE) == processor.id_to_piece(id_)
        assert token.score == processor.get_score(id_)
        kinds = {
            TokenType.UNKNOWN: processor.is_unknown(id_),
            TokenType.CONTROL: processor.is_control(id_),
            TokenType.BYTE: processor.is_byte(id_),
            TokenType.USER_DEFINED: processor.id_to_piece(id_) in symbols,
        }
        assert token.type != TokenType.USER_DEFINED or SPACE not in token.text
        assert [kind for kind, holds in kinds.items() if holds] in ([token.type], [])
        assert any(kinds.values()) == (token.type != TokenType.NORMAL)
    padding = metadata.vocabulary.tokens[len(processor) :]
    assert padding[0][:2] == (f"[PAD{len(processor)}]", TokenType.UNUSED) and len(padding) == 5
    assert metadata.special_ids == {"bos": 1, "eos": 2, "unk": 0} and metadata.add_bos
    assert differing(tmp_path, convert(tmp_path, config), ALL_TEXTS) == different


def save_as_json(folder, processor, prefix, **changes):
    """The tokenizer.json that transformers would make of a tokenizer.model, which is removed."""
    ids = range(len(processor))
    vocab = {processor.id_to_piece(id_): id_ for id_ in ids}
    special = [id_ for id_ in ids if processor.is_control(id_) or processor.is_unknown(id_)]
    normal = [i for i in ids if i not in special and not processor.is_byte(i)]
    best_first = sorted(normal, key=processor.get_score, reverse=True)
    flags = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    added = [
        {"id": id_, "content": processor.id_to_piece(id_), "special": True} | flags
        for id_ in special
    ]
    merges = rebuild.merges_of([processor.id_to_piece(id_) for id_ in best_first])
    tokenizer = rebuild.sentencepiece_json(vocab, merges, "<unk>", prefix=prefix, added=added)
    write_json(folder / "tokenizer.json", tokenizer | changes)
    (folder / "tokenizer.model").unlink()


METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
# After a special token, or before a space, Metaspace adds none; sentencepiece always adds one.
METASPACE_DIFFERS = {"a</s>b", *(x for x in ALL_TEXTS if x[0] == " ")}


@pytest.mark.parametrize(
    ("prefix", "changes", "different"),
    [
        (True, {}, set()),
        (False, {}, set()),
        (
            True,
            {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}},
            METASPACE_DIFFERS,
        ),
        (
            False,
            {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"}},
            set(),
        ),
    ],
    ids=["llama", "gemma", "metaspace", "metaspace-never"],
)
def test_sentencepiece_as_tokenizer_json_cuts_alike(tmp_path, prefix, changes, different):
    processor, config = train_sentencepiece(tmp_path, add_dummy_prefix=prefix)
    save_as_json(tmp_path, processor, prefix, **changes)
    metadata = read_tokenizer(tmp_path, config)
    assert metadata.vocabulary.add_space_prefix is prefix
    assert metadata.vocabulary.tokens[5].type == TokenType.BYTE
    assert differing(tmp_path, convert(tmp_path, config), ALL_TEXTS) == different
