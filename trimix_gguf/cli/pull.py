"""trimix pull: fetch a trio, converting what is published as safetensors."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from trimix_gguf.cli.bars import byte_progress


@click.command()
@click.argument("trio", metavar="NAME|FILE.toml")
@click.option("--name", metavar="NAME", help="Its name here. Default: its own name.")
@click.option("--quantization", metavar="TYPE", help="Type of converted models: q8_0, q4_k_m, …")
@click.option("--yes", is_flag=True, help="Fetch without asking.")
@click.option("--force", is_flag=True, help="Fetch even if this machine has too little memory.")
def pull(trio: str, name: str | None, quantization: str | None, yes: bool, force: bool) -> None:
    """Fetch a trio by its name (see `trimix list`), or by a trio.toml file.

    Models published as safetensors are converted. Afterwards --trio NAME works without a network.
    A pull that was stopped continues with the same command. Prints the trio's folder.
    """
    from rich.filesize import decimal

    from trimix_gguf.trios import pulling
    from trimix_gguf.trios.pull_plan import check_room, find_manifest, plan_pull

    manifest = find_manifest(trio)
    plan = plan_pull(manifest, name=name, quantization=quantization, notify=_say)
    if plan.trio.file.is_file() and not plan.parts and not plan.own_files:
        pulling.clear_work(plan.trio)
        _say(f"{plan.trio.name} is already here, {decimal(plan.n_memory)}; nothing to fetch")
        print(plan.trio.folder)
        return
    for line in _described(plan):
        _say(line)
    check_room(plan, force=force)
    _ask(yes)
    try:
        with _bars() as progress:
            done = pulling.pull(plan, progress=progress, notify=_say)
    except KeyboardInterrupt:
        _say("stopped; the same command continues from here")
        raise
    _say(f'{done.name} is complete: trimix generate "…" --trio {done.name}')
    print(done.folder)


def _described(plan: Any) -> list[str]:
    """The trio's models: from where, how large, under what licence."""
    from rich.filesize import decimal

    trio, parts = plan.trio, {part.role: part for part in plan.parts}
    lines = [": ".join(filter(None, (trio.name, trio.description)))]
    for role, entry in trio.models.items():
        if role not in parts:
            where = f"{plan.own_files[role]} (your own)" if role in plan.own_files else "is here"
            lines.append(f"  {role:<11}{where}")
            continue
        part = parts[role]
        n_bytes = sum(file.n_bytes for file in part.files)
        what = part.files[0].name if part.kind == "gguf" else f"converted to {part.type}"
        licence = entry.licence or part.repository.licence or "unknown"
        lines.append(
            f"  {role:<11}{part.repository.repo}, {what}: {decimal(n_bytes)}, licence {licence}"
        )
    fetched, whole = plan.n_to_fetch, sum(f.n_bytes for p in plan.parts for f in p.files)
    kept = f" ({decimal(whole - fetched)} are already here)" if fetched < whole else ""
    lines.append(
        f"to fetch: {decimal(fetched)}{kept}; the models are then about {decimal(plan.n_memory)}"
    )
    return lines


def _ask(yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("no terminal to confirm on; use --yes")
    if not click.confirm("Fetch it?", default=True, err=True):
        raise click.Abort


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar after the other, each for one file or step."""
    with ExitStack() as stack:
        current, show = "", None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal current, show
            if what != current or show is None:
                stack.close()
                current, show = what, stack.enter_context(byte_progress(what))
            show(what, done, total)

        yield progress


def _say(line: str) -> None:
    print(line, file=sys.stderr)
