"""The trios of `trimix serve`: what options mean, which share weights, how they are opened."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.options import asked_of, model_name, named_trio, open_trio, trio_arguments
from trimix_gguf.cli.plan import trio_files, trio_names
from trimix_gguf.roles import ROLES, Role

Given = dict[str, Any]  # the options of one trio


def groups_of(
    trios: list[Given],
    name: str | None = None,
    *,
    task: str | None = None,
    task_method: str | None = None,
) -> list[Any]:
    """The server's groups: trios with the same large_ins and small_base are in one.

    `name` stands for that of a single trio; calls can name the `task` of that file. Raises what a
    trio file or a GGUF may: all are read.
    """
    from trimix_gguf.server.trios import Group

    if len(trios) > 1 and name is not None:
        raise click.UsageError("--name is for one trio; several have their own")
    names = trio_names(trios) if len(trios) > 1 else [name]
    entries = [_entry(given, name) for given, name in zip(trios, names, strict=True)]
    if task is not None:
        from trimix_gguf.cli.task_weights import check_served_task

        check_served_task(task, task_method)
        entries = [
            replace(entry, task=_served_task(given, task, task_method))
            for given, entry in zip(trios, entries, strict=True)
        ]
    sets: list[list[int]] = []
    for i, given in enumerate(trios):
        same = next((known for known in sets if share_weights(given, trios[known[0]])), None)
        if same is None:
            sets.append([i])
        else:
            same.append(i)
    return [
        Group(
            [entries[i] for i in known],
            load=_opener([trios[i] for i in known]),
            fits=_fitting([trios[i] for i in known]),
        )
        for known in sets
    ]


def mixes_by_auto(given: Given) -> bool:
    """Whether the named trio leaves weights to the method auto."""
    from trimix_gguf.choosing.methods import AUTO

    trio_file = named_trio(given)
    if trio_file is None:
        return False
    return trio_file.fixed_mix is None and trio_file.method in (None, AUTO)


def _entry(given: Given, name: str | None) -> Any:
    """What clients see of a trio; by files, it is called as the large model's file."""
    from trimix_gguf.machine.loading import Loading
    from trimix_gguf.machine.parts import n_bytes_of
    from trimix_gguf.server.settings import mix_settings
    from trimix_gguf.server.trios import Entry

    trio_file = named_trio(given)
    arguments = trio_arguments(dict(given))
    n_ctx = min(Loading(**one).n_ctx for one in asked_of(arguments).values())
    name = name or model_name(trio_file, given)
    files = {Path(arguments[r]) for r in (*ROLES, "small_cpt_lora") if arguments.get(r)}
    n_bytes = sum(map(n_bytes_of, files))
    if trio_file is None:
        return Entry(name, n_ctx, n_bytes=n_bytes)
    return Entry(
        name,
        n_ctx,
        description=trio_file.description,
        languages=trio_file.languages,
        mix=mix_settings(trio_file.method, trio_file.weights),
        tuning=arguments.get("tuning"),
        n_bytes=n_bytes,
    )


def _served_task(given: Given, task: str, method: str | None) -> Any:
    """A task of the file's name, whose weights are chosen once for a trio, however often loaded."""
    from trimix_gguf.cli.task_weights import task_weights
    from trimix_gguf.server.trios import ServedTask

    trio_file, name = named_trio(given), Path(task).stem
    if method is None and trio_file is not None and trio_file.fixed_mix is None:
        method = trio_file.method
    chosen: list[Any] = []

    def choose(trio: Any, watch: Callable[[], None]) -> Any:
        if not chosen:
            settings = {} if method is None else {"method": method}
            # Programs wait for the address, which is the first line.
            found = task_weights(trio, task, settings, watch=watch)
            trio.forget()
            reason = "; ".join(filter(None, (f"chosen for the task {name}", found.reason)))
            # The score is that of the file, not of what will be asked.
            chosen.append(replace(found, score=None, follows=None, reason=reason))
        return chosen[0]

    return ServedTask(name, choose)


def share_weights(one: Given, other: Given) -> bool:
    """Whether two trios have the same large_ins and small_base, loaded alike."""
    from trimix_gguf.machine.sharing import shared_roles

    files, asked, _ = trio_files(trio_arguments(dict(one)))
    others, theirs, _ = trio_files(trio_arguments(dict(other)))
    paths, their_paths = ({r: f.path for r, f in some.items()} for some in (files, others))
    return bool(shared_roles(paths, asked, their_paths, theirs))


def _opener(trios: list[Given]) -> Callable[[], list[Any]]:
    def opened() -> list[Any]:
        found: list[Any] = []
        with ExitStack() as stack:
            for given, places in zip(trios, _places(trios), strict=True):
                beside = found[0] if found else None
                trio = open_trio(dict(given), beside=beside, places=places)
                found.append(stack.enter_context(trio))
            stack.pop_all()
        return found

    return opened


def _places(trios: list[Given]) -> list[dict[Role, Any]]:
    """Where layers go, by role, if several trios are on the same workers; else nothing.

    What a worker has free is known from before the first one. Raises MemoryNeededError.
    """
    from trimix_gguf.errors import MemoryNeededError
    from trimix_gguf.machine import memory, native, planner, rpc
    from trimix_gguf.roles import ROLES

    if len(trios) == 1 or not rpc.is_engine():
        return [{} for _ in trios]
    asked = [planner.Asked(*trio_files(trio_arguments(dict(given)))) for given in trios]
    devices, free_ram = native.devices(), memory.available()
    plans = planner.plan_together(asked, devices=devices, free_ram=free_ram)
    for found in plans:
        if not found.fits:
            raise MemoryNeededError(found.refusal())
    return [{role: found.load_options(role) for role in ROLES} for found in plans]


def _fitting(trios: list[Given]) -> Callable[[], bool]:
    def fits() -> bool:
        from trimix_gguf.machine import memory, native, planner

        asked = []
        for given in trios:
            files, options, lora = trio_files(trio_arguments(dict(given)))
            on_cpu: dict[Role, Any] = {
                role: {"n_gpu_layers": 0, **one} for role, one in options.items()
            }
            asked.append(planner.Asked(files, on_cpu, lora))
        devices, free_ram = native.devices(), memory.available()
        plans = planner.plan_together(asked, devices=devices, free_ram=free_ram)
        return all(found.fits for found in plans)

    return fits
