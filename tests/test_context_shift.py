"""A full context: what is left moves up in the caches, as llama.cpp would have it, and is not read.

What is left still holds what it took from the exchanges that are gone, so the oracle is the same
operations by hand, not a fresh reading.
"""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import KAZAKH
from test_conversation import ask, decoded, exact_files, fresh, kept, talk  # noqa: F401

from trimix_gguf import Trio, Weights
from trimix_gguf.answering.prompt_cache import save_prompt
from trimix_gguf.errors import ModelError, ModelFileError
from trimix_gguf.machine.native import lib
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt, Segment, left_out
from trimix_gguf.trio.sums import Points, PrefixSums

MIX = Weights(0.3, 0.9)
SMALL = {"n_ctx": 256, "n_threads": 1}
SHOWN = re.compile(r"read (\d+)")


def own(large_ins, small):
    """What stands around a message: the roles' own ids."""
    return Segment.per_role({"large_ins": large_ins, "small_cpt": small, "small_base": small})


def prompt_of(*numbers):
    """A system message and turns; the roles' own parts have different lengths."""
    parts = [Segment.of([1, 2, 3])]
    for n in numbers:
        parts += [own([7, 8, 9], [7]), Segment.of(range(10 * n, 10 * n + 9)), own([5], [5, 6])]
        parts.append(Segment.of(range(300 + 10 * n, 310 + 10 * n), scored=False))
    return Prompt(tuple(parts))


OLD, NEW = prompt_of(2, 3, 4, 5), prompt_of(4, 5, 6)


def shifted(trio):
    """The trio after OLD, and NEW on a shift; NEW's last rows."""
    trio.forget()
    trio.prefill(OLD)
    trio.rows()
    assert trio.shift(OLD.units, NEW.units)
    trio.prefill(NEW)
    return trio.rows()


# -- what is left out -----------------------------------------------------------------------


def test_a_long_run_of_one_token_is_compared_in_linear_time():
    """It took time by the square of its length: 4 s for 8,000 tokens, amid all other answers."""
    run = [7] * 8_000
    old, new = Segment.of([1, 2, *run, 3]).units, Segment.of([1, *run, 3, 4]).units
    started = time.thread_time()
    assert left_out(old, new) == (1, 2)
    assert time.thread_time() - started < 0.5


def test_the_range_is_found_between_whole_parts():
    first, last = left_out(OLD.units, NEW.units)
    assert (first, last) == (3, 3 + 2 * 21)
    assert OLD.units[:first] + OLD.units[last:] == NEW.units[: len(OLD.units) - (last - first)]
    assert left_out(OLD.units, OLD.units) is None
    assert left_out(OLD.units, prompt_of(6).units) is None
    assert left_out(OLD.units, prompt_of(2, 3, 4, 5, 6).units) is None


def test_equal_first_tokens_of_two_questions_do_not_move_the_range():
    """A range that began inside a question would part its sums; the first unit stays anyway."""
    same = [Segment.of([40, 41, 42, *range(n, n + 9)]) for n in (100, 200)]
    begin, answer = own([7], [7]), Segment.of([1] * 9, scored=False)
    old = Prompt((begin, same[0], answer, begin, same[1], answer))
    new = Prompt((begin, same[1], answer, begin, same[0]))
    assert left_out(old.units, new.units) == (1, 1 + 12 + 9 + 1)


# -- the caches -----------------------------------------------------------------------------


def test_logits_are_those_of_the_same_operations_by_hand(kept, exact_files):  # noqa: F811
    ours = {role: row.copy() for role, row in shifted(kept).items()}
    first, last = left_out(OLD.units, NEW.units)
    for i, role in enumerate(ROLES):
        old, new = ([t for ids, _ in p.units for t in ids[i]] for p in (OLD, NEW))
        start, end = (sum(len(ids[i]) for ids, _ in OLD.units[:n]) for n in (first, last))
        model = Model(exact_files[role], kept.models[role].loading)
        model.decode(old)
        lib.llama_memory_seq_rm(model._memory, 0, start, end)
        lib.llama_memory_seq_add(model._memory, 0, end, -1, start - end)
        model.n_past = len(old) - (end - start)
        rows = model.decode(new[model.n_past :])
        np.testing.assert_array_equal(ours[role], rows[-1, : kept.n_vocab])
        model.close()
        memory = kept.models[role]._memory
        assert kept.models[role].n_past == len(new)
        assert lib.llama_memory_seq_pos_min(memory, 0) == 0
        assert lib.llama_memory_seq_pos_max(memory, 0) == len(new) - 1


def test_it_is_not_a_fresh_reading_and_says_so(kept, fresh, tmp_path):  # noqa: F811
    ours = {role: row.copy() for role, row in shifted(kept).items()}
    fresh.forget()
    fresh.prefill(NEW)
    theirs = fresh.rows()
    assert any(np.abs(ours[role] - theirs[role]).max() > 1e-3 for role in ROLES)
    assert not kept.sequences.is_exact(0)
    with pytest.raises(ModelError, match="shifted"):
        save_prompt(kept, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    kept.prefill(Prompt((OLD.segments[0], Segment.of([99]))))  # from what was not moved
    assert kept.sequences.is_exact(0)
    save_prompt(kept, tmp_path / "kept")


def test_what_is_owed_is_taken_out_too(kept, fresh):  # noqa: F811
    """A role that did not read the range, or what follows it, has nothing to move: it is exact."""
    kept.forget()
    kept.prefill(OLD)
    kept.rows(["large_ins"])
    kept.prefill(prompt_of(2))
    kept.rows(["small_base"])
    kept.prefill(OLD)
    kept.rows(["large_ins"])
    assert kept.shift(OLD.units, NEW.units)
    kept.prefill(NEW)
    rows = {role: row.copy() for role, row in kept.rows().items()}
    fresh.forget()
    fresh.prefill(NEW)
    for role in ("small_cpt", "small_base"):
        np.testing.assert_allclose(rows[role], fresh.rows()[role], atol=1e-4)
    assert {role: kept.models[role].n_past for role in ROLES} == {r: NEW.n_tokens(r) for r in ROLES}


@pytest.mark.parametrize("why", ["a model cannot", "a fork shares the cells", "nothing follows"])
def test_where_it_cannot_shift_all_stays(kept, fresh, monkeypatch, why):  # noqa: F811
    kept.forget()
    kept.prefill(prompt_of(2, 3) if why == "nothing follows" else OLD)
    kept.rows()
    ids = kept.ids
    if why == "a model cannot":
        monkeypatch.setattr(type(kept.models["small_base"]), "can_shift", False)
    with kept.forks() as sequences:
        if why == "a fork shares the cells":
            sequences.fork()
        assert not kept.shift(OLD.units, NEW.units)
    assert kept.ids == ids and kept.sequences.is_exact(0)
    kept.prefill(NEW)
    fresh.forget()
    fresh.prefill(NEW)
    for role, row in kept.rows().items():
        np.testing.assert_allclose(row, fresh.rows()[role], atol=1e-4)


def test_models_whose_positions_cannot_move_do_not_shift(kept, monkeypatch):  # noqa: F811
    model = kept.models["small_base"]
    assert model.can_shift
    monkeypatch.setattr(lib, "llama_model_rope_type", lambda _: -1)
    assert not model.can_shift
    with pytest.raises(ModelError, match="cannot shift"):
        model.shift(0, 1, 2)


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_a_model_that_cannot_take_back_what_it_read_is_refused(monkeypatch, nano_files, kind):
    monkeypatch.setattr(lib, f"llama_model_is_{kind}", lambda _: True)
    with pytest.raises(ModelFileError, match=r"large_ins.gguf: .*recurrent state.*taken back"):
        Trio.load(**nano_files)


# -- sums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_sums_follow_as_if_the_range_had_never_been_scored(rng, keep):
    points = Points((0.0, 1.0), (0.0, 0.5, 1.0), keep=keep)
    nll, slopes = rng.random((40, 2, 3)), rng.random((40, 2))
    units = [(((i,),) * 3, True) for i in range(40)]

    def add(sums, part, shift):
        ages = np.arange(len(part))[::-1]
        total = np.tensordot(keep**ages, nll[part], 1)
        mark = part[-1] - shift, part[-1] + 1 - shift
        sums.add(mark, total, len(part), slopes[part].sum(axis=0))

    whole, expected = PrefixSums(points, units), PrefixSums(points, [*units[:10], *units[24:]])
    for start, end in ((0, 10), (10, 17), (17, 24), (24, 31), (31, 40)):
        add(whole, range(start, end), 0)
        if start >= 24 or end <= 10:
            add(expected, range(start, end), 14 if start >= 24 else 0)
    found = whole.without(10, 24)
    assert found.units == expected.units and found.points == points
    assert [s.mark for s in found.sums] == [s.mark for s in expected.sums]
    for one, other in zip(found.sums, expected.sums, strict=True):
        assert one.n_tokens == other.n_tokens
        np.testing.assert_allclose(one.nll, other.nll)
        np.testing.assert_allclose(one.slopes, other.slopes)


# -- conversations --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"weights": MIX}, {"method": "ppl"}, {"method": "token"}, {}])
def test_after_a_cut_only_what_is_new_is_read(exact_files, options):  # noqa: F811
    with Trio.load(**exact_files, **SMALL) as trio:
        conversation, read = talk(trio, system="Сен көмекшісің.", **options), {}
        for role, model in trio.models.items():

            def counting(entries, role=role, decode=model.decode_entries):
                read[role] = read.get(role, 0) + len(entries)
                return decode(entries)

            model.decode_entries = counting
        n_cuts = 0
        for i in range(12):
            n_dropped = conversation.n_dropped
            read.clear()
            new = conversation.n_new(f"{i % 10} {KAZAKH}")
            # What a role that had no weight before has still to read.
            owed = {r: len(ids) - trio.sequences.n_read(0, r) for r, ids in trio.ids.items()}
            ask(conversation, f"{i % 10} {KAZAKH}")
            n_cuts += conversation.n_dropped > n_dropped
            # The question, 12 tokens of answer, and rows that are read again for their own sake.
            most = {role: new + 12 + 8 + owed[role] for role in ROLES}
            assert all(n <= most[role] for role, n in read.items() if i or role == "large_ins")
        assert n_cuts >= 2 and not trio.sequences.is_exact(0)


def test_without_it_what_is_left_is_read_again_and_exact():
    n_read = {}
    for shifts in (True, False):
        with Trio.nano(**SMALL) as trio:
            sizes, decode = [], trio.models["large_ins"].decode_entries

            def counting(entries, decode=decode, sizes=sizes):
                sizes.append(len(entries))
                return decode(entries)

            trio.models["large_ins"].decode_entries = counting
            conversation = talk(trio, weights=MIX, context_shift=shifts, notify=lambda _: None)
            for i in range(9):
                sizes.clear()
                ask(conversation, f"{i} {KAZAKH}")
                if conversation.n_dropped:
                    break
            n_read[shifts] = sum(sizes)
            assert trio.sequences.is_exact(0) is not shifts
    assert n_read[True] < 0.5 * n_read[False]


def test_a_file_that_was_saved_after_a_shift_is_read_as_it_stands(tmp_path):
    path, said = tmp_path / "chat.json", {}
    with Trio.nano(**SMALL) as trio:
        conversation = talk(trio, weights=MIX, notify=lambda _: None)
        for i in range(7):
            ask(conversation, f"{i} {KAZAKH}")
        assert not trio.sequences.is_exact(0)
        conversation.save(path)
        conversation.load(path)  # in the same trio, whose caches hold what was shifted
        assert trio.sequences.is_exact(0) and len(conversation.exchanges) == 7
        said["same"] = ask(conversation, "Астана")
        assert trio.sequences.is_exact(0)
    with Trio.nano(**SMALL) as trio:
        other = talk(trio, notify=lambda _: None)
        other.load(path)
        said["other"] = ask(other, "Астана")
    assert said["same"] == said["other"]


COUNTED = """
import sys
from trimix_gguf.answering.conversation import Conversation
from trimix_gguf.cli import trimix
from trimix_gguf.trio.model import Model
n_read, say, decode = [], Conversation.say, Model.decode_entries
def counted(self, text, **options):
    n_read.append(0)
    yield from say(self, text, **options)
def counting(self, entries):
    n_read[-1] += len(entries)
    return decode(self, entries)
Conversation.say, Model.decode_entries = counted, counting
trimix(sys.argv[1:], standalone_mode=False)
print("read", max(n_read), file=sys.stderr)
"""


def test_a_chat_at_the_command_line_goes_on_and_reads_far_less():
    # Wide enough that what is left counts for far more than drafts that were refused.
    options = {"-n": 8, "--seed": 5, "--threads": 1, "--n-ctx": 320, "--weights": "0.3,0.9"}
    given = [str(x) for pair in options.items() for x in pair]
    questions, n_read = "".join(f"Абай {i}\n" for i in range(24)), {}
    for flag in ("--context-shift", "--no-context-shift"):
        command = [sys.executable, "-c", COUNTED, "chat", *given, flag]
        done = subprocess.run(command, input=questions.encode(), capture_output=True, timeout=240)
        notes = done.stderr.decode()
        assert done.returncode == 0, notes
        assert len(done.stdout.decode().splitlines()) >= 24 and "320 tokens is full" in notes
        n_read[flag] = int(SHOWN.search(notes)[1])  # of the message that made it read most
    assert n_read["--context-shift"] < 0.5 * n_read["--no-context-shift"]
