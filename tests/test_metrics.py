"""Laws of the metrics: each agrees with its library, and its statistics add up."""

import os
import subprocess
import sys
import unicodedata
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from trimix_gguf.errors import TrimixError
from trimix_gguf.evaluation.tasks import metrics
from trimix_gguf.evaluation.tasks.metrics import METRICS, RougeTokenizer, last_number, squad_words

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
DATA = Path(os.environ.get("TRIMIX_DATA", SHARED))
N_LINES = 30
LINES = {
    "kk": [
        "Қазақстан — Орталық Азияда орналасқан мемлекет.",
        "Абай Құнанбайұлы — қазақтың ұлы ақыны, ойшылы және аудармашысы.",
        "Көктемде Наурыз мерекесі тойланады: адамдар бір-біріне қонаққа барып, көже ішеді.",
    ],
    "ug": [
        "ئۇيغۇر تىلى تۈركىي تىللار ئائىلىسىگە كىرىدۇ.",
        "ئۈرۈمچى شىنجاڭ ئۇيغۇر ئاپتونوم رايونىنىڭ مەركىزى، چوڭ شەھەر.",
    ],
    "bo": [
        "བོད་ཡིག་ནི་བོད་མི་རིགས་ཀྱི་ཡི་གེ་ཡིན།",
        "ལྷ་ས་ནི་བོད་ཀྱི་གྲོང་ཁྱེར་ཆེན་པོ་ཞིག་རེད། དེ་རུ་པོ་ཏ་ལ་ཡོད།",
    ],
    "bn": [
        "বাংলা ভাষা দক্ষিণ এশিয়ার একটি প্রধান ভাষা।",
        "ঢাকা বাংলাদেশের রাজধানী এবং দেশের বৃহত্তম শহর।",
    ],
}
FLORES = sorted(path.parent.name for path in DATA.glob("eval/*/flores200.txt"))


def worsened(line: str, n: int) -> str:
    """A line as a model might answer it: every third word lost, two swapped, one case changed."""
    words = [word for i, word in enumerate(line.split()) if (i + n) % 3 or i == 0]
    return " ".join([words[-1].upper(), *words[1:-1], words[0]])


@pytest.fixture(scope="module", params=[*LINES, *(f"flores-{lang}" for lang in FLORES)])
def corpus(request):
    """Predictions and their references, one each: a few sentences, or FLORES where it is here."""
    name = request.param.removeprefix("flores-")
    if name == request.param:
        references = LINES[name]
    else:
        text = (DATA / "eval" / name / "flores200.txt").read_text(encoding="utf-8")
        references = text.splitlines()[:N_LINES]
    return [worsened(line, n) for n, line in enumerate(references)], references


def statistics(name, predictions, references):
    """Statistics [n_examples, n_stats]; `references` holds one string each, or several."""
    many = [[each] if isinstance(each, str) else each for each in references]
    pairs = zip(predictions, many, strict=True)
    return np.stack([METRICS[name].statistics(*pair) for pair in pairs])


def library(name):
    sacrebleu = pytest.importorskip("sacrebleu.metrics", reason="the eval extra is not installed")
    return {
        "chrf++": lambda: sacrebleu.CHRF(word_order=2, lowercase=True),
        "bleu": lambda: sacrebleu.BLEU(),
    }[name]()


@pytest.mark.parametrize("name", ["chrf++", "bleu"])
def test_a_corpus_is_sacrebleus_to_the_last_digit(name, corpus):
    predictions, references = corpus
    expected = library(name).corpus_score(predictions, [references]).score
    assert expected < 100
    total = statistics(name, predictions, references).sum(axis=0)
    assert METRICS[name].value(total) == expected


@pytest.mark.parametrize("name", ["chrf++", "bleu"])
def test_a_resample_is_the_corpus_with_its_examples_repeated(name, corpus):
    predictions, references = corpus
    counts = np.random.default_rng(0).multinomial(
        len(predictions), [1 / len(predictions)] * len(predictions)
    )
    total = counts @ statistics(name, predictions, references)
    repeated = [np.repeat(np.array(side, object), counts).tolist() for side in corpus]
    assert (
        METRICS[name].value(total) == library(name).corpus_score(repeated[0], [repeated[1]]).score
    )


@pytest.mark.parametrize("name", ["chrf++", "bleu"])
def test_references_are_as_many_as_an_example_has(name):
    first = LINES["kk"]
    predictions = [worsened(line, 0) for line in first]
    second = [predictions[0], None, worsened(first[2], 2)]
    both = [[a, b] if b else [a] for a, b in zip(first, second, strict=True)]
    total = statistics(name, predictions, both).sum(axis=0)
    expected = library(name).corpus_score(predictions, [first, second]).score
    assert METRICS[name].value(total) == expected
    assert METRICS[name].value(total) > METRICS[name].value(
        statistics(name, predictions, first).sum(axis=0)
    )


def test_rouge_is_the_librarys_mean(corpus):
    scorer_module = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="the eval extra is not installed"
    )
    scorer = scorer_module.RougeScorer(["rougeL"], tokenizer=RougeTokenizer())
    predictions, references = corpus
    pairs = list(zip(predictions, references, strict=True))
    f1s = [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    assert 0 < np.mean(f1s) < 1
    total = statistics("rouge_l", predictions, references).sum(axis=0)
    assert METRICS["rouge_l"].value(total) == pytest.approx(100 * np.mean(f1s), rel=1e-12)
    answer, reference = pairs[0]
    best = METRICS["rouge_l"].statistics(answer, [references[1], reference, ""])
    multi = scorer.score_multi([references[1], reference, ""], answer)["rougeL"].fmeasure
    np.testing.assert_array_equal(best, [multi, 1])


def test_rouge_is_the_librarys_own_on_plain_english():
    scorer_module = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="the eval extra is not installed"
    )
    reference, answer = "The quick brown fox, 3 times.", "the brown Fox jumps 3 times"
    expected = scorer_module.RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert METRICS["rouge_l"].statistics(answer, [reference])[0] == expected > 0.5


def test_rouge_by_hand():
    """The longest common run of order in 4 and 5 words has 3: F1 is 2·3/9."""
    pytest.importorskip("rouge_score", reason="the eval extra is not installed")
    answer, reference = "Абай қазақтың ұлы ақыны!", "қазақтың ҰЛЫ ойшылы, ақыны Абай"
    score = METRICS["rouge_l"].statistics(answer, [reference])[0]
    assert score == pytest.approx(2 * 3 / 9)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Бір-біріне «көже» 2-ші, ЖАҢА.", ["бір", "біріне", "көже", "2", "ші", "жаңа"]),
        ("བོད་ཡིག་ནི། ཡི་གེ་ཡིན༎", ["བོད", "ཡིག", "ནི", "ཡི", "གེ", "ཡིན"]),
        ("র\u200d্যাব বাংলা।", ["র্যাব", "বাংলা"]),
        ("ئۇيغۇر، تىلى؟", ["ئۇيغۇر", "تىلى"]),
        ("中文，日本", ["中文", "日本"]),
        (" … ", []),
    ],
)
def test_rouge_tokens_are_runs_of_letters_marks_and_numbers(text, tokens):
    assert RougeTokenizer().tokenize(text) == tokens


@pytest.mark.parametrize("name", METRICS)
def test_statistics_have_one_width_and_values_run_from_0_to_100(name):
    module = {"chrf++": "sacrebleu", "bleu": "sacrebleu", "rouge_l": "rouge_score"}.get(name)
    if module:
        pytest.importorskip(module, reason="the eval extra is not installed")
    references = [f"{line} Олар 1,234 ғой" for lines in LINES.values() for line in lines]
    metric = METRICS[name]
    right = statistics(name, references, references)
    wrong = statistics(name, ["", "?", "†", *["xyz"] * (len(references) - 3)], references)
    assert right.dtype == wrong.dtype == np.float64 and right.shape == wrong.shape
    assert metric.value(right.sum(axis=0)) == pytest.approx(100)
    assert metric.value(wrong.sum(axis=0)) == 0
    n = len(references) // 2
    parts = right[:n].sum(axis=0) + wrong[n:].sum(axis=0)
    assert 0 < metric.value(parts) < 100


@pytest.mark.parametrize(
    ("prediction", "references", "is_right"),
    [
        (" Алматы ", ["алматы"], 1),
        ("Алматы.", ["Алматы"], 0),
        ("Алматы қаласы", ["Алматы"], 0),
        ("B", ["a", "b"], 1),
        ("", ["Алматы"], 0),
        (unicodedata.normalize("NFD", "Йод"), ["йод"], 1),
        ("এশিয\u09bcার", ["এশি\u09dfার"], 1),
    ],
)
def test_accuracy_by_hand(prediction, references, is_right):
    np.testing.assert_array_equal(
        METRICS["accuracy"].statistics(prediction, references), [is_right, 1]
    )


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("«Абай  Құнанбайұлы».", ["абай құнанбайұлы"], 1, 1),
        # Two words of three are common, whatever their order.
        ("ұлы ақын Абай", ["Абай — ақын, ойшыл"], 0, 2 / 3),
        # A word counts as often as both have it: 1 of 3 and 1 of 1.
        ("жаңа жаңа жаңа", ["жаңа"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("1999 жылы", ["2000", "1999 ЖЫЛ", "1999 жылы!"], 1, 1),
        ("1999 жылы", ["2000", "1999 ЖЫЛ"], 0, 1 / 2),
        ("the fox", ["fox"], 0, 2 / 3),
        ("$5", ["5"], 1, 1),
        ("ལྷ་ས།", ["ལྷ་ས་"], 1, 1),
        ("ལྷ་ས་ནི།", ["ལྷ་ས།"], 0, 4 / 5),
        ("ঢাকা।", ["ঢাকা"], 1, 1),
        ("\u200fئۈرۈمچى؟", ["ئۈرۈمچى"], 1, 1),
        ("", ["Алматы"], 0, 0),
        ("…", ["«»"], 1, 1),
        ("Астана", ["Алматы"], 0, 0),
    ],
)
def test_exact_match_and_f1_by_hand(prediction, references, exact, f1):
    assert METRICS["exact_match"].statistics(prediction, references)[0] == exact
    assert METRICS["f1"].statistics(prediction, references)[0] == pytest.approx(f1)


def test_a_mean_by_hand():
    assert squad_words("Бір-біріне, «қонаққа»!") == ["бірбіріне", "қонаққа"]
    total = statistics("f1", ["а б", "а", "в"], ["а г", "а", "а"]).sum(axis=0)
    np.testing.assert_allclose(total, [1.5, 3])
    assert METRICS["f1"].value(total) == pytest.approx(50)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Жауабы: 72.0", "72"),
        ("12 + 60 = 72.", "72"),
        ("$114,200 долл.", "114200"),
        ("১,০০,০০০ টাকা", "100000"),
        ("1,234,567.50", "1234567.5"),
        ("276\u00a0000", "276000"),
        ("2,5 кг", "2.5"),
        ("1,2345", "1.2345"),
        ("-5", "-5"),
        ("ол −1,5°", "-1.5"),
        ("10-5", "5"),
        ("টি-৫", "5"),
        ("١٬٢٣٤٫٥", "1234.5"),
        ("۷۲", "72"),
        ("༧༢", "72"),
        ("७२", "72"),
        ("౭౨", "72"),
        ("௭௨", "72"),
        ("୭୨", "72"),
        ("7, 8", "8"),
        ("сан жоқ", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_number_compares_values_and_not_how_they_are_written():
    score = METRICS["number"].statistics
    assert score("20 + 52 = ৭২.০", ["72"])[0] == 1
    assert score("114200", ["114,200"])[0] == 1
    assert score("72, 73", ["72"])[0] == score("жоқ", ["72"])[0] == score("-72", ["72"])[0] == 0
    with pytest.raises(TrimixError, match="'жоқ'"):
        score("72", ["жоқ"])


@pytest.mark.parametrize("name", ["chrf++", "bleu", "rouge_l"])
def test_an_absent_library_is_named_with_its_mend(name, monkeypatch):
    for module in ("sacrebleu.metrics", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    metrics._sacrebleu.cache_clear()
    metrics._rouge_scorer.cache_clear()
    with pytest.raises(TrimixError, match=r"needs .*pip install 'trimix-gguf\[eval\]'"):
        METRICS[name].statistics("a", ["a"])


def test_importing_metrics_loads_no_library():
    program = (
        "import sys, trimix_gguf.evaluation.tasks.metrics;"
        "import trimix_gguf.evaluation.reporting.statistics;"
        "print({'sacrebleu', 'rouge_score', 'nltk', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"
