"""How well every mix of the grid, and each model by itself, answers a finished run's choices.

    trimix eval --tasks sib200,tumlu,copa --methods ppl,large_ins --limit 100 … -o RUN
    python benchmarks/points.py RUN…

By likelihood of the choices, from the lines of the run; no model is loaded.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.mixing.scoring import WITH_CORNERS

NAMED = ("large_ins", "small_cpt", "small_base", "proxy-tuning", "authors-pair")


def main() -> None:
    """Print a table for each task, and the mean of all."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("runs", nargs="+", type=Path)
    tables = dict(read(options.parse_args().runs))
    if len(tables) > 1:
        tables["mean"] = np.mean(list(tables.values()), axis=0)
    for name, right in tables.items():
        print(table(name, right))
    print(summary(tables))


def read(runs: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Each task's share of right answers [n_axis, n_axis]; tasks without choices are left out."""
    for file in sorted(file for run in runs for file in run.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.open(encoding="utf-8")]
        asked = [line for line in lines if "choice_nll" in line]
        if asked:
            right = [
                np.asarray(line["choice_nll"]).argmin(axis=0)
                == line["choices"].index(line["references"][0])
                for line in asked
            ]
            yield f"{file.stem} ({len(asked)})", np.mean(right, axis=0)


def table(name: str, right: np.ndarray) -> str:
    """Percent right; alpha down, beta across."""
    lines = [f"\n{name}: % right; alpha down, beta across", ""]
    lines.append("| |" + "|".join(f"{beta:g}" for beta in WITH_CORNERS) + "|")
    lines.append("|---" * (len(WITH_CORNERS) + 1) + "|")
    for alpha, row in zip(WITH_CORNERS, right, strict=True):
        lines.append(f"| {alpha:g} |" + "|".join(f"{100 * share:.1f}" for share in row) + "|")
    return "\n".join(lines)


def summary(tables: dict[str, np.ndarray]) -> str:
    """The named mixes, and the best point, of each task."""
    at = WITH_CORNERS.index
    lines = ["\n| |" + "|".join(tables) + "|", "|---" * (len(tables) + 1) + "|"]
    for name in NAMED:
        w = METHODS[name].weights
        shares = (right[at(w.alpha), at(w.beta)] for right in tables.values())
        lines.append(f"| {name} |" + "|".join(f"{100 * share:.1f}" for share in shares) + "|")
    best = (f"{100 * right.max():.1f}" for right in tables.values())
    return "\n".join([*lines, "| best point |" + "|".join(best) + "|"])


if __name__ == "__main__":
    main()
