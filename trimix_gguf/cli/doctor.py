"""trimix doctor: what is here, and whether a trio fits."""

import platform
from typing import Any

import click

from trimix_gguf.cli.options import trio_arguments, trio_options


@click.command()
@trio_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def doctor(as_json: bool, **options: Any) -> None:
    """What this machine and build can do, and whether a trio fits (exit 1 where not)."""
    import json

    report = _report(options)
    if as_json:
        print(json.dumps(report))
    else:
        for section, facts in report.items():
            print(section)
            for name, value in facts.items():
                print(f"  {name:<18}{value}")
    if report["trio"]["fits"] == "no":
        raise click.exceptions.Exit(1)


def _report(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    import os

    from trimix_gguf import memory, native
    from trimix_gguf.fusion import ROLES
    from trimix_gguf.gguf_file import read_gguf
    from trimix_gguf.model import available_cores, device_of
    from trimix_gguf.trio import concurrency
    from trimix_gguf.vocabulary import check_contract

    options.pop("verbose", None)
    arguments = trio_arguments(options)
    files = {
        role: read_gguf(arguments.get(role) or arguments["small_base"])
        for role in ("large_ins", "small_base", "small_cpt")
    }
    lora = arguments.get("small_cpt_lora")
    n_common = check_contract(files)
    shared = {"n_ctx": arguments.get("n_ctx", memory.N_CTX)}
    own = {role: {**shared, **arguments["per_role"].get(role, {})} for role in ROLES}
    places = {r: device_of(o.get("n_gpu_layers", 0), o.get("device")) for r, o in own.items()}
    need = memory.estimate(files, own, read_gguf(lora) if lora else None)
    have = memory.available()
    info = native.build_info()
    return {
        "llama.cpp": {**info, "python": platform.python_version()},
        "devices": {
            d.name: f"{d.kind}, {d.description}, {memory.in_gib(d.free)} free"
            for d in native.devices()
        },
        "machine": {
            "cores": f"{available_cores()} usable of {os.cpu_count()}",
            "memory free": memory.in_gib(have),
        },
        "trio": {
            **{
                role: f"{f.path.name}, {f.architecture}, {memory.in_gib(f.weight_bytes)}"
                for role, f in files.items()
            },
            **({"small_cpt_lora": lora.name} if lora else {}),
            "shared tokens": n_common,
            "context": shared["n_ctx"],
            "models run": concurrency(places),
            **{f"{name} needed": memory.in_gib(n) for name, n in need.items()},
            "fits": "yes" if sum(need.values()) <= have else "no",
        },
    }
