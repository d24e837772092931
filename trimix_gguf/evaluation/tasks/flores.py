"""FLORES-200: sentences into and out of English (Goyal et al., 2022; NLLB, 2022).

Needs `eval/<lang>/flores200.txt`, line-aligned with `eval/en/flores200.txt`, and exemplars from
FLORES' dev part: `eval/<lang>/flores200_fewshot.tsv`, columns <lang> and en.
"""

from pathlib import Path

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks.rows import one_line, read_lines, read_tsv
from trimix_gguf.evaluation.tasks.sources import LANGUAGE_NAMES, find
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task

LANGUAGES = tuple(lang for lang in LANGUAGE_NAMES if lang != "en")


def load_to_english(data: Path, lang: str, seed: int) -> Dataset:
    """Sentences of `lang`, with English references."""
    return _load(data, lang, "en", lang, seed)


def load_from_english(data: Path, lang: str, seed: int) -> Dataset:
    """English sentences, with references in `lang`."""
    return _load(data, "en", lang, lang, seed)


def _load(data: Path, source: str, target: str, lang: str, seed: int) -> Dataset:
    texts = {lang: _sentences(data, lang), "en": _sentences(data, "en")}
    if len(texts[lang]) != len(texts["en"]):
        raise DataError(
            f"{data}/eval: {lang}/flores200.txt should have a line for each of en/flores200.txt's"
            f" {len(texts['en'])}, it has {len(texts[lang])}"
        )
    pairs = zip(texts[source], texts[target], strict=True)
    examples = [translation(f"{n}", pair, source, target) for n, pair in enumerate(pairs, 1)]
    dev = find(
        data,
        f"eval/{lang}/flores200_fewshot.tsv",
        mend=f"exemplars come from it: give it pairs of FLORES' dev part, in columns {lang} and en",
    )
    rows = read_tsv(dev, (lang, "en"))
    pool = [
        translation(f"dev-{n}", (row[source], row[target]), source, target)
        for n, (_, row) in enumerate(rows, 1)
    ]
    return Dataset.shuffled(examples, pool, seed)


def _sentences(data: Path, lang: str) -> list[str]:
    path = find(data, f"eval/{lang}/flores200.txt")
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{path}:{number}: expected a sentence, got an empty line")
    return lines


def translation(name: str, pair: tuple[str, str], source: str, target: str) -> Example:
    """A sentence after the name of its language; the answer follows the name of the other one."""
    given, wanted = (one_line(text) for text in pair)
    question = f"{LANGUAGE_NAMES[source]}: {given}\n{LANGUAGE_NAMES[target]}:"
    return Example(name, question, wanted, (wanted,))


TO_ENGLISH = Task(
    name="flores-to-en",
    languages=LANGUAGES,
    instruction="Translate each sentence into English.",
    metrics=("chrf++", "bleu"),
    max_tokens=200,
    load=load_to_english,
)
FROM_ENGLISH = Task(
    name="flores-from-en",
    languages=LANGUAGES,
    instruction="Translate each English sentence into the language named below it.",
    metrics=("chrf++", "bleu"),
    max_tokens=200,
    load=load_from_english,
)
