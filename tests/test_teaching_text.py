"""The text that `trimix adapt` teaches with: its exercises have the right answers."""

import random
import re
from itertools import islice

import pytest

from trimix_gguf.adapting import teaching
from trimix_gguf.adapting.teaching import Pair, read_pairs, shares_of, teach
from trimix_gguf.errors import DataError
from trimix_gguf.tuning import pairs as tuning_pairs

SUBJECTS = ("budget", "harvest", "school", "bridge", "museum", "doctor", "railway", "climate")
TEXT = ["\n".join(" ".join(f"сөз{line}н{at}" for at in range(8)) + "." for line in range(60))]
ENGLISH = [f"This is line {line} of a novel." for line in range(60)]


@pytest.fixture
def pairs(tmp_path):
    """Aligned text in which every word tells its line; half of it is aligned badly."""
    rows = ["kk\ten\tscore\tsite"]
    for at in range(20 * len(SUBJECTS)):
        word = SUBJECTS[at % len(SUBJECTS)]
        rows.append(f"мәтін {word} туралы {at} .\tthe {word} of year {at} .\t0.9\tnews")
        rows.append(f"қате {word} туралы {at} .\tnothing of year {at} .\t0.1\tnews")
    (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return read_pairs(tmp_path / "pairs.tsv")


def documents(pairs, seed, shares):
    return teach(TEXT, ENGLISH, pairs, shares, random.Random(seed))


def exercises(pairs, wanted):
    """(head, asked, answer) of the first documents whose text has `wanted`."""
    found = []
    for pieces in islice(documents(pairs, 3, {"exercises": 1.0}), 80):
        texts = [text for text, _ in pieces]
        if wanted in "".join(texts):
            answers = [at for at, (_, count) in enumerate(pieces) if count == teaching.ANSWER]
            found += [(texts[0], texts[at - 1], texts[at].strip()) for at in answers]
    assert len(found) > 50
    return found


def test_a_subject_is_that_of_the_translation_and_one_of_those_named(pairs):
    for head, asked, answer in exercises(pairs, "туралы"):
        assert f" {answer} " in asked and answer in head
        assert "қате" not in asked.lower()


def test_the_letter_is_that_of_the_word_that_fills_the_gap(pairs):
    lines, letters = TEXT[0].splitlines(), set()
    for _, asked, answer in exercises(pairs, "A"):
        if not (choices := dict(re.findall(r"^([A-D])[.)] (.+)$", asked, re.M))):
            continue
        sentence = re.search(r": (.*___.*)", asked)[1]
        fitting = [
            letter
            for letter, word in choices.items()
            if any(sentence.replace("___", word).rstrip(".") == line.rstrip(".") for line in lines)
        ]
        assert fitting == [answer]
        letters.add(answer)
    assert letters == set("ABCD")


def test_missing_words_are_in_the_passage(pairs):
    for _, asked, answer in exercises(pairs, "___"):
        if "\nA" in asked:
            continue
        passage, question = re.fullmatch(r"\w+: (.*)\n\w+: (.*)\n\w+:", asked).groups()
        whole = question.replace("___", answer)
        assert whole.rstrip(".") in passage and answer not in question


@pytest.mark.parametrize("share", [0.0, 0.45, 0.9])
def test_shares_of_the_text(pairs, share):
    """Bug: with many exercises the shares were more than all, and nothing was left to the text."""
    shares = shares_of(pairs=True, replay=True, exercises=share, text=TEXT)
    assert sum(shares.values()) == pytest.approx(1) and shares.get("exercises", 0) == share
    assert shares["text"] > 0.04
    read = {True: 0, False: 0}
    for pieces in islice(documents(pairs, 1, shares), 400):
        read[len(pieces) > 1] += sum(len(text) for text, _ in pieces)
    assert read[True] / sum(read.values()) == pytest.approx(share, abs=0.03)


def test_what_is_not_there_leaves_its_share_to_the_text():
    assert shares_of(pairs=False, replay=False, exercises=None, text=["қысқа мәтін"]) == {"text": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("only one column\n", "line 1: expected two columns"),
        ("kk\ten\tscore\na\tb\tgood\n", "line 2: its score"),
        ("бір\tone\n", "no pair"),
        ("a" * 200_000, "cannot be read"),
    ],
)
def test_bad_pairs_are_one_line(tmp_path, content, said):
    (tmp_path / "pairs.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_pairs(tmp_path / "pairs.tsv")


def test_a_field_of_any_length_is_one_line_for_tune_too(tmp_path):
    (tmp_path / "pairs.tsv").write_text(f"kk\ten\n{'a' * 200_000}\tb\n", encoding="utf-8")
    with pytest.raises(DataError, match="no table of sentence pairs"):
        tuning_pairs.read_pairs(tmp_path / "pairs.tsv", "kk")


def test_badly_aligned_pairs_are_left_out(pairs):
    assert len(pairs) == 20 * len(SUBJECTS)
    assert not any("қате" in pair.own.lower() for pair in pairs)


def test_pairs_are_read_as_they_are_written(tmp_path):
    line = "үкімет жаңа ( 2020 ) заң қарады .\tthe government read a new law ."
    (tmp_path / "pairs.tsv").write_text(line, encoding="utf-8")
    assert read_pairs(tmp_path / "pairs.tsv") == [
        Pair("Үкімет жаңа (2020) заң қарады.", "The government read a new law.")
    ]


def test_pairs_of_scripts_without_spaces_are_read(tmp_path):
    """Bug: a sentence of Thai or Tibetan counted as one word, and no such pair was taken."""
    english = "\tThailand has more than sixty million people"
    sentences = "ประเทศไทยมีประชากรมากกว่าหกสิบล้านคน", "བོད་ཀྱི་སྐད་ཡིག་ནི་གལ་ཆེན་པོ་ཡིན།"
    lines = [f"{own}{english}" for own in (*sentences, "ไทย", "ไทย" * 60)]
    (tmp_path / "pairs.tsv").write_text("\n\n".join(lines), encoding="utf-8")  # blank lines too
    assert tuple(pair.own for pair in read_pairs(tmp_path / "pairs.tsv")) == sentences


def test_pairs_of_evaluation_sets_are_left_out(tmp_path):
    """Bug: what --keep-out took out of the text was learned all the same from pairs."""
    sentences = [
        f"Бұл сынақта {n} рет кездесетін ұзақ сөйлем бар екен" for n in ("екі", "үш", "алты")
    ]
    english = [f"This long sentence comes {n} times in the test" for n in ("two", "three", "six")]
    pairs, said = tmp_path / "pairs.tsv", []
    lines = [f"{a}\t{b}" for a, b in zip(sentences, english, strict=True)]
    pairs.write_text("\n".join(lines), encoding="utf-8")
    held = tmp_path / "eval.txt"
    held.write_text(f"{sentences[0]}\n{english[2]}", encoding="utf-8")
    assert [pair.own for pair in read_pairs(pairs, [held], said.append)] == sentences[1:2]
    assert len(said) == 1 and "2 pairs" in said[0]
    with pytest.raises(DataError, match="without 3 pairs"):
        read_pairs(pairs, [pairs])
