"""A stream per branch, and flash attention, against one unified cache with plain attention.

A step is one token in each of several branches that share nothing, behind as many tokens of each.
In a unified cache plain attention reads the cells of all branches. With streams (llama.cpp's
kv_unified off) it reads only the branch's own; flash attention on the CPU skips other branches'
cells in a unified cache. One thread, and its processor time: waiting for others does not count.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import cpu_name, report, spread, versions

from trimix_gguf.machine.loading import N_BATCH, Loading
from trimix_gguf.machine.native import lib
from trimix_gguf.trio.model import Model

# name -> (unified, flash attention)
FORMS = {
    "plain, unified": (True, False),
    "plain, streams": (False, False),
    "flash, unified": (True, True),
}
_PADDING = 256  # llama.cpp rounds a stream up to this many cells


def main() -> None:
    """Measure, and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="GGUF")
    parser.add_argument("--sizes", nargs="+", default=("20x300", "8x300", "8x64"), metavar="NxLEN")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print only the last line, JSON")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    found: dict[str, Any] = {}
    lines = ["milliseconds of a step, and how many times as fast as plain, unified:"]
    for path in options.models:
        for n, length in sizes:
            one = compare(path, n, length, options.repeats)
            found.setdefault(path.name, {})[f"{n}x{length}"] = one
            lines.append(f"  {path.name}, {n} branches of {length}: " + described(one))
            print(lines[-1], file=sys.stderr)
    about = {"cpu": cpu_name(), "threads": 1, **versions(), "seed": None}
    result = {"machine": about, "n": {"repeats": options.repeats}, "models": found}
    report(options, result, lines)


def compare(path: Path, n: int, length: int, repeats: int) -> dict[str, Any]:
    """Each form's milliseconds, and the ratios of the pairs."""
    models = {name: opened(path, n, length, *form) for name, form in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(repeats + 1):
        for name, model in models.items():
            times[name].append(milliseconds(model, n, length))
    for model in models.values():
        model.close()
    base, *_ = (kept[1:] for kept in times.values())  # the first warms up
    return {
        name: {
            "ms": statistics.median(kept[1:]),
            "gain": spread([b / own for b, own in zip(base, kept[1:], strict=True)]),
        }
        for name, kept in times.items()
    }


def opened(path: Path, n: int, length: int, unified: bool, flash_attn: bool) -> Model:
    """A model with `n` branches, sequences 1 to n, that hold `length` ids each."""
    if unified:
        n_ctx = n * (length + 32)
    else:
        n_ctx = (n + 1) * -(-(length + 32) // _PADDING) * _PADDING
    with contexts(unified=unified, n_sequences=n + 1):
        model = Model(path, Loading(n_ctx=n_ctx, n_threads=1, flash_attn=flash_attn))
    for at in range(0, length, N_BATCH):
        portion = range(at, min(length, at + N_BATCH))
        model.decode_entries([(300 + i % 1000, i, 1, False) for i in portion])
    # The others get cells of their own with the same contents: what they hold costs the same.
    size = lib.llama_state_seq_get_size(model._ctx, 1)
    state = (ctypes.c_uint8 * size)()
    lib.llama_state_seq_get_data(model._ctx, state, size, 1)
    for branch in range(2, n + 1):
        if not lib.llama_state_seq_set_data(model._ctx, state, size, branch):
            raise SystemExit(f"{path.name}: no room for branch {branch}")
    return model


@contextmanager
def contexts(*, unified: bool, n_sequences: int) -> Iterator[None]:
    """Contexts opened within have this cache."""
    original = lib.llama_init_from_model

    def changed(model: Any, params: Any) -> Any:
        params.kv_unified, params.n_seq_max = unified, n_sequences
        return original(model, params)

    lib.llama_init_from_model = changed
    try:
        yield
    finally:
        lib.llama_init_from_model = original


def milliseconds(model: Model, n: int, length: int) -> float:
    """Processor time of one token in each branch."""
    start = time.thread_time()
    model.decode_entries([(500, length, branch, True) for branch in range(1, n + 1)])
    took = time.thread_time() - start
    for branch in range(1, n + 1):
        model.drop(branch, length)
    return 1000 * took


def described(one: dict[str, Any]) -> str:
    """The figures of one size."""
    return "; ".join(
        f"{name} {form['ms']:.1f} ms"
        + ("" if name == "plain, unified" else f", {form['gain']['median']:.2f} ×")
        for name, form in one.items()
    )


if __name__ == "__main__":
    main()
