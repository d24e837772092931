"""trimix worker: lends this machine's memory and devices to a trimix on another one."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from trimix_gguf.cli.options import bound


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=50052,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@click.option(
    "--device",
    multiple=True,
    metavar="NAME",
    help="Device to lend; see `trimix doctor`. Default: the graphics cards, or else the CPU.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: all cores.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep large tensors here: the next start need not send them again.",
)
@click.option(
    "--insecure-lan",
    is_flag=True,
    help="Listen where other machines can reach it. Nothing asks for a password.",
)
def worker(**options: Any) -> None:
    """Lend this machine's memory and devices to commands with --rpc.

    Whoever can reach the port can use the machine, and read and write the memory of this process:
    see `trimix help machines`. It works for one command at a time. Ctrl-C or SIGTERM ends it.
    """
    from trimix_gguf.machine import rpc

    rpc.require_library()  # before anything loads llama.cpp, which may be linked to it
    host = options["host"]
    _check_host(host, options["insecure_lan"])
    ended_by = _lend(host, options)
    print("trimix: the worker has ended", file=sys.stderr)
    if ended_by == signal.SIGINT:
        raise click.exceptions.Exit(130)


def _check_host(host: str, is_allowed: bool) -> None:
    from trimix_gguf.server.guard import is_loopback

    if not is_allowed and not is_loopback(host):
        raise click.UsageError(
            f"--host {host} can be reached from other machines, and a worker asks nobody for a "
            "password; use a tunnel (`trimix help machines`), or give --insecure-lan"
        )


def _lend(host: str, options: dict[str, Any]) -> int:
    """Lend until a signal comes; returns its number."""
    from trimix_gguf.machine import lending
    from trimix_gguf.machine.threads import available_cores

    devices = _devices(options["device"])
    n_threads = options["threads"] or available_cores()
    cache = _cache_folder(options["cache"])
    listener = bound(host=host, port=options["port"])
    signals: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    server = lending.Server([d.name for d in devices], n_threads=n_threads, cache=cache)
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)
    with listener:
        try:
            server.start()
            lender = lending.Lender(
                listener, server, lambda: _described(options["device"], server.n_bytes), _say
            )
            _say_ready(lender.build, f"{host}:{listener.getsockname()[1]}", devices, n_threads)
            lender.run()
        except KeyboardInterrupt:
            pass
        finally:
            server.end()
    return signals[0] if signals else signal.SIGINT


def _devices(names: tuple[str, ...]) -> list[Any]:
    """The devices to lend; raises ClickException for one that is not here."""
    from trimix_gguf.machine import native

    here = native.devices()
    if not names:
        cards = [d for d in here if d.kind == "GPU"] or [d for d in here if "GPU" in d.kind]
        return cards or [d for d in here if d.kind == "CPU"]
    found = {d.name.lower(): d for d in here}
    for name in names:
        if name.lower() not in found:
            raise click.ClickException(
                f"device {name!r} is not here; there is {', '.join(d.name for d in here)}"
            )
    return [found[name.lower()] for name in names]


def _cache_folder(folder: Path | None) -> str | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder.absolute())


def _described(names: tuple[str, ...], n_bytes: int) -> list[dict[str, Any]]:
    """What is lent, and what of it is free now; `n_bytes` of address space are the server's."""
    from trimix_gguf.machine import memory

    described = []
    for device in _devices(names):
        free, total = device.free, device.total
        if device.kind == "CPU":  # ggml counts all the machine has, whoever uses it
            total, free = memory.total(), memory.available()
            limit = memory.address_limit()
            if limit is not None:
                free, total = min(free, max(0, limit - n_bytes)), min(total, limit)
        words = {"name": device.name, "description": device.description, "kind": device.kind}
        described.append({**words, "free": free, "total": total})
    return described


def _say_ready(build: str, address: str, devices: list[Any], n_threads: int) -> None:
    """The address first: programs wait for that line."""
    from trimix_gguf.machine.memory import in_gib

    _say(f"lends this machine at {address} ({build}, {n_threads} threads)")
    for device, now in zip(devices, _described(tuple(d.name for d in devices), 0), strict=True):
        _say(f"{device.name}: {device.description}, {in_gib(now['free'])} free")


def _say(text: str) -> None:
    print(f"trimix worker: {text}", file=sys.stderr, flush=True)
