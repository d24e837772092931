"""Sequences: each goes on as if it were alone, and the trio is left as it was."""

import threading

import numpy as np
import pytest

from trimix_gguf.errors import ContextFullError, ModelError
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio

KAZAKH = "Қазақстан Республикасының Үкіметі"
TAILS = [[5, 6, 7], [5, 9], [100, 200, 300, 400], [5, 6, 8]]


@pytest.fixture(scope="module")
def trio():
    # Flash attention, of few tokens, computes each by itself: the same alone and beside others.
    with Trio.nano(n_window=8, n_batch=16, flash_attn=True) as loaded:
        yield loaded


def alone(trio, ids):
    """The rows after the prompt and `ids`, one token at a time."""
    trio.prefill(trio.prompt(KAZAKH))
    for token in ids:
        trio.advance(token)
        trio.rows()
    return {role: row.copy() for role, row in trio.rows().items()}


def close(rows, i, expected):
    return all(np.allclose(rows[role][i], expected[role], atol=1e-4) for role in rows)


def test_a_fork_equals_the_same_tokens_read_alone(trio):
    expected = [alone(trio, tail) for tail in TAILS]
    trio.prefill(trio.prompt(KAZAKH))
    with trio.forks() as sequences:
        numbers = [sequences.fork() for _ in TAILS]
        for number, tail in zip(numbers, TAILS, strict=True):
            sequences.append(number, tail)
        rows = sequences.rows(numbers)
        assert all(close(rows, i, want) for i, want in enumerate(expected))


def test_a_fork_of_a_fork_goes_its_own_way(trio):
    expected = {end: alone(trio, [*TAILS[0], end]) for end in (77, 78)}
    trio.prefill(trio.prompt(KAZAKH))
    with trio.forks() as sequences:
        first = sequences.fork()
        sequences.append(first, TAILS[0])
        sequences.rows([first])
        second = sequences.fork(first)
        sequences.append(first, [77])
        sequences.append(second, [78])
        rows = sequences.rows([second, first])
        assert close(rows, 0, expected[78])
        assert close(rows, 1, expected[77])


def test_a_role_asked_later_reads_what_it_owes(trio):
    expected = alone(trio, TAILS[2])
    trio.prefill(trio.prompt(KAZAKH))
    with trio.forks() as sequences:
        number = sequences.fork()
        for token in TAILS[2]:
            sequences.append(number, [token])
            sequences.rows([number], ["small_cpt"])
        assert close(sequences.rows([number], ["large_ins"]), 0, expected)


def test_more_rows_and_ids_than_a_batch_holds(trio):
    tails = [[40 + i + j for j in range(5)] for i in range(7)]  # 35 ids, 16 a batch
    expected = [alone(trio, tail) for tail in tails]
    trio.prefill(trio.prompt(KAZAKH))
    with trio.forks() as sequences:
        numbers = [sequences.fork() for _ in tails]
        for number, tail in zip(numbers, tails, strict=True):
            sequences.append(number, tail)
        rows = sequences.rows(numbers)
        assert all(close(rows, i, want) for i, want in enumerate(expected))


def test_the_trio_is_left_as_it_was(trio):
    before = alone(trio, [])
    held = trio.ids
    with trio.forks() as sequences:
        number = sequences.fork()
        sequences.append(number, TAILS[0])
        sequences.rows([number])
    assert trio.ids == held
    assert close({r: row[None] for r, row in trio.rows().items()}, 0, before)


def test_forks_of_an_empty_trio_are_prompts_of_their_own(trio):
    expected = alone(trio, [])
    ids = trio.ids["large_ins"]
    trio.forget()
    with trio.forks() as sequences:
        short, whole = sequences.fork(), sequences.fork()
        sequences.append(short, ids[:2])
        sequences.append(whole, ids)
        assert close(sequences.rows([short, whole]), 1, expected)


def test_numbers_run_out_and_come_back(trio):
    trio.prefill(trio.prompt(KAZAKH))
    with trio.forks() as sequences:
        numbers = [sequences.fork() for _ in range(sequences.most)]
        with pytest.raises(ModelError, match="at once are the most"):
            sequences.fork()
        sequences.drop(numbers[0])
        assert sequences.fork() == numbers[0]


def test_a_fork_that_owes_nothing_has_the_row_of_its_source(trio):
    expected = alone(trio, [])
    trio.prefill(trio.prompt(KAZAKH))
    with trio.forks() as sequences:
        assert close(sequences.rows([sequences.fork()]), 0, expected)


def test_cells_that_sequences_share_count_once_and_come_back(trio):
    trio.prefill(trio.prompt(KAZAKH))
    n = len(trio.ids["large_ins"])
    with trio.forks() as sequences:
        first = sequences.fork()
        sequences.append(first, TAILS[0])
        sequences.rows([first])
        second = sequences.fork(first)
        sequences.append(second, [9])
        sequences.rows([second])
        assert sequences.n_cells("large_ins") == n + len(TAILS[0]) + 1
        sequences.drop(first)
        assert sequences.n_cells("large_ins") == n + len(TAILS[0]) + 1
        sequences.drop(second)
        assert sequences.n_cells("large_ins") == n
    trio.forget()
    assert trio.sequences.n_cells("large_ins") == 0


def test_a_full_context_is_said_and_the_trio_goes_on():
    with Trio.nano(n_ctx=256, n_window=8, n_batch=64) as trio:
        trio.prefill(Prompt((Segment.of(list(range(10, 110)), scored=False),)))
        row = trio.rows(("large_ins",))["large_ins"].copy()
        with trio.forks(("large_ins",)) as sequences:
            numbers = [sequences.fork() for _ in range(4)]
            for number in numbers:
                sequences.append(number, list(range(300, 360)))
            with pytest.raises(ContextFullError):
                sequences.rows(numbers)
        assert np.allclose(trio.rows(("large_ins",))["large_ins"], row, atol=1e-4)


def test_roles_that_are_not_asked_for_decode_nothing(trio, monkeypatch):
    trio.prefill(trio.prompt(KAZAKH))
    for role in ROLES[1:]:
        monkeypatch.setattr(trio.models[role], "_decode", None)
    with trio.forks(("large_ins",)) as sequences:
        number = sequences.fork()
        sequences.append(number, [5])
        assert set(sequences.rows([number], ("large_ins",))) == {"large_ins"}


def test_models_on_the_cpu_are_decoded_by_one_thread(trio, monkeypatch):
    """Beside a GPU, threads of a pool and the caller took turns, each with a team of OpenMP's."""
    threads = {role: set() for role in ROLES}
    for role, model in trio.models.items():
        monkeypatch.setattr(model, "device", "GPU0" if role == ROLES[0] else "CPU")
        decode = model.decode_entries

        def noted(entries, role=role, decode=decode):
            threads[role].add(threading.get_ident())
            return decode(entries)

        monkeypatch.setattr(model, "decode_entries", noted)
    trio.prefill(trio.prompt(KAZAKH))
    for token in range(20):
        trio.advance(100 + token)
        trio.rows(ROLES[1:2] if token % 3 else ROLES)
    assert threads[ROLES[1]] | threads[ROLES[2]] == {threading.get_ident()}
    assert threads[ROLES[0]] - {threading.get_ident()}  # the other device at the same time
