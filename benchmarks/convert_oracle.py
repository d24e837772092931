"""Compare our converter with llama.cpp's own, byte by byte, over every tiny architecture.

    python benchmarks/convert_oracle.py PATH/TO/convert_hf_to_gguf.py

The script comes with llama.cpp, in vendor/llama.cpp of llama-cpp-python's source distribution.
Needs torch and transformers. Exits 1 on a difference that EXPLAINED does not explain.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

TYPES = ("f32", "f16", "bf16", "q8_0")
# Keys that may differ, or be in one file only -> why.
EXPLAINED = {
    "general.name": "ours is the folder's name, theirs guesses from it",
    "general.type": "ours leaves it out: 'model' is the default",
    "general.size_label": "for people; ours leaves it out",
    "general.basename": "for people; ours leaves it out",
    "general.finetune": "for people; ours leaves it out",
    "vocab_size": "always in ours: equal to the number of tokens",
    "rope.dimension_count": "always in ours: equal to the head size, llama.cpp's default",
    "attention.key_length": "always in ours: equal to llama.cpp's default where theirs has none",
    "attention.value_length": "as attention.key_length",
    "attention.sliding_window_pattern": "theirs forgets a pattern other than 6, and computes 6",
    "tokenizer.ggml.add_bos_token": "always in ours",
    "tokenizer.ggml.add_eos_token": "always in ours",
}
FACTORS = "rope_freqs.weight"  # ours are computed in float64: the last bit may differ


def convert_theirs(script: str, jobs: list[tuple[str, str, str]]) -> None:
    """Run llama.cpp's converter over (folder, file, type); in a process with its own gguf."""
    folder = str(Path(script).parent)
    sys.path[:0] = [str(Path(folder) / "gguf-py"), folder]
    import transformers
    from conversion.base import TextModel

    # A model's own tokenizer class would add tokens to ours, as <|endoftext|>.
    transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
    # It knows tokenizers by a hash of what they do, and ours are trained here.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    logging.disable(logging.CRITICAL)
    for folder, file, kind in jobs:
        sys.argv = [script, folder, "--outfile", file, "--outtype", kind]
        runpy.run_path(script, run_name="__main__")


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Return metadata, less the architecture in its keys, and name -> (shape, type, bytes)."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    prefix = reader.fields["general.architecture"].contents() + "."
    fields = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    tensors = {
        tensor.name: (tensor.shape.tolist(), tensor.tensor_type.name, tensor.data)
        for tensor in reader.tensors
    }
    return fields, tensors


def compare(ours: Path, theirs: Path) -> tuple[str, list[str], list[str]]:
    """Return a summary, the keys that differ and are explained, and what is not explained."""
    import numpy as np

    (our_fields, our_tensors), (their_fields, their_tensors) = read(ours), read(theirs)
    different = {
        key
        for key in our_fields.keys() | their_fields.keys()
        if our_fields.get(key) != their_fields.get(key)
    }
    described = {key for key in different if key.startswith("general.") or key not in their_fields}
    explained = sorted(described & EXPLAINED.keys())
    unexplained = [
        f"{key}: {first_difference(our_fields.get(key), their_fields.get(key))}"
        for key in sorted(different.difference(explained))
    ]
    unexplained += sorted(f"{name}: in one only" for name in our_tensors ^ their_tensors.keys())
    n_same = 0
    for name in our_tensors.keys() & their_tensors.keys():
        (shape, kind, data), (their_shape, their_kind, their_data) = (
            our_tensors[name],
            their_tensors[name],
        )
        if (shape, kind) != (their_shape, their_kind):
            unexplained.append(f"{name}: {shape} {kind} != {their_shape} {their_kind}")
        elif np.array_equal(data, their_data):
            n_same += 1
        elif name == FACTORS and np.allclose(data, their_data, rtol=1e-6, atol=0):
            explained.append(f"{FACTORS} (last bit)")
        else:
            unexplained.append(f"{name}: bytes differ")
    n_keys = len(our_fields.keys() | their_fields.keys())
    summary = f"{n_same}/{len(their_tensors)} tensors {n_keys - len(different)}/{n_keys} keys"
    return summary, explained, unexplained


def first_difference(ours: Any, theirs: Any) -> str:
    """Put two values side by side: of lists of one length, where they first part."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        i = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        return f"[{i}] {ours[i]!r} != {theirs[i]!r}"
    return f"{ours!r:.60} != {theirs!r:.60}"


def main(script: str) -> int:
    """Measure, and print; the last line is JSON."""
    import transformers
    from tiny_checkpoints import MODELS, save_model, save_tokenizer

    from trimix_gguf.convert.hf import convert_hf
    from trimix_gguf.convert.tokenizer_bpe import QWEN2_SPLIT

    transformers.utils.logging.disable_progress_bar()
    n_failed, seen = 0, set()
    with tempfile.TemporaryDirectory() as work:
        jobs, pairs = [], []
        for name in MODELS:
            folder = Path(work) / name.replace(" ", "_")
            folder.mkdir()
            save_model(folder, name)
            # Without padding: theirs cuts Gemma's embeddings to the tokens that are real.
            save_tokenizer(folder, QWEN2_SPLIT, full=True)
            for kind in TYPES:
                ours, theirs = folder / f"ours-{kind}.gguf", folder / f"theirs-{kind}.gguf"
                convert_hf(folder, ours, type=kind)
                jobs.append((str(folder), str(theirs), kind))
                pairs.append((name, kind, ours, theirs))
        child = multiprocessing.get_context("spawn").Process(
            target=convert_theirs, args=(str(Path(script).resolve()), jobs)
        )
        child.start()
        child.join()
        if child.exitcode != 0:
            print(f"{script} failed", file=sys.stderr)
            return 1
        for name, kind, ours, theirs in pairs:
            summary, explained, unexplained = compare(ours, theirs)
            seen.update(explained)
            n_failed += bool(unexplained)
            verdict = "same" if not unexplained else "DIFFERENT"
            print(f"{name:20} {kind:5} {summary:32} {len(explained)} explained  {verdict}")
            for line in unexplained:
                print(f"    {line}")
    print("\nExplained differences:")
    for key in sorted(seen):
        print(f"  {key}: {EXPLAINED.get(key, 'ours are computed in float64')}")
    return 1 if n_failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
