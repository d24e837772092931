"""trimix run: a file of requests -> a file of answers."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.bars import count_bar
from trimix_gguf.cli.clusters import loader_elsewhere, ray_options, taken_ray
from trimix_gguf.cli.options import model_name, named_trio, open_trio, trio_options, whole_number
from trimix_gguf.cli.served_trios import mixes_by_auto
from trimix_gguf.cli.tuning_notes import say_tuning
from trimix_gguf.errors import DataError
from trimix_gguf.mixing.sampling import N_SEEDS
from trimix_gguf.server.limits import Limits

# Options of a trio that change how numbers are rounded.
_ROUNDING = ("gpu_layers", "device", "kv_type", "flash_attn")


def _shard(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    i, n = map(whole_number, text.partition("/")[::2])
    if i is None or n is None or i > n:
        raise click.BadParameter(f"{text!r} is not a part and a number of parts, such as 2/8")
    return i, n


@click.command()
@click.argument("prompts", metavar="PROMPTS")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where to write; - is stdout.")
@trio_options
@click.option(
    "--parallel",
    type=click.IntRange(1, 31),
    default=Limits.parallel,
    show_default=True,
    help="Answers at the same time; they share --n-ctx tokens.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, N_SEEDS - 1),
    default=0,
    show_default=True,
    help="Gives each request without a seed its own.",
)
@click.option(
    "--shard",
    metavar="I/N",
    default="1/1",
    callback=_shard,
    help="Answer only part I of N, from 1. Each is a block of lines; `cat` joins the outputs.",
)
@click.option("--name", metavar="NAME", help="Model name in the lines. Default: the trio's.")
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Write an error for each wrong line and go on; the exit code is 0, their number a note.",
)
@ray_options
@click.option("--force", is_flag=True, help="Begin again, and replace an existing output.")
def run(prompts: str, output: str, **options: Any) -> None:
    """Answer a file of requests, many at once.

    Each line of PROMPTS is a request in JSON, as the server takes it, with an id; or a line of
    OpenAI's batches. - is standard input. Files may be packed as .gz, .zst or .bz2. The answers
    have the order of the lines. A run that was stopped, even by a kill, goes on with the same
    command, and ends in the same answers. See `trimix help many-prompts`.
    """
    from trimix_gguf.runs.answers import Settings
    from trimix_gguf.runs.journal import claim
    from trimix_gguf.runs.running import Run, refuse_wrong, shard_of
    from trimix_gguf.server.settings import mix_settings

    force, shard = options.pop("force"), options.pop("shard")
    ray = taken_ray(options)
    out = None if output == "-" else Path(output)
    stdout = sys.stdout.buffer  # with --ray, the name is another stream's
    with ExitStack() as stack:
        if out is not None:
            if prompts != "-" and out.exists() and out.samefile(prompts):
                raise DataError(f"{out} holds the prompts; choose another output")
            stack.enter_context(claim(out, force=force))
        lines, sha256 = _read(prompts)
        own, source = shard_of(lines, *shard), "stdin" if prompts == "-" else prompts
        if not options["skip_bad"]:
            refuse_wrong(own, source)
        trio_file = named_trio(options)
        settings = Settings(
            name=options.pop("name") or model_name(trio_file, options),
            mix=None if trio_file is None else mix_settings(trio_file.method, trio_file.weights),
            seed=options.pop("seed"),
            n_parallel=options.pop("parallel"),
            skip_bad=options.pop("skip_bad"),
        )
        if ray is None:
            if mixes_by_auto(options):
                say_tuning(options)
            workers = _here(stack, options, settings, source)
        else:
            workers = _by_ray(stack, ray, options, settings, source)
        work = Run(workers, own, settings, source=source, bar=count_bar)
        if out is None:
            n_wrong = work.to_stream(stdout)
        else:
            given = {f"--{name.replace('_', '-')}": options[name] for name in _ROUNDING}
            header = {**_header(settings, sha256, shard), **given, **workers.header()}
            n_wrong = work.to_file(out, header)
    if n_wrong:
        print(f"note: {n_wrong} of {len(own)} lines were wrong", file=sys.stderr)


def _read(prompts: str) -> tuple[Any, str]:
    """The lines of a file or of stdin, and their SHA-256."""
    from trimix_gguf.machine.packed import damage, open_unpacked
    from trimix_gguf.runs.lines import read_lines

    if prompts == "-":
        lines, sha256 = read_lines(sys.stdin.buffer)
    else:
        file = Path(prompts)
        try:
            with ExitStack() as stack:
                lines, sha256 = read_lines(open_unpacked(file, stack))
        except damage(file) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{prompts} cannot be read: {reason}") from None
    if not lines:
        raise DataError(f"{prompts} holds no request; expected one on each line, as JSON")
    return lines, sha256


def _here(stack: ExitStack, options: dict[str, Any], settings: Any, source: str) -> Any:
    """The trio of this process, open as long as `stack`."""
    from trimix_gguf.runs.answers import Answers
    from trimix_gguf.runs.running import Here

    trio = stack.enter_context(open_trio(dict(options)))
    return Here(Answers(trio, settings, source=source))


def _by_ray(stack: ExitStack, ray: Any, options: dict[str, Any], settings: Any, source: str) -> Any:
    """The trios of a Ray cluster."""
    from trimix_gguf.machine.cluster import connected
    from trimix_gguf.runs.ray_workers import RayWorkers

    stack.enter_context(connected(ray.address))
    load = loader_elsewhere(options)
    return RayWorkers(load, settings, source=source, n_workers=ray.n_workers)


def _header(settings: Any, sha256: str, shard: tuple[int, int]) -> dict[str, Any]:
    """What the answers depend on beside the trio, by the words that name it."""
    return {
        "prompts": sha256,
        "--parallel": settings.n_parallel,
        "--seed": settings.seed,
        "--shard": shard,
        "--name": settings.name,
        "--skip-bad": settings.skip_bad,
    }
