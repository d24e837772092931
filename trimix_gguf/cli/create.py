"""trimix create: a trio of files that are here already."""

import json
import sys
from typing import Any

import click

_SOURCE = "FILE|DIR|hf:OWNER/NAME/FILE|ollama:NAME|lmstudio:PATH"


@click.command()
@click.argument("name", required=False)
@click.option("--large-ins", metavar=_SOURCE, help="The large instruct model.")
@click.option("--small-base", metavar="…", help="The small base model; named in the same ways.")
@click.option("--small-cpt", metavar="…", help="The small model that knows the language.")
@click.option(
    "--small-cpt-lora", metavar="…", help="LoRA adapter over small_base, in place of small_cpt."
)
@click.option("--language", "languages", multiple=True, metavar="CODE", help="Such as kk.")
@click.option("--description", default="", metavar="TEXT", help="A line for `trimix list`.")
@click.option("--found", is_flag=True, help="Only list the models of other programs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def create(name: str | None, found: bool, as_json: bool, **options: Any) -> None:
    """Make a trio NAME of files that are here, without copying them.

    It finds files of Ollama, LM Studio and the Hugging Face cache by their names there. Nothing is
    fetched. The three files must share one vocabulary.
    """
    if found:
        _list(as_json)
        return
    adapter = options.pop("small_cpt_lora")
    sources = {role: options.pop(role) for role in ("large_ins", "small_cpt", "small_base")}
    if sources["small_cpt"] is not None and adapter is not None:
        raise click.UsageError("give --small-cpt or --small-cpt-lora, not both")
    sources["small_cpt"] = sources["small_cpt"] or adapter
    if name is None or not all(sources.values()):
        raise click.UsageError(
            "give NAME, --large-ins, --small-base and --small-cpt (or --small-cpt-lora)"
        )
    _create(name, sources, is_adapter=adapter is not None, as_json=as_json, **options)


def _create(
    name: str, sources: dict[str, str], *, is_adapter: bool, as_json: bool, **about: Any
) -> None:
    from trimix_gguf.errors import ModelFileError
    from trimix_gguf.machine.gguf_file import read_gguf
    from trimix_gguf.trios.creating import create as make
    from trimix_gguf.trios.elsewhere import find

    files = {role: find(source) for role, source in sources.items()}
    kind = read_gguf(files["small_cpt"]).metadata.get("general.type")
    if is_adapter != (kind == "adapter"):
        what = "an adapter" if kind == "adapter" else "a whole model"
        mend = "--small-cpt-lora" if kind == "adapter" else "--small-cpt"
        raise ModelFileError(f"{files['small_cpt']} is {what}; give it as {mend}")
    trio, report = make(name, files, **about)
    if as_json:
        paths = {role: str(trio.path(role)) for role in trio.models}
        print(json.dumps({"name": name, "file": str(trio.file), "models": paths}))
    else:
        print(name)
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if not report["memory"]["fits"]:
        print(f"it may not fit in memory: trimix plan --trio {name}", file=sys.stderr)
    print(f"{name} is ready: trimix chat --trio {name}", file=sys.stderr)


def _list(as_json: bool) -> None:
    from trimix_gguf.machine.parts import n_bytes_of
    from trimix_gguf.trios.elsewhere import everywhere

    found = [(f.source, str(f.path), n_bytes_of(f.path)) for f in everywhere()]
    if as_json:
        keys = ("source", "path", "n_bytes")
        print(json.dumps({"found": [dict(zip(keys, row, strict=True)) for row in found]}))
        return
    for source, _, n_bytes in found:
        print(f"{n_bytes / 1e9:>8.2f} GB  {source}")
    if not found:
        print("no other program holds models here", file=sys.stderr)
