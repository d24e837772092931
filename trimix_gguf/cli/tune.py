"""trimix tune: which mix of a trio answers best, measured once."""

import sys
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.options import FiniteRange, named_trio, new_figure, open_trio, trio_options


@click.command()
@trio_options
@click.option("--lang", metavar="CODE", help="Language of the text. Default: the trio's first.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    help="Raw text in the language; exercises are made of it. Default: the trio's own.",
)
@click.option(
    "--pairs", metavar="FILE", help="Sentence pairs with English: columns named by language, tabs."
)
@click.option(
    "--minutes",
    type=FiniteRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="About how long to measure.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Draws the exercises; another seed, other exercises.",
)
@click.option("--plot", metavar="FILE", help="Draw how well each mix answers, as PNG.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def tune(
    lang: str | None, texts: tuple[str, ...], pairs: str | None, plot: str | None, **options: Any
) -> None:
    """Measure which mix of a trio answers best, and keep it in its trio.toml.

    Exercises with known answers are made of raw text in the language. Each model and each mix
    answers them. Afterwards `--method auto`, the default, answers questions with choices with the
    best mix. It takes the mix for free answers, such as a chat, only if it is better there too. A
    run that was stopped continues with the same command.
    """
    import json

    from trimix_gguf.errors import TrioFileError
    from trimix_gguf.tuning.tune import make_exercises

    minutes, seed = options.pop("minutes"), options.pop("seed")
    as_json = options.pop("as_json")
    trio_file = named_trio(options)
    if trio_file is None:
        raise TrioFileError("a tuning is kept in a trio.toml; name a trio: --trio NAME|FILE|DIR")
    language = lang or (trio_file.languages[0] if trio_file.languages else "")
    exercises = make_exercises(
        _texts(trio_file, texts), None if pairs is None else Path(pairs), language, seed
    )
    figure = new_figure(figsize=(7, 6)) if plot is not None else None
    settings = {"language": language, "seed": seed, "minutes": minutes}
    tuning = measure_and_keep(trio_file, lambda: open_trio(options), exercises, **settings)
    print(json.dumps(tuning.to_table(), ensure_ascii=False) if as_json else table(tuning))
    if figure is not None and plot is not None:
        _draw(tuning, figure, plot)


def measure_and_keep(trio_file: Any, opened: Any, exercises: Any, **settings: Any) -> Any:
    """Have the trio that `opened` gives answer exercises, and write the Tuning to its trio.toml."""
    from dataclasses import replace

    from trimix_gguf.cli.bars import count_bar
    from trimix_gguf.machine.hashes import kept_sha256
    from trimix_gguf.roles import ROLES
    from trimix_gguf.trios.triofile import TrioFile
    from trimix_gguf.tuning.tune import tune as measure

    _check_folder(trio_file)
    models = {role: kept_sha256(trio_file.path(role)) for role in ROLES}
    with opened() as trio:
        tuning = measure(trio, exercises, models, progress=count_bar, **settings)
    if trio_file.file.is_file():  # it may have been edited meanwhile
        trio_file = TrioFile.read(trio_file.file)
    replace(trio_file, tuning=tuning).write()
    print(f"kept in {trio_file.file}", file=sys.stderr)
    return tuning


def _check_folder(trio_file: Any) -> None:
    """Raise TrioFileError where the Tuning could not be written after all the minutes it takes."""
    import tempfile

    from trimix_gguf.errors import TrioFileError

    try:
        with tempfile.TemporaryFile(dir=trio_file.folder):
            pass
    except OSError as error:
        raise TrioFileError(
            f"a tuning is kept in {trio_file.file}, and that folder cannot be written: "
            f"{error.strerror or error}; copy the folder, and name the copy: --trio DIR"
        ) from None


def table(tuning: Any) -> str:
    """Answers right in percent, by kind and model, with 95 % intervals, and the verdict."""
    from trimix_gguf.trio.tuned import POINTS

    lines = [f"{'':<10}{'n':>4}" + "".join(f"{name:>18}" for name in POINTS)]
    for name, kind in tuning.kinds.items():
        cells = "".join(f"{_share(kind.right[point], kind.n):>18}" for point in POINTS)
        lines.append(f"{name:<10}{kind.n:>4}{cells}")
    if (free := tuning.free) is not None:
        lines += ["", f"free answers ({free.n}), how like the right ones they are, in percent:"]
        lines.append(f"close to large_ins {100 * free.close:.1f}, mix {100 * free.mix:.1f}")
    return "\n".join([*lines, "", tuning.words])


def _share(share: float, n: int) -> str:
    """A share in percent with its 95 % interval (Wilson)."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    low, high = 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
    return f"{100 * share:.0f} [{low:.0f}, {high:.0f}]"


def _texts(trio_file: Any, texts: tuple[str, ...]) -> list[Path]:
    from trimix_gguf.errors import DataError

    if texts:
        return [Path(text) for text in texts]
    shipped = trio_file.folder / "text.txt"
    if not shipped.is_file():
        raise DataError(
            "no text to make exercises of; give --text FILE, raw text in the trio's language"
        )
    return [shipped]


def _draw(tuning: Any, figure: Any, path: str) -> None:
    """Bars: what each model and the mix answer right, per kind."""
    from trimix_gguf.trio.tuned import POINTS

    axes = figure.add_subplot()
    names = list(tuning.kinds)
    width = 0.8 / len(POINTS)
    for i, point in enumerate(POINTS):
        at = [k + (i - (len(POINTS) - 1) / 2) * width for k in range(len(names))]
        shares = [100 * tuning.kinds[name].right[point] for name in names]
        axes.bar(at, shares, width, label=point)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("answered right, %")
    axes.set_title(tuning.words, fontsize=9, wrap=True)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
