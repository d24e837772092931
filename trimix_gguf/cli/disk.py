"""trimix disk: what uses space, and how to free it."""

import json
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.trios import size_words


@click.command()
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def disk(folders: tuple[Path, ...], as_json: bool) -> None:
    """Show what uses space: trios, work folders, caches; and how to free it.

    A file counts once, however many names it has. DIR is also counted, such as a folder of
    `generate --prompt-cache`.
    """
    from trimix_gguf.trios.disk import disk_use

    for folder in folders:
        if not folder.is_dir():
            raise click.ClickException(f"{folder}: no such folder")
    uses = disk_use(folders)
    total = sum(use.n_bytes for use in uses)
    if as_json:
        listed = [{**vars(use), "path": str(use.path)} for use in uses]
        print(json.dumps({"uses": listed, "n_bytes": total}, ensure_ascii=False))
        return
    for use in sorted(uses, key=lambda use: -use.n_bytes):
        print(_row(use))
    print(f"{size_words(total):>10}  in all")


def _row(use: Any) -> str:
    less = f" (frees {size_words(use.frees)}: other names keep the rest)"
    less = less if use.kind == "trio" and use.frees < use.n_bytes else ""
    return f"{size_words(use.n_bytes):>10}  {use.kind:<11}{use.name:<24} {use.how}{less}"
