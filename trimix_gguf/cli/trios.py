"""trimix list, show, verify, remove, export, import: the trios of this machine."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.bars import byte_progress
from trimix_gguf.errors import TrioFileError


@click.command("list")
@click.option(
    "--presets", "every", is_flag=True, help="Also list pairs that need your own small_cpt."
)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def list_trios(every: bool, as_json: bool) -> None:
    """List the trios that are here, and those that `trimix pull` can fetch."""
    from trimix_gguf.trios.store import SHIPPED, installed, presets

    here = [_summary(name) for name in [SHIPPED, *installed()]]
    known = list(presets().values())
    if as_json:
        print(json.dumps({"installed": here, "presets": [_offer(p) for p in known]}))
        return
    print("here:")
    for trio in here:
        print(_row(trio, trio["state"] if trio["state"] != "whole" else trio["description"]))
    print("\nto pull:")
    shown = [preset for preset in known if preset.whole or every]
    for offer in map(_offer, shown):
        print(_row(offer, f"{', '.join(offer['licences'])}: {offer['description']}"))
    if len(shown) < len(known):
        more = len(known) - len(shown)
        own = f"{more} more need a small_cpt of your own: trimix list --presets"
        print(f"{own}; to teach one: trimix help your-language", file=sys.stderr)


@click.command()
@click.argument("trio", metavar="NAME|FILE|DIR")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def show(trio: str, as_json: bool) -> None:
    """Show the settings and models of a trio, their sources, and whether they are here.

    Of a trio that is not here yet: what `trimix pull` would fetch, and about how large it is.
    """
    from trimix_gguf.trios.store import preset_to_pull, resolve

    preset = preset_to_pull(trio)
    report = _report(resolve(trio) if preset is None else preset.trio)
    if preset is not None:
        report["to_pull"] = {"n_bytes": preset.n_bytes, "models": preset.sizes}
    print(json.dumps(report, ensure_ascii=False) if as_json else _lines(report))


@click.command()
@click.argument("trio", metavar="NAME|FILE|DIR")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def verify(trio: str, as_json: bool) -> None:
    """Compare every file of a trio with its SHA-256 (exit 1 where one is missing or altered)."""
    from trimix_gguf.trios import store

    found = store.resolve(trio)
    with byte_progress("Reading") as progress:
        states = store.verify(found, progress)
    if as_json:
        print(json.dumps({"name": found.name, "models": states}))
    else:
        for role, state in states.items():
            print(f"{role:<12}{state}")
    bad = [f"{found.path(role)} is {state}" for role, state in states.items()
           if state in ("missing", "altered")]  # fmt: skip
    if bad:
        mend = "get it again from where it came"
        if found.folder.parent == store.trios_folder():
            name = found.folder.name
            mend = (
                f"delete it, and `trimix pull {name}` fetches it; or `trimix remove {name}`, and "
                "import it again"
            )
        raise TrioFileError(f"{'; '.join(bad)}; {mend}")


@click.command()
@click.argument("name")
def remove(name: str) -> None:
    """Delete a trio that was pulled or imported."""
    from trimix_gguf.trios import store

    store.remove(name)
    print(f"{name} is deleted", file=sys.stderr)


@click.command("export")
@click.argument("trio", metavar="NAME|FILE|DIR")
@click.argument("target", metavar="DIR|FILE.tar")
@click.option(
    "--with-program",
    "folder",
    metavar="DIR",
    help="Also write this program to DIR, which holds TARGET.",
)
@click.option(
    "--for-python",
    "pythons",
    multiple=True,
    metavar="3.N",
    help="Also for this Python. Can be given several times.",
)
def export_(trio: str, target: str, folder: str | None, pythons: tuple[str, ...]) -> None:
    """Write a trio to a folder or a tar, for a machine without a network.

    The SHA-256 of every file goes with it. An export that was stopped continues with the same
    command.

    --with-program also writes what installs this program there without a network: wheels for this
    system and this Python, and the scripts install.sh and install.ps1. For example: trimix export
    NAME /media/stick/NAME --with-program /media/stick
    """
    from trimix_gguf.trios.bundle import export_trio
    from trimix_gguf.trios.store import resolve

    if pythons and folder is None:
        raise click.UsageError("--for-python goes with --with-program")
    found = resolve(trio)
    if folder is not None:
        from trimix_gguf.trios.program import check_place

        check_place(Path(target), Path(folder), pythons)
    with byte_progress("Exporting") as progress:
        export_trio(found, Path(target), progress=progress)
    if folder is not None:
        _export_program(Path(folder), found, Path(target), pythons)
    print(target)


def _export_program(folder: Path, trio: Any, target: Path, pythons: tuple[str, ...]) -> None:
    from trimix_gguf.trios.program import export_program

    try:
        export_program(
            folder, trio, target, pythons=pythons, notify=lambda line: print(line, file=sys.stderr)
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    print(f"there, without a network: sh {folder / 'install.sh'}", file=sys.stderr)


@click.command("import")
@click.argument("source", metavar="DIR|FILE.tar")
@click.option("--name", metavar="NAME", help="Its name here. Default: its own name.")
def import_(source: str, name: str | None) -> None:
    """Install an exported trio. Every file is compared with its SHA-256 first."""
    from trimix_gguf.trios.bundle import import_trio

    with byte_progress("Importing") as progress:
        trio = import_trio(Path(source), name=name, progress=progress)
    print(trio.name)
    print(f'{trio.name} is complete: trimix generate "…" --trio {trio.name}', file=sys.stderr)


# -- words ------------------------------------------------------------------------------------


def _summary(name: str) -> dict[str, Any]:
    """An installed trio in a line of the list; a damaged one says what is wrong."""
    from trimix_gguf.trios.store import resolve

    try:
        trio = resolve(name)
    except TrioFileError as error:
        return {"name": name, "languages": [], "n_bytes": 0, "state": str(error)}
    report = _report(trio)
    missing = [role for role, m in report["models"].items() if m["state"] != "here"]
    state = "whole" if not missing else f"without {', '.join(missing)}: `trimix verify {name}`"
    return {
        "name": name,
        "languages": report["languages"],
        "description": report["description"],
        "n_bytes": report["n_bytes"],
        "state": state,
    }


def _offer(preset: Any) -> dict[str, Any]:
    """A preset in a line of the list; its bytes are about what it takes."""
    trio = preset.trio
    return {
        "name": trio.name,
        "languages": list(trio.languages),
        "description": trio.description,
        "n_bytes": preset.n_bytes,
        "licences": preset.licences,
        "needs_own_small_cpt": not preset.whole,
    }


def _row(trio: dict[str, Any], text: str) -> str:
    languages = ",".join(trio["languages"]) or "-"
    return f"  {trio['name']:<22} {languages:<4} {size_words(trio['n_bytes']):>8}  {text}"


def _report(trio: Any) -> dict[str, Any]:
    """Everything a trio file says, and of each model the path, and what is there."""
    from dataclasses import asdict

    from trimix_gguf.machine.parts import is_here, n_bytes_of

    models = {}
    for role, entry in trio.models.items():
        path = trio.path(role)
        n_bytes = n_bytes_of(path) if is_here(path) else None
        state = "missing" if n_bytes is None else "here"
        if n_bytes is not None and entry.n_bytes not in (None, n_bytes):
            state = "of another size"
        given = {key: value for key, value in asdict(entry).items() if value is not None}
        if entry.repo is None:
            del given["revision"]
        models[role] = {**given, "path": str(path), "n_bytes": n_bytes, "state": state}
    weights = trio.weights
    return {
        "name": trio.name,
        "file": str(trio.file),
        "languages": list(trio.languages),
        "description": trio.description,
        "method": trio.method,
        "weights": None if weights is None else {"alpha": weights.alpha, "beta": weights.beta},
        "n_ctx": trio.n_ctx,
        "gpu_layers": trio.gpu_layers,
        "chat_template": trio.chat_template,
        "tuning": None if trio.tuning is None else trio.tuning.to_table(),
        "n_bytes": sum(model["n_bytes"] or 0 for model in models.values()),
        "models": models,
    }


def _lines(report: dict[str, Any]) -> str:
    w = report["weights"]
    mix = (
        f"alpha {w['alpha']:.3g}, beta {w['beta']:.3g}" if w else f"by {report['method'] or 'auto'}"
    )
    template = report["chat_template"]
    facts = {
        "file": report["file"],
        "language": ", ".join(report["languages"]) or None,
        "description": report["description"] or None,
        "weights": mix,
        "context": report["n_ctx"],
        "gpu layers": report["gpu_layers"],
        "chat template": None if template is None else f"its own, {len(template)} characters",
    }
    if report["tuning"] is not None:
        from trimix_gguf.trio.tuned import Tuning

        facts["tuned"] = Tuning.from_table(report["tuning"]).words
    to_pull = report.get("to_pull")
    lines = [report["name"]]
    if to_pull is not None:
        lines.append(f"  {absent_words(report['name'], to_pull['n_bytes'])}")
    lines += [f"  {name:<15}{value}" for name, value in facts.items() if value is not None]
    for role, model in report["models"].items():
        size = "" if model["n_bytes"] is None else f", {size_words(model['n_bytes'])}"
        if to_pull is not None:
            size = f", about {size_words(to_pull['models'][role])}"
        lines.append(f"{role}: {model['state']}{size}")
        if "repo" in model:
            where = f"{model['repo']}@{model['revision']}"
            model = {**model, "from": f"{where} {model.get('file', '')}".strip()}
        told = ("path", "from", "adapter_of", "quantization", "licence", "sha256", "gpu_layers")
        for key in (*told, "device", "threads", "kv_type"):
            if key in model:
                lines.append(f"  {key.replace('_', ' '):<15}{model[key]}")
    return "\n".join(lines)


def absent_words(name: str, n_bytes: int) -> str:
    """What is said of a preset that is not here."""
    return f"not here; `trimix pull {name}` makes about {size_words(n_bytes)} of files"


def size_words(n_bytes: int) -> str:
    """In GB or MB, as files are sold."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
