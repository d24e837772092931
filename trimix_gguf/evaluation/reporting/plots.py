"""A run's summary as one picture, with a row of panels per task."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimix_gguf.errors import TrimixError
from trimix_gguf.evaluation.reporting.report import OURS
from trimix_gguf.evaluation.reporting.summary import (
    ChosenWeights,
    Summary,
    Surface,
    TaskSummary,
)
from trimix_gguf.evaluation.tasks.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PPL, _OTHER, _ORACLE = "#c1432e", "#4c72b0", "#b0b0b0"  # colours of bars


def draw(summary: Summary) -> "Figure":
    """Bars of every method with intervals; where ppl's weights lie; perplexity and metric.

    The second panel needs a task with the ppl method, the third one the upper bound. Raises
    TrimixError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TrimixError("a plot needs matplotlib: pip install 'trimix-gguf[plot]'") from None
    tasks = summary["tasks"]
    with_chosen = any(OURS in task["findings"]["chosen"] for task in tasks.values())
    with_surface = any(task["findings"]["surface"] for task in tasks.values())
    n_columns = 1 + with_chosen + with_surface
    height = max(3.2, 1 + 0.24 * len(summary["methods"]))
    figure = Figure(layout="constrained", figsize=(1.5 + 4 * n_columns, 0.5 + height * len(tasks)))
    sizes = ", ".join(f"{name} {task['n']}" for name, task in tasks.items())
    figure.suptitle(f"{summary['runs'][0]['lang']}; examples: {sizes}")
    panels = figure.subplots(len(tasks), n_columns, squeeze=False)
    for row, (name, task) in zip(panels, tasks.items(), strict=True):
        found, rest = task["findings"], list(row[1:])
        _bars(row[0], name, task, summary)
        if with_chosen:
            _density(rest.pop(0), found["chosen"].get(OURS), summary["grid"], task["n"])
        if with_surface:
            _scatter(rest.pop(0), found["surface"], summary["grid"], _metric(task))
    return figure


def _metric(task: TaskSummary) -> str:
    return METRICS[task["metrics"][0]].name


def _bars(axes: "Axes", name: str, task: TaskSummary, summary: Summary) -> None:
    """The main metric of each method, the first one on top, with a line from low to high."""
    for at, (method, found) in enumerate(task["methods"].items()):
        score = found["metrics"][task["metrics"][0]]
        colour = _ORACLE if method in summary["oracles"] else _PPL if method == OURS else _OTHER
        axes.barh(at, score["value"], color=colour, height=0.7)
        axes.plot([score["low"], score["high"]], [at, at], color="black", linewidth=1.2)
    axes.set_yticks(range(len(task["methods"])), list(task["methods"]))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{_metric(task)}, {summary['level']:.0%} interval")
    axes.set_title(name)


def _density(axes: "Axes", found: ChosenWeights | None, grid: Sequence[float], n: int) -> None:
    """The share of examples at each point; alpha goes up, beta to the right."""
    if found is None:
        axes.set_axis_off()
        return
    share = np.array(found["counts"]) / n
    axes.imshow(share, origin="lower", cmap="Blues", vmin=0, vmax=max(share.max(), 1 / n))
    for (a, b), value in np.ndenumerate(share):
        if value:
            dark = value > share.max() / 2
            axes.text(b, a, f"{value:.0%}", ha="center", va="center", color="w" if dark else "k")
    ticks = [f"{weight:g}" for weight in grid]
    axes.set_xticks(range(len(grid)), ticks)
    axes.set_yticks(range(len(grid)), ticks)
    axes.set_xlabel("beta (small_cpt)")
    axes.set_ylabel("alpha (large_ins)")
    axes.set_title(f"weights that {OURS} chose")


def _scatter(axes: "Axes", found: Surface | None, grid: Sequence[float], metric: str) -> None:
    """A dot for each grid point: the prompts' macro perplexity there, and the metric."""
    if found is None:
        axes.set_axis_off()
        return
    perplexity = np.exp(np.array(found["mean_nll"]))
    betas = np.broadcast_to(grid, perplexity.shape)
    dots = axes.scatter(perplexity, found["metric"], c=betas, cmap="viridis", vmin=0, vmax=1, s=24)
    axes.figure.colorbar(dots, ax=axes, label="beta")
    rho = "constant" if found["spearman"] is None else f"rho = {found['spearman']:.2f}"
    axes.set_xlabel("perplexity of the prompts")
    axes.set_ylabel(metric)
    axes.set_title(f"{perplexity.size} grid points, {rho}")
