"""Types in a GGUF: of values, of tensors, and those that known keys must have.

Keys of an architecture begin with its name, which is left out here. Source: src/llama-arch.cpp and
src/llama-model.cpp of llama.cpp.
"""

import re
import struct
from functools import cache
from typing import Any

_SIZES = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
_NUMBERS = ("FLOAT32", "FLOAT64")
_TYPES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    # pattern -> (in words, types of the value or of the items, whether it is an array)
    r"general\.(type|name)": ("a string", ("STRING",), False),
    r"general\.(file_type|quantization_version)": ("a whole number", _SIZES, False),
    r"split\.(no|count|tensors\.count)": ("a whole number", _SIZES, False),
    r"imatrix\.chunk_(count|size)": ("a whole number", _SIZES, False),
    r"imatrix\.datasets": ("an array of strings", ("STRING",), True),
    r"adapter\.type": ("a string", ("STRING",), False),
    r"adapter\.lora\.alpha": ("a number", _NUMBERS, False),
    r"tokenizer\.ggml\.(model|pre)": ("a string", ("STRING",), False),
    r"tokenizer\.chat_template(\..+)?": ("a string", ("STRING",), False),
    r"tokenizer\.ggml\.(tokens|merges)": ("an array of strings", ("STRING",), True),
    r"tokenizer\.ggml\.token_type": ("an array of whole numbers", _SIZES, True),
    r"tokenizer\.ggml\.scores": ("an array of numbers", _NUMBERS, True),
    r"tokenizer\.ggml\.\w+_token_id": ("a whole number", _SIZES, False),
    r"trimix\.tokenizer\.(end_ids|lstrip|rstrip)": ("an array of whole numbers", _SIZES, True),
    r"trimix\.tokenizer\.normalizer": ("a string", ("STRING",), False),
    r"tokenizer\.ggml\.add_\w+": ("a boolean", ("BOOL",), False),
    r"[^.]+\.(context_length|embedding_length|block_count|vocab_size|expert_count)": (
        "a whole number", _SIZES, False,
    ),
    r"[^.]+\.(expert_used_count|attention\.(key|value)_length)": (
        "a whole number", _SIZES, False,
    ),
    r"[^.]+\.attention\.layer_norm(_rms)?_epsilon": ("a number", _NUMBERS, False),
    r"[^.]+\.rope\.scaling\.type": ("a string", ("STRING",), False),
}  # fmt: skip
_KNOWN = [(re.compile(pattern), *rest) for pattern, rest in _TYPES.items()]
# Types that ggml has for other things than weights: its products end the process at them.
NO_WEIGHTS = ("F64", "I8", "I16", "I32", "I64")


def wrong_type(key: str, value_type: str, value: Any) -> str | None:
    """What a metadata key should be where it is something else, in words; None where it fits.

    `value_type` is a GGUFValueType name, `value` what was read: a list or GGUFArray for an array.
    """
    for pattern, words, allowed, is_array in _KNOWN:
        if pattern.fullmatch(key):
            if is_array != (value_type == "ARRAY"):
                return words
            return None if _item_type(value, value_type) in (*allowed, None) else words
    return None


def _item_type(value: Any, value_type: str) -> str | None:
    """The type of an array's items, or of a value itself; None for an empty array."""
    if value_type != "ARRAY":
        return value_type
    if not isinstance(value, list):
        return str(value.value_type)
    first = value[0] if value else None
    names: dict[type, str] = {str: "STRING", bool: "BOOL", int: "INT32", float: "FLOAT32"}
    return names.get(type(first))


@cache
def value_types() -> dict[int, tuple[str, struct.Struct | None]]:
    """Name and form of a metadata value, by type id; strings and arrays have no form."""
    from gguf.constants import GGUFValueType  # here, because it imports NumPy

    forms = [struct.Struct("<" + c) if c != "-" else None for c in "BbHhIif?--Qqd"]
    return {int(t): (t.name, forms[t]) for t in GGUFValueType}


@cache
def tensor_types() -> dict[int, tuple[str, int, int]]:
    """Name, elements in a block and bytes in a block, by type id."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(t): (t.name, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}


def row_bytes(n: int, type_name: str) -> int:
    """Bytes of `n` numbers of a KV cache; raises ValueError where a type cannot hold them."""
    sizes = {name.lower(): (block, n_bytes) for name, block, n_bytes in tensor_types().values()}
    if type_name.lower() not in sizes:
        raise ValueError(f"unknown cache type {type_name!r}; expected f32, f16, q8_0 or the like")
    block, n_bytes = sizes[type_name.lower()]
    if n % block:
        raise ValueError(f"cache type {type_name!r}: heads of {n} are not whole blocks of {block}")
    return n // block * n_bytes
