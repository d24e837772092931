"""Where a trio's layers go: which model's, how many, on which device.

Arithmetic over what files declare and devices report; nothing is loaded.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimix_gguf.errors import ModelError
from trimix_gguf.machine import memory
from trimix_gguf.machine.gguf_file import GGUFFile
from trimix_gguf.machine.loading import AUTO, REMOTE_CPU, REMOTE_GPU, LoadingOptions
from trimix_gguf.machine.memory import ModelMemory, Need
from trimix_gguf.machine.native import Device
from trimix_gguf.machine.spreading import (
    WAYS,
    Chosen,
    Way,
    layers_by_device,
    on_workers,
    seen_from,
    wire_bytes,
)
from trimix_gguf.roles import LOADING_ORDER, ROLES, Role

CPU, RAM = "CPU", "RAM"
_WORKERS = (REMOTE_GPU, REMOTE_CPU)
_CARDS = ("GPU", "integrated GPU", *_WORKERS)  # kinds of device that layers can go to
# Left free on a device beside what is counted: the driver's context and kernels (some 300 MiB
# on CUDA), the weights of a layer on their way from RAM, and what a screen takes.
MARGIN = 512 << 20

Files = Mapping[Role, GGUFFile]


@dataclass(frozen=True, kw_only=True)
class Case(memory.Models):
    """A trio, with a Loading for every role, and the machine that it is to be arranged on."""

    devices: Sequence[Device]
    free_ram: int

    def using(self, **changed: Any) -> "Case":
        """The same with some of Loading's fields changed, for every role."""
        changed_loadings = {r: replace(one, **changed) for r, one in self.loadings.items()}
        return replace(self, loadings=changed_loadings)


@dataclass(frozen=True)
class Placement:
    """One role's model: `n_layers` of `most` on devices, the output layer and then the last."""

    chosen: Chosen
    most: int
    by_device: Mapping[str, Need]
    in_ram: Need
    shares: str | None  # the role whose weights it reads
    flash_attn: bool | None  # decided; None where llama.cpp is to
    wire: int = 0  # bytes over the network for each token

    @property
    def device(self) -> str:
        """CPU where no layer is offloaded; several workers with + between them."""
        return self.chosen.device

    @property
    def n_layers(self) -> int:
        """Of `most`."""
        return self.chosen.n

    @property
    def on_device(self) -> Need:
        """On all its devices."""
        return _sum(self.by_device.values())


@dataclass(frozen=True)
class Room:
    """A device's memory, or RAM: bytes `free`, those of them that may be filled, and `need`."""

    free: int
    usable: int
    need: Need
    is_ram: bool = False  # a device whose memory is RAM


@dataclass(frozen=True)
class Change:
    """One thing to do where a trio does not fit; `command` makes the file that `option` names."""

    what: str
    option: str
    saves: int  # bytes
    suffices: bool
    command: str | None = None


@dataclass(frozen=True)
class LayerPlan:
    """Models by role, RAM and devices by name; `program` is the process's own part of RAM."""

    models: dict[Role, Placement]
    rooms: dict[str, Room]
    program: int
    advice: tuple[Change, ...] = ()

    @property
    def ram_needed(self) -> int:
        """Bytes of RAM, those included that devices without memory of their own take."""
        rooms = self.rooms.items()
        return sum(room.need.total for name, room in rooms if room.is_ram or name == RAM)

    @property
    def fits(self) -> bool:
        """Whether every device and the RAM have room for what goes there."""
        on_devices = all(room.need.total <= room.usable for room in self.rooms.values())
        return on_devices and self.ram_needed <= self.rooms[RAM].free

    def load_options(self, role: Role) -> LoadingOptions:
        """n_gpu_layers and device for Model. Without layers on it, a device is not opened."""
        placement = self.models[role]
        if len(self.rooms) == 1:
            return {"n_gpu_layers": 0}
        options: LoadingOptions = {"n_gpu_layers": placement.n_layers, "device": placement.device}
        if placement.wire:
            options["split"] = placement.chosen.split
            options["keep_output"] = placement.chosen.keeps_output
            options["flash_attn"] = placement.flash_attn
        return options

    def in_words(self) -> str:
        """'large_ins 29 of 29 layers on CUDA0, …', or 'all on CPU'."""
        if not any(placement.n_layers for placement in self.models.values()):
            return "all on CPU"
        return ", ".join(
            f"{role} {placement.n_layers} of {placement.most} layers on {placement.device}"
            if placement.n_layers
            else f"{role} on CPU"
            for role, placement in self.models.items()
        )

    def refusal(self) -> str:
        """One line that says what does not fit, and the least change that would do."""
        have = self.rooms[RAM].free
        over = f"{memory.in_gib(self.ram_needed)} of RAM and {memory.in_gib(have)} is free"
        if self.ram_needed <= have:
            full = ((n, r) for n, r in self.rooms.items() if r.need.total > r.usable)
            name, room = next(full)
            usable = memory.in_gib(room.usable)
            over = f"{memory.in_gib(room.need.total)} of {name}, which can give {usable}"
        enough = next((change for change in self.advice if change.suffices), None)
        mend = f"{enough.option} would do" if enough else "choose a smaller trio"
        return f"this trio needs {over}; {mend}"


def arrange(case: Case) -> LayerPlan:
    """The plan without advice: planner.plan says by which rules."""
    ways = WAYS if any(device.kind in _WORKERS for device in case.devices) else WAYS[:1]
    first = found = _arrange(case, ways[0])
    for way in ways[1:]:
        if found.fits:
            break
        found = _arrange(case, way)
    return found if found.fits else first


def _arrange(case: Case, way: Way) -> LayerPlan:
    memories = memory.by_role(case)
    program = memory.program(case)
    groups: dict[Any, list[Role]] = {}
    for role in ROLES:
        groups.setdefault(case.files[role].path, []).append(role)
    sharing = [tuple(roles) for roles in groups.values()]
    spread = {roles: found for roles in sharing if (found := _spread(roles, case)) is not None}
    wishes = {
        roles: (_fixed(roles, case), None if roles in spread else _named(roles, case))
        for roles in sharing
    }
    spare = case.free_ram - program - _sum(needed.in_ram(0) for needed in memories.values()).total
    chosen = _choose(memories, case.devices, wishes, spread, spare, way)
    models = {}
    for roles in sharing:
        for role in roles:
            shares = None if role == roles[0] else roles[0]
            models[role] = _placement(case, role, memories[role], chosen[roles], shares)
    models = _with_wire(case, models)
    ram = _sum(placement.in_ram for placement in models.values()) + Need(buffers=program)
    rooms = {RAM: Room(case.free_ram, case.free_ram, ram)}
    used = {name for placement in models.values() for name in placement.by_device}
    usual = _usual(case.devices)
    for card in case.devices:
        if card.name in usual or (card.name in used and card.kind in _CARDS):
            need = _sum(m.by_device.get(card.name, Need()) for m in models.values())
            usable = max(card.free - MARGIN, 0)
            rooms[card.name] = Room(card.free, usable, need, _is_ram(card))
    return LayerPlan({role: models[role] for role in ROLES}, rooms, program)


def _placement(
    case: Case, role: Role, model: ModelMemory, chosen: Chosen, shares: Role | None
) -> Placement:
    """What a choice means for one role."""
    needed, loading, n = seen_from(model, chosen), case.loadings[role], chosen.n
    by_device, at = {}, needed.n_layers - n
    for name, n_there in layers_by_device(chosen).items():
        by_device[name] = needed.part(at, at + n_there)
        at += n_there
    flash = loading.has_flash_attention(offloaded=False) if chosen.is_cpu else loading.flash_attn
    return Placement(
        most=needed.n_layers,
        in_ram=needed.in_ram(n),
        shares=shares,
        by_device=by_device,
        flash_attn=flash,
        chosen=chosen,
    )


def _with_wire(case: Case, models: Mapping[Role, Placement]) -> dict[Role, Placement]:
    """The same with what each token sends over the network."""
    used = Counter(name for placement in models.values() for name in placement.by_device)
    return {
        role: replace(
            placement,
            wire=wire_bytes(
                case.files[role],
                placement.chosen,
                case.loadings[role].n_ctx,
                is_shared=any(used[name] > 1 for name in placement.by_device),
            ),
        )
        for role, placement in models.items()
    }


def _choose(
    memories: Mapping[Role, ModelMemory],
    devices: Sequence[Device],
    wishes: Mapping[tuple[Role, ...], tuple[int | None, str | None]],
    spread: Mapping[tuple[Role, ...], Chosen],
    spare: int,
    way: Way,
) -> dict[tuple[Role, ...], Chosen]:
    """Where the layers of each group of roles go that share weights.

    `wishes` are the layers and the device that the user fixed, or None, `spread` where layers are
    on several workers already. `spare` bytes of RAM are left for what offloading adds where a
    device's memory is RAM.
    """
    cards = {device.name: device for device in devices if device.kind in _CARDS}
    room = {name: card.free - MARGIN for name, card in cards.items()}
    usual = _usual(devices)
    kinds = {name: card.kind for name, card in cards.items()}
    full: set[str] = set()
    chosen = {}
    # First what the user fixed: it takes its room in any case.
    for roles, (fixed, named) in sorted(wishes.items(), key=lambda wish: wish[1][0] is None):
        group = [memories[role] for role in roles]
        free = [name for name in usual if fixed is not None or name not in full]
        local = [name for name in free if kinds[name] not in _WORKERS]
        candidates = local if fixed is None else free
        name = named or max(candidates, key=lambda name: room[name], default=CPU)
        if name not in cards or (fixed is None and name in full):
            name, n = CPU, 0
        else:
            left = spare if _is_ram(cards[name]) else None
            n = _n_layers(group, fixed, room[name], left)
        is_cpu = kinds.get(name) == REMOTE_CPU
        keeps = way.keeps_output and is_cpu
        found = Chosen(name if n else CPU, n, keeps_output=keeps, is_cpu=is_cpu and n > 0)
        found = spread.get(roles, found)
        if fixed is None and n < group[0].n_layers:
            on = [] if named else free
            workers = {name: room[name] for name in on if kinds[name] in _WORKERS}
            split = on_workers(group, workers, kinds, way)
            found = split if split is not None and split.n >= n else found
            full |= {name} if found is not split else set()
        chosen[roles] = found
        models = [seen_from(model, found) for model in group]
        at = group[0].n_layers - found.n
        for used, n_there in layers_by_device(found).items():
            room[used] -= _sum(model.part(at, at + n_there) for model in models).total
            at += n_there
            full |= {used} if kinds[used] in _WORKERS and not way.shares else set()
            spare -= _added(group, found.n) if _is_ram(cards[used]) else 0
    return chosen


def _n_layers(group: Sequence[ModelMemory], fixed: int | None, room: int, left: int | None) -> int:
    """How many layers go to a device: those that the user fixed, or as many as it holds."""
    most = group[0].n_layers
    if fixed is not None:
        return most if fixed < 0 else min(fixed, most)
    return next((n for n in range(most, 0, -1) if _holds(group, n, room, left)), 0)


def _usual(devices: Sequence[Device]) -> list[str]:
    """Graphics cards, and what workers lend.

    Cards inside the processor only where there are no others, as in llama.cpp. A card that
    two backends offer, by its description, is the first one's.
    """
    cards = [d for d in devices if d.kind == _CARDS[0]]
    cards = cards or [d for d in devices if d.kind == _CARDS[1]]
    cards += [d for d in devices if d.kind in _WORKERS]
    backends: dict[str, str] = {}
    return [
        card.name
        for card in cards
        if backends.setdefault(card.description, _backend(card)) == _backend(card)
    ]


def _backend(device: Device) -> str:
    return re.sub(r"[\d\W].*", "", device.name)


def _is_ram(device: Device) -> bool:
    """Whether a device's memory is RAM: Apple's, and graphics inside a processor."""
    return device.kind == _CARDS[1] or device.name.startswith(("Metal", "MTL"))


def _fixed(roles: Sequence[Role], case: Case) -> int | None:
    """Layers that the user fixed for weights that `roles` share; None where he left it open."""
    for role in sorted(roles, key=LOADING_ORDER.index):
        if (layers := case.loadings[role].n_gpu_layers) != AUTO:
            return int(layers)
    return None


def _spread(roles: Sequence[Role], case: Case) -> Chosen | None:
    """Where layers are that another trio has put on several workers; None where there are none."""
    kinds = {device.name: device.kind for device in case.devices}
    for role in sorted(roles, key=LOADING_ORDER.index):
        one = case.loadings[role]
        if one.split:
            name = str(one.device)
            is_cpu = all(kinds.get(part) == REMOTE_CPU for part in name.split("+"))
            return Chosen(name, sum(one.split), one.split, one.keep_output, is_cpu)
    return None


def _named(roles: Sequence[Role], case: Case) -> str | None:
    """The device that the user named for weights that `roles` share."""
    names = [device.name for device in case.devices]
    for role in sorted(roles, key=LOADING_ORDER.index):
        if (wanted := case.loadings[role].device) is not None:
            for name in (*names, CPU):
                if name.lower() == wanted.lower():
                    return name
            raise ModelError(f"device {wanted!r} is not here; there is {', '.join(names)}")
    return None


def _holds(group: Sequence[ModelMemory], n: int, room: int, spare: int | None) -> bool:
    return _there(group, n) <= room and (spare is None or _added(group, n) <= spare)


def _there(group: Sequence[ModelMemory], n: int) -> int:
    """Bytes that `n` layers take on a device."""
    return _sum(model.on_device(n) for model in group).total


def _added(group: Sequence[ModelMemory], n: int) -> int:
    """Of these, the bytes that RAM is not relieved of."""
    relieved = sum(model.in_ram(0).total - model.in_ram(n).total for model in group)
    return _there(group, n) - relieved


def _sum(needs: Iterable[Need]) -> Need:
    return sum(needs, Need())
