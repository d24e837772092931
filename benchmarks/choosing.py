"""What choosing weights by a prompt costs, and what a choice by some of its tokens loses.

Cost: seconds to the first row of the mix where the weights are chosen by the method auto, by
some tokens (the default) and by all, over the seconds to read the prompt without choosing. The
first word is that of the trio over that of large_ins. The slower of auto's two (a text,
a question) is compared with the published rule, by some tokens and by all. Rounds alternate;
ratios are within a round. Texts go on, questions end in a colon: auto keeps to large_ins there.

Loss: the mean nats of each token under the chosen mix, less those under the mix that all tokens
choose. Each prompt is read once, with every token's nats over the grid; what some of them would
have chosen is computed from these, also for a half and a quarter of the tokens that a text's
choice scores after the first. `--repeats 0` leaves out the cost.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import load, machine, parser, report, text_ids

from trimix_gguf.choosing.auto import LEASH
from trimix_gguf.choosing.selection import select_weights
from trimix_gguf.choosing.subset import DENSITY, FREE, LEASHED, stand_for
from trimix_gguf.mixing.scoring import WITH_CORNERS, grid_token_nlls, large_ins_slopes, strays
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prefill import Window
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

LENGTHS = (128, 300, 512)
PARTS = (48, 64, 128, 256, 512)
# Names of a stride and a density.
KINDS = {
    "text": (FREE, DENSITY[FREE]),
    "text, half": (FREE, DENSITY[FREE] / 2),
    "text, quarter": (FREE, DENSITY[FREE] / 4),
    "question": (LEASHED, DENSITY[LEASHED]),
}


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--prompts", type=int, default=40, help="of 512 tokens, for the loss")
    options = options.parse_args()
    result: dict[str, Any] = {"machine": machine(options)}
    result["n"] = {"repeats": options.repeats, "prompts": options.prompts}
    with load(options, n_ctx=1024) as trio:
        trio.tuning = None
        lengths = LENGTHS if options.repeats else ()
        result["cost"] = {n: cost(trio, options, n) for n in lengths}
        result["loss"] = loss(trio, options)
    report(options, result, described(result))


def cost(trio: Trio, options: argparse.Namespace, n_tokens: int) -> dict[str, float]:
    """Median ratios over reading the prompt, and of the first word over large_ins'."""
    ids = text_ids(trio, options, n_tokens - 2)
    ends = {"text": " ол", "question": "Q:"}
    colon = {k: trio.models["large_ins"].tokenize(text)[-2:] for k, text in ends.items()}
    prompts = {kind: Prompt((Segment.of([*ids, *end]),)) for kind, end in colon.items()}

    def choose(kind: str, **settings: Any) -> Callable[[], None]:
        def run() -> None:
            chosen = select_weights(trio, prompts[kind], **settings)
            trio.rows(chosen.mix.roles)

        return run

    def read(*roles: str) -> Callable[[], None]:
        def run() -> None:
            trio.prefill(prompts["text"])
            trio.rows(roles)

        return run

    tasks = {
        "reading": read(*ROLES),
        "large_ins": read("large_ins"),
        "text": choose("text"),
        "question": choose("question"),
        "all": choose("text", score_tokens="all"),
        "ppl": choose("text", method="ppl"),
        "ppl, all": choose("text", method="ppl", score_tokens="all"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(options.repeats + 1):  # the first round warms up
        for name, task in tasks.items():
            trio.forget()
            trio.sums = None
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)

    def ratio(name: str, over: str) -> float:
        pairs = zip(seconds[name][1:], seconds[over][1:], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {
        **{name: ratio(name, "reading") for name in ("text", "question", "all")},
        **{f"{n} / large_ins": ratio(n, "large_ins") for n in ("reading", "text", "question")},
        "auto / ppl": max(ratio("text", "ppl"), ratio("question", "ppl")),
        "auto / ppl, all": max(ratio("text", "ppl, all"), ratio("question", "ppl, all")),
        "reading_s": statistics.median(seconds["reading"][1:]),
    }


def loss(trio: Trio, options: argparse.Namespace) -> dict[str, Any]:
    """Mean and 95th percentile of what a choice by some tokens loses, by the prompt's length."""
    length = max(PARTS)
    ids = text_ids(trio, options, options.prompts * length)
    lost: dict[tuple[str, int], list[float]] = {(kind, n): [] for kind in KINDS for n in PARTS}
    scored = {}
    for k in range(options.prompts):
        nlls, slopes = every_token(trio, ids[k * length : (k + 1) * length])
        for (kind, n), found in lost.items():
            counts = counts_of(kind, n - 1)
            scored[kind, n] = int(np.count_nonzero(counts))
            found.append(lost_by(nlls[: n - 1], slopes[: n - 1], counts, KINDS[kind][0]))
    return {
        f"{kind}, {n} tokens": {
            "scored": scored[kind, n],
            "mean": float(np.mean(found)),
            "p95": float(np.quantile(found, 0.95)),
        }
        for (kind, n), found in lost.items()
    }


def counts_of(kind: str, n_tokens: int) -> np.ndarray:
    """stand_for with the density of a kind."""
    stride, density = KINDS[kind]
    own, DENSITY[stride] = DENSITY[stride], density
    try:
        return stand_for(n_tokens, stride)
    finally:
        DENSITY[stride] = own


def every_token(trio: Trio, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Nats [n, n_alpha, n_beta] and slopes [n, 2] of each token of a text but the first."""
    nlls, slopes = [], []

    def consume(window: Window) -> None:
        rows: dict[str, Any] = {role: window.rows[role] for role in ROLES}
        rows |= {"targets": window.targets, "unused": trio.unused, "n_threads": 2}
        nlls.append(grid_token_nlls(**rows, alphas=WITH_CORNERS, betas=WITH_CORNERS))
        slopes.append(large_ins_slopes(**rows))

    trio.forget()
    trio.prefill(Prompt((Segment.of(ids),)), consume=consume)
    return np.concatenate(nlls), np.concatenate(slopes)


def lost_by(nlls: np.ndarray, slopes: np.ndarray, by: np.ndarray, stride: int) -> float:
    """What the choice by tokens that stand for so many each loses, in nats a token."""

    def value(counts: np.ndarray) -> np.ndarray:
        total, slope = np.tensordot(counts, nlls, 1), counts @ slopes
        if stride == LEASHED:  # with alpha = 1
            total = total + LEASH * strays(total, slope, WITH_CORNERS, WITH_CORNERS)
            total = total[WITH_CORNERS.index(1.0)]
        return total.reshape(-1) / counts.sum()

    every = value(np.ones(len(nlls)))
    return float(every[value(by).argmin()] - every.min())


def described(result: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    lines = ["choosing weights, over reading the prompt by three models:"]
    for n, r in result["cost"].items():
        lines.append(
            f"  {n} tokens: text {r['text']:.2f}, question {r['question']:.2f}, all tokens "
            f"{r['all']:.2f}; first word over large_ins: {r['text / large_ins']:.2f}, "
            f"{r['question / large_ins']:.2f} (reading alone {r['reading / large_ins']:.2f}); "
            f"auto over ppl {r['auto / ppl']:.2f}, with all tokens {r['auto / ppl, all']:.2f}"
        )
    lines.append("\nloss of the choice against all tokens, nats a token:")
    for name, r in result["loss"].items():
        scored, mean, p95 = r["scored"], r["mean"], r["p95"]
        lines.append(f"  {name} ({scored} scored): mean {mean:.4f}, 95th percentile {p95:.4f}")
    return lines


if __name__ == "__main__":
    main()
