"""JSON schemas, checked and brought into the form that llguidance reads.

llguidance refuses what it cannot hold to, but for a few details, which are refused here: its
regular expressions, references to places that are no schemas, and chains of references that would
overflow its stack.
"""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from trimix_gguf.errors import SchemaError
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.mixing.patterns import portable

MOST_PARTS = 4000  # objects and lists; llguidance may need 10 kB of stack for each
_MOST_LEVELS = 100  # more than its JSON reader takes
_MOST_PROPERTIES = 400  # of one object; each costs a few of a step's 2,000 items
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_APPLICATORS = ("allOf", "anyOf", "oneOf", "$ref")
_REMARKS = ("title", "description", "default", "examples", "$comment", "$schema", "$id", "$defs",
            "definitions", "readOnly", "writeOnly", "deprecated")  # fmt: skip
_SPACE = r"\x20|\n[\x20\t]{0,20}"  # between tokens of JSON, as in llama.cpp's grammars
_EXACT = 2**53  # up to it, every integer is a float64
_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
_COUNTS = re.compile(r"(min|max)(Length|Items|Properties)")


def read_schema(schema: object) -> Any:
    """A schema as text, dict or boolean -> the same one for llguidance.

    Raises SchemaError, which names the keyword that cannot be used.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        value = parse(text, object)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half a pair, infinity
    except (ValueError, TypeError, RecursionError) as error:
        raise refused(f"it is not JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise refused("it is not an object")
    _check_size(value)
    walk = _Walk(value)
    if isinstance(value, dict):
        value = walk.schema(value, "#")
        walk.close_objects()
        value["x-guidance"] = {"whitespace_pattern": _SPACE}  # a schema's own could loosen it
    walk.check_references()
    return value


def refused(why: str) -> SchemaError:
    """The error for a schema that cannot be used."""
    return SchemaError(f"the JSON schema cannot be used: {why}")


def reason(error: str) -> str:
    """Why llguidance refuses a schema, from its message of several lines."""
    line = next(iter(error.splitlines()), "no reason given")
    line = line.rpartition("failed to compile JSON schema: ")[2]
    if found := re.match(r"Unimplemented keys: \[(.*)\]", line):
        return f"{found[1].replace(chr(34), '')} is not supported"
    if line.startswith("oneOf"):
        return "oneOf is supported only if no value can match two of its schemas; use anyOf"
    if line.startswith("NoExtension"):
        return "no text follows it, for example where it refers to itself and nothing else"
    if line.startswith("regex parse error"):
        detail = error.rpartition("error: ")[2].splitlines()
        line = f"pattern: {detail[0] if detail else 'it cannot be parsed'}"
    return "".join(c if c.isprintable() else " " for c in line)[:300]


def _check_size(value: Any) -> None:
    """Raise where it has too many parts or levels."""
    level, n_parts = [value], 0
    for _ in range(_MOST_LEVELS):
        inner = [v for v in level if isinstance(v, dict | list)]
        n_parts += len(inner)
        if n_parts > MOST_PARTS:
            raise refused(f"it has more than {MOST_PARTS} objects and lists")
        level = [w for v in inner for w in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise refused(f"it is nested more than {_MOST_LEVELS} levels deep")


class _Walk:
    """Visits every schema within a schema; `places` are their JSON pointers, decoded."""

    def __init__(self, root: Any) -> None:
        self.root, self.places = root, {"#"}
        self.references: list[str] = []
        self.walked: list[dict[str, Any]] = []

    def schema(self, node: Any, at: str) -> Any:
        """The schema at a place, for llguidance."""
        self.places.add(at)
        if not isinstance(node, dict):
            return node
        walked = {name: self._keyword(node, name, value, at) for name, value in node.items()}
        self.walked.append(walked)
        return walked

    def close_objects(self) -> None:
        """Let objects with named properties have no others, as small models find no end of them.

        What is left is valid too, as long as no schemas are merged or exclude each other.
        """
        for node in self.walked:
            rest = node.keys() - set(_REMARKS)
            if rest & {"allOf", "oneOf"} or (rest & set(_APPLICATORS) and len(rest) > 1):
                return
        for node in self.walked:
            named = node.get("properties")
            required = node.get("required", [])
            if not isinstance(named, dict) or not named or not isinstance(required, list):
                continue
            known = all(isinstance(name, str) and name in named for name in required)
            if "patternProperties" not in node and known:
                node.setdefault("additionalProperties", False)

    def _keyword(self, node: Mapping[str, Any], name: str, value: Any, at: str) -> Any:
        inner = f"{at}/{_escaped(name)}"
        if name in _MAPS and isinstance(value, dict):
            if len(value) > _MOST_PROPERTIES and name in ("properties", "patternProperties"):
                raise refused(f"{name} has more than {_MOST_PROPERTIES} names")
            walked = {k: self.schema(v, f"{inner}/{_escaped(k)}") for k, v in value.items()}
            if name == "patternProperties":
                walked = {_pattern(k, name): v for k, v in walked.items()}
            return walked
        if name == "items" and isinstance(value, list) and "$schema" not in self.root:
            raise refused("items as a list is of older drafts; use prefixItems, or say $schema")
        if (name in _LISTS or name == "items") and isinstance(value, list):
            return [self.schema(v, f"{inner}/{i}") for i, v in enumerate(value)]
        if name in _SINGLE:
            return self.schema(value, inner)
        if name == "pattern" and isinstance(value, str):
            return _pattern(value, name)
        if _COUNTS.fullmatch(name) and isinstance(value, float) and value.is_integer():
            value = int(value)  # 2.0 is an integer in JSON
        if name == "$ref" and isinstance(value, str):
            self.references.append(value)
            return quote(value, safe="#/%:?&=@!$'()*+,;~")
        _check_keyword(node, name, value, is_root=at == "#")
        return _inward(name, value)

    def check_references(self) -> None:
        """Raise where one leads out of the schema, or to what is no schema in it."""
        for reference in self.references:
            if not reference.startswith("#") or reference[1:2] not in ("", "/"):
                raise refused(f"$ref {reference!r} is not within the schema (#/…)")
            if unquote(reference) not in self.places:
                raise refused(f"$ref {reference!r} leads to no schema")


def _check_keyword(node: Mapping[str, Any], name: str, value: Any, *, is_root: bool) -> None:
    """Raise for what llguidance would take, and not hold to."""
    if name == "multipleOf" and isinstance(value, float) and not value.is_integer():
        raise refused("multipleOf of a fraction is not supported: binary numbers are not exact")
    if name in ("const", "enum", "multipleOf") and _has_large_number(value):
        raise refused(f"{name} with a number beyond 2^53 is not supported: it would be rounded")
    if name in ("$id", "id") and isinstance(value, str) and not is_root:
        raise refused(f"{name} below the root is not supported")
    if name == "minProperties" and isinstance(value, int):
        required = node.get("required")
        # Names may repeat in its grammar, and count once in a value.
        if value > max(1, len(required) if isinstance(required, list) else 0):
            raise refused("minProperties above the number of required properties is not supported")


def _has_large_number(value: Any) -> bool:
    level = [value]
    while level:
        if any(isinstance(v, int | float) and abs(v) > _EXACT for v in level):
            return True
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [w for v in inner for w in (v.values() if isinstance(v, dict) else v)]
    return False


def _inward(name: str, value: Any) -> Any:
    """A bound within what llguidance keeps exactly; what is left is valid too."""
    side = _BOUNDS.get(name)
    if side is None or type(value) not in (int, float) or abs(value) <= _EXACT:
        return value
    if value * side > 0:
        raise refused(f"{name} beyond 2^53 is not supported: numbers would be rounded")
    return -side * _EXACT


def _pattern(pattern: str, name: str) -> str:
    try:
        return portable(pattern)
    except ValueError as error:
        raise refused(f"{name} {pattern[:80]!r}: {error}") from None


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
