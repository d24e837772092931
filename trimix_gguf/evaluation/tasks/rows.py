"""Reads data files into rows, and checks their fields.

Rows come with the place where they stand, for error messages.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from trimix_gguf.errors import DataError
from trimix_gguf.machine.typed_json import parse

Record = dict[str, Any]  # an object as JSON holds it
Row = tuple[str, Record]  # its place ("…/test.tsv:12"), its fields
Fields = Mapping[str, Any]  # name -> its type, or a union of types


def read_lines(path: Path, *, ended: bool = False) -> list[str]:
    """The lines of a UTF-8 file. Only LF or CRLF ends a line: U+2028 may stand inside one.

    `ended` leaves out a last line without a line end: it is still being written.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if ended:
        raw = raw[: raw.rfind(b"\n") + 1]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def read_tsv(
    path: Path, fields: Sequence[str], *, header: bool = True, quoted: bool = False
) -> list[Row]:
    """Rows of a tab-separated file. Without a header, `fields` are its columns, in order.

    `quoted` reads quotation marks around a field as CSV does; otherwise they are text.
    """
    reader = csv.reader(
        read_lines(path),
        delimiter="\t",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,  # an open quotation mark must not swallow the rows below it
    )
    columns = None if header else list(fields)
    rows: list[Row] = []
    try:
        for values in reader:
            where = f"{path}:{reader.line_num}"
            if not values:
                continue
            if columns is None:
                columns = values
                continue
            if len(values) != len(columns):
                expected = f"{len(columns)} columns ({', '.join(columns)})"
                raise DataError(f"{where}: expected {expected}, got {len(values)}")
            record = dict(zip(columns, values, strict=True))
            rows.append((where, _checked(where, record, dict.fromkeys(fields, str))))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not tab-separated values: {error}") from None
    return _some(path, rows)


def read_jsonl(path: Path, fields: Fields, *, ended: bool = False) -> list[Row]:
    """Rows of a file with one JSON object per line; `ended` is that of read_lines."""
    rows: list[Row] = []
    for number, line in enumerate(read_lines(path, ended=ended), 1):
        if line.strip():
            where = f"{path}:{number}"
            rows.append((where, _checked(where, _parsed(path, line, number), fields)))
    return _some(path, rows)


def read_json(path: Path, fields: Fields) -> list[Row]:
    """Rows of a file with one JSON list of objects."""
    items = _parsed(path, "\n".join(read_lines(path)), 1)
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a JSON list of objects, got {_kind(items)}")
    places = [f"{path}, item {n}" for n in range(1, len(items) + 1)]
    return _some(path, [(w, _checked(w, i, fields)) for w, i in zip(places, items, strict=True)])


def _parsed(path: Path, text: str, first_line: int) -> Any:
    try:
        return parse(text, object)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}: not JSON: {error.msg}, column {error.colno}") from None
    except ValueError as error:
        raise DataError(f"{path}:{first_line}: JSON that cannot be used: {error}") from None


def _checked(where: str, record: object, fields: Fields) -> Record:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {_kind(record)}")
    for name, kind in fields.items():
        value = record.get(name)
        if value is None or value == "" or value == []:
            raise DataError(f"{where}: field {name!r} is missing; it has {', '.join(record)}")
        check_type(where, name, value, kind)
    return record


def check_type(where: str, name: str, value: object, kind: Any) -> None:
    """Raises DataError if a field's value is not of `kind`, a type or a union of types."""
    kinds = get_args(kind) or (kind,)
    if type(value) not in kinds:
        expected = " or ".join(_KINDS[k] for k in kinds)
        raise DataError(f"{where}: field {name!r} should be {expected}, got {_kind(value)}")


_KINDS: dict[type, str] = {
    str: "a text",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a decimal number",
    bool: "true or false",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


def _some(path: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def index_of(where: str, field: str, value: object, allowed: Sequence[str]) -> int:
    """The position of a gold answer in `allowed`; raises DataError if it is not there."""
    if str(value).strip() not in allowed:
        expected = f"one of {', '.join(allowed)}"
        raise DataError(f"{where}: field {field!r} should be {expected}; got {value!r}")
    return allowed.index(str(value).strip())


def one_line(text: str) -> str:
    """The text with each run of white space as one space: a newline would end an answer."""
    return " ".join(text.split())
