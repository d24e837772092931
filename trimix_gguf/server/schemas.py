"""JSON schemas from clients, within the limits of llama.cpp's grammars.

llama-cpp-python's converter does not end on some patterns, and llama.cpp crashes on tens of
thousands of repetitions: both are refused here.
"""

import json
import re
from typing import Any, NoReturn

from trimix_gguf.server.errors import RequestError

_MOST_BYTES = 1 << 16
_MOST_NODES = 20_000  # with every reference followed
_MOST_REPEATS = 1000
_MOST_PROPERTIES = 200
_MOST_PATTERN = 256
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[[^\]]*\]")
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def check_schema(schema: Any, at: str) -> dict[str, Any]:
    """The schema, if it is valid and within limits; raises RequestError, which names `at`."""
    if not isinstance(schema, dict):
        _refuse(at, "it is not an object")
    if len(json.dumps(schema)) > _MOST_BYTES:
        _refuse(at, f"it is longer than {_MOST_BYTES} bytes")
    _Walk(schema, at).visit(schema, ())
    return schema


def _refuse(at: str, why: str) -> NoReturn:
    raise RequestError(f"{at} cannot be used: {why}", param=at, code="invalid_schema")


class _Walk:
    """Visits all parts of a schema as the converter does: references are followed."""

    def __init__(self, root: dict[str, Any], at: str) -> None:
        self.root, self.at = root, at
        self.n_left, self.repeats_left = _MOST_NODES, _MOST_REPEATS * 10

    def visit(self, node: Any, following: tuple[str, ...]) -> None:
        self.n_left -= 1
        if self.n_left < 0:
            _refuse(self.at, f"it has more than {_MOST_NODES} parts, references followed")
        if isinstance(node, list):
            for item in node:
                self.visit(item, following)
        if not isinstance(node, dict):
            return
        self._check(node)
        for name, value in node.items():
            if name not in ("$defs", "definitions", "enum", "const"):
                self.visit(value, following)
        reference = node.get("$ref")
        if reference is not None and reference not in following:
            self.visit(self._resolve(reference), (*following, reference))

    def _check(self, node: dict[str, Any]) -> None:
        for name in _REPEATS:
            value = node.get(name, 0)
            if type(value) is int:
                self._repeat(name, value)
        properties = node.get("properties")
        if isinstance(properties, dict) and len(properties) > _MOST_PROPERTIES:
            _refuse(self.at, f"an object has more than {_MOST_PROPERTIES} properties")
        if isinstance(node.get("pattern"), str):
            self._check_pattern(node["pattern"])

    def _repeat(self, what: str, n: int) -> None:
        self.repeats_left -= max(0, n)
        if not 0 <= n <= _MOST_REPEATS:
            _refuse(self.at, f"{what} is {n}; expected 0 to {_MOST_REPEATS}")
        if self.repeats_left < 0:
            _refuse(self.at, f"it repeats more than {_MOST_REPEATS * 10} times in all")

    def _check_pattern(self, pattern: str) -> None:
        if len(pattern) > _MOST_PATTERN:
            _refuse(self.at, f"a pattern is longer than {_MOST_PATTERN} characters")
        bare = _CLASS.sub("", _ESCAPED.sub("", pattern))
        for pair in _QUANTIFIER.findall(bare):
            for n in filter(None, pair):
                self._repeat(f"a number of repetitions in pattern {pattern!r}", int(n))
        if re.search(r"\)\s*\{", bare):  # llama.cpp does not end where such a group may be empty
            _refuse(self.at, f"pattern {pattern!r} repeats a group by {{}}; write it out, or use *")
        if re.search(r"[\[\]{}]", _QUANTIFIER.sub("", bare)):
            _refuse(self.at, f"the brackets of pattern {pattern!r} do not pair; escape bare ones")

    def _resolve(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            _refuse(self.at, f"$ref {reference!r} is not within the schema (#/…)")
        target: Any = self.root
        for step in reference[2:].split("/"):
            if not isinstance(target, dict) or step not in target:
                _refuse(self.at, f"$ref {reference!r} is not in the schema")
            target = target[step]
        return target
