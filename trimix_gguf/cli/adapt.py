"""trimix adapt: raw text -> a trio with a small_cpt that knows the language."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.options import FiniteRange, new_figure, option_group
from trimix_gguf.errors import TrimixError
from trimix_gguf.mixing.sampling import N_SEEDS

TUNE_MINUTES = 10.0


@click.command()
@click.argument("name")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@option_group(
    click.option(
        "--trio", metavar="NAME|FILE|DIR", help="Trio whose small_base is taught. Default: nano."
    ),
    click.option(
        "--base",
        metavar="DIR|FILE",
        help="Teach this model in place of the trio's small_base.",
    ),
    click.option(
        "--instruct",
        metavar="DIR|FILE",
        help="Instruct model of small_base: add what it has over small_base to the taught model.",
    ),
    click.option("--lang", metavar="CODE", help="Code of the language, kept in trio.toml."),
    click.option(
        "--script",
        metavar="CODE",
        help="Script to keep, as Cyrl, Arab, Tibt. Default: that of most letters.",
    ),
    click.option(
        "--pairs",
        metavar="FILE.tsv",
        help="Sentence pairs: the language, then English; a column `score` is used.",
    ),
    click.option(
        "--replay", multiple=True, metavar="FILE", help="English text, so that it is not forgotten."
    ),
    click.option(
        "--keep-out",
        multiple=True,
        metavar="FILE",
        help="An evaluation set: lines that stand in it are left out.",
    ),
    click.option("--tokens", type=click.IntRange(min=1), help="Tokens to learn from, in all."),
    click.option(
        "--minutes",
        type=FiniteRange(min=0, min_open=True),
        help="Minutes to train. Default: 3 times the text.",
    ),
    click.option(
        "--exercises",
        type=FiniteRange(0, 0.9),
        help="Share of exercises made of the text. Default 0.15.",
    ),
    click.option("--rank", type=click.IntRange(1, 1024), help="Rank of the adapter. Default 32."),
    click.option(
        "--learning-rate",
        type=FiniteRange(min=0, min_open=True),
        help="Default: 5e-4, with --full 1e-4, for a 0.5B; more for smaller models.",
    ),
    click.option("--full", is_flag=True, help="Train all weights, not an adapter."),
    click.option(
        "--train-embeddings",
        is_flag=True,
        help="Adapt embeddings and output layer too: for a script that the model hardly knows.",
    ),
    click.option("--merge", is_flag=True, help="Write the taught model as one whole GGUF too."),
    click.option(
        "-o",
        "--output",
        metavar="FILE.gguf",
        help="Write only the taught model (or adapter) there; make no trio.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, N_SEEDS - 1),
        help="Seed of the order of the text. Default 0.",
    ),
    click.option(
        "--work", metavar="DIR", help="Where the run keeps its files. Default: in the user's data."
    ),
    click.option(
        "--tune/--no-tune",
        default=True,
        help="At the end, measure which mix answers best (some minutes). Default: on.",
    ),
    click.option("--dry-run", is_flag=True, help="Only read the text, and say what it would take."),
    click.option("--plot", metavar="FILE.png", help="Draw what was measured on the way."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the folder."),
)
def adapt(name: str, texts: tuple[str, ...], **options: Any) -> None:
    """Teach a trio's small model your language from raw text.

    TEXT is a text file, JSON lines with `text`, a Wikipedia dump (.xml), each also packed as .gz,
    .zst or .bz2, or a folder of them. Needs `pip install 'trimix-gguf[adapt]'`. A run that was
    stopped goes on with the same command. Prints the folder of the new trio.
    """
    from trimix_gguf.adapting import adaptation
    from trimix_gguf.adapting.asked import Asked
    from trimix_gguf.adapting.together import Together
    from trimix_gguf.adapting.workplace import Workplace

    if options["full"] and options["train_embeddings"]:
        raise click.UsageError("--full trains the embeddings as well; give only one of them")
    if options["tokens"] is not None and options["minutes"] is not None:
        raise click.UsageError("give --tokens or --minutes, not both")
    dry_run, as_json, plot = (options.pop(key) for key in ("dry_run", "as_json", "plot"))
    tune = options.pop("tune")
    figure = None if plot is None else new_figure(figsize=(8.4, 4.0))
    folder = _work(options.pop("work"), name)
    # Apart: what is tried out with --dry-run binds nobody to the same options later.
    work = Workplace(folder.with_name(f".{folder.name}-dry-run") if dry_run else folder)
    asked = Asked(name=name, texts=[Path(text) for text in texts], **_given(options))
    together = Together() if dry_run else Together.join()
    with _shown() as shown:
        try:
            adapted = adaptation.adapt(asked, work, shown, dry_run=dry_run, together=together)
        except KeyboardInterrupt:
            if not dry_run and together.is_first:
                _say("stopped; the same command goes on from the last saved state")
            raise
        finally:
            if dry_run and not work.is_busy:
                adaptation.clear(work)
    if adapted is None:
        return
    if adapted.trio is not None:
        from trimix_gguf.adapting.results import table, write_results

        write_results(adapted, work.folder)
        try:
            _say(table(adapted.trio, work.folder))
        except TrimixError as error:  # it needs more memory than training; the trio is there
            _say(f"not measured: {error}")
    if not dry_run:
        adaptation.clear(work)
    if adapted.trio is not None:
        if tune:
            _tune(adapted.trio, asked.seed)
        _say(f"{name} is complete: trimix chat --trio {name}")
    if as_json:
        print(json.dumps(adaptation.summary(adapted), ensure_ascii=False))
    elif adapted.trio is not None:
        print(adapted.trio.folder)
    elif not dry_run:
        print(asked.output)
    # Last: where the picture cannot be written, the trio is there.
    if figure is not None and adapted.history is not None:
        _draw(adapted.history.all, figure, plot)


def _tune(trio: Any, seed: int) -> None:
    """Measure which mix of the new trio answers best, with exercises of the held-out text."""
    from trimix_gguf.cli.tune import measure_and_keep
    from trimix_gguf.cli.tune import table as table_of
    from trimix_gguf.trio.trio import Trio
    from trimix_gguf.tuning.tune import make_exercises

    _say("measuring which mix answers best (trimix tune)")
    language = trio.languages[0] if trio.languages else ""
    settings = {"language": language, "seed": seed, "minutes": TUNE_MINUTES}
    try:
        exercises = make_exercises([trio.folder / "text.txt"], None, language, seed)
        opened = partial(Trio.load, **trio.load_arguments())
        _say(table_of(measure_and_keep(trio, opened, exercises, **settings)))
    except TrimixError as error:
        _say(f"not measured: {error}")
    except KeyboardInterrupt:
        _say(f"stopped; the trio is complete: trimix tune --trio {trio.name} goes on")
        raise


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set, files as paths: defaults live in Asked."""
    given = {key: value for key, value in options.items() if value not in (None, ())}
    for key in ("base", "instruct", "pairs", "output"):
        if key in given:
            given[key] = Path(given[key])
    for key in ("replay", "keep_out"):
        if key in given:
            given[key] = [Path(one) for one in given[key]]
    return given


def _work(given: str | None, name: str) -> Path:
    from trimix_gguf.machine.folders import home_folder
    from trimix_gguf.trios.names import check_name

    if given is not None:  # a folder of its own below it, which is removed at the end
        return Path(given) / check_name(name)
    return home_folder() / "adapt" / check_name(name)


@contextmanager
def _shown() -> Iterator[Any]:
    """What a run tells: lines on stderr; on a terminal, one that changes as well."""
    from trimix_gguf.adapting.asked import Shown

    live = sys.stderr.isatty()
    at = 0.0

    def passing(line: str) -> None:
        nonlocal at
        if live and time.monotonic() - at > 0.2:
            at = time.monotonic()
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()

    def say(line: str) -> None:
        if live:
            sys.stderr.write("\r\x1b[K")
        _say(line)

    def step(standing: Any) -> None:
        line = _line(standing)
        passing(line) if standing.look is None else say(line)

    yield Shown(say=say, read=lambda file, n: passing(f"{file}: {n:,} documents"), step=step)


def _line(standing: Any) -> str:
    """Where training is, in a line of a terminal."""
    from trimix_gguf.adapting.outlook import in_words

    parts = [
        f"step {standing.step}/{standing.n_steps}",
        f"loss {standing.loss:.2f}",
        f"{standing.tokens_per_second:.0f} tokens/s",
    ]
    if (look := standing.look) is not None:
        parts.append(f"held-out perplexity {look.perplexity:.1f}")
        if look.right is not None:
            parts.append(f"exercises {look.right:.0%}")
        if look.partner is not None:
            parts.append("mix {:.0%} ± {:.0%}".format(*look.partner))
        if look.english is not None:
            parts.append(f"English {look.english:.1f}")
    return ", ".join([*parts, f"{in_words(standing.left_s)} left"])


def _draw(looks: Any, figure: Any, path: str) -> None:
    """Perplexity and the answers to exercises, by itself and in mixes, over the steps."""
    from trimix_gguf.adapting.partner import PAIRS

    steps = [one.step for one in looks]
    left, right = figure.subplots(1, 2)
    left.plot(steps, [one.perplexity for one in looks], "o-", label="held-out text")
    if looks[0].english is not None:
        left.plot(steps, [one.english for one in looks], "o-", label="English")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
    left.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "2346" else "")
    left.set_ylabel("perplexity")
    left.legend()
    if looks[0].right is not None:
        right.plot(steps, [one.right for one in looks], "o:", label="answered right, by itself")
        sure = [sum(one.sure) / len(one.sure) for one in looks]
        right.plot(steps, sure, "o-", label="probability of the right answer")
        for at, pair in enumerate(PAIRS if looks[0].mixed else ()):
            mixed = [sum(one.mixed[at]) / len(one.mixed[at]) for one in looks]
            right.plot(steps, mixed, "o-", label=f"of the mix ({pair.alpha:g}, {pair.beta:g})")
        right.set_ylim(0, 1)
        right.legend(fontsize="small")
    right.set_ylabel("exercises")
    for axes in (left, right):
        axes.set_xlabel("step")
    figure.savefig(path, dpi=150, format="png")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
