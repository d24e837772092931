"""Sentence pairs: a table of tab-separated columns named by language."""

import csv
from pathlib import Path

from trimix_gguf.errors import DataError

Pair = tuple[str, str]  # a sentence in the language, and in English
_LONGEST = 110  # characters
_LEAST_SCORE = 0.5  # of alignment, where the file has a column `score`


def read_pairs(file: Path, language: str) -> list[Pair]:
    """Pairs from a file whose first line names its columns: `en`, and the language's code.

    The only other column may have another name. Raises DataError where a column is missing.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
            columns = rows.fieldnames or []
            others = [language] if language in columns else [c for c in columns if c != "en"]
            if "en" not in columns or not others:
                raise DataError(
                    f"{file}: the first line names the columns, as 'kk<TAB>en'; it has {columns}"
                )
            if len(others) > 1:
                raise DataError(
                    f"{file}: no column {language!r} among {columns}; name the right one by --lang"
                )
            ours = others[0]
            found = [(row[ours] or "", row["en"] or "", row.get("score")) for row in rows]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"{file} is no table of sentence pairs: {error}") from None
    return [
        (a.strip(), b.strip())
        for a, b, score in found
        if 20 <= len(a) <= _LONGEST and 20 <= len(b) <= _LONGEST and _is_aligned(score)
    ]


def _is_aligned(score: str | None) -> bool:
    try:
        return score is None or float(score) >= _LEAST_SCORE
    except ValueError:
        return True
