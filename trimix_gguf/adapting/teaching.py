"""What a small model learns from: text, English so that it is not forgotten, pairs, exercises.

Exercises are made of the text itself and of sentence pairs; no label that a person gave. What is
answered counts more in the loss than what is asked: an exercise is read for it. Their kinds are
not those that `trimix tune` asks, so that its verdict is not about what was practised.
"""

import csv
import random
import re
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from trimix_gguf.adapting.grams import n_words
from trimix_gguf.adapting.keeping_out import KeptOut
from trimix_gguf.errors import DataError
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.tuning.text import Sentence, passages_of

Pieces = list[tuple[str, int]]  # a document: its text in parts, and what their tokens count

ANSWER = 8  # what a token of an exercise's answer counts; all others 1
SHARES = {"pairs": 0.2, "exercises": 0.15, "replay": 0.05}  # of the characters; the rest is text
FEWEST_SENTENCES = 60
MOST_DOCUMENTS = 4000  # that exercises are made of
LETTERS = "ABCD"


@dataclass(frozen=True)
class Pair:
    """A sentence in the language, and in English."""

    own: str
    english: str


class Texts(Sequence[str]):
    """The documents of a file that prepare() wrote; only where they begin is in memory."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb")
        weakref.finalize(self, self._file.close)
        self._starts = array("q")
        at = 0
        for line in self._file:
            self._starts.append(at)
            at += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.seek(self._starts[index])
        return str(parse(self._file.readline(), [object])[1])


def shares_of(
    *, pairs: bool, replay: bool, exercises: float | None, text: Sequence[str]
) -> dict[str, float]:
    """The share of each kind that there is; `exercises` None is what SHARES has."""
    shares = dict(SHARES)
    if exercises is not None:
        shares["exercises"] = exercises
    if not pairs:
        shares.pop("pairs")
    if not replay:
        shares.pop("replay")
    if len(_sentences(_passages(text, random.Random(0)))) < FEWEST_SENTENCES:
        shares.pop("exercises")
    # The text keeps at least half of what exercises leave, as it does by SHARES.
    others = {kind: share for kind, share in shares.items() if kind != "exercises"}
    most = (1 - shares.get("exercises", 0)) / 2
    shares |= {k: share * min(1.0, most / sum(others.values())) for k, share in others.items()}
    shares = {kind: share for kind, share in shares.items() if share > 0}
    return {"text": 1 - sum(shares.values()), **shares}


def teach(
    text: Sequence[str],
    replay: Sequence[str],
    pairs: Sequence[Pair],
    shares: Mapping[str, float],
    rng: random.Random,
) -> Iterator[Pieces]:
    """One document after another, whichever kind is furthest behind its share; for ever."""
    kinds: dict[str, Callable[[], Iterator[Pieces]]] = {
        "text": lambda: _around(text, rng),
        "replay": lambda: _around(replay, rng),
        "pairs": lambda: _around(translations(pairs, rng), rng),
        "exercises": lambda: exercises(pairs, _passages(text, rng), rng),
    }
    running = {kind: kinds[kind]() for kind, share in shares.items() if share > 0}
    read = dict.fromkeys(running, 0)
    while True:
        kind = min(read, key=lambda k: read[k] / shares[k])
        pieces = next(running[kind])
        read[kind] += sum(len(part) for part, _ in pieces)
        yield pieces


def _around(texts: Sequence[str], rng: random.Random) -> Iterator[Pieces]:
    """The texts in random order, again and again."""
    while True:
        for at in rng.sample(range(len(texts)), len(texts)):
            yield [(texts[at], 1)]


def _passages(text: Sequence[str], rng: random.Random) -> list[list[Sentence]]:
    chosen = sorted(rng.sample(range(len(text)), min(len(text), MOST_DOCUMENTS)))
    return passages_of(line for at in chosen for line in text[at].splitlines())


def _sentences(passages: Sequence[Sequence[Sentence]]) -> list[Sentence]:
    return [s for passage in passages for s in passage if 6 <= len(s.words) <= 16]


# -- sentence pairs ---------------------------------------------------------------------------


def read_pairs(
    file: Path, keep_out: Sequence[Path] = (), say: Callable[[str], None] = lambda _: None
) -> list[Pair]:
    """Pairs of 4 to 40 words, from two columns: the language, then English.

    A first line that names a column `score` has the pairs below 0.5 left out. So are pairs of
    which a side stands in one of the sets to `keep_out`. Raises DataError.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--pairs {file} cannot be read: {error}") from None
    at = rows[0].index("score") if rows and "score" in rows[0] else None
    pairs = []
    for number, row in enumerate(rows[at is not None :], 1 + (at is not None)):
        if not row:  # a blank line
            continue
        if len(row) < 2:
            raise DataError(
                f"--pairs {file}, line {number}: expected two columns, the language and English, "
                "with a tab between them"
            )
        try:
            is_good = at is None or float(row[at]) >= 0.5
        except (ValueError, IndexError):
            raise DataError(f"--pairs {file}, line {number}: its score is not a number") from None
        if is_good and all(4 <= n_words(side) <= 40 for side in row[:2]):
            pairs.append(Pair(as_written(row[0]), as_written(row[1])))
    kept_out = KeptOut(keep_out)
    kept = [p for p in pairs if not (kept_out.has(p.own) or kept_out.has(p.english))]
    leaked = f"{len(pairs) - len(kept):,} pairs of the sets to keep out"
    if not kept:
        without = f", without {leaked}" if pairs else ""
        raise DataError(f"--pairs {file} holds no pair of sentences of 4 to 40 words{without}")
    if len(kept) < len(pairs):
        say(f"dropped   {leaked}")
    return kept


def as_written(tokens: str) -> str:
    """Words and marks apart -> a sentence as it is written."""
    text = re.sub(r" ([.,;:!?%)»])", r"\1", tokens.strip())
    text = re.sub(r"([(«]) ", r"\1", text)
    return text[:1].upper() + text[1:]


def translations(pairs: Sequence[Pair], rng: random.Random) -> list[str]:
    """Four aligned pairs each, one direction a document, every pair in both."""
    texts = []
    for into_english in (True, False):
        shuffled = rng.sample(pairs, len(pairs))
        for i in range(0, len(shuffled), 4):
            sides = [(p.own, p.english) if into_english else (p.english, p.own)
                     for p in shuffled[i : i + 4]]  # fmt: skip
            names = ("Text", "English") if into_english else ("English", "Text")
            texts.append("\n\n".join(f"{names[0]}: {a}\n{names[1]}: {b}" for a, b in sides))
    return texts


# -- exercises: a handful of questions of one kind, each with its answer ----------------------


def exercises(
    pairs: Sequence[Pair], passages: Sequence[Sequence[Sentence]], rng: random.Random
) -> Iterator[Pieces]:
    """Of all kinds in turn, for ever."""
    short = _sentences(passages)
    neighbours = [s for passage in passages for s in passage]
    kinds: list[Callable[[], Pieces]] = [
        lambda: gap_with_choices(short, rng),
        lambda: gap_in_passage(neighbours, rng),
    ]
    subjects = by_subject([p for p in pairs if n_words(p.own) <= 20])
    if len(subjects) >= 7:
        kinds = [lambda: about(subjects, rng), kinds[0], lambda: about(subjects, rng), kinds[1]]
    while True:
        for kind in kinds:
            yield kind()


def by_subject(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by the words, neither common nor rare, that their English has."""
    name = re.compile(r"\b(?![a-z]*(?:ed|ing|ly)\b)[a-z]{6,}\b")
    words = [set(name.findall(pair.english.lower())) for pair in pairs]
    frequency = Counter(word for found in words for word in found)
    subjects: dict[str, list[Pair]] = {w: [] for w, n in frequency.items() if 15 <= n <= 250}
    for pair, found in zip(pairs, words, strict=True):
        for word in sorted(found & subjects.keys()):
            subjects[word].append(pair)
    return subjects


def about(subjects: Mapping[str, Sequence[Pair]], rng: random.Random) -> Pieces:
    """Which of some English words is in a sentence's translation."""
    names = rng.sample(sorted(subjects), rng.randint(3, 7))
    heads = ("Which is each text about: {}?", "Sort the texts into {}.", "One of {} for each text.")
    asked, answered = rng.choice([("Text", "Topic"), ("Sentence", "About"), ("Text", "Label")])
    pieces: Pieces = [(rng.choice(heads).format(", ".join(names)) + "\n\n", 1)]
    for name in [*rng.sample(names, len(names)), *rng.choices(names, k=2)]:
        there = [
            pair
            for pair in subjects[name]
            if not any(other in pair.english.lower() for other in names if other != name)
        ]
        if there:
            text = rng.choice(there).own
            pieces += [(f"{asked}: {text}\n{answered}:", 1), (f" {name}\n\n", ANSWER)]
    return pieces


def gap_with_choices(sentences: Sequence[Sentence], rng: random.Random) -> Pieces:
    """Which of four words, by its letter, was taken out of a sentence."""
    asked, answered = rng.choice([("Question", "Answer"), ("Sentence", "Letter")])
    mark = rng.choice(["{}. ", "{}) "])
    pieces: Pieces = []
    for sentence in rng.sample(sentences, 5):
        text, word = with_gap(sentence, rng)
        words = {word}
        for other in rng.sample(sentences, min(len(sentences), 40)):
            if len(words) < len(LETTERS):
                words.add(with_gap(other, rng)[1])
        choices = rng.sample(sorted(words), len(words))
        listed = "\n".join(mark.format(x) + y for x, y in zip(LETTERS, choices, strict=False))
        letter = LETTERS[choices.index(word)]
        pieces += [(f"{asked}: {text}\n{listed}\n{answered}:", 1), (f" {letter}\n\n", ANSWER)]
    return pieces


def gap_in_passage(sentences: Sequence[Sentence], rng: random.Random) -> Pieces:
    """Which words of three sentences are missing in one of them."""
    context, asked, answered = rng.choice(
        [("Passage", "Question", "Answer"), ("Reading", "Gap", "Words")]
    )
    pieces: Pieces = []
    for _ in range(3):
        at = rng.randrange(len(sentences) - 3)
        passage = sentences[at : at + 3]
        text, words = with_gap(rng.choice(passage), rng, n_words=rng.randint(1, 2))
        whole = " ".join(s.text for s in passage)
        question = f"{context}: {whole}\n{asked}: {text}\n{answered}:"
        pieces += [(question, 1), (f" {words}\n\n", ANSWER)]
    return pieces


def with_gap(sentence: Sentence, rng: random.Random, n_words: int = 1) -> tuple[str, str]:
    """A sentence without a word or two, and these."""
    words, joint = sentence.words, sentence.joint
    at = rng.randint(1, len(words) - n_words)
    gone = joint.join(words[at : at + n_words])
    text = joint.join([*words[:at], "___", *words[at + n_words :]])
    return text, gone.strip(".,;:!?«»()\"'—-")
