"""A plan for a trio on a machine, and what to change where it fits nowhere."""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from trimix_gguf.errors import MemoryNeededError, ModelError
from trimix_gguf.machine import memory, native
from trimix_gguf.machine.gguf_file import GGUFFile
from trimix_gguf.machine.loading import AUTO, Loading, LoadingOptions
from trimix_gguf.machine.memory import CTX_STEP, adapter_of, as_quantized
from trimix_gguf.machine.native import Device
from trimix_gguf.machine.placement import RAM, Case, Change, Files, LayerPlan, arrange
from trimix_gguf.machine.quantization import FLOATS, QUANTIZED
from trimix_gguf.machine.rpc import is_remote
from trimix_gguf.machine.sharing import shared_roles
from trimix_gguf.roles import ROLES, Role


def plan(
    files: Files,
    *,
    devices: Sequence[Device],
    free_ram: int,
    options: Mapping[Role, LoadingOptions] | None = None,
    lora: GGUFFile | None = None,
    present: Collection[Path] = (),
) -> LayerPlan:
    """Decide how many layers of which model go to which device.

    `options` are Trio.load's by role: n_gpu_layers is a number, or "auto" (as where it is not
    given), and device keeps a role to one. large_ins chooses first, then small_cpt, then
    small_base: each goes to the device with the most room, whole where it can, and a device that
    holds a part of one takes no other. Weights of files that are `present`, for another trio, need
    nothing. If the trio does not fit, `advice` says what would help. Raises ModelError for a device
    that is not there.
    """
    loadings = {}
    for role in ROLES:
        asked: LoadingOptions = {"n_gpu_layers": AUTO, **(options or {}).get(role, {})}
        loadings[role] = Loading(**asked)
    case = Case(files, loadings, lora, frozenset(present), devices=devices, free_ram=free_ram)
    found = arrange(case)
    return found if found.fits else replace(found, advice=tuple(_advise(case, found)))


class Asked(NamedTuple):
    """What is asked of one trio: arguments of plan()."""

    files: Files
    options: Mapping[Role, LoadingOptions]
    lora: GGUFFile | None


def plan_together(
    trios: Sequence[Asked], *, devices: Sequence[Device], free_ram: int
) -> list[LayerPlan]:
    """A plan for each of several trios in one process, where the earlier ones have their room.

    Weights that a trio shares with an earlier one are the earlier one's, on its device.
    """
    plans: list[LayerPlan] = []
    left = list(devices)
    for i, asked in enumerate(trios):
        shared = _shared(asked, trios[:i])
        files, options = dict(asked.files), dict(asked.options)
        for role, at in shared.items():
            files[role] = trios[at].files[role]
            options[role] = {**options.get(role, {}), **plans[at].load_options(role)}
        if "small_cpt" not in shared and files["small_cpt"].path == asked.files["small_base"].path:
            files["small_cpt"] = files["small_base"]  # it is an adapter over shared weights
        found = plan(
            files,
            devices=left,
            free_ram=free_ram,
            options=options,
            lora=asked.lora,
            present={files[role].path for role in shared},
        )
        plans.append(found)
        free_ram = max(0, free_ram - found.ram_needed)
        rooms = found.rooms
        left = [
            replace(d, free=max(0, d.free - rooms[d.name].need.total)) if d.name in rooms else d
            for d in left
        ]
    return plans


def _shared(asked: Asked, earlier: Sequence[Asked]) -> dict[Role, int]:
    """Role -> which earlier trio has its weights."""
    paths = {role: file.path for role, file in asked.files.items()}
    found: dict[Role, int] = {}
    for at, other in enumerate(earlier):
        others = {role: file.path for role, file in other.files.items()}
        for role in shared_roles(paths, asked.options, others, other.options):
            found.setdefault(role, at)
    return found


def place(
    files: Files,
    options: Mapping[Role, LoadingOptions],
    lora: GGUFFile | None,
    present: Collection[Path] = (),
) -> dict[Role, LoadingOptions]:
    """`options` with every n_gpu_layers "auto" decided for this machine; others as they are.

    Raises MemoryNeededError where a trio that asks for it fits nowhere.
    """
    by_role = {role: options.get(role, {}) for role in ROLES}
    layers = {role: one.get("n_gpu_layers", 0) for role, one in by_role.items()}
    if wrong := [n for n in layers.values() if isinstance(n, str) and n != AUTO]:
        raise ModelError(f"n_gpu_layers is {wrong[0]!r}; expected a number or {AUTO!r}")
    open_files = {files[role].path for role, n in layers.items() if n == AUTO}
    if not open_files and not any(is_remote(one.get("device")) for one in by_role.values()):
        return by_role
    asked: dict[Role, LoadingOptions] = {
        role: {"n_gpu_layers": AUTO if files[role].path in open_files else 0, **one}
        for role, one in by_role.items()
    }
    devices, free_ram = native.devices(), memory.available()
    found = plan(
        files, devices=devices, free_ram=free_ram, options=asked, lora=lora, present=present
    )
    if not found.fits:
        raise MemoryNeededError(found.refusal())
    return {role: {**one, **found.load_options(role)} for role, one in by_role.items()}


# -- advice -----------------------------------------------------------------------------------


class _Made(NamedTuple):
    """A case with one thing changed, and how to say it."""

    case: Case
    what: str
    option: str
    command: str | None = None


def _advise(case: Case, now: LayerPlan) -> Iterator[Change]:
    """Changes, the least harmful first; then several together, where no single one is enough."""

    def change(made: _Made) -> Change:
        then = arrange(made.case)
        saves = max(_total(now) - _total(then), _missing(now) - _missing(then))
        return Change(made.what, made.option, saves, then.fits, made.command)

    makers = (
        _open_layers,
        _flash_attention,
        _narrow_kv,
        _smaller_context,
        _smaller_model,
        _as_adapter,
    )
    alone = [made for make in makers if (made := make(case)) is not None]
    changes = [change(made) for made in alone]
    yield from changes
    if any(one.suffices for one in changes):
        return
    options, commands, at = [], [], case
    # Narrow caches have flash attention already.
    for make in (_open_layers, _narrow_kv, _flash_attention, _smaller_model, _smaller_context):
        if (made := make(at)) is not None:
            at = made.case
            options.append(made.option)
            commands += [made.command] if made.command else []
            if arrange(at).fits:
                first = commands[0] if commands else None
                yield change(_Made(at, "these together", " ".join(options), first))
                return


def _total(found: LayerPlan) -> int:
    return sum(room.need.total for room in found.rooms.values())


def _missing(found: LayerPlan) -> int:
    """Bytes over what there is, of RAM and of devices."""
    over = [r.need.total - r.usable for name, r in found.rooms.items() if name != RAM]
    return sum(max(n, 0) for n in (*over, found.ram_needed - found.rooms[RAM].free))


def _open_layers(case: Case) -> _Made | None:
    """Layers that the user fixed, left to the planner."""
    if all(one.n_gpu_layers in (AUTO, 0) for one in case.loadings.values()):
        return None
    opened = case.using(n_gpu_layers=AUTO)
    return _Made(opened, "layers where there is room for them", "--gpu-layers auto")


def _flash_attention(case: Case) -> _Made | None:
    """Flash attention; None where it saves nothing, or it was decided."""
    if any(one.flash_attn is not None for one in case.loadings.values()):
        return None
    changed = case.using(flash_attn=True)
    if _total(arrange(changed)) >= _total(arrange(case)):
        return None
    return _Made(changed, "flash attention, which is slower on the CPU", "--flash-attn")


def _narrow_kv(case: Case) -> _Made | None:
    """KV caches in q8_0; None where they are, or cannot be, that narrow."""
    loadings = case.loadings.values()
    kinds = {kind for one in loadings for kind in (one.type_k, one.type_v)}
    if not kinds & set(FLOATS) or any(one.flash_attn is False for one in loadings):
        return None
    try:
        for file in case.files.values():
            file.kv_bytes(CTX_STEP, "q8_0", "q8_0")
    except ValueError:  # heads that are not whole blocks
        return None
    narrow = case.using(type_k="q8_0", type_v="q8_0")
    return _Made(narrow, "KV caches in q8_0", "--kv-type q8_0")


def _smaller_context(case: Case) -> _Made | None:
    """The largest context that fits, in whole steps; the smallest where none does."""
    n_ctx = max(one.n_ctx for one in case.loadings.values())
    fits, too_large = 1, -(-n_ctx // CTX_STEP)
    if too_large == 1:
        return None
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if arrange(case.using(n_ctx=middle * CTX_STEP)).fits:
            fits = middle
        else:
            too_large = middle
    n_ctx = fits * CTX_STEP
    return _Made(case.using(n_ctx=n_ctx), f"a context of {n_ctx} tokens", f"--n-ctx {n_ctx}")


def _smaller_model(case: Case) -> _Made | None:
    """The largest file in the best type that fits, else in the smallest; None if it is so."""
    role = max(ROLES, key=lambda role: case.files[role].weight_bytes)
    file, made = case.files[role], None
    for name in QUANTIZED:
        smaller = as_quantized(file, name)
        if smaller.weight_bytes > 0.95 * file.weight_bytes:  # sizes are estimates
            continue
        files = {r: smaller if f.path == file.path else f for r, f in case.files.items()}
        source, out = (shlex.quote(str(f.path)) for f in (file, smaller))
        command = f"trimix convert quantize {source} {out} --type {name}"
        if any(tensor.type.lower() not in FLOATS for tensor in file.tensors):
            command += " --requantize"
        changed = replace(case, files=files)
        made = _Made(changed, f"{role} in {name}", _file_options(changed), command)
        if arrange(changed).fits:
            break
    return made


def _as_adapter(case: Case) -> _Made | None:
    """small_cpt as an adapter over small_base; None where it is one, or of another shape."""
    base, cpt = case.files["small_base"], case.files["small_cpt"]
    shapes = [{t.name: t.shape for t in file.tensors} for file in (base, cpt)]
    if case.lora is not None or base.path == cpt.path or shapes[0] != shapes[1]:
        return None
    adapter = replace(adapter_of(base), path=Path("ADAPTER.gguf"))
    changed = replace(case, files={**case.files, "small_cpt": base}, lora=adapter)
    what = "small_cpt as an adapter over small_base, if it was trained as one"
    return _Made(changed, what, _file_options(changed))


def _file_options(case: Case) -> str:
    """All the files of a trio, as options."""
    paths = {"large-ins": case.files["large_ins"].path, "small-base": case.files["small_base"].path}
    if case.lora is not None:
        paths["small-cpt-lora"] = case.lora.path
    else:
        paths["small-cpt"] = case.files["small_cpt"].path
    return " ".join(f"--{option} {shlex.quote(str(path))}" for option, path in paths.items())
