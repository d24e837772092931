"""trimix convert: Hugging Face checkpoints -> GGUF."""

import sys
from pathlib import Path

import click


@click.group()
def convert() -> None:
    """Turn a Hugging Face checkpoint into a GGUF file."""


@convert.command()
@click.argument("model_dir", metavar="MODEL_DIR")
@click.option("-o", "--output", required=True, metavar="FILE", help="GGUF to write.")
@click.option(
    "--type", "kind", type=click.Choice(["f32", "f16", "bf16", "q8_0"]), help="Default q8_0."
)
@click.option("--pre", metavar="NAME", help="Pre-tokenizer, where it is not recognised.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def hf(model_dir: str, output: str, kind: str | None, pre: str | None, force: bool) -> None:
    """Convert a Llama checkpoint (safetensors, no torch needed)."""
    from rich.console import Console
    from rich.progress import Progress

    from trimix_gguf.convert.hf import convert_hf

    settings = {k: v for k, v in (("type", kind), ("pre", pre)) if v is not None}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("Converting", total=None)

        def progress(_: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        convert_hf(Path(model_dir), Path(output), force=force, progress=progress, **settings)
    print(output)
