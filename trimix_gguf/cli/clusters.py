"""--ray: what commands share that have their work done by a Ray cluster."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.options import FILES, open_trio, option_group

ray_options = option_group(
    click.option(
        "--ray",
        metavar="ADDRESS|auto|local",
        help="Answer by a Ray cluster: at an address, this machine's (auto), or a new one (local).",
    ),
    click.option(
        "--ray-workers",
        type=click.IntRange(1),
        metavar="N",
        help="How many of its processes each load the trio. Default: one per machine.",
    ),
)


@dataclass(frozen=True)
class Ray:
    """What --ray and --ray-workers ask for; None workers: one per machine."""

    address: str
    n_workers: int | None


def taken_ray(options: dict[str, Any]) -> Ray | None:
    """Take --ray and --ray-workers out of the options."""
    address, n_workers = options.pop("ray"), options.pop("ray_workers")
    if address is not None:
        return Ray(address, n_workers)
    if n_workers is not None:
        raise click.UsageError("--ray-workers goes with --ray")
    return None


def as_elsewhere(path: str) -> Path:
    """A path as processes of a cluster can use it, which have folders of their own."""
    return Path(path).absolute() if Path(path).exists() else Path(path)


def loader_elsewhere(options: dict[str, Any]) -> Callable[[], Any]:
    """What opens the trio of these options in a process of the cluster."""
    named = [name for name in ("trio", *FILES) if options.get(name) is not None]
    return partial(open_trio, {**options, **{n: str(as_elsewhere(options[n])) for n in named}})
