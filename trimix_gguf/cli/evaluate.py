"""trimix eval: methods compared on labelled tasks; eval report: the table and the picture."""

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trimix_gguf.choosing.methods import (
    AUTO,
    INFORMATIVE,
    ORACLE,
    compared_by_default,
    evaluated_methods,
)
from trimix_gguf.cli.bars import count_bar
from trimix_gguf.cli.clusters import Ray, as_elsewhere, loader_elsewhere, ray_options, taken_ray
from trimix_gguf.cli.options import named_trio, open_trio, parse_mix, trio_options
from trimix_gguf.cli.tuning_notes import say_tuning
from trimix_gguf.evaluation.names.compared import LARGE_BASE, check_methods
from trimix_gguf.evaluation.names.settings import RunSettings

_DEFAULT = ",".join(compared_by_default())
# Options that --harness does not read: its tasks have their own data, and one method answers.
_NOT_OF_HARNESS = (
    *("lang", "tasks", "methods", "data", "seed"),
    *("fill_loops", "race", "single", "large_base"),
)


@click.group("eval", invoke_without_command=True)
@trio_options
@click.option(
    "--lang",
    metavar="CODE",
    help="Language of the tasks: kk, ug, bo, mn, … Default: that of your own FILE.jsonl.",
)
@click.option("--tasks", metavar="LIST", help="Tasks, comma-separated, or your own FILE.jsonl.")
@click.option(
    "--methods",
    metavar="LIST",
    default=_DEFAULT,
    show_default=True,
    help="Methods to compare, comma-separated; see `trimix help evaluation`.",
)
@click.option(
    "--data", metavar="DIR", default="data", show_default=True, help="Folder of the data files."
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Questions per task, drawn with the seed."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Draws exemplars and questions.",
)
@click.option(
    "--exemplars",
    "n_exemplars",
    type=click.IntRange(min=0),
    help="Exemplars per prompt. Default: the task's number.",
)
@click.option("--chat", is_flag=True, help="Put prompts into the chat template of large_ins.")
@click.option(
    "--fill-loops", is_flag=True, help="Do not decode answers that only repeat themselves."
)
@click.option("--race", is_flag=True, help="Stop grid points of the oracle that are clearly worse.")
@click.option("--harness", metavar="LIST", help="Run tasks of lm-evaluation-harness instead.")
@click.option(
    "--harness-path", metavar="DIR", help="Only your own harness tasks, from this folder."
)
@click.option("--weights", metavar="ALPHA,BETA", help="Fixed weights, for the harness.")
@click.option(
    "--single",
    multiple=True,
    metavar="NAME=FILE",
    help="Also compare this GGUF by itself. Can be given several times.",
)
@click.option(
    "--large-base",
    metavar="FILE",
    help="Fourth model, for decoupled. Default: the trio's, if it has one.",
)
@ray_options
@click.option("-o", "--out", metavar="DIR", help="Folder of the results; a run there continues.")
@click.pass_context
def evaluate(context: click.Context, /, **options: Any) -> None:
    """Compare methods of mixing on labelled tasks, example by example.

    A run that was stopped continues with the same command. In the end one sentence says which
    method to use; `trimix eval report` has the tables.
    """
    if context.invoked_subcommand is not None:
        return
    ray = taken_ray(options)
    if options["harness"]:
        if ray is not None:
            raise click.UsageError("--ray does not go with --harness")
        for name in _NOT_OF_HARNESS:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{_flag(name)} does not go with --harness")
        _run_harness(options)
        return
    for name in ("harness_path", "weights"):
        if options[name]:
            raise click.UsageError(f"{_flag(name)} goes with --harness")
    for name in ("tasks", "methods"):
        options[name] = _split(options[name] or "")
    for name in ("tasks", "methods", "out"):
        if not options[name]:
            raise click.UsageError(f"give --{name}")
    usual = context.get_parameter_source("methods") is ParameterSource.DEFAULT
    _run(options, ray, usual=usual)


@evaluate.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option("--choice-scoring", is_flag=True, help="Pick choices by likelihood, not by text.")
@click.option("--so-far", is_flag=True, help="Report a run that has not finished.")
@click.option("--plot", metavar="FILE", help="Draw bars, chosen weights, perplexity and metric.")
@click.option("--json", "form", flag_value="json", help="Everything, as one JSON object.")
@click.option("--csv", "form", flag_value="csv", help="Only the table, as CSV.")
def report(
    folders: tuple[str, ...],
    choice_scoring: bool,
    so_far: bool,
    plot: str | None,
    form: str | None,
) -> None:
    """Print the table of a run as Markdown. Models are not needed.

    Several runs of the same models make one table: with other tasks, or with other methods on the
    same questions. What two runs have in common comes from the first.
    """
    from trimix_gguf.evaluation.reporting.predictions import join
    from trimix_gguf.evaluation.reporting.report import summarize
    from trimix_gguf.evaluation.reporting.tables import to_csv, to_markdown
    from trimix_gguf.evaluation.run_files.loading import load_run

    run = join([load_run(Path(folder), so_far=so_far) for folder in folders])
    summary = summarize(run, choice_scoring=choice_scoring)
    if form == "json":
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        click.echo(to_csv(summary) if form == "csv" else to_markdown(summary), nl=False)
    if plot is not None:  # last: where the picture cannot be written, the figures are there
        from trimix_gguf.evaluation.reporting.plots import draw

        figure, ending = draw(summary), Path(plot).suffix[1:].lower()
        known = figure.canvas.get_supported_filetypes()
        if ending not in ("", *known):
            raise click.UsageError(
                f"--plot: there is no picture {ending!r}; take {', '.join(known)}"
            )
        figure.savefig(plot)


def _run(options: dict[str, Any], ray: Ray | None, *, usual: bool) -> None:
    """Compare; the `usual` methods without those for which a task has too few exemplars."""
    from trimix_gguf.evaluation.running.comparing import Comparison, Local, compare

    tasks = options.pop("tasks")
    comparison = Comparison(
        lang=options.pop("lang") or _language(tasks),
        tasks=tasks,
        data=Path(options.pop("data")),
        settings=_settings(options),
        singles=_singles(options.pop("single"), ray),
        large_base=_large_base(options, ray),
        command=sys.argv,
    )
    if ray is not None and comparison.settings.race:
        raise click.UsageError("--race needs the answers before, so it does not go with --ray")
    if usual and (lacking := comparison.lacking()):
        comparison = comparison.without(lacking)
        for why in lacking.values():
            click.echo(f"left out: {why}", err=True)
    comparison.check()
    out = Path(options.pop("out"))
    if ray is not None:
        _run_by_ray(ray, options, comparison, out)
    else:
        if AUTO in comparison.settings.methods:
            say_tuning(options)
        with open_trio(options) as trio:
            compare(Local(trio, comparison), comparison, out, count_bar)
    _conclude(out)


def _run_by_ray(ray: Ray, options: dict[str, Any], comparison: Any, out: Path) -> None:
    from trimix_gguf.evaluation.running.comparing import compare
    from trimix_gguf.evaluation.running.ray_models import RayModels
    from trimix_gguf.machine.cluster import connected

    with connected(ray.address):
        load = loader_elsewhere(options)
        compare(RayModels(load, comparison, ray.n_workers), comparison, out, count_bar)


def _language(tasks: tuple[str, ...]) -> str:
    from trimix_gguf.evaluation.tasks.custom import language_of

    lang = language_of([Path(name) for name in tasks if name.endswith(".jsonl")])
    if lang is None:
        raise click.UsageError("give --lang, or a FILE.jsonl whose first line names its language")
    return lang


def _conclude(out: Path) -> None:
    """Say which method to use, and where the tables are."""
    from trimix_gguf.errors import TrimixError
    from trimix_gguf.evaluation.reporting.report import summarize
    from trimix_gguf.evaluation.run_files.loading import load_run

    try:
        sentence = summarize(load_run(out))["mean"]["conclusion"]["sentence"]
    except TrimixError as error:  # an extra that only reports need: the answers are there
        print(f"note: no report yet: {error}", file=sys.stderr)
        return
    print(f"the tables: trimix eval report {shlex.quote(str(out))}", file=sys.stderr)
    print(sentence)


def _settings(options: dict[str, Any]) -> RunSettings:
    """Take the RunSettings out of the options: those with the names of its fields."""
    settings = RunSettings(**{field.name: options.pop(field.name) for field in fields(RunSettings)})
    check_methods(settings.methods)
    if settings.race and ORACLE not in settings.methods:
        raise click.UsageError(f"--race needs {ORACLE} among the --methods")
    return settings


def _run_harness(options: dict[str, Any]) -> None:
    """Print the harness's table; with --out, write its results as JSON into that folder."""
    out = Path(options["out"]) if options["out"] else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # before the hours that it takes
    from trimix_gguf.evaluation.running.harness import TrimixLM, make_table, run_harness
    from trimix_gguf.machine.files import write_text

    chosen_by = _harness_weights(options)
    if chosen_by.get("method", AUTO) == AUTO and "weights" not in chosen_by:
        say_tuning(options)
    with open_trio(options) as trio:
        results = run_harness(
            TrimixLM(trio, **chosen_by),
            _split(options["harness"]),
            limit=options["limit"],
            num_fewshot=options["n_exemplars"],
            apply_chat_template=options["chat"],
            include_path=options["harness_path"],
            include_defaults=options["harness_path"] is None,
        )
    click.echo(make_table(results))
    if out is not None:
        text = json.dumps(results, ensure_ascii=False, indent=1, default=str)
        write_text(out / "harness.json", text)


def _harness_weights(options: dict[str, Any]) -> dict[str, Any]:
    """TrimixLM's `weights` or `method`: from --weights, else as the trio file says."""
    if text := options.pop("weights"):
        return {"weights": parse_mix(text)}
    trio_file = named_trio(options)
    if trio_file is None:
        return {}
    if trio_file.fixed_mix is not None:
        return {"weights": trio_file.fixed_mix}
    return {} if trio_file.method is None else {"method": trio_file.method}


def _large_base(options: dict[str, Any], ray: Ray | None) -> Path | None:
    if (given := options.pop(LARGE_BASE)) is not None:
        return Path(given) if ray is None else as_elsewhere(given)
    trio_file = named_trio(options)
    named = trio_file is not None and LARGE_BASE in trio_file.models
    return trio_file.path(LARGE_BASE) if named else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _singles(texts: tuple[str, ...], ray: Ray | None) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    if not all(name and file for name, _, file in pairs):
        raise click.UsageError("--single takes NAME=FILE")
    names = [name for name, _, _ in pairs]
    for name in names:
        if Path(name).name != name:
            raise click.UsageError(f"--single: {name} becomes a file's name; leave out the folder")
        if names.count(name) > 1:
            raise click.UsageError(f"--single: {name} is given twice; take another name")
    if taken := {name for name, _, _ in pairs} & {*evaluated_methods(), INFORMATIVE}:
        raise click.UsageError(f"--single: {taken.pop()} is the name of a method; take another")
    return {name: Path(file) if ray is None else as_elsewhere(file) for name, _, file in pairs}
