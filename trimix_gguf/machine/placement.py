"""Where a trio's layers go: which model's, how many, on which device.

Arithmetic over what files declare and devices report; nothing is loaded.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimix_gguf.errors import ModelError
from trimix_gguf.machine import memory
from trimix_gguf.machine.gguf_file import GGUFFile
from trimix_gguf.machine.loading import AUTO, Loading, LoadingOptions
from trimix_gguf.machine.memory import ModelMemory, Need
from trimix_gguf.machine.native import Device
from trimix_gguf.roles import LOADING_ORDER, ROLES, Role

CPU, RAM = "CPU", "RAM"
_CARDS = ("GPU", "integrated GPU")  # kinds of device that layers can go to
# Left free on a device beside what is counted: the driver's context and kernels (some 300 MiB
# on CUDA), the weights of a layer on their way from RAM, and what a screen takes.
MARGIN = 512 << 20

Files = Mapping[Role, GGUFFile]


@dataclass(frozen=True)
class Case:
    """A trio, and the machine that it is to be arranged on."""

    files: Files
    loadings: Mapping[Role, Loading]  # of every role
    lora: GGUFFile | None
    devices: Sequence[Device]
    free_ram: int
    present: frozenset[Path] = frozenset()  # files whose weights another trio has loaded

    def using(self, **changed: Any) -> "Case":
        """The same with some of Loading's fields changed, for every role."""
        changed_loadings = {r: replace(one, **changed) for r, one in self.loadings.items()}
        return replace(self, loadings=changed_loadings)


@dataclass(frozen=True)
class Placement:
    """One role's model: `n_layers` of `most` on `device`, the output layer and then the last."""

    device: str  # CPU where no layer is offloaded
    n_layers: int
    most: int
    on_device: Need
    in_ram: Need
    shares: str | None  # the role whose weights it reads


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
        return {"n_gpu_layers": placement.n_layers, "device": placement.device}

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
    memories = memory.by_role(case.files, case.loadings, case.lora, case.present)
    program = memory.program(case.files[ROLES[0]], case.present)
    groups: dict[Any, list[Role]] = {}
    for role in ROLES:
        groups.setdefault(case.files[role].path, []).append(role)
    wishes = {tuple(roles): (_fixed(roles, case), _named(roles, case)) for roles in groups.values()}
    spare = case.free_ram - program - _sum(needed.in_ram(0) for needed in memories.values()).total
    chosen = _choose(memories, case.devices, wishes, spare)
    models = {}
    for roles in groups.values():
        for role in roles:
            name, n = chosen[tuple(roles)]
            needed, shares = memories[role], None if role == roles[0] else roles[0]
            on_device, in_ram = needed.on_device(n), needed.in_ram(n)
            models[role] = Placement(name, n, needed.n_layers, on_device, in_ram, shares)
    ram = _sum(placement.in_ram for placement in models.values()) + Need(buffers=program)
    rooms = {RAM: Room(case.free_ram, case.free_ram, ram)}
    used = {placement.device for placement in models.values()}
    usual = _usual(case.devices)
    for card in case.devices:
        if card.name in usual or (card.name in used and card.kind in _CARDS):
            need = _sum(m.on_device for m in models.values() if m.device == card.name)
            usable = max(card.free - MARGIN, 0)
            rooms[card.name] = Room(card.free, usable, need, _is_ram(card))
    return LayerPlan({role: models[role] for role in ROLES}, rooms, program)


def _choose(
    memories: Mapping[Role, ModelMemory],
    devices: Sequence[Device],
    wishes: Mapping[tuple[Role, ...], tuple[int | None, str | None]],
    spare: int,
) -> dict[tuple[Role, ...], tuple[str, int]]:
    """Device and layers for each group of roles that share weights.

    `wishes` are the layers and the device that the user fixed, or None. `spare` bytes of RAM are
    left for what offloading adds where a device's memory is RAM.
    """
    cards = {device.name: device for device in devices if device.kind in _CARDS}
    room = {name: card.free - MARGIN for name, card in cards.items()}
    usual = _usual(devices)
    full: set[str] = set()
    chosen = {}
    # First what the user fixed: it takes its room in any case.
    for roles, (fixed, named) in sorted(wishes.items(), key=lambda wish: wish[1][0] is None):
        group = [memories[role] for role in roles]
        most = group[0].n_layers
        free = [name for name in usual if fixed is not None or name not in full]
        name = named or max(free, key=lambda name: room[name], default=CPU)
        if name not in cards or (fixed is None and name in full):
            n = 0
        elif fixed is not None:
            n = most if fixed < 0 else min(fixed, most)
        else:
            left = spare if _is_ram(cards[name]) else None
            n = next((n for n in range(most, 0, -1) if _holds(group, n, room[name], left)), 0)
            full |= {name} if n < most else set()
        if n:
            room[name] -= _there(group, n)
            spare -= _added(group, n) if _is_ram(cards[name]) else 0
        chosen[roles] = (name if n else CPU, n)
    return chosen


def _usual(devices: Sequence[Device]) -> list[str]:
    """Graphics cards; those inside the processor only where there are no others, as in llama.cpp.

    A card that two backends offer, by its description, is the first one's.
    """
    cards = [d for d in devices if d.kind == _CARDS[0]]
    cards = cards or [d for d in devices if d.kind == _CARDS[1]]
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
