"""How likely each of some answers is after a prompt, under every mix of a grid, in one reading."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.mixing.scoring import Float64, grid_token_nlls
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.trio import Trio


def choice_nll(trio: Trio, choices: Sequence[Sequence[int]], axis: Sequence[float]) -> Float64:
    """Nats of each choice (ids) after what the trio holds: float64 [n_choices, n, n] over axis².

    The trio then holds the same as before.
    """
    with trio.forks() as sequences:
        rows = {role: row.copy() for role, row in trio.rows().items()}
        prompt = sequences.fork()
        trio.forget_rows()  # forks write where they are
        return choices_after(trio, prompt, rows, choices, axis)


def choices_after(
    trio: Trio,
    sequence: int,
    rows: Rows,
    choices: Sequence[Sequence[int]],
    axis: Sequence[float],
) -> Float64:
    """The same after a sequence, whose next-token rows [n_vocab] are `rows`."""
    first = {role: row[None] for role, row in rows.items()}
    total = np.stack([token_nlls(trio, first, np.array(c[:1]), axis)[0] for c in choices])
    for group in _groups([len(c) - 1 for c in choices], trio.n_window):
        total[group] += _later_nlls(trio, sequence, [choices[i] for i in group], axis)
    return total


def _groups(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indexes of those that are not empty, in runs of `most` tokens together, or one by itself."""
    group: list[int] = []
    for i, size in enumerate(sizes):
        if group and sum(sizes[j] for j in group) + size > most:
            yield group
            group = []
        if size:
            group.append(i)
    if group:
        yield group


def _later_nlls(
    trio: Trio, sequence: int, choices: Sequence[Sequence[int]], axis: Sequence[float]
) -> Float64:
    """Nats of all but the first token of each choice, read side by side in one batch per model."""
    sequences = trio.sequences
    numbers = [sequences.fork(sequence) for _ in choices]
    for number, ids in zip(numbers, choices, strict=True):
        sequences.append(number, ids[:-1])
    wanted: dict[Role, dict[int, Sequence[int]]] = {role: {} for role in ROLES}
    for role in ROLES:
        for number, ids in zip(numbers, choices, strict=True):
            n = len(sequences.ids(number)[role])
            wanted[role][number] = range(n - len(ids) + 1, n)
    rows = sequences.read(wanted)
    targets = np.array([token for ids in choices for token in ids[1:]])
    nlls = token_nlls(trio, rows, targets, axis)
    for number in numbers:
        sequences.drop(number)
    ends = np.cumsum([len(ids) - 1 for ids in choices])
    return np.stack([part.sum(axis=0) for part in np.split(nlls, ends[:-1])])


def token_nlls(
    trio: Trio, rows: Rows, targets: NDArray[np.int64], axis: Sequence[float]
) -> Float64:
    """Nats of `targets` [n] after `rows` [n, n_vocab]: float64 [n, n_axis, n_axis]."""
    return grid_token_nlls(
        **{role: rows[role] for role in ROLES},
        targets=targets,
        alphas=axis,
        betas=axis,
        unused=trio.unused,
        n_threads=available_cores(),
    )
