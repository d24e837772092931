"""grid_token_nlls against one log-softmax a grid point: time, and distance from float64.

All run on one thread, alternating, over rows of logits that a trio gave on a text, in float32.
The plain form is NumPy as one writes it, over whole arrays [n_tokens, n_vocab]; the tuned form
goes a row at a time and in place, so that nothing leaves the cache. Rows are also timed with fifty
ids each at −400 in small_base: their factors are in no range of float32, and are summed apart.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy starts its thread pool

import time
from collections.abc import Callable

import numpy as np
from common import load, machine, parser, report, spread, text_ids

from trimix_gguf.bench.measuring import naive_nll
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.mixing.scoring import GRID, grid_token_nlls
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prefill import Window
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

GRIDS = {"36 points": GRID, "121 points": tuple(np.linspace(0.0, 1.0, 11).tolist())}
_N_ODD, _ODD_LOGIT = 50, -400.0
_EVERY = 4  # rows kept of a text: neighbours tell little more


def main() -> None:
    """Measure, and print; the last line is JSON."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=16, help="rows of logits timed")
    options.add_argument("--repeats", type=int, default=7)
    options = options.parse_args()
    with load(options, n_ctx=max(256, _EVERY * options.rows + 2)) as trio:
        ids = text_ids(trio, options, _EVERY * options.rows + 1)
        rows, targets = kept_rows(trio, ids)
    result = {
        "machine": machine(options),
        "n": {"rows": len(targets), "repeats": options.repeats},
        "n_vocab": rows["large_ins"].shape[1],
    }
    lines = []
    cases = {name: (rows, grid) for name, grid in GRIDS.items()}
    cases["36 points, fifty odd ids a row"] = with_odd_ids(rows), GRID
    for name, (some, grid) in cases.items():
        figures = compare(some, targets, grid, options.repeats)
        result[name] = {**figures, **distance(some, targets, grid)}
        lines += described(name, result[name])
    report(options, result, lines)


def kept_rows(trio: Trio, ids: list[int]) -> tuple[Rows, np.ndarray]:
    """Every fourth row of a text with the token it predicts."""
    kept: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    targets: list[np.ndarray] = []

    def consume(window: Window) -> None:
        for role in ROLES:
            kept[role].append(window.rows[role][::_EVERY].copy())
        targets.append(window.targets[::_EVERY])

    trio.prefill(Prompt((Segment.of(ids),)), consume=consume)
    return {role: np.concatenate(kept[role]) for role in ROLES}, np.concatenate(targets)


def with_odd_ids(rows: Rows) -> Rows:
    """The rows with some ids, other ones in each, that no float32 factor holds."""
    base, rng = rows["small_base"].copy(), np.random.default_rng(0)
    for row in base:
        row[rng.choice(len(row), _N_ODD, replace=False)] = _ODD_LOGIT
    return {**rows, "small_base": base}


def plain_nll(rows: Rows, targets: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    """The naive form."""
    return naive_nll(**rows, targets=targets, alphas=grid, betas=grid)


def tuned_nll(rows: Rows, targets: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    """As naive_nll, a row at a time and in place."""
    total = np.zeros((len(grid), len(grid)))
    fused, term = (np.empty(rows["large_ins"].shape[1], np.float32) for _ in range(2))
    weights = [np.float32(w) for w in grid]
    for large, cpt, base, target in zip(*(rows[r] for r in ROLES), targets, strict=True):
        for i, a in enumerate(weights):
            for j, b in enumerate(weights):
                np.multiply(large, a, out=fused)
                np.multiply(cpt, b, out=term)
                np.add(fused, term, out=fused)
                np.multiply(base, np.float32(1) - a - b, out=term)
                np.add(fused, term, out=fused)
                total[i, j] += cross_entropy(fused, target)
    return total


def cross_entropy(fused: np.ndarray, target: int) -> float:
    """Nats of `target`; overwrites `fused`."""
    np.subtract(fused, fused.max(), out=fused)
    logit = fused[target]
    np.exp(fused, out=fused)
    return float(np.log(fused.sum()) - logit)


def separable_nll(rows: Rows, targets: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    """grid_token_nlls on one thread."""
    nlls = grid_token_nlls(**rows, targets=targets, alphas=grid, betas=grid, n_threads=1)
    return nlls.sum(axis=0)


FORMS: dict[str, Callable[..., np.ndarray]] = {
    "grid_nll": separable_nll,
    "plain": plain_nll,
    "tuned": tuned_nll,
}


def compare(rows: Rows, targets: np.ndarray, grid: tuple[float, ...], repeats: int) -> dict:
    """Milliseconds a row of each form, the forms alternating; ratios within a repeat."""
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for form in FORMS.values():  # warm up on one row
        form({r: rows[r][:1] for r in ROLES}, targets[:1], grid)
    for _ in range(repeats):
        for name, form in FORMS.items():
            start = time.perf_counter()
            form(rows, targets, grid)
            times[name].append((time.perf_counter() - start) / len(targets) * 1e3)
    ours = times["grid_nll"]
    return {
        "ms_per_row": {name: spread(t) for name, t in times.items()},
        "ratio": {
            name: spread([t / o for t, o in zip(times[name], ours, strict=True)])
            for name in ("plain", "tuned")
        },
    }


def distance(rows: Rows, targets: np.ndarray, grid: tuple[float, ...]) -> dict[str, float]:
    """Largest difference from float64, in nats a token: of one row, and of the mean over rows."""
    ids = np.arange(len(targets))
    exact = np.stack([exact_nll(rows, t, int(targets[t]), grid) for t in ids])
    ours = np.stack(
        [separable_nll({r: rows[r][[t]] for r in ROLES}, targets[[t]], grid) for t in ids]
    )
    return {
        "worst_row_nats": float(np.abs(ours - exact).max()),
        "worst_mean_nats": float(np.abs(ours.mean(0) - exact.mean(0)).max()),
    }


def exact_nll(rows: Rows, t: int, target: int, grid: tuple[float, ...]) -> np.ndarray:
    """One row in float64."""
    large, cpt, base = (rows[r][t].astype(np.float64) for r in ROLES)
    nll = np.empty((len(grid), len(grid)))
    for i, a in enumerate(grid):
        for j, b in enumerate(grid):
            fused = a * large + b * cpt + (1 - a - b) * base
            top = fused.max()
            nll[i, j] = top + np.log(np.exp(fused - top).sum()) - fused[target]
    return nll


def described(name: str, figures: dict) -> list[str]:
    """The figures of one size, as lines."""
    lines = [f"{name}:"]
    for form, time_ in figures["ms_per_row"].items():
        ratio = figures["ratio"].get(form)
        times = f"  {form:9} {time_['median']:8.2f} ms a row"
        if ratio:
            times += (
                f"; {ratio['median']:.1f} × grid_nll's time "
                f"(from {ratio['min']:.1f} to {ratio['max']:.1f})"
            )
        lines.append(times)
    lines.append(
        f"  from float64: at most {figures['worst_row_nats']:.1e} nats in any row, "
        f"{figures['worst_mean_nats']:.1e} nats a token in the mean\n"
    )
    return lines


if __name__ == "__main__":
    main()
