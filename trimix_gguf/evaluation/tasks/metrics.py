"""Metrics of generated answers, each by statistics that add up over examples.

The value for a corpus, a part of it or a bootstrap resample follows from the sum of its statistics,
so no answer is generated or compared again. If an example has several references, the best one
counts (BLEU: n-grams of all of them).
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any, Protocol

import numpy as np

from trimix_gguf.errors import TrimixError
from trimix_gguf.mixing.scoring import Float64

_GROUP = "[,٬\u00a0\u202f]"  # between thousands, or lakhs: 1,00,000
_GROUPED = rf"\d{{1,3}}(?:{_GROUP}\d{{2,3}})*{_GROUP}\d{{3}}(?!\d)"
_NUMBER = re.compile(rf"([-−]?)({_GROUPED}|\d+)(?:[.,٫](\d+))?")


class Metric(Protocol):
    """How answers are judged: `statistics` of each example, `value` of their sum."""

    @property
    def name(self) -> str:
        """The metric's name in a table."""

    def statistics(self, prediction: str, references: Sequence[str]) -> Float64:
        """The statistics [n_stats] of one example with one or more references."""

    def value(self, total: Float64) -> float:
        """The metric, 0 … 100, from the summed statistics [n_stats] of one or more examples."""


@dataclass(frozen=True)
class Mean:
    """The mean over examples of `score(prediction, reference)`, 0 … 1; statistics [score, 1]."""

    name: str
    score: Callable[[str, str], float]

    def statistics(self, prediction: str, references: Sequence[str]) -> Float64:
        """[the best score, 1]."""
        return np.array([max(self.score(prediction, r) for r in references), 1.0])

    def value(self, total: Float64) -> float:
        """The mean score, in percent."""
        return float(100 * total[0] / total[1])


@dataclass(frozen=True)
class Sacrebleu:
    """A corpus metric of sacrebleu, with all its digits: counts of n-grams, and lengths.

    The text is not changed: sacrebleu does not normalize Unicode, and its words end at spaces and
    ASCII punctuation, so BLEU says little about Tibetan. Raises TrimixError if sacrebleu is not
    installed.
    """

    name: str

    def statistics(self, prediction: str, references: Sequence[str]) -> Float64:
        """sacrebleu's counts for one sentence."""
        streams = [[reference] for reference in references]
        counts = _sacrebleu(self.name)._extract_corpus_statistics([prediction], streams)
        return np.array(counts[0], np.float64)

    def value(self, total: Float64) -> float:
        """sacrebleu's score of a corpus with these counts."""
        return float(_sacrebleu(self.name)._compute_score_from_stats(total.tolist()).score)


@cache
def _sacrebleu(name: str) -> Any:
    try:
        from sacrebleu.metrics import BLEU, CHRF  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        raise TrimixError(f"{name} needs sacrebleu: pip install 'trimix-gguf[eval]'") from None
    return CHRF(word_order=2, lowercase=True) if name == "chrF++" else BLEU()


def folded(text: str) -> str:
    """The text without case, in NFC, with single spaces: one form of what readers take as equal."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def squad_words(text: str) -> list[str]:
    """The words that exact match and F1 compare, by SQuAD's rules for any script.

    The text is folded; punctuation (all of Unicode P, and ASCII's symbols as in SQuAD) and
    invisible format marks are removed; it is split at spaces, in Tibetan also at tsheg and shad.
    Articles stay: SQuAD's rule for them is only for English.
    """
    kept = []
    for char in folded(text):
        category = unicodedata.category(char)
        if category[0] == "P" or category == "Cf" or char in string.punctuation:
            char = " " if "\u0f00" <= char <= "\u0fff" else ""
        kept.append(char)
    return "".join(kept).split()


def accuracy(prediction: str, reference: str) -> float:
    """1 if both are equal when folded."""
    return float(folded(prediction) == folded(reference))


def exact_match(prediction: str, reference: str) -> float:
    """1 if both have the same words."""
    return float(squad_words(prediction) == squad_words(reference))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the words' precision and recall; two empty texts are equal (SQuAD 2.0)."""
    predicted, expected = squad_words(prediction), squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


class RougeTokenizer:
    """Splits any script for rouge-score, which keeps only a-z and 0-9 by itself.

    A token is a run of letters, marks and numbers, folded, without format marks (joiners). This
    splits Tibetan into syllables, at tsheg and shad; Chinese and Japanese, which have no spaces
    between words, only at punctuation.
    """

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        kept = []
        for char in folded(text):
            category = unicodedata.category(char)
            kept.append(char if category[0] in "LMN" else "" if category == "Cf" else " ")
        return "".join(kept).split()


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L's F1; raises TrimixError if rouge-score is not installed."""
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise TrimixError("ROUGE-L needs rouge-score: pip install 'trimix-gguf[eval]'") from None
    return RougeScorer(["rougeL"], tokenizer=RougeTokenizer())


def last_number(text: str) -> Decimal | None:
    """The last number in a text, in the decimal digits of any script; None if there is none.

    A comma before three digits groups thousands; another comma between digits is a decimal point,
    as in Kazakh. A minus after a letter or a digit is a hyphen or a subtraction.
    """
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    sign, whole, fraction = matches[-1].groups(default="0")
    before = text[: matches[-1].start()]
    is_negative = sign and not (before and unicodedata.category(before[-1])[0] in "LMN")
    return Decimal(f"{'-' * bool(is_negative)}{re.sub(_GROUP, '', whole)}.{fraction}")


def same_number(prediction: str, reference: str) -> float:
    """1 if the last numbers are equal; raises TrimixError for a reference without a number."""
    expected = last_number(reference)
    if expected is None:
        raise TrimixError(
            f"a reference with a number was expected, got {reference!r}: use accuracy for it"
        )
    return float(last_number(prediction) == expected)


METRICS: dict[str, Metric] = {
    "accuracy": Mean("accuracy", accuracy),
    "exact_match": Mean("exact match", exact_match),
    "f1": Mean("F1", f1),
    "chrf++": Sacrebleu("chrF++"),
    "bleu": Sacrebleu("BLEU"),
    "rouge_l": Mean("ROUGE-L", rouge_l),
    "number": Mean("number", same_number),
}
