"""Peak memory of training steps of `trimix adapt`, beside what is said before it starts.

    python benchmarks/adapt_memory.py BASE.gguf --text TEXT [--dtype float32] [--rows 1 2]

For each number of rows: two passes forward and back with an optimizer's step between them, in one
process that has loaded the model and its adapter. Linux only. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from trimix_gguf.adapting.bases import Base, Tokenizer, load_base
from trimix_gguf.adapting.outlook import GIB, Way, memory_needed, rows_at_once
from trimix_gguf.adapting.rows import measured_rows
from trimix_gguf.adapting.taught import add_adapter, make_taught, trained_numbers


def main() -> None:
    """Load, then step with each number of rows, the smallest first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    base, way = Base(options.base), Way(4 if options.dtype == "float32" else 2)
    text = options.text.read_text(encoding="utf-8")[:400_000]
    n_rows = max(options.rows)
    rows = measured_rows(text.split("\n\n"), Tokenizer(base), n_rows=n_rows, n_block=base.n_block)
    ids, counts = torch.from_numpy(rows.ids.astype(np.int64)), torch.from_numpy(rows.counts)
    model = load_base(base, options.dtype)
    print(f"loading: {peak():.2f} GiB", flush=True)
    taught = make_taught(add_adapter(model), rows)
    optimizer = torch.optim.AdamW(trained_numbers(taught).values(), 1e-4)
    found = {}
    for n in sorted(options.rows):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
                loss = taught(ids[:n], counts[:n])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        said = memory_needed(base, way, n) / GIB
        found[n] = {"said_gib": round(said, 2), "peak_gib": round(peak(), 2)}
        print(f"{n} rows: {found[n]}", flush=True)
    facts = {"base": base.gguf.name, "dtype": options.dtype, "torch": torch.__version__}
    print(json.dumps({**facts, "rows": found, "chosen_rows": rows_at_once(base, way)}))


def peak() -> float:
    """GiB of memory at most since this was asked last."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return found * 1024 / GIB


if __name__ == "__main__":
    main()
