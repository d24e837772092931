"""Flash attention against plain attention: a step of each model behind prompts of several lengths.

A step is one token, one token in each of --branches, or a window of a prompt with every row.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from common import files, load, machine, parser, report, spread, text_ids

from trimix_gguf.machine.loading import N_WINDOW, Loading
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model

LENGTHS = (128, 512, 1536)


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N")
    options.add_argument("--branches", type=int, default=16)
    options.add_argument("--repeats", type=int, default=3)
    options = options.parse_args()
    n_ctx = max(options.lengths) + 4 * N_WINDOW
    with load(options, n_ctx=64) as trio:
        ids = text_ids(trio, options, max(options.lengths) + N_WINDOW)
    paths = files(options)
    result: dict[str, Any] = {
        "machine": machine(options),
        "n": {"branches": options.branches, "window": N_WINDOW, "repeats": options.repeats},
    }
    lines = ["milliseconds with flash attention, and of that time over plain attention's:"]
    for role in ROLES:
        path, lora = paths[role], None
        if path is None:  # small_cpt as an adapter
            path, lora = paths["small_base"], paths["small_cpt_lora"]
        flash, plain = (
            Model(path, Loading(n_ctx=n_ctx, flash_attn=f), lora=lora) for f in (True, False)
        )
        for n, costs in compared(flash, plain, ids, options):
            result.setdefault(role, {})[str(n)] = costs
            lines += described(role, n, costs)
            print(lines[-1], file=sys.stderr)
        flash.close()
        plain.close()
    report(options, result, lines)


def compared(
    flash: Model, plain: Model, ids: list[int], options: argparse.Namespace
) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each length, each step's milliseconds by both, and the ratios of their pairs."""
    for n in sorted(options.lengths):
        for model in (flash, plain):
            while model.n_past < n:
                model.decode(ids[model.n_past : n][: model.n_batch])
        steps: dict[str, Callable[[Model], None]] = {
            "token": lambda m, n=n: one_token(m, ids[n]),
            "branches": lambda m, n=n: one_each(m, ids[n], options.branches),
            "window": lambda m, n=n: one_window(m, ids[n : n + N_WINDOW]),
        }
        costs = {}
        for name, step in steps.items():
            pairs = [
                (milliseconds(flash, step), milliseconds(plain, step))
                for _ in range(options.repeats + 1)
            ][1:]  # the first warms up
            costs[name] = {
                "flash": statistics.median(a for a, _ in pairs),
                "plain": statistics.median(b for _, b in pairs),
                "ratio": spread([a / b for a, b in pairs]),
            }
        yield n, costs


def one_token(model: Model, token: int) -> None:
    """One id on sequence 0."""
    model.decode([token])
    model.rewind(model.n_past - 1)


def one_each(model: Model, token: int, n: int) -> None:
    """One id on each of `n` branches."""
    branches = range(1, n + 1)
    for branch in branches:
        model.fork(0, branch)
    model.decode_entries([(token, model.n_past, branch, True) for branch in branches])
    for branch in branches:
        model.drop(branch)


def one_window(model: Model, ids: list[int]) -> None:
    """A window of ids, with every row."""
    model.decode(ids, every_row=True)
    model.rewind(model.n_past - len(ids))


def milliseconds(model: Model, step: Callable[[Model], None]) -> float:
    """The time of one step."""
    start = time.perf_counter()
    step(model)
    return (time.perf_counter() - start) * 1e3


def described(role: str, n: int, costs: dict[str, Any]) -> list[str]:
    """The figures of one role, as a line."""
    parts = (
        f"{name} {cost['flash']:.0f} ms, {cost['ratio']['median']:.2f} × "
        f"({cost['ratio']['min']:.2f} to {cost['ratio']['max']:.2f})"
        for name, cost in costs.items()
    )
    return [f"  {role} after {n}: " + "; ".join(parts)]


if __name__ == "__main__":
    main()
