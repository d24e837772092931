"""trimix convert: Hugging Face checkpoints, adapters and merges -> GGUF."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.bars import byte_progress, count_bar
from trimix_gguf.machine.quantization import CALIBRATED, FLOATS, QUANTIZED, WEIGHT_TYPES


@click.group()
def convert() -> None:
    """Turn Hugging Face checkpoints into GGUF files, without PyTorch."""


def _output(what: str) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option("--force", is_flag=True, help="Replace an existing output.")(command)
        return click.option(
            "-o", "--output", required=True, metavar=what.upper(), help="Where to write."
        )(command)

    return add


_type = click.option(
    "--type", type=click.Choice(list(WEIGHT_TYPES)), help="Type of the weights. Default q8_0."
)
_pre = click.option("--pre", metavar="NAME", help="Pre-tokenizer, if it is not recognised.")
_name = click.option("--name", help="Model name in the file. Default: the folder's.")


@convert.command()
@click.argument("model_dir", metavar="MODEL_DIR")
@_output("file")
@_type
@_pre
@_name
def hf(model_dir: str, output: str, force: bool, **options: Any) -> None:
    """Convert a checkpoint folder: Llama, Qwen2, Qwen3, Qwen3-MoE or Gemma 3."""
    from trimix_gguf.convert.hf import convert_hf

    with byte_progress("Converting") as progress:
        convert_hf(Path(model_dir), Path(output), force=force, progress=progress, **_given(options))
    print(output)


@convert.command()
@click.argument("adapter_dir", metavar="ADAPTER_DIR")
@click.option(
    "--base",
    required=True,
    metavar="BASE_DIR",
    help="Folder of the model that it adapts; only config.json is read.",
)
@_output("file")
@click.option("--type", type=click.Choice(FLOATS), help="Type of the weights. Default f16.")
def lora(adapter_dir: str, base: str, output: str, force: bool, **options: Any) -> None:
    """Convert a PEFT adapter into an adapter GGUF (for --small-cpt-lora)."""
    from trimix_gguf.convert.lora import convert_lora

    paths = Path(adapter_dir), Path(base), Path(output)
    with byte_progress("Converting") as progress:
        convert_lora(*paths, force=force, progress=progress, **_given(options))
    print(output)


@convert.command("merge-lora")
@click.argument("adapter_dir", metavar="ADAPTER_DIR")
@click.option(
    "--base", required=True, metavar="BASE_DIR", help="Folder of the checkpoint that it adapts."
)
@_output("file")
@_type
@_pre
@_name
def merge_lora(adapter_dir: str, base: str, output: str, force: bool, **options: Any) -> None:
    """Merge a PEFT adapter into its base, as one whole GGUF."""
    from trimix_gguf.convert.lora import merge_lora as merge

    paths = Path(adapter_dir), Path(base), Path(output)
    with byte_progress("Merging") as progress:
        merge(*paths, force=force, progress=progress, **_given(options))
    print(output)


@convert.command()
@click.argument("model_dirs", metavar="MODEL_DIR...", nargs=-1, required=True)
@_output("dir")
@click.option(
    "--method",
    type=click.Choice(["linear", "task-arithmetic", "ties"]),
    required=True,
    help="How to merge.",
)
@click.option("--base", metavar="DIR", help="The common base of all models; not for linear.")
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Weight of a model, in order; once per model. Default 1.",
)
@click.option("--lambda", "lambda_", type=float, help="Scale of the sum that is added to the base.")
@click.option(
    "--density", type=float, help="For ties: share of each difference to keep. Default 0.2."
)
@click.option(
    "--dtype",
    type=click.Choice(FLOATS),
    help="Type of the output. Default: the base's.",
)
def merge(model_dirs: tuple[str, ...], output: str, force: bool, **options: Any) -> None:
    """Merge the parameters of checkpoints of one size into a new checkpoint folder."""
    from trimix_gguf.convert.merge import merge_checkpoints

    given = _given(options)
    if "base" in given:
        given["base"] = Path(given["base"])
    folders = [Path(folder) for folder in model_dirs]
    with byte_progress("Merging") as progress:
        merge_checkpoints(folders, Path(output), force=force, progress=progress, **given)
    print(output)


@convert.command()
@click.argument("model", metavar="MODEL.gguf")
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@_output("file")
@click.option("--lora", metavar="FILE", help="An adapter GGUF that the model is used with.")
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(min=1),
    help="Tokens to read, in equal parts from each text. Default 65536.",
)
@click.option(
    "--ctx",
    "n_ctx",
    type=click.IntRange(min=32),
    help="Tokens read at once. Default 512.",
)
def imatrix(model: str, texts: tuple[str, ...], output: str, force: bool, **options: Any) -> None:
    """Measure on a text which weights count most, for quantize --imatrix.

    TEXT is UTF-8 in the language that the model is for, also packed as .gz, .zst or .bz2. Ctrl-C
    keeps what was read. A run that is killed starts again.
    """
    from trimix_gguf.convert.calibration import Stopped, calibrate

    given = _given(options)
    if "lora" in given:
        given["lora"] = Path(given["lora"])
    paths = Path(model), [Path(text) for text in texts], Path(output)
    try:
        with count_bar("Tokens") as progress:
            calibrate(*paths, force=force, progress=progress, **given)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise
    print(output)


@convert.command()
@click.argument("source", metavar="IN.gguf")
@click.argument("output", metavar="OUT.gguf")
@click.option(
    "--type",
    type=click.Choice([*QUANTIZED, *CALIBRATED]),
    required=True,
    help=f"Type of the output; {', '.join(CALIBRATED)} need --imatrix.",
)
@click.option("--imatrix", metavar="FILE", help="Importance matrix of this model: convert imatrix.")
@click.option("--requantize", is_flag=True, help="Allow a source that is already quantized.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def quantize(source: str, output: str, imatrix: str | None, **options: Any) -> None:
    """Quantize a GGUF with llama.cpp's own quantizer."""
    from trimix_gguf.convert.quantize import quantize_gguf

    matrix = None if imatrix is None else Path(imatrix)
    with byte_progress("Quantizing") as progress:
        covered = quantize_gguf(
            Path(source), Path(output), imatrix=matrix, progress=progress, **options
        )
    if covered is not None:
        print(_described(covered), file=sys.stderr)
    print(output)


def _described(covered: Any) -> str:
    """What an importance matrix says of a model, in a line."""
    n_found = covered.n_matrices - covered.n_missing
    words = [f"importance matrix: {n_found} of {covered.n_matrices} matrices in the layers"]
    if covered.n_missing:
        words.append(f"{covered.n_missing} are quantized without")
    if covered.n_unreached:
        words.append(f"no token reached {covered.n_unreached} matrices of experts")
    return "; ".join(words)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set: defaults live in the functions called."""
    return {name: value for name, value in options.items() if value not in (None, ())}
