"""How likely each of some answers is after a prompt, under every mix of a grid, in one reading."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimix_gguf.machine.threads import available_cores
from trimix_gguf.mixing.fusion import Rows
from trimix_gguf.mixing.scoring import Float64, grid_token_nlls
from trimix_gguf.roles import ROLES
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
    sequences = trio.sequences
    first = {role: row[None] for role, row in rows.items()}
    total = np.stack([token_nlls(trio, first, np.array(c[:1]), axis)[0] for c in choices])
    numbers = [sequences.fork(sequence) for _ in choices]
    for depth in range(1, max(len(c) for c in choices)):
        going = [i for i, c in enumerate(choices) if len(c) > depth]
        for i in going:
            sequences.append(numbers[i], [choices[i][depth - 1]])
        next_rows = sequences.rows([numbers[i] for i in going])
        targets = np.array([choices[i][depth] for i in going])
        total[going] += token_nlls(trio, next_rows, targets, axis)
    for number in numbers:
        sequences.drop(number)
    return total


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
