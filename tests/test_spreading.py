"""Which workers of other machines a trio goes to: laws, without any worker."""

from types import SimpleNamespace

import pytest
from test_planner import FAMILIES, GIB, a_file, card

from trimix_gguf.cli import served_trios
from trimix_gguf.cli.options import trio_arguments
from trimix_gguf.cli.plan import trio_files
from trimix_gguf.errors import MemoryNeededError, WorkerError
from trimix_gguf.machine import native, planner, rpc
from trimix_gguf.machine.borrowing import parse_workers
from trimix_gguf.machine.loading import AUTO, REMOTE_CPU, REMOTE_GPU, Loading
from trimix_gguf.machine.placement import MARGIN
from trimix_gguf.machine.planner import plan
from trimix_gguf.machine.spreading import together
from trimix_gguf.roles import ROLES
from trimix_gguf.trio.trio import _as_placed

CPU = card("CPU", 0, "CPU")
FILES = FAMILIES[0]  # some 9 GB and two of 0.9 GB


def workers(*free, kind=REMOTE_CPU):
    return [card(f"RPC{i}", int(gb * GIB), kind) for i, gb in enumerate(free)]


def places(found):
    return {role: model.device for role, model in found.models.items()}


def planned(*devices, ram=64, files=FILES):
    return plan(files, devices=[CPU, *devices], free_ram=ram * GIB)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ((40, 20, 10), ("RPC0", "RPC1", "RPC2")),
        ((10, 20, 40), ("RPC2", "RPC1", "RPC0")),
        ((20, 40), ("RPC1", "RPC0", "CPU")),
        ((40,), ("RPC0", "CPU", "CPU")),
    ],
)
def test_each_worker_has_one_model_and_large_ins_the_largest_worker(free, expected):
    found = planned(*workers(*free))
    assert tuple(places(found)[role] for role in ROLES) == expected and found.fits
    assert all(not model.chosen.split for model in found.models.values())


def test_a_model_that_no_worker_holds_is_split_and_each_part_fits():
    found = planned(*workers(9, 7, 6), ram=10)
    large = found.models["large_ins"]
    assert large.device == "RPC1+RPC0" and found.fits  # as few as will do
    assert found.models["small_cpt"].device == "RPC2"
    assert sum(large.chosen.split) == large.n_layers == large.most
    for name in ("RPC0", "RPC1"):
        room = found.rooms[name]
        assert 0 < room.need.total <= room.usable == room.free - MARGIN


def test_what_workers_do_not_hold_stays_here():
    large = planned(*workers(4, 3)).models["large_ins"]
    assert 0 < large.n_layers < large.most and large.in_ram.weights > 0


def test_models_share_a_worker_only_where_the_trio_does_not_fit_otherwise():
    assert places(planned(*workers(40), ram=8))["small_cpt"] == "CPU"
    found = planned(*workers(40), ram=2)
    assert set(places(found).values()) == {"RPC0"} and found.fits
    lone = planned(*workers(40, 30, 20), ram=2)
    assert found.models["large_ins"].wire > 10 * lone.models["large_ins"].wire


def test_the_output_layer_stays_here_beside_a_cpu_and_goes_to_a_card():
    """A row of logits is 0.6 MB; a CPU there is no faster than the one here."""
    near, far = (planned(*workers(40, kind=kind)).models["large_ins"] for kind in
                 (REMOTE_CPU, REMOTE_GPU))  # fmt: skip
    assert near.chosen.keeps_output and not far.chosen.keeps_output
    assert near.wire < 100_000 < 4 * 152_064 < far.wire
    assert near.in_ram.weights > far.in_ram.weights


def test_a_second_trio_is_planned_over_weights_that_are_on_several_workers(monkeypatch):
    """Bug: "device 'RPC1+RPC0' is not here", at the second trio of a server or a chat."""
    monkeypatch.setattr(planner, "shared_roles", lambda *_: list(ROLES))
    options = {role: {"n_gpu_layers": AUTO, "n_ctx": 256} for role in ROLES}
    asked, devices = planner.Asked(FILES, options, None), [CPU, *workers(8.85, 7, 6, 6)]
    first, second = planner.plan_together([asked] * 2, devices=devices, free_ram=10 * GIB)
    assert places(first)["large_ins"] == "RPC1+RPC0" and first.fits and second.fits
    assert places(second) == places(first)
    monkeypatch.setattr(native, "devices", lambda: devices)
    loaded = {role: SimpleNamespace(loading=Loading(**first.load_options(role))) for role in ROLES}
    wanted = {role: {**options[role], **_as_placed(loaded[role])} for role in ROLES}
    present = {file.path for file in FILES.values()}
    for role, placed in planner.place(FILES, wanted, None, present).items():
        assert placed.items() >= first.load_options(role).items()


def test_a_card_here_goes_before_a_worker():
    found = planned(card("CUDA0", 40 * GIB), *workers(80))
    assert places(found)["large_ins"] == "CUDA0"


def test_models_that_share_a_device_take_turns():
    devices = {"a": "RPC0+RPC1", "b": "RPC2", "c": "RPC1", "d": "CPU", "e": "CPU"}
    assert sorted(map(sorted, together(devices))) == [["a", "c"], ["b"], ["d", "e"]]


def test_a_tied_table_stays_here_once():
    files = {role: a_file(role, n_layer=8, n_embd=1024, tied=True) for role in ROLES}
    model = planned(*workers(40), files=files).models["large_ins"]
    table = 4.8 / 8 * 152_064 * 1024
    assert model.in_ram.weights < 1.1 * table


def test_addresses():
    assert parse_workers("a:1, 10.0.0.2:50052") == ["a:1", "10.0.0.2:50052"]
    for wrong in ("", "a", "a:0", "a:65536", "a:b", "a:1,a:1", "[::1]:1"):
        with pytest.raises(WorkerError):
            parse_workers(wrong)


def test_trios_that_share_weights_over_a_worker_are_planned_together(monkeypatch):
    """The second one has the room that the first one leaves: a worker says once what is free."""
    two = [{"trio": "nano"}] * 2
    monkeypatch.setenv(rpc.WORKERS, "[]")
    files, options, _ = trio_files(trio_arguments({"trio": "nano"}))

    def lend(free):
        devices = [CPU, card("RPC0", free, REMOTE_CPU)]
        monkeypatch.setattr(native, "devices", lambda: devices)
        return plan(files, devices=devices, free_ram=64 * GIB, options=options)

    one = lend(40 * GIB).rooms["RPC0"].need.total
    first, second = served_trios._places(two)
    assert first["large_ins"]["device"] == second["large_ins"]["device"] == "RPC0"
    assert lend(MARGIN + one).fits
    with pytest.raises(MemoryNeededError, match="RPC0"):
        served_trios._places(two)
