"""Exercises with known answers, made of raw text: no label that a person gave.

Each kind stands for what people ask for. `gap`: which word was taken out, by its letter, as in a
school test. `topic`: which of a few words a sentence is about, as in sorting texts. `find`: which
words of a passage are missing, as in questions on a text. `ending`: which ending a sentence has,
as when text goes on. `into` and `from`, of sentence pairs: which translation is the right one.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trimix_gguf.errors import DataError
from trimix_gguf.tuning.text import Sentence

GAP = "___"
LETTERS = "ABCD"
N_TOPICS = 5
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


def kinds_of(passages: Passages, seed: int) -> list[Kind]:
    """All kinds that the text allows; raises DataError where it is too short for any."""
    made = [make(passages, random.Random(f"{seed} {make.__name__}")) for make in _KINDS]
    found = [kind for kind in made if kind is not None]
    if not found:
        raise DataError("the text is too short to make exercises of; give 300 sentences or more")
    return found


def _gap(passages: Passages, rng: random.Random) -> Kind | None:
    sentences = [s for passage in passages for s in passage]
    if len(sentences) < 40:
        return None
    words = [w for s in sentences for w in map(_bare, s.words[1:]) if len(w) > 2]

    def make() -> Iterator[Exercise]:
        for sentence in rng.sample(sentences, len(sentences)):
            places = [i for i, w in enumerate(sentence.words) if i > 0 and len(_bare(w)) > 2]
            if not places:
                continue
            at = rng.choice(places)
            word = _bare(sentence.words[at])
            others = _distractors(word, words, rng, len(LETTERS) - 1)
            stem = f"Sentence: {_with_gap(sentence, at, at + 1)}"
            yield _lettered(stem, word, others, rng)

    return _kind("gap", "Which word is missing? Answer with its letter.", make(), 4)


def _topic(passages: Passages, rng: random.Random) -> Kind | None:
    sentences = [s for passage in passages for s in passage]
    of_word = _by_word(sentences)
    topics = _topics(of_word, rng)
    if topics is None:
        return None
    texts = {word: rng.sample(of_word[word], len(of_word[word])) for word in topics}

    def make() -> Iterator[Exercise]:
        for at in range(min(len(found) for found in texts.values())):
            for topic in rng.sample(topics, len(topics)):
                sentence = texts[topic][at]
                hidden = [GAP if _bare(w).lower() == topic else w for w in sentence.words]
                text = sentence.joint.join(hidden)
                yield Exercise(f"Text: {text}\nWord:", tuple(topics), topics.index(topic))

    return _kind("topic", f"Which word fits each text: {', '.join(topics)}?", make(), N_TOPICS)


def _find(passages: Passages, rng: random.Random) -> Kind | None:
    sentences = [s for passage in passages for s in passage]
    if len(sentences) < 40:
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
    if len(sentences) < 40:
        return None

    def make() -> Iterator[Exercise]:
        for sentence in rng.sample(sentences, len(sentences)):
            cut = len(sentence.words) // 2
            right = sentence.part(cut, len(sentence.words))
            drawn = [s for s in rng.sample(sentences, 24) if s != sentence]
            ends = [s.part(len(s.words) // 2, len(s.words)) for s in drawn]
            # About as long: else the shortest is the likeliest.
            others = sorted(ends, key=lambda text: abs(len(text) - len(right)))[:3]
            choices = rng.sample([right, *others], 4)
            question = f"Beginning: {sentence.part(0, cut)}\nEnding:"
            yield Exercise(question, tuple(choices), choices.index(right))

    return _kind("ending", "Finish each sentence.", make(), 3)


_KINDS: tuple[Callable[[Passages, random.Random], Kind | None], ...] = (
    _gap,
    _topic,
    _find,
    _ending,
)


def _kind(name: str, instruction: str, made: Iterator[Exercise], n_exemplars: int) -> Kind:
    exemplars = tuple(next(made) for _ in range(n_exemplars))
    return Kind(name, instruction, exemplars, made)


# -- parts ------------------------------------------------------------------------------------


def _bare(word: str) -> str:
    return _PUNCTUATION.sub("", word)


def _with_gap(sentence: Sentence, first: int, last: int) -> str:
    words = sentence.words
    return sentence.joint.join([*words[:first], GAP, *words[last:]])


def _distractors(word: str, words: Sequence[str], rng: random.Random, n: int) -> list[str]:
    """Other words of the text, about as long."""
    found: list[str] = []
    while len(found) < n:
        drawn = rng.sample(words, min(len(words), 12))
        near = min(
            drawn, key=lambda w: (w.lower() == word.lower() or w in found, abs(len(w) - len(word)))
        )
        found.append(near)
    return found


def _lettered(stem: str, right: str, others: Sequence[str], rng: random.Random) -> Exercise:
    options = rng.sample([right, *others], len(others) + 1)
    letters = LETTERS[: len(options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return Exercise("\n".join([stem, *lines, "Answer:"]), tuple(letters), options.index(right))


def _by_word(sentences: Sequence[Sentence]) -> dict[str, list[Sentence]]:
    found: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        for word in {_bare(w).lower() for w in sentence.words}:
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
