"""What decoding cost is kept between runs: a plan from it is the plan that measured it."""

import json
import time
from collections import deque
from pathlib import Path

import pytest
from conftest import KAZAKH

from trimix_gguf import Trio, Weights, generate
from trimix_gguf.answering import costs
from trimix_gguf.answering.costs import kept_costs, load_costs, save_costs
from trimix_gguf.answering.drafting import Drafting, DraftPlan
from trimix_gguf.machine import notes

# A large model that verifies a batch for little more than one token: drafting pays.
SECONDS = {
    "large_ins": {1: 1.0, 2: 1.02, 4: 1.1, 8: 1.3, 32: 2.0},
    "small_cpt": {1: 0.1, 32: 0.9},
    "small_base": {1: 0.1, 32: 0.8},
}
ANSWER = {"weights": Weights(0.05, 0.95), "max_tokens": 12, "temperature": 0}


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Each test's own costs.json, in a folder that is not there yet."""
    monkeypatch.setenv("TRIMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs.json"


@pytest.fixture
def run():
    """Opens a trio as a new run would, with what it is said to have measured already."""
    opened = []

    def start(measured=None, *, times=1, pace=1.0, **options):
        trio = Trio.nano(**{"n_threads": 1, **options})
        opened.append(trio)
        for role, seconds in (measured or {}).items():
            for n, s in seconds.items():
                trio.models[role].decode_seconds[n] = deque([s * pace] * times, maxlen=5)
        return trio

    yield start
    for trio in opened:
        trio.close()


def plan(trio):
    return Drafting().plan(trio, ("large_ins",), 15)


def sizes(trio):
    return {role: sorted(model.decode_seconds) for role, model in trio.models.items()}


def test_a_plan_from_loaded_costs_is_that_from_measured_ones(run):
    first = run(SECONDS)
    save_costs(first)
    second = run()
    assert plan(second) == DraftPlan(0)  # nothing known: a round of lockstep would come first
    load_costs(second)
    assert plan(second) == plan(first) and plan(second).n_draft > 0


def test_the_first_token_of_the_next_run_can_be_drafted(run, monkeypatch):
    """Its mix is all but small_cpt alone, which accepts each draft."""
    clock = time.perf_counter  # of a machine as slow as SECONDS says
    monkeypatch.setattr(time, "perf_counter", lambda: 10_000 * clock())
    options = {**ANSWER, "weights": Weights(1e-7, 1 - 1e-7)}
    first = generate(run(), KAZAKH, **options).tokens[0]
    assert not first.from_draft  # lockstep, to measure what one token costs
    save_costs(run(SECONDS))
    assert generate(run(), KAZAKH, **options).tokens[0].from_draft


def test_two_new_times_outvote_the_stored_one(run):
    save_costs(run(SECONDS))
    trio = run()
    load_costs(trio)
    large = trio.models["large_ins"]
    for _ in range(2):
        large.decode_seconds[4].append(0.5)
    assert large.seconds(4)[-1] == 0.5
    load_costs(trio)  # the next answer of this run: what was measured stands
    assert list(large.decode_seconds[4]) == [1.1, 0.5, 0.5]


def test_the_stored_shape_comes_at_the_pace_of_this_run(run):
    """Written beside a busy neighbour, a profile would else rule drafting out for good."""
    save_costs(run(SECONDS, pace=10))
    quiet = run({"large_ins": {32: 2.0}}, times=2)
    load_costs(quiet)
    assert quiet.models["large_ins"].seconds(4)[-1] == pytest.approx(1.1)
    assert quiet.models["small_cpt"].seconds(1)[-1] == pytest.approx(1.0)  # nothing to go by
    cold = run({"large_ins": {32: 40.0}})  # a first decode may be slow
    load_costs(cold)
    assert cold.models["large_ins"].seconds(4)[-1] == pytest.approx(11)


def test_all_sizes_in_the_file_have_one_pace(run):
    """A busy run measures some of them; what it took would else suit no other."""
    save_costs(run(SECONDS))
    save_costs(run({"large_ins": {1: 10.0, 2: 10.2}}, times=2))
    quiet = run({"large_ins": {1: 1.0}}, times=2)
    load_costs(quiet)
    assert quiet.models["large_ins"].seconds(8).tolist()[1::2] == pytest.approx(
        [1.02, 1.1, 1.2, 1.3]
    )


@pytest.mark.parametrize("odd", [{2: 14.0}, {8: 9.0}, {4: 30.0, 8: 20.0}, {32: 60.0}], ids=str)
def test_a_size_seen_in_a_busy_moment_is_not_ruled_out(run, odd):
    """No batch is slower than its ids one by one, or than a much larger batch."""
    seconds = {**SECONDS, "large_ins": {**SECONDS["large_ins"], **odd}}
    trio, without = run(seconds), {n: s for n, s in SECONDS["large_ins"].items() if n not in odd}
    large = trio.models["large_ins"].seconds(32)
    assert large.tolist() == run({"large_ins": without}).models["large_ins"].seconds(32).tolist()
    assert plan(trio).n_draft > 0


def test_sizes_that_llama_cpp_is_slower_at_keep_their_times(run):
    """It takes some batches in fours; three ids then take as long as one by one."""
    trio = run({"large_ins": {1: 1.0, 2: 2.0, 3: 3.0, 4: 1.6, 8: 2.5}})
    assert trio.models["large_ins"].seconds(4).tolist() == [1.0, 2.0, 3.0, 1.6]


def test_sizes_that_this_run_did_not_decode_stay_in_the_file(run, file):
    save_costs(run(SECONDS))
    save_costs(run({"large_ins": {1: 3.0, 3: 3.1, 64: 9.0}}))
    trio = run()
    load_costs(trio)
    assert sizes(trio)["large_ins"] == [1, 2, 3, 4, 8, 32]
    assert '"64"' not in file.read_text()  # no draft is as long
    assert trio.models["large_ins"].seconds(1)[-1] == 3.0
    assert trio.models["large_ins"].seconds(8)[-1] == SECONDS["large_ins"][8]


def test_the_file_forgets_what_was_used_longest_ago(run, file, monkeypatch):
    monkeypatch.setattr(costs, "_MOST_KEPT", 3)
    file.parent.mkdir()
    file.write_text(json.dumps({f"old {n}": {"1": 1.0} for n in range(5)}))
    save_costs(run(SECONDS))
    assert not [key for key in json.loads(file.read_text()) if key.startswith("old")]
    kept = json.loads(file.read_text())
    save_costs(run(SECONDS))
    assert json.loads(file.read_text()).keys() == kept.keys()


@pytest.mark.parametrize(
    "options",
    [{"n_threads": 2}, {"type_k": "f32"}, {"flash_attn": True}, {"small_cpt": "another"}],
    ids=str,
)
def test_another_model_or_setting_has_costs_of_its_own(run, options, nano_files, tmp_path):
    save_costs(run(SECONDS))
    if "small_cpt" in options:
        options = {"small_cpt": tmp_path / "another.gguf"}
        options["small_cpt"].write_bytes(nano_files["small_cpt"].read_bytes())
    trio = run(**options)
    load_costs(trio)
    assert sizes(trio)["small_cpt"] == []


@pytest.mark.parametrize("name", ["devices", "build_info"])
def test_another_machine_or_build_has_costs_of_its_own(run, file, name, monkeypatch):
    save_costs(run(SECONDS))
    monkeypatch.setattr(costs, "_machine", costs._machine.__wrapped__)  # asked once a process
    other = {"devices": lambda: [], "build_info": lambda: {"llama-cpp-python": "0.0.0"}}[name]
    monkeypatch.setattr(costs.native, name, other)
    trio = run()
    load_costs(trio)
    assert sizes(trio) == dict.fromkeys(trio.models, [])
    save_costs(run(SECONDS))
    assert len(json.loads(file.read_text())) == 6


@pytest.mark.parametrize(
    "contents",
    [b"", b'{"a": ', b"\xff\xfe", b"[1, 2]", b'{"a": 3}', b"[" * 100_000, b"null"],
    ids=lambda c: str(c[:8]),
)
def test_a_damaged_or_foreign_file_is_no_profile(run, file, contents):
    file.parent.mkdir()
    file.write_bytes(contents)
    trio = run()
    load_costs(trio)
    assert plan(trio) == DraftPlan(0)
    save_costs(run(SECONDS))
    load_costs(trio)
    assert plan(trio).n_draft > 0


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1.0", "0.0", "true", '"2"', "9" * 400])
def test_what_is_no_time_in_an_entry_is_passed_over(run, file, seconds):
    save_costs(run(SECONDS))
    file.write_text(file.read_text().replace("1.02", seconds))
    trio = run()
    load_costs(trio)
    assert sizes(trio)["large_ins"] == [1, 4, 8, 32]


def test_an_entry_that_is_no_table_is_passed_over(run, file):
    save_costs(run(SECONDS))
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), [1.0])))
    trio = run()
    load_costs(trio)
    save_costs(trio)
    assert sizes(trio)["large_ins"] == []


def test_where_nothing_can_be_written_the_answer_comes_all_the_same(run, file):
    file.parent.write_text("a file where the folder would be")
    assert generate(run(), KAZAKH, **ANSWER).n_tokens > 0
    assert file.parent.read_text() == "a file where the folder would be"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(run, file, monkeypatch):
    save_costs(run(SECONDS))
    before = file.read_text()
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        save_costs(run({"large_ins": {1: 9.0}}))
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("options", [{"speculative": "off"}, {"n_draft": 3}], ids=str)
def test_where_lengths_are_fixed_nothing_is_read_or_written(run, file, options):
    generate(run(), KAZAKH, **ANSWER, **options)
    assert not file.exists()
    save_costs(run(SECONDS))
    before, trio = file.read_text(), run()
    generate(trio, KAZAKH, **ANSWER, **options)
    assert file.read_text() == before
    assert 8 not in trio.models["large_ins"].decode_seconds


def test_an_answer_cut_short_leaves_its_costs_even_where_the_trio_is_closed(run, file):
    trio = run(SECONDS)
    with pytest.raises(KeyboardInterrupt), kept_costs(trio):
        trio.close()
        raise KeyboardInterrupt
    assert file.exists()


def test_a_user_without_a_home_has_no_profile(run, monkeypatch):
    def none():
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(notes, "cache_folder", none)
    trio = run(SECONDS)
    save_costs(trio)
    load_costs(trio)
    assert plan(trio).n_draft > 0


def test_the_command_keeps_costs_for_its_next_run(trimix, file):
    arguments = ("generate", KAZAKH, "-n", "16", "--seed", "4", "--json", "--threads", "1")
    off = trimix(*arguments, "--speculative", "off")
    assert off.returncode == 0 and not file.exists()
    first = trimix(*arguments)
    once = json.loads(file.read_text())
    second = trimix(*arguments)
    twice = json.loads(file.read_text())
    assert first.returncode == second.returncode == 0
    assert once.keys() == twice.keys() and len(once) == 3
    for key, seconds in once.items():
        assert seconds.keys() <= twice[key].keys() and all(s > 0 for s in seconds.values())
