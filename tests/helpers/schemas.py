"""JSON schemas and their judge: what is asked for, and what breaks it."""

import json

from trimix_gguf.mixing.masks import SchemaMask, TokenTree

BYTES = TokenTree([bytes([i]) for i in range(256)])  # any text is 256 tokens' sequence

# Each once went wrong: a keyword dropped, another definition taken, a text that is not JSON.
ASKED = [
    {"enum": [1, 2.5, True, None]},
    {"const": "бірінші\nекінші\t\"үшінші\" \\ 👍"},
    {"type": "object", "properties": {'тырнақша " 👍': {"type": "boolean"}},
     "required": ['тырнақша " 👍']},
    {"type": ["string", "null"], "enum": ["төмен", "жоғары", None]},
    {"type": ["integer", "string"], "const": 5},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": ["array", "null"], "items": {"type": "integer"}, "maxItems": 3},
    {"type": ["object", "null"], "properties": {"жас": {"type": "integer"}}, "required": ["жас"],
     "additionalProperties": False},
    {"type": "object", "properties": {"жас": {"type": "integer", "minimum": 18, "maximum": 25}},
     "required": ["жас"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2.0, "maxItems": 3.0},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "integer"}], "items": False},
    {"$defs": {"string": {"enum": ["иә", "жоқ"]}}, "type": "object",
     "properties": {"b": {"type": "string", "enum": ["x"]}, "c": {"$ref": "#/$defs/string"}},
     "required": ["b", "c"]},
    {"$defs": {"Қала": {"enum": ["def"]}, "a/b": {"type": "boolean"}}, "type": "object",
     "properties": {"Қала": {"enum": ["own"]}, "home": {"$ref": "#/$defs/Қала"},
                    "x": {"$ref": "#/$defs/%D2%9A%D0%B0%D0%BB%D0%B0"},
                    "y": {"$ref": "#/$defs/a~1b"}, "z": {"$ref": "#/properties/y"}},
     "required": ["Қала", "home", "x", "y", "z"]},
    {"type": "object", "properties": {
        "v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
     "required": ["v", "next"]},
    {"type": "string", "pattern": "^[А-Яа-яӘәҒғҚқҢңӨөҰұҮүҺһІі]{3,8}$"},
    {"type": "string", "pattern": "^\\+7-\\d{3}$"},
    {"type": "string", "pattern": "^(a?){3}]$"},
    {"type": "string", "pattern": "^[\\w-]+$", "maxLength": 3},
    {"type": "string", "format": "date"},
    {"type": "object", "properties": {"s": {"type": "string", "minLength": 20, "maxLength": 60}},
     "required": ["s"]},
    {"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {"type": "boolean"}},
     "required": ["b"]}], "$defs": {"A": {"type": "object", "maxProperties": 2}}},
    {"type": "object", "properties": {"x": True}, "required": ["x"], "maxProperties": 1},
]  # fmt: skip

# A schema, and values that break it: none of them may be written.
BROKEN = [
    ({"type": ["string", "null"], "enum": ["a", None]}, ["b", 1, True]),
    ({"minimum": 3}, [2, 2.9, -1]),
    ({"type": "integer", "exclusiveMaximum": 10}, [10, 11, 1.5, "9"]),
    ({"multipleOf": 7, "type": "integer"}, [8, 6, 1]),
    ({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [[1, 2, 3], ["a"], {}]),
    ({"type": "object", "required": ["a", "b"]}, [{}, {"a": 1}, {"b": 1}]),
    ({"type": "object", "maxProperties": 1}, [{"a": 1, "b": 2}]),
    ({"type": "object", "patternProperties": {"^х": {"type": "integer"}}}, [{"хат": "a"}]),
    ({"type": "object", "additionalProperties": {"type": "null"}}, [{"a": 1}]),
    ({"properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}]}, [{"a": 1}, {}]),
    ({"type": "object", "properties": {"pattern": {"pattern": "^\\w$"}}}, [{"pattern": "ab"}]),
    ({"pattern": "^\\w$"}, ["\u0301", "ab", " "]),  # Rust's \w has combining marks
    ({"pattern": "^[^a&&b]$"}, ["a", "b", "&"]),  # Rust has intersections of classes
    ({"pattern": "^\\S$"}, [" ", "\x1c", "\u3000"]),
    ({"pattern": "^a.b$"}, ["a\nb", "ab"]),
    ({"const": {"a": [1, "б"]}}, [{"a": [1]}, {"a": [1, "б"], "c": 0}]),
    ({"type": "integer", "maximum": 2**63 - 1}, [2**63, 2**63 - 1 + 2**11]),  # it rounds
    ({"type": "integer", "minimum": -(2**63)}, [-(2**63) - 1, -(2**64)]),
    ({"type": "number", "maximum": 1e308, "minimum": -1e308}, [1.5e308, -1.5e308, "1"]),
    ({"x-guidance": {"lenient": True, "coerce_one_of": True}, "type": "null"}, [1, "a"]),
    ({"$defs": {"a": {"type": "null"}}, "items": {"$ref": "#/$defs/a"}}, [[1], [None, 2]]),
]

# A schema that no answer could be held to, and what the refusal names.
REFUSED = [
    ({"uniqueItems": True, "type": "array"}, "uniqueItems"),
    ({"not": {"type": "null"}}, "not"),
    ({"if": {"type": "null"}, "then": False}, "if"),
    ({"contains": {"type": "null"}}, "contains"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
    ({"type": "nonsense"}, "type"),
    ({"enum": 5}, "enum"),
    ({"type": "object", "properties": 3}, "properties"),
    ({"type": "array", "minItems": -1}, "minItems"),
    ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems"),
    ({"multipleOf": 0.01}, "multipleOf"),
    ({"type": "object", "minProperties": 3}, "minProperties"),
    ({"const": 2**53 + 1}, "const"),
    ({"enum": [{"a": [1e30]}]}, "enum"),
    ({"minimum": 10**400}, "minimum"),
    ({"items": [{"type": "null"}]}, "items"),
    ({"const": float("inf")}, "JSON"),
    ({"const": "\ud83d"}, "JSON"),
    ({"format": "нысан"}, "format"),
    ({"$ref": "https://example.com/schema"}, "$ref"),
    ({"$ref": "#/nowhere"}, "$ref"),
    ({"$ref": "#/const", "const": {}}, "$ref"),  # a value, and no schema
    ({"$ref": "#"}, "refers to itself"),
    ({"items": {"$id": "http://example.com/a", "type": "null"}}, "$id"),
    ({"pattern": "^a?{1000}$"}, "pattern"),
    ({"pattern": "a++"}, "pattern"),
    ({"pattern": "(?i)a"}, "pattern"),
    ({"pattern": "a(?=b)"}, "pattern"),
    ({"pattern": "(a"}, "pattern"),
    ({"pattern": "[a"}, "pattern"),
    ({"pattern": "[a--b]"}, "pattern"),
    ({"pattern": "(a)\\1"}, "pattern"),
    ({"pattern": "a" * 5000}, "pattern"),
    ({"patternProperties": {"(": {}}}, "patternProperties"),
    ({"properties": {f"p{i}": {} for i in range(500)}}, "properties"),
    ([1], "object"),
    (False, "nsatisfiable"),
    ("{", "JSON"),
]  # fmt: skip


def chain(n, wrap):
    """`n` definitions, each of which leads to the next one through `wrap`."""
    links = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$defs": {**links, f"d{n}": {"type": "null"}}, "$ref": "#/$defs/d0"}


WRAPS = {
    "reference": lambda r: r,
    "items": lambda r: {"type": "array", "items": r},
    "property": lambda r: {"type": "object", "properties": {"a": r}, "required": ["a"]},
    "allOf": lambda r: {"allOf": [r]},
    "anyOf": lambda r: {"anyOf": [r, {"type": "null"}]},
    "sibling": lambda r: {**r, "minimum": 1},
}
_N = {"$defs": {"n": {"anyOf": [
    {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"$ref": "#/$defs/n"}]}]}}, "$ref": "#/$defs/n"}  # fmt: skip
# What once cost seconds or gigabytes per token, or would elsewhere.
COSTLY = {
    "ambiguous cycle": _N,
    "twenty ways": {"$defs": {"n": {"anyOf": [
        {"type": "array", "items": {"$ref": "#/$defs/n"}}] * 20}}, "$ref": "#/$defs/n"},
    "empty repeats": {"type": "string", "pattern": "^(a?b?)*(((a?){30}){30}){30}$"},
    "many states": {"type": "string", "pattern": "^(.*a.{12}|.*b.{13}|.*c.{14})$"},
    "many expressions": {"type": "string", "pattern": "^" + "(a*b*c*)*" * 400 + "$"},
    "long": {"type": "string", "minLength": 10**9},
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**5},
    "doubling": {"$defs": {**{f"d{i}": {"type": "object", "properties": {
        "a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(30)}, "d30": {}}, "$ref": "#/$defs/d0"},
    "merging": {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"minimum": j}}}
                for j in range(4)]} for i in range(12)]},
    **{f"chain of {name}": chain(300, wrap) for name, wrap in WRAPS.items()},
    **{f"long chain of {name}": chain(3900, wrap) for name, wrap in WRAPS.items()},
}  # fmt: skip


def accepts(mask, value):
    """Whether a value, as JSON, is a whole text under the schema."""
    mask = mask.clone()
    for byte in json.dumps(value, ensure_ascii=False).encode():
        if not mask.allows(byte):
            return False
        mask.accept(byte)
    return mask.may_end


def mask_of(schema):
    """The mask of a schema over single bytes."""
    return SchemaMask(BYTES, schema)
