"""A training step of `trimix adapt` in float32 and bfloat16, beside the loop that it replaced.

    python benchmarks/adapt_speed.py BASE.gguf --text TEXT [--repeats 3]

The loop before took one row of 512 tokens a step, in float32, through all layers, with the loss
over the tokens that occur. Here a step has rows side by side. All are measured in turn; figures are
medians of forward and backward passes. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from trimix_gguf.adapting.bases import Base, Tokenizer, load_base
from trimix_gguf.adapting.outlook import MOST_ROWS_AT_ONCE
from trimix_gguf.adapting.rows import Rows, measured_rows
from trimix_gguf.adapting.taught import add_adapter, faster_dtype, make_taught, products_per_second
from trimix_gguf.machine import processor

BEFORE = ("before", "float32", 1)
WAYS = (
    BEFORE,
    ("float32", "float32", MOST_ROWS_AT_ONCE),
    ("bfloat16", "bfloat16", MOST_ROWS_AT_ONCE),
)


def main() -> None:
    """Measure each way, one model in memory at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    base = Base(options.base)
    text = options.text.read_text(encoding="utf-8")[:40_000]
    rows = measured_rows([text], Tokenizer(base), n_rows=MOST_ROWS_AT_ONCE, n_block=base.n_block)
    found: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = add_adapter(load_base(base, dtype))
        for name, of, n_rows in WAYS:
            if of == dtype:
                few = Rows(rows.ids[:n_rows], rows.counts[:n_rows])
                found[name] = tokens_per_second(model, few, dtype, options.repeats)
                print(f"{name:<10}{n_rows} rows{found[name]:>8.1f} tokens/s", flush=True)
        del model
    products = products_per_second(base.file.n_embd, 4 * base.file.n_embd)
    facts = {
        "cpu": processor.describe()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    said = {"products": products, "chosen": faster_dtype(products)}
    print(json.dumps({**facts, "threads": torch.get_num_threads(), **found, **said}))


def tokens_per_second(model: torch.nn.Module, rows: Rows, dtype: str, repeats: int) -> float:
    """Median over some passes, after one that warms up."""
    taught = make_taught(model, rows)
    ids, counts = torch.from_numpy(rows.ids.astype(np.int64)), torch.from_numpy(rows.counts)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = taught(ids, counts)
        loss.backward()
        seconds.append(time.perf_counter() - started)
        taught.zero_grad(set_to_none=True)
    return float(rows.ids.size / statistics.median(seconds[1:]))


if __name__ == "__main__":
    main()
