"""Tokenizer metadata and refusals, on tokenizers written by hand."""

import pytest
import rebuild
from gguf import TokenType
from rebuild import SPACE, convert, edit_json, field, write_json

from trimix_gguf.convert.tokenizer import read_tokenizer
from trimix_gguf.convert.tokenizer_bpe import KNOWN_PRE, read_merges
from trimix_gguf.convert.tokenizer_spm import _varint
from trimix_gguf.errors import ConversionError
from trimix_gguf.machine.gguf_file import read_gguf


def pieces(*texts):
    """Rows of a SentencePiece model: the special three, the bytes, then `texts`."""
    head = [("<unk>", 0.0, TokenType.UNKNOWN)]
    head += [("<s>", 0.0, TokenType.CONTROL), ("</s>", 0.0, TokenType.CONTROL)]
    head += [(name, 0.0, TokenType.BYTE) for name in rebuild.BYTES]
    return head + [(text, -float(i), TokenType.NORMAL) for i, text in enumerate(texts)]


SPM_CONFIG = {"vocab_size": 270, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def spm(tmp_path):
    """A folder with a SentencePiece model of five pieces, 259 to 263."""
    model = rebuild.sentencepiece_model(pieces("ab", "a", "b", "c", SPACE), add_dummy_prefix=True)
    (tmp_path / "tokenizer.model").write_bytes(model)
    write_json(tmp_path / "tokenizer_config.json", {})
    return tmp_path


def test_added_tokens_come_from_three_files(spm):
    write_json(spm / "added_tokens.json", {"<old>": 264, "<both>": 265})
    decoder = {
        "265": {"content": "<both>", "special": True},
        "266": {"content": f"{SPACE}{SPACE}", "special": False},
        "267": {"content": "<unused7>", "special": False},
        "268": {"content": "<|looks|>", "special": False},
        "270": {"content": "<image_soft_token>", "special": True},
    }
    edit_json(spm, "tokenizer_config.json", added_tokens_decoder=decoder)
    write_json(
        spm / "tokenizer.json",
        {
            "added_tokens": [{"id": 268, "content": "<new>", "special": False}],
            "model": {"type": "BPE", "byte_fallback": True},
        },
    )
    tokens = read_tokenizer(spm, SPM_CONFIG).vocabulary.tokens
    assert tokens[263:] == [
        (SPACE, TokenType.NORMAL, -4.0),
        ("<old>", TokenType.USER_DEFINED, -1000.0),
        ("<both>", TokenType.CONTROL, -1000.0),
        ("  ", TokenType.USER_DEFINED, -1000.0),
        ("<unused7>", TokenType.CONTROL, -1000.0),
        ("<new>", TokenType.USER_DEFINED, -1000.0),
        ("[PAD269]", TokenType.UNUSED, -10000.0),
    ]


def test_special_ids_come_from_settings_then_config(spm):
    edit_json(spm, "tokenizer_config.json", eos_token={"content": "</s>"}, pad_token="[none]")
    config = SPM_CONFIG | {"eos_token_id": [7, 8], "mask_token_id": 9, "sep_token_id": 999}
    metadata = read_tokenizer(spm, config)
    assert metadata.special_ids == {"bos": 1, "eos": 2, "unk": 0, "mask": 9}
    edit_json(spm, "tokenizer_config.json", eos_token=None)
    assert read_tokenizer(spm, config).special_ids["eos"] == 7
    written = read_gguf(convert(spm, config)).metadata
    keys = {"bos": 1, "eos": 7, "unknown": 0, "mask": 9}
    assert {k: written[f"tokenizer.ggml.{k}_token_id"] for k in keys} == keys
    assert written["tokenizer.ggml.pre"] == "default"
    assert written["tokenizer.ggml.add_bos_token"] is True
    assert written["tokenizer.ggml.add_eos_token"] is False
    assert written["tokenizer.ggml.add_space_prefix"] is True


def test_a_setting_overrules_the_space_in_front(spm):
    for setting, expected in ((None, True), (False, False), (True, True)):
        edit_json(spm, "tokenizer_config.json", add_prefix_space=setting)
        assert read_tokenizer(spm, SPM_CONFIG).vocabulary.add_space_prefix is expected


def template(*texts):
    steps = [{"SpecialToken": {"id": text}} if text else {"Sequence": {}} for text in texts]
    return {"type": "TemplateProcessing", "single": steps}


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        (None, {}, (True, False)),  # SentencePiece's default
        (None, {"add_bos_token": False, "add_eos_token": True}, (False, True)),
        (template("<s>", None), {"add_bos_token": False}, (True, False)),
        (template(None), {"add_bos_token": True}, (False, False)),
        (template("<s>", None, "</s>"), {}, (True, True)),
        ({"type": "ByteLevel"}, {"add_bos_token": True}, (False, False)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>", None)]}, {},
         (True, False)),
    ],
)  # fmt: skip
def test_what_the_post_processor_adds(spm, processor, settings, expected):
    model = {"type": "BPE", "byte_fallback": True}
    write_json(spm / "tokenizer.json", {"model": model, "post_processor": processor})
    edit_json(spm, "tokenizer_config.json", **settings)
    metadata = read_tokenizer(spm, SPM_CONFIG)
    assert (metadata.add_bos, metadata.add_eos) == expected


def test_chat_templates(spm):
    assert read_tokenizer(spm, SPM_CONFIG).chat_template is None
    write_json(spm / "chat_template.json", {"chat_template": "of the processor"})
    assert read_tokenizer(spm, SPM_CONFIG).chat_template == "of the processor"
    named = [{"name": "default", "template": "main"}, {"name": "tool_use", "template": "tools"}]
    edit_json(spm, "tokenizer_config.json", chat_template=named)
    metadata = read_gguf(convert(spm, SPM_CONFIG)).metadata
    assert metadata["tokenizer.chat_template"] == "main"
    assert metadata["tokenizer.chat_template.tool_use"] == "tools"
    (spm / "chat_template.jinja").write_text("қалып", encoding="utf-8")
    assert read_tokenizer(spm, SPM_CONFIG).chat_template == "қалып"
    (spm / "additional_chat_templates").mkdir()
    (spm / "additional_chat_templates" / "rag.jinja").write_text("r", encoding="utf-8")
    metadata = read_gguf(convert(spm, SPM_CONFIG)).metadata
    assert metadata["tokenizer.chat_template"] == "қалып"
    assert metadata["tokenizer.chat_template.rag"] == "r"


def put_model(**options):
    rows = options.pop("rows", pieces("ab", "a", "b"))
    model = rebuild.sentencepiece_model(rows, add_dummy_prefix=True, **options)
    return lambda folder: (folder / "tokenizer.model").write_bytes(model)


def put_json(*merges, vocab=("a", "b", "c", "ab", "bc", "abc"), **changes):
    rows = [*rebuild.BYTES, "<unk>", *vocab]
    ids = {text: id_ for id_, text in enumerate(rows)}
    tokenizer = rebuild.sentencepiece_json(ids, merges, "<unk>", prefix=False, added=[])

    def put(folder):
        (folder / "tokenizer.model").unlink()
        write_json(folder / "tokenizer.json", tokenizer | changes)

    return put


ORDER = (["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"])
REFUSALS = {
    "not a BPE model of SentencePiece": put_model(trainer=field(3, 1)),
    r"rule 'nmt_nfkc'": put_model(normalizer=field(1, b"nmt_nfkc") + field(2, b"charsmap")),
    "no removal of extra whitespace": put_model(normalizer=field(4, 1)),
    "changes text before it is cut": put_model(normalizer=field(5, 0)),
    "text before": put_model(trainer=field(24, 1)),
    "without byte_fallback": put_model(rows=pieces("a")[:3]),
    "no token <0x80>": put_model(rows=[row for row in pieces("\x80") if row[0] != "<0x80>"]),
    "both token 259 and token 260": put_model(rows=pieces("a", "a")),
    "token id 272": put_model(rows=pieces(*"abcdefghijklmn")),
    "is not a SentencePiece model": lambda f: (f / "tokenizer.model").write_bytes(b"IQ== 0\n"),
    "not a SentencePiece model; download": lambda f: (f / "tokenizer.model").write_bytes(
        (f / "tokenizer.model").read_bytes()[:-3]
    ),
    "neither tokenizer.json nor tokenizer.model": lambda f: (f / "tokenizer.model").unlink(),
    "is a WordPiece tokenizer": put_json(model={"type": "WordPiece"}),
    "no order of pieces .see 'abc'": put_json(
        *ORDER[:3], ["c", "d"], ORDER[3], vocab=("a", "b", "c", "d", "ab", "bc", "abc", "cd")
    ),
    "see 'abc'": put_json(*ORDER[:3]),
    "changes or cuts text by NFKC": put_json(*ORDER, normalizer={"type": "NFKC"}),
    "changes or cuts text by Digits": put_json(*ORDER, pre_tokenizer=rebuild.DIGITS),
    "does not spell spaces": put_json(*ORDER, normalizer=None, pre_tokenizer=None),
    "eos_token '<end>' .* not in the tokenizer": lambda f: edit_json(
        f, "tokenizer_config.json", eos_token="<end>"
    ),
}


def test_merges_that_are_an_order_pass(spm):
    put_json(*ORDER)(spm)
    tokens = read_tokenizer(spm, SPM_CONFIG).vocabulary.tokens
    assert {t.text: t.score for t in tokens[257:263]} == {
        "a": -3, "b": -3, "c": -3, "ab": 0, "bc": -1, "abc": -2,
    }  # fmt: skip


def test_merges_of_added_tokens_are_passed_over(spm):
    """They are found in the text beforehand; transformers keeps merges of some of them."""
    added = [{"id": 260 + i, "content": text} for i, text in enumerate(("ab", "bc", "abc"))]
    put_json(["a", "b"], ["a", "bc"], ["b", "a"], vocab=("a", "b", "c", "ab", "bc", "abc", "ba"),
             added_tokens=added)(spm)  # fmt: skip
    assert read_tokenizer(spm, SPM_CONFIG).vocabulary.tokens[263][::2] == ("ba", 0)


def test_a_bos_that_no_file_names_is_refused(spm):
    with pytest.raises(ConversionError, match="set bos_token"):
        read_tokenizer(spm, SPM_CONFIG | {"bos_token_id": None})


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_are_one_line(spm, message):
    REFUSALS[message](spm)
    with pytest.raises(ConversionError, match=message) as caught:
        read_tokenizer(spm, SPM_CONFIG)
    assert "\n" not in str(caught.value)


def test_a_pre_tokenizer_for_sentencepiece_is_refused(spm):
    with pytest.raises(ConversionError, match="--pre qwen2.*leave it out"):
        read_tokenizer(spm, SPM_CONFIG, pre="qwen2")


BPE_CONFIG = {"vocab_size": 4, "eos_token_id": 3}


def put_bpe(folder, pre, **options):
    """Write byte-level BPE of four tokens; `options` add to tokenizer.json's model."""
    vocab = {"a": 0, "b": 1, "ab": 2, "<|end|>": 3}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b"]} | options
    write_json(folder / "tokenizer.json", {"pre_tokenizer": rebuild.PRE[pre], "model": model})


def test_llama_cpp_knows_every_pre_tokenizer(tmp_path):
    put_bpe(tmp_path, "qwen2")
    for name in KNOWN_PRE.split():
        metadata = read_tokenizer(tmp_path, BPE_CONFIG, pre=name)
        assert metadata.vocabulary.pre == name
        path = rebuild.write_gguf(metadata, tmp_path / f"{name}.gguf")
        with rebuild.tokenizer_of(path) as tokenize:
            assert tokenize("ab", True) == [2]
    with pytest.raises(ConversionError, match="knows no pre-tokenizer 'qwen-2'.*: .*qwen2") as e:
        read_tokenizer(tmp_path, BPE_CONFIG, pre="qwen-2")
    assert "\n" not in str(e.value)


def test_a_merge_that_stands_twice_is_refused_at_once(tmp_path):
    """Bug: it was looked for among all before it, for each: hours for a real vocabulary."""
    merges = [[f"a{i}", "b"] for i in range(200_000)]
    with pytest.raises(ConversionError, match="'a199999 b' twice"):
        read_merges(tmp_path, {"merges": [*merges, merges[-1]]})


def test_a_number_of_a_sentencepiece_file_has_an_end():
    with pytest.raises(ValueError, match="too long"):
        _varint(b"\xff" * 1_000_000, 0)


def test_unknown_steps_before_bpe_are_refused(tmp_path):
    put_bpe(tmp_path, "qwen2", ignore_merges=True)
    with pytest.raises(ConversionError, match="--pre"):
        read_tokenizer(tmp_path, BPE_CONFIG)
    assert read_tokenizer(tmp_path, BPE_CONFIG, pre="qwen2").vocabulary.pre == "qwen2"
    put_bpe(tmp_path, "qwen2", end_of_word_suffix="</w>")
    with pytest.raises(ConversionError, match="end_of_word_suffix"):
        read_tokenizer(tmp_path, BPE_CONFIG)


def test_llama_3_brings_its_tokenizer_twice(tmp_path):
    """Its tokenizer.model is no SentencePiece model; once that hid tokenizer.json."""
    put_bpe(tmp_path, "llama-bpe", ignore_merges=True)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert read_tokenizer(tmp_path, BPE_CONFIG).vocabulary.pre == "llama-bpe"
