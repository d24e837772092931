"""A user's own questions: one JSON object per line.

    {"instruction": "Answer in Kazakh.", "language": "kk"}
    {"question": "Қазақстан астанасы?", "answer": "Астана", "exemplar": true}
    {"question": "Ең ұзын өзен?", "answer": ["Ертіс", "Ертіс өзені"]}
    {"question": "2 + 2 = ?", "choices": ["3", "4"], "answer": "B"}

A row has a `question` and an `answer`: a text, or a list of those that count as right. With
`choices` the answer is a letter or the text of a choice. Rows with `"exemplar": true` are shown
in prompts and not asked; without any, prompts have no exemplars.

The first line may hold settings in place of a question, each of them optional: `instruction`,
`language`, `metrics` (accuracy for choices, else exact_match and f1), `max_tokens` (2 for
choices, else 64), `n_exemplars` (5, or as many as there are).
"""

import re
from collections.abc import Sequence
from pathlib import Path

from trimix_gguf.errors import DataError
from trimix_gguf.evaluation.tasks.belebele import LETTERS, lettered, read_letter
from trimix_gguf.evaluation.tasks.metrics import METRICS, last_number
from trimix_gguf.evaluation.tasks.rows import (
    Fields,
    Record,
    Row,
    check_type,
    index_of,
    read_jsonl,
)
from trimix_gguf.evaluation.tasks.task import Dataset, Example, Task

# No-break spaces are no part of it: between digits they group thousands.
_SPACE = re.compile(r"[^\S\u00a0\u202f]+")
_SPACED = re.compile(r"\d \d{3}(?!\d)")
_NO_LANGUAGE = "und"  # ISO 639: not determined
_SETTINGS: Fields = {
    "instruction": str,
    "language": str,
    "metrics": list,
    "max_tokens": int,
    "n_exemplars": int,
}
_ROW: Fields = {"question": str, "answer": str | list, "choices": list, "exemplar": bool}


def custom_task(path: Path) -> Task:
    """The task of a JSONL file, named after it; its `load` ignores data and lang.

    Raises DataError if the file or one of its lines does not have the form above.
    """
    rows = read_jsonl(path, {})
    settings = {} if "question" in rows[0][1] else _typed(rows.pop(0), _SETTINGS)
    examples, pool = _split(path, [(where, _typed((where, row), _ROW)) for where, row in rows])
    with_choices = {bool(example.choices) for example in examples + pool}
    if len(with_choices) == 2:
        raise DataError(f"{path}: some rows have choices and some do not; make two files of it")
    chosen = with_choices.pop()
    metrics = _metrics(path, settings, ("accuracy",) if chosen else ("exact_match", "f1"))
    if "number" in metrics:
        for example in examples:
            _check_numbers(f"{path}:{example.id}", example)

    def load(data: Path, lang: str, seed: int) -> Dataset:
        return Dataset.shuffled(examples, pool, seed)

    return Task(
        name=path.stem,
        languages=(settings.get("language", _NO_LANGUAGE),),
        instruction=settings.get("instruction", "Answer each question."),
        metrics=metrics,
        max_tokens=settings.get("max_tokens", 2 if chosen else 64),
        load=load,
        n_exemplars=min(settings.get("n_exemplars", 5), len(pool)),
        read_answer=read_letter if chosen else None,
    )


def language_of(paths: Sequence[Path]) -> str | None:
    """The language that the files' first lines name; None where none does.

    Raises DataError where two name different ones.
    """
    named = {p: lang for p in paths if (lang := custom_task(p).languages[0]) != _NO_LANGUAGE}
    if len(set(named.values())) > 1:
        listed = ", ".join(f"{path.name} {lang}" for path, lang in named.items())
        raise DataError(f"one run is of one language, and the files have several: {listed}")
    return next(iter(named.values()), None)


def _typed(row: Row, known: Fields) -> Record:
    """The fields of a line; raises DataError for one that is unknown or of another type."""
    where, record = row
    for name, value in record.items():
        if name not in known:
            raise DataError(f"{where}: field {name!r} is unknown; known are {', '.join(known)}")
        check_type(where, name, value, known[name])
        least = 1 if name == "max_tokens" else 0
        if type(value) is int and value < least:
            raise DataError(f"{where}: field {name!r} should be {least} or more, got {value}")
    return record


def _split(path: Path, rows: Sequence[Row]) -> tuple[list[Example], list[Example]]:
    """(examples, pool); the id of an example is the number of its line."""
    examples: list[Example] = []
    pool: list[Example] = []
    for where, row in rows:
        example = _example(where, row)
        (pool if row.get("exemplar") else examples).append(example)
    if not examples:
        raise DataError(f"{path} has no question to ask: each of its rows is an exemplar")
    return examples, pool


def _example(where: str, row: Record) -> Example:
    for field in ("question", "answer"):
        if not all(_texts(where, row, field) or [""]):
            raise DataError(f"{where}: field {field!r} is missing; it has {', '.join(row)}")
    name, stem = where.rsplit(":", 1)[1], f"Question: {row['question'].strip()}"
    if _texts(where, row, "choices"):
        choices = [str(choice) for choice in row["choices"]]
        return lettered(name, stem, choices, _gold(where, row))
    answers = tuple(_texts(where, row, "answer"))
    return Example(name, f"{stem}\nAnswer:", answers[0], answers)


def _texts(where: str, row: Record, field: str) -> list[str]:
    """What a field holds, each on one line; raises DataError for null, a list or an object."""
    value = row.get(field, [])
    items = value if type(value) is list else [value]
    for item in items:
        check_type(where, field, item, str | int | float | bool)
    return [_SPACE.sub(" ", str(item)).strip() for item in items]


def _gold(where: str, row: Record) -> int:
    """The position of the right choice: looked up by its text first, then by its letter."""
    choices = [str(choice) for choice in row["choices"]]
    if len(choices) > len(LETTERS):
        raise DataError(
            f"{where}: at most {len(LETTERS)} choices have a letter; got {len(choices)}"
        )
    if row["answer"] in choices:
        return choices.index(row["answer"])
    return index_of(where, "answer", row["answer"], tuple(LETTERS[: len(choices)]))


def _check_numbers(where: str, example: Example) -> None:
    for reference in example.references:
        if last_number(reference) is None:
            raise DataError(
                f"{where}: metric 'number' compares numbers, and {reference!r} has none"
            )
        if _SPACED.search(reference):
            raise DataError(
                f"{where}: metric 'number' takes {reference!r} for several numbers; write thousands"
                " without spaces"
            )


def _metrics(path: Path, settings: Record, default: tuple[str, ...]) -> tuple[str, ...]:
    known = tuple(METRICS)
    given = [index_of(f"{path}:1", "metrics", name, known) for name in settings.get("metrics", ())]
    return tuple(known[at] for at in dict.fromkeys(given)) or default
