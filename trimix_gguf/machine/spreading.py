"""Which workers of other machines a model goes to: arithmetic, like placement.

Each worker has one model: two that take turns there would send their graphs for every token. A
model is on one worker where it fits, else on several, the last layers on the one with most room.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trimix_gguf.machine.gguf_file import GGUFFile
from trimix_gguf.machine.loading import REMOTE_CPU
from trimix_gguf.machine.memory import ModelMemory
from trimix_gguf.machine.rpc import is_remote
from trimix_gguf.roles import Role


@dataclass(frozen=True)
class Chosen:
    """Where `n` layers go: all on `device`, or `split` over several, whose names + joins."""

    device: str
    n: int
    split: tuple[int, ...] = ()
    keeps_output: bool = False
    is_cpu: bool = False  # a worker's


@dataclass(frozen=True)
class Way:
    """How workers are used; the first way by which a trio fits is taken."""

    keeps_output: bool  # of a model on a worker's CPU, which is no faster than this one
    shares: bool  # a worker may have several models


WAYS = (Way(True, False), Way(False, False), Way(True, True), Way(False, True))


def seen_from(model: ModelMemory, chosen: Chosen) -> ModelMemory:
    """A model's needs where it goes: a worker's CPU computes as this one does."""
    if not chosen.is_cpu:
        return model
    compute = model.compute_cpu
    return replace(model, keeps_output=chosen.keeps_output, compute=compute)


def on_workers(
    group: Sequence[ModelMemory], room: Mapping[str, int], kinds: Mapping[str, str], way: Way
) -> Chosen | None:
    """The workers for models that share weights, of those with `room`; None where none helps."""
    names = sorted(room, key=lambda name: -room[name])
    n_layers, found = group[0].n_layers, []
    end = n_layers
    for name in names:
        is_cpu = kinds[name] == REMOTE_CPU
        like = Chosen(name, 0, keeps_output=way.keeps_output, is_cpu=is_cpu)
        models = [seen_from(model, like) for model in group]
        fits = (f for f in range(end) if _need(models, f, end) <= room[name])
        first = next(fits, end)
        if first < end:
            found.append((name, end - first))
        end = first
        if end == 0:
            break
    if not found:
        return None
    found.reverse()
    used, split = [name for name, _ in found], tuple(n for _, n in found)
    is_cpu = all(kinds[name] == REMOTE_CPU for name in used)
    keeps = way.keeps_output and is_cpu
    return Chosen("+".join(used), sum(split), split if len(used) > 1 else (), keeps, is_cpu)


def layers_by_device(chosen: Chosen) -> dict[str, int]:
    """Device -> how many layers it has, the first ones first; empty where all are here."""
    if not chosen.n:
        return {}
    return dict(zip(chosen.device.split("+"), chosen.split or (chosen.n,), strict=True))


def _need(models: Sequence[ModelMemory], first: int, end: int) -> int:
    return sum(model.part(first, end).total for model in models)


def together(devices: Mapping[Role, str]) -> list[list[Role]]:
    """Roles by their devices: those in one list have some device in common, and take turns."""
    groups: list[tuple[set[str], list[Role]]] = []
    for role, device in devices.items():
        names, roles = set(device.split("+")), list[Role]()
        for group in [group for group in groups if group[0] & names]:
            names |= group[0]
            roles += group[1]
            groups.remove(group)
        groups.append((names, [*roles, role]))
    return [roles for _, roles in groups]


# What llama.cpp sends for a token beside activations and rows, as counted with the nano trio.
_FRAMES = 3000  # bytes per worker: seven inputs, each with the description of its tensor
_GRAPH = 13_000  # per layer, where the worker's last graph was another model's


def wire_bytes(file: GGUFFile, chosen: Chosen, n_ctx: int, *, is_shared: bool) -> int:
    """About how many bytes one token sends over the network, both ways, in a full context."""
    if not is_remote(chosen.device):
        return 0
    n_parts = len(chosen.split) or 1
    row = file.n_embd if chosen.keeps_output else file.n_items("tokenizer.ggml.tokens")
    values = file.n_embd * (2 * n_parts - 1) + row + n_ctx * n_parts  # n_ctx: the mask
    return 4 * values + _FRAMES * n_parts + (_GRAPH * chosen.n if is_shared else 0)
