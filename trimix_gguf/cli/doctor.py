"""trimix doctor: what is here, and whether a trio fits."""

import platform
import sys
from typing import Any

import click

from trimix_gguf.cli.options import named_trio, trio_arguments, trio_options
from trimix_gguf.cli.plan import trio_files
from trimix_gguf.cli.tuning_notes import tuning_words
from trimix_gguf.roles import Role


@click.command()
@trio_options
@click.option("--mend", is_flag=True, help="Build llama.cpp again where it does not run here.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def doctor(as_json: bool, mend: bool, **options: Any) -> None:
    """What this machine and build can do, and whether a trio fits (exit 1 where not)."""
    import json

    tested = _self_test(mend)
    report = {"self-test": tested, **_report(options)}
    if as_json:
        print(json.dumps(report))
    else:
        for section, facts in report.items():
            print(section)
            for name, value in facts.items():
                print(f"  {name:<18}{value}")
    if report["trio"]["fits"] == "no":
        raise click.exceptions.Exit(1)


def _self_test(mend: bool) -> dict[str, str]:
    """Try llama.cpp again. To mend it, build for this machine, then without AMX, then portably."""
    import time

    from trimix_gguf.errors import BuildError
    from trimix_gguf.machine import build, processor, self_test

    ways = [{"portable": False}, {"portable": False, "amx": False}, {"portable": True}]
    if "amx" not in processor.describe()[1]:
        del ways[1]
    while True:
        started = time.perf_counter()
        try:
            self_test.run()
        except BuildError as error:
            if not (mend and ways):
                raise
            print(f"trimix: {error}", file=sys.stderr)
            build.check()
            build.install(**ways.pop(0), fresh=True)
        else:
            took = time.perf_counter() - started
            folder = str(self_test.library_folder())
            return {"result": f"passed, in {took:.1f} s", "llama.cpp": folder}


def _report(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    import os

    from trimix_gguf.machine import memory, native
    from trimix_gguf.machine.loading import AUTO, Loading
    from trimix_gguf.machine.planner import plan
    from trimix_gguf.machine.threads import available_cores
    from trimix_gguf.machine.vocabulary import check_contract
    from trimix_gguf.trio.trio import concurrency

    options.pop("verbose", None)
    given = dict(options)
    files, asked, lora = trio_files(trio_arguments(options))
    have, devices, info = memory.available(), native.devices(), native.build_info()
    machine: dict[str, Any] = {"devices": devices, "free_ram": have, "lora": lora}
    on_cpu: dict[Role, Any] = {r: {"n_gpu_layers": 0, **one} for r, one in asked.items()}
    found = plan(files, options=on_cpu, **machine)
    all_auto: dict[Role, Any] = {r: {**one, "n_gpu_layers": AUTO} for r, one in asked.items()}
    auto = plan(files, options=all_auto, **machine)
    places = {role: model.device for role, model in found.models.items()}
    loadings = {role: Loading(**one) for role, one in asked.items()}
    need = memory.estimate(memory.Models(files, loadings, lora))
    trio_file = named_trio(given)
    return {
        "llama.cpp": {**info, "python": platform.python_version()},
        "devices": {
            d.name: f"{d.kind}, {d.description}, {memory.in_gib(d.free)} free" for d in devices
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
            **({"small_cpt_lora": lora.path.name} if lora else {}),
            "shared tokens": check_contract(files),
            "context": loadings["large_ins"].n_ctx,
            "models run": concurrency(places),
            "auto layers": auto.in_words(),
            **{f"{name} needed": memory.in_gib(n) for name, n in need.items()},
            **({} if trio_file is None else {"tuning": tuning_words(trio_file)}),
            "fits": "yes" if found.fits else "no",
        },
    }
