"""The text that benchmarks/train_adapter.py teaches with: its exercises have the right answers."""

import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import teaching_text

SUBJECTS = ("budget", "harvest", "school", "bridge", "museum", "doctor", "railway", "climate")


@pytest.fixture
def data(tmp_path):
    """Raw and aligned text in which every word tells its line."""
    for folder in ("corpus/kk", "corpus/en", "parallel"):
        (tmp_path / folder).mkdir(parents=True)
    kazakh = [" ".join(f"сөз{line}н{at}" for at in range(8)) + "." for line in range(60)]
    (tmp_path / "corpus/kk/train.txt").write_text("\n".join(kazakh), encoding="utf-8")
    english = [f"This is line {line} of a novel." for line in range(60)]
    (tmp_path / "corpus/en/an-author.txt").write_text("\n".join(english), encoding="utf-8")
    rows = ["kk\ten\tscore\tsite"]
    for at in range(20 * len(SUBJECTS)):
        word = SUBJECTS[at % len(SUBJECTS)]
        rows.append(f"мәтін {word} туралы {at} .\tthe {word} of year {at} .\t0.9\tnews")
        rows.append(f"қате {word} туралы {at} .\tnothing of year {at} .\t0.1\tnews")
    (tmp_path / "parallel/kk-en.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def exercises(data, wanted):
    """(asked, answer) of the first documents whose text has `wanted`, and their heads."""
    found = []
    for pieces in islice(teaching_text.documents(data, random.Random(3), 1.0), 80):
        texts = [text for text, _ in pieces]
        if wanted in "".join(texts):
            answers = [at for at, (_, count) in enumerate(pieces) if count == teaching_text.ANSWER]
            found += [(texts[0], texts[at - 1], texts[at].strip()) for at in answers]
    assert len(found) > 50
    return found


def test_a_subject_is_that_of_the_translation_and_one_of_those_named(data):
    for head, asked, answer in exercises(data, "туралы"):
        assert f" {answer} " in asked and answer in head
        assert "қате" not in asked.lower()


def test_the_letter_is_that_of_the_word_that_fills_the_gap(data):
    lines = (data / "corpus/kk/train.txt").read_text("utf-8").splitlines()
    letters = set()
    for _, asked, answer in exercises(data, "A"):
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


def test_missing_words_are_in_the_passage(data):
    for _, asked, answer in exercises(data, "___"):
        if "\nA" in asked:
            continue
        passage, question = re.fullmatch(r"\w+: (.*)\n\w+: (.*)\n\w+:", asked).groups()
        whole = question.replace("___", answer)
        assert whole.rstrip(".") in passage and answer not in question


@pytest.mark.parametrize("share", [0.0, 0.45])
def test_shares_of_the_text(data, share):
    read = {True: 0, False: 0}
    for pieces in islice(teaching_text.documents(data, random.Random(1), share), 400):
        read[len(pieces) > 1] += sum(len(text) for text, _ in pieces)
    assert read[True] / sum(read.values()) == pytest.approx(share, abs=0.02)
