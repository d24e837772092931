"""trimix score: texts -> perplexity of each model and of every mix on the grid."""

import json
from typing import Any

import click

from trimix_gguf.cli.bars import token_progress
from trimix_gguf.cli.options import (
    grid_option,
    new_figure,
    open_trio,
    own_mix,
    parse_grid_options,
    read_text,
    trio_options,
)


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@trio_options
@grid_option
@click.option(
    "--last", type=click.IntRange(min=1), help="Score only the last N tokens of each text."
)
@click.option("--spans", nargs=2, metavar="OPEN CLOSE", help="Score only text between the marks.")
@click.option(
    "--average",
    type=click.Choice(["micro", "macro"]),
    default="micro",
    show_default=True,
    help="Mean over all tokens (micro), or over the means of the texts (macro).",
)
@click.option("--plot", metavar="FILE.png", help="Draw the (alpha, beta) surface.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def score(files: tuple[str, ...], **options: Any) -> None:
    """Perplexity of texts under each model and over the weight grid.

    Reads files, or standard input. A blank line, or the end of a file, ends a text.
    """
    from trimix_gguf.choosing.score import score as score_prompts

    plot, as_json = options.pop("plot"), options.pop("as_json")
    figure = None if plot is None else new_figure(figsize=(6.4, 5.2))
    grid, average = parse_grid_options(options.pop("grid")), options.pop("average")
    last, spans = options.pop("last"), options.pop("spans")
    default = _own_weights(options)
    texts = [text for path in files or ("-",) for text in split_texts(read_text(path))]
    with open_trio(options) as trio:
        prompts = [trio.prompt(text, spans=spans) for text in texts]
        prompts = [p.score_last(last) for p in prompts] if last else prompts
        total = sum(p.n_tokens() for p in prompts)
        with token_progress(total, f"Scoring {len(prompts)} texts") as progress:
            result = score_prompts(
                trio, prompts, grid=grid, progress=progress, also=[default] if default else []
            )
    report = _report(result, average, default)
    print(json.dumps(report) if as_json else _table(report))
    if plot is not None:  # last: where the picture cannot be written, the figures are there
        _draw(report, figure, plot)


def _own_weights(options: dict[str, Any]) -> Any:
    """The weights of the trio's own mix, if it is fixed. Raises WeightsError for one that masks."""
    from trimix_gguf.errors import WeightsError

    mix = own_mix(options)
    if mix is not None and mix.is_masked:
        raise WeightsError(
            f"the trio's own mix has a plausibility threshold of {mix.plausibility_threshold:.3g}, "
            "which makes some tokens impossible, so texts have no perplexity under it; name the "
            "trio's files instead: --large-ins, --small-base, --small-cpt"
        )
    return None if mix is None else mix.weights


def split_texts(text: str) -> list[str]:
    """Blank lines end a text; raises PromptError where nothing is left."""
    from trimix_gguf.errors import PromptError

    # Not splitlines(): a text may hold other line ends, such as U+2028.
    given = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = "\n".join(line if line.strip() else "" for line in given)
    texts = [part.strip("\n") for part in lines.split("\n\n") if part.strip()]
    if not texts:
        raise PromptError("there is no text to score; the input is empty")
    return texts


def _report(result: Any, average: str, default: Any) -> dict[str, Any]:
    from trimix_gguf.choosing.selection import PROXY_TUNING, SINGLE

    best = result.best(average)
    named = {**SINGLE, "proxy_tuning": PROXY_TUNING, "fused": best}
    if default is not None:
        named["default"] = default
    return {
        "n_tokens": int(sum(result.n_tokens)),
        "n_texts": len(result.n_tokens),
        "convention": average,
        "perplexity": {name: result.perplexity(w, average) for name, w in named.items()},
        "grid": {
            "alphas": list(result.grid[0]),
            "betas": list(result.grid[1]),
            "mean_nll": result.on_grid(average).tolist(),
        },
        "best": {"alpha": best.alpha, "beta": best.beta},
        **({"default": {"alpha": default.alpha, "beta": default.beta}} if default else {}),
    }


def _table(report: dict[str, Any]) -> str:
    from trimix_gguf.mixing.scoring import perplexity_of

    chosen = {"fused": report["best"], "default": report.get("default")}
    lines = [f"{report['n_tokens']} tokens in {report['n_texts']} texts, {report['convention']}"]
    for name, value in report["perplexity"].items():
        w = chosen.get(name)
        where = f"  alpha {w['alpha']:.3g}, beta {w['beta']:.3g}" if w else ""
        lines.append(f"{name:<13}{value:>10.3f}{where}")
    grid = report["grid"]
    lines += ["", "fused perplexity; alpha down, beta across"]
    lines.append(" " * 6 + "".join(f"{b:>9.2f}" for b in grid["betas"]))
    for alpha, row in zip(grid["alphas"], grid["mean_nll"], strict=True):
        lines.append(f"{alpha:>6.2f}" + "".join(f" {perplexity_of(v):>8.2f}" for v in row))
    return "\n".join(lines)


def _draw(report: dict[str, Any], figure: Any, path: str) -> None:
    """The perplexity surface over (beta, alpha), with the chosen point."""
    import numpy as np

    from trimix_gguf.errors import TrimixError

    grid, best = report["grid"], report["best"]
    order_a, order_b = np.argsort(grid["alphas"]), np.argsort(grid["betas"])
    alphas, betas = np.array(grid["alphas"])[order_a], np.array(grid["betas"])[order_b]
    surface = np.exp(np.array(grid["mean_nll"]))[np.ix_(order_a, order_b)]
    if len(alphas) < 2 or len(betas) < 2:
        raise TrimixError("--plot needs a grid of at least 2 alphas and 2 betas")
    axes = figure.add_subplot()
    filled = axes.contourf(betas, alphas, surface, levels=24, cmap="viridis_r")
    figure.colorbar(filled, label="perplexity")
    x, y = np.meshgrid(betas, alphas)
    axes.plot(x.ravel(), y.ravel(), ".", color="black", markersize=3, alpha=0.4)
    axes.plot(best["beta"], best["alpha"], "o", color="crimson", markersize=10)
    label = f"({best['alpha']:.2g}, {best['beta']:.2g}): {report['perplexity']['fused']:.2f}"
    right = best["beta"] > (betas[0] + betas[-1]) / 2
    axes.annotate(
        label,
        (best["beta"], best["alpha"]),
        xytext=(-12 if right else 12, 12),
        textcoords="offset points",
        ha="right" if right else "left",
        color="crimson",
    )
    axes.set_xlabel("beta (small_cpt)")
    axes.set_ylabel("alpha (large_ins)")
    axes.set_title(f"Perplexity of the mix, {report['n_tokens']} tokens")
    figure.savefig(path, dpi=150, format="png")
