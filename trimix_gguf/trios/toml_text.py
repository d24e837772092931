"""Tables as TOML text, for the few kinds of values that a trio file has."""

import json
from typing import Any


def table_lines(values: dict[str, Any]) -> list[str]:
    """One line per value; what is None is left out."""
    return [f"{key} = {_value(value)}" for key, value in values.items() if value is not None]


def nested_lines(name: str, table: dict[str, Any]) -> list[str]:
    """A table and the tables in it, each under its own heading."""
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    flat = {key: value for key, value in table.items() if key not in inner}
    lines = ["", f"[{name}]", *table_lines(flat)] if flat else []
    for key, value in inner.items():
        lines += nested_lines(f"{name}.{key}", value)
    return lines


def _value(value: Any) -> str:
    # JSON writes strings and numbers as TOML does, except DEL, which it does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
