"""JSON schemas: what a mask costs over a vocabulary, and what the JSON-Schema test suite says.

Random texts under a nested schema, token by token: each mask is timed. With --suite, a checkout of
json-schema-org/JSON-Schema-Test-Suite: no value that breaks a schema may be written.
"""

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import cpu_name, spread

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
NESTED = {
    "type": "object",
    "properties": {
        "атауы": {"type": "string", "maxLength": 60},
        "жылы": {"type": "integer", "minimum": 1900, "maximum": 2100},
        "бөлімдер": {"type": "array", "minItems": 3, "items": {"$ref": "#/$defs/бөлім"}},
    },
    "required": ["атауы", "жылы", "бөлімдер"],
    "$defs": {
        "бөлім": {
            "type": "object",
            "properties": {
                "күні": {"type": "string", "format": "date"},
                "баға": {"type": ["number", "null"]},
                "сенім": {"enum": ["төмен", "орта", "жоғары"]},
                "ішкі": {"anyOf": [{"$ref": "#/$defs/бөлім"}, {"type": "null"}]},
            },
            "required": ["күні", "баға", "сенім", "ішкі"],
        }
    },
}


def masks(path: Path, n_tokens: int) -> dict[str, Any]:
    """Milliseconds per mask, and what comes before the first."""
    from trimix_gguf.machine import native
    from trimix_gguf.mixing.masks import SchemaMask, TokenTree

    with native.vocabulary(str(path)) as vocab:
        n_vocab = native.lib.llama_vocab_n_tokens(vocab)
        pieces = [native.piece(vocab, i) for i in range(n_vocab)]
    started = time.perf_counter()
    tree = TokenTree(pieces)
    tree_s = time.perf_counter() - started
    started = time.perf_counter()
    SchemaMask(tree, NESTED)
    compile_ms = (time.perf_counter() - started) * 1e3
    rng, times = np.random.default_rng(0), []
    while len(times) < n_tokens:
        mask = SchemaMask(tree, NESTED)
        for _ in range(300):
            started = time.perf_counter()
            allowed = mask.allowed()
            times.append((time.perf_counter() - started) * 1e3)
            if not allowed.any():
                break
            mask.accept(int(rng.choice(np.flatnonzero(allowed))))
    return {
        "n_vocab": n_vocab,
        "n_masks": len(times),
        "tree_s": round(tree_s, 3),
        "compile_ms": round(compile_ms, 2),
        "mask_ms": spread(times),
    }


def suite(folder: Path) -> dict[str, Any]:
    """How many schemas of the suite are taken, and how many wrong values could be written."""
    from schemas import accepts, mask_of

    from trimix_gguf.errors import SchemaError

    counts: collections.Counter[str] = collections.Counter()
    for path in sorted(p for d in ("draft2020-12", "draft7") for p in (folder / d).glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8")):
            try:
                mask = mask_of(case["schema"])
            except SchemaError:
                counts["refused"] += 1
                continue
            counts["taken"] += 1
            for test in case["tests"]:
                taken = accepts(mask, test["data"])
                counts["valid" if test["valid"] else "invalid"] += 1
                if taken and not test["valid"]:
                    counts["wrongly_written"] += 1
                    print("wrong:", path.name, case["description"], test["description"])
    return dict(counts)


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--suite", type=Path, metavar="FOLDER", help="the suite's folder `tests`")
    parser.add_argument("--masks", type=int, default=2000)
    options = parser.parse_args()
    found: dict[str, Any] = {"cpu": cpu_name(), "vocabulary": options.vocabulary.name}
    found["masks"] = masks(options.vocabulary, options.masks)
    if options.suite is not None:
        found["suite"] = suite(options.suite)
    for name in ("masks", "suite"):
        print(f"{name}: {found.get(name)}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
