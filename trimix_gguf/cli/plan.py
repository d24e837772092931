"""trimix plan: where a trio's layers would go, on this machine or another."""

import json
import math
from collections.abc import Mapping
from typing import Any

import click

from trimix_gguf.cli.options import (
    FILES,
    asked_of,
    each_trio,
    named_trio,
    trio_arguments,
    trios_options,
)
from trimix_gguf.errors import MemoryNeededError
from trimix_gguf.roles import ROLES, Role


@click.command()
@trios_options
@click.option(
    "--assume-gpu",
    type=float,
    multiple=True,
    metavar="GB",
    help="Plan for a card with this much free memory. Once per card.",
)
@click.option("--assume-ram", type=float, metavar="GB", help="Plan for this much free memory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def plan(
    assume_gpu: tuple[float, ...], assume_ram: float | None, as_json: bool, **options: Any
) -> None:
    """Show which layers of each model go where, what they need, and what is free.

    No model is loaded. Every command follows this plan with --gpu-layers auto. --assume-gpu and
    --assume-ram plan for a machine that you do not have. If the trio does not fit: what to
    change, and exit 1. Several trios are planned for one process: weights that they share count
    once, and each has the room that those before it leave. Of one trio that `trimix pull` would
    fetch, only the sizes of the weights are known, and are compared with what is free.
    """
    from trimix_gguf.machine import memory, native, planner

    assumed = [_assumed(f"GPU{i}", gb) for i, gb in enumerate(assume_gpu)]
    devices = assumed or native.devices()
    free_ram = memory.available() if assume_ram is None else _in_bytes(assume_ram)
    if (preset := _preset_to_pull(options)) is not None:
        _plan_preset(preset, devices, free_ram, as_json)
        return
    options.pop("verbose", None)
    names = trio_names(each_trio(options)) if len(options["trio"]) > 1 else [""]
    trios = [planner.Asked(*trio_files(trio_arguments(one))) for one in each_trio(options)]
    plans = planner.plan_together(trios, devices=devices, free_ram=free_ram)
    files = [asked.files for asked in trios]
    _print_plans(names, plans, files, free_ram=free_ram, named=not assumed, as_json=as_json)


def _preset_to_pull(options: dict[str, Any]) -> Any:
    """The one trio that the options name, where it is a preset that is not here; else None."""
    from trimix_gguf.trios.store import preset_to_pull

    if len(options["trio"]) != 1 or any(options[role] for role in FILES):
        return None
    return preset_to_pull(options["trio"][0])


def _print_plans(
    names: list[str],
    plans: list[Any],
    files: list[Mapping[Role, Any]],
    *,
    free_ram: int,
    named: bool,
    as_json: bool,
) -> None:
    """One trio's plan, or several and their sum; raises MemoryNeededError where one has no room."""
    flags = [_flags(found, named=named) for found in plans]
    ram_needed = sum(found.ram_needed for found in plans)
    parts = list(zip(plans, files, flags, strict=True))
    if as_json:
        reports = [_report(*part) for part in parts]
        together = {
            "trios": dict(zip(names, reports, strict=True)),
            "ram_needed": ram_needed,
            "fits": all(found.fits for found in plans),
        }
        print(json.dumps(together if len(plans) > 1 else reports[0], ensure_ascii=False))
    elif len(plans) == 1:
        print(_table(*parts[0]))
    else:
        for name, part in zip(names, parts, strict=True):
            print(f"{name}\n{_table(*part)}\n")
        print(f"together{_size(ram_needed):>15} of RAM, {_size(free_ram)} is free")
    for name, found in zip(names, plans, strict=True):
        if not found.fits:
            raise MemoryNeededError((f"{name}: " if name else "") + found.refusal())


def trio_names(trios: list[dict[str, Any]]) -> list[str]:
    """The names of several trios, which must differ."""
    names = [named_trio(options).name for options in trios]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise click.UsageError(f"two trios are called {twice}; give each once")
    return names


def _plan_preset(preset: Any, devices: list[Any], free_ram: int, as_json: bool) -> None:
    """Compare the weights of a trio that is not here with the memory of this machine."""
    from trimix_gguf.cli.trios import absent_words, size_words

    name, cards = preset.trio.name, {d.name: d.free for d in devices if d.kind == "GPU"}
    free = {"RAM": free_ram, **cards}
    too_large = preset.n_bytes > sum(free.values())
    if as_json:
        models = {role: {"weights": n} for role, n in preset.sizes.items()}
        fits = False if too_large else None  # the context and the buffers are not known
        print(json.dumps({"here": False, "models": models, "free": free, "fits": fits}))
    else:
        print(f"{name}: {absent_words(name, preset.n_bytes)}\n\n{'':<12}{'weights':>11}")
        for role, n_bytes in preset.sizes.items():
            print(f"{role:<12}{size_words(n_bytes):>11}")
        print(f"\n{'':<12}{'free':>11}")
        for place, n_bytes in free.items():
            print(f"{place:<12}{size_words(n_bytes):>11}")
    if too_large:
        raise MemoryNeededError(
            f"the weights of {name} are about {size_words(preset.n_bytes)}, and "
            f"{size_words(sum(free.values()))} are free; take a smaller trio: `trimix list`"
        )
    if not as_json:
        print("\nthe weights fit; the context needs more, which a plan after the pull counts")


def trio_files(arguments: dict[str, Any]) -> tuple[dict[Role, Any], dict[Role, Any], Any]:
    """Arguments of Trio.load -> the checked files by role, options by role, and the adapter."""
    from trimix_gguf.machine.gguf_file import read_gguf
    from trimix_gguf.machine.vocabulary import check_contract

    files = {role: read_gguf(arguments.get(role) or arguments["small_base"]) for role in ROLES}
    check_contract(files)
    lora = arguments.get("small_cpt_lora")
    return files, asked_of(arguments), read_gguf(lora) if lora else None


def _assumed(name: str, gb: float) -> Any:
    from trimix_gguf.machine.native import Device

    return Device(name, f"assumed, {name}", "GPU", _in_bytes(gb), _in_bytes(gb), 0)


def _in_bytes(gb: float) -> int:
    if not (math.isfinite(gb) and 0 <= gb <= 1e6):
        raise click.UsageError(f"{gb} is not an amount of memory; give GB, such as 8")
    return int(gb * (1 << 30))


def _flags(found: Any, named: bool) -> str:
    """The options that say what the planner chose; names of assumed devices mean nothing."""
    from trimix_gguf.machine import rpc

    if any(model.wire for model in found.models.values()):
        return f"--rpc {','.join(rpc.endpoints())}"
    words = []
    for role in found.models:
        chosen = found.load_options(role)
        option = role.replace("_", "-")
        words.append(f"--gpu-layers {option}={chosen['n_gpu_layers']}")
        if named and "device" in chosen:
            words.append(f"--device {option}={chosen['device']}")
    return " ".join(words) if any(m.n_layers for m in found.models.values()) else "--gpu-layers 0"


def _report(found: Any, files: Mapping[Role, Any], flags: str) -> dict[str, Any]:
    from dataclasses import asdict

    models = {}
    for role, placement in found.models.items():
        models[role] = {
            "file": files[role].path.name,
            "device": placement.device,
            "n_gpu_layers": placement.n_layers,
            "n_layers": placement.most,
            "shares_weights_of": placement.shares,
            "layers_by_worker": list(placement.chosen.split),
            "network_bytes_per_token": placement.wire,
            "on_device": asdict(placement.on_device),
            "in_ram": asdict(placement.in_ram),
        }
    rooms = {
        name: {
            "free": room.free,
            "usable": room.usable,
            "needed": room.need.total,
            **asdict(room.need),
            "is_ram": room.is_ram,
        }
        for name, room in found.rooms.items()
    }
    return {
        "models": models,
        "devices": rooms,
        "program": found.program,
        "ram_needed": found.ram_needed,
        "fits": found.fits,
        "flags": flags,
        "advice": [asdict(change) for change in found.advice],
    }


def _table(found: Any, files: Mapping[Role, Any], flags: str) -> str:
    """Models, then devices, then what to type."""
    head = f"{'':<12}{'device':<10}{'layers':>10}{'weights':>11}{'KV':>11}{'buffers':>11}  file"
    lines = [head]
    for role, placement in found.models.items():
        need = placement.on_device + placement.in_ram
        sizes = "".join(f"{_size(n):>11}" for n in (need.weights, need.kv, need.buffers))
        shares = f", weights of {placement.shares}" if placement.shares else ""
        layers = f"{placement.n_layers} of {placement.most}"
        name = f"{files[role].path.name}{shares}"
        lines.append(f"{role:<12}{placement.device:<10}{layers:>10}{sizes}  {name}")
    lines.append(f"{'program':<32}{'':>22}{_size(found.program):>11}")
    lines += ["", f"{'':<12}{'needed':>11}{'free':>11}"]
    for name, room in found.rooms.items():
        needed = found.ram_needed if name == "RAM" else room.need.total
        kept = "" if name == "RAM" else f"  {_size(room.free - room.usable)} of it kept free"
        kept += ", part of RAM" if room.is_ram else ""
        lines.append(f"{name:<12}{_size(needed):>11}{_size(room.free):>11}{kept}")
    lines += _network_lines(found)
    if found.fits:
        return "\n".join([*lines, "", f"it fits: {flags}"])
    lines += ["", "it does not fit; what would help:"]
    for change in found.advice:
        enough = "enough" if change.suffices else "not enough by itself"
        lines.append(f"  {change.option}")
        lines.append(f"      {change.what}: {_size(change.saves)} less, {enough}")
        if change.command:
            lines.append(f"      made by: {change.command}")
    return "\n".join(lines)


def _network_lines(found: Any) -> list[str]:
    """What each token sends over the network, about, and where the output layer is."""
    lines = []
    for role, placement in found.models.items():
        if placement.wire:
            words = "here" if placement.chosen.keeps_output else "there, and sends rows of logits"
            kept = f"output layer {words}"
            split = "+".join(map(str, placement.chosen.split))
            parts = f"; {split} layers" if split else ""
            lines.append(f"{role:<12}{placement.wire / 1e3:>11.1f} KB    {kept}{parts}")
    return ["", f"{'':<12}{'network, for each token':<24}", *lines] if lines else []


def _size(n_bytes: int) -> str:
    gib = n_bytes / (1 << 30)
    return f"{gib:.2f} GiB" if gib >= 1 else f"{n_bytes / (1 << 20):.1f} MiB"
