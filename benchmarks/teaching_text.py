"""Text that teaches a small model a language, to translate, and to answer as exemplars do.

All of it is made of raw and sentence-aligned text; no task's questions, and no label that a person
gave. What is answered counts more in the loss than what is asked: an exercise is read for it.
"""

import csv
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Pieces = list[tuple[str, float]]  # a document: its text in parts, and what their tokens count
Pair = dict[str, str]  # a sentence by language

MIX = {"pairs": 0.55, "kazakh": 0.35, "english": 0.1}  # of the characters, beside exercises
ANSWER = 8.0  # what a token of an exercise's answer counts; all others 1
LETTERS = "ABCD"


def documents(data: Path, rng: random.Random, share: float) -> Iterator[Pieces]:
    """One after another, whichever kind is furthest behind its share; for ever.

    `share`: that of the exercises.
    """
    shares = {kind: (1 - share) * part for kind, part in MIX.items()} | {"exercises": share}
    kazakh = lines_of([data / "corpus/kk/train.txt"])
    english = lines_of(sorted((data / "corpus/en").glob("*-*.txt")))
    pairs = good_pairs(data / "parallel/kk-en.tsv")
    kinds = {
        "pairs": around(translations(pairs, rng), rng),
        "exercises": exercises(pairs, kazakh, rng),
        "kazakh": around(paragraphs(kazakh), rng),
        "english": around(paragraphs(english), rng),
    }
    read = {kind: 0 for kind, part in shares.items() if part > 0}
    while True:
        kind = min(read, key=lambda k: read[k] / shares[k])
        pieces = next(kinds[kind])
        read[kind] += sum(len(text) for text, _ in pieces)
        yield pieces


def around(texts: Sequence[str], rng: random.Random) -> Iterator[Pieces]:
    """The texts in random order, again and again."""
    while True:
        for text in rng.sample(texts, len(texts)):
            yield [(text, 1.0)]


# -- as it was written ----------------------------------------------------------------------


def lines_of(files: Sequence[Path]) -> list[str]:
    """Lines of more than three words."""
    return [
        line.strip()
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if len(line.split()) > 3
    ]


def paragraphs(lines: Sequence[str]) -> list[str]:
    """Six lines each, joined."""
    return [" ".join(lines[i : i + 6])[:1500] for i in range(0, len(lines), 6)]


def good_pairs(file: Path) -> list[Pair]:
    """Aligned sentences of 4 to 40 words."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        {"Kazakh": sentence(row["kk"]), "English": sentence(row["en"])}
        for row in rows
        if float(row["score"]) >= 0.5 and all(4 <= len(row[x].split()) <= 40 for x in ("kk", "en"))
    ]


def sentence(tokens: str) -> str:
    """Lower-cased words and marks apart -> a sentence as it is written."""
    text = re.sub(r" ([.,;:!?%)»])", r"\1", tokens.strip())
    text = re.sub(r"([(«]) ", r"\1", text)
    return text[:1].upper() + text[1:]


def translations(pairs: Sequence[Pair], rng: random.Random) -> list[str]:
    """Four aligned pairs each, one direction a document, every pair in both."""
    texts = []
    for source, target in (("Kazakh", "English"), ("English", "Kazakh")):
        shuffled = rng.sample(pairs, len(pairs))
        for i in range(0, len(shuffled), 4):
            texts.append(
                "\n\n".join(
                    f"{source}: {pair[source]}\n{target}: {pair[target]}"
                    for pair in shuffled[i : i + 4]
                )
            )
    return texts


# -- exercises: a handful of questions of one kind, each with its answer -------------------------


def exercises(pairs: Sequence[Pair], kazakh: Sequence[str], rng: random.Random) -> Iterator[Pieces]:
    """Of all kinds in turn, for ever."""
    short = [line for line in kazakh if 6 <= len(line.split()) <= 16]
    subjects = by_subject([p for p in pairs if len(p["Kazakh"].split()) <= 20])
    kinds: list[Callable[[], Pieces]] = [
        lambda: about(subjects, rng),
        lambda: gap_with_choices(short, rng),
        lambda: about(subjects, rng),
        lambda: gap_in_passage(short, rng),
    ]
    while True:
        for kind in kinds:
            yield kind()


def by_subject(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by the words, neither common nor rare, that their English has."""
    name = re.compile(r"\b(?![a-z]*(?:ed|ing|ly)\b)[a-z]{6,}\b")
    words = [set(name.findall(pair["English"].lower())) for pair in pairs]
    frequency = Counter(word for found in words for word in found)
    subjects: dict[str, list[Pair]] = {w: [] for w, n in frequency.items() if 15 <= n <= 250}
    for pair, found in zip(pairs, words, strict=True):
        for word in found & subjects.keys():
            subjects[word].append(pair)
    return subjects


def about(subjects: dict[str, list[Pair]], rng: random.Random) -> Pieces:
    """Which of some English words is in a Kazakh sentence's translation."""
    names = rng.sample(sorted(subjects), rng.randint(3, 7))
    heads = ("Which is each text about: {}?", "Sort the texts into {}.", "One of {} for each text.")
    asked, answered = rng.choice(
        [("Text", "Topic"), ("Sentence", "About"), ("Мәтін", "Тақырып"), ("Text", "Label")]
    )
    pieces: Pieces = [(rng.choice(heads).format(", ".join(names)) + "\n\n", 1.0)]
    for name in [*rng.sample(names, len(names)), *rng.choices(names, k=2)]:
        there = [
            pair
            for pair in subjects[name]
            if not any(other in pair["English"].lower() for other in names if other != name)
        ]
        if there:
            text = rng.choice(there)["Kazakh"]
            pieces += [(f"{asked}: {text}\n{answered}:", 1.0), (f" {name}\n\n", ANSWER)]
    return pieces


def gap_with_choices(lines: Sequence[str], rng: random.Random) -> Pieces:
    """Which of four words, by its letter, was taken out of a Kazakh sentence."""
    asked, answered = rng.choice([("Question", "Answer"), ("Сұрақ", "Жауап")])
    mark = rng.choice(["{}. ", "{}) "])
    pieces: Pieces = []
    for line in rng.sample(lines, 5):
        text, word = with_gap(line, rng)
        words = {word}
        while len(words) < len(LETTERS):
            words.add(with_gap(rng.choice(lines), rng)[1])
        choices = rng.sample(sorted(words), len(words))
        listed = "\n".join(mark.format(x) + y for x, y in zip(LETTERS, choices, strict=True))
        letter = LETTERS[choices.index(word)]
        pieces += [(f"{asked}: {text}\n{listed}\n{answered}:", 1.0), (f" {letter}\n\n", ANSWER)]
    return pieces


def gap_in_passage(lines: Sequence[str], rng: random.Random) -> Pieces:
    """Which words of a Kazakh passage of three sentences are missing in one of them."""
    context, asked, answered = rng.choice(
        [("Passage", "Question", "Answer"), ("Мәтін", "Сұрақ", "Жауап")]
    )
    pieces: Pieces = []
    for _ in range(3):
        at = rng.randrange(len(lines) - 3)
        passage = lines[at : at + 3]
        text, words = with_gap(rng.choice(passage), rng, n_words=rng.randint(1, 2))
        question = f"{context}: {' '.join(passage)}\n{asked}: {text}\n{answered}:"
        pieces += [(question, 1.0), (f" {words}\n\n", ANSWER)]
    return pieces


def with_gap(line: str, rng: random.Random, n_words: int = 1) -> tuple[str, str]:
    """A sentence without a word or two, and these."""
    words = line.split()
    at = rng.randint(1, len(words) - n_words)
    gone = " ".join(words[at : at + n_words])
    return " ".join([*words[:at], "___", *words[at + n_words :]]), gone.strip(".,;:!?«»()\"'—-")
