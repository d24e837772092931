"""Raw text for `trimix adapt`: what is read, what is dropped and why, and what is held out."""

import bz2
import gzip
import json
import random
import re
import shutil
import unicodedata

import pytest

for needed in ("ftfy", "datasketch", "zstandard", "fontTools"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[adapt]'")
import zstandard  # noqa: E402

from trimix_gguf.adapting import documents, results  # noqa: E402
from trimix_gguf.adapting.cleaning import OFTEN, clean  # noqa: E402
from trimix_gguf.adapting.documents import (  # noqa: E402
    list_files,
    list_texts,
    read_documents,
)
from trimix_gguf.adapting.grams import units_of  # noqa: E402
from trimix_gguf.adapting.keeping_out import KeptOut  # noqa: E402
from trimix_gguf.adapting.preparing import (  # noqa: E402
    HELD_OUT,
    LEARNED,
    Wanted,
    documents_of,
    prepare,
)
from trimix_gguf.adapting.report import Report  # noqa: E402
from trimix_gguf.adapting.wikipedia import plain_text  # noqa: E402
from trimix_gguf.errors import DataError  # noqa: E402
from trimix_gguf.trio.trio import NANO  # noqa: E402
from trimix_gguf.trios.triofile import TrioFile  # noqa: E402

LETTERS = "абвгдежзийклмнопрстуфхцчшыэюяәғқңөұүһі"
PACKINGS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress,
            ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw)}  # fmt: skip
PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"


def made_text(seed, n_words=60):
    """Words that no other seed has."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(3, 9))) for _ in range(n_words)]
    return " ".join(words) + "."


def dump(*pages):
    inside = "".join(pages)
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">{inside}</mediawiki>'


@pytest.fixture
def prepared(tmp_path):
    """Prepare documents, given as texts: (report, texts to learn from, texts held out)."""

    def run(*texts, **wanted):
        source = tmp_path / "texts.jsonl"
        lines = [json.dumps({"text": text}) for text in texts]
        source.write_text("\n".join(lines), encoding="utf-8")
        report = prepare([source], tmp_path, Wanted(**wanted))
        found = [[d.text for d in documents_of(tmp_path / n)] for n in (LEARNED, HELD_OUT)]
        return report, *found

    return run


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".xml"])
def test_the_same_text_is_read_from_every_kind_of_file(tmp_path, kind, packing):
    text = made_text(1)
    raw = {
        ".txt": text,
        ".jsonl": json.dumps({"text": text, "url": "x"}),
        ".xml": dump(PAGE.format("A", 0, "", text)),
    }[kind]
    file = tmp_path / f"text{kind}{packing}"
    file.write_bytes(PACKINGS[packing](raw.encode()))
    assert [d.text.strip() for d in read_documents(file)] == [text]
    assert list_files([tmp_path]) == [file]


def test_a_long_text_becomes_documents_that_hold_every_line_once(tmp_path):
    lines = [made_text(seed, 30) for seed in range(60)]
    file = tmp_path / "a.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    found = [d.text for d in read_documents(file)]
    assert len(found) > 5 and max(map(len, found)) <= documents.MOST_CHARACTERS
    assert "".join(found).splitlines() == lines


def test_a_book_is_one_line_of_json(tmp_path):
    """A line was cut after 2^20 characters, and then it was not JSON: it ended a whole corpus."""
    lines, file = [made_text(seed, 30) for seed in range(60)] * 120, tmp_path / "a.jsonl"
    text = "\n".join(lines)
    assert len(text) > 1 << 20
    file.write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert "".join(d.text for d in read_documents(file)).splitlines() == lines


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_text_without_line_ends_is_held_out_in_part(tmp_path, ending):
    """Bug: it was one document, so that all of it was held out, or nothing; or it was too short."""
    text, file = " ".join(made_text(seed) for seed in range(200)), tmp_path / f"a{ending}"
    file.write_text(text if ending == ".txt" else json.dumps({"text": text}), encoding="utf-8")
    found = [d.text for d in read_documents(file)]
    assert "".join(found) == text and max(map(len, found)) <= documents.MOST_CHARACTERS
    assert all(part.endswith(" ") for part in found[:-1])  # no word is cut
    report = prepare([file], tmp_path, Wanted())
    assert 0 < report.heldout.n_characters < report.learned.n_characters / 2
    unspaced = tmp_path / "b.txt"
    unspaced.write_text("ก" * 9999, encoding="utf-8")
    assert sum(len(d.text) for d in read_documents(unspaced)) == 9999


def test_articles_of_a_dump_are_read_and_other_pages_are_not(tmp_path):
    file = tmp_path / "wiki.xml"
    pages = [
        PAGE.format("Article", 0, "", "Text of it."),
        PAGE.format("Talk", 1, "", "Talk of it."),
        PAGE.format("Old", 0, '<redirect title="Article" />', "#REDIRECT [[Article]]"),
    ]
    file.write_text(dump(*pages), encoding="utf-8")
    assert [(d.source, d.text) for d in read_documents(file)] == [
        ("wiki.xml: Article", "Text of it.")
    ]


def test_a_part_of_a_large_dump_is_a_dump(tmp_path):
    """Bug: its markup was read as plain text, and in a folder it was passed over."""
    file = tmp_path / "ruwiki-latest-pages-articles1.xml-p1p41242.bz2"
    file.write_bytes(bz2.compress(dump(PAGE.format("A", 0, "", "Text of it.")).encode()))
    assert list_files([tmp_path]) == [file]
    assert [d.text for d in read_documents(file)] == ["Text of it."]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "A.HTML", "a.docx", "a.tsv.gz"])
def test_marks_of_another_format_are_not_learned_as_text(adapt, text_file, tmp_path, name):
    """Bug: commas, braces and tags were; in a folder such a file is passed over."""
    file = tmp_path / name
    file.write_bytes(text_file.read_bytes())
    for words in ([str(file)], [str(text_file), "--replay", str(file)]):
        refused = adapt("toy", *words, "--dry-run")
        assert refused.exit_code == 1
        assert "is not plain text" in str(refused.exception)
    (tmp_path / "archive").write_bytes(text_file.read_bytes())  # no ending at all: text
    assert list_texts([tmp_path / "archive"]) == [tmp_path / "archive"]


def test_hidden_files_of_a_folder_are_no_text(tmp_path):
    """Bug: what macOS writes beside each file on a stick ended the run: it was not JSON."""
    file = tmp_path / "texts" / "a.jsonl"
    file.parent.mkdir()
    for path in (file, file.with_name("._a.jsonl"), tmp_path / "texts" / ".old" / "b.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    assert list_files([file.parent]) == [file]
    assert len(list_files([file.with_name("._a.jsonl")])) == 1  # named, it is read


def test_a_dump_is_read_as_a_stream(tmp_path):
    """Memory does not grow with the pages: the first comes before the file's end is there."""
    file = tmp_path / "cut.xml"
    pages = [PAGE.format(f"A{n}", 0, "", made_text(n, 400)) for n in range(40)]
    file.write_text(dump(*pages)[:-2000], encoding="utf-8")
    reading = read_documents(file)
    assert next(reading).source == "cut.xml: A0"
    with pytest.raises(DataError, match="not whole XML"):
        list(reading)


def test_wiki_markup_becomes_plain_text():
    markup = """{{Infobox|a={{b|c}}}}'''Almaty''' is a [[city|big city]] in [[Asia]].<ref>x</ref>
== History ==
{| class="x"
| cell || {{n}}
|}
* [[Файл:A.jpg|thumb|with [[link]]]]Founded in&nbsp;1854 [https://x.kz on the site].<!-- no -->
[[Category:Cities]]"""
    assert plain_text(markup).replace("\xa0", " ").splitlines() == [
        "Almaty is a big city in Asia.",
        "Founded in 1854 on the site.",
    ]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.jsonl", b'{"text": 1}', "line 1: expected"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 999)[:40], "cannot be read"),
        ("a.txt.zst", b"no zstandard", "cannot be read"),
        ("a.xml", b"<a></a>", "no <page>"),
        ("a.txt", "текст".encode("utf-16"), "UTF-16"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, raw, said):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=said) as caught:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_no_text_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no text"):
        list_files([tmp_path])
    with pytest.raises(DataError, match="no such file"):
        list_files([tmp_path / "absent"])


# -- cleaning ---------------------------------------------------------------------------------


def test_encodings_are_mended_and_characters_have_one_form():
    text = "й и ғалым"
    assert clean(unicodedata.normalize("NFD", text)) == text
    assert clean("sÃ£o  “ok”\x00 ﷺ") == "são “ok” ﷺ"
    assert clean("می\u200cخواهم") == "می\u200cخواهم"  # the joiner is part of the word


def test_what_is_dropped_is_counted_with_samples(prepared):
    menu = "Басты бет | Байланыс"
    texts = [f"{made_text(seed)}\n{menu} {seed}" for seed in range(OFTEN + 5)]
    near = made_text(1) + " бір"
    report, learned, heldout = prepared(
        *texts,
        texts[0],
        near,
        "An English text about something else entirely.",
        "12 34",
        "a\ud800b",
    )
    assert report.dropped.keys() == {
        "with hardly a letter",
        "that came before",
        f"lines that stand in {OFTEN} documents or more",
        "in another script",
        "nearly as one before",
        "that are not UTF-8",
    }
    assert report.dropped["that came before"].n == 1
    assert report.dropped["nearly as one before"].samples[0].startswith(near[:20])
    assert sorted(learned + heldout) == sorted(made_text(seed) for seed in range(OFTEN + 5))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_bytes_that_are_not_utf_8_are_dropped_and_counted(tmp_path):
    good = made_text(1, 200), made_text(2, 200)
    file = tmp_path / "a.txt"
    file.write_bytes("\n\n".join(good).encode() + b"\n\n" + b"\xff\xfe\xfd" * 30)
    assert [d.is_utf8 for d in read_documents(file)] == [True, True, False]


def test_held_out_documents_stay_when_others_come_and_are_in_no_other(prepared):
    texts = [made_text(seed) for seed in range(150)]
    _, learned, heldout = prepared(*texts)
    assert len(heldout) >= 2 and not set(learned) & set(heldout)
    _, _, later = prepared(*texts, *(made_text(seed) for seed in range(150, 160)))
    assert set(later) & set(heldout)


def test_a_very_short_text_holds_out_enough_for_exercises(prepared):
    """Of nano's sample of text 2,000 characters were held out, and nothing could be measured."""
    report, _, _ = prepared(*(made_text(seed, 280) for seed in range(20)))
    assert report.learned.n_characters > 3 * report.heldout.n_characters > 20_000
    report, _, _ = prepared(*(made_text(seed, 280) for seed in range(90)))
    total = report.learned.n_characters + report.heldout.n_characters
    assert 0.08 * total < report.heldout.n_characters <= 0.1 * total


def test_of_several_scripts_none_with_half_the_letters_one_has_to_be_named(prepared):
    """Bug: the error said that the text was in another script than named, and named the same."""
    cyrl, latn, grek = (
        ["".join(chr(first + ord(c) % 20) if c.isalpha() else c for c in made_text(n)) for n in ids]
        for first, ids in ((0x430, range(4)), (0x61, range(4, 7)), (0x3B1, range(7, 10)))
    )
    with pytest.raises(DataError, match=r"no script has half .* --script"):
        prepared(*cyrl, *latn, *grek)
    report, _, _ = prepared(*cyrl, *latn, *grek, script="Cyrl")
    assert report.script == "Cyrl"


def test_text_in_another_script_than_named_is_refused(prepared):
    with pytest.raises(DataError, match="100% of the letters are Cyrl"):
        prepared(made_text(1), made_text(2), script="Arab")
    with pytest.raises(DataError, match="unknown"):
        prepared(made_text(1), made_text(2), script="Klingon")
    with pytest.raises(DataError, match="too short"):
        prepared(made_text(1))


def test_what_leaves_no_text_is_said(prepared, tmp_path):
    """Bug: of files in another encoding it was said that the text holds no letters."""
    file = tmp_path / "a.txt"
    file.write_bytes(
        "\n".join(made_text(seed, 300) for seed in range(9)).encode("cp1251", "ignore")
    )
    with pytest.raises(DataError, match="no letters.* dropped: 9 that are not UTF-8"):
        prepare([file], tmp_path, Wanted())
    latin = "Such a text is in another script than the rest of all that was given. "
    with pytest.raises(DataError, match="too short.* dropped: 1 that came before, 1 in another"):
        prepared(made_text(1), made_text(1), latin)


# -- evaluation sets --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "json", "txt"])
def test_lines_of_evaluation_sets_are_left_out(prepared, tmp_path, kind):
    question = made_text(99, 12)
    row = {"question": f"\u2028{question}", "choices": ["а", "б"]}  # some hold such line ends
    content = {
        "tsv": f"1\t{question}\tlabel",
        "jsonl": json.dumps(row, ensure_ascii=False),
        "json": json.dumps([row]),
        "txt": question,
    }[kind]
    file = tmp_path / f"eval.{kind}"
    file.write_text(content, encoding="utf-8")
    # As it may stand in a text: in capitals, with other marks, between other words.
    hidden = f"{made_text(7, 9)} {question[:-1].upper()}! {made_text(8, 9)}"
    report, learned, heldout = prepared(
        f"{made_text(1)}\n{hidden}\n{made_text(2)}", made_text(3), keep_out=[file]
    )
    assert report.dropped["lines of the sets to keep out"].n == 1
    assert f"{made_text(1)}\n{made_text(2)}" in learned + heldout


def test_few_words_in_common_are_no_leak_and_scripts_without_spaces_are_looked_at(tmp_path):
    words = made_text(5, 20)[:-1].split()
    thai = "".join(random.Random(1).choices("กขคงจฉชซญดตถทนบปผพมยรลวสหอ", k=80))
    file = tmp_path / "eval.txt"
    file.write_text(f"{' '.join(words)}\n{thai}\nекі сөз\n", encoding="utf-8")
    kept_out = KeptOut([file])
    assert kept_out.has(" ".join(["x", *words[3:11], "y"]))
    assert not kept_out.has(" ".join(["x", *words[3:10], "y", "z"]))
    assert kept_out.has("พ" + thai[20:50]) and not kept_out.has(thai[20:40])
    assert not kept_out.has("екі сөз") and not kept_out.has("")


def test_vowel_signs_are_part_of_a_word(tmp_path):
    """Bug: two words of Hindi counted as four, and each line that has them was left out."""
    assert units_of("भारत सरकार के द्वारा") == ["भारत", "सरकार", "के", "द्वारा"]
    assert units_of("བོད་ཀྱི་སྐད་ཡིག") == ["བོད", "ཀྱི", "སྐད", "ཡིག"]
    assert units_of("ที่อยู่ปัจจุบันของท่าน") == list("ที่อยู่ปัจจุบันของท่าน")
    (tmp_path / "eval.txt").write_text("भारत सरकार", encoding="utf-8")
    assert not KeptOut([tmp_path / "eval.txt"]).has("यह भारत सरकार की एक योजना है")


def test_letters_and_marks_apart_are_the_same_words(tmp_path):
    """Bug: an evaluation set in NFD was not found in the text, which is in NFC."""
    line, file = "ẹ káàárọ̀ o ẹ jọ̀wọ́ ẹ jẹ́ kí a lọ sí ilé ìwé", tmp_path / "eval.txt"
    file.write_text(unicodedata.normalize("NFD", line), encoding="utf-8")
    assert KeptOut([file]).has(unicodedata.normalize("NFC", line))


def test_held_out_text_of_many_tokens_is_cut_to_the_context(tmp_path):
    """Bug: after hours of training, `adapt` ended where no held-out text fitted the context."""
    folder = tmp_path / "trio"
    shutil.copytree(NANO, folder)
    file = folder / "trio.toml"
    file.write_text(re.sub(r"(?m)^n_ctx = .*$", "n_ctx = 64", file.read_text(encoding="utf-8")))
    (tmp_path / HELD_OUT).write_text(json.dumps(["a", "ལྷ་སའི་སྐད་ཡིག་" * 200]) + "\n")
    said = results.table(TrioFile.read(file), tmp_path)
    assert said.startswith("perplexity of 5")  # of 56 tokens but the first
