"""Perplexity of quantized models, with and without an importance matrix of each text.

    python benchmarks/imatrix.py MODEL.gguf --text kk=train.txt --text en=english.txt \
        --held-out heldout.txt --types q4_k_m,q4_0,iq3_xxs [--lora ADAPTER.gguf] [--tokens 65536]

MODEL is best f16; one that is quantized already is quantized again, which costs the same with and
without. Each type is measured on the same chunks of text that is held out. After a perplexity
stands how much the mean loss per token changes against no matrix (or, for types that need one,
against the first text's), with the standard error of that difference over the chunks.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import cpu_name, versions
from numpy.typing import NDArray

from trimix_gguf.convert.calibration import N_CTX, N_TOKENS, calibrate
from trimix_gguf.convert.quantize import quantize_gguf
from trimix_gguf.machine.loading import N_BATCH, Loading
from trimix_gguf.machine.quantization import CALIBRATED
from trimix_gguf.machine.threads import available_cores
from trimix_gguf.trio.model import Model

NONE = "none"


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = _options()
    texts = dict(text.split("=", 1) for text in options.text)
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "python": platform.python_version(),
        **versions(),
        "model": options.model.name,
        "texts": {name: Path(path).name for name, path in texts.items()},
        "held out": options.held_out.name,
        "tokens": options.tokens,
    }
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        matrices = {name: Path(folder) / f"{name}.gguf" for name in texts}
        for name, path in texts.items():
            started = time.perf_counter()
            made = calibrate(
                options.model, [Path(path)], matrices[name], lora=options.lora,
                n_tokens=options.tokens,
            )  # fmt: skip
            result[f"seconds, {name}"] = round(time.perf_counter() - started, 1)
            result[f"tokens, {name}"] = made.n_chunks * made.chunk_size
        _say("the model itself")
        losses = {"source": {NONE: held_out(options.model, options)}}
        for type in options.types.split(","):
            losses[type] = {}
            for name, matrix in {NONE: None, **matrices}.items():
                if name == NONE and type in CALIBRATED:
                    continue
                _say(f"{type}, {name}")
                out = Path(folder) / "quantized.gguf"
                again = {"requantize": True, "force": True}
                quantize_gguf(options.model, out, type=type, imatrix=matrix, **again)
                result[f"MB, {type}"] = round(out.stat().st_size / 1e6, 1)
                losses[type][name] = held_out(out, options)
    result["n"] = int(losses["source"][NONE].size * (N_CTX - 1))
    for key, value in result.items():
        print(f"{key}: {value}")
    print("", *table(losses, [NONE, *texts]), sep="\n")
    result["perplexity"] = {
        type: {name: math.exp(loss.mean()) for name, loss in row.items()}
        for type, row in losses.items()
    }
    print(json.dumps(result, ensure_ascii=False))


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("model", type=Path, metavar="MODEL.gguf")
    options.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    options.add_argument("--held-out", type=Path, required=True, metavar="FILE")
    options.add_argument("--types", default="q4_k_m,q3_k_m,iq3_xxs")
    options.add_argument("--lora", type=Path, help="an adapter that the model is measured with")
    options.add_argument("--tokens", type=int, default=N_TOKENS, help="to calibrate on")
    options.add_argument("--chunks", type=int, default=32, help=f"of {N_CTX} tokens, held out")
    options.add_argument("--work", type=Path, help="folder for the files; a temporary one")
    return options.parse_args()


def held_out(model: Path, options: argparse.Namespace) -> NDArray[np.float64]:
    """Mean loss of each chunk of the held-out text [n_chunks], in nats per token."""
    loading = Loading(n_ctx=N_CTX, n_window=N_BATCH, n_batch=N_BATCH)
    opened = Model(model, loading, lora=options.lora)
    text = opened.normalize(options.held_out.read_text(encoding="utf-8"))
    ids = opened.tokenize(text)
    n_chunks = min(options.chunks, len(ids) // N_CTX)
    if n_chunks < 2:
        raise SystemExit(f"{options.held_out.name} has {len(ids)} tokens; give more text")
    losses = [_loss(opened, ids[i * N_CTX : (i + 1) * N_CTX]) for i in range(n_chunks)]
    opened.close()
    return np.array(losses)


def _loss(model: Model, chunk: list[int]) -> float:
    model.rewind(0)
    total = 0.0
    for start in range(0, len(chunk), N_BATCH):
        part = chunk[start : start + N_BATCH]
        targets = chunk[start + 1 : start + 1 + N_BATCH]
        rows = model.decode(part, every_row=True)
        for row, target in zip(rows, targets, strict=False):
            top = float(row.max())
            total += top + math.log(np.exp(row - top).sum(dtype=np.float64)) - float(row[target])
    return total / (len(chunk) - 1)


def table(losses: dict[str, dict[str, NDArray[np.float64]]], names: list[str]) -> list[str]:
    """Lines of a Markdown table: a row per type, a column per importance matrix."""
    lines = ["| type | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for type, row in losses.items():
        first = next(iter(row))
        cells = []
        for name in names:
            cell = f"{math.exp(row[name].mean()):.3f}" if name in row else "-"
            if name in row and name != first:
                change = row[name] - row[first]
                error = change.std(ddof=1) / math.sqrt(change.size)
                cell += f" ({change.mean():+.4f} ± {error:.4f})"
            cells.append(cell)
        lines.append(f"| {type} | " + " | ".join(cells) + " |")
    return lines


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
