"""An evaluation's items with the exemplars kept, and with each prompt read from scratch.

Answers SIB-200 by TriMix-PPL, alternating; `--items` are timed each way, and the ratio for the
whole set follows from the medians, the first reading of the exemplars included.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import load, machine, parser, report

from trimix_gguf.evaluation.names.settings import RunSettings
from trimix_gguf.evaluation.running.asking import answer_all
from trimix_gguf.evaluation.running.prompts import open_reader
from trimix_gguf.evaluation.running.reading import Reader
from trimix_gguf.evaluation.tasks import find_task
from trimix_gguf.mixing.scoring import GRID

N_SET = 204
NO_POINTS = np.zeros((len(GRID), len(GRID)), np.bool_)  # the oracle is not asked


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--lang", default="kk")
    options.add_argument("--items", type=int, default=4, help="timed each way")
    # The text is a folder here: the one that trimix eval --data names.
    options = options.parse_args()
    task, settings = find_task("sib200", options.lang), RunSettings(("ppl",))
    dataset = task.load(options.text, options.lang, settings.seed)
    step = len(dataset.examples) // (options.items + 1)
    first, *items = list(dataset.examples)[::step][: options.items + 1]
    with load(options) as trio:
        reader = open_reader(trio, task, dataset, dataset.examples, settings)

        def timed(example: Any, afresh: bool) -> tuple[float, Any]:
            if afresh:
                trio.forget()
                one = Reader(trio, reader.prefix, [False] * len(reader.prefix.units), reader.turn)
            started = time.perf_counter()
            asked = one if afresh else reader
            (line,) = answer_all(asked, task, [example], settings, {}, NO_POINTS)
            return time.perf_counter() - started, line["outputs"]["ppl"]

        anew, kept, same = [], [], []
        for example in items:
            seconds, text = timed(example, afresh=True)
            anew.append(seconds)
            timed(first, afresh=False)  # the exemplars are in the caches again
            seconds, again = timed(example, afresh=False)
            kept.append(seconds)
            same.append(text == again)
    result = summary(options, anew, kept, all(same))
    report(options, result, describe(result))


def summary(
    options: argparse.Namespace, anew: list[float], kept: list[float], same: bool
) -> dict[str, Any]:
    """The figures as JSON has them."""
    first, later = statistics.median(anew), statistics.median(kept)
    return {
        "machine": machine(options) | {"text": Path(options.text).name, "lang": options.lang},
        "n": {"items": options.items, "set": N_SET},
        "seconds": {"anew": first, "kept": later},
        "same_answers": same,
        "ratio": {"one": first / later, "set": N_SET * first / (first + (N_SET - 1) * later)},
    }


def describe(result: dict[str, Any]) -> list[str]:
    """The figures, as lines."""
    seconds = result["seconds"]
    return [
        f"an item read from scratch {seconds['anew']:.2f} s, with the exemplars kept "
        f"{seconds['kept']:.2f} s",
        f"{N_SET} items: {result['ratio']['set']:.1f} × (from the medians)",
        f"the same answers either way: {result['same_answers']}",
    ]


if __name__ == "__main__":
    main()
