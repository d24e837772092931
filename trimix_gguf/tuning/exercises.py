"""Exercises with known answers, made of raw text: no label that a person gave.

Each kind has the form of something that people ask for, and an answer that stands in the text, so
that a model needs to follow the examples and not to know the world. `letter`: a school test, whose
answer is a letter. `word`: texts to sort, whose answer is one of a few words. `find`: a question
on a text, whose answer is in it. `ending`: a text that goes on. `into` English and
`from` it, where there are sentence pairs: which translation is the right one.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimix_gguf.errors import DataError
from trimix_gguf.tuning.pairs import Pair
from trimix_gguf.tuning.text import Sentence

GAP = "___"
LETTERS = "ABCD"
N_TOPICS = 5
N_ENDING = 3  # words: each token of a choice is read and scored over the grid
FEWEST_SENTENCES = 60
_PUNCTUATION = re.compile(r"^[^\w]+|[^\w]+$")


@dataclass(frozen=True)
class Exercise:
    """A question up to where its answer begins, the answers to pick from, and the right one."""

    question: str
    choices: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """The right choice."""
        return self.choices[self.right]


@dataclass(frozen=True)
class Kind:
    """Exercises of one kind: what is asked, worked examples, then one exercise after another."""

    name: str
    instruction: str
    exemplars: tuple[Exercise, ...]
    exercises: Iterator[Exercise]


Passages = Sequence[Sequence[Sentence]]


def kinds_of(passages: Passages, seed: int, *, pairs: Sequence[Pair] = ()) -> list[Kind]:
    """All kinds that the text and the pairs allow; raises DataError where they are too short."""
    made = [make(passages, random.Random(f"{seed} {make.__name__}")) for make in _KINDS]
    if not any(made):
        n = sum(map(len, passages))
        raise DataError(
            f"the text has {n} usable sentences, and exercises need {FEWEST_SENTENCES} or more; "
            "give more text"
        )
    if len(pairs) >= FEWEST_SENTENCES:
        made.append(_translation("into", pairs, random.Random(f"{seed} into")))
        swapped = [(english, text) for text, english in pairs]
        made.append(_translation("from", swapped, random.Random(f"{seed} from")))
    return [kind for kind in made if kind is not None]


def _letter(passages: Passages, rng: random.Random) -> Kind | None:
    sentences = [s for passage in passages for s in passage]
    if len(sentences) < FEWEST_SENTENCES:
        return None
    words = sorted({w for s in sentences for w in _words(s)})

    def make() -> Iterator[Exercise]:
        for sentence in rng.sample(sentences, len(sentences)):
            there = {w.lower() for w in _words(sentence)}
            right = rng.choice(_words(sentence) or [""])
            others = [w for w in rng.sample(words, min(len(words), 40)) if w.lower() not in there]
            if right and len(others) >= 3:
                others.sort(key=lambda w: abs(len(w) - len(right)))
                yield _lettered(f"Text: {sentence.text}", right, others[:3], rng)

    return _kind("letter", "Which word is in each text? Answer with its letter.", make(), 4)


def _word(passages: Passages, rng: random.Random) -> Kind | None:
    sentences = [s for passage in passages for s in passage]
    of_word = _by_word(sentences)
    topics = _topics(of_word, rng)
    if topics is None:
        return None
    texts = {word: rng.sample(of_word[word], len(of_word[word])) for word in topics}

    def make() -> Iterator[Exercise]:
        for at in range(min(len(found) for found in texts.values())):
            for topic in rng.sample(topics, len(topics)):
                text = texts[topic][at].text
                yield Exercise(f"Text: {text}\nWord:", tuple(topics), topics.index(topic))

    return _kind("word", f"Which word is in each text: {', '.join(topics)}?", make(), N_TOPICS)


def _find(passages: Passages, rng: random.Random) -> Kind | None:
    sentences = [s for passage in passages for s in passage]
    if len(sentences) < FEWEST_SENTENCES:
        return None

    def make() -> Iterator[Exercise]:
        shuffled = rng.sample(sentences, len(sentences))
        for a, b in zip(shuffled[::2], shuffled[1::2], strict=False):
            asked = rng.choice([a, b])
            spans = [s for one in (a, b) for s in _spans(one)]
            right = rng.choice(_spans(asked))
            others = [s for s in spans if s != right and not set(s.split()) & set(right.split())]
            if len(others) < 3:
                continue
            at = _place(asked, right)
            question = (
                f"Text: {a.text} {b.text}\nSentence: {_with_gap(asked, at, at + 2)}\nMissing:"
            )
            choices = rng.sample([right, *rng.sample(others, 3)], 4)
            yield Exercise(question, tuple(choices), choices.index(right))

    return _kind("find", "Find the missing words in the text.", make(), 3)


def _ending(passages: Passages, rng: random.Random) -> Kind | None:
    sentences = [s for passage in passages for s in passage if len(s.words) >= 8]
    if len(sentences) < FEWEST_SENTENCES:
        return None

    def make() -> Iterator[Exercise]:
        for sentence in rng.sample(sentences, len(sentences)):
            cut = len(sentence.words) - N_ENDING
            right = sentence.part(cut, len(sentence.words))
            drawn = [s for s in rng.sample(sentences, 24) if s != sentence]
            ends = [s.part(len(s.words) - N_ENDING, len(s.words)) for s in drawn]
            others = _about_as_long(ends, right)[:3]
            if len(others) < 3:
                continue
            choices = rng.sample([right, *others], 4)
            question = f"Beginning: {sentence.part(0, cut)}\nEnding:"
            yield Exercise(question, tuple(choices), choices.index(right))

    return _kind("ending", "Finish each sentence.", make(), 3)


def _translation(name: str, pairs: Sequence[Pair], rng: random.Random) -> Kind | None:
    def make() -> Iterator[Exercise]:
        for source, right in rng.sample(pairs, len(pairs)):
            others = _about_as_long([target for _, target in rng.sample(pairs, 24)], right)[:2]
            if len(others) < 2:
                continue
            choices = rng.sample([right, *others], 3)
            yield Exercise(f"{source}\nTranslation:", tuple(choices), choices.index(right))

    return _kind(name, "Translate each sentence.", make(), 3)


_KINDS: tuple[Callable[[Passages, random.Random], Kind | None], ...] = (
    _letter,
    _word,
    _find,
    _ending,
)


def _kind(name: str, instruction: str, made: Iterator[Exercise], n_exemplars: int) -> Kind | None:
    """None where the text gives too few exercises, as one of short words only does."""
    exemplars = tuple(itertools.islice(made, n_exemplars))
    return Kind(name, instruction, exemplars, made) if len(exemplars) == n_exemplars else None


# -- parts ------------------------------------------------------------------------------------


def _bare(word: str) -> str:
    return _PUNCTUATION.sub("", word)


def _about_as_long(texts: Sequence[str], right: str) -> list[str]:
    """Those that differ from `right`, each once, by length: else the shortest is the likeliest."""
    others = [text for text in dict.fromkeys(texts) if text != right]
    return sorted(others, key=lambda text: abs(len(text) - len(right)))


def _with_gap(sentence: Sentence, first: int, last: int) -> str:
    words = sentence.words
    return sentence.joint.join([*words[:first], GAP, *words[last:]])


def _words(sentence: Sentence) -> list[str]:
    """Words long enough to be told apart, but for the first, which may begin with a capital."""
    return [word for word in map(_bare, sentence.words[1:]) if len(word) > 4]


def _lettered(stem: str, right: str, others: Sequence[str], rng: random.Random) -> Exercise:
    options = rng.sample([right, *others], len(others) + 1)
    letters = LETTERS[: len(options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return Exercise("\n".join([stem, *lines, "Answer:"]), tuple(letters), options.index(right))


def _by_word(sentences: Sequence[Sentence]) -> dict[str, list[Sentence]]:
    found: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        # In an order of its own: a set has another one in each process, and it breaks ties.
        for word in sorted({_bare(w).lower() for w in sentence.words}):
            if len(word) > 4:
                found.setdefault(word, []).append(sentence)
    return found


def _topics(of_word: dict[str, list[Sentence]], rng: random.Random) -> list[str] | None:
    """Words, neither common nor rare, that do not stand together."""
    counts = Counter({word: len(found) for word, found in of_word.items()})
    # The commonest tie sentences together; what comes after them says what a text is about.
    middle = [word for word, n in counts.most_common(400)[60:] if n >= 8]
    if len(middle) < N_TOPICS:
        return None
    topics = rng.sample(sorted(middle), N_TOPICS)
    for word in topics:
        others = set(topics) - {word}
        of_word[word] = [
            s for s in of_word[word] if not others & {_bare(w).lower() for w in s.words}
        ]
    return topics if all(len(of_word[word]) >= 4 for word in topics) else None


def _spans(sentence: Sentence) -> list[str]:
    """Every two words of a sentence that stand side by side, but for the first and the last."""
    return [sentence.part(i, i + 2) for i in range(1, len(sentence.words) - 2)]


def _place(sentence: Sentence, span: str) -> int:
    return next(i for i in range(1, len(sentence.words)) if sentence.part(i, i + 2) == span)
